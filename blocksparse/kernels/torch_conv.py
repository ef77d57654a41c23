"""The dense products: stored blocks are scattered into a filter bank, and PyTorch's own convolution does the rest.

Every device, dtype and block. A plan runs it where no other backend can, and where stored blocks would take longer: few
pixels, few channels, few zeros. One filter bank lives as long as the call, in groups [K, C/groups, R, S] and never that
of all channels; weights, gradients and optimizer state stay blocks. It never reads the index on the host. On a GPU with
Triton one launch makes the bank, and one takes from it, unless there are groups.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..geometry import ConvGeometry
from ..groups import of_diagonal
from ..index import IndexTables
from ..layout import empty, is_channels_last
from . import aten_conv


def _blocks(bank: Tensor, tables: IndexTables, bk: int, bc: int, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A filter bank [K, C/groups, R, S] as its blocks, a view, and where each stored one lies in it.

    In channels_last that is [Kb, T*Cb, bk, bc] and the index as it stands, else [Kb, T, Cb, bk, bc]. Both tables become
    int64 in one pass: they lie side by side.
    """
    (start, nnzb), (then, _) = tables.layout.indices, tables.layout.rows
    both = tables.packed[start : then + nnzb].long()
    cols, rows = both[:nnzb], both[then - start :]
    if groups > 1:
        cols = of_diagonal(cols, bank.shape, (bk, bc), groups)
    lines = bank.permute(0, 2, 3, 1)
    if bank.shape[2] * bank.shape[3] == 1 or lines.is_contiguous():
        return lines.flatten(1).unflatten(1, (-1, bc)).unflatten(0, (-1, bk)).transpose(1, 2), (rows, cols)
    c_blocks = bank.shape[1] // bc
    blocks = bank.flatten(2).unflatten(1, (-1, bc)).unflatten(0, (-1, bk)).permute(0, 4, 2, 1, 3)
    return blocks, (rows, cols // c_blocks, cols % c_blocks)


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


@functools.cache
def _in_one_launch() -> Any:
    """triton_bank.py, where Triton can be imported; else None."""
    try:
        from . import triton_bank
    except ImportError:
        return None
    return triton_bank


def _bank(values: Tensor, tables: IndexTables, g: ConvGeometry, channels_last: bool) -> Tensor:
    """[K, C/groups, R, S] in filter order, zeros where nothing is stored."""
    _, bk, bc = values.shape
    in_one = _on_gpu(values) and values.numel() and (channels_last or g.taps == 1) and g.groups == 1
    if in_one and (kernels := _in_one_launch()):
        return kernels.scatter(values, tables, g)
    bank = empty(g.dense_shape, values, channels_last).zero_()
    blocks, where = _blocks(bank, tables, bk, bc, g.groups)
    blocks[where] = values
    if tables.row_order is None:
        return bank
    return torch.empty_like(bank).index_copy_(0, tables.row_order.long(), bank)


def _compute(t: Tensor) -> Tensor:
    """t as it is convolved: on a CPU float16 and bfloat16 are computed in float32."""
    half = t.dtype in (torch.float16, torch.bfloat16)
    return t.float() if half and t.device.type == "cpu" else t


@torch.no_grad()
def fprop(x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """y [N, K, P, Q] in the memory format of x; bias [K] in filter order, or None."""
    last = is_channels_last(x)
    if x.numel() == 0:
        return aten_conv.bias_alone(geometry.y_shape, x, bias, last)
    bank = _bank(_compute(values), tables, geometry, aten_conv.works_in(last, x, geometry))
    y = aten_conv.fprop(_compute(x), bank, None if bias is None else _compute(bias), geometry)
    return y.to(x.dtype)


@torch.no_grad()
def dgrad(dy: Tensor, values: Tensor, tables: IndexTables, geometry: ConvGeometry, channels_last: bool) -> Tensor:
    """dx [N, C, H, W], channels_last or contiguous."""
    if dy.numel() == 0:
        return empty(geometry.x_shape, dy, channels_last).zero_()
    bank = _bank(_compute(values), tables, geometry, aten_conv.works_in(channels_last, dy, geometry))
    return aten_conv.dgrad(_compute(dy), bank, geometry, channels_last).to(dy.dtype)


@torch.no_grad()
def wgrad(
    x: Tensor, dy: Tensor, tables: IndexTables, geometry: ConvGeometry, values_shape: tuple[int, int, int]
) -> Tensor:
    """dvalues [nnzb, bk, bc]."""
    _, bk, bc = values_shape
    if x.numel() == 0:
        return x.new_zeros(values_shape)
    bank = aten_conv.wgrad(_compute(x), _compute(dy), geometry)
    one_row = bank.permute(0, 2, 3, 1).is_contiguous()  # memory of channels_last
    if _on_gpu(bank) and one_row and geometry.groups == 1 and values_shape[0] and (kernels := _in_one_launch()):
        return kernels.gather(bank, tables, geometry, values_shape)
    if tables.row_order is not None:
        bank = bank.index_select(0, tables.row_order)
    blocks, where = _blocks(bank, tables, bk, bc, geometry.groups)
    return x.new_empty(values_shape).copy_(blocks[where])
