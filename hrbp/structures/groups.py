"""HRBP and HRBP++: groups of filters that share channels and taps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .base import Selection, Structure, named, sparsity_of
from .grouping import USUAL_ROWS, Grouping, GroupOptions
from .regrouping import keep_by_counts, regroup_by
from .selection import balanced, staying, swapped, top


@dataclass(frozen=True, kw_only=True)
class Groups(GroupOptions, Structure):
    """HRBP and HRBP++."""

    name: str

    def refuses(self, shape: Sequence[int]) -> str | None:
        for name, axis in (("row_granule", shape[0]), ("granule", shape[1])):
            size = getattr(self, name)
            if size is not None and (size < 1 or axis % size):
                return f"{name} = {size} does not divide {axis}"
        return None

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Selection:
        return selection_of(regroup_by(self, score, sparsity, seed))

    def settled(self, shape: Sequence[int], sparsity: float) -> Groups:
        return replace(self, groups=self.size(shape, sparsity).groups)

    def grouping(self, mask: Tensor, row_order: Tensor | None) -> Grouping:
        """Recover the groups of a mask of this structure, with its row order."""
        k, c, r, s = mask.shape
        order = torch.arange(k, device=mask.device) if row_order is None else row_order.long()
        rows = mask[order].flatten(1)
        groups = self.count(mask.shape, int(mask[order[0]].any(2).any(1).sum()))
        if (rows.view(groups, k // groups, -1) != rows[:: k // groups, None]).any():
            # Made with another number of groups, as by gradual pruning on its way: the fewest that fit.
            begins = (rows[1:] != rows[:-1]).any(1).nonzero()[:, 0] + 1
            groups = k // math.gcd(k, *begins.tolist())
        kept = rows[:: k // groups].view(groups, c, r * s)
        channels, taps = (axes.nonzero()[:, 1].view(groups, -1) for axes in (kept.any(2), kept.any(1)))
        return Grouping((k, c, r, s), order, channels, taps, self.granule)

    def density(self, shape: Sequence[int], density: float) -> float:
        size = self.size(shape, sparsity_of(density))
        return size.channels * size.taps / (shape[1] * shape[2] * shape[3])

    # ------------------------------------------------------------------ how masks change in training

    def exchange(self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float) -> Selection:
        """Every group exchanges runs of channels, and keeps its taps."""
        grouping = self.grouping(mask, order)
        _, c, r, s = grouping.shape
        taps = torch.zeros(grouping.groups, r * s, device=weight.device)
        taps.scatter_(1, grouping.taps, 1.0)
        kept = torch.zeros(grouping.groups, c, dtype=torch.bool, device=weight.device)
        kept.scatter_(1, grouping.channels, True)

        def runs(t: Tensor) -> Tensor:
            return t.view(grouping.groups, -1, grouping.granule).sum(2)

        worth, gain = (
            runs(torch.einsum("grcp,gp->gc", _in_groups(grouping, t.float()), taps)) for t in (weight, growth)
        )
        was = runs(kept.float()) > 0
        if self.balanced:
            # Channels that stay have a larger value than any new one: the old selection was balanced, too.
            stay, _ = staying(was, worth, share)
            gain = gain / gain.max().clamp_min(1e-30)
            value = torch.where(stay, 2.0 + grouping.groups * was.shape[1], gain.double())
            chosen = balanced(value[None], int(was[0].sum()))[0]
        else:
            chosen = swapped(was, worth, gain, share)
        starts = chosen.nonzero()[:, 1].view(grouping.groups, -1, 1) * grouping.granule
        channels = (starts + torch.arange(grouping.granule, device=starts.device)).flatten(1)
        return selection_of(Grouping(grouping.shape, grouping.row_order, channels, grouping.taps, grouping.granule))

    def recount(
        self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float, unit: str = "weight"
    ) -> Selection:
        """Every filter exchanges weights or kernels, then each group counts (Ma et al., 2024, section 4.2).

        A kernel is worth the sum of |w| in it, grows by that of |gradient|, and comes with its best taps.
        """
        grouping = self.grouping(mask, order)
        k, p = grouping.channels.shape[1], grouping.taps.shape[1]
        kept, worth, gain = (
            _in_groups(grouping, t).flatten(0, 1) for t in (grouping.mask(), weight, growth.float())
        )  # [K, C, R*S]
        if unit == "kernel":
            was = kept.any(2)
            come = swapped(was, worth.sum(2), gain.sum(2), share)
            cells = torch.where(was[..., None], kept, top(gain, p)) & come[..., None]
        else:
            cells = swapped(kept.flatten(1), worth.flatten(1), gain.flatten(1), share)
        cells = cells.view(grouping.groups, grouping.rows, grouping.shape[1], -1)
        chosen = [keep_by_counts(group, k, p, grouping.granule) for group in cells]
        channels, taps = (torch.stack(lists) for lists in zip(*chosen, strict=True))
        return selection_of(Grouping(grouping.shape, grouping.row_order, channels, taps, grouping.granule))

    def shrink(
        self, mask: Tensor, order: Tensor | None, score: Tensor, sparsity: float, reorder: bool = False
    ) -> Selection:
        """Fewer channels and taps; with `reorder` rows are divided into groups anew, which moves everything."""
        if reorder:
            return self.choose(score, sparsity)
        size = self.size(mask.shape, sparsity)
        grouping = self.grouping(mask, order)
        sums = _in_groups(grouping, score).sum(1)
        taps = top(sums.sum(1), size.taps)
        for _ in range(2):
            runs = (sums * taps[:, None]).sum(2).view(grouping.groups, -1, self.granule).sum(2)
            count = size.channels // self.granule
            chosen = balanced(runs[None], count)[0] if self.balanced else top(runs, count)
            channels = chosen.repeat_interleave(self.granule, 1)
            taps = top((sums * channels[..., None]).sum(1), size.taps)
        kept_channels, kept_taps = (t.nonzero()[:, 1].view(grouping.groups, -1) for t in (channels, taps))
        return selection_of(Grouping(grouping.shape, grouping.row_order, kept_channels, kept_taps, self.granule))


def _in_groups(grouping: Grouping, cells: Tensor) -> Tensor:
    """[K, C, R, S] as [groups, rows, C, R*S]."""
    return cells.flatten(2)[grouping.row_order].view(grouping.groups, grouping.rows, cells.shape[1], -1)


def selection_of(grouping: Grouping) -> Selection:
    """A grouping as a selection."""
    return Selection(grouping.mask(), grouping.blocksize, grouping.row_order, grouping)


def _maker(name: str, tap_density: float, place: int, what: str) -> Callable[..., Structure]:
    """The factory of "hrbp" or "hrbp++"; its options are the fields of GroupOptions."""

    def make(**options: Any) -> Structure:
        return Groups(name=name, **{"tap_density": tap_density, **options})

    kinds = get_type_hints(GroupOptions, include_extras=True)
    parameters = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, annotation=kinds[f.name],
            default=tap_density if f.name == "tap_density" else f.default,
        )
        for f in fields(GroupOptions)
    ]  # fmt: skip
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    make.__doc__ = what
    # Of random scores groups of neighbours are as good as any and cost nothing when running.
    return named(name, place, {"row_granule": None}, _in_models)(make)


def _in_models(gpu: bool) -> dict[str, object]:
    """Every channel is read, by equally many groups. GPU kernels take blocks of 8 filters, those of CPUs any."""
    return {"groups": None, "min_rows": USUAL_ROWS if gpu else 2, "balanced": True}


make_hrbp = _maker("hrbp", 1.0, 90, "groups of filters that keep the same channels, all taps")
make_hrbp_plus_plus = _maker(
    "hrbp++", 4 / 9, 100, "groups of filters that keep the same channels and the same taps, 4/9 of them"
)
