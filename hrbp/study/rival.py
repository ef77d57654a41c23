"""The narrow dense network that takes as long as a sparse one: the rival at equal measured time.

Dense networks of several widths, each trained as every arm is, are a curve of accuracy over measured step time. At the
time of a sparse network the curve is interpolated, for every seed apart (linear in the logarithm of time), so that the
difference is paired. A network that a faster one beats on average is no point of the curve: nobody would take it. The
curve ends with the full dense network: what is slower than that is compared with it. Nothing is extrapolated to less
time than that of the narrowest network.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .spread import Interval, paired, widest


@dataclass(frozen=True)
class Point:
    """A dense network of some width.

    seconds  of a step
    right    seed -> accuracy
    """

    seconds: float
    right: Mapping[int, float]


def curve(points: Iterable[Point]) -> list[Point]:
    """The points that count, from fast to slow; accuracy rises along them."""
    found: list[Point] = []
    for point in sorted((p for p in points if p.right), key=lambda p: p.seconds):
        if not found or _mean(point) > _mean(found[-1]):
            found.append(point)
    return found


def rival_at(points: list[Point], seconds: float) -> dict[int, float] | None:
    """Seed -> accuracy of the dense network whose step takes this long; None: all of them take longer.

    Args:
        points: as `curve` made them.
        seconds: of a step.
    """
    if not points or seconds < points[0].seconds:
        return None
    after = next((i for i, point in enumerate(points) if point.seconds > seconds), None)
    if after is None:
        return dict(points[-1].right)
    low, high = points[after - 1], points[after]
    share = math.log(seconds / low.seconds) / math.log(high.seconds / low.seconds)
    both = low.right.keys() & high.right.keys()
    return {seed: (1 - share) * low.right[seed] + share * high.right[seed] for seed in sorted(both)}


def against(points: list[Point], right: Mapping[int, float], times: Iterable[float]) -> Interval | None:
    """The accuracy of an arm above its rival's: paired, in an interval that holds for every one of these times.

    Args:
        points: as `curve` made them.
        right: seed -> accuracy of the arm.
        times: of its step: the median, then both ends of its interval; an end that is less than the narrowest network
            takes is compared with that.
    """
    middle, *ends = times
    if (rival := rival_at(points, middle)) is None:
        return None
    rivals = [rival, *(rival_at(points, max(seconds, points[0].seconds)) or {} for seconds in ends)]
    return widest([paired(right, each) for each in rivals])


def _mean(point: Point) -> float:
    return statistics.mean(point.right.values())
