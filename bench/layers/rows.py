"""Results of layers: a row for each layer, pattern, backend and kind; and sums over a network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import blocksparse as bs
from bench.layers.networks import Layer
from bench.shared.rows import ERROR, FAIL, OK, Row, ratio

KINDS = ("fprop", "dgrad", "wgrad")
TOTAL = "total"
BASELINES = ("dense", "grouped", "torch_bsr", "narrow")


@dataclass(kw_only=True)
class PatternRow(Row):
    """One product of a layer on one pattern, or the three of them. Facts of a pattern that is refused: None."""

    net: str
    layer: str
    geometry: str
    count: int
    shape: tuple[int, int, int, int]
    x_shape: tuple[int, int, int, int]
    stride: int
    structure: str
    blocksize_asked: str
    sparsity_asked: float
    backend_asked: str
    kind: str
    blocksize: tuple[int, int] | None = None
    nnzb: int | None = None
    density: float | None = None
    backend: str | None = None


@dataclass(kw_only=True)
class LayerRow(PatternRow):
    """The library on one pattern of a layer, and what it is compared with."""

    padding: tuple[int, int]
    baselines: dict[str, Row] = field(default_factory=dict)
    plan: str | None = None
    useful_flops: int | None = None  # of this kind, on the stored blocks alone
    least_bytes: int | None = None  # that must move, see least_bytes()
    roofline_ms: float | None = None
    peak_ms: float | None = None
    predicted_ms: float | None = None  # on a GPU: what `explain` said before anything ran
    predicted_bound: str | None = None

    @property
    def prediction_error(self) -> float | None:
        """Predicted / measured - 1: below 0, it was slower than predicted."""
        share = ratio(self.predicted_ms, self.p50)
        return None if share is None else share - 1

    @property
    def flops_per_second(self) -> float | None:
        return None if self.p50 is None or self.useful_flops is None else 1e3 * self.useful_flops / self.p50

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.p50 is None or self.least_bytes is None else 1e3 * self.least_bytes / self.p50

    @property
    def roofline_share(self) -> float | None:
        return ratio(self.roofline_ms, self.p50)

    @property
    def peak_share(self) -> float | None:
        return ratio(self.peak_ms, self.p50)

    def speedup(self, name: str) -> float | None:
        """p50 of a baseline / p50 of the sparse layer; None unless both passed their check and ran."""
        baseline = self.baselines.get(name)
        return None if baseline is None else ratio(baseline.p50, self.p50)

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {
            "flops_per_second": self.flops_per_second,
            "bytes_per_second": self.bytes_per_second,
            "percent_of_roofline": None if self.roofline_share is None else 100 * self.roofline_share,
            "percent_of_peak": None if self.peak_share is None else 100 * self.peak_share,
            "speedup": {name: self.speedup(name) for name in BASELINES},
            "percent_prediction_error": None if self.prediction_error is None else 100 * self.prediction_error,
        }


def least_bytes(layer: Layer, batch: int, kind: str, item: int, pattern: bs.BSRPattern) -> int:
    """x, y, values, indptr and indices, each once; of x the pixels that a tap reads, but dgrad writes all of dx."""
    pixels = math.prod(layer.size)
    if kind != "dgrad":
        axes = zip(layer.size, layer.output_size, layer.kernel, strict=True)
        pixels = math.prod(min(h, (p - 1) * min(r, layer.stride) + r) for h, p, r in axes)
    x, y = batch * layer.c * pixels, math.prod(layer.y_shape(batch))
    values = pattern.nnzb * math.prod(pattern.blocksize)
    index = pattern.shape[0] // pattern.blocksize[0] + 1 + pattern.nnzb
    return item * (x + y + values) + 4 * index


def spread(rows: Iterable[LayerRow]) -> float:
    """How unsteady the machine was under these rows: the median, over all that was timed, of p80 / p20."""
    timed = [row for row in rows if row.kind != TOTAL]
    times = [r.times for row in timed for r in (row, *row.baselines.values()) if r.times is not None]
    return statistics.median(t.p80 / t.p20 for t in times) if times else 1.0


# ---------------------------------------------------------------- sums over a network


@dataclass(frozen=True)
class Total:
    """Sums over the layers of a network, each as often as it occurs, of one pattern, backend and kind.

    `layers` of `layers_asked` shapes passed and were timed; the sums are over those. A baseline's sum is None unless
    it was timed in each of them.
    """

    net: str
    structure: str
    blocksize_asked: str
    sparsity_asked: float
    backend_asked: str
    backends: tuple[str, ...]
    kind: str
    layers: int
    layers_asked: int
    failed: int
    ms: float | None
    roofline_ms: float | None
    peak_ms: float | None
    useful_flops: float | None
    density: float | None  # of the weights, over all convolutions
    baseline_ms: dict[str, float | None]

    def speedup(self, name: str) -> float | None:
        return ratio(self.baseline_ms[name], self.ms)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": {name: self.speedup(name) for name in BASELINES}}


def totals(rows: Iterable[LayerRow]) -> list[Total]:
    """One Total per (network, pattern, backend, kind), in the order of the rows."""
    groups: dict[tuple[Any, ...], list[LayerRow]] = {}
    for row in rows:
        key = (row.net, row.structure, row.blocksize_asked, row.sparsity_asked, row.backend_asked, row.kind)
        groups.setdefault(key, []).append(row)
    return [_total(group) for group in groups.values()]


def _total(rows: list[LayerRow]) -> Total:
    ran = [row for row in rows if row.status == OK]

    def weighted(numbers: list[float | None]) -> float | None:
        known = [n for n in numbers if n is not None]
        if not ran or len(known) < len(ran):
            return None
        return sum(row.count * n for row, n in zip(ran, known, strict=True))

    weights = sum(row.count * math.prod(row.shape) for row in ran)
    kept = weighted([None if row.density is None else row.density * math.prod(row.shape) for row in ran])
    first = rows[0]
    return Total(
        net=first.net,
        structure=first.structure,
        blocksize_asked=first.blocksize_asked,
        sparsity_asked=first.sparsity_asked,
        backend_asked=first.backend_asked,
        backends=tuple(sorted({row.backend for row in ran if row.backend})),
        kind=first.kind,
        layers=len(ran),
        layers_asked=len(rows),
        failed=sum(row.status in (FAIL, ERROR) for row in rows),
        ms=weighted([row.p50 for row in ran]),
        roofline_ms=weighted([row.roofline_ms for row in ran]),
        peak_ms=weighted([row.peak_ms for row in ran]),
        useful_flops=weighted([row.useful_flops for row in ran]),
        density=None if kept is None else kept / weights,
        baseline_ms={name: weighted([row.baselines[name].p50 for row in ran]) for name in BASELINES},
    )
