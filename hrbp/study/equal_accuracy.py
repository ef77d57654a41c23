"""Density, storage and memory references of each grain at equal accuracy, from the results of the regularity study.

Every seed is a chain of networks that were pruned to one sparsity after the other and trained again. Its loss at a
sparsity is the accuracy of the dense network trained for as long, minus its own. Going from dense to sparse, the first
two neighbours a, b with loss(a) <= tolerance < loss(b) bracket the point where the accuracy is that of dense minus the
tolerance; between them density and costs are taken as linear in the loss:

        value = value(a) + (value(b) - value(a)) * (tolerance - loss(a)) / (loss(b) - loss(a))

Nothing is extrapolated: where no two networks bracket it, in any seed, the grain has no value. The dense network is no
neighbour, as it stores no index. This is the comparison of Mao et al., Exploring the Regularity of Sparse Structure in
Convolutional Neural Networks (2017), storage where the accuracy is the same, with an interval over seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .page import Parts
from .regularity_table import FINEST, GRAINS, line_name, narrow_names
from .spread import LEVEL, Interval, interval, paired, points

ROUNDING = 1e-9  # of differences of accuracies: one that is the tolerance exactly is within it


class Point(NamedTuple):
    """A network of a chain: accuracy below dense, share of weights kept, storage relative to dense, references."""

    loss: float
    density: float
    storage: float
    scnn: float | None


def bracketed(chain: Sequence[Point], tolerance: float) -> Point | str:
    """Where a chain, from dense to sparse, has lost `tolerance`; or on which side of all its networks that lies."""
    most = tolerance + ROUNDING
    for a, b in itertools.pairwise(chain):
        if a.loss <= most < b.loss:
            share = max(0.0, tolerance - a.loss) / (b.loss - a.loss)
            scnn = None if a.scnn is None or b.scnn is None else _mixed(a.scnn, b.scnn, share)
            return Point(tolerance, _mixed(a.density, b.density, share), _mixed(a.storage, b.storage, share), scnn)
        if a.loss > most:
            break
    return "denser" if not chain or chain[0].loss > most else "sparser"


def _mixed(a: float, b: float, share: float) -> float:
    return a + share * (b - a)


def equal_accuracy(results: Mapping[str, Any], tolerance: float) -> list[dict[str, Any]]:
    """A row for each grain, in the order of the study.

    structure               as tables name it; narrow: dense networks, whose density is their share of the weights
    seeds                   chains, each with the dense networks of its seed
    denser, sparser         chains that have lost more than the tolerance at the lowest sparsity already; that have not
                            at the highest
    density, storage        an Interval over seeds, None where not every seed brackets it: share of the weights kept in
                            the layers made sparse; storage relative to the dense network
    against                 storage minus that of single weights, paired by seed: an Interval, None where one has none
    scnn                    references of a machine like SCNN (see scnn.py) / those of single weights, likewise

    Args:
        results: content of results.json.
        tolerance: accuracy that may be lost, as a share, >= 0.

    Raises:
        ValueError: tolerance out of range.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"equal_accuracy(): tolerance is {tolerance}; it needs a share in [0, 1)")
    settings = results["settings"]
    kinds = [kind for kind in settings["structures"] if kind != "dense"]
    found: list[dict[str, Any]] = []
    reached: dict[str, dict[int, Point]] = {}
    for kind in kinds:
        ends = {seed: bracketed(chain, tolerance) for seed, chain in _chains(results, kind).items()}
        at = {seed: end for seed, end in ends.items() if isinstance(end, Point)}
        row: dict[str, Any] = {
            "structure": GRAINS.get(kind, kind), "seeds": len(ends), "against": None,
            **{side: sum(end == side for end in ends.values()) for side in ("denser", "sparser")},
            **dict.fromkeys(("density", "storage", "scnn")),
        }  # fmt: skip
        if ends and len(at) == len(ends):
            row["density"] = interval([point.density for point in at.values()])
            row["storage"] = interval([point.storage for point in at.values()])
            reached[kind] = at
        found.append(row)
    for kind, row in zip(kinds, found, strict=True):
        if kind != FINEST and kind in reached and FINEST in reached:
            ours, single = reached[kind], reached[FINEST]
            row["against"] = paired(*({seed: p.storage for seed, p in each.items()} for each in (ours, single)))
            ratios = [p.scnn / q.scnn for seed, p in ours.items() if (q := single.get(seed)) and p.scnn and q.scnn]
            row["scnn"] = interval(ratios) if len(ratios) == len(ours) else None
    return found


