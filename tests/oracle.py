"""Holds products to the float64 reference, by the one rule for 'equal' (bench/shared/equal.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import blocksparse as bs
from bench.shared.equal import judge
from strategies import guarded


def assert_close(actual: Tensor, exact: Tensor, torch_own: Tensor, magnitude: Tensor, what: str) -> None:
    """Hold `actual` against `exact` (float64) by the rule of bench/shared/equal.py, which the benchmarks keep, too.

    `torch_own` is PyTorch's dense result in the same dtype; `magnitude` the same product of absolute values.
    """
    largest = float(magnitude.abs().max()) if magnitude.numel() else 0.0
    verdict = judge(actual, exact.cpu(), torch_own, largest)
    assert verdict.ok, f"{what}: {verdict}"


def as_wide_as_its_stride(
    x: Tensor,
    shape: tuple[int, int, int, int],
    dy: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Any, ...]:
    """Arguments of conv2d_weight for the same gradient, of an x that is no narrower than the stride.

    oneDNN's bf16 weight gradient of others reads what lies behind x, or memory that nobody wrote (PyTorch 2.13, CPUs
    with AVX-512). Their padding becomes pixels, of which those that are read stay.
    """
    if all(size >= step for size, step in zip(x.shape[2:], stride, strict=True)):
        return x, shape, dy, stride, padding, dilation
    steps = [step if outputs > 1 else 1 for step, outputs in zip(stride, dy.shape[2:], strict=True)]
    read_h, read_w = (
        (outputs - 1) * step + (taps - 1) * apart + 1
        for outputs, step, taps, apart in zip(dy.shape[2:], steps, shape[2:], dilation, strict=True)
    )
    (above, left), (h, w) = padding, x.shape[2:]
    x = F.pad(x, (left, read_w - left - w, above, read_h - above - h))  # a negative number of zeros takes pixels away
    return guarded(x, x.device, around=0.0), shape, dy, steps, (0, 0), dilation


def assert_products(
    x: Tensor,
    values: Tensor,
    pattern: bs.BSRPattern,
    bias: Tensor | None,
    dy: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    backend: str | None,
    kinds: tuple[str, ...] = ("fprop", "dgrad", "wgrad"),
) -> dict[str, Tensor]:
    """Run the kinds on `backend`, hold each to the reference, and return the results."""
    conv = (stride, padding, dilation)
    host = pattern.to("cpu")
    x_, v_, dy_ = (t.detach().cpu() for t in (x, values, dy))
    b_ = None if bias is None else bias.detach().cpu()
    # PyTorch's own error is measured in its contiguous format: oneDNN's channels_last weight gradient of strided 1x1
    # convolutions is wrong for few channels (seen in PyTorch 2.13). And between zeros, which poison nothing.
    own_x, own_dy = guarded(x.detach(), x.device, around=0.0), guarded(dy.detach(), dy.device, around=0.0)
    # Strides of channels_last along sizes of one make PyTorch choose it, and crash where an axis meets only padding.
    weight = pattern.to_dense(values.detach()).flatten().view(pattern.shape)
    results = {}
    if "fprop" in kinds:
        y = bs.conv2d(x, values, pattern, bias, *conv, backend=backend)
        assert_close(
            y.detach(),
            bs.reference.fprop(x_, v_, host, b_, *conv),
            F.conv2d(own_x, weight, None if bias is None else bias.detach(), *conv),
            bs.reference.fprop(x_.abs(), v_.abs(), host, None if b_ is None else b_.abs(), *conv),
            f"fprop on {backend}",
        )
        results["fprop"] = y.detach()
    if "dgrad" in kinds:
        dx = bs.conv2d_dgrad(dy, values, pattern, x.shape, *conv, backend=backend)
        assert_close(
            dx,
            bs.reference.dgrad(dy_, v_, host, x.shape, *conv),
            torch.nn.grad.conv2d_input(x.shape, weight, own_dy, *conv),
            bs.reference.dgrad(dy_.abs(), v_.abs(), host, x.shape, *conv),
            f"dgrad on {backend}",
        )
        results["dgrad"] = dx
    if "wgrad" in kinds:
        dv = bs.conv2d_wgrad(x, dy, pattern, *conv, backend=backend)
        dense = torch.nn.grad.conv2d_weight(*as_wide_as_its_stride(own_x, pattern.shape, own_dy, *conv))
        assert_close(
            dv,
            bs.reference.wgrad(x_, dy_, host, *conv),
            pattern.values_from_dense(dense),
            bs.reference.wgrad(x_.abs(), dy_.abs(), host, *conv),
            f"wgrad on {backend}",
        )
        results["wgrad"] = dv
    return results
