"""The results of the regularity study: rows, a table, and answers in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..columns import counted
from .page import Parts
from .rival import Point, against, curve, rival_at
from .spread import Interval, deviation, doubt, mean, points
from .variants import BASELINES

GRAINS = {
    "unstructured": "0-D weight", "vector": "1-D vector", "kernel": "2-D kernel", "filter": "3-D filter",
    "channel": "channel", "1xn": "1x8", "n:m": "n:8", "block": "block 8x8", "hrbp": "hrbp", "hrbp++": "hrbp++",
}  # fmt: skip
FINEST = "unstructured"  # whose references the others are compared with
BOUNDS = "time_bounds"  # key of results.json: structure -> "SPARSITY low" and "SPARSITY high" -> seconds
NARROW = "narrow as "


def narrow_names(sparsities: Sequence[float]) -> list[str]:
    """The narrow networks of a study: one as large as the sparse ones of each sparsity."""
    return [f"{NARROW}{100 * sparsity:g}%" for sparsity in sparsities]


def narrow_size(structure: str) -> float | None:
    """The sparsity whose networks a narrow one is as large as; None of other structures."""
    return float(structure[len(NARROW) : -1]) / 100 if structure.startswith(NARROW) else None


def line_name(structure: str, sparsity: float) -> str:
    """Such as "2-D kernel 75%"; "narrow as 50% 75%": as large as networks of 50%, trained as long as those of 75%."""
    if narrow_size(structure) == sparsity:
        structure = "narrow"
    return f"{GRAINS.get(structure, structure)} {100 * sparsity:g}%"


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table, from the content of results.json; None where a value is not known.

    line, structure, asked        grain and sparsity, as asked for
    accuracy, deviation           mean and sample deviation over seeds, as shares
    seeds, diverged               trainings that ended; those whose loss became infinite or NaN
    loss                          of accuracy, relative to the dense network trained for as long
    parameters, sparsity          weights that are kept; share dropped of the layers made sparse
    refused                       layers whose shape does not fit this grain: they stay dense
    storage                       8-bit weights and 4-bit relative indices, relative to the dense network: see `Stream`
    file, file_ratio              bytes that `hrbp.save` wrote; relative to the dense network's
    references, of_finest         memory references of one image's forward pass; relative to single weights there
    scnn, scnn_of_finest          those of a machine like SCNN, see scnn.py; likewise
    fprop_balance, dgrad_balance  largest / mean work of 8 filters, of 8 input channels, weighed by work
    time                          of forward + backward, measured, relative to the dense network
    rival                         accuracy of the narrow network of equal time, trained as long: see rival.py
    gain, gain_low, gain_high     accuracy above that, paired by seed, and its 95% interval

    Of the narrow networks, which are trained as long as each sparsity, the one as large as that sparsity is a row.
    """
    settings, trained = results["settings"], results["trained"]
    lines: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        lines.setdefault(run["line"], []).append(run)
    scores = {
        line: {r["seed"]: r["accuracy"] for r in runs if r["accuracy"] is not None} for line, runs in lines.items()
    }
    narrow = narrow_names(settings["sparsities"]) if "narrow" in settings["structures"] else []
    found = []
    for kind in settings["structures"]:
        for asked in settings["sparsities"]:
            structure = narrow_names([asked])[0] if kind == "narrow" else kind
            runs = lines.get(line_name(structure, asked), [])
            if not runs:
                continue
            ended = [run for run in runs if run["accuracy"] is not None]
            right = [run["accuracy"] for run in ended]
            row: dict[str, Any] = {
                "line": line_name(structure, asked), "structure": GRAINS.get(kind, kind), "asked": asked,
                "accuracy": mean(right), "deviation": deviation(right),
                "seeds": len(ended), "diverged": len(runs) - len(ended), "loss": None, "of_finest": None,
                "scnn_of_finest": None,
            }  # fmt: skip
            for key in ("parameters", "sparsity", "stream", "file", "references", "fprop_balance", "dgrad_balance"):
                row[key] = mean([run[key] for run in ended])
            counts = [sum(run["scnn"].values()) for run in ended if "scnn" in run]
            row["scnn"] = mean(counts) if len(counts) == len(ended) else None  # not in files of before
            row["refused"] = " ".join(runs[0].get("refused", ()))
            stream = row.pop("stream")
            row["storage"] = stream / trained["stream"] if ended else None
            row["file_ratio"] = row["file"] / trained["file"] if ended else None
            times = _times(results, structure, asked)
            row |= {"time": times and times[0], "rival": None, "gain": None, "gain_low": None, "gain_high": None}
            if times and kind not in BASELINES:
                unpruned = [
                    Point(at[0], scores[line])
                    for other in ("dense", *narrow)
                    if (line := line_name(other, asked)) in scores and (at := _times(results, other, asked))
                ]
                row["rival"] = mean(list((rival_at(curve(unpruned), times[0]) or {}).values()))
                if gain := against(curve(unpruned), scores[row["line"]], times):
                    row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
            found.append(row)
    known = {(row["structure"], row["asked"]): row for row in found if row["accuracy"] is not None}
    for (_, asked), row in known.items():
        if dense := known.get(("dense", asked)):
            row["loss"] = dense["accuracy"] - row["accuracy"]
        if finest := known.get((GRAINS[FINEST], asked)):
            row["of_finest"] = row["references"] / finest["references"]
            if None not in (row["scnn"], finest["scnn"]):
                row["scnn_of_finest"] = row["scnn"] / finest["scnn"]
    return found


