"""A structure in a convolution in groups, whose filters may not be mixed with those of another group.

The weight is [K, C/groups, R, S]: filters of a group read channels of their own, so that no block, and no filters that
are regrouped, may be of two. That is all that a structure needs: shapes, masks and scores are those of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..structures.base import Selection, Structure
from ..structures.grouping import Grouping


def in_groups(rule: Structure, groups: int) -> Structure:
    """The structure as it is in a layer of so many groups."""
    return rule if groups == 1 or rule.keeps_filters else EachGroup(rule, groups)


def refuses_in_groups(rule: Structure, shape: Sequence[int], groups: int) -> str | None:
    """Why a layer [K, C/groups, R, S] cannot have a structure, or None: what it says of one group."""
    k, *rest = shape
    reason = rule.refuses((k // groups, *rest))
    return reason if reason is None or groups == 1 else f"{reason} of each of {groups} groups"


@dataclass(frozen=True)
class EachGroup(Structure):
    """A structure in each group by itself, at the same density."""

    rule: Structure
    groups: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.rule.name

    def can(self, ability: str) -> bool:
        return self.rule.can(ability)

    # ------------------------------------------------------------------ of one group

    def _one(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0] // self.groups, *shape[1:])

    def density(self, shape: Sequence[int], density: float) -> float:
        return self.rule.density(self._one(shape), density)

    def blocksize(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.rule.blocksize(self._one(shape))

    def refuses(self, shape: Sequence[int]) -> str | None:
        return refuses_in_groups(self.rule, shape, self.groups)

    def settled(self, shape: Sequence[int], sparsity: float) -> EachGroup:
        return replace(self, rule=self.rule.settled(self._one(shape), sparsity))

    @property
    def uniform_rows(self) -> int | None:
        return self.rule.uniform_rows

    # ------------------------------------------------------------------ of all

    def _each(self, make: Callable[..., Selection], order: Tensor | None, *of_filters: Tensor) -> Selection:
        """The selections that `make(order, parts)` makes of each group's part of some tensors, as one."""
        parts = zip(*(t.chunk(self.groups) for t in of_filters), strict=True)
        return _joined([make(own, *part) for own, part in zip(self._orders(order), parts, strict=True)])

    def _orders(self, order: Tensor | None) -> list[Tensor | None]:
        """Of each group, by the numbers that its filters have in it."""
        if order is None:
            return [None] * self.groups
        size = order.numel() // self.groups
        return [own - i * size for i, own in enumerate(order.long().chunk(self.groups))]

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Selection:
        return self._each(lambda order, score: self.rule.choose(score, sparsity, seed), None, score)

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        return torch.cat([self.rule.mask(part, sparsity) for part in score.chunk(self.groups)])

    def order(self, score: Tensor) -> Tensor | None:
        return _one_order([self.rule.order(part) for part in score.chunk(self.groups)], score.shape[0])

    def ranked(self, score: Tensor, order: Tensor | None = None) -> Tensor:
        parts = zip(score.chunk(self.groups), self._orders(order), strict=True)
        return torch.cat([self.rule.ranked(part, own) for part, own in parts])

    def has(self, mask: Tensor) -> bool:
        return all(self.rule.has(part) for part in mask.chunk(self.groups))

    def exchange(self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float) -> Selection:
        def make(own: Tensor | None, mask: Tensor, weight: Tensor, growth: Tensor) -> Selection:
            return self.rule.exchange(mask, own, weight, growth, share)

        return self._each(make, order, mask, weight, growth)

    def recount(
        self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float, unit: str = "weight"
    ) -> Selection:
        def make(own: Tensor | None, mask: Tensor, weight: Tensor, growth: Tensor) -> Selection:
            return self.rule.recount(mask, own, weight, growth, share, unit)

        return self._each(make, order, mask, weight, growth)

    def shrink(
        self, mask: Tensor, order: Tensor | None, score: Tensor, sparsity: float, reorder: bool = False
    ) -> Selection:
        def make(own: Tensor | None, mask: Tensor, score: Tensor) -> Selection:
            return self.rule.shrink(mask, own, score, sparsity, reorder)

        return self._each(make, order, mask, score)

    def of_rows(self, kept: Tensor, shape: Sequence[int], order: Tensor | None) -> Selection:
        return self._each(lambda own, kept: self.rule.of_rows(kept, self._one(shape), own), order, kept)


def _one_order(orders: Sequence[Tensor | None], filters: int) -> Tensor | None:
    """The order of all filters from those of each group, which all have one or none."""
    if any(order is None for order in orders):
        return None
    size = filters // len(orders)
    return torch.cat([order.long() + i * size for i, order in enumerate(orders) if order is not None])


def _joined(parts: Sequence[Selection]) -> Selection:
    mask = torch.cat([part.mask for part in parts])
    order = _one_order([part.row_order for part in parts], len(mask))
    groupings = [part.grouping for part in parts if part.grouping is not None]
    grouping = None
    if len(groupings) == len(parts) and order is not None:
        k, c, r, s = mask.shape
        channels, taps = (torch.cat([getattr(g, name) for g in groupings]) for name in ("channels", "taps"))
        grouping = Grouping((k, c, r, s), order, channels, taps, groupings[0].granule)
    return Selection(mask, parts[0].blocksize, order, grouping, len(parts))
