"""Regularity of a mask in the input gradient, where kernels are rotated and transposed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structures.base import Selection
from ..structures.recognise import kinds_of_filters


def dgrad_fill(choice: Selection) -> float:
    """How much of their bounding rectangles a mask's blocks fill in the input gradient; 1: they stay dense.

    The output is W [K, C*R*S] times im2col(x), the input gradient W' [C, K*R*S] times im2col(dy), where W' has each
    kernel rotated by 180 degrees and K and C exchanged. Filters with equal masks are a dense rectangle of W; its cells
    are marked in W' and compared with the rectangle of all their rows and columns there. Where blocks of several
    filters by several channels at a tap are what is stored, those are the rectangles instead. A mask that keeps
    nothing has 1.

    Source: HRBP (CPAL 2024), section 3.
    """
    mask = choice.whole()
    k, c, r, s = mask.shape
    bk, bc = choice.blocksize
    if choice.grouping is None and bk > 1 and bc > 1:
        order = torch.arange(k, device=mask.device) if choice.row_order is None else choice.row_order.long()
        block_row = (torch.argsort(order) // bk).view(k, 1, 1, 1)
        block_col = (torch.arange(c, device=mask.device) // bc).view(1, c, 1, 1)
        tap = torch.arange(r * s, device=mask.device).view(1, 1, r, s)
        number = (block_row * (c // bc) + block_col) * (r * s) + tap
    else:
        number = kinds_of_filters(mask).view(k, 1, 1, 1)
    marked = torch.where(mask, number, -1)  # which rectangle of W each weight belongs to
    transposed = marked.flip(2, 3).permute(1, 2, 3, 0).reshape(c, r * s * k)  # W', columns tap-major as those of W
    rows, cols = (transposed >= 0).nonzero().unbind(1)
    if not len(rows):
        return 1.0
    owner = transposed[rows, cols]
    size = int(number.max()) + 1
    height, width = (_distinct(owner, place, size) for place in (rows, cols))
    return len(owner) / int((height * width).sum())


def dgrad_ratio(mask: Tensor, n: int, m: int, groups: int = 1) -> str:
    """Whether an n:m mask is n:m in the input gradient, too: "n:m", or the share of runs that keep more, or K.

    Its operand W' [C, K*R*S] (see `dgrad_fill`) is n:m if every m neighbours in a row keep n at most. In NHWC these are
    m neighbouring filters at one tap, given that m divides K. In NCHW they are taps of one kernel, as they are in W
    itself: only 1x1 kernels are n:m there.

    Args:
        mask: bool [K, C, R, S].
        n, m: weights kept of neighbours.
        groups: of a convolution in groups, whose mask is [K, C/groups, R, S].

    Source: HRBP (CPAL 2024), appendix H.
    """
    k, c = mask.shape[0] // groups, mask.shape[1]
    if k % m:
        return f"no, K = {k}" + (f" of each of {groups} groups" if groups > 1 else "")
    kept = mask.flip(2, 3).permute(1, 2, 3, 0).reshape(c, -1, m).sum(2)
    over = float((kept > n).double().mean())
    return f"{n}:{m}" if over == 0 else f"no, {100 * over:.3g}% over"


def _distinct(owner: Tensor, place: Tensor, owners: int) -> Tensor:
    """[owners] how many different places each owner has."""
    pairs = torch.unique(owner * (int(place.max()) + 1) + place)
    return torch.bincount(pairs // (int(place.max()) + 1), minlength=owners)
