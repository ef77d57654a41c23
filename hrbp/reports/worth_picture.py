"""The figure of the study "worth": accuracy against measured step time and parameters, and what is above the rival."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .picture import check_plot, save_figure
from .study_picture import COLOURS

MARKERS = {"from scratch": "o", "t=8": "v", "masks move": "^", "from dense": "s"}
SIZE = 6.5  # of a marker
APART = 1.035  # between arms with equally many parameters, a factor
ROOM = 0.14  # above and below all points, of their range: longer intervals are cut


@dataclass(frozen=True)
class Arm:
    """A point of the figure: a line of a table.

    name        of the arm, without its sparsity
    structure   decides the colour; "dense" and "narrow" are the curve
    way         a key of MARKERS
    sparsity    that was asked for; 0 of the dense network
    accuracy, seconds, gain  (value, low, high); seconds of a training step, gain above the narrow network of equal
                             time; None: not known
    """

    name: str
    structure: str
    way: str
    sparsity: float
    accuracy: tuple[float, float, float]
    parameters: int
    seconds: tuple[float, float, float] | None
    gain: tuple[float, float, float] | None


def draw_worth(path: str | os.PathLike[str], studies: Mapping[str, Sequence[Arm]], machine: str) -> None:
    """A row of three panels for each study: accuracy against step time, against parameters, and points above the rival.

    Args:
        path: ends in .png, .svg or .pdf; written whole or not at all.
        studies: title -> its arms.
        machine: that times are measured on.

    Raises:
        ValueError: no matplotlib, another ending, or no arm.
    """
    check_plot(path)
    studies = {title: arms for title, arms in studies.items() if arms}
    if not studies:
        raise ValueError("draw_worth(): no training is finished; there is nothing to draw")
    from matplotlib.figure import Figure

    arms = [arm for mine in studies.values() for arm in mine]
    structures = dict.fromkeys(arm.structure for arm in arms if not _on_curve(arm))
    colours = {structure: COLOURS[i % len(COLOURS)] for i, structure in enumerate(structures)}
    sparsities = sorted({arm.sparsity for arm in arms if not _on_curve(arm)})
    names = max(len({arm.name for arm in mine if arm.gain}) for mine in studies.values())
    height = max(4.6, 1.6 + 0.27 * names)
    figure = Figure(figsize=(16, 0.9 + height * len(studies)), dpi=110, layout="constrained")
    axes = figure.subplots(len(studies), 3, squeeze=False, width_ratios=(1, 1, 1.15))
    for (by_time, by_size, forest), (title, mine) in zip(axes, studies.items(), strict=True):
        _scatter(by_time, mine, colours, sparsities, "seconds")
        _scatter(by_size, mine, colours, sparsities, "parameters")
        by_time.set_xlabel(f"training step, ms ({machine}); left is faster")
        by_size.set_xlabel("parameters; arms of one sparsity lie beside one another")
        by_time.set_ylabel("test accuracy")
        by_time.set_title(title, loc="left", fontsize=12, fontweight="bold")
        _forest(forest, mine, colours, sparsities)
    _legend(figure, arms, colours, sparsities)
    save_figure(figure, path)


def _on_curve(arm: Arm) -> bool:
    return arm.structure in ("dense", "narrow")


def _places(arms: Sequence[Arm], axis: str) -> list[tuple[tuple[float, float, float], Arm]]:
    """((x, low, high), arm) from left to right; sparse arms with as many parameters lie beside one another."""
    if axis == "seconds":
        timed = [(arm.seconds, arm) for arm in arms if arm.seconds is not None]
        return sorted((((1e3 * x, 1e3 * low, 1e3 * high), arm) for (x, low, high), arm in timed), key=lambda p: p[0])
    found = [((float(arm.parameters),) * 3, arm) for arm in arms if _on_curve(arm)]
    for sparsity in {arm.sparsity for arm in arms}:
        alike = sorted((a for a in arms if a.sparsity == sparsity and not _on_curve(a)), key=lambda a: a.name)
        for i, arm in enumerate(alike):
            x = arm.parameters * APART ** (i - (len(alike) - 1) / 2)
            found.append(((x, x, x), arm))
    return sorted(found, key=lambda pair: pair[0])


def _scatter(
    axis: Any, arms: Sequence[Arm], colours: Mapping[str, str], sparsities: Sequence[float], what: str
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    placed = _places(arms, what)
    curve = [(at[0], arm) for at, arm in placed if _on_curve(arm)]
    xs = [at for at, _ in curve]
    axis.plot(xs, [100 * arm.accuracy[0] for _, arm in curve], color="black", linewidth=1.6, zorder=2)
    axis.fill_between(
        xs, [100 * arm.accuracy[1] for _, arm in curve], [100 * arm.accuracy[2] for _, arm in curve],
        color="black", alpha=0.10, linewidth=0, zorder=1,
    )  # fmt: skip
    for (x, left, right), arm in placed:
        look = _look(arm, colours, sparsities)
        middle, low, high = (100 * value for value in arm.accuracy)
        beside = None if what == "parameters" else [[x - left], [right - x]]
        axis.errorbar(
            [x], [middle], [[middle - low], [high - middle]], beside, ecolor=look["color"], elinewidth=0.7,
            alpha=0.45, fmt="none", zorder=3,
        )  # fmt: skip
        axis.plot([x], [middle], linestyle="none", zorder=5 if _on_curve(arm) else 4, **look)
    for end, arm in curve:
        if arm.structure == "dense":
            axis.annotate("dense", (end, 100 * arm.accuracy[0]), (-8, 6), textcoords="offset points", ha="right")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if what == "seconds" else (1, 2, 5)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if what == "seconds" else f"{x / 1e3:g}k"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
    axis.grid(alpha=0.25)
    axis.margins(0.06)
    heights = [100 * arm.accuracy[0] for arm in arms]
    room = max(1.0, ROOM * (max(heights) - min(heights)))
    axis.set_ylim(max(0, min(heights) - room), min(100 + 0.1 * room, max(heights) + room))


def _forest(axis: Any, arms: Sequence[Arm], colours: Mapping[str, str], sparsities: Sequence[float]) -> None:
    """A line an arm: points above the rival, with the interval; pale where that holds 0."""
    compared = [arm for arm in arms if arm.gain is not None]
    axis.axvline(0, color="black", linewidth=1.6)
    axis.set_title("above the narrow dense network of equal step time", fontsize=11)
    if not compared:
        axis.text(0.5, 0.5, "not known yet", transform=axis.transAxes, ha="center")
        return
    best = {name: max(a.gain[0] for a in compared if a.name == name and a.gain) for name in {a.name for a in compared}}
    order = sorted(best, key=lambda name: best[name])
    for arm in compared:
        assert arm.gain is not None
        y = order.index(arm.name) + 0.17 * (len(sparsities) - 1 - 2 * sparsities.index(arm.sparsity))
        middle, low, high = (100 * value for value in arm.gain)
        shown = low > 0 or high < 0
        axis.plot([low, high], [y, y], color=colours[arm.structure], linewidth=1.8, alpha=1 if shown else 0.4)
        axis.plot([middle], [y], linestyle="none", **_look(arm, colours, sparsities))
    axis.set_yticks(range(len(order)), order, fontsize=9.5)
    kinds = {arm.name: arm.structure for arm in compared}
    for tick, name in zip(axis.get_yticklabels(), order, strict=True):
        tick.set_color(colours[kinds[name]])
    axis.set_ylim(-0.7, len(order) - 0.3)
    axis.set_xlabel("points of accuracy, 95% interval of paired seeds; pale: it holds 0")
    axis.grid(alpha=0.25)


def _look(arm: Arm, colours: Mapping[str, str], sparsities: Sequence[float]) -> dict[str, Any]:
    if _on_curve(arm):
        return {"color": "black", "marker": "D", "markersize": 5.5}
    filled = arm.sparsity == sparsities[0]
    colour = colours[arm.structure]
    return {
        "color": colour, "marker": MARKERS[arm.way], "markersize": SIZE, "markeredgewidth": 1.4,
        "markerfacecolor": colour if filled else "white",
    }  # fmt: skip


def _legend(figure: Any, arms: Sequence[Arm], colours: Mapping[str, str], sparsities: Sequence[float]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color="black", marker="D", markersize=5.5, label="dense and narrow dense (curve)")]
    handles += [Line2D([], [], color=c, linewidth=0, marker="o", label=name) for name, c in colours.items()]
    ways = dict.fromkeys(arm.way for arm in arms if not _on_curve(arm))
    handles += [Line2D([], [], color="0.4", linewidth=0, marker=MARKERS[way], label=way) for way in ways]
    for i, sparsity in enumerate(sparsities if len(sparsities) > 1 else ()):
        face = "0.4" if i == 0 else "white"
        handles.append(
            Line2D([], [], color="0.4", linewidth=0, marker="o", markerfacecolor=face, label=f"{100 * sparsity:g}%")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False)
