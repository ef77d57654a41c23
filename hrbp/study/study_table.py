"""The results of a study: rows, a table, and sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..columns import counted
from ..methods.registry import METHODS
from .page import Parts
from .rival import Point, against, curve, rival_at
from .spread import Interval, deviation, doubt, interval, mean, paired, points
from .variants import BASELINES, PRESETS, PUBLISHED, Published, Variant

BOUNDS = "step_bounds"  # key of results.json: line -> the interval of its step time


def line_name(variant: Variant, sparsity: float) -> str:
    return variant.name if variant.structure == "dense" else f"{variant.name} {100 * sparsity:g}%"


def update_name(variant: Variant, sparsity: float) -> str:
    """Of a step that changes masks."""
    return f"{line_name(variant, sparsity)}, an update"


def step_times(results: Mapping[str, Any], variant: Variant, asked: float) -> tuple[float, float, float] | None:
    """(seconds, low, high) of a step of a training on average, with its interval; None: not measured.

    Steps that change masks count as often as they come. Of a network that is pruned halfway half of the steps are
    dense.
    """
    steps, bounds = results["steps"], results.get(BOUNDS, {})

    def times(name: str) -> tuple[float, ...] | None:
        return (steps[name], *bounds.get(name, (steps[name],) * 2)) if name in steps else None

    after = times(line_name(variant.layout, asked))
    if variant.start == "dense":
        other, share = times("dense"), 0.5
    else:
        other, share = times(update_name(variant, asked)), _updating(results, variant)
    if after is None or other is None:
        return after  # type: ignore[return-value]
    seconds, low, high = ((1 - share) * a + share * b for a, b in zip(after, other, strict=True))
    return seconds, low, high


def _updating(results: Mapping[str, Any], variant: Variant) -> float:
    """The share of the steps that change masks."""
    options = METHODS[variant.method].options()
    if not variant.updates:
        return 0.0
    given = {**results["settings"]["training"]["evolve_options"], **variant.evolve}
    until = given.get("until", options["until"].default if "until" in options else 1.0)
    return min(1.0, until / given.get("every", results["settings"]["every"]))


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table, from the content of results.json; None where a value is not known.

    line, structure, asked        variant and sparsity, as asked for
    accuracy, deviation           mean and sample deviation over seeds, as shares
    seeds, diverged               trainings that ended; those whose loss became infinite or NaN
    kept                          accuracy / that of the dense network
    parameters                    weights that are not masked away
    sparsity, model_sparsity      of the layers made sparse; of the whole network, relative to the dense one
    memory                        bytes of weights, index, gradients and optimizer state
    storage                       bytes of convolutions and linear layers in a file: values and their BSR index
    step_seconds, step            of training, measured; relative to the dense network
    step_low, step_high           seconds: the interval of that time, relative to dense
    low, high                     interval of the accuracy
    rival                         accuracy of the narrow dense network of equal step time: see rival.py
    gain, gain_low, gain_high     accuracy above that, paired by seed, and its interval
    of_equal, of_equal_low, ..    accuracy above the narrow network of as many parameters, likewise
    of_single, of_single_low, ..  accuracy above unstructured of this sparsity, likewise
    published, published_speedup  accuracy in the HRBP paper, as a share; training there, faster than dense

    Intervals are 95% ones; see spread.py.
    """
    settings = results["settings"]
    published = _published(settings)
    steps, found = results["steps"], []
    lines: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(results["runs"], key=lambda run: run["asked"]):
        lines.setdefault(run["line"], []).append(run)
    order = {Variant(**v).name: i for i, v in enumerate(settings["variants"])}
    dense = mean([r["accuracy"] for r in lines.get("dense", []) if r["accuracy"] is not None])
    scores = {
        line: {r["seed"]: r["accuracy"] for r in runs if r["accuracy"] is not None} for line, runs in lines.items()
    }
    narrow = curve(
        Point(times[0], scores[line])
        for line, runs in lines.items()
        if runs[0]["structure"] in BASELINES and (times := step_times(results, _variant(runs[0]), runs[0]["asked"]))
    )
    for line, runs in lines.items():
        variant = _variant(runs[0])
        asked = runs[0]["asked"]
        ended = [run for run in runs if run["accuracy"] is not None]
        right = [run["accuracy"] for run in ended]
        accuracy, parameters = mean(right), round(statistics.mean(run["parameters"] for run in runs))
        memory = mean([run["memory"] for run in ended])
        times = step_times(results, variant, asked)
        seconds, low, high = (None, None, None) if times is None else times
        compared: dict[str, Interval | None] = dict.fromkeys(("gain", "of_equal", "of_single"))
        spread, rival = interval(right), None
        if variant.structure not in BASELINES:
            if times is not None:
                compared["gain"] = against(narrow, scores[line], times)
                rival = mean(list((rival_at(narrow, times[0]) or {}).values()))
            for key, other in (("of_equal", Variant("narrow")), ("of_single", Variant("unstructured"))):
                if (theirs := line_name(other, asked)) != line:
                    compared[key] = paired(scores[line], scores.get(theirs, {}))
        paper, speedup = published.get(variant.name, {}).get(asked, (None, None))
        found.append({
            "line": line, "structure": variant.name, "asked": asked, "accuracy": accuracy,
            "deviation": deviation(right), "seeds": len(ended), "diverged": len(runs) - len(ended),
            "kept": accuracy / dense if accuracy is not None and dense else None,
            "parameters": parameters, "sparsity": statistics.mean(run["sparsity"] for run in runs),
            "model_sparsity": 1 - parameters / settings["dense_parameters"],
            "memory": None if memory is None else round(memory),
            "storage": round(statistics.mean(run["storage"] for run in runs)),
            "step_seconds": seconds, "step": seconds / steps["dense"] if seconds else None,
            "step_low": low, "step_high": high,
            "low": spread and spread.low, "high": spread and spread.high, "rival": rival,
            **{name: value for key, one in compared.items() for name, value in _flat(key, one).items()},
            "published": None if paper is None else paper / 100, "published_speedup": speedup,
        })  # fmt: skip
    return sorted(found, key=lambda row: (row["asked"], order[row["structure"]]))


