"""Which items are chosen: the highest ones, or the best choice that is fair to a few groups.

The fair choice is a transportation problem with few columns. Each group gets a price; an item takes the groups where
its value exceeds the price most. Prices are moved, one group at a time, to where each group is taken by as many items
as it has room for (coordinate descent on the dual problem). That is right but for a few items; these then move along
cheapest paths between groups, which keeps the choice optimal (Ahuja, Magnanti, Orlin: Network Flows, 1993, chapter 9).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import check_sparsity

FEW_RANKS = 1  # one maximum after the other up to here: three times as fast as topk along groups
SWEEPS = 8  # most rounds over the prices; what they leave is repaired exactly
JITTER = 1e-11  # breaks ties, relative to the largest value
MOVES = 1 << 20  # items of pairs of groups that are looked at together


def check_score(score: Tensor, sparsity: float, who: str) -> Tensor:
    """The score [K, C, R, S] as floats that neither overflow nor depend on its unit: divided by a power of two.

    Raises:
        ValueError: it is not four-dimensional, empty, negative or not finite, or sparsity is outside [0, 1).
    """
    if not isinstance(score, Tensor):
        raise ValueError(
            f"{who}: score is a {type(score).__name__}; it needs a torch.Tensor (torch.as_tensor makes one)"
        )
    if score.dim() != 4 or score.numel() == 0:
        raise ValueError(f"{who}: score has shape {tuple(score.shape)}; it needs [K, C, R, S], none of them 0")
    check_sparsity(sparsity, who)
    if score.dtype == torch.bool:
        score = score.float()
    if not score.is_floating_point():
        raise ValueError(f"{who}: score is {score.dtype}; it needs floating point or bool")
    if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
        raise ValueError(f"{who}: score has cells that are negative, infinite or NaN; it needs finite ones >= 0")
    cells = score.detach().to(torch.float64 if score.dtype == torch.float64 else torch.float32).contiguous()
    highest = float(cells.max())
    return torch.ldexp(cells, torch.tensor(-math.frexp(highest)[1], device=cells.device)) if highest > 0 else cells


def top(value: Tensor, count: int) -> Tensor:
    """bool: the `count` highest along the last axis; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(value, dtype=torch.bool)
    least = value.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, level = value > least, value == least
    room = count - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def top_of_few(value: Tensor, count: int, axis: int) -> Tensor:
    """As `top`, along any axis: by comparing each pair of items, which is several times faster for a few of them."""
    items = value.unbind(axis)
    ahead = [torch.zeros_like(item, dtype=torch.uint8) for item in items]  # how many go before each item
    for i, item in enumerate(items):
        for j in range(i + 1, len(items)):
            first = item >= items[j]
            ahead[j] += first
            ahead[i] += ~first
    return torch.stack([places < count for places in ahead], axis)


def swapped(kept: Tensor, worth: Tensor, gain: Tensor, share: float) -> Tensor:
    """bool [rows, units]: in each row, drop `share` of the kept units, the least worth, and add as many of most gain.

    A unit that goes may come back at once, as in RigL. Rows keep equally many units.
    """
    stay, go = staying(kept, worth, share)
    return stay | top(gain.masked_fill(stay, -math.inf), go)


def staying(kept: Tensor, worth: Tensor, share: float) -> tuple[Tensor, int]:
    """Which units stay, and how many go in each row: never more than there are others to come."""
    count = int(kept[0].sum())
    go = min(round(share * count), kept.shape[1] - count)
    return top(worth.masked_fill(~kept, -math.inf), count - go), go


def balanced(value: Tensor, quota: int, prices: Tensor | None = None) -> Tensor:
    """The items of each group that together are worth most, with equal shares for groups and for items.

        maximise sum value[b, g, i] * chosen[b, g, i]   over bool chosen, where for each b
        every group g has exactly `quota` items and every item is in lo or lo + 1 groups, lo = groups * quota // items

    With quota = items / groups this assigns each item to one group. Exact but for ties, which are those of values that
    differ by less than 1e-11 of the largest one.

    Args:
        value: [B, groups, items], finite; B problems of one size. Computed in float64, on its device.
        quota: items of each group, 0 .. items.
        prices: float64 [B, groups, 1], where the search starts, overwritten by where it ends: the prices of a similar
            problem save time, and change the choice among ties only. Default: zeros.

    Returns:
        bool [B, groups, items].
    """
    problems, groups, items = value.shape
    if not 0 <= quota <= items:
        raise ValueError(f"balanced(): quota is {quota}; it needs 0 .. {items}, the number of items")
    lo, extra = divmod(groups * quota, items)
    if quota in (0, items):
        return torch.full(value.shape, quota == items, device=value.device)
    value = value.double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(groups, items, generator=generator, dtype=torch.float64).to(value.device)
    scale = value.abs().amax((1, 2), keepdim=True)
    value = value + noise * torch.where(scale > 0, scale, 1.0) * JITTER
    prices = value.new_zeros(problems, groups, 1) if prices is None else prices
    chosen, surplus = _by_prices(value, quota, lo, extra, prices)
    for b, counts in enumerate(surplus):
        if any(counts):
            _repair(value[b], chosen[b], counts, lo)
    return chosen


