"""What a measurement says: a row for each layer, pattern, backend and kind; and sums over a network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import blocksparse as bs
from layers import Layer
from timing import Lap, percentile

KINDS = ("fprop", "dgrad", "wgrad")
TOTAL = "total"
RIVALS = ("dense", "grouped", "torch_bsr", "narrow")
OK, FAIL, REFUSED, ERROR, ABSENT = "ok", "FAIL", "refused", "error", "n/a"


@dataclass(frozen=True)
class Times:
    """Percentiles of the laps, in milliseconds."""

    p20: float
    p50: float
    p80: float
    least: float
    most: float
    laps: list[float]
    host_p50: float | None  # GPU: what the host needed to enqueue a lap

    @classmethod
    def of(cls, laps: list[Lap]) -> Times:
        ms = [1e3 * lap.seconds for lap in laps]
        host = [1e3 * lap.host_seconds for lap in laps if lap.host_seconds is not None]
        p20, p50, p80 = (percentile(ms, p) for p in (20, 50, 80))
        return cls(p20, p50, p80, min(ms), max(ms), ms, percentile(host, 50) if host else None)


@dataclass(frozen=True)
class Result:
    """The best variant of a contender at one kind. Times exist only where status is ok."""

    status: str
    reason: str = ""
    variant: str = ""
    times: Times | None = None
    extra_bytes: int | None = None

    @property
    def p50(self) -> float | None:
        return self.times.p50 if self.times else None


@dataclass(frozen=True)
class Row:
    """One line of the table. `pattern` facts are None where no pattern could be built."""

    net: str
    layer: str
    geometry: str
    count: int
    shape: tuple[int, int, int, int]
    x_shape: tuple[int, int, int, int]
    stride: int
    padding: tuple[int, int]
    structure: str
    blocksize_asked: str
    sparsity_asked: float
    backend_asked: str
    kind: str
    sparse: Result
    rivals: dict[str, Result] = field(default_factory=dict)
    blocksize: tuple[int, int] | None = None
    nnzb: int | None = None
    density: float | None = None
    backend: str | None = None
    plan: str | None = None
    useful_flops: int | None = None  # of this kind, on the stored blocks alone
    roofline_ms: float | None = None
    peak_ms: float | None = None

    @property
    def p50(self) -> float | None:
        return self.sparse.p50

    @property
    def flops_per_second(self) -> float | None:
        return None if self.p50 is None or self.useful_flops is None else 1e3 * self.useful_flops / self.p50

    @property
    def roofline_share(self) -> float | None:
        return None if self.p50 is None or self.roofline_ms is None else self.roofline_ms / self.p50

    @property
    def peak_share(self) -> float | None:
        return None if self.p50 is None or self.peak_ms is None else self.peak_ms / self.p50

    def speedup(self, rival: str) -> float | None:
        """p50 of the rival / p50 of the sparse layer; None unless both passed their check and ran."""
        other = self.rivals.get(rival, Result(ABSENT)).p50
        return None if self.p50 is None or other is None else other / self.p50

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "flops_per_second": self.flops_per_second,
            "percent_of_roofline": None if self.roofline_share is None else 100 * self.roofline_share,
            "percent_of_peak": None if self.peak_share is None else 100 * self.peak_share,
            "speedup": {rival: self.speedup(rival) for rival in RIVALS},
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


# ---------------------------------------------------------------- sums over a network


@dataclass(frozen=True)
class Total:
    """Sums over the layers of a network, each as often as it occurs, of one pattern, backend and kind.

    `layers` of `layers_asked` shapes passed and were timed; the sums are over those. A rival's sum is None unless
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
    rival_ms: dict[str, float | None]

    def speedup(self, rival: str) -> float | None:
        other = self.rival_ms[rival]
        return None if self.ms is None or other is None else other / self.ms

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": {rival: self.speedup(rival) for rival in RIVALS}}


def totals(rows: Iterable[Row]) -> list[Total]:
    """One Total per (network, pattern, backend, kind), in the order of the rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.net, row.structure, row.blocksize_asked, row.sparsity_asked, row.backend_asked, row.kind)
        groups.setdefault(key, []).append(row)
    return [_total(group) for group in groups.values()]


def _total(rows: list[Row]) -> Total:
    ran = [row for row in rows if row.sparse.status == OK]

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
        failed=sum(row.sparse.status in (FAIL, ERROR) for row in rows),
        ms=weighted([row.p50 for row in ran]),
        roofline_ms=weighted([row.roofline_ms for row in ran]),
        peak_ms=weighted([row.peak_ms for row in ran]),
        useful_flops=weighted([row.useful_flops for row in ran]),
        density=None if kept is None else kept / weights,
        rival_ms={rival: weighted([row.rivals[rival].p50 for row in ran]) for rival in RIVALS},
    )
