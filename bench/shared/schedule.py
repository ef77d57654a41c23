"""How the time of a run is shared out among its parts, and the running line that says how long the rest takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from hrbp.progress import Progress, duration


class Schedule:
    """Which part is next, when it must be done, and about how long the rest takes (a running line on stderr).

    Args:
        work: how much each part is, in any unit.
        end: when all should be done (time.perf_counter()).
        fixed: repetitions do not depend on time; the pace so far says how long the rest takes.
    """

    def __init__(self, work: Sequence[float], end: float, fixed: bool) -> None:
        self._work, self._end, self._fixed = list(work), end, fixed
        self._begin = time.perf_counter()
        self._progress = Progress(quiet=False, stream=sys.stderr)

    def deadline(self, at: int) -> float:
        """The share of part `at` in the time that is left, as a time."""
        now = time.perf_counter()
        return now + max(0.0, self._end - now) * self._work[at] / sum(self._work[at:])

    def seconds_left(self, at: int) -> float | None:
        """None: not known yet."""
        now, done = time.perf_counter(), sum(self._work[:at])
        at_this_pace = (now - self._begin) / done * sum(self._work[at:]) if at else None
        if self._fixed:
            return at_this_pace
        return max(self._end - now, at_this_pace or 0.0)

    def start(self, at: int, name: str) -> None:
        left = self.seconds_left(at)
        about = "" if left is None else f", about {duration(left)} left"
        self._progress.show(f"[{at + 1}/{len(self._work)}] {name}{about}")

    def clear(self) -> None:
        """Take the running line away."""
        self._progress.clear()
