"""The figures of studies: accuracy against sparsity, size and time, a look of its own for each structure."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..columns import counted
from .picture import check_plot, save_figure

# No two of them alike: twelve structures are told apart by colour and by marker.
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#009eac", "#bc8f00", "#d657a6", "#8c564b", "#5f6b7a",
           "#6b8e23", "#4b0082")  # fmt: skip
MARKERS, LINES = "osD^vPX*<>ph", ("-", "--", ":")
LARGE, SMALL = 9.0, 5.0  # markers of the lowest and of the highest sparsity
GAP = 0.036  # between two names beside a panel, as a share of its height


def draw_study(
    path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], machine: str
) -> None:
    """Accuracy against sparsity, and against measured step time, a colour each structure.

    Args:
        path: ends in .png, .svg or .pdf; written whole or not at all.
        rows: as study.rows makes them.
        settings, machine: of the study.

    Raises:
        ValueError: no matplotlib, another ending, or no training that is finished.
    """
    title = f"{settings['model']} x {settings['width']:g} on {settings['data']}, "
    title += f"{counted(settings['training']['epochs'], 'epoch')}, "
    figure, (by_sparsity, by_time), found = _study_figure(path, rows, "draw_study()", title, (13, 5.5), 120)
    sparsities = sorted({row["asked"] for row in found} - {0.0})
    structures = _by_structure(row for row in found if row["structure"] != "dense")
    apart = 0.012 * (len(sparsities) + 1)  # of a step on the axis: error bars beside one another
    for i, (structure, mine) in enumerate(structures.items()):
        look = _look(i, structure)
        shift = apart * (i - (len(structures) - 1) / 2)
        _line(by_sparsity, [sparsities.index(row["asked"]) + shift for row in mine], mine, look, sparsities)
        timed = [row["step"] for row in mine]
        if None not in timed:
            _line(by_time, timed, mine, look, sparsities)
    for row in (row for row in found if row["structure"] == "dense"):
        (y,), (spread,) = _accuracy([row])
        by_sparsity.axhline(y, color="black", linewidth=1, label="dense")
        by_sparsity.axhspan(y - spread, y + spread, color="black", alpha=0.1, linewidth=0)
        by_time.errorbar([1.0], [y], [spread], color="black", marker="o", capsize=3)
        by_time.annotate("dense", (1.0, y), (-6, 5), textcoords="offset points", fontsize=9, ha="right")
    by_sparsity.set_xticks(range(len(sparsities)), [f"{100 * s:g}%" for s in sparsities])
    by_sparsity.set_xlim(-0.5, max(1, len(sparsities)) - 0.5)
    by_sparsity.set_title("what is kept")
    by_time.margins(x=0.08)
    _relative(by_time, f"training step, relative to dense ({machine}); left of 1 is faster", "at what time")
    _finish(figure, by_sparsity, path, sparsities)


def draw_regularity(
    path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], machine: str
) -> None:
    """Accuracy against sparsity, against the size of the file and against measured time, a colour each structure.

    Args:
        path: ends in .png, .svg or .pdf; written whole or not at all.
        rows: as regularity.rows makes them.
        settings, machine: of the study.

    Raises:
        ValueError: no matplotlib, another ending, or no training that is finished.
    """
    first, last = settings["sparsities"][0], settings["sparsities"][-1]
    title = (
        f"{settings['model']} x {settings['width']:g} on {settings['data']}: pruned step by step, from "
        f"{100 * first:g}% to {100 * last:g}%; "
    )
    figure, axes, found = _study_figure(path, rows, "draw_regularity()", title, (18, 7), 110, panels=3)
    by_sparsity, by_file, by_time = axes
    names, number = [], 0
    for structure, mine in _by_structure(found).items():
        look = _look(number, structure)
        if structure == "dense":
            look |= {"color": "black", "marker": "o", "linestyle": "-"}
        else:
            number += 1
        names.append((_accuracy(mine)[0][-1], structure, look["color"]))
        for axis, key in ((by_sparsity, "asked"), (by_file, "file_ratio"), (by_time, "time")):
            if structure == "dense" and key != "asked":  # one point
                mine = mine[-1:]
            places = [row[key] for row in mine]
            if None not in places:
                _line(axis, places, mine, look, settings["sparsities"])
    by_sparsity.set_xticks(settings["sparsities"], [f"{100 * s:g}%" for s in settings["sparsities"]])
    by_sparsity.set_title("at what sparsity")
    _relative(by_file, "file, relative to dense; left of 1 is smaller", "at what size")
    timed = f"forward + backward of {settings['model']} x {settings['timed_width']:g}, relative to dense"
    _relative(by_time, timed, f"at what time ({machine})")
    for axis in axes:
        axis.margins(x=0.05)
    _name_lines(by_sparsity, names)
    _finish(figure, by_sparsity, path, settings["sparsities"])


def _study_figure(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    who: str,
    title: str,
    size: tuple[float, float],
    dpi: int,
    panels: int = 2,
) -> tuple[Any, Any, list[Mapping[str, Any]]]:
    """(figure, panels, rows with an accuracy): accuracy upwards in all panels, sparsity to the right in the first."""
    check_plot(path)
    found = [row for row in rows if row["accuracy"] is not None]
    if not found:
        raise ValueError(f"{who}: no training is finished; there is nothing to draw")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    seeds = max(row["seeds"] for row in found)
    figure.suptitle(title + (f"mean and deviation of {seeds} seeds" if seeds > 1 else "1 seed"))
    axes[0].set(xlabel="sparsity of the layers made sparse", ylabel="test accuracy")
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes, found


def _by_structure(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each line of a figure."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["structure"], []).append(row)
    return found


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """In percent, and its deviation."""
    return [100 * row["accuracy"] for row in rows], [100 * (row["deviation"] or 0) for row in rows]


def _line(
    axis: Any, places: Sequence[float], rows: Sequence[Mapping[str, Any]], look: Mapping[str, Any],
    sparsities: Sequence[float],
) -> None:  # fmt: skip
    """The line of a structure: the lower the sparsity, the larger its marker."""
    heights, spreads = _accuracy(rows)
    plain = {name: look[name] for name in ("color", "linestyle")}
    axis.errorbar(places, heights, spreads, elinewidth=0.8, capsize=2, linewidth=1.4, **plain)
    for x, y, row in zip(places, heights, rows, strict=True):
        size = _size(row["asked"], sparsities)
        axis.plot([x], [y], color=look["color"], marker=look["marker"], markersize=size, linestyle="none")
    axis.plot([], [], marker=look["marker"], label=look["label"], **plain)  # for the legend


def _size(sparsity: float, sparsities: Sequence[float]) -> float:
    """Of a marker."""
    at, steps = sorted(sparsities).index(sparsity) if sparsity in sparsities else 0, max(1, len(sparsities) - 1)
    return LARGE + (SMALL - LARGE) * at / steps


def _name_lines(axis: Any, names: Sequence[tuple[float, str, Any]]) -> None:
    """The names of lines to the right of a panel, each as near to its end as the others leave room."""
    low, high = axis.get_ylim()
    wanted = sorted(((y - low) / (high - low), y, name, colour) for y, name, colour in names)
    places = spread_out([place for place, *_ in wanted], GAP)
    end = axis.get_xlim()[1]
    for place, (_, y, name, colour) in zip(places, wanted, strict=True):
        axis.annotate(
            name, (end, y), (1.02, place), xycoords="data", textcoords="axes fraction", fontsize=9, color=colour,
            va="center", annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6},
        )  # fmt: skip


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Rising places in [0, 1], moved up or down until they are `gap` apart, or less where they are too many."""
    gap = min(gap, 1 / max(1, len(places)))
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else place)
    over = (found[-1] - 1.0) if found else 0.0
    if over > 0:
        found[-1] = 1.0
        for i in range(len(found) - 2, -1, -1):
            found[i] = min(found[i], found[i + 1] - gap)
    return found


def _relative(axis: Any, label: str, title: str) -> None:
    """An axis of ratios to dense, which is at 1."""
    axis.axvline(1.0, color="0.6", linewidth=1, linestyle=":")
    axis.set(xlabel=label, title=title)


def _look(i: int, structure: str) -> dict[str, Any]:
    """Colour, marker and line of the i-th structure."""
    return {
        "color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": structure,
        "linestyle": LINES[i // len(COLOURS) % len(LINES)],
    }  # fmt: skip


def _finish(figure: Any, axis: Any, path: str | os.PathLike[str], sparsities: Sequence[float]) -> None:
    """The legend of this axis, below all of them, with the size of the markers; and the file."""
    if len(sparsities) > 1:
        for sparsity in sorted(sparsities):
            size = _size(sparsity, sparsities)
            axis.plot([], [], "o", color="0.5", markersize=size, label=f"at {100 * sparsity:g}%")
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False)
    save_figure(figure, path)
