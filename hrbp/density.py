"""How much of each layer is kept: uniform, Erdos-Renyi-Kernel, or where the highest scores lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .arguments import any_case, check_sparsity

DISTRIBUTIONS = ("uniform", "erk", "global")


def densities(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    distribution: str = "erk",
    *,
    scores: Mapping[str, Tensor] | None = None,
    realise: Callable[[str, float], float] | None = None,
    min_density: float = 0.0,
) -> dict[str, float]:
    """The density of each layer, such that all layers together have the given sparsity.

    With n cells in a layer [K, C, R, S] and one scale x for all layers:

    - "uniform": density = x.
    - "erk": density = min(1, x * (K + C + R + S) / n): the number kept grows with the sides of a layer, not with its
      volume. A layer of shape [K, C] has (K + C) / n, one of [K, C, S] (K + C + S) / n.
    - "global": the cells with the highest scores over all layers. Cells that tie with the last one kept (zeros,
      often) share what is left to keep in proportion to their number in each layer, so the order of the layers
      decides nothing. A layer may be left with nothing.

    Without `realise`, sum(n * density) is (1 - sparsity) * sum(n) to float rounding. With it, x is searched so that
    sum(n * realise(name, density)) comes as near to that as x can bring it, and where several layers step at the same
    x, only those of them that bring the sum nearer.

    Args:
        shapes: layer name -> weight shape, [K, C, R, S], [K, C, S] or [K, C].
        sparsity: the share of all cells together that is dropped, in [0, 1). 0 keeps every layer dense, without asking
            `realise`.
        distribution: "uniform", "erk" or "global".
        scores: layer name -> finite scores >= 0 of the layer's shape, any floating dtype; only "global" reads them.
        min_density: no layer is asked for less; the others give way. In [0, 1 - sparsity].
        realise: (name, density in [0, 1]) -> the density that a structure can really keep there (whole blocks, at
            least one, layers too narrow for it), non-decreasing in density.

    Returns:
        Layer name -> the density to ask for, in the order of `shapes`. With `realise`, it is what the layer will keep
        wherever asking for that gives it back, so that no rounding of the caller's can tip it over.

    Raises:
        ValueError: bad shapes, sparsity, distribution or scores; or `realise` always keeps more than the sparsity
            leaves, or never as much.

    Source: "erk" is Evci et al., Rigging the Lottery (2020), sec. 3, after Mocanu et al. (2018); "global" is what
    SNIP, GraSP and SynFlow prune by.
    """
    who = "densities()"
    cells = {name: _cells(name, shape, who) for name, shape in shapes.items()}
    if not cells:
        raise ValueError(f"{who}: shapes is empty; it needs at least one layer")
    check_sparsity(sparsity, who)
    distribution = any_case(distribution, DISTRIBUTIONS)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"{who}: distribution is {distribution!r}; it needs one of {', '.join(map(repr, DISTRIBUTIONS))}"
        )
    checked = _checked_scores(shapes, scores, who) if distribution == "global" else {}
    if sparsity == 0:
        return dict.fromkeys(cells, 1.0)
    if distribution == "uniform":
        spread = _uniform(cells)
    elif distribution == "erk":
        spread = _erk(cells, {name: sum(shape) for name, shape in shapes.items()})
    else:
        spread = _global(cells, checked)
    if min_density:
        check_min_density(min_density, sparsity, who)
        real = realise or (lambda name, density: density)
        asked = _realised(spread, cells, sparsity, lambda n, density: real(n, max(density, min_density)), who)
        return {name: max(density, min_density) for name, density in asked.items()}
    if realise is None:
        return spread(_budget(cells, sparsity))
    return _realised(spread, cells, sparsity, realise, who)


def check_min_density(min_density: float, sparsity: float, who: str) -> None:
    """ValueError unless every layer can keep that share at this sparsity of all."""
    number = isinstance(min_density, int | float) and not isinstance(min_density, bool)
    if not number or not 0 <= min_density <= (1 - sparsity) * (1 + 1e-9):
        raise ValueError(
            f"{who}: min_density is {min_density!r}; it needs a number in [0, {1 - sparsity:.6g}], as sparsity"
            f" {sparsity} leaves that density on average"
        )


def _budget(cells: dict[str, int], sparsity: float) -> float:
    total = sum(cells.values())
    return total - sparsity * total


# Each distribution is a function from a budget, the number of cells to keep over all layers (a real number in
# (0, total)), to densities that keep exactly that. All densities grow with the budget: it serves as the scale x.
_Spread = Callable[[float], dict[str, float]]


def _uniform(cells: dict[str, int]) -> _Spread:
    total = sum(cells.values())
    return lambda budget: dict.fromkeys(cells, budget / total)


def _erk(cells: dict[str, int], sides: dict[str, int]) -> _Spread:
    first_full = sorted(cells, key=lambda name: cells[name] / sides[name])

    def spread(budget: float) -> dict[str, float]:
        # Fill layers that overflow, in the order in which a growing scale fills them; the rest share what is left.
        rest = sum(sides.values())
        for name in first_full:
            scale = budget / rest
            if scale * sides[name] < cells[name]:
                break
            budget -= cells[name]
            rest -= sides[name]
        return {name: min(1.0, scale * sides[name] / cells[name]) for name in cells}

    return spread


def _global(cells: dict[str, int], scores: dict[str, Tensor]) -> _Spread:
    every = torch.cat([score.flatten() for score in scores.values()])  # one dtype, so that ties are ties
    every = every.to(torch.promote_types(every.dtype, torch.float32))
    layers = dict(zip(cells, map(_ascending, every.split(list(cells.values()))), strict=True))
    ranked = _ascending(every)

    def spread(budget: float) -> dict[str, float]:
        last = ranked[-math.ceil(budget)]  # the lowest score of which something is kept
        below = {name: int(torch.searchsorted(layer, last)) for name, layer in layers.items()}
        above = {name: cells[name] - int(torch.searchsorted(layer, last, right=True)) for name, layer in layers.items()}
        tied = {name: cells[name] - below[name] - above[name] for name in cells}
        share = (budget - sum(above.values())) / sum(tied.values())
        return {name: (above[name] + share * tied[name]) / cells[name] for name in cells}

    return spread


def _ascending(x: Tensor) -> Tensor:
    # Tensor.sort carries indices along: on a CPU several times slower than NumPy.
    return torch.from_numpy(np.sort(x.numpy())) if x.device.type == "cpu" else x.sort().values


def _realised(
    spread: _Spread, cells: dict[str, int], sparsity: float, realise: Callable[[str, float], float], who: str
) -> dict[str, float]:
    """The densities to ask for so that what `realise` makes of them has as nearly that sparsity as it can."""

    def keep(asked: dict[str, float]) -> dict[str, float]:
        kept = {name: realise(name, density) for name, density in asked.items()}
        for name, density in kept.items():
            if not 0 <= density <= 1:
                raise ValueError(
                    f"{who}: realise({name!r}, {asked[name]!r}) is {density!r}; it needs a density in [0, 1]"
                )
        return kept

    def count(kept: dict[str, float]) -> float:
        return sum(cells[name] * density for name, density in kept.items())

    total, budget = sum(cells.values()), _budget(cells, sparsity)
    low, high = dict.fromkeys(cells, 0.0), dict.fromkeys(cells, 1.0)
    fewer, more = keep(low), keep(high)
    least, most = count(fewer), count(more)
    if budget < least * (1 - 1e-9):
        heaviest = sorted(cells, key=lambda name: -cells[name] * fewer[name])[:3]
        raise ValueError(
            f"{who}: sparsity {sparsity} leaves {budget:.0f} of {total} cells; the structure keeps at least"
            f" {least:.0f}, a sparsity of {1 - least / total:.4f}. Lower the sparsity, choose a finer structure, or"
            f" leave layers out (most of it is in {', '.join(map(repr, heaviest))})"
        )
    if budget > most * (1 + 1e-9):
        raise ValueError(
            f"{who}: sparsity {sparsity} leaves {budget:.0f} of {total} cells; the structure keeps at most"
            f" {most:.0f}, a sparsity of {1 - most / total:.4f}. Raise the sparsity, or choose another structure"
        )
    # The sum crosses the budget between these two budgets asked for: halve the gap down to float rounding.
    below, above = 0.0, float(total)
    for _ in range(64):
        middle = (below + above) / 2
        asked = spread(middle)
        kept = keep(asked)
        if count(kept) <= budget:
            below, low, fewer = middle, asked, kept
        else:
            above, high, more = middle, asked, kept
    # Layers that step here, largest first where they fit; then the smallest that is left, if that ends nearer.
    steps = {name: cells[name] * (more[name] - fewer[name]) for name in cells if more[name] != fewer[name]}
    missing = budget - count(fewer)
    left = []
    for name in sorted(steps, key=lambda name: -steps[name]):
        if steps[name] <= missing:
            low[name], fewer[name] = high[name], more[name]
            missing -= steps[name]
        else:
            left.append(name)
    if left and steps[left[-1]] < 2 * missing:
        low[left[-1]], fewer[left[-1]] = high[left[-1]], more[left[-1]]
    return {name: kept if realise(name, kept) == kept else low[name] for name, kept in fewer.items()}


def _cells(name: str, shape: Sequence[int], who: str) -> int:
    if len(shape) not in (2, 3, 4) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"{who}: layer {name!r} has shape {tuple(shape)}; it needs [K, C, R, S], [K, C, S] or [K, C], integers >= 1"
        )
    return math.prod(shape)


def _checked_scores(
    shapes: Mapping[str, Sequence[int]], scores: Mapping[str, Tensor] | None, who: str
) -> dict[str, Tensor]:
    """The scores of the layers in `shapes`, all on one device."""
    if scores is None:
        raise ValueError(f"{who}: distribution 'global' needs scores; pass what saliency() returns")
    checked: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name not in scores:
            raise ValueError(f"{who}: scores has no layer {name!r}; it needs one for every layer in shapes")
        score = scores[name]
        if tuple(score.shape) != tuple(shape):
            raise ValueError(f"{who}: the score of {name!r} has shape {tuple(score.shape)}; it needs {tuple(shape)}")
        if not bool(((score >= 0) & score.isfinite()).all()):
            raise ValueError(f"{who}: the score of {name!r} holds NaN, infinity or negative numbers; it needs >= 0")
        checked[name] = score.detach().to(next(iter(checked.values())).device if checked else score.device)
    return checked
