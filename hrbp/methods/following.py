"""What methods share whose masks follow a dense weight at every step: the straight-through ones."""

from __future__ import annotations

from dataclasses import dataclass

from ..structures.base import Selection, Structure
from .base import Method, Moment
from .options import Every


@dataclass(frozen=True)
class Following(Every, Method):
    """The mask is at any time that of the largest |weight|; an update tells how far the masks have come, to the end."""

    dense_weights = True
    follows_weight = True

    @classmethod
    def refuses(cls, rule: Structure) -> str | None:
        if rule.can("mask"):
            return None
        return (
            f"method {cls.name!r} makes masks anew at every step; it needs n:m or grains (unstructured, kernel, ...),"
            f" not {rule.name!r}"
        )

    def due(self, step: int, total_steps: int, overdue: bool) -> bool:
        return step % self.every == 0

    def selections(self, now: Moment) -> dict[str, Selection]:
        return {}
