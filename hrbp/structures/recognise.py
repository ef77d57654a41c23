"""Find the structure of a mask from the mask alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blocksparse import BSRPattern, bank_shape

from .base import Selection
from .grouping import Grouping


def stored_blocks(pattern: BSRPattern) -> Selection:
    """The weights of a pattern's blocks, with its blocksize and row order."""
    mask = pattern.to_mask()
    order = pattern.row_order
    grouping = recognise(mask).grouping
    if grouping is not None and pattern.groups > 1:
        of = grouping.row_order.view(grouping.groups, -1) // (len(mask) // pattern.groups)
        grouping = grouping if bool((of == of[:, :1]).all()) else None  # its filters read other channels
    return Selection(mask, pattern.blocksize, order, grouping, pattern.groups)


def recognise(mask: Tensor) -> Selection:
    """Find the structure of a mask from the mask alone.

    In this order: dense or empty; groups of two filters or more that keep channels x taps; aligned boxes of more than
    one weight; groups of two filters or more that keep the same cells; single weights.

    Args:
        mask: bool [K, C, R, S], [K, C, S] or [K, C].
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"report_mask(): mask has dtype {mask.dtype}; it needs torch.bool (for weights: weight != 0)")
    if mask.dim() not in (2, 3, 4) or mask.numel() == 0:
        raise ValueError(
            f"report_mask(): mask has shape {tuple(mask.shape)}; it needs [K, C, R, S], [K, C, S] or [K, C]"
        )
    mask = mask.reshape(bank_shape(mask.shape))
    if mask.all() or not mask.any():
        return Selection(mask, (mask.shape[0], mask.shape[1]))
    order, rows = _equal_filters(mask)
    if rows > 1:
        try:
            grouping = Grouping.from_mask(mask)
        except ValueError:
            pass
        else:
            if grouping.groups > 1 or grouping.taps.shape[1] < mask[0, 0].numel():  # else: a mask of whole channels
                return Selection(mask, grouping.blocksize, grouping.row_order, grouping)
    box = grain(mask)
    if box != (1, 1, 1, 1):
        return Selection(mask, box[:2])
    if rows > 1:
        return Selection(mask, (rows, 1), order)
    return Selection(mask, (1, 1))


def _equal_filters(mask: Tensor) -> tuple[Tensor, int]:
    """Filters ordered so that equal masks are neighbours, and the largest size that divides all such runs."""
    member = kinds_of_filters(mask)
    return torch.argsort(member, stable=True), math.gcd(*torch.bincount(member).tolist())


def kinds_of_filters(mask: Tensor) -> Tensor:
    """[K]: filters with equal masks have the same number; numbers from 0, without gaps."""
    return torch.unique(mask.flatten(1), dim=0, return_inverse=True)[1]


def grain(mask: Tensor) -> tuple[int, int, int, int]:
    """The largest aligned box (k, c, r, s) that bool [K, C, R, S] keeps or drops whole, wherever such a box lies.

    Boxes of (k, 1, 1, 1) and of (1, c, 1, 1) make one of (k, c, 1, 1), so each axis is looked at for itself.
    """
    sizes = []
    for axis, size in enumerate(mask.shape):
        slices = mask.movedim(axis, 0).flatten(1)
        changes = (slices[1:] != slices[:-1]).any(1).nonzero()[:, 0] + 1
        sizes.append(math.gcd(size, *changes.tolist()))
    k, c, r, s = sizes
    return k, c, r, s


def describe(selection: Selection) -> str:
    """A mask's structure in a few words."""
    mask = selection.mask
    k, c, r, s = mask.shape
    if mask.all():
        return "dense"
    if not mask.any():
        return "empty"
    if (g := selection.grouping) is not None:
        taps = "" if r * s == 1 else f", {g.taps.shape[1]} of {r * s} taps"
        return f"{_times(g.groups, 'group')} of {g.rows}: {g.channels.shape[1]} of {c} channels{taps}"
    if selection.row_order is not None:
        return f"element-wise groups of {selection.blocksize[0]}"
    bk, bc, br, bs = grain(mask)
    names = {(1, c, r, s): "filters", (k, 1, r, s): "channels", (1, 1, r, s): "kernels", (1, 1, 1, s): "vectors"}
    if (bk, bc, br, bs) != (1, 1, 1, 1) and (bk, bc, br, bs) in names:
        return names[bk, bc, br, bs]
    if (bk, bc, br, bs) == (1, 1, 1, 1):
        return "single weights" if (ratio := n_m_ratio(mask)) is None else f"{ratio[0]}:{ratio[1]}"
    all_taps = " of all taps" if (br, bs) == (r, s) and r * s > 1 else ""
    return f"blocks {bk}x{bc}{all_taps}" if all_taps or (br, bs) == (1, 1) else f"boxes {bk}x{bc}x{br}x{bs}"


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def n_m_ratio(mask: Tensor) -> tuple[int, int] | None:
    """(n, m) where every m neighbouring channels keep n weights at each tap, for the smallest such m."""
    k, c, r, s = mask.shape
    for m in (2, 4, 8, 16, 32):
        if c % m == 0:
            counts = mask.view(k, c // m, m, r, s).sum(2)
            n = int(counts.flatten()[0])
            if bool((counts == n).all()):
                return n, m
    return None
