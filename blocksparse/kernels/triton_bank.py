"""Stored blocks to a filter bank and back, in one launch each: what PyTorch's own product needs around it on a GPU.

A bank is [K, R*S*C], the memory of [K, C, R, S] in channels_last: entry e of block-row b lies in rows b*bk on, in
columns indices[e]*bc on. Columns of a block-row are looked up in its ascending entries, so that one
program writes zeros and values alike, and no launch depends on which blocks are stored.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvGeometry
from ..index import IndexTables
from ..layout import empty
from .triton_conv import _launch

COLUMNS, ROWS = 64, 32  # of a program's tile
BLOCK = 1024  # values of a program


# One variant for all sizes and offsets: the kept launchers of triton_conv.py go by that.
_kernel = functools.partial(
    triton.jit, do_not_specialize=["indices_at", "rows_at", "order_at", "columns", "halvings", "size"]
)


@_kernel
def scatter_kernel(
    values, index, bank, indices_at, order_at, columns, halvings,
    BK: tl.constexpr, BC: tl.constexpr, ORDERED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    wanted = column // BC
    first, last = tl.load(index + row), tl.load(index + row + 1)
    low, high = first + wanted * 0, last + wanted * 0
    for _ in range(halvings):  # the first entry that is not below the wanted one
        middle = (low + high) // 2
        below = (low < high) & (tl.load(index + indices_at + middle, mask=low < high, other=0) < wanted)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    stored = (low < last) & (tl.load(index + indices_at + low, mask=low < last, other=-1) == wanted)
    block = values + low.to(tl.int64) * (BK * BC) + column % BC
    for start in range(0, BK, ROWS):
        i = start + tl.arange(0, ROWS)
        k = row * BK + i
        if ORDERED:
            k = tl.load(index + order_at + k, mask=i < BK, other=0)
        v = tl.load(block[None, :] + i[:, None] * BC, mask=stored[None, :] & (i < BK)[:, None], other=0.0)
        to = bank + k.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(to, v, mask=(i < BK)[:, None] & (column < columns)[None, :])


@_kernel
def gather_kernel(
    bank, index, out, rows_at, indices_at, order_at, columns, size,
    BK: tl.constexpr, BC: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    entry, of_block = i // (BK * BC), i % (BK * BC)
    k = tl.load(index + rows_at + entry, mask=inside, other=0) * BK + of_block // BC
    if ORDERED:
        k = tl.load(index + order_at + k, mask=inside, other=0)
    column = tl.load(index + indices_at + entry, mask=inside, other=0) * BC + of_block % BC
    tl.store(out + i, tl.load(bank + k.to(tl.int64) * columns + column, mask=inside, other=0.0), mask=inside)


def _order_at(tables: IndexTables) -> int:
    order = tables.layout.row_order
    return 0 if order is None else order[0]


def scatter(values: Tensor, tables: IndexTables, g: ConvGeometry) -> Tensor:
    """The filter bank [K, C, R, S] in filter order, channels_last, zeros where nothing is stored."""
    _, bk, bc = values.shape
    columns, ordered = g.c * g.taps, tables.row_order is not None
    bank = empty((g.k, g.c, g.r, g.s), values, True)

    def describe() -> tuple[int, dict[str, object]]:
        constants: dict[str, object] = {"columns": columns, "halvings": (g.c // bc * g.taps).bit_length(), "BK": bk}
        constants |= {"BC": bc, "ORDERED": ordered, "COLUMNS": COLUMNS, "ROWS": ROWS}
        return g.k // bk * triton.cdiv(columns, COLUMNS), constants

    offsets = tables.layout.indices[0], _order_at(tables)
    facts = g.weight_shape, bk, bc, ordered, values.dtype
    _launch(scatter_kernel, (values, tables.packed, bank), offsets, facts, describe)
    return bank


def gather(bank: Tensor, tables: IndexTables, g: ConvGeometry, values_shape: tuple[int, int, int]) -> Tensor:
    """The stored blocks [nnzb, bk, bc] of a filter bank [K, C, R, S] in filter order, whose memory is channels_last."""
    _, bk, bc = values_shape
    out, ordered = bank.new_empty(values_shape), tables.row_order is not None
    size = out.numel()

    def describe() -> tuple[int, dict[str, object]]:
        constants: dict[str, object] = {"columns": g.c * g.taps, "size": size, "BK": bk, "BC": bc}
        constants |= {"ORDERED": ordered, "BLOCK": BLOCK}
        return triton.cdiv(size, BLOCK), constants

    layout = tables.layout
    offsets = layout.rows[0], layout.indices[0], _order_at(tables)
    facts = g.weight_shape, values_shape, ordered, bank.dtype
    _launch(gather_kernel, (bank, tables.packed, out), offsets, facts, describe)
    return out
