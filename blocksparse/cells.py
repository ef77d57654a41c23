"""The cells of a filter bank [K, C, R, S] as blocks, and back; filters are in BSR row order here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of each stored block: block-row, c_block and tap, int64.
Places = tuple[Tensor, Tensor, Tensor]


def marked_blocks(mask: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """bool [K/bk, R*S*C/bc]: the blocks with at least one True cell of bool [K, C, R, S]."""
    (k, c, r, s), (bk, bc) = mask.shape, blocksize
    # Byte max-reductions over one axis at a time vectorise; any() over several axes does not.
    cells = mask.contiguous().view(torch.uint8).view(k // bk, bk, c * r * s)
    cells = cells.amax(1) if bk > 1 else cells[:, 0]
    cells = cells.view(k // bk, c // bc, bc, r * s)
    cells = cells.amax(2) if bc > 1 else cells[:, :, 0]
    return cells.transpose(1, 2).reshape(k // bk, -1) != 0


def blocks_of(weight: Tensor, blocksize: tuple[int, int], places: Places) -> Tensor:
    """[nnzb, bk, bc] from [K, C, R, S]."""
    (k, c, r, s), (bk, bc), (rows, c_block, tap) = weight.shape, blocksize, places
    return weight.reshape(k // bk, bk, c // bc, bc, r * s)[rows, :, c_block, :, tap]


def bank_of(values: Tensor, shape: Sequence[int], places: Places) -> Tensor:
    """[K, C, R, S] from [nnzb, bk, bc], zeros elsewhere."""
    (k, c, r, s), (bk, bc) = shape, values.shape[1:]
    blocks = values.new_zeros((k // bk, c // bc, r * s, bk, bc))
    rows, c_block, tap = places
    blocks = blocks.index_put((rows, c_block, tap), values)
    return blocks.permute(0, 3, 1, 4, 2).reshape(k, c, r, s)
