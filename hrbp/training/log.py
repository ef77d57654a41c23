"""The log of a training: JSON lines while it runs, a figure at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..columns import counted
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


def draw_training(path: Path, history: Sequence[dict[str, Any]], name: str = "") -> None:
    """Accuracy and loss over the steps; for sparse networks sparsity, and where masks changed by how much.

    Args:
        path: ends in .png, .svg or .pdf.
        history: entries of the log.
        name: of the training, for the title.

    Raises:
        ValueError: no matplotlib.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    epochs, updates = ([e for e in history if e["kind"] == kind] for kind in ("epoch", "update"))
    sparse = any(e["sparsity"] for e in epochs)
    panels = 2 + (sparse or bool(updates)) + bool(updates)
    figure = Figure(figsize=(13 / 3 * panels, 4), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels))
    accuracy, loss, *others = axes
    steps = [e["step"] for e in epochs]
    end = f"test accuracy {epochs[-1]['test_accuracy']:.2%} after {counted(len(epochs), 'epoch')}" if epochs else ""
    figure.suptitle(": ".join(part for part in (name, end) if part))
    for axis, key in ((accuracy, "accuracy"), (loss, "loss")):
        scale = 100 if key == "accuracy" else 1
        marker = "." if len(steps) < 30 else ""
        axis.plot(steps, [scale * e[key] for e in epochs], label="train", marker=marker)
        axis.plot(steps, [scale * e[f"test_{key}"] for e in epochs], label="test", marker=marker)
        axis.set_title("accuracy, %" if key == "accuracy" else "loss (cross entropy)")
        axis.legend()
    if others:
        masks = others[0]
        masks.plot(steps, [100 * e["sparsity"] for e in epochs], color="0.4", label="sparsity")
        if updates:
            changed = [100 * e["changed"] for e in updates]
            masks.plot([e["step"] for e in updates], changed, marker=".", label="new weights of an update")
        masks.set_title("sparsity, %, and mask updates, %" if updates else "sparsity, %")
        masks.set_ylim(0, 103)
        masks.legend()
    if updates:
        cells = others[1]
        cells.plot([e["step"] for e in updates], [e["sad"] for e in updates], marker=".", label="since the last")
        cells.plot([e["step"] for e in updates], [e["drift"] for e in updates], label="since the start")
        cells.set_title("cells of the masks that differ (SAD)")
        cells.set_ylim(bottom=0)
        cells.legend()
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    save_figure(figure, path)
