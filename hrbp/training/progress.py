"""What a training tells: a running line, a log of JSON lines, and a figure at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ..files import naming, whole_file
from ..reports.picture import check_plot

TERMINAL_SECONDS, PIPE_SECONDS = 0.2, 60.0  # between two states of the running line


class Progress:
    """Lines for a person: finished ones stay; the running one is replaced on a terminal, rarely printed to a pipe."""

    def __init__(self, quiet: bool, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.quiet, self.terminal = quiet, self.stream.isatty()
        self.shown, self.width = time.monotonic(), 0

    def due(self) -> bool:
        """Whether a new running line is worth its making."""
        every = TERMINAL_SECONDS if self.terminal else PIPE_SECONDS
        return not self.quiet and time.monotonic() - self.shown >= every

    def show(self, text: str) -> None:
        """The running line."""
        self.shown = time.monotonic()
        if self.terminal:
            print(f"\r{text:<{self.width}}", end="", file=self.stream, flush=True)
            self.width = len(text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            start = "\r" if self.terminal else ""
            print(f"{start}{text:<{self.width}}", file=self.stream, flush=True)
        self.width = 0


def duration(seconds: float) -> str:
    """As 1:02:03, 2:03 or 3 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def start_log(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write these entries, one JSON object a line, in place of whatever the file held."""
    with whole_file(path) as file:
        for entry in entries:
            file.write((json.dumps(entry) + "\n").encode())


def add_to_log(path: Path, entry: dict[str, Any]) -> None:
    """Append one entry."""
    with naming(path), path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def checked_history(entries: Any) -> list[dict[str, Any]]:
    """Entries of a log as `draw_training` and the end of a training read them; ValueError if they are none."""
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
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())
