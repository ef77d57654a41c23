"""Transposable n:m: n of every m neighbouring input channels and of every m neighbouring filters.

The weight is then n:m in the forward product and, transposed, in the input gradient, too: both run on sparse tensor
cores in channels_last, where m neighbours of an operand's row are channels in the one and filters in the other.

Source: Hubara et al., Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable
Masks, NeurIPS 2021, for the problem. Its masks are within a factor of 2 of the best; these are the best.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Selection, named
from .n_m import NM
from .selection import balanced, staying

LISTED = 4  # tiles up to this size: every mask of one is tried; larger ones are transportation problems
CHUNK_CELLS = 16_000_000  # of the scores of all masks made at a time


@dataclass(frozen=True)
class Transposable(NM):
    """n weights of every m neighbouring input channels, and of every m neighbouring filters, at each tap."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"transposable {super().name}"

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        tiles = self.tiles(score)
        return self.untiled(best_tiles(tiles, self.kept(sparsity)), score.shape)

    def exchange(self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float) -> Selection:
        """A share of the kept weights goes, those of least |weight|; what is missing in a tile comes by growth.

        What stays is part of the old tile, so that a full tile with all of it exists: it is worth more than all growth.
        """
        stay, _ = staying(mask.reshape(1, -1), weight.reshape(1, -1), share)
        gain = self.tiles(growth)
        gain = gain / gain.amax().clamp_min(torch.finfo(gain.dtype).tiny)
        n = int(mask[0, : self.m, 0, 0].sum())
        value = torch.where(self.tiles(stay.view(mask.shape)), 1.0 + n * self.m, gain)
        return Selection(self.untiled(best_tiles(value, n), mask.shape), self.blocksize(mask.shape))

    def has(self, mask: Tensor) -> bool:
        if self.refuses(mask.shape) is not None:
            return False
        tiles = self.tiles(mask)
        counts = torch.cat([tiles.sum(1), tiles.sum(2)])
        return bool((counts == (counts.flatten()[0] if self.n is None else self.n)).all())

    def refuses(self, shape: Sequence[int]) -> str | None:
        if reason := super().refuses(shape):
            return reason
        return f"m = {self.m} does not divide K = {shape[0]}" if shape[0] % self.m else None

    def tiles(self, t: Tensor) -> Tensor:
        """[K, C, R, S] as [tiles, m filters, m channels]."""
        k, c, r, s = t.shape
        m = self.m
        return t.reshape(k // m, m, c // m, m, r * s).permute(0, 2, 4, 1, 3).reshape(-1, m, m)

    def untiled(self, tiles: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `tiles`."""
        k, c, r, s = shape
        m = self.m
        return tiles.view(k // m, c // m, r * s, m, m).permute(0, 3, 1, 4, 2).reshape(k, c, r, s)


def best_tiles(value: Tensor, n: int) -> Tensor:
    """bool [tiles, m, m]: the best n of every row that are n of every column, too.

        maximise sum value[b, i, j] * chosen[b, i, j]   with n in every row and in every column of a tile b

    Exact: for m <= 4 all masks of a tile are tried (90 of 2:4), of equal ones the first; larger tiles are
    transportation problems, see `balanced`.
    """
    m = value.shape[1]
    if n == m:
        return torch.ones_like(value, dtype=torch.bool)
    if m > LISTED:
        return balanced(value, n)
    masks = _masks(n, m).to(value.device)
    weights = masks.flatten(1).to(value.dtype).t()
    parts = value.flatten(1).split(max(1, CHUNK_CELLS // len(masks)))
    with torch.autocast(value.device.type, enabled=False):  # which would make the sums, and so the masks, coarser
        return masks[torch.cat([(part @ weights).argmax(1) for part in parts])]


@functools.cache
def _masks(n: int, m: int) -> Tensor:
    """bool [masks, m, m]: all with n in every row and in every column."""
    rows = [[i in kept for i in range(m)] for kept in itertools.combinations(range(m), n)]
    tiles = itertools.product(rows, repeat=m)
    found = [tile for tile in tiles if all(sum(column) == n for column in zip(*tile, strict=True))]
    return torch.tensor(found)


@named("transposable", 15)
def make_transposable(*, m: int = 4, n: int | None = None) -> Transposable:
    """n of every m neighbouring input channels and of every m filters: n:m in the input gradient, too"""
    return Transposable(m, n)
