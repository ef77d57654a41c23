"""Figures. matplotlib is loaded when the first one is drawn."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import whole_file
from ..structures.grouping import Grouping
from ..structures.groups import selection_of
from ..structures.selection import top
from .dgrad import dgrad_fill
from .score import Score

# A colour a group, neighbours far apart; they are used again from the ninth group on.
COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (0, 158, 172), (188, 143, 0),
           (214, 87, 166))  # fmt: skip
SINGLE = (60, 60, 60)  # weights without a group
PIXELS = 2400, 640  # most of a panel, across and down: a larger matrix is averaged
FORMATS = (".png", ".svg", ".pdf")
MARKERS, LINES = "osD^vPX*", ("-", "--", ":")


def check_plot(path: str | os.PathLike[str]) -> None:
    """ValueError unless a figure can be drawn and has a file name that says in which format."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a picture needs matplotlib, which is not installed: pip install 'blocksparse-conv[plot]'")
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"a picture is written to {path}; it needs a name that ends in {', '.join(FORMATS)}")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all; the ending of its name says in which format."""
    with whole_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower())


# ---------------------------------------------------------------- masks


def draw_grouping(
    path: str | os.PathLike[str], grouping: Grouping, score: Tensor, result: Score, name: str = "layer"
) -> None:
    """One layer's mask as three matrices: before, after regrouping, and as the input gradient sees it.

    1. The highest scores, as many as the groups keep: W [K, R*S*C], columns tap-major.
    2. The groups: the same matrix, filters in the order of their groups.
    3. The groups in W' [C, R*S*K], kernels rotated by 180 degrees and transposed: what multiplies im2col(dy). Columns
       are tap-major, filters in the order of their groups.

    A colour is a group, grey are single weights; thick lines part taps, thin ones groups.

    Args:
        path: ends in .png, .svg or .pdf; written whole or not at all.
        grouping: of the layer.
        score: [K, C, R, S].
        result: what the groups keep of it, for the titles.
        name: of the layer.

    Raises:
        ValueError: no matplotlib, or another ending.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    k, c, r, s = grouping.shape
    order, mask = grouping.row_order.cpu(), grouping.mask().cpu()
    single = top(score.detach().cpu().reshape(1, -1), int(mask.sum())).view(mask.shape)
    member = torch.empty(k, dtype=torch.int64)
    member[order] = torch.arange(k) // grouping.rows
    group = torch.where(mask, member.view(k, 1, 1, 1), -1)  # of every kept weight
    turned = group.flip(2, 3)[order].permute(1, 2, 3, 0)

    figure = Figure(figsize=(15, 10.5), dpi=160, layout="constrained")
    axes = figure.subplots(3, 1)
    channels, taps = grouping.channels.shape[1], grouping.taps.shape[1]
    figure.suptitle(
        f"{name}: {k} filters x {c} channels x {r}x{s}, {grouping.groups} groups of {grouping.rows} filters with "
        f"{channels} channels and {taps} of {r * s} taps: {100 * grouping.density:.1f}% kept",
        fontsize=14,
    )
    share = f"{100 * result.of_unstructured:.1f}% of that"
    efficacy = "" if result.efficacy is None else f", {100 * result.efficacy:.0f}% of the way from random groups to it"
    best = result.unstructured / result.total if result.total else 1.0
    titles = (
        f"before: the highest scores, filters in their own order; they keep {100 * best:.1f}% of the score",
        f"after: filters in the order of their groups; {share}{efficacy}",
        "the same weights in the input gradient, kernels rotated and transposed: groups fill "
        f"{100 * dgrad_fill(selection_of(grouping)):.0f}% of their rows x columns",
    )
    matrices = _matrix(torch.where(single, -2, -1)), _matrix(group[order]), turned.reshape(c, -1)
    for axis, title, matrix, width in zip(axes, titles, matrices, (c, c, k), strict=True):
        _draw(axis, matrix, title)
        axis.vlines(range(width, r * s * width, width), 0, len(matrix), color="black", linewidth=1.5)
    borders = range(0, k + 1, grouping.rows)
    axes[1].hlines(borders, 0, r * s * c, color="black", linewidth=0.7)
    axes[2].vlines([t * k + at for t in range(r * s) for at in borders], 0, c, color="0.4", linewidth=0.4)
    _label_taps(axes[0], (r, s), c, False)
    _label_taps(axes[1], (r, s), c, False)
    _label_taps(axes[2], (r, s), k, True)
    for axis, down, across in zip(
        axes, ("filters", "filters, by group", "input channels"), ("channels", "channels", "filters, by group"),
        strict=True,
    ):  # fmt: skip
        axis.set_ylabel(down)
        axis.set_xlabel(across if r * s == 1 else f"kernel offsets (taps), {across} within each", labelpad=1)
    save_figure(figure, path)


def _matrix(cells: Tensor) -> Tensor:
    """[K, C, R, S] as K x (R*S*C), columns tap-major."""
    return cells.permute(0, 2, 3, 1).reshape(len(cells), -1)


def _draw(axis: Any, matrix: Tensor, title: str) -> None:
    """Weights as cells in the colour of their group, on white; -2 has no group, -1 is no weight."""
    palette = np.array([SINGLE, (255, 255, 255), *COLOURS], dtype=np.float32) / 255
    numbers = matrix.numpy()
    colour = palette[np.where(numbers < 0, numbers + 2, numbers % len(COLOURS) + 2)]
    for dim, most in ((0, PIXELS[1]), (1, PIXELS[0])):
        colour = _averaged(colour, dim, most)
    high, wide = matrix.shape
    axis.imshow(colour, aspect="auto", interpolation="nearest", extent=(0, wide, high, 0))
    axis.set_title(title, loc="left", fontsize=11)


