"""The figure of SR-STE's lambda: how far masks wander over a training, beside the accuracy."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .picture import check_plot, save_figure

Curves = Mapping[tuple[str, float], Mapping[float, Sequence[tuple[Sequence[int], Sequence[float]]]]]


def draw_sad(
    path: str | os.PathLike[str], title: str, every: int, curves: Curves, rows: Sequence[Mapping[str, Any]]
) -> None:
    """For each structure and sparsity two panels: SAD over steps, a line a lambda; accuracy of each lambda.

    A line is the mean of the seeds, the band around it reaches from the least to the largest of them. Accuracies have
    the interval of their row; the dense network is a line across.

    Args:
        path: ends in .png, .svg or .pdf; written whole or not at all.
        title: of the figure.
        every: steps between two masks.
        curves, rows: as sr_ste_table makes them.

    Raises:
        ValueError: no matplotlib, another ending, or no training that is finished.
    """
    check_plot(path)
    if not curves:
        raise ValueError("draw_sad(): no training whose masks follow its weights is finished; there is nothing to draw")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12, 0.7 + 4.1 * len(curves)), dpi=110, layout="constrained")
    axes = figure.subplots(len(curves), 2, squeeze=False, width_ratios=(1.5, 1))
    figure.suptitle(title)
    for (over_time, right), ((structure, asked), lines) in zip(axes, curves.items(), strict=True):
        for decay in sorted(lines):
            _line(over_time, lines[decay], _colour(decay, list(lines)), f"lambda {decay:g}")
        over_time.set_title(f"{structure} at {100 * asked:g}%", loc="left", fontsize=11, fontweight="bold")
        over_time.set(xlabel="step", ylabel=f"SAD of masks {every} steps apart, of all weights")
        over_time.set_ylim(bottom=0)
        over_time.legend(frameon=False, fontsize=9)
        mine = [
            row for row in rows
            if row["decay"] is not None and row["accuracy"] is not None
            and (row["kind"], row["asked"]) == (structure, asked)
        ]  # fmt: skip
        _accuracies(right, mine, list(lines))
        for row in rows:
            if row["structure"] == "dense" and row["accuracy"] is not None:
                right.axhline(100 * row["accuracy"], color="0.4", linewidth=1, linestyle="--", label="dense")
                right.legend(frameon=False, fontsize=9)
        for axis in (over_time, right):
            axis.grid(alpha=0.25)
        over_time.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
    save_figure(figure, path)


def _line(axis: Any, seeds: Sequence[tuple[Sequence[int], Sequence[float]]], colour: Any, label: str) -> None:
    steps = min((mine for mine, _ in seeds), key=len)
    columns = list(zip(*(shares[: len(steps)] for _, shares in seeds), strict=True))
    axis.plot(steps, [statistics.mean(column) for column in columns], color=colour, linewidth=1.6, label=label)
    lows, highs = [min(column) for column in columns], [max(column) for column in columns]
    axis.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _accuracies(axis: Any, rows: Sequence[Mapping[str, Any]], decays: Sequence[float]) -> None:
    places = sorted(decays)
    for row in rows:
        x, y = places.index(row["decay"]), row["accuracy"]
        low, high = (y if row[key] is None else row[key] for key in ("low", "high"))
        axis.errorbar(
            [x], [100 * y], [[100 * (y - low)], [100 * (high - y)]], color=_colour(row["decay"], decays), marker="o",
            capsize=4,
        )  # fmt: skip
    axis.set_xticks(range(len(places)), [f"{decay:g}" for decay in places])
    axis.set_xlim(-0.6, len(places) - 0.4)
    axis.set(xlabel="lambda", ylabel="test accuracy, 95% interval over seeds")


def _colour(decay: float, decays: Sequence[float]) -> tuple[float, float, float]:
    """Grey is 0, red below, from light to dark blue above."""
    if decay == 0:
        return 0.25, 0.25, 0.25
    same = sorted((d for d in decays if d * decay > 0), key=abs)
    depth = (same.index(decay) + 1) / len(same)
    light, dark = ((0.98, 0.65, 0.5), (0.75, 0.1, 0.1)) if decay < 0 else ((0.55, 0.8, 0.95), (0.05, 0.2, 0.55))
    red, green, blue = (a + (b - a) * depth for a, b in zip(light, dark, strict=True))
    return red, green, blue
