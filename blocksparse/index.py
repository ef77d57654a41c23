"""The one int32 buffer that holds every table a kernel needs, and its layout.

The buffer's size depends only on (filter bank shape, blocksize, nnzb, row order or none), never on which blocks
are stored. So a new pattern of equal nnzb is written over the old one in place: pointers, grids, compiled code and
captured CUDA graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 4  # every table starts at a multiple of four int32: 16 bytes


class Layout(NamedTuple):
    """(start, length) of each table in the packed buffer, in int32. Kb = K/bk block-rows, Cb = C/bc channel blocks.

    The transposed tables list the same blocks for dgrad: the filter bank rotated by 180 degrees with K and C swapped
    has block-row c_block and block-col tap*Kb + k_block, and block t_perm[i] of `values`, transposed. No value moves.
    """

    indptr: tuple[int, int]  # [Kb + 1]    blocks of block-row b are indptr[b] .. indptr[b + 1]
    indices: tuple[int, int]  # [nnzb]     tap*Cb + c_block, ascending within a block-row
    rows: tuple[int, int]  # [nnzb]        block-row of each block (with indices: wgrad's coordinates)
    t_indptr: tuple[int, int]  # [Cb*T + 1]  transposed entries of (c_block, tap): t_indptr[c_block*T + tap] .. [+ 1]
    t_indices: tuple[int, int]  # [nnzb]   tap*Kb + k_block, ascending within a channel block
    t_perm: tuple[int, int]  # [nnzb]      which block of `values` this transposed entry is
    # Channel blocks stacked `stacked(...)` at a time; of no length where that is 1. An entry is a (tap, block-row) that
    # any block of the stack stores: at most nnzb of them, the rest are zeros.
    s_indptr: tuple[int, int]  # [stacks*T + 1]  entries of (stack, tap)
    s_indices: tuple[int, int]  # [nnzb]   tap*Kb + k_block, ascending within a stack
    s_first: tuple[int, int]  # [nnzb]     the first of its blocks in `values`: they follow each other there
    s_ranks: tuple[int, int]  # [nnzb]     4 bits for each block of the stack: 1 + its rank among them, 0: not stored
    row_order: tuple[int, int] | None  # [K] filter of each BSR row; None: row i is filter i


class Piece(NamedTuple):
    """A table as memory, for a launch: what a view tells of itself, without its cost."""

    packed: Tensor
    place: tuple[int, int]

    def data_ptr(self) -> int:
        return self.packed.data_ptr() + 4 * self.place[0]

    def numel(self) -> int:
        return self.place[1]

    def element_size(self) -> int:
        return 4


class IndexTables:
    """The tables of a packed buffer, by the names of `Layout`: each a view that is made when it is asked for."""

    __slots__ = ("layout", "packed")

    def __init__(self, packed: Tensor, layout: Layout) -> None:
        self.packed, self.layout = packed, layout

    def _view(self, place: tuple[int, int]) -> Tensor:
        start, length = place
        return self.packed[start : start + length]  # half the cost of narrow() and split()

    def piece(self, name: str) -> Piece | None:
        """A table as memory; None: there is no row order."""
        place = getattr(self.layout, name)
        return None if place is None else Piece(self.packed, place)

    @property
    def indptr(self) -> Tensor:
        return self._view(self.layout.indptr)

    @property
    def indices(self) -> Tensor:
        return self._view(self.layout.indices)

    @property
    def rows(self) -> Tensor:
        return self._view(self.layout.rows)

    @property
    def t_indptr(self) -> Tensor:
        return self._view(self.layout.t_indptr)

    @property
    def t_indices(self) -> Tensor:
        return self._view(self.layout.t_indices)

    @property
    def t_perm(self) -> Tensor:
        return self._view(self.layout.t_perm)

    @property
    def s_indptr(self) -> Tensor:
        return self._view(self.layout.s_indptr)

    @property
    def s_indices(self) -> Tensor:
        return self._view(self.layout.s_indices)

    @property
    def s_first(self) -> Tensor:
        return self._view(self.layout.s_first)

    @property
    def s_ranks(self) -> Tensor:
        return self._view(self.layout.s_ranks)

    @property
    def row_order(self) -> Tensor | None:
        return None if self.layout.row_order is None else self._view(self.layout.row_order)


def stacked(weight_shape: Sequence[int], blocksize: Sequence[int]) -> int:
    """How many adjacent channel blocks a tile of dgrad takes side by side: narrow ones fill 64 channels, 8 at most.

    1 where a block alone is wide enough, or too narrow for tensor cores (kernels/tiles.py: refusal).
    """
    bk, bc = blocksize
    if bk % 8 or bc not in (8, 16):
        return 1
    c_blocks = weight_shape[1] // bc
    return max(16 // bc, min(64 // bc, 1 << (c_blocks - 1).bit_length()))


def lengths(weight_shape: Sequence[int], blocksize: Sequence[int], nnzb: int) -> list[int]:
    """Lengths of the tables in the order of Layout, without row_order."""
    k, c, r, s = weight_shape
    bk, bc = blocksize
    stack = stacked(weight_shape, blocksize)
    stacks = [-(-(c // bc) // stack) * r * s + 1, nnzb, nnzb, nnzb] if stack > 1 else [0, 0, 0, 0]
    return [k // bk + 1, nnzb, nnzb, (c // bc) * r * s + 1, nnzb, nnzb, *stacks]


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGN) * ALIGN)
    return starts


def packed_size(weight_shape: Sequence[int], blocksize: Sequence[int], nnzb: int, row_order: bool) -> int:
    """Number of int32 in the packed buffer."""
    return _starts(lengths(weight_shape, blocksize, nnzb) + ([weight_shape[0]] if row_order else []))[-1]


def pack(
    weight_shape: Sequence[int],
    blocksize: Sequence[int],
    indptr: Tensor,
    indices: Tensor,
    row_order: Tensor | None,
) -> Tensor:
    """The packed buffer of a valid BSR index, on the index's device."""
    k, c, r, s = weight_shape
    bk, bc = blocksize
    k_blocks, c_blocks, taps = k // bk, c // bc, r * s
    counts = indptr[1:] - indptr[:-1]
    rows = torch.repeat_interleave(torch.arange(k_blocks, device=indices.device), counts, output_size=indices.numel())
    cell = (indices % c_blocks) * taps + indices // c_blocks  # (c_block, tap)
    # Stable, and blocks are stored by ascending block-row: ties stay in ascending k_block.
    cell_sorted, t_perm = torch.sort(cell, stable=True)
    t_indices = (indices // c_blocks * k_blocks + rows)[t_perm]
    t_indptr = torch.searchsorted(
        cell_sorted, torch.arange(c_blocks * taps + 1, device=indices.device, dtype=cell_sorted.dtype)
    )
    tables = [indptr, indices, rows, t_indptr, t_indices, t_perm]
    tables += _stacks(stacked(weight_shape, blocksize), k_blocks, c_blocks, taps, indices, rows)
    if row_order is not None:
        tables.append(row_order)
    starts = _starts([t.numel() for t in tables])
    packed = torch.zeros(starts[-1], dtype=torch.int32, device=indices.device)
    for start, table in zip(starts, tables, strict=False):
        packed[start : start + table.numel()] = table
    return packed


def _stacks(stack: int, k_blocks: int, c_blocks: int, taps: int, indices: Tensor, rows: Tensor) -> list[Tensor]:
    """s_indptr, s_indices, s_first and s_ranks (see Layout). No shape depends on which blocks are stored."""
    if stack == 1:
        return [indices.new_zeros(0)] * 4
    nnzb, c_block, tap = indices.numel(), indices % c_blocks, indices // c_blocks
    cell = c_block // stack * taps + tap  # (stack, tap)
    # Stable, and the blocks of an entry follow each other in `values`: they stay in that order.
    entry, block = torch.sort(cell * k_blocks + rows, stable=True)
    starts = torch.ones(nnzb + 1, dtype=torch.int64, device=indices.device)
    starts[0] = 0
    starts[2:] = entry[1:] != entry[:-1]
    before = torch.cumsum(starts, 0)  # entries that start before a block
    number = before[1:] - 1
    place = torch.where(starts[1:] > 0, number, nnzb)  # where what starts an entry goes; the rest, to one too many

    def of_entries(of_blocks: Tensor) -> Tensor:
        return torch.zeros_like(before).scatter_(0, place, of_blocks)[:nnzb]

    at = torch.arange(nnzb, device=indices.device)
    ranks = (1 + at - of_entries(at)[number]) << (4 * (c_block[block] % stack))
    ranks = torch.zeros_like(at).scatter_add_(0, number, ranks)
    cells = -(-c_blocks // stack) * taps
    blocks_before = torch.searchsorted(cell[block], torch.arange(cells + 1, device=indices.device, dtype=cell.dtype))
    return [
        before[blocks_before],
        of_entries((tap * k_blocks + rows)[block]),
        of_entries(block),
        torch.where(ranks < 2**31, ranks, ranks - 2**32),  # all 32 bits
    ]


def layout_of(
    size: Sequence[int],
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    blocksize: Sequence[int],
    nnzb: int,
    who: str,
) -> Layout:
    """Where the tables lie in a packed buffer of this size; ValueError when it cannot be this layout."""
    sizes = lengths(weight_shape, blocksize, nnzb)
    plain, ordered = (packed_size(weight_shape, blocksize, nnzb, flag) for flag in (False, True))
    if dtype != torch.int32 or tuple(size) not in ((plain,), (ordered,)):
        raise ValueError(
            f"{who}: the packed index is {dtype} {tuple(size)}; a filter bank {tuple(weight_shape)} with"
            f" {nnzb} blocks of {tuple(blocksize)} needs int32 ({plain},), or ({ordered},) with a row order."
            " Take it from BSRPattern.index"
        )
    starts = _starts(sizes)
    order = (starts[-1], weight_shape[0]) if size[0] == ordered else None
    return Layout(**dict(zip(Layout._fields, zip(starts, sizes, strict=False), strict=False)), row_order=order)


def unpack(
    packed: Tensor, weight_shape: Sequence[int], blocksize: Sequence[int], nnzb: int, who: str = "unpack()"
) -> IndexTables:
    """The tables in `packed`; ValueError when its size cannot be this layout."""
    return IndexTables(packed, layout_of(packed.shape, packed.dtype, weight_shape, blocksize, nnzb, who))
