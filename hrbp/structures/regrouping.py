"""HRBP and HRBP++: from the score of every weight to groups of filters that share their input channels and their taps.

A filter bank [K, C, R, S] is regrouped when its K rows are cut into groups of equally many, and every group keeps k
input channels and p taps of its own. In a group, what is kept is a dense block (rows x channels x taps), and it stays
one in the input gradient, where kernels are rotated and transposed: that is what element-wise blocks lose. With all
taps this is HRBP, with p < R*S HRBP++ (Ma et al., HRBP: Hardware-friendly Regrouping towards Block-based Pruning for
Sparse CNN Training, CPAL 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import any_case
from .grouping import RULES, Grouping, GroupOptions, GroupShape
from .selection import balanced as choose_balanced
from .selection import check_score, top

STARTS = 8  # searches side by side
STEPS = 30  # most alternations of one search
SHAKEN = 0.1  # share of the rows that a perturbation moves
SHAKES = 20  # most rounds of perturbations
SHAKEN_CELLS = 3_000_000  # weights that all rounds together go through: larger layers have more averaging and gain less
ROW_CELLS = 512  # weights that take as long as assigning a row
SWAPPED_CELLS = 16_000_000  # weights that tried exchanges of pairs of rows together go through
SWAP_CHUNK_CELLS = 500_000  # of pairs tried at once


def regroup(
    score: Tensor,
    sparsity: float,
    *,
    groups: int | None = 8,
    tap_density: float = 1.0,
    granule: int = 1,
    row_granule: int | None = 1,
    min_rows: int = 8,
    balanced: bool = False,
    method: str = "assign",
    seed: int = 0,
) -> Grouping:
    """Groups of filters, with channels and taps of their own, that keep as much of the score as they can.

        maximise  sum_g  sum of score[o, c, p] over rows o of g, channels c of g, taps p of g
        with equally many rows, channels and taps in every group

    method="assign" alternates between the best channels for given rows and taps, the best taps for given rows and
    channels, and the best balanced assignment of rows for given channels and taps. No step loses score. It starts from
    several seeds and from the paper's groups, then perturbs the best result and repeats: it never keeps less than
    method="paper".

    method="paper" is Algorithm 1 (section 4.1), which looks at the non-zero cells of the score and never at their size:
    1. the kernels with the most non-zeros, a share of (1 - sparsity) / tap_density, make a mask of kernels;
    2. its rows are divided into equal groups of similar rows (Jaccard similarity: greedy seeds, then balanced
       assignment by average similarity for as long as it rises);
    3. a group keeps the channels that most of its rows have in the mask (ties: most non-zeros, then the first);
    4. and the taps with the most non-zeros in the kept kernels of the group.
    The score of a dense layer says nothing by counts: where no cell is zero, its highest 1 - sparsity are counted.

    Args:
        score: [K, C, R, S] >= 0, floating point or bool, on any device: the work is done there.
        sparsity: share of the weights that is dropped, in [0, 1). The result has whole channels and taps.
        groups: at most so many groups; None: as many as it takes to read every input channel. See `GroupOptions.count`
            for the number used, and `GroupOptions.size` for channels and taps.
        tap_density: share of the taps that a group keeps; 1 is HRBP, the paper's HRBP++ has 4/9.
        granule: channels are kept in aligned runs of this many (8 is what 16-byte loads of float16 ask for).
        row_granule: filters move in aligned runs of this many; None: they stay where they are.
        min_rows: least filters of a group (the paper's B1).
        balanced: every channel (every run, for a granule) is kept by as many groups as any other, give or take one, so
            that the input gradient is as balanced as the output.
        seed: of the starts; the same seed gives the same groups.

    Returns:
        A Grouping on the score's device; its rows ascend within a group, its groups by their first row.

    Raises:
        ValueError: a score that is negative, not finite or not [K, C, R, S]; an option out of range.

    Source: HRBP (CPAL 2024), section 4.1, for method="paper"; method="assign" is this library's.
    """
    options = GroupOptions(
        groups=groups, tap_density=tap_density, granule=granule, row_granule=row_granule, min_rows=min_rows,
        balanced=balanced, method=any_case(method, RULES),
    )  # fmt: skip
    return regroup_by(options, score, sparsity, seed)


def regroup_by(options: GroupOptions, score: Tensor, sparsity: float, seed: int = 0) -> Grouping:
    """See `regroup`."""
    size = options.size(score.shape, sparsity)
    granule, row_granule = options.granule, options.moved_rows(score.shape, sparsity)
    cells = check_score(score, sparsity, "regroup()")
    counted = _counted(cells, sparsity)
    # From here on a row is a run of row_granule filters and a channel a run of granule channels.
    search = _Search(_runs(cells, row_granule, granule), size, granule, options.balanced, seed)
    counts = _Search(_runs(counted, row_granule, granule), size, granule, options.balanced, seed)
    kernels = round(counts.rows * counts.channels * min(1.0, (1 - sparsity) * score[0, 0].numel() / size.taps))
    found = _by_counts(counts, kernels)
    if options.method == "assign":
        found = _by_score(search, found)
    return _grouping(found, tuple(score.shape), row_granule, granule)


# ---------------------------------------------------------------------- the score


def _counted(cells: Tensor, sparsity: float) -> Tensor:
    """The mask that Algorithm 1 counts, as zeros and ones."""
    mask = cells > 0
    if bool(mask.all()):
        kept = round((1 - sparsity) * cells.numel())
        mask = top(cells.flatten(), kept).view(cells.shape)
    return mask.to(cells.dtype)


def _runs(cells: Tensor, row_granule: int, granule: int) -> Tensor:
    """[K, C, R, S] summed over runs of rows and channels: [K / row_granule, C / granule, R*S]."""
    k, c, r, s = cells.shape
    return cells.view(k // row_granule, row_granule, c // granule, granule, r * s).sum((1, 3))


# ---------------------------------------------------------------------- rows, channels and taps, each given the others


@dataclass
class _Found:
    """B solutions of one layer. member [B, t, rows], channels [B, t, channels], taps [B, t, taps]; bool."""

    member: Tensor
    channels: Tensor
    taps: Tensor

    def pick(self, b: int) -> _Found:
        return _Found(self.member[b : b + 1], self.channels[b : b + 1], self.taps[b : b + 1])


class _Search:
    """A layer's weights in units of runs, and the three half-steps on B solutions at once."""

    def __init__(self, cells: Tensor, size: GroupShape, granule: int, balanced: bool, seed: int) -> None:
        self.cells = cells
        self.rows, self.channels, self.taps = cells.shape
        self.groups = size.groups
        self.kept_channels, self.kept_taps = size.channels // granule, size.taps
        self.balanced, self.seed = balanced, seed
        self.matrix = cells.view(self.rows, -1)

    def sums(self, member: Tensor) -> Tensor:
        """[B, t, channels, taps]: the weights of a group's rows added up."""
        flat = member.flatten(0, 1).to(self.cells.dtype)
        return (flat @ self.matrix).view(*member.shape[:2], self.channels, self.taps)

    def worth(self, channels: Tensor, taps: Tensor) -> Tensor:
        """[B, t, rows]: what a row keeps in each group."""
        kept = (channels[..., None] & taps[:, :, None]).to(self.cells.dtype)
        return (kept.view(-1, self.matrix.shape[1]) @ self.matrix.t()).view(*channels.shape[:2], self.rows)

    def best_channels(self, sums: Tensor, taps: Tensor, prices: Tensor | None = None) -> Tensor:
        value = (sums * taps[:, :, None]).sum(3)
        return choose_balanced(value, self.kept_channels, prices) if self.balanced else top(value, self.kept_channels)

    def best_taps(self, sums: Tensor, channels: Tensor) -> Tensor:
        return top((sums * channels[..., None]).sum(2), self.kept_taps)

    def best_rows(self, worth: Tensor, prices: Tensor | None = None) -> Tensor:
        return choose_balanced(worth, self.rows // self.groups, prices)


def _alternate(search: _Search, found: _Found) -> tuple[_Found, Tensor]:
    """All half-steps in turn until no solution gains any more; what they keep [B]."""
    kept: Tensor | None = None
    prices, channel_prices = found.member.new_zeros(2, *found.member.shape[:2], 1, dtype=torch.float64)
    for _ in range(STEPS):
        sums = search.sums(found.member)
        channels = search.best_channels(sums, found.taps, channel_prices)
        taps = search.best_taps(sums, channels)
        worth = search.worth(channels, taps)
        found = _Found(search.best_rows(worth, prices), channels, taps)
        before, kept = kept, (worth.double() * found.member).sum((1, 2))
        if before is not None and bool((kept <= before * (1 + 1e-7)).all()):
            break
    assert kept is not None
    return found, kept


# ---------------------------------------------------------------------- method="assign"


def _by_score(search: _Search, paper: _Found) -> _Found:
    generator = torch.Generator().manual_seed(search.seed)
    # Random choices are of rows by rank, so that they move with the filters when these are permuted.
    ranked = search.matrix.sum(1, dtype=torch.float64).argsort(stable=True)
    own_channels, own_taps = _template(search, search.cells[:, None])
    own = (search.cells * own_channels[:, 0, :, None] * own_taps[:, 0, None]).sum((1, 2))

    seeds = torch.stack([torch.randperm(search.rows, generator=generator)[: search.groups] for _ in range(STARTS)])
    seeds = ranked[seeds.to(ranked.device)]
    for b in range(STARTS // 2):
        seeds[b] = _spread(search, int(seeds[b, 0]), own)
    channels, taps = _template(search, search.cells[seeds])
    member = search.best_rows(search.worth(channels, taps))
    found = _Found(
        torch.cat([member, search.best_rows(search.worth(paper.channels, paper.taps))]),
        torch.cat([channels, paper.channels]),
        torch.cat([taps, paper.taps]),
    )
    found, kept = _alternate(search, found)
    best = found.pick(int(kept.argmax()))
    most = kept.max()
    rounds = min(SHAKES, max(1, SHAKEN_CELLS // (search.cells.numel() + ROW_CELLS * search.rows)))
    for _ in range(rounds if 1 < search.groups < search.rows else 0):
        found, kept = _alternate(search, _shaken(search, best, ranked, generator))
        if bool(kept.max() > most):
            best, most = found.pick(int(kept.argmax())), kept.max()
    if 1 < search.groups < search.rows and not search.balanced:
        best = _swapped(search, best)
    return best


def _template(search: _Search, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Channels and taps for these sums [B, t, channels, taps], from nothing; every group for itself."""
    channels = top(sums.sum(3), search.kept_channels)
    taps = torch.ones_like(sums[:, :, 0], dtype=torch.bool)
    for _ in range(2 if search.kept_taps < search.taps else 0):
        taps = search.best_taps(sums, channels)
        channels = top((sums * taps[:, :, None]).sum(3), search.kept_channels)
    return channels, taps


def _spread(search: _Search, first: int, own: Tensor) -> Tensor:
    """Seed rows of the groups: each is the row that loses most in the groups chosen so far."""
    chosen, covered = [first], torch.zeros_like(own)
    while len(chosen) < search.groups:
        channels, taps = _template(search, search.cells[chosen[-1]][None, None])
        covered = torch.maximum(covered, search.worth(channels, taps)[0, 0])
        loss = own - covered
        loss[chosen] = -math.inf
        chosen.append(int(loss.argmax()))
    return torch.tensor(chosen, device=own.device)


def _shaken(search: _Search, best: _Found, ranked: Tensor, generator: torch.Generator) -> _Found:
    """STARTS copies of a solution, in each of which a few rows have exchanged their groups."""
    few = max(2, round(SHAKEN * search.rows))
    picks = torch.stack([torch.randperm(search.rows, generator=generator)[:few] for _ in range(STARTS)])
    rows = ranked[picks.to(ranked.device)]
    group = best.member[0].to(torch.uint8).argmax(0).repeat(STARTS, 1)
    group.scatter_(1, rows, group.gather(1, rows.roll(1, 1)))
    member = torch.zeros(STARTS, search.groups, search.rows, dtype=torch.bool, device=group.device)
    member.scatter_(1, group[:, None], True)
    return _Found(member, best.channels.expand(STARTS, -1, -1), best.taps.expand(STARTS, -1, -1))


def _swapped(search: _Search, best: _Found) -> _Found:
    """Exchanges pairs of rows between groups as long as that gains, channels and taps chosen anew for each pair.

    This sees what the alternation cannot, whose channels and taps stay behind while rows move. It pays on small layers,
    and all pairs of a larger one are too many to try: SWAPPED_CELLS bounds the work.
    """
    pair_cells, left = 2 * search.matrix.shape[1], SWAPPED_CELLS
    if search.rows * (search.rows - 1) // 2 * pair_cells > left:
        return best
    first, second = torch.triu_indices(search.rows, search.rows, 1, device=search.cells.device)
    group = best.member[0].to(torch.uint8).argmax(0)
    sums = search.sums(best.member)[0]
    channels, taps = best.channels[0].clone(), best.taps[0].clone()
    kept = _kept(sums, channels, taps)
    stale = torch.ones(search.groups, dtype=torch.bool, device=group.device)
    while True:
        a, b = group[first], group[second]
        tried = ((a != b) & (stale[a] | stale[b])).nonzero()[:, 0]
        left -= len(tried) * pair_cells
        if len(tried) == 0 or left < 0:
            break
        stale[:] = False
        gains = torch.cat(
            [
                _swap(search, sums, first[part], second[part], a[part], b[part])[0] - kept[a[part]] - kept[b[part]]
                for part in tried.split(max(1, SWAP_CHUNK_CELLS // pair_cells))
            ]
        )
        for i in gains.argsort(descending=True)[: search.groups**2].tolist():
            pair = tried[i : i + 1]
            groups = torch.cat([a[pair], b[pair]])
            if float(gains[i]) <= 1e-7 * float(kept.sum()):
                break
            if bool(stale[groups].any()):
                continue
            _, sums_of, channels_of, taps_of = _swap(search, sums, first[pair], second[pair], a[pair], b[pair])
            sums[groups], channels[groups], taps[groups] = sums_of[:, 0], channels_of[:, 0], taps_of[:, 0]
            kept[groups] = _kept(sums[groups], channels[groups], taps[groups])
            group[first[pair]], group[second[pair]] = b[pair], a[pair]
            stale[groups] = True
    member = torch.zeros_like(best.member).scatter_(1, group[None, None], True)
    return _alternate(search, _Found(member, channels[None], taps[None]))[0]


def _swap(
    search: _Search, sums: Tensor, i: Tensor, j: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What groups a and b keep together [pairs] when rows i and j change places; their new sums, channels and taps."""
    change = search.cells[j] - search.cells[i]
    new = torch.stack([sums[a] + change, sums[b] - change])
    channels, taps = _template(search, new)
    return _kept(new, channels, taps).sum(0), new, channels, taps


def _kept(sums: Tensor, channels: Tensor, taps: Tensor) -> Tensor:
    """[..., groups] what groups with these sums [..., groups, channels, taps] keep."""
    return torch.einsum("...cp,...c,...p->...", sums, channels.to(sums.dtype), taps.to(sums.dtype))


# ---------------------------------------------------------------------- method="paper"


def _by_counts(search: _Search, kernels: int) -> _Found:
    """Algorithm 1 on counts of non-zeros [rows, channels, taps], of which the `kernels` richest kernels are kept."""
    per_kernel = search.cells.sum(2)
    kept = top(per_kernel.view(-1), kernels).view(per_kernel.shape)
    member = _similar_rows(search, kept)
    sums = search.sums(member)
    # Rows of the kernel mask first, non-zeros second: the latter are fewer than a step of the former.
    most = search.cells.sum() + 1
    value = (member.double() @ kept.double()) + (sums.sum(3) / most)
    channels = choose_balanced(value, search.kept_channels) if search.balanced else top(value, search.kept_channels)
    return _Found(member, channels, search.best_taps(sums, channels))


def keep_by_counts(nonzero: Tensor, channels: int, taps: int, granule: int) -> tuple[Tensor, Tensor]:
    """Steps 1, 3 and 4 of Algorithm 1 for a group on its own: how HRBP changes a mask while training.

    Args:
        nonzero: bool [rows, C, R*S], the cells that the group's filters would keep each for itself.
        channels, taps: how many the group keeps; granule: channels come in aligned runs of this many.

    Returns:
        int64 [channels] and [taps], ascending.
    """
    rows, c, area = nonzero.shape
    cells = nonzero.float().view(rows, c // granule, granule, area).sum(2)
    search = _Search(cells, GroupShape(1, channels, taps), granule, balanced=False, seed=0)
    found = _by_counts(search, rows * (channels // granule))
    runs = found.channels[0, 0].nonzero() * granule
    kept = (runs + torch.arange(granule, device=runs.device)).flatten()
    return kept, found.taps[0, 0].nonzero()[:, 0]


def _similar_rows(search: _Search, kept: Tensor) -> Tensor:
    """[1, t, rows]: equal groups of rows with similar masks `kept` [rows, channels]."""
    ones = kept.double()
    both, each = ones @ ones.t(), ones.sum(1)
    similarity = both / (each[:, None] + each - both).clamp_min(1)  # Jaccard: |a and b| / |a or b|
    generator = torch.Generator().manual_seed(search.seed)
    ranked = search.matrix.sum(1, dtype=torch.float64).argsort(stable=True)
    chosen = [int(ranked[int(torch.randint(search.rows, (1,), generator=generator))])]
    while len(chosen) < search.groups:
        nearest = similarity[chosen].amax(0)
        nearest[chosen] = math.inf
        chosen.append(int(nearest.argmin()))
    member = search.best_rows(similarity[chosen][None])
    within = -math.inf
    for _ in range(STEPS):
        shared = member.double() @ similarity
        total = float((shared * member).sum())
        if total <= within * (1 + 1e-9):
            break
        best, within = member, total
        member = search.best_rows(shared)
    return best


# ---------------------------------------------------------------------- the result


def _grouping(found: _Found, shape: tuple[int, ...], row_granule: int, granule: int) -> Grouping:
    member, channels, taps = found.member[0], found.channels[0], found.taps[0]
    groups = len(member)
    order = member.to(torch.uint8).argmax(1).argsort()  # groups by their first row

    def lists(chosen: Tensor, run: int) -> Tensor:
        starts = chosen[order].nonzero()[:, 1].view(groups, -1, 1) * run
        return (starts + torch.arange(run, device=chosen.device)).view(groups, -1)

    k, c, r, s = shape
    rows = lists(member, row_granule).view(-1)
    return Grouping((k, c, r, s), rows, lists(channels, granule), lists(taps, 1), granule)
