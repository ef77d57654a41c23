"""The statistics of studies, against tables and against scipy."""

import itertools
import math
import random
import statistics

import pytest
from scipy import stats

from hrbp.study.spread import (
    Interval,
    interval,
    median_interval,
    paired,
    points,
    rank_correlation,
    t_quantile,
    widest,
)


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)]
)
def test_quantiles_are_those_of_the_printed_table(freedom, value):
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=5e-4)


def test_quantiles_are_those_of_scipy():
    for share, freedom in itertools.product((0.6, 0.95, 0.975, 0.9999), (1, 2, 3, 4, 5, 6, 7, 29, 100)):
        assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-10)
    for share, freedom in ((0.5, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="t_quantile"):
            t_quantile(share, freedom)


def test_an_interval_by_hand():
    """Of 1..5: mean 3, deviation sqrt(2.5), t 2.776: 3 +- 1.963."""
    assert interval([]) is None
    assert interval([2.0]) == Interval(2.0, None, None, 1)
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.low, found.high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)
    low, high = stats.t.interval(0.95, 4, 3, math.sqrt(2.5 / 5))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-10)


def test_pairs_are_of_one_seed_and_what_a_seed_does_to_both_drops_out():
    theirs = {0: 0.1, 1: 0.5, 2: 0.9, 7: 0.3}
    found = paired({2: 0.93, 1: 0.52, 0: 0.11, 9: 1.0}, theirs)
    assert found.values == 3
    assert found.mean == pytest.approx(0.02)
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.02 - half, 0.02 + half))
    assert found.side == 0
    assert paired({1: 0.5}, {2: 0.5}) is None
    ours = [0.71, 0.74, 0.70, 0.78]
    found = paired(dict(enumerate(ours)), dict.fromkeys(range(4), 0.70))
    known = stats.ttest_rel(ours, [0.70] * 4).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))


def test_a_difference_is_said_only_where_the_interval_excludes_zero():
    assert points(None) == "-"
    assert points(Interval(0.02, None, None, 1)) == "+2.0, one seed"
    assert points(Interval(0.012, 0.003, 0.021, 5)) == "+1.2 [+0.3, +2.1]"
    assert points(Interval(-0.012, -0.021, -0.003, 5)) == "-1.2 [-2.1, -0.3]"
    assert points(Interval(0.012, -0.001, 0.025, 5)) == "no difference shown +1.2 [-0.1, +2.5]"
    assert points(Interval(0.0, 0.0, 0.0, 5)) == "no difference shown +0.0 [+0.0, +0.0]"


def test_the_widest_of_several_holds_them_all():
    a, b = Interval(1.0, 0.5, 1.5, 5), Interval(0.9, 0.2, 1.2, 5)
    assert widest([a, b]) == Interval(1.0, 0.2, 1.5, 5)
    assert widest([a, None]) is widest([]) is None
    assert widest([a, Interval(0.9, None, None, 1)]) == Interval(1.0, None, None, 5)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 15, 31])
def test_ranks_hold_the_median_as_often_as_they_say(count):
    low, high = median_interval(list(range(count, 0, -1)))
    assert low + high == count + 1
    outside = 2 * stats.binom.cdf(low - 1, count, 0.5)  # fewer than `low` values lie below the median, or above
    assert outside <= 0.05 or low == 1
    assert 2 * stats.binom.cdf(low, count, 0.5) > 0.05  # the next ranks would miss it too often


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    draw = random.Random(0)
    held = []
    for _ in range(2000):
        found = interval([draw.gauss(3, 2) for _ in range(5)])
        held.append(found.low <= 3 <= found.high)
    assert statistics.mean(held) == pytest.approx(0.95, abs=0.015)


def test_rank_correlation_is_that_of_scipy():
    """With ties, too; its interval is that of Fisher's z."""
    for seed in range(20):
        draw = random.Random(seed)
        ours, theirs = ([draw.randint(0, 6) + draw.choice((0, 0.5)) for _ in range(9)] for _ in range(2))
        found = rank_correlation(ours, theirs)
        assert found.mean == pytest.approx(stats.spearmanr(ours, theirs).statistic, abs=1e-12)
        low, high = (math.tanh(math.atanh(found.mean) + side * 1.959964 / math.sqrt(6)) for side in (-1, 1))
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == Interval(1, 1, 1, 4)
    assert rank_correlation([1, 2, 3, 4], [9, 8, 7, 6]).side == -1
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None