def _chains(results: Mapping[str, Any], kind: str) -> dict[int, list[Point]]:
    """seed -> the networks of a grain, from dense to sparse; of seeds with all of them."""
    runs = {(run["line"], run["seed"]): run for run in results["runs"]}
    settings, trained = results["settings"], results["trained"]
    lines = [
        (line_name(narrow_names([asked])[0] if kind == "narrow" else kind, asked), line_name("dense", asked))
        for asked in settings["sparsities"]
    ]
    lines = [pair for pair in lines if pair[0] not in results.get("left_out", {})]
    chains: dict[int, list[Point]] = {}
    for seed in settings["seeds"]:
        pairs = [(runs.get((mine, seed)), runs.get((dense, seed))) for mine, dense in lines]
        if all(run is not None and run["accuracy"] is not None for pair in pairs for run in pair):
            chains[seed] = [_point(run, dense, trained, kind) for run, dense in pairs if run and dense]
    return chains


def _point(run: Mapping[str, Any], dense: Mapping[str, Any], trained: Mapping[str, Any], kind: str) -> Point:
    storage = run["stream"] / trained["stream"]
    density = storage if kind == "narrow" else 1 - run["sparsity"]
    scnn = None if run.get("scnn") is None else math.fsum(run["scnn"].values())
    return Point(dense["accuracy"] - run["accuracy"], density, storage, scnn)


def parts(results: Mapping[str, Any], tolerance: float) -> Parts | None:
    """What is shown of it; None where no seed has a whole chain."""
    found = [row for row in equal_accuracy(results, tolerance) if row["seeds"]]
    if not found:
        return None
    head = ["", "density %", "storage %", "storage against 0-D", "SCNN references", "seeds"]
    lines = [
        [
            row["structure"],
            _cell(row["density"]),
            _cell(row["storage"]),
            points(row["against"]),
            _cell(row["scnn"], 1, ".2f"),
            _seeds(row),
        ]
        for row in found
    ]
    settings = results["settings"]
    points_lost = f"{100 * tolerance:g} point{'s' * (tolerance != 0.01)}"
    title = f"At equal accuracy: that of the dense network trained as long, minus {points_lost}"
    notes = [
        f"interpolated for each seed between the two neighbouring sparsities, of"
        f" {', '.join(f'{100 * s:g}%' for s in settings['sparsities'])}, that bracket this loss; in brackets the"
        f" {100 * LEVEL:g}% interval over seeds; nothing is extrapolated",
        "not reached: denser: a loss above that at the lowest sparsity already; sparser: less than that at the highest",
        "storage relative to dense; against 0-D: points of storage, paired by seed; SCNN references: those of 0-D are"
        " 1, see scnn.py",
    ]
    return Parts(title, head, lines, notes, [])


def _cell(value: Interval | None, scale: float = 100, form: str = ".1f") -> str:
    if value is None:
        return "-"
    ends = [] if value.low is None or value.high is None else [value.low, value.high]
    spread = f" [{', '.join(f'{scale * end:{form}}' for end in ends)}]" if ends else ""
    return f"{scale * value.mean:{form}}{spread}"


def _seeds(row: Mapping[str, Any]) -> str:
    missed = [f"{row[side]} {side}" for side in ("denser", "sparser") if row[side]]
    return f"{row['seeds']}" if not missed else f"not reached: {', '.join(missed)} of {row['seeds']}"
