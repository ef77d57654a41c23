"""What the arguments of a product must be, and the sentence for each that is not: who, what came, what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import ConvGeometry

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Facts(NamedTuple):
    """What the checks read of a tensor. A tensor itself will do, too."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device


def check_alike(who: str, tensors: dict[str, Tensor | Facts], index: Tensor | Facts) -> None:
    """All tensors share the dtype and device of the first; the index is on that device."""
    (first, lead), *others = tensors.items()
    if lead.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{who}: {first} has dtype {lead.dtype}; it needs one of {names}")
    for name, t in others:
        if t.dtype != lead.dtype:
            raise ValueError(
                f"{who}: {name} has dtype {t.dtype} and {first} {lead.dtype}; they need one dtype"
                f" ({name}.to({lead.dtype}), or torch.autocast)"
            )
        if t.device != lead.device:
            raise ValueError(f"{who}: {name} is on {t.device} and {first} on {lead.device}; they need one device")
    if index.device != lead.device and lead.device.type != "meta":  # shapes alone need no index
        raise ValueError(
            f"{who}: the pattern is on {index.device} and {first} on {lead.device};"
            f" use pattern.to({str(lead.device)!r})"
        )


def check_values_shape(who: str, values_shape: Sequence[int], weight_shape: Sequence[int]) -> None:
    k, c = weight_shape[0] // (*weight_shape, 1)[4], weight_shape[1]  # of each group
    if len(values_shape) != 3 or k % max(1, values_shape[1]) or c % max(1, values_shape[2]) or 0 in values_shape[1:]:
        raise ValueError(
            f"{who}: values has shape {tuple(values_shape)}; it needs (nnzb, bk, bc) where bk divides K = {k} and"
            f" bc divides C = {c}"
        )


def check_residual(residual: Tensor, x: Tensor, y_shape: Sequence[int]) -> None:
    if residual.shape != torch.Size(y_shape):
        raise ValueError(
            f"conv2d(): residual has shape {tuple(residual.shape)}; this convolution needs {tuple(y_shape)}, that of y"
        )
    if residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"conv2d(): residual is {residual.dtype} on {residual.device} and x {x.dtype} on {x.device}; they need one"
            " dtype and one device"
        )


def check_dy(who: str, dy: Tensor | Facts, geometry: ConvGeometry) -> None:
    if tuple(dy.shape) != geometry.y_shape:
        raise ValueError(
            f"{who}: dy has shape {tuple(dy.shape)}; this convolution needs {geometry.y_shape} = (N, K, P, Q)"
        )


# Each of the three takes the arguments of its op before `memory_format` and `backend`, and returns the geometry and the
# shape of values.


def check_fprop(
    x: Tensor | Facts, values: Tensor | Facts, index: Tensor | Facts, bias: Tensor | Facts | None,
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> tuple[ConvGeometry, Sequence[int]]:  # fmt: skip
    who = "conv2d()"
    check_alike(who, {"x": x, "values": values} | ({} if bias is None else {"bias": bias}), index)
    check_values_shape(who, values.shape, weight_shape)
    if bias is not None and tuple(bias.shape) != (weight_shape[0],):
        raise ValueError(f"{who}: bias has shape {tuple(bias.shape)}; it needs ({weight_shape[0]},) = (K,)")
    return ConvGeometry.of(x.shape, weight_shape, stride, padding, dilation, who), values.shape


def check_dgrad(
    dy: Tensor | Facts, values: Tensor | Facts, index: Tensor | Facts, x_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> tuple[ConvGeometry, Sequence[int]]:  # fmt: skip
    who = "conv2d_dgrad()"
    check_alike(who, {"dy": dy, "values": values}, index)
    check_values_shape(who, values.shape, weight_shape)
    geometry = ConvGeometry.of(x_shape, weight_shape, stride, padding, dilation, who)
    check_dy(who, dy, geometry)
    return geometry, values.shape


def check_wgrad(
    x: Tensor | Facts, dy: Tensor | Facts, index: Tensor | Facts, values_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> tuple[ConvGeometry, Sequence[int]]:  # fmt: skip
    who = "conv2d_wgrad()"
    check_alike(who, {"x": x, "dy": dy}, index)
    check_values_shape(who, values_shape, weight_shape)
    geometry = ConvGeometry.of(x.shape, weight_shape, stride, padding, dilation, who)
    check_dy(who, dy, geometry)
    return geometry, values_shape
