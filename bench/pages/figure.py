"""The figures of a device: speed-ups of its layers, and the roofline."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from bench.layers.networks import Layer
from bench.layers.plot import Bar, bars_of_file, plot
from bench.layers.rows import KINDS, TOTAL, least_bytes
from bench.pages.devices import Device, Json, time_of
from bench.pages.tables import series_of
from hrbp.reports.picture import save_figure

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "tf32": 4}


@dataclass(frozen=True)
class Point:
    """One kernel on the roofline: FLOP per byte that must move, useful FLOP per second."""

    label: str
    intensity: float
    flops_per_second: float


def points(device: Device) -> list[Point]:
    """Every kind of every row that was timed."""
    found = []
    for run in device.runs:
        item = SIZES[run["options"]["dtype"]]
        for row in run["rows"]:
            if row["kind"] in KINDS and time_of(row) and row["flops_per_second"]:
                nbytes = bytes_of(row, item)
                found.append(Point(series_of(row), row["useful_flops"] / nbytes, row["flops_per_second"]))
    return found


def bytes_of(row: Json, item: int) -> int:
    k, c, r, s = row["shape"]
    batch, _, h, w = row["x_shape"]
    padding = row["padding"][0], row["padding"][1]
    layer = Layer(row["net"], row["layer"], k, c, (r, s), row["stride"], padding, (h, w))
    pattern = SimpleNamespace(nnzb=row["nnzb"], blocksize=row["blocksize"], shape=row["shape"])
    return least_bytes(layer, batch, row["kind"], item, cast(Any, pattern))


def draw(device: Device, path: Path) -> bool:
    """The figure; False where there is nothing to draw, or nothing to draw with."""
    found = points(device)
    if not found:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), dpi=150)
    for label in dict.fromkeys(point.label for point in found):
        mine = [point for point in found if point.label == label]
        axis.scatter([p.intensity for p in mine], [p.flops_per_second for p in mine], s=12, label=label)
    ceilings = {
        (run["options"]["dtype"], *run["ceilings"]["at_start"].values()): run["ceilings"]["at_start"]
        for run in device.runs
    }
    left, right = min(p.intensity for p in found) / 2, max(p.intensity for p in found) * 4
    for dtype in dict.fromkeys(key[0] for key in ceilings):
        copy = max(c["copy_bytes"] for key, c in ceilings.items() if key[0] == dtype)
        matmul = max(c["matmul_flops"] for key, c in ceilings.items() if key[0] == dtype)
        xs = sorted({left, min(max(left, matmul / copy), right), right})
        axis.plot(xs, [min(matmul, copy * x) for x in xs], linewidth=0.8, color="black")
        axis.annotate(dtype, (right, min(matmul, copy * right)), fontsize="x-small", ha="right", va="bottom")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("useful FLOP per byte that must move")
    axis.set_ylabel("useful FLOP/s")
    axis.set_title(f"{device.name}: layers under the ceilings measured in the same run", fontsize="small")
    axis.legend(fontsize="x-small")
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)
    assert all(math.isfinite(point.intensity) for point in found)
    return True


def draw_speed(device: Device, path: Path) -> bool:
    """Speed-ups of all three products together, a bar a pattern; False where there is nothing to draw, or with."""
    found: dict[str, list[Bar]] = {}  # numbers and batch -> bars
    for run in device.runs:
        rows = [row for row in run["rows"] if row["kind"] == TOTAL and row["speedup"]["dense"]]
        if rows:
            how = f"{run['options']['dtype']}, batch {run['options']['batch']}"
            found.setdefault(how, []).extend(bars_of_file(rows))
    if not found or importlib.util.find_spec("matplotlib") is None:
        return False
    if len(found) == 1:
        ((how, bars),) = found.items()
        plot(path, bars, f"{device.name}, {how}")
    else:
        named = [replace(bar, series=f"{bar.series}, {how}") for how, bars in found.items() for bar in bars]
        plot(path, named, device.name)
    return True
