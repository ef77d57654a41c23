"""Measures one part after the other, and keeps the rows of all that was measured, whatever ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from bench.shared.results import Writer
from bench.shared.rows import ABSENT, OK, Row
from bench.shared.schedule import Schedule

R = TypeVar("R", bound=Row)


def measure_parts(
    parts: Sequence[tuple[str, Callable[[float, list[R]], None]]], end: float, writer: Writer,
    lines: Callable[[list[R]], list[str]],
) -> tuple[list[R], bool]:  # fmt: skip
    """(rows, finished): measures, prints and writes part after part; an interrupt keeps what there is.

    Args:
        parts: (name, measure); measure(deadline, rows) adds its rows as they are made.
        end: when all should be done (time.perf_counter()).
        lines: the table of one part.
    """
    rows: list[R] = []
    finished = False
    schedule = Schedule([1.0] * len(parts), end, fixed=False)
    try:
        for at, (name, measure) in enumerate(parts):
            schedule.start(at, name)
            new: list[R] = []
            try:
                measure(schedule.deadline(at), new)
            finally:  # interrupted: what was measured so far counts
                for row in new:
                    if row.status == OK and row.times is None:
                        row.fail(ABSENT, "interrupted before it was timed")
                rows += new
                schedule.clear()
                if new:
                    print("\n".join(lines(new)), flush=True)
                writer.write(rows, complete=False)  # a run that is killed keeps what it has
        finished = True
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
    writer.write(rows, finished)
    return rows, finished
