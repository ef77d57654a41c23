"""What methods share whose masks get sparser until they have arrived at a sparsity: gradual pruning, SUBP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .base import Method
from .options import WHO, Every, Until


@dataclass(frozen=True)
class Arriving(Until, Every, Method):
    """Updates come every `every` steps; the last one is the first at or after `until`, and arrives."""

    def arrives(self, total_steps: int) -> int:
        """The step of the last update."""
        return _arrival(self.every, self.until * total_steps)

    def due(self, step: int, total_steps: int, overdue: bool) -> bool:
        return step % self.every == 0 and step <= self.arrives(total_steps)

    def check_steps(self, total_steps: int) -> None:
        if (arrives := self.arrives(total_steps)) > total_steps:
            raise ValueError(
                f"{WHO}: {self.name!r} reaches its sparsity at step {arrives}, the first multiple of every ="
                f" {self.every} from until = {self.until} on; it needs one of the {total_steps} steps: lower until or"
                f" every (every = {self.default_every(total_steps, self.until)} will do)"
            )

    @classmethod
    def default_every(cls, total_steps: int, until: Any = None, most: int = 100) -> int:
        every, end = super().default_every(total_steps, until, most), cls._part(until) * total_steps
        while every > 1 and _arrival(every, end) > total_steps:
            every -= 1
        return every


def _arrival(every: int, end: float) -> int:
    """The first update at or after step `end`."""
    return every * max(1, math.ceil(end / every - 1e-9))
