"""The log of a training: JSON lines while it runs, a figure at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import naming, whole_file
from ..reports.picture import check_plot, save_figure


def start_log(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write these entries, one JSON object a line, replacing the file."""
    with whole_file(path) as file:
        for entry in entries:
            file.write((json.dumps(entry) + "\n").encode())


def configuration(path: Path) -> dict[str, Any] | None:
    """The configuration at the head of a log; None where there is none to read."""
    try:
        with path.open() as file:
            entry = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) and entry.get("kind") == "config" else None


def add_to_log(path: Path, entry: dict[str, Any]) -> None:
    """Append one entry."""
    with naming(path), path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def checked_history(entries: Any) -> list[dict[str, Any]]:
    """Entries of a log, checked for what `draw_training` and the result of a training need; else ValueError."""
    needs = {
        "epoch": ("step", "loss", "accuracy", "test_loss", "test_accuracy", "sparsity", "seconds"),
        "update": ("step", "changed", "sad", "drift"),
    }
    found: list[Any] = entries if isinstance(entries, list) else [entries]
    for entry in found:
        names = needs.get(str(entry.get("kind"))) if isinstance(entry, dict) else None
        if names is None or not all(isinstance(entry.get(name), int | float) for name in names):
            raise ValueError(f"{str(entry)[:60]} is no entry of a log")
    try:
        json.dumps(found)
    except TypeError as error:
        raise ValueError(f"an entry of the log has more than plain values: {error}") from error
    return found


def draw_training(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Accuracy, loss, mask changes and, where masks changed, how many of their cells did, as panels over the steps.

    Args:
        path: ends in .png, .svg or .pdf.
        history: entries of the log.

    Raises:
        ValueError: no matplotlib.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    epochs, updates = ([e for e in history if e["kind"] == kind] for kind in ("epoch", "update"))
    panels = 4 if updates else 3
    figure = Figure(figsize=(13 / 3 * panels, 4), layout="constrained")
    accuracy, loss, masks, *cells = figure.subplots(1, panels)
    steps = [e["step"] for e in epochs]
    for axis, name in ((accuracy, "accuracy"), (loss, "loss")):
        scale = 100 if name == "accuracy" else 1
        axis.plot(steps, [scale * e[name] for e in epochs], label="train")
        axis.plot(steps, [scale * e[f"test_{name}"] for e in epochs], label="test")
        axis.set_title("accuracy, %" if name == "accuracy" else name)
        axis.legend()
    masks.plot([e["step"] for e in updates], [100 * e["changed"] for e in updates], marker=".", label="new weights")
    masks.plot(steps, [100 * e["sparsity"] for e in epochs], color="0.5", linestyle="--", label="sparsity")
    masks.set_title("masks, %")
    masks.set_ylim(0, 103)
    masks.legend()
    for axis in cells:
        axis.plot([e["step"] for e in updates], [e["sad"] for e in updates], marker=".", label="since the last")
        axis.plot([e["step"] for e in updates], [e["drift"] for e in updates], label="since the start")
        axis.set_title("cells of the masks that differ (SAD)")
        axis.set_ylim(bottom=0)
        axis.legend()
    for axis in (accuracy, loss, masks, *cells):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    save_figure(figure, path)
