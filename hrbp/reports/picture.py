"""Figures. matplotlib is loaded when the first one is drawn."""

from __future__ import annotations

import importlib.util
import os
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
