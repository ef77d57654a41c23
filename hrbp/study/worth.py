"""The figure and the page of several studies together: are sparse networks worth it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..columns import counted
from ..methods.registry import METHODS
from ..reports.worth_picture import Arm, draw_worth
from .study_table import rows
from .worth_table import is_sparse, shown_name, where

FIGURE = "worth.png"


def draw(out: Path, studies: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the figure of studies into a folder; returns its path.

    Args:
        out: the folder.
        studies: contents of their results.json.

    Raises:
        ValueError: no matplotlib, or no training is finished.
    """
    drawn = {
        _title(results): [_arm(row) for row in rows(results) if row["accuracy"] is not None] for results in studies
    }
    draw_worth(out / FIGURE, drawn, studies[0]["machine"])
    return out / FIGURE


def _title(results: Mapping[str, Any]) -> str:
    done = {run["seed"] for run in results["runs"]}
    return f"{where(results)}, {counted(len(done), 'seed')}"


def _arm(row: Mapping[str, Any]) -> Arm:
    name = row["structure"]
    _, *words = name.split()
    way = "from dense" if name.endswith("from dense") else "from scratch"
    if any(word in METHODS for word in words):
        way = "masks move"
    elif way == "from scratch" and "groups=8" in words:
        way = "t=8"
    return Arm(
        shown_name(name), name.split()[0], way, row["asked"] if is_sparse(row) else 0.0,
        _triple(row, "accuracy", "low", "high"),
        row["parameters"], _triple(row, "step_seconds", "step_low", "step_high") if row["step_seconds"] else None,
        None if row["gain"] is None else _triple(row, "gain", "gain_low", "gain_high"),
    )  # fmt: skip


def _triple(row: Mapping[str, Any], value: str, low: str, high: str) -> tuple[float, float, float]:
    """A value with its interval; of one seed a point."""
    middle = row[value]
    return middle, middle if row[low] is None else row[low], middle if row[high] is None else row[high]
