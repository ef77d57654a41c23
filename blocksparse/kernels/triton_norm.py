"""Batch normalisation by Triton, on the host: memory and launches of the kernels in triton_norm_kernels.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..layout import channels_of
from . import gpus, norm_cut
from .norm_cut import LIMIT, WARPS, Cut
from .triton_conv import _launch, _zeros
from .triton_norm_kernels import norm_apply_kernel, norm_dx_kernel, norm_statistics_kernel, norm_sums_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN, FROM_Y, FROM_X = range(3)  # RELU in triton_norm_kernels.py


def refusal(x: Tensor) -> str | None:
    """Why it cannot run on this tensor, or None."""
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if max(x.shape[1], x.numel() // x.shape[1]) > LIMIT:
        return f"{tuple(x.shape)} has more than {LIMIT} numbers a channel"
    arch = gpus.arch_of(x.device)
    if arch.startswith("sm_") and int(arch[3:].rstrip("af")) < 80:
        return f"the device is {arch}; it needs sm_80 or later"
    return None


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics, weight and bias are computed in."""
    return torch.float32


def units(device: torch.device) -> int:
    """Multiprocessors; 1 of what is no GPU (Triton's interpreter)."""
    gpu = gpus.of(device)
    return gpu.units if gpu else 1


def _cut(x: Tensor, memory_format: str, tile: int) -> Cut:
    return norm_cut.cut(*channels_of(x, memory_format), units(x.device), tile)


def _constants(c: Cut, **more: object) -> dict[str, object]:
    return {
        "lines": c.lines, "length": c.length, "apart": c.apart, "wide": c.wide, "chunks": c.chunks,
        "splits": c.splits, "tiles": c.tiles, "channels": c.channels, "ROWS": c.block_rows, "COLS": c.block_cols,
        "ACROSS": c.across, "EVEN": c.even, "VECTORS": c.vectors, "num_warps": WARPS, **more,
    }  # fmt: skip


def _workspace(x: Tensor, c: Cut) -> tuple[Tensor | None, Tensor | None]:
    """What splits leave to the last one, and a counter of each tile; nothing where a tile has one program."""
    if c.splits == 1:
        return None, None
    parts = torch.empty(c.splits * (2 * c.channels + c.tiles), dtype=torch.float32, device=x.device)
    return parts, _zeros(x, c.tiles)


def _members(c: Cut) -> int:
    """Splits that are added up at once."""
    return min(triton.next_power_of_2(c.splits), 64)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, norm: tuple[int | float, ...], memory_format: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, invstd); in training the running statistics are updated in place.

    x, residual and y are dense in one memory format; the others are [C], float32. norm: training, relu, eps, momentum.
    """
    training, relu = norm[:2]
    eps, momentum = map(float, norm[2:])
    c = _cut(x, memory_format, norm_cut.FORWARD)
    y = torch.empty_like(x)
    mean, invstd = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    if training:
        parts, counters = _workspace(x, c)
        _launch(
            norm_statistics_kernel, (x, running_mean, running_var, parts, counters, mean, invstd), (eps, momentum),
            (c, x.dtype), lambda: (c.programs, _constants(c, MEMBERS=_members(c))),
        )  # fmt: skip
        given: tuple[Tensor | None, ...] = mean, invstd, y, None, None
    else:
        given = running_mean, running_var, y, mean, invstd
    constants = {"KEPT": not training, "RELU": bool(relu)}
    _launch(
        norm_apply_kernel, (x, residual, weight, bias, *given), (eps,), (c, x.dtype, *constants.values()),
        lambda: (c.programs, _constants(c, **constants)),
    )  # fmt: skip
    return y, mean, invstd


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor,
    norm: tuple[int | float, ...], memory_format: str, wants_x: bool, wants_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dweight, dbias); y is needed where a residual was added before a ReLU.

    In training that is two passes, else one. dresidual is dy itself where there is no ReLU.
    """
    training, relu = norm[:2]
    c = _cut(x, memory_format, norm_cut.BACKWARD)
    cuts = PLAIN if not relu else FROM_X if y is None else FROM_Y
    dweight, dbias, offset, slope = mean.new_empty((4, *mean.shape))
    dresidual = torch.empty_like(x) if wants_residual and relu else None
    dx = torch.empty_like(x) if wants_x else None
    parts, counters = _workspace(x, c)
    _launch(
        norm_sums_kernel,
        (
            dy, x, y, weight, bias, mean, invstd, parts, counters, dweight, dbias,
            *((offset, slope) if training else (None, None)), dresidual, None if training else dx,
        ),
        (), (c, x.dtype, cuts), lambda: (c.programs, _constants(c, MEMBERS=_members(c), RELU=cuts)),
    )  # fmt: skip
    if training and dx is not None:
        if dresidual is not None:  # what the ReLU let pass
            dy, y, cuts = dresidual, None, PLAIN
        _launch(
            norm_dx_kernel, (dy, x, y, weight, bias, mean, invstd, offset, slope, dx), (), (c, x.dtype, cuts),
            lambda: (c.programs, _constants(c, RELU=cuts)),
        )  # fmt: skip
    return dx, (dresidual if relu else dy) if wants_residual else None, dweight, dbias