def _averaged(colour: np.ndarray, dim: int, most: int) -> np.ndarray:
    """At most so many cells along an axis, each the mean of equally many of the old ones (the last one of the rest)."""
    step = -(-colour.shape[dim] // most)
    starts = np.arange(0, colour.shape[dim], step)
    sizes = np.diff(np.append(starts, colour.shape[dim])).astype(np.float32)
    return np.add.reduceat(colour, starts, axis=dim) / np.expand_dims(sizes, [d for d in range(3) if d != dim])


def _label_taps(axis: Any, kernel: tuple[int, int], width: int, rotated: bool) -> None:
    """(r, s) of the weight under each tap's columns; in W' they come in opposite order."""
    r, s = kernel
    if r * s == 1:
        return
    names = [f"({i}, {j})" for i in range(r) for j in range(s)]
    axis.set_xticks([(t + 0.5) * width for t in range(r * s)], names[::-1] if rotated else names)
    axis.tick_params(axis="x", length=0)


# ---------------------------------------------------------------- studies


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
    title += f"{settings['training']['epochs']} epochs, "
    figure, (by_sparsity, by_time), found = _study_figure(path, rows, "draw_study()", title, (13, 5.5), 120)
    sparsities = sorted({row["asked"] for row in found} - {0.0})
    structures = _by_structure(row for row in found if row["structure"] != "dense")
    apart = 0.012 * (len(sparsities) + 1)  # of a step on the axis: error bars beside one another
    for i, (structure, mine) in enumerate(structures.items()):
        look = _look(i, structure)
        shift = apart * (i - (len(structures) - 1) / 2)
        by_sparsity.errorbar([sparsities.index(row["asked"]) + shift for row in mine], *_accuracy(mine), **look)
        timed = [row["step"] for row in mine]
        if None not in timed:
            by_time.errorbar(timed, *_accuracy(mine), **look)
            for row, x, y in zip(mine, timed, _accuracy(mine)[0], strict=True):
                _note(by_time, f"{100 * row['asked']:g}%", (x, y), look["color"])
    for row in (row for row in found if row["structure"] == "dense"):
        (y,), (spread,) = _accuracy([row])
        by_sparsity.axhline(y, color="black", linewidth=1, label="dense")
        by_sparsity.axhspan(y - spread, y + spread, color="black", alpha=0.1, linewidth=0)
        by_time.errorbar([1.0], [y], [spread], color="black", marker="o", capsize=3)
        _note(by_time, "dense", (1.0, y), "black")
    by_sparsity.set_xticks(range(len(sparsities)), [f"{100 * s:g}%" for s in sparsities])
    by_sparsity.set_xlim(-0.5, max(1, len(sparsities)) - 0.5)
    by_sparsity.set_title("what is kept")
    by_time.margins(x=0.08)
    _relative(by_time, f"training step, relative to dense ({machine}); left of 1 is faster", "at what time")
    _finish(figure, by_sparsity, path)


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
        f"{settings['model']} x {settings['width']:g} on {settings['data']}: pruned step by step, each line from "
        f"{100 * first:g}% to its name at {100 * last:g}%; "
    )
    figure, axes, found = _study_figure(path, rows, "draw_regularity()", title, (18, 7), 110, panels=3)
    by_sparsity, by_file, by_time = axes
    for i, (structure, mine) in enumerate(_by_structure(found).items()):
        look = _look(i, structure)
        if structure == "dense":
            look |= {"color": "black", "marker": "o", "linestyle": "-"}
        for axis, key in ((by_sparsity, "asked"), (by_file, "file_ratio"), (by_time, "time")):
            places = [row[key] for row in mine]
            if None not in places:
                axis.errorbar(places, *_accuracy(mine), **look)
                _note(axis, structure, (places[-1], _accuracy(mine)[0][-1]), look["color"])
    by_sparsity.set_xticks(settings["sparsities"], [f"{100 * s:g}%" for s in settings["sparsities"]])
    by_sparsity.set_title("at what sparsity")
    _relative(by_file, "file, relative to dense; left of 1 is smaller", "at what size")
    timed = f"forward + backward of {settings['model']} x {settings['timed_width']:g}, relative to dense"
    _relative(by_time, timed, f"at what time ({machine})")
    for axis in axes:
        axis.margins(x=0.12)
    _finish(figure, by_sparsity, path)


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


def _note(axis: Any, text: str, place: tuple[float, float], color: Any) -> None:
    axis.annotate(text, place, (5, 4), textcoords="offset points", fontsize=8, color=color)


def _relative(axis: Any, label: str, title: str) -> None:
    """An axis of ratios to dense, which is at 1."""
    axis.axvline(1.0, color="0.6", linewidth=1, linestyle=":")
    axis.set(xlabel=label, title=title)


def _look(i: int, structure: str) -> dict[str, Any]:
    """Colour, marker and line of the i-th structure."""
    return {
        "color": [c / 255 for c in COLOURS[i % len(COLOURS)]], "marker": MARKERS[i % len(MARKERS)], "label": structure,
        "capsize": 3, "linestyle": LINES[i // len(COLOURS) % len(LINES)],
    }  # fmt: skip


def _finish(figure: Any, axis: Any, path: str | os.PathLike[str]) -> None:
    """The legend of this axis, below all of them; and the file."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False)
    save_figure(figure, path)
