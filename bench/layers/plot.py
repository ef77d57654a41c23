"""The figure of speed-ups: bars over the layers of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.layers.rows import TOTAL, LayerRow
from hrbp.reports.picture import COLOURS, save_figure

TITLES = {
    "fprop": "forward", "dgrad": "input gradient", "wgrad": "weight gradient",
    TOTAL: "forward and both gradients together",
}  # fmt: skip
NAMES = {"group": "groups of filters that share channels", "1x1": "single weights"}


@dataclass(frozen=True)
class Bar:
    """Dense time / own time of one product of a layer, None where it was not timed; series: pattern and backend."""

    layer: str
    kind: str
    series: str
    speedup: float | None


def bars(rows: Sequence[LayerRow]) -> list[Bar]:
    """Of the rows of a benchmark that has run."""
    named = {id(row): series(row.blocksize_asked, row.sparsity_asked, row.backend_asked) for row in rows}
    return [Bar(row.layer, row.kind, named[id(row)], row.speedup("dense")) for row in rows]


def bars_of_file(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Of the rows of a result file."""
    named = {id(row): series(row["blocksize_asked"], row["sparsity_asked"], row["backend_asked"]) for row in rows}
    return [Bar(row["layer"], row["kind"], named[id(row)], row["speedup"]["dense"]) for row in rows]


def series(blocksize: str, sparsity: float, backend: str) -> str:
    """The name of a pattern on a backend."""
    named = NAMES.get(blocksize, f"blocks of {blocksize}")
    return f"{named}, {100 * sparsity:g}% sparse" + ("" if backend == "auto" else f", {backend}")


def plot(path: Path, found: Sequence[Bar], title: str) -> None:
    """Bars of speed-up over dense: a group a layer, a panel a product, a colour a pattern and backend.

    Args:
        path: ends in .png, .svg or .pdf.
        found: of several layers.
        title: machine, type of numbers, batch.
    """
    from matplotlib.figure import Figure

    kinds, layers, names = (
        list(dict.fromkeys(getattr(bar, part) for bar in found)) for part in ("kind", "layer", "series")
    )
    nets = {layer.partition(".")[0] for layer in layers}
    short = [layer.partition(".")[2] or layer for layer in layers] if len(nets) == 1 else layers
    width = 0.8 / len(names)
    size = max(7.0, 0.45 * len(layers) + 1.5), 1.9 * len(kinds) + 2.2
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axis, kind in zip(axes, kinds, strict=True):
        for at, name in enumerate(names):
            speed = {bar.layer: bar.speedup for bar in found if bar.kind == kind and bar.series == name}
            shift = (at - (len(names) - 1) / 2) * width
            heights = [speed.get(layer) or 0.0 for layer in layers]
            colour = [c / 255 for c in COLOURS[at % len(COLOURS)]]
            axis.bar([i + shift for i in range(len(layers))], heights, width, label=name, color=colour)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_title(TITLES.get(kind, kind), fontsize=10, loc="left")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.set_ylim(bottom=0)
        axis.set_xlim(-0.6, len(layers) - 0.4)
    figure.supylabel("speed-up over the best dense convolution", fontsize=9)
    axes[-1].set_xticks(range(len(layers)), short, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    of = f"layers of {next(iter(nets))}, " if len(nets) == 1 else ""
    figure.suptitle(f"{of}{title}; the line at 1 is dense", fontsize=11)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=min(len(texts), 3), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
