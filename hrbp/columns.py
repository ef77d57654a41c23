"""Text in columns, the one printer of tables; and counted things."""

from __future__ import annotations


def columns(lines: list[list[str]], left: tuple[int, ...] = (0,), least: tuple[int, ...] | None = None) -> str:
    """Text in columns as wide as they need.

    Args:
        lines: cells, equally many in each.
        left: which columns start at the left.
        least: minimal width of each column, for a table that is printed in parts.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = [max(pair) for pair in zip(widths, least or [0] * len(widths), strict=True)]

    def line(cells: list[str]) -> str:
        padded = (f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, lines))


def counted(number: int, thing: str, things: str | None = None) -> str:
    """As "1 epoch", "2 epochs"; things: where the plural has no s alone."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"
