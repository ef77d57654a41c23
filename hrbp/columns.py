"""Text in columns: the one printer of tables."""

from __future__ import annotations


def columns(lines: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Text in columns as wide as they need; those in `left` start at the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, lines))