def _times(results: Mapping[str, Any], structure: str, asked: float) -> tuple[float, float, float] | None:
    """(time, low, high) relative to dense; None: not measured."""
    if structure == "dense":
        return 1.0, 1.0, 1.0
    times, bounds = results["times"].get(structure), results.get(BOUNDS, {}).get(structure, {})
    if not times:
        return None
    seconds = times[str(asked)]
    low, high = (bounds.get(f"{asked} {end}", seconds) for end in ("low", "high"))
    return seconds / times["dense"], low / times["dense"], high / times["dense"]


def table(results: Mapping[str, Any], *, max_time: float = 0.5, max_storage: float = 0.25) -> str:
    """The table, notes on its columns, and the best structure within a time and a storage budget: see `answers`."""
    if (found := parts(results, max_time=max_time, max_storage=max_storage)) is None:
        return "no training is finished yet"
    return found.text()


def parts(results: Mapping[str, Any], *, max_time: float = 0.5, max_storage: float = 0.25) -> Parts | None:
    """What is shown of a study; None where no training is finished."""
    found = rows(results)
    if not found:
        return None
    head = ["", "sparsity %", "accuracy %", "loss", "storage %", "file %", "references", "SCNN", "filters", "channels",
            "time"]  # fmt: skip
    rivals = any(row["gain"] is not None for row in found)
    head += ["above narrow of equal time"] * rivals
    lines = []

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:{form}}"

    for row in found:
        spread = "" if row["deviation"] is None else f" +- {100 * row['deviation']:4.2f}"
        lines.append([
            row["structure"], _shown_sparsity(row),
            "diverged" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}",
            cell(row["loss"], ".2f", 100), cell(row["storage"], ".1f", 100), cell(row["file_ratio"], ".1f", 100),
            cell(row["of_finest"], ".2f"), cell(row["scnn_of_finest"], ".2f"),
            cell(row["fprop_balance"], ".2f"), cell(row["dgrad_balance"], ".2f"),
            "-" if row["time"] is None else f"{row['time']:.2f}x",
            *[points(_gain(row))] * rivals,
        ])  # fmt: skip
    settings, trained = results["settings"], results["trained"]
    whole = f", {100 * trained['accuracy']:.1f}% right before pruning" if trained.get("accuracy") is not None else ""
    title = (
        f"{settings['model']} x {settings['width']:g}, {settings['data']}{whole}; "
        f"{counted(settings['retraining']['epochs'], 'epoch')} after each pruning,"
        f" {counted(len(settings['seeds']), 'seed')};"
        f" {len(results['runs'])} of {settings['trainings']} trainings are finished"
    )
    notes = [
        "loss: points below the dense network trained for as long",
        "storage: 8-bit weights, 4-bit relative indices with fillers; file: what hrbp.save wrote; relative to dense",
        "references: to memory in a forward pass, relative to single weights at that sparsity; SCNN: likewise, of a"
        " machine that multiplies a few inputs with all weights of their channel and scatters the products: scnn.py",
        "filters, channels: largest / mean work of 8 filters in the output, of 8 input channels in the input gradient",
        f"time: forward + backward of {settings['model']} x {settings['timed_width']:g} with such masks, relative to"
        f" dense, measured side by side on {results['machine']}",
    ]
    if any(row["structure"] == "narrow" for row in found):
        notes.append(
            "narrow: a dense network of as many parameters as the sparse ones, trained for the same epochs at the same"
            " learning rates"
        )
    if rivals:
        notes.append(
            "above narrow of equal time: points above the dense network whose width makes it take as long, trained as"
            " long, interpolated for each seed; in brackets the 95% interval of paired seeds"
        )
    for name, layers in {row["structure"]: row["refused"] for row in found if row["refused"]}.items():
        notes.append(f"{name}: dense where it does not fit: {layers}")
    notes += [f"left out: {line}, as {reason}" for line, reason in results.get("left_out", {}).items()]
    return Parts(title, head, lines, notes, answers(found, max_time=max_time, max_storage=max_storage))