def _variant(run: Mapping[str, Any]) -> Variant:
    return Variant(**{key: run[key] for key in Variant.__dataclass_fields__ if key in run})


def _flat(key: str, difference: Interval | None) -> dict[str, float | None]:
    low, high = (None, None) if difference is None else (difference.low, difference.high)
    return {key: None if difference is None else difference.mean, f"{key}_low": low, f"{key}_high": high}


def difference(row: Mapping[str, Any], key: str) -> Interval | None:
    """A difference of a row, "gain", "of_equal" or "of_single", as an interval."""
    if row[key] is None:
        return None
    return Interval(row[key], row[f"{key}_low"], row[f"{key}_high"], row["seeds"])


def where(results: Mapping[str, Any]) -> str:
    """Network, images and length of the trainings, in words."""
    settings = results["settings"]
    return (
        f"{settings['model']} x {settings['width']:g} on {settings['data']},"
        f" {counted(settings['training']['epochs'], 'epoch')}, {counted(len(settings['seeds']), 'seed')}"
    )


def shown_accuracy(row: Mapping[str, Any]) -> str:
    """Of a row, in per cent, with its interval."""
    if row["accuracy"] is None:
        return "diverged"
    spread = "" if row["low"] is None else f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return f"{100 * row['accuracy']:.1f}{spread}"


def _published(settings: Mapping[str, Any]) -> Published:
    """The paper's numbers for this study; none if its training settings differ."""
    paper = PRESETS["paper"]
    same = {name: list(v) if isinstance(v, tuple) else v for name, v in paper.training.items()}
    model = settings["model"]
    if settings["width"] != paper.width.get(model, 1.0) or settings["batch_size"] != paper.batch_size:
        return {}
    if any(settings["training"][name] != value for name, value in same.items()):
        return {}
    return PUBLISHED.get((model, settings["data"]), {})


def table(results: Mapping[str, Any]) -> str:
    """The table, notes on its columns, and a sentence for each sparsity."""
    if (found := parts(results)) is None:
        return "no training is finished yet"
    return found.text()