def _by_prices(value: Tensor, quota: int, lo: int, extra: int, prices: Tensor) -> tuple[Tensor, list[list[int]]]:
    """A choice that is optimal for the number of items that each group gets; by how many that is above `quota`.

    Any prices give such a choice. They are moved until few items are wrong: not at all where those of a similar problem
    do already.
    """
    for sweep in range(SWEEPS + 1):
        chosen = _take(value - prices, lo, extra)
        surplus = (chosen.sum(2) - quota).tolist()
        wrong = sum(abs(count) for counts in surplus for count in counts)
        if wrong <= (2 * len(value) if sweep else 0) or sweep == SWEEPS:  # the repair is cheaper for so few
            break
        for g in range(value.shape[1]):
            # Item i takes g when its surplus there passes what it would otherwise take as its lo-th group, or, as one
            # of the `extra`, its (lo + 1)-th at the price of being one.
            others = value - prices
            pool = _between(_largest(others, lo), extra) if extra else None
            others[:, g] = -math.inf
            if pool is None:
                bar = _largest(others, lo - 1)
            else:
                bar = torch.maximum(_largest(others, lo), pool)
                if lo:
                    bar = torch.minimum(_largest(others, lo - 1), bar)
            prices[:, g] = _between(value[:, g] - bar, quota)
    return chosen, surplus


def _largest(surplus: Tensor, rank: int) -> Tensor:
    """[B, items] each item's largest surplus (rank 0), second largest (1), ..."""
    if rank > FEW_RANKS:
        return surplus.topk(rank + 1, 1).values[:, rank]
    for _ in range(rank):
        surplus = surplus.scatter(1, surplus.max(1, keepdim=True).indices, -math.inf)
    return surplus.amax(1)


def _between(t: Tensor, k: int) -> Tensor:
    """[B, 1] halfway between the k-th and the (k+1)-th largest of each row."""
    return t.topk(k + 1).values[:, k - 1 :].mean(1, keepdim=True)


def _take(surplus: Tensor, lo: int, extra: int) -> Tensor:
    """Each item's lo best groups, and one more for the `extra` items that gain most by it."""
    chosen = torch.zeros_like(surplus, dtype=torch.bool)
    ranked = surplus.topk(lo + bool(extra), 1)
    chosen.scatter_(1, ranked.indices[:, :lo], True)
    if extra:
        items = ranked.values[:, lo].topk(extra).indices
        groups = ranked.indices[:, lo].gather(1, items)
        chosen[torch.arange(len(surplus), device=surplus.device)[:, None], groups, items] = True
    return chosen


def _repair(value: Tensor, chosen: Tensor, counts: list[int], lo: int) -> None:
    """Moves items from groups that have too many to groups that have too few, always by the cheapest chain of moves.

    `chosen` [groups, items] is optimal for its own number of items in each group, and stays so. `counts`: by how many
    items each group has too many; all 0 at the end.
    """
    groups = len(value)
    while any(counts):
        costs, movers = _moves(value, chosen, lo)
        path = _cheapest_path(costs, [c > 0 for c in counts], [c < 0 for c in counts])
        for a, b in path:
            item = movers[a][b]
            if a < groups:
                chosen[a, item] = False
            if b < groups:
                chosen[b, item] = True
        counts[path[-1][0]] -= 1
        counts[path[0][1]] += 1


def _moves(value: Tensor, chosen: Tensor, lo: int) -> tuple[list[list[float]], list[list[int]]]:
    """Cost and item of the cheapest move from each group (first index) to each other one.

    The last node is the pool of items that may be in one group more than the others: an item leaves a group for it,
    another one takes a group more.
    """
    more = chosen.sum(0) > lo
    pool = torch.zeros_like(value[:1])
    leave = torch.cat([value.masked_fill(~chosen, math.inf), pool.masked_fill(more, math.inf)])
    enter = torch.cat([-value.masked_fill(chosen, -math.inf), pool.masked_fill(~more, math.inf)])
    at_once = max(1, MOVES // enter.numel())
    best = [(some[:, None] + enter).min(2) for some in leave.split(at_once)]
    costs, movers = torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
    return costs.tolist(), movers.tolist()


def _cheapest_path(costs: list[list[float]], sources: list[bool], sinks: list[bool]) -> list[tuple[int, int]]:
    """The edges, last one first, of the cheapest path from any source to any sink, perhaps through other sources.

    Bellman-Ford: costs may be negative; cycles are not, but by rounding, and no path may close one.
    """
    nodes = range(len(costs))
    distance = [*(0.0 if s else math.inf for s in sources), math.inf]
    before = [-1] * len(costs)
    changed = True
    rounds = 0
    while changed and rounds < len(costs):
        changed, rounds = False, rounds + 1
        for a in nodes:
            for b in nodes:
                if distance[a] + costs[a][b] < distance[b] and not _passes(before, a, b):
                    distance[b], before[b], changed = distance[a] + costs[a][b], a, True
    node = min((b for b in nodes[:-1] if sinks[b]), key=distance.__getitem__)
    path = []
    while before[node] != -1:
        path.append((before[node], node))
        node = before[node]
    return path


def _passes(before: list[int], a: int, b: int) -> bool:
    """Whether the path to node a goes through node b."""
    while a not in (-1, b):
        a = before[a]
    return a == b
