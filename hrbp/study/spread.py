"""Mean and spread over the seeds of a study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.mean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Of a sample; None of one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def doubt(found: Sequence[Mapping[str, Any]]) -> str:
    """The least difference of accuracy that means something: twice its standard error, deviations pooled."""
    spread = [(row["seeds"], row["deviation"]) for row in found if row["deviation"] is not None]
    if not spread:
        return "with one seed, small differences say nothing"
    variance = sum((n - 1) * d**2 for n, d in spread) / sum(n - 1 for n, _ in spread)
    points = 200 * math.sqrt(2 * variance / min(row["seeds"] for row in found))
    return f"differences under {points:.1f} points are within the spread of the seeds"