def parts(results: Mapping[str, Any]) -> Parts | None:
    """What is shown of a study; None where no training is finished."""
    found = rows(results)
    if not found:
        return None
    papers, seeds = any(row["published"] is not None for row in found), len(results["settings"]["seeds"])
    head = ["", "sparsity %", "accuracy %", "seeds", "of dense %", "parameters", "whole net %", "training MB", "step",
            "stored kB"]  # fmt: skip
    rivals = any(row["gain"] is not None for row in found)
    lines = []

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:{form}}"

    for row in found:
        spread = "" if row["deviation"] is None else f" +- {100 * row['deviation']:4.2f}"
        line = [
            row["structure"], _shown_sparsity(row),
            "diverged" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}",
            f"{row['seeds']}", cell(row["kept"], ".1f", 100), f"{row['parameters']:,}",
            f"{100 * row['model_sparsity']:.2f}", cell(row["memory"], ".3f", 1e-6),
            "-" if row["step"] is None else f"{row['step']:.2f}x", f"{row['storage'] / 1e3:.1f}",
        ]  # fmt: skip
        if rivals:
            line.append(points(difference(row, "gain")))
        if papers:
            faster = f" ({row['published_speedup']}x)" if row["published_speedup"] else ""
            line.append(cell(row["published"], ".2f", 100) + faster)
        lines.append(line)
    settings = results["settings"]
    title = (
        f"{settings['model']} x {settings['width']:g}, {settings['data']},"
        f" {counted(settings['training']['epochs'], 'epoch')}, {counted(seeds, 'seed')}; {len(results['runs'])} of"
        f" {settings['trainings']} trainings are finished"
    )
    head += ["against narrow of equal time"] * rivals + ["paper %"] * papers
    return Parts(title, head, lines, _notes(results, found, papers), sentences(found))


def _shown_sparsity(row: Mapping[str, Any]) -> str:
    if row["asked"] == 0:
        return "0"
    return f"as {100 * row['asked']:g}" if row["structure"] == "narrow" else f"{100 * row['sparsity']:.2f}"


def _notes(results: Mapping[str, Any], found: Sequence[Mapping[str, Any]], papers: bool) -> list[str]:
    notes = []
    if (dense := results["steps"].get("dense")) is not None:
        notes.append(
            f"step: time of a training step on {results['machine']} relative to dense ({1e3 * dense:.3g} ms for"
            f" {results['settings']['batch_size']} images), measured side by side; below 1 is faster"
        )
        slow = dict.fromkeys(row["structure"] for row in found if row["step"] and row["step"] > 1.05)
        if slow:
            notes.append(f"slower than dense here: {', '.join(slow)}")
    notes.append("training MB: weights, index, gradients and optimizer state; stored kB: layers in a file, with index")
    if masked := dict.fromkeys(run["structure"] for run in results["runs"] if run.get("masked")):
        notes.append(f"{', '.join(masked)}: a dense weight under a mask, with a dense layer's memory and time")
    methods = {Variant(**v).name: v["method"] for v in results["settings"]["variants"]}
    if trained := [
        name for name in dict.fromkeys(row["structure"] for row in found) if METHODS[methods[name]].dense_weights
    ]:
        notes.append(
            f"{', '.join(trained)}: trains a dense weight, with a dense layer's memory; stored is what computes"
        )
    if any(row["structure"].startswith("narrow") for row in found):
        notes.append("narrow: a dense network of as many parameters as the sparse ones; 2x: of twice as many")
    if any(row["gain"] is not None for row in found):
        notes.append(
            "against narrow of equal time: points above the dense network whose width makes its step take as long,"
            " interpolated for each seed; in brackets the 95% interval, at either end of the interval of the time"
        )
    if any(row["structure"].endswith("from dense") for row in found):
        notes.append("from dense: half of the training dense, then pruned by magnitude; its step is the mean of both")
    notes += [f"left out: {line}, as {reason}" for line, reason in results.get("left_out", {}).items()]
    if papers:
        notes.append("paper: HRBP (CPAL 2024), Table 1; in brackets, training on an A100 against dense")
    return notes


def sentences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each sparsity: the accuracy that each structure keeps, best first."""
    ended = [row for row in found if row["accuracy"] is not None]
    dense = next((row for row in ended if row["structure"] == "dense"), None)
    said = []
    for asked in sorted({row["asked"] for row in ended} - {0.0}):
        here = sorted((row for row in ended if row["asked"] == asked), key=lambda row: -row["accuracy"])
        if dense is None:
            start = f"At {100 * asked:g}% sparsity the accuracy is "
            parts = [f"{100 * row['accuracy']:.1f}% with {row['structure']}" for row in here]
        else:
            start = f"At {100 * asked:g}% sparsity, of the dense network's {100 * dense['accuracy']:.1f}% accuracy, "
            parts = [
                f"{row['structure']} keeps {100 * row['kept']:.1f}% ({100 * row['accuracy']:.1f}%)" for row in here
            ]
            parts[1:] = [part.replace(" keeps", "", 1) for part in parts[1:]]
        listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        said.append(f"{start}{listed}; {doubt(here)}.")
    return said
