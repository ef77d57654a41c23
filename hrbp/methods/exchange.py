"""Which units of one layer go and which come: grains, or the channels of a group."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..layers.view import SparseLayer
from ..structures.base import Choice
from ..structures.grains import Grains
from ..structures.grouping import Grouping
from ..structures.groups import Groups, grouping_choice
from ..structures.regrouping import keep_by_counts
from ..structures.selection import balanced, top


def exchange(rule: Any, layer: SparseLayer, weight: Tensor, growth: Tensor, share: float, one_by_one: bool) -> Choice:
    """The new choice when `share` of a layer's units go by `weight` and as many come by `growth`, both [K, C, R, S]."""
    if isinstance(rule, Groups):
        grouping = rule.grouping(layer.mask(), layer.row_order())
        if one_by_one:
            return grouping_choice(_recounted(grouping, weight, growth, share))
        return grouping_choice(_exchanged_channels(grouping, weight, growth, share, rule.balanced))
    assert isinstance(rule, Grains)
    order = layer.row_order()
    kept, worth, wish = (rule.sums(t, order) for t in (layer.mask().float(), weight, growth))
    shape = kept.shape
    kept, worth, wish = (t.flatten(1) if rule.uniform else t.view(1, -1) for t in (kept > 0, worth, wish))
    return rule.choice(_swap_units(kept, worth, wish, share).view(shape), layer.shape, order)


def _swap_units(kept: Tensor, worth: Tensor, wish: Tensor, share: float) -> Tensor:
    """bool [rows, units]: in each row, `share` of the kept units go, those worth least, and as many come, most wished.

    A unit that goes may come back at once, as in RigL. Rows keep equally many units.
    """
    stay, go = _staying(kept, worth, share)
    return stay | top(wish.masked_fill(stay, -math.inf), go)


def _staying(kept: Tensor, worth: Tensor, share: float) -> tuple[Tensor, int]:
    """Which units stay, and how many go in each row: never more than there are others to come."""
    count = int(kept[0].sum())
    go = min(round(share * count), kept.shape[1] - count)
    return top(worth.masked_fill(~kept, -math.inf), count - go), go


def _in_groups(grouping: Grouping, cells: Tensor) -> Tensor:
    """[K, C, R, S] as [groups, rows, C, R*S]."""
    return cells.flatten(2)[grouping.row_order].view(grouping.groups, grouping.rows, cells.shape[1], -1)


def _exchanged_channels(grouping: Grouping, weight: Tensor, growth: Tensor, share: float, fair: bool) -> Grouping:
    """Every group exchanges runs of channels, and keeps its taps."""
    _, c, r, s = grouping.shape
    taps = torch.zeros(grouping.groups, r * s, device=weight.device)
    taps.scatter_(1, grouping.taps, 1.0)
    kept = torch.zeros(grouping.groups, c, dtype=torch.bool, device=weight.device)
    kept.scatter_(1, grouping.channels, True)

    def runs(t: Tensor) -> Tensor:
        return t.view(grouping.groups, -1, grouping.granule).sum(2)

    worth, wish = (runs(torch.einsum("grcp,gp->gc", _in_groups(grouping, t.float()), taps)) for t in (weight, growth))
    was = runs(kept.float()) > 0
    if fair:
        # Those that stay are worth more than any that may come, which keeps them: the old choice was fair, too.
        stay, _ = _staying(was, worth, share)
        wish = wish / wish.max().clamp_min(1e-30)
        value = torch.where(stay, 2.0 + grouping.groups * was.shape[1], wish.double())
        chosen = balanced(value[None], int(was[0].sum()))[0]
    else:
        chosen = _swap_units(was, worth, wish, share)
    starts = chosen.nonzero()[:, 1].view(grouping.groups, -1, 1) * grouping.granule
    channels = (starts + torch.arange(grouping.granule, device=starts.device)).flatten(1)
    return Grouping(grouping.shape, grouping.row_order, channels, grouping.taps, grouping.granule)


def _recounted(grouping: Grouping, weight: Tensor, growth: Tensor, share: float) -> Grouping:
    """HRBP's update: every filter exchanges single weights, then each group counts."""
    mask, worth, wish = (
        _in_groups(grouping, t).flatten(2).flatten(0, 1) for t in (grouping.mask(), weight, growth.float())
    )
    cells = _swap_units(mask, worth, wish, share).view(grouping.groups, grouping.rows, grouping.shape[1], -1)
    k, p = grouping.channels.shape[1], grouping.taps.shape[1]
    chosen = [keep_by_counts(group, k, p, grouping.granule) for group in cells]
    channels, taps = (torch.stack(lists) for lists in zip(*chosen, strict=True))
    return Grouping(grouping.shape, grouping.row_order, channels, taps, grouping.granule)


def pruned_groups(rule: Groups, layer: SparseLayer, score: Tensor, sparsity: float, regroup_rows: bool) -> Choice:
    """Fewer channels and taps; rows are divided anew at the first time only, as that moves everything."""
    if regroup_rows:
        return rule.choose(score, sparsity)
    size = rule.size(layer.shape, sparsity)
    grouping = rule.grouping(layer.mask(), layer.row_order())
    sums = _in_groups(grouping, score).sum(1)
    taps = top(sums.sum(1), size.taps)
    for _ in range(2):
        runs = (sums * taps[:, None]).sum(2).view(grouping.groups, -1, rule.granule).sum(2)
        count = size.channels // rule.granule
        chosen = balanced(runs[None], count)[0] if rule.balanced else top(runs, count)
        channels = chosen.repeat_interleave(rule.granule, 1)
        taps = top((sums * channels[..., None]).sum(1), size.taps)
    kept_channels, kept_taps = (t.nonzero()[:, 1].view(grouping.groups, -1) for t in (channels, taps))
    return grouping_choice(Grouping(grouping.shape, grouping.row_order, kept_channels, kept_taps, rule.granule))