def _gain(row: Mapping[str, Any]) -> Interval | None:
    return None if row["gain"] is None else Interval(row["gain"], row["gain_low"], row["gain_high"], row["seeds"])


def _shown_sparsity(row: Mapping[str, Any]) -> str:
    if row["structure"] in BASELINES:
        return f"as {100 * row['asked']:g}"
    return f"{100 * (row['asked'] if row['sparsity'] is None else row['sparsity']):.2f}"


def answers(found: Sequence[Mapping[str, Any]], *, max_time: float, max_storage: float) -> list[str]:
    """The most accurate structure and sparsity within a time budget, a storage budget, and both.

    Args:
        found: the rows.
        max_time: of forward + backward, relative to dense.
        max_storage: of the file, relative to the dense network's.

    Returns:
        Three sentences, and one on how large a difference has to be, given the spread of the seeds.
    """
    for name, most in (("max_time", max_time), ("max_storage", max_storage)):
        if not 0 < most < math.inf:
            raise ValueError(f"answers(): {name} is {most}; it needs a number > 0")
    known = [r for r in found if None not in (r["accuracy"], r["time"], r["file_ratio"])]
    if not known:
        return []
    time_budget, file_budget = f"{max_time:g} of the dense time", f"{max_storage:g} of the dense file"
    said = [
        _answer(known, time_budget, {"time": max_time}),
        _answer(known, file_budget, {"file_ratio": max_storage}),
        _answer(known, f"{time_budget} and {file_budget}", {"time": max_time, "file_ratio": max_storage}),
    ]
    caveat = doubt(known)
    return [*said, f"{caveat[0].upper()}{caveat[1:]}."]


def _answer(known: Sequence[Mapping[str, Any]], budget: str, limits: Mapping[str, float]) -> str:
    fits = [row for row in known if all(row[key] <= limit for key, limit in limits.items())]
    if not fits:
        nearest = min(known, key=lambda row: max(row[key] / limit for key, limit in limits.items()))
        return f"Within {budget} nothing fits; {_named(nearest)} comes nearest: {_costs(nearest)}."
    best = max(fits, key=lambda row: row["accuracy"])
    said = f"Within {budget} {_named(best)} is the most accurate: {_costs(best)}"
    sparse = [row for row in fits if row["structure"] not in BASELINES]
    if best["structure"] in BASELINES:
        if not sparse:
            return f"{said}; nothing sparse fits."
        best = max(sparse, key=lambda row: row["accuracy"])
        said += f"; among sparse networks {_named(best)}: {_costs(best)}"
    return f"{said}."


def _named(row: Mapping[str, Any]) -> str:
    if row["structure"] == "dense":
        return "the dense network"
    at = f"{100 * row['asked']:g}%"
    return f"the narrow network as large as {at}" if row["structure"] == "narrow" else f"{row['structure']} at {at}"


def _costs(row: Mapping[str, Any]) -> str:
    points = None if row["loss"] is None else f"{100 * abs(row['loss']):.1f}"
    than = "less" if points is not None and row["loss"] > 0 else "more"
    loss = "" if points is None else " (as dense)" if points == "0.0" else f" ({points} points {than} than dense)"
    return (
        f"{100 * row['accuracy']:.1f}%{loss} in {row['time']:.2f} of the time and {row['file_ratio']:.2f} of the file"
    )
