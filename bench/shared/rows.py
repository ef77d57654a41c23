"""The one row type of all benchmarks, and its form in a result file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.shared.clocks import Lap, percentile

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


@dataclass(kw_only=True)
class Row:
    """One measurement: its status and, where the result passed its check, its times.

    A benchmark adds the columns that say what was computed in a subclass.

    status       "ok"; "FAIL": the result is wrong; "refused": no such pattern or backend; "error": it raised; "n/a":
                 it does not apply. Times exist only where it is "ok".
    reason       of any other status
    variant      memory format, and whatever else says how it was run
    extra_bytes  peak memory during the call beyond inputs and outputs; None: not measured
    warm_ms      p50 with warm caches, on a GPU
    kernels      what it launched, on a GPU
    """

    status: str = OK
    reason: str = ""
    variant: str = ""
    times: Times | None = None
    extra_bytes: int | None = None
    warm_ms: float | None = None
    kernels: list[str] = field(default_factory=list)

    @property
    def p50(self) -> float | None:
        return self.times.p50 if self.times else None

    def fail(self, status: str, reason: str | Exception) -> None:
        """Note why there are no times."""
        text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
        self.status, self.reason = status, text

    def as_json(self) -> dict[str, Any]:
        """The row in a result file."""
        return asdict(self)


def ratio(baseline: float | None, own: float | None) -> float | None:
    """How many times as fast as the baseline; None unless both were timed."""
    return None if baseline is None or own is None else baseline / own
