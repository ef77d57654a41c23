"""Predicted passes of a BatchNorm with ReLU over memory on a GPU: the kernels' own, and those of PyTorch's operators.

What is predicted of these kernels comes from counts/norm.json, as gpu_cost.py says; of PyTorch's from bytes alone. All
bytes are taken to come from HBM, though a tensor that fits into the L2 cache is read from there the second time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import counted, gpu_cost, norm_cut
from .gpus import Gpu

ISSUE = 0.65  # of the rate of instructions that these kernels reach
LAST = 4  # loads that wait for each other where the last program adds up: the counter, parts, and their sums


class Pass(NamedTuple):
    """One launch: tensors of x's size that it reads and writes."""

    name: str
    reads: int
    writes: int

    @property
    def tensors(self) -> int:
        return self.reads + self.writes


def own(residual: bool, relu: bool) -> list[Pass]:
    """Of training, forward and backward, with a gradient for the residual: the kernels of triton_norm_kernels.py."""
    cut = residual and relu  # dresidual is written where it is not dy itself
    return [
        Pass("norm_statistics", 1, 0), Pass("norm_apply", 1 + residual, 1),
        Pass("norm_sums", 2 + cut, int(cut)), Pass("norm_dx", 2, 1),
    ]  # fmt: skip


def pytorch(residual: bool, relu: bool) -> list[Pass]:
    """The same by PyTorch's operators, one after the other; the gradient of a sum is free."""
    forward = [Pass("statistics", 1, 0), Pass("normalise", 1, 1)]
    forward += [Pass("add", 2, 1)] * residual + [Pass("relu", 1, 1)] * relu
    return [*forward, *[Pass("relu backward", 2, 1)] * relu, Pass("sums", 2, 0), Pass("dx", 2, 1)]


def seconds(
    step: Pass, sizes: tuple[int, int, int], dtype: torch.dtype, memory_format: str, residual: bool, gpu: Gpu
) -> float:
    """Of one of `own`, for a tensor of [rows, channels, inner] in memory."""
    tile = norm_cut.FORWARD if step.name in ("norm_statistics", "norm_apply") else norm_cut.BACKWARD
    cut, (rows, channels, inner) = norm_cut.cut(*sizes, gpu.units, tile), sizes
    math = "half" if dtype.itemsize == 2 else "ieee"
    turn = counted.norm(step.name, math, gpu.column, counted.triton_version(), memory_format, residual)
    size, summed = rows * channels * inner * dtype.itemsize, step.name in ("norm_statistics", "norm_sums")
    issue = norm_cut.WARPS * (cut.tiles * cut.chunks * turn.loop + cut.programs * turn.outside)
    demand = gpu_cost.Demand(
        programs=cut.programs, warps=norm_cut.WARPS, issue=issue, issue_share=ISSUE, wavefronts=0.0, flops=0.0,
        resident=gpu_cost.resident(turn.registers, norm_cut.WARPS, turn.shared, gpu), rate=1.0,
        l2_read=step.reads * size, l2_written=step.writes * size, hbm=step.tensors * size,
        chain=cut.chunks / cut.splits + (LAST if summed and cut.splits > 1 else 0),
    )  # fmt: skip
    return gpu_cost.estimate(demand, gpu).seconds


def pytorch_seconds(step: Pass, sizes: tuple[int, int, int], dtype: torch.dtype, gpu: Gpu) -> float:
    """Of one of `pytorch`."""
    rows, channels, inner = sizes
    return gpu_cost.passes(step.tensors * rows * channels * inner * dtype.itemsize, 1, gpu)
