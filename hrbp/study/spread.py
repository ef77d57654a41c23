"""The statistics of a study: means, their intervals, and differences of trainings that share a seed.

An interval is the 95% one of Student's t: mean +- t * s / sqrt(n), with n - 1 degrees of freedom. Two arms of a study
are compared by the differences at each seed: both saw the same images in the same order, and what a seed does to both
drops out. Where the interval of these differences holds 0, no difference is shown, whatever the means say.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; low and high are None where one value alone is known.

    values  how many it is the mean of
    """

    mean: float
    low: float | None
    high: float | None
    values: int

    @property
    def side(self) -> int:
        """1 where the interval lies above 0, -1 where below; else 0: no difference from 0 is shown."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.mean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Of a sample; None of one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def interval(values: Sequence[float]) -> Interval | None:
    """The mean of a sample with its interval; None of nothing."""
    if not values:
        return None
    middle, count = statistics.mean(values), len(values)
    if count == 1:
        return Interval(middle, None, None, 1)
    half = t_quantile((1 + LEVEL) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(middle, middle - half, middle + half, count)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The mean of ours - theirs over the seeds that both have, with its interval; None where there is no such seed.

    Args:
        ours, theirs: seed -> value.
    """
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def widest(found: Sequence[Interval | None]) -> Interval | None:
    """The first one's mean, in an interval that holds those of all; None if one is None."""
    known = [one for one in found if one is not None]
    if len(known) < len(found) or not known:
        return None
    lows, highs = [one.low for one in known if one.low is not None], [one.high for one in known if one.high is not None]
    if len(lows) < len(known) or len(highs) < len(known):
        return Interval(known[0].mean, None, None, known[0].values)
    return Interval(known[0].mean, min(lows), max(highs), known[0].values)


def points(difference: Interval | None) -> str:
    """A difference of shares in points: "+1.2 [+0.3, +2.1]", or that none is shown."""
    if difference is None:
        return "-"
    if difference.low is None or difference.high is None:
        return f"{100 * difference.mean:+.1f}, one seed"
    said = f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return said if difference.side else f"no difference shown {said}"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval of the median of whatever distribution the values have, by ranks; of under 6 values their range.

    The largest j with P(Binomial(n, 1/2) < j) <= (1 - level) / 2; then (j-th smallest, j-th largest).
    """
    ordered, count = sorted(values), len(values)
    below, j = 0.0, 0
    while below + math.comb(count, j) / 2**count <= (1 - LEVEL) / 2:
        below += math.comb(count, j) / 2**count
        j += 1
    j = max(j, 1)
    return ordered[j - 1], ordered[-j]


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    """Spearman's rank correlation of two measures of the same things, with its interval.

    That of Fisher's z: tanh(atanh(r) +- 1.96 / sqrt(n - 3)). None of under 4 things, or where a measure has one value.
    """
    count = len(ours)
    if count < 4 or len(set(ours)) == 1 or len(set(theirs)) == 1:
        return None
    r = statistics.correlation(_ranks(ours), _ranks(theirs))
    if 1 - abs(r) < 1e-12:
        return Interval(r, r, r, count)
    half = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2) / math.sqrt(count - 3)
    return Interval(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), count)


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def t_quantile(share: float, freedom: int) -> float:
    """The value that Student's t with this many degrees of freedom is below with probability `share`, in (0.5, 1)."""
    if not 0.5 < share < 1 or freedom < 1:
        raise ValueError(f"t_quantile(): share is {share} and freedom {freedom}; they need (0.5, 1) and at least 1")
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _t_below(middle, freedom) < share else (low, middle)
    return high


def _t_below(t: float, freedom: int) -> float:
    """P(T < t), t >= 0: a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for i in range(2 + odd, freedom, 2):
        term *= (i - 1) / i * cosine * cosine
        total += term
    if odd:
        return 0.5 + (angle + (sine * total if freedom > 1 else 0.0)) / math.pi
    return 0.5 + sine * total / 2


def doubt(found: Sequence[Mapping[str, Any]]) -> str:
    """The least difference of accuracy that means something: twice its standard error, deviations pooled."""
    spread = [(row["seeds"], row["deviation"]) for row in found if row["deviation"] is not None]
    if not spread:
        return "with one seed, small differences say nothing"
    variance = sum((n - 1) * d**2 for n, d in spread) / sum(n - 1 for n, _ in spread)
    least = 200 * math.sqrt(2 * variance / min(row["seeds"] for row in found))
    return f"differences under {least:.1f} points are within the spread of the seeds"
