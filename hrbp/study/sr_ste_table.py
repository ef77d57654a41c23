"""The results of the study of SR-STE's lambda: rows, curves, a table and the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..columns import counted
from ..methods.registry import METHODS
from ..training.optimizer import learning_rate
from ..training.settings import Settings
from .page import Parts
from .spread import LEVEL, Interval, mean, paired, points
from .study_table import difference, shown_accuracy, where
from .study_table import rows as study_rows
from .variants import Variant

Results = Mapping[str, Any]  # content of results.json


def strength(run: Mapping[str, Any]) -> float | None:
    """lambda of a training: 0 of a method without one, as STE; None where no mask follows its weights."""
    method = METHODS[run["method"]]
    if not method.follows_weight:
        return None
    return float(run.get("evolve", {}).get("decay", method.defaults().get("decay", 0.0)))


def kind_of(run: Mapping[str, Any]) -> str:
    """The structure of a training as tables and figures name it: n:m by its numbers."""
    structure, options = run["structure"], run["options"]
    if structure != "n:m" or options.keys() - {"m"}:
        return Variant(structure, options=options).name
    m = options.get("m", 4)
    return f"{round(m * (1 - run['asked']))}:{m}"


def rows(results: Results) -> list[dict[str, Any]]:
    """The rows of a study (see study_table.rows), of those whose masks follow their weights with, else with None:

    kind              structure, without the method
    decay             lambda
    left              what a weight that is dropped all along shrinks to by lambda alone; None unless SGD trains:
                      exp(-lambda * sum of learning rates / (1 - momentum))
    sad_last          SAD of the last two looks, as a share of all weights of the layers made sparse
    sad_all           SAD of every two successive looks, added up, as a share of them: changes of side for each weight
    moved             |E_end - E_start|_1 as a share of them: weights that have changed side from start to end
    of_ste, of_ste_low, of_ste_high  accuracy above lambda = 0 of the same structure and sparsity, paired by seed
    """
    found, runs = study_rows(results), results["runs"]
    scores = {
        line: {run["seed"]: run["accuracy"] for run in runs if run["line"] == line and run["accuracy"] is not None}
        for line in {run["line"] for run in runs}
    }
    kinds = {run["line"]: (kind_of(run), strength(run), run["asked"]) for run in runs}
    plain = {(kind, asked): line for line, (kind, decay, asked) in kinds.items() if decay == 0}
    for row in found:
        kind, decay, asked = kinds[row["line"]]
        row |= {"kind": kind, "decay": decay, "left": None if decay is None else _left(results["settings"], decay)}
        mine = [run for run in runs if run["line"] == row["line"] and run.get("looks") and run["accuracy"] is not None]
        row["sad_last"] = mean([_share(run, "sad", -1) for run in mine])
        row["sad_all"] = mean([sum(_share(run, "sad", at) for at in range(len(run["looks"]))) for run in mine])
        row["moved"] = mean([_share(run, "drift", -1) for run in mine])
        ours = plain.get((kind, asked))
        of = None if ours in (None, row["line"]) or not decay else paired(scores[row["line"]], scores[ours])
        row |= {"of_ste": of and of.mean, "of_ste_low": of and of.low, "of_ste_high": of and of.high}
    return sorted(found, key=_place)


def _place(row: Mapping[str, Any]) -> tuple[float, str, float]:
    return row["asked"], row["kind"], -math.inf if row["decay"] is None else row["decay"]


def curves(results: Results) -> dict[tuple[str, float], dict[float, list[tuple[list[int], list[float]]]]]:
    """(kind, sparsity) -> lambda -> for every seed (steps, SAD since the look before as a share of all weights)."""
    found: dict[tuple[str, float], dict[float, list[tuple[list[int], list[float]]]]] = {}
    for run in results["runs"]:
        if (decay := strength(run)) is not None and run.get("looks"):
            shares = [_share(run, "sad", at) for at in range(len(run["looks"]))]
            found.setdefault((kind_of(run), run["asked"]), {}).setdefault(decay, []).append((run["looks"], shares))
    return found


def _share(run: Mapping[str, Any], key: str, at: int) -> float:
    """Of all weights of the layers made sparse, at one look."""
    masks = run["masks"].values()
    return sum(mask[key][at] for mask in masks) / sum(mask["cells"] for mask in masks)


def _left(settings: Mapping[str, Any], decay: float) -> float | None:
    training = Settings(**settings["training"])
    if training.optimizer != "sgd" or training.momentum == 1:
        return None
    steps = settings["images"][0] // settings["batch_size"]
    rates = sum(learning_rate(training, step, steps) for step in range(training.epochs * steps))
    return math.exp(-decay * rates / (1 - training.momentum))


def table(results: Results) -> str:
    """The table, notes on its columns, and the answer."""
    if (found := parts(results)) is None:
        return "no training is finished yet"
    return found.text()


def parts(results: Results) -> Parts | None:
    """What is shown of a study; None where no training is finished."""
    found = rows(results)
    if not found:
        return None
    head = ["", "sparsity %", "lambda", "accuracy %", "above lambda 0", "final SAD %", "SAD in all %", "changed side %",
            "left %"]  # fmt: skip
    lines = [
        [
            row["kind"], "0" if row["asked"] == 0 else f"{100 * row['sparsity']:.1f}",
            "-" if row["decay"] is None else f"{row['decay']:g}", shown_accuracy(row),
            points(difference(row, "of_ste")),
            *(_percent(row[key]) for key in ("sad_last", "sad_all", "moved", "left")),
        ]
        for row in found
    ]  # fmt: skip
    settings = results["settings"]
    title = f"{where(results)}; {len(results['runs'])} of {settings['trainings']} trainings are finished"
    notes = [
        f"accuracy: with its {100 * LEVEL:g}% interval; above lambda 0: points, differences paired by seed",
        f"SAD: cells of the masks that differ from those {counted(settings['every'], 'step')} before, as a share of all"
        " weights of the layers made sparse; final: at the last look; in all: added up over the training",
        "changed side: weights that are dropped at the end and were kept at the start, or the other way round",
        "left: what a weight that is dropped all along shrinks to by lambda alone,"
        " exp(-lambda * sum of learning rates / (1 - momentum)); the longer a training, the more the same lambda does",
    ]
    notes += [f"left out: {line}, as {reason}" for line, reason in results.get("left_out", {}).items()]
    return Parts(title, head, lines, notes, answers(found))


def answers(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each structure and sparsity: what lambda does to the masks, and whether it does anything to accuracy."""
    said = []
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in found:
        if row["decay"] is not None and row["sad_all"] is not None and row["accuracy"] is not None:
            groups.setdefault((row["kind"], row["asked"]), []).append(row)
    for (structure, asked), mine in groups.items():
        if len(mine) < 2:
            continue
        wander = ", ".join(f"{100 * row['sad_all']:.0f}% at {row['decay']:g}" for row in mine)
        text = f"{structure} at {100 * asked:g}%: SAD in all is {wander}"
        known = [(row, one) for row in mine if (one := difference(row, "of_ste")) is not None and one.low is not None]
        shown = [_compared(row, one) for row, one in known if one.side]
        if known:
            text += f"; against lambda 0 accuracy is {', '.join(shown) or 'not shown to differ at any lambda'}"
        said.append(f"{text}.")
    return said


def _compared(row: Mapping[str, Any], one: Interval) -> str:
    return f"{'higher' if one.side > 0 else 'lower'} at {row['decay']:g} ({points(one)} points)"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}" if value < 0.1 else f"{100 * value:.0f}"
