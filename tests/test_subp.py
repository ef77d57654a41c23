"""Soft uniform block pruning against its definition: loops over blocks, and exact probabilities of draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor, nn

import hrbp
from hrbp.layers.view import sparse_layers
from hrbp.methods.subp import PACES, block_scores, counts, kept_blocks, pruned_share, regrown

SEEDS = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------------- scores


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A filter bank of normal weights, some blocks of it zero or tiny, and n."""
    n, rows, c = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    r, s = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    blocks = torch.randn(rows, n, c, r, s, generator=generator, dtype=torch.float64)
    for _ in range(draw(st.integers(0, 4))):
        row, channel = draw(st.integers(0, rows - 1)), draw(st.integers(0, c - 1))
        blocks[row, :, channel] *= draw(st.sampled_from([0.0, 1e-200, -3.0]))
        if draw(st.booleans()):  # a copy is wholly redundant
            blocks[row, :, channel] = blocks[row, :, 0]
    return blocks.view(rows * n, c, r, s), n


def slow_scores(weight: Tensor, n: int, score: str, alpha: float) -> list[list[float]]:
    result = []
    for first in range(0, len(weight), n):
        blocks = [[float(x) for x in weight[first : first + n, i].flatten()] for i in range(weight.shape[1])]
        l1 = [math.fsum(map(abs, b)) for b in blocks]
        if score in ("l1", "l2"):
            result.append(l1 if score == "l1" else [math.sqrt(math.fsum(x * x for x in b)) for b in blocks])
            continue

        def cosine(a: list[float], b: list[float]) -> float:
            lengths = math.hypot(*a), math.hypot(*b)
            return (
                math.fsum(x / lengths[0] * (y / lengths[1]) for x, y in zip(a, b, strict=True)) if min(lengths) else 0
            )

        redundancy = [sum(abs(cosine(a, b)) for b in blocks) for a in blocks]
        result.append(
            [
                (own / sum(l1) if sum(l1) else 0) - alpha * (angle / sum(redundancy) if own else 1)
                for own, angle in zip(l1, redundancy, strict=True)
            ]
        )
    return result


@settings(max_examples=60)
@given(weights(), st.sampled_from(["l1", "l2", "bpar"]), st.sampled_from([0.0, 0.5, 1.0, 3.0]), SEEDS)
def test_scores_are_those_of_the_definition(drawn, score, alpha, seed):
    weight, n = drawn
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    for row_order in (None, order, order.int()):
        rows = weight if row_order is None else weight[order]
        expected = torch.tensor(slow_scores(rows, n, score, alpha), dtype=torch.float64)
        found = block_scores(weight, n, score, alpha, row_order)
        assert found.dtype == torch.float64
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_scores_of_large_layers_are_made_in_parts(monkeypatch):
    weight = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = block_scores(weight, 2)
    monkeypatch.setattr("hrbp.methods.subp.CHUNK_CELLS", 55)  # two rows of 5 x 5
    assert torch.allclose(block_scores(weight, 2), whole, rtol=1e-6)
    assert block_scores(weight.bfloat16(), 2).dtype == torch.float32


def test_redundant_blocks_are_worth_less_than_others_of_their_size():
    weight = torch.eye(4).view(4, 4, 1, 1).repeat(1, 2, 1, 1) + 0.0  # 8 channels: each direction twice
    weight[:, 7] = torch.tensor([0.5, -0.5, 0.5, -0.5])[:, None, None]  # as long, and between all directions
    weight[:, 6] = 0.0
    scores = block_scores(weight, 4)[0]
    l1 = block_scores(weight, 4, "l1")[0]
    assert scores.argmin() == 6
    assert scores[2] > scores[0]  # its twin is gone
    assert l1[2] == l1[0]


# ---------------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("pace", "middle"),
    [
        ("cubic", 0.125),
        ("linear", 0.5),
        ("cosine", 1 - math.sqrt(0.5)),
        ("exponential", (1 - math.exp(-0.25)) / (1 - math.exp(-0.5))),
    ],
)
def test_paces(pace, middle):
    def at(epoch: float) -> float:
        return pruned_share(epoch, 5, 15, 0.8, pace)

    assert [at(e) for e in (0, 3.5, 5)] == [0.0] * 3
    assert [at(e) for e in (15, 15.5, 99)] == [0.8] * 3
    assert at(10) == pytest.approx(0.8 * middle, rel=1e-12)
    rising = [at(5 + i / 4) for i in range(41)]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert rising[-2] > 0.7  # it arrives, rather than jumping
    assert [pruned_share(e, 5, 5, 0.8, pace) for e in (4, 5, 6)] == [0.0, 0.8, 0.8]


def test_every_pace_is_tested():
    assert set(PACES) == {"cubic", "linear", "cosine", "exponential"}


def test_counts():
    assert counts(64, 0.9, 0.0) == (57, 57)  # every block takes part
    assert counts(64, 0.9, 0.9) == (57, 0)
    assert counts(64, 0.9, 0.45) == (57, 28)
    assert counts(10, 0.75, 0.5) == (7, 2)
    assert counts(3, 0.2, 0.1) == (0, 0)
    assert counts(1, math.nextafter(1, 0), 0.0) == (0, 0)  # one block stays


