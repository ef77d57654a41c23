"""Layers as blocksparse predicts them on a GPU that need not be here: rows, sums, tables. Nothing is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import blocksparse as bs
from bench.layers.networks import CHOSEN, Layer
from bench.layers.patterns import Blocksize, Structure, build
from bench.layers.rows import KINDS, TOTAL, PatternRow
from bench.shared.rows import OK, REFUSED, ratio
from bench.shared.tables import NONE, number
from blocksparse.kernels import gpu_cost, gpus
from blocksparse.layout import CHANNELS_LAST
from blocksparse.plan import plan_on
from hrbp.columns import columns


@dataclass(kw_only=True)
class PredictedRow(PatternRow):
    """As predicted; it has no times."""

    gpu: str
    predicted: bool = True
    tile: str | None = None
    seconds: float | None = None
    bound: str | None = None
    dense_seconds: float | None = None  # of PyTorch's product of a dense weight
    roofline_seconds: float | None = None

    @property
    def speedup(self) -> float | None:
        return ratio(self.dense_seconds, self.seconds)

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"speedup": self.speedup}


@dataclass(frozen=True)
class Question:
    """What is predicted of a layer."""

    gpu: str
    batch: int
    dtype: torch.dtype
    precision: str
    structure: Structure
    memory_format: str = CHANNELS_LAST
    seed: int = 0


def predict(
    layer: Layer, block: Blocksize, sparsity: float, backend: str | None, about: Question
) -> list[PredictedRow]:
    """A row for each product and one for their total; REFUSED ones where there is no such pattern or backend."""
    first = PredictedRow(
        net=layer.net, layer=layer.full_name, geometry=str(layer), count=layer.count, shape=layer.shape,
        x_shape=layer.x_shape(about.batch), stride=layer.stride,
        structure="equal groups" if about.structure.name == "hrbp" or block.bk is None else "random blocks",
        blocksize_asked=str(block), sparsity_asked=sparsity, backend_asked=backend or "auto", gpu=about.gpu, kind=TOTAL,
    )  # fmt: skip
    try:
        generator = torch.Generator().manual_seed(about.seed)
        pattern = build(layer.shape, block, about.structure, sparsity, generator)
        g = bs.ConvGeometry.of(layer.x_shape(about.batch), layer.shape, layer.stride, layer.padding)
        plan = plan_on(
            about.gpu, g, (pattern.nnzb, *pattern.blocksize), about.dtype, precision=about.precision, backend=backend,
            memory_format=about.memory_format,
        )  # fmt: skip
    except ValueError as error:
        first.fail(REFUSED, str(error))
        return [first]
    gpu, weights = gpus.named(about.gpu, "predict()"), pattern.nnzb * math.prod(pattern.blocksize)
    roofline = gpu_cost.roofline(g, weights, 8 * pattern.nnzb, about.dtype, about.precision, gpu)
    rows = []
    for kind in KINDS:
        product = plan.products[kind]
        # Dense in channels_last, whatever the blocks run in.
        dense = gpu_cost.dense(kind, g, about.dtype, about.precision, True, gpu)
        row = PredictedRow(**{**vars(first), "kind": kind})
        row.blocksize, row.nnzb, row.density = pattern.blocksize, pattern.nnzb, pattern.density
        row.backend, row.tile = product.backend, None if product.tile is None else str(product.tile)
        row.roofline_seconds = roofline
        if product.estimate is not None and product.dense is not None:
            row.seconds, row.bound, row.dense_seconds = (
                product.estimate.seconds, product.estimate.bound, dense.seconds
            )  # fmt: skip
        rows.append(row)
    return [*rows, _summed(rows)]


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if not found or None in found else math.fsum(v for v in found if v is not None)


def _summed(rows: Sequence[PredictedRow]) -> PredictedRow:
    """The three products of a layer together."""
    row = PredictedRow(**{**vars(rows[0]), "kind": TOTAL, "tile": None, "bound": None})
    row.backend = "+".join(dict.fromkeys(r.backend for r in rows if r.backend))
    row.seconds, row.dense_seconds = _sum(r.seconds for r in rows), _sum(r.dense_seconds for r in rows)
    row.roofline_seconds = _sum(r.roofline_seconds for r in rows)
    return row


# ---------------------------------------------------------------- how they are shown

HEAD = [
    "blocks",
    "kept%",
    "kind",
    "backend",
    "predicted us",
    "bound by",
    "dense us",
    "roofline us",
    "x dense",
    "allowed",
]
LEFT = (0, 2, 3, 5)
LEAST = (7, 5, 5, 13, 12, 13, 8, 11, 7, 7)


def head() -> str:
    return columns([HEAD], LEFT, LEAST)


def layer_lines(rows: Sequence[PredictedRow]) -> list[str]:
    """A layer: what it is, then its rows."""
    first = rows[0]
    often = "once" if first.count == 1 else f"{first.count} times"
    return ["", f"{first.layer}: {first.geometry}" + ("" if first.net == CHOSEN else f", {often} in {first.net}"), *(
        line(row) for row in rows
    )]  # fmt: skip


def line(row: PredictedRow) -> str:
    names = [row.blocksize_asked, number(row.density, ".1f", 100), row.kind, row.backend or row.backend_asked]
    if row.status != OK:
        return f"{columns([names], LEFT, LEAST[:4])}  {row.status}: {row.reason}"
    own, dense, roofline = (number(t, ".1f", 1e6) for t in (row.seconds, row.dense_seconds, row.roofline_seconds))
    allowed = number(ratio(row.dense_seconds, row.roofline_seconds))
    return columns([[*names, own, row.bound or "", dense, roofline, number(row.speedup), allowed]], LEFT, LEAST)


@dataclass(frozen=True)
class PredictedTotal:
    """Sums of the three products over layers, each as often as it occurs."""

    layers: str
    blocksize_asked: str
    sparsity_asked: float
    backend_asked: str
    gpu: str
    shapes: int
    seconds: float | None
    dense_seconds: float | None
    roofline_seconds: float | None
    least: float | None  # the smallest speed-up of a product
    predicted: bool = True


def totals(rows: Iterable[PredictedRow]) -> list[PredictedTotal]:
    """Of the 3x3 convolutions of stride 1 and of all, for each pattern and backend; without what was refused."""
    cases: dict[tuple[str, float, str], list[PredictedRow]] = {}
    for row in rows:
        if row.status == OK:
            cases.setdefault((row.blocksize_asked, row.sparsity_asked, row.backend_asked), []).append(row)
    found = []
    for which in ("3x3 of stride 1", "all"):
        for (block, sparsity, backend), of_case in cases.items():
            chosen = [row for row in of_case if which == "all" or (row.shape[2:] == (3, 3) and row.stride == 1)]
            whole = [row for row in chosen if row.kind == TOTAL]
            if not whole:
                continue
            each = [row.speedup for row in chosen if row.kind != TOTAL]
            sums = [
                _sum(None if t is None else row.count * t for row, t in zip(whole, times, strict=True))
                for times in (
                    [row.seconds for row in whole],
                    [row.dense_seconds for row in whole],
                    [row.roofline_seconds for row in whole],
                )
            ]
            least = None if None in each else min(s for s in each if s is not None)
            gpu = chosen[0].gpu
            found.append(
                PredictedTotal(which, block, sparsity, backend, gpu, len(whole), sums[0], sums[1], sums[2], least)
            )
    return found


def total_lines(sums: Sequence[PredictedTotal]) -> list[str]:
    """A line for each sum, in milliseconds."""
    head_cells = ["layers", "shapes", "blocks", "sparsity", "backend", "predicted ms", "dense ms", "roofline ms"]
    lines = [[*head_cells, "x dense", "allowed", "least product"]]
    for t in sums:
        cells = [number(v, ".2f", 1e3) for v in (t.seconds, t.dense_seconds, t.roofline_seconds)]
        cells += [number(ratio(t.dense_seconds, v)) for v in (t.seconds, t.roofline_seconds)]
        names = [t.layers, str(t.shapes), t.blocksize_asked, f"{100 * t.sparsity_asked:g}%", t.backend_asked]
        lines.append([*names, *cells, NONE if t.least is None else f"{t.least:.2f}"])
    return columns(lines, (0, 2, 4)).splitlines()
