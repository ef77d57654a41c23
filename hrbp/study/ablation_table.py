"""The results of the study of HRBP++, one change at a time: rows, a table, and what the health of layers tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .page import Parts
from .spread import LEVEL, mean, paired, points, rank_correlation
from .study_table import difference, shown_accuracy, where
from .study_table import rows as study_rows
from .variants import BASELINES, Variant

Results = Mapping[str, Any]  # content of results.json

# Key of a row -> (measure of a layer's health, when it is taken, title of the column, factor of what is shown)
HEALTH = {
    "read": ("read", "start", "read %", 100.0),
    "gradient_start": ("gradient", "start", "gradient", 1.0),
    "gradient_end": ("gradient", "end", "at the end", 1.0),
    "dead": ("dead", "end", "dead %", 100.0),
    "weight_rank": ("weight_rank", "end", "weight rank %", 100.0),
    "feature_rank_start": ("feature_rank", "start", "feature rank %", 100.0),
    "feature_rank": ("feature_rank", "end", "at the end", 100.0),
}


def base_name(results: Results) -> str | None:
    """The variant that others are compared with: the first that is no dense network."""
    names = [Variant(**v) for v in results["settings"]["variants"]]
    return next((v.name for v in names if v.structure not in BASELINES), None)


def rows(results: Results) -> list[dict[str, Any]]:
    """The rows of a study (see study_table.rows), with:

    above_base, above_base_low, above_base_high  accuracy above the base at the same sparsity, paired by seed
    of_base       step time / that of the base
    read, gradient_start, ...  the keys of HEALTH: means over layers and seeds; None where no training ended
    """
    found, runs = study_rows(results), results["runs"]
    base = base_name(results)
    scores = {
        line: {run["seed"]: run["accuracy"] for run in runs if run["line"] == line and run["accuracy"] is not None}
        for line in {run["line"] for run in runs}
    }
    seconds = {row["line"]: row["step_seconds"] for row in found}
    for row in found:
        ours = None if base is None else f"{base} {100 * (row['asked'] or results['settings']['sparsities'][0]):g}%"
        above = None if ours in (None, row["line"]) else paired(scores[row["line"]], scores.get(ours, {}))
        row |= {"above_base": above and above.mean, "above_base_low": above and above.low,
                "above_base_high": above and above.high}  # fmt: skip
        times = row["step_seconds"], seconds.get(ours)
        row["of_base"] = times[0] / times[1] if all(times) else None
        mine = [run["health"] for run in runs if run["line"] == row["line"] and "health" in run]
        row |= {key: mean([one[when][name] for one in mine]) for key, (name, when, *_) in HEALTH.items()}
    return found


def table(results: Results) -> str:
    """The table, notes on its columns, and the answer."""
    if (found := parts(results)) is None:
        return "no training is finished yet"
    return found.text()


def parts(results: Results) -> Parts | None:
    """What is shown of a study; None where no training is finished."""
    found, base = rows(results), base_name(results)
    if not found:
        return None
    head = ["", "sparsity %", "accuracy %", f"above {base}", "its time", "against narrow of equal time",
            *(title for _, _, title, _ in HEALTH.values())]  # fmt: skip
    lines = [
        [
            row["structure"], "0" if row["asked"] == 0 else f"{100 * row['sparsity']:.1f}", shown_accuracy(row),
            points(difference(row, "above_base")), "-" if row["of_base"] is None else f"{row['of_base']:.2f}x",
            points(difference(row, "gain")),
            *("-" if row[key] is None else f"{scale * row[key]:.3g}" for key, (*_, scale) in HEALTH.items()),
        ]
        for row in found
    ]  # fmt: skip
    settings = results["settings"]
    title = f"{where(results)}; {len(results['runs'])} of {settings['trainings']} trainings are finished"
    notes = [
        f"accuracy: with its {100 * LEVEL:g}% interval; above {base}: points, differences paired by seed; its time:"
        f" step time / that of {base}",
        "against narrow of equal time: points above the dense network whose width makes its step take as long",
        "the other columns are means over the layers that become sparse, on one batch:",
        "read: input channels that some filter reads, at the start; gradient: |g| / |w|, at the start and at the end;"
        " dead: kept weights whose gradient is exactly 0, at the end",
        "weight rank, feature rank: effective rank (exp of the entropy of the singular values) of the weight, at the"
        " end, and of the outputs over images and pixels, at the start and at the end, of the largest possible",
    ]
    notes += [f"left out: {line}, as {reason}" for line, reason in results.get("left_out", {}).items()]
    return Parts(title, head, lines, notes, answers(results, found))


def answers(results: Results, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each sparsity: which changes do better and worse than the base, and which measure goes with accuracy."""
    said, base = [], base_name(results)
    for asked in results["settings"]["sparsities"]:
        mine = [row for row in found if row["asked"] == asked and row["accuracy"] is not None]
        sparse = [row for row in mine if not row["structure"].startswith(BASELINES)]
        known = [(row, one) for row in sparse if (one := difference(row, "above_base")) is not None]
        if known:
            sides = {
                side: [f"{row['structure']} ({points(one)})" for row, one in known if one.side == side]
                for side in (1, -1)
            }
            better = f"better than {base}: {', '.join(sides[1])}" if sides[1] else f"nothing is better than {base}"
            worse = f"; worse: {', '.join(sides[-1])}" if sides[-1] else ""
            rest = len(known) - len(sides[1]) - len(sides[-1])
            of_all = f"any of {rest}" if rest == len(known) else f"{rest} of {len(known)}"
            unclear = f"; no difference is shown for {of_all}" if rest else ""
            said.append(f"At {100 * asked:g}% {better}{worse}{unclear}.")
        if words := _goes_with(sparse):
            said.append(f"Over the {len(sparse)} sparse networks at {100 * asked:g}% accuracy {words}.")
    return said


def _goes_with(sparse: Sequence[Mapping[str, Any]]) -> str:
    """Which measure of health orders sparse networks as their accuracy does."""
    shown, silent = [], []
    for key, (name, when, *_) in HEALTH.items():
        known = [row for row in sparse if row[key] is not None]
        one = rank_correlation([row[key] for row in known], [row["accuracy"] for row in known])
        words = f"{name.replace('_', ' ')} at the {when}"
        if one is None:
            continue
        if one.side:
            shown.append(f"{words} ({one.mean:+.2f} [{one.low:+.2f}, {one.high:+.2f}])")
        else:
            silent.append(words)
    if not shown and not silent:
        return ""
    goes = f"goes with {', '.join(shown)} (rank correlation)" if shown else "goes with none of these measures"
    return goes + (f"; it is not shown to go with {', '.join(silent)}" if shown and silent else "")