@settings(max_examples=100)
@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 0.999), st.floats(0, 1), SEEDS)
def test_every_row_keeps_its_best_and_equally_many_others(rows, channels, sparsity, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (rows, channels), generator=generator).float()  # with ties
    pruned = share * sparsity
    kept = kept_blocks(scores, sparsity, pruned, generator)
    dropped, back = int(sparsity * channels), int((sparsity - pruned) * channels)
    assert kept.sum(1).tolist() == [channels - dropped + back] * rows
    for row in range(rows):
        best = sorted(range(channels), key=lambda i: (-float(scores[row, i]), i))[: channels - dropped]
        assert kept[row, best].all()


# ---------------------------------------------------------------------- which


def exact_sets(scores: list[float], tau: float, count: int) -> dict[tuple[int, ...], float]:
    """The probability of every set of `count` items, drawn one after the other from what is left."""
    length = math.sqrt(sum(s * s for s in scores)) or 1.0
    weight = [math.exp(s / length / tau) for s in scores]
    found: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(scores)), count):
        left, chance = sum(weight), 1.0
        for item in order:
            chance *= weight[item] / left
            left -= weight[item]
        key = tuple(sorted(order))
        found[key] = found.get(key, 0.0) + chance
    assert sum(found.values()) == pytest.approx(1)
    return found


@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("scores", [[0.1, 2.0, 0.7, 1.5, 0.9], [-0.4, 0.3, -0.1, -0.8, 0.0], [1.0] * 5, [0.0] * 5])
def test_blocks_come_back_with_the_probabilities_of_draws_one_by_one(scores, count, tau):
    draws = 40_000
    # Kept blocks, with higher scores, stand between: they have no part in it.
    row, places = torch.full((8,), 9.0), [1, 2, 4, 5, 7]
    row[places] = torch.tensor(scores)
    dropped = torch.zeros(8, dtype=torch.bool)
    dropped[places] = True
    generator = torch.Generator().manual_seed(count)
    drawn = regrown(row.expand(draws, -1), dropped.expand(draws, -1), count, generator, tau)
    assert not (drawn & ~dropped).any()
    codes = (drawn[:, places].long() * 2 ** torch.arange(5)).sum(1)
    observed = torch.bincount(codes, minlength=32)
    expected = exact_sets(scores, tau, count)
    statistic = 0.0
    for items, chance in expected.items():
        seen = int(observed[sum(2**i for i in items)])
        statistic += (seen - draws * chance) ** 2 / (draws * chance)
    assert sum(int(observed[sum(2**i for i in items)]) for items in expected) == draws
    # Once in a thousand times a right sampler fails this; the seed is fixed, and passes.
    assert statistic < chi2.ppf(0.999, max(1, len(expected) - 1))


def test_rows_draw_apart_and_seeds_decide():
    scores = torch.rand(64, 12, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> Tensor:
        return kept_blocks(scores, 0.75, 0.4, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    same = kept_blocks(scores[:1].expand(64, -1), 0.75, 0.4, torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in same.tolist()}) > 20


# ---------------------------------------------------------------------- refusals


def test_refusals():
    weight = torch.ones(8, 4, 3, 3)
    generator = torch.Generator()
    for call, message in [
        (lambda: block_scores(weight, 3), r"block_scores\(\): n is 3; it needs a divisor of K = 8"),
        (lambda: block_scores(weight, 0), "n is 0"),
        (lambda: block_scores(weight, 4, "best"), "score is 'best'; it needs one of bpar, l1, l2"),
        (lambda: block_scores(weight.int(), 4), r"weight is \(8, 4, 3, 3\) torch.int32; it needs floats"),
        (lambda: block_scores(weight[0], 4), r"weight is \(4, 3, 3\)"),
        (lambda: block_scores(weight * math.nan, 4), "weight holds NaN or infinity"),
        (lambda: pruned_share(1, 0, 5, 0.5, "square"), "pace is 'square'; it needs one of cubic, linear"),
        (lambda: pruned_share(1, 3, 2, 0.5), "begin is 3 and end 2; it needs 0 <= begin <= end"),
        (lambda: counts(4, 0.5, 0.6), r"counts\(\): pruned is 0.6 and sparsity 0.5"),
        (lambda: counts(4, 1.0, 0.6), "sparsity 1.0; it needs 0 <= pruned <= sparsity < 1"),
        (lambda: kept_blocks(torch.ones(2, 4), 0.5, 0.2, generator, tau=0.0), r"regrown\(\): tau is 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("ranks", ["all", "live"])
def test_what_is_out_returns_by_the_draw_alone_where_live_weights_are_ranked(ranks):
    """The largest weights come to lie in blocks that are out: ranked by all weights these return, by live ones not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    hrbp.sparsify(net, 0.5, structure="1xn", n=8, method="subp")
    optimizer, layer = torch.optim.SGD(net.parameters(), 0.0), sparse_layers(net)["1"]
    first, last = [False] * 4 + [True] * 4, [True] * 4 + [False] * 4
    for sizes, kept in ((range(1, 9), first), (range(8, 0, -1), last if ranks == "all" else first)):
        with torch.no_grad():
            layer.parameter.copy_(torch.tensor(sizes).view(1, 8, 1, 1).expand(8, 8, 1, 1))
        # Its one update is the last: nothing is drawn.
        options = {"every": 1, "until": 0.5, "score": "l1", "ranks": ranks}
        assert hrbp.Evolver(net, optimizer, "subp", total_steps=2, **options).step() is not None
        assert layer.mask()[0, :, 0, 0].tolist() == kept
