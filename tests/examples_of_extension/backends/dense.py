"""Backend "dense": the stored blocks as a filter bank for torch.nn.functional. Its file is all that a backend needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blocksparse.backends import Backend, Work
from blocksparse.index import IndexTables
from blocksparse.layout import laid_out, memory_format_of


class Dense(Backend):
    def refusal(self, work: Work) -> str | None:
        half = work.dtype in (torch.float16, torch.bfloat16)
        return f"dtype = {work.dtype}: it takes float32 and float64" if half else None

    def fprop(self, work, tile, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None) -> Tensor:
        y = F.conv2d(x, bank(work, values, tables), bias, *conv(work))
        return laid_out(y, memory_format_of(x))

    def dgrad(self, work, tile, dy: Tensor, values: Tensor, tables: IndexTables, memory_format: str) -> Tensor:
        dx = torch.nn.grad.conv2d_input(work.geometry.x_shape, bank(work, values, tables), dy, *conv(work))
        return laid_out(dx, memory_format)

    def wgrad(self, work, tile, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        weight = torch.nn.grad.conv2d_weight(x, work.geometry.weight_shape, dy, *conv(work))
        weight = weight if tables.row_order is None else weight[tables.row_order]
        return weight.reshape(blocks(work))[places(work, tables)]


def conv(work: Work) -> tuple[tuple[int, int], ...]:
    return work.geometry.stride, work.geometry.padding, work.geometry.dilation


def blocks(work: Work) -> tuple[int, ...]:
    """A filter bank's shape, taken apart: block-rows, bk, channel blocks, bc, taps."""
    g, (bk, bc) = work.geometry, work.blocksize
    return g.k // bk, bk, g.c // bc, bc, g.taps


def places(work: Work, tables: IndexTables) -> tuple[Tensor | slice, ...]:
    """Where the stored blocks lie in it."""
    c_blocks = work.geometry.c // work.blocksize[1]
    return tables.rows, slice(None), tables.indices % c_blocks, slice(None), tables.indices // c_blocks


def bank(work: Work, values: Tensor, tables: IndexTables) -> Tensor:
    """[K, C, R, S] in filter order, zeros where nothing is stored."""
    dense = values.new_zeros(blocks(work))
    dense[places(work, tables)] = values
    dense = dense.view(work.geometry.weight_shape)
    return dense if tables.row_order is None else dense[torch.argsort(tables.row_order)]
