"""IndexTables: the one int32 buffer that holds every table a kernel needs, and its layout.

The buffer's size depends only on (filter bank shape, blocksize, nnzb, row order or none), never on which blocks
are stored. So a new pattern of equal nnzb is written over the old one in place: pointers, grids, compiled code and
captured CUDA graphs stay valid.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 4  # every table starts at a multiple of four int32: 16 bytes


class IndexTables(NamedTuple):
    """Views into the packed buffer. Kb = K/bk block-rows, Cb = C/bc channel blocks, T = R*S taps.

    The transposed tables list the same blocks for dgrad: the filter bank rotated by 180 degrees with K and C swapped
    has block-row c_block and block-col tap*Kb + k_block, and block t_perm[i] of `values`, transposed. No value moves.
    """

    packed: Tensor  # the whole buffer
    indptr: Tensor  # [Kb + 1]    blocks of block-row b are indptr[b] .. indptr[b + 1]
    indices: Tensor  # [nnzb]     tap*Cb + c_block, ascending within a block-row
    rows: Tensor  # [nnzb]        block-row of each block (with indices: wgrad's coordinates)
    t_indptr: Tensor  # [Cb*T + 1]  transposed entries of (c_block, tap) are t_indptr[c_block*T + tap] .. [+ 1]
    t_indices: Tensor  # [nnzb]   tap*Kb + k_block, ascending within a channel block
    t_perm: Tensor  # [nnzb]      which block of `values` this transposed entry is
    row_order: Tensor | None  # [K] filter of each BSR row; None: row i is filter i


def lengths(weight_shape: Sequence[int], blocksize: Sequence[int], nnzb: int) -> list[int]:
    """Lengths of the tables in the order of IndexTables, without row_order."""
    k, c, r, s = weight_shape
    bk, bc = blocksize
    return [k // bk + 1, nnzb, nnzb, (c // bc) * r * s + 1, nnzb, nnzb]


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
    if row_order is not None:
        tables.append(row_order)
    starts = _starts([t.numel() for t in tables])
    packed = torch.zeros(starts[-1], dtype=torch.int32, device=indices.device)
    for start, table in zip(starts, tables, strict=False):
        packed[start : start + table.numel()] = table
    return packed


def unpack(
    packed: Tensor, weight_shape: Sequence[int], blocksize: Sequence[int], nnzb: int, who: str = "unpack()"
) -> IndexTables:
    """Views of the tables in `packed`; ValueError when its size cannot be this layout."""
    sizes = _split(tuple(weight_shape), tuple(blocksize), nnzb, packed.numel())
    if packed.dtype != torch.int32 or packed.dim() != 1 or sizes is None:
        plain, ordered = (packed_size(weight_shape, blocksize, nnzb, flag) for flag in (False, True))
        raise ValueError(
            f"{who}: the packed index is {packed.dtype} {tuple(packed.shape)}; a filter bank {tuple(weight_shape)} with"
            f" {nnzb} blocks of {tuple(blocksize)} needs int32 ({plain},), or ({ordered},) with a row order."
            " Take it from BSRPattern.index"
        )
    indptr, _, indices, _, rows, _, t_indptr, _, t_indices, _, t_perm, _, *order = packed.split_with_sizes(sizes)
    return IndexTables(packed, indptr, indices, rows, t_indptr, t_indices, t_perm, order[0] if order else None)


_views: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], list[Tensor | None]]] = {}


def unpack_once(
    packed: Tensor,
    weight_shape: tuple[int, int, int, int],
    blocksize: tuple[int, int],
    nnzb: int,
    who: str = "unpack_once()",
) -> IndexTables:
    """unpack(), remembered by the tensor for as long as its memory stays: seven views cost as much as a launch."""
    key, layout = id(packed), (packed.data_ptr(), packed.numel(), weight_shape, blocksize, nnzb)
    found = _views.get(key)
    if found is None or found[0]() is not packed or found[1] != layout:
        # Views of a detached alias: views of `packed` itself would keep it alive for ever.
        _, *views = unpack(packed.data, weight_shape, blocksize, nnzb, who)
        # The default keeps the dictionary for tensors that die with the interpreter, after this module's names.
        found = weakref.ref(packed, lambda _, kept=_views: kept.pop(key, None)), layout, views  # type: ignore[misc]
        _views[key] = found
    return IndexTables(packed, *found[2])  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _split(weight_shape: tuple[int, ...], blocksize: tuple[int, ...], nnzb: int, size: int) -> list[int] | None:
    """Lengths of the tables and of the gaps between them, in turn; None if no layout has this size."""
    for ordered in (False, True):
        if packed_size(weight_shape, blocksize, nnzb, ordered) == size:
            tables = lengths(weight_shape, blocksize, nnzb) + ([weight_shape[0]] if ordered else [])
            return [n for table in tables for n in (table, -table % ALIGN)]
    return None
