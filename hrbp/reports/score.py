"""The score that a mask keeps, compared with single weights and with random groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blocksparse import bank_shape

from ..structures.base import Selection
from ..structures.grouping import Grouping
from ..structures.selection import check_score, top

RANDOM_DRAWS = 5  # random groupings that stand for chance


class Score(NamedTuple):
    """Sums of a layer's score."""

    total: float
    kept: float
    unstructured: float  # of as many single weights as are kept, the best ones
    random: float | None  # of groups of random rows; None: the mask has no groups

    @property
    def retained(self) -> float:
        """Share of the total; 1 where that is 0."""
        return self.kept / self.total if self.total else 1.0

    @property
    def of_unstructured(self) -> float:
        """Share of what single weights keep; 1 where that is 0."""
        return self.kept / self.unstructured if self.unstructured else 1.0

    @property
    def efficacy(self) -> float | None:
        """(kept - random) / (unstructured - random): 0 is chance, 1 what no structure passes; None: without groups."""
        if self.random is None or self.unstructured <= self.random:
            return None
        return (self.kept - self.random) / (self.unstructured - self.random)


def score_of(choice: Selection, score: Tensor, seed: int) -> Score:
    mask = choice.mask
    score = score.reshape(bank_shape(score.shape)) if score.dim() in (2, 3) else score
    if score.shape != mask.shape:
        raise ValueError(f"report_mask(): score has shape {tuple(score.shape)}; it needs {tuple(mask.shape)}")
    check_score(score, 0.0, "report_mask()")
    cells = score.detach().double().to(mask.device)
    kept = int(mask.sum())
    best = cells.flatten().topk(kept, sorted=False).values
    random = None if choice.grouping is None else random_groups(cells, choice.grouping, seed)
    return Score(float(cells.sum()), float(cells[mask].sum()), float(best.sum()), random)


def random_groups(score: Tensor, like: Grouping, seed: int = 0, draws: int = RANDOM_DRAWS) -> float:
    """The score [K, C, R, S] that groups of random rows keep, mean over `draws`; shapes and granule as in `like`.

    Channels and taps of a group are optimized in alternation, starting from all taps and from each single tap; the best
    result counts.
    """
    k, c, r, s = like.shape
    runs = score.view(k, c // like.granule, like.granule, r * s).sum(2)
    channels, taps = like.channels.shape[1] // like.granule, like.taps.shape[1]
    starts = torch.cat([torch.ones(1, r * s), torch.eye(r * s)]).to(runs)
    generator = torch.Generator().manual_seed(seed)
    kept = 0.0
    for _ in range(draws):
        order = torch.randperm(k, generator=generator).to(score.device)
        sums = runs[order].view(like.groups, like.rows, *runs.shape[1:]).sum(1)
        chosen = starts.expand(like.groups, -1, -1)  # [groups, starts, taps], zeros and ones
        before, now = -1.0, 0.0
        while now > before:
            own = top(chosen @ sums.transpose(1, 2), channels).to(runs)
            per_tap = own @ sums
            chosen = top(per_tap, taps).to(runs)
            each = (per_tap * chosen).sum(2)  # [groups, starts]
            before, now = now, float(each.sum())
        kept += float(each.amax(1).sum())
    return kept / draws


def total_score(scores: list[Score | None]) -> Score | None:
    """Sums over the layers that have a score; random groups only where all of them have groups."""
    known = [score for score in scores if score is not None]
    if not known:
        return None
    random = [score.random for score in known if score.random is not None]
    total, kept, single = (sum(column) for column in zip(*(score[:3] for score in known), strict=True))
    return Score(total, kept, single, sum(random) if len(random) == len(known) else None)
