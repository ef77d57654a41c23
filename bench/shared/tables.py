"""How numbers and tables are printed: cells, the aligned table of a terminal, the table of a Markdown page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bench.shared.rows import Row, Times
from hrbp.columns import columns

WIDTH = 132
NONE = "n/a"


def number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    """A cell; "n/a" where there is no number."""
    return NONE if value is None else f"{value * scale:{form}}"


def milliseconds(value: float | None) -> str:
    """Four digits or so."""
    if value is None:
        return NONE
    digits = next((d for limit, d in ((1, 4), (10, 3), (100, 2), (1000, 1)) if value < limit), 0)
    return f"{value:.{digits}f}"


def percentiles(times: Times) -> list[str]:
    """The three cells of a time."""
    return [milliseconds(t) for t in (times.p20, times.p50, times.p80)]


def table(head: Sequence[str], rows: Sequence[tuple[Row, Sequence[str], Sequence[str]]], left: int) -> list[str]:
    """The lines of a table.

    Args:
        head: titles of all columns.
        rows: each with its first `left` cells, which say what it is, and the cells of its numbers; a row without times
            has its status and reason in their place.
        left: how many columns start at the left.
    """
    body = [[*names, *(cells if row.times else [""] * (len(head) - left))] for row, names, cells in rows]
    head_line, *lines = columns([list(head), *body], tuple(range(left))).splitlines()
    named = columns([[*head[:left]], *([*names] for _, names, _ in rows)], tuple(range(left))).splitlines()[1:]
    out = [head_line]
    for (row, _, _), line, names in zip(rows, lines, named, strict=True):
        out += [line] if row.times else words(names, row)
    return out


def words(names: str, row: Row) -> list[str]:
    """A row without numbers: what happened and why."""
    text = f"{names} {row.status}: {' '.join(row.reason.split())}"
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * (len(names) + 1))


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table of a Markdown page, and an empty line."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)] + [""]
