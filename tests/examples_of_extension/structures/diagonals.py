"""Diagonals of the matrix of kernels: every filter keeps equally many, at shifted places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrbp.structures.base import Selection, Structure, named
from hrbp.structures.selection import check_score, swapped, top


@dataclass(frozen=True)
class Diagonals(Structure):
    """Kernels (k, c) with the same (c - k) mod C are kept or dropped together."""

    name: str = "diagonal"

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Selection:
        sums = self.sums(check_score(score, sparsity, f"make_mask({self.name!r})"))
        return self.choice(top(sums, self.count(score.shape, 1 - sparsity)), score.shape)

    def density(self, shape: Sequence[int], density: float) -> float:
        return self.count(shape, density) / shape[1]

    def exchange(self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float) -> Selection:
        kept, worth, wish = (self.sums(t)[None] for t in (mask.float(), weight, growth))
        return self.choice(swapped(kept > 0, worth, wish, share)[0], mask.shape)

    def count(self, shape: Sequence[int], density: float) -> int:
        return max(1, round(density * shape[1]))

    def places(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """int [K, C]: the diagonal of each kernel."""
        k, c = (torch.arange(size, device=device) for size in shape[:2])
        return (c - k[:, None]) % shape[1]

    def sums(self, score: Tensor) -> Tensor:
        """[C]: the score of each diagonal."""
        places = self.places(score.shape, score.device)
        return score.new_zeros(score.shape[1]).index_add_(0, places.flatten(), score.sum((2, 3)).flatten())

    def choice(self, kept: Tensor, shape: Sequence[int]) -> Selection:
        """The choice of these diagonals, bool [C]."""
        mask = kept[self.places(shape, kept.device)]
        return Selection(mask[:, :, None, None].expand(tuple(shape)).contiguous(), self.blocksize(shape))


@named("diagonal")
def make_diagonals() -> Structure:
    """kernels on the same diagonal of filters and input channels"""
    return Diagonals()
