"""The figure of pruning one layer at a time: a panel a layer, a line a grain."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .picture import check_plot, save_figure
from .study_picture import COLOURS, MARKERS

ACROSS = 5  # panels


def draw_sensitivity(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Points of accuracy lost over the density of the layer, with intervals.

    Args:
        path: ends in .png, .svg or .pdf; written whole or not at all.
        rows: as sensitivity_table makes them.

    Raises:
        ValueError: no matplotlib, another ending, or no row.
    """
    check_plot(path)
    if not rows:
        raise ValueError("draw_sensitivity(): nothing is tested yet; there is nothing to draw")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    grains = list(dict.fromkeys(row["structure"] for row in rows))
    densities = sorted({1 - row["asked"] for row in rows})
    across = min(ACROSS, len(layers))
    down = math.ceil(len(layers) / across)
    figure = Figure(figsize=(2.7 * across, 0.9 + 2.5 * down), dpi=110, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    for axis, layer in zip(axes, layers, strict=False):
        for i, grain in enumerate(grains):
            mine = [row for row in rows if (row["layer"], row["structure"]) == (layer, grain)]
            heights = [100 * row["lost"] for row in mine]
            spread = [0 if row["low"] is None else 50 * (row["high"] - row["low"]) for row in mine]
            axis.errorbar(
                [1 - row["asked"] for row in mine], heights, spread, color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1.3, elinewidth=0.7, capsize=2, label=grain,
            )  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(layer, fontsize=9)
        axis.grid(alpha=0.25)
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    first = axes[0]
    first.set_xscale("log")
    first.xaxis.set_major_locator(FixedLocator(densities))
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    first.invert_xaxis()
    figure.supxlabel("density of the layer, the others whole", fontsize=10)
    figure.supylabel("points of accuracy lost", fontsize=10)
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 8), frameon=False)
    save_figure(figure, path)
