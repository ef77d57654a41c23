"""Masks that stay."""

from __future__ import annotations

from dataclasses import dataclass

from ..structures.base import Selection
from .base import Method, Moment


@dataclass(frozen=True)
class Static(Method):
    """no change"""

    name = "static"
    place = 0
    changes = False

    def due(self, step: int, total_steps: int, overdue: bool) -> bool:
        return False

    def selections(self, now: Moment) -> dict[str, Selection]:
        return {}
