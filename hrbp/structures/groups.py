"""HRBP and HRBP++: groups of filters that share channels and taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Choice, Structure, sparsity_of
from .grouping import Grouping, GroupShape, group_shape
from .regrouping import regroup


@dataclass(frozen=True)
class Groups(Structure):
    """HRBP and HRBP++; the options are those of `regroup`. row_granule None: filters stay where they are."""

    name: str
    tap_density: float
    groups: int = 8
    granule: int = 1
    row_granule: int | None = 1
    min_rows: int = 8
    balanced: bool = False
    method: str = "assign"

    def refuses(self, shape: Sequence[int]) -> str | None:
        for name, size, axis in (("row_granule", self._rows(shape), shape[0]), ("granule", self.granule, shape[1])):
            if size < 1 or axis % size:
                return f"{name} = {size} does not divide {axis}"
        return None

    def _rows(self, shape: Sequence[int]) -> int:
        if self.row_granule is not None:
            return self.row_granule
        size = group_shape(shape, 0.0, groups=self.groups, min_rows=self.min_rows)
        return shape[0] // size.groups

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Choice:
        grouping = regroup(
            score,
            sparsity,
            groups=self.groups,
            tap_density=self.tap_density,
            granule=self.granule,
            row_granule=self._rows(score.shape),
            min_rows=self.min_rows,
            balanced=self.balanced,
            method=self.method,
            seed=seed,
        )
        return grouping_choice(grouping)

    def size(self, shape: Sequence[int], sparsity: float) -> GroupShape:
        """Groups, channels and taps of a layer of this shape."""
        return group_shape(
            shape,
            sparsity,
            groups=self.groups,
            tap_density=self.tap_density,
            granule=self.granule,
            row_granule=self._rows(shape),
            min_rows=self.min_rows,
        )

    def grouping(self, mask: Tensor, row_order: Tensor | None) -> Grouping:
        """The groups of a mask that this structure made, rows in this order."""
        k, c, r, s = mask.shape
        order = torch.arange(k, device=mask.device) if row_order is None else row_order.long()
        groups = self.size(mask.shape, 0.0).groups
        kept = mask[order[:: k // groups]].view(groups, c, r * s)
        channels, taps = (axes.nonzero()[:, 1].view(groups, -1) for axes in (kept.any(2), kept.any(1)))
        return Grouping((k, c, r, s), order, channels, taps, self.granule)

    def density(self, shape: Sequence[int], density: float) -> float:
        size = self.size(shape, sparsity_of(density))
        return size.channels * size.taps / (shape[1] * shape[2] * shape[3])


def grouping_choice(grouping: Grouping) -> Choice:
    """The choice that keeps what a grouping keeps."""
    return Choice(grouping.mask(), grouping.blocksize, grouping.row_order, grouping)


def make_groups(name: str, tap_density: float) -> Callable[..., Structure]:
    def make(
        *,
        groups: int = 8,
        tap_density: float = tap_density,
        granule: int = 1,
        row_granule: int | None = 1,
        min_rows: int = 8,
        balanced: bool = False,
        method: str = "assign",
    ) -> Structure:
        return Groups(name, tap_density, groups, granule, row_granule, min_rows, balanced, method)

    return make
