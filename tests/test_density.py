"""densities: exact totals, the published rules, and the nearest that a structure can keep."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from hrbp.density import DISTRIBUTIONS, densities

sizes = st.integers(1, 64)
shape = st.one_of(
    st.tuples(sizes, sizes), st.builds(lambda k, c, r: (k, c, r, r), sizes, sizes, st.sampled_from([1, 3, 5, 7]))
)
networks = st.lists(shape, min_size=1, max_size=8).map(lambda shapes: {f"layer{i}": s for i, s in enumerate(shapes)})
sparsities = st.floats(0, 0.999)
seeds = st.integers(0, 2**32 - 1)


def draw_scores(shapes, seed, levels=None):
    """Uniform scores; with `levels`, only that many different ones, zero among them."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    return scores if levels is None else {name: (s * levels).floor() for name, s in scores.items()}


def kept(shapes, density):
    return math.fsum(math.prod(shapes[name]) * d for name, d in density.items())


def cells(shapes):
    return sum(map(math.prod, shapes.values()))


# ------------------------------------------------------------------ without a structure


@given(networks, sparsities, st.sampled_from(DISTRIBUTIONS), seeds, st.sampled_from([None, 3]))
def test_totals_are_exact(shapes, sparsity, distribution, seed, levels):
    density = densities(shapes, sparsity, distribution, scores=draw_scores(shapes, seed, levels))
    assert list(density) == list(shapes)
    assert all(0 <= d <= 1 for d in density.values())
    assert kept(shapes, density) == pytest.approx((1 - sparsity) * cells(shapes), rel=1e-12, abs=1e-12 * cells(shapes))


@given(networks, st.floats(0.001, 0.999))
def test_erk_is_one_scale_capped_at_dense(shapes, sparsity):
    raw = {name: sum(s) / math.prod(s) for name, s in shapes.items()}

    def excess(scale):
        return sum(math.prod(s) * min(1.0, scale * raw[name]) for name, s in shapes.items()) / cells(shapes)

    scale = brentq(lambda x: excess(x) - (1 - sparsity), 0, 2 / min(raw.values()), xtol=1e-15, rtol=1e-14)
    for name, density in densities(shapes, sparsity).items():
        assert density == pytest.approx(min(1.0, scale * raw[name]), rel=1e-8)


def test_erk_of_a_known_network():
    shapes = {"wide": (64, 32, 3, 3), "pointwise": (16, 8, 1, 1), "linear": (10, 64)}
    # Of 1920 cells the pointwise layer (26 per 128) would take more than it has, then the linear one (74 per 640).
    rest = 0.1 * 19200 - 128 - 640
    assert densities(shapes, 0.9) == pytest.approx({"wide": rest / 18432, "pointwise": 1.0, "linear": 1.0}, rel=1e-12)
    scale = 0.01 * 19200 / (102 + 26 + 74)
    assert densities(shapes, 0.99) == pytest.approx(
        {"wide": 102 * scale / 18432, "pointwise": 26 * scale / 128, "linear": 74 * scale / 640}, rel=1e-12
    )


@settings(max_examples=40)
@given(networks, st.floats(0.001, 0.999), seeds)
def test_global_keeps_the_highest_scores(shapes, sparsity, seed):
    scores = draw_scores(shapes, seed)
    every = torch.cat([s.flatten() for s in scores.values()])
    assume(every.unique().numel() == every.numel())
    budget = (1 - sparsity) * every.numel()
    low, high = (every.sort(descending=True).values[:n] for n in (math.floor(budget), math.ceil(budget)))
    for name, density in densities(shapes, sparsity, "global", scores=scores).items():
        count = density * math.prod(shapes[name])
        assert torch.isin(scores[name], low).sum() - 1e-6 <= count <= torch.isin(scores[name], high).sum() + 1e-6


def test_global_shares_ties_by_their_number():
    shapes = {"a": (2, 4), "b": (4, 4), "c": (1, 2)}
    scores = {"a": torch.zeros(2, 4), "b": torch.zeros(4, 4), "c": torch.ones(1, 2)}
    scores["b"][0] = 2
    # 26 cells: b's four twos, c's two ones, then 20 zeros, 8 of them in a and 12 in b.
    for left, a, b, c in [(4, 0, 4, 0), (5, 0, 4, 1), (6, 0, 4, 2), (11, 2, 7, 2), (16, 4, 10, 2)]:
        expected = {"a": a / 8, "b": b / 16, "c": c / 2}
        assert densities(shapes, 1 - left / 26, "global", scores=scores) == pytest.approx(expected, abs=1e-12)


@given(networks, st.floats(0.001, 0.999), seeds, st.sampled_from([None, 4]))
def test_global_needs_only_the_order_of_scores_not_of_layers(shapes, sparsity, seed, levels):
    scores = draw_scores(shapes, seed, levels)
    density = densities(shapes, sparsity, "global", scores=scores)
    backwards = dict(reversed(shapes.items()))
    assert densities(backwards, sparsity, "global", scores=scores) == pytest.approx(density, rel=1e-9, abs=1e-9)
    monotone = {name: s * 8 + 1 for name, s in scores.items()}
    if levels is not None:
        assert densities(shapes, sparsity, "global", scores=monotone) == density


def test_global_compares_dtypes_exactly():
    # As float32 the two scores would tie.
    scores = {"a": torch.full((1, 1), 0.5), "b": torch.full((1, 1), 0.5 + 1e-12, dtype=torch.float64)}
    assert densities({"a": (1, 1), "b": (1, 1)}, 0.5, "global", scores=scores) == {"a": 0.0, "b": 1.0}
    scores = {"a": torch.full((1, 1), 0.5, dtype=torch.bfloat16), "b": torch.full((1, 1), 0.25, dtype=torch.bfloat16)}
    assert densities({"a": (1, 1), "b": (1, 1)}, 0.5, "global", scores=scores) == {"a": 1.0, "b": 0.0}


@given(networks, st.sampled_from(DISTRIBUTIONS))
def test_sparsity_zero_keeps_everything(shapes, distribution):
    scores = draw_scores(shapes, 0)
    assert densities(shapes, 0.0, distribution, scores=scores) == dict.fromkeys(shapes, 1.0)
    dense = densities(shapes, 0.0, distribution, scores=scores, realise=lambda name, density: density / 2)
    assert dense == dict.fromkeys(shapes, 1.0)  # no structure is asked


# ------------------------------------------------------------------ with a structure


def blocks(shapes, counts):
    """Whole blocks, at least one: counts[name] of them in a layer."""
    return lambda name, density: max(1, round(density * counts[name])) / counts[name]


structures = networks.flatmap(
    lambda shapes: st.tuples(
        st.just(shapes), st.fixed_dictionaries({name: st.sampled_from([1, 2, 3, 4, 9, 16, 64]) for name in shapes})
    )
)


def spread(shapes, distribution, scale):
    """uniform and ERK for a given scale, from their definitions."""
    if distribution == "uniform":
        return dict.fromkeys(shapes, min(1.0, scale))
    return {name: min(1.0, scale * sum(s) / math.prod(s)) for name, s in shapes.items()}


@given(structures, st.floats(0.001, 0.99), st.sampled_from(["uniform", "erk"]))
def test_realised_total_is_as_near_as_any_scale_brings_it(drawn, sparsity, distribution):
    shapes, counts = drawn
    realise = blocks(shapes, counts)
    budget = (1 - sparsity) * cells(shapes)
    least = sum(math.prod(s) / counts[name] for name, s in shapes.items())
    if budget < least * (1 - 1e-6):
        with pytest.raises(ValueError, match="the structure keeps at least"):
            densities(shapes, sparsity, distribution, realise=realise)
        return
    asked = densities(shapes, sparsity, distribution, realise=realise)
    got = {name: realise(name, d) for name, d in asked.items()}
    assert got == asked  # asking for it again is safe from rounding
    error = abs(kept(shapes, got) - budget)
    # Every scale at which some layer steps, and a hair to either side: all that one scale can bring.
    top = 1.0 if distribution == "uniform" else max(math.prod(s) / sum(s) for s in shapes.values())
    scales = [0.0, top]
    for name, s in shapes.items():
        unit = 1.0 if distribution == "uniform" else sum(s) / math.prod(s)
        steps = [(i + 0.5) / counts[name] / unit for i in range(counts[name])]
        scales += [x * (1 + nudge) for x in steps for nudge in (-1e-9, 1e-9)]
    best = min(
        abs(kept(shapes, {n: realise(n, d) for n, d in spread(shapes, distribution, x).items()}) - budget)
        for x in scales
    )
    assert error <= best + 1e-6


@given(st.integers(1, 12), st.sampled_from([4, 8, 32]), st.floats(0.01, 0.85), st.sampled_from(["uniform", "erk"]))
def test_equal_layers_step_one_by_one(layers, count, sparsity, distribution):
    shapes = {f"layer{i}": (32, 32, 3, 3) for i in range(layers)}
    assume((1 - sparsity) * count >= 1)
    asked = densities(shapes, sparsity, distribution, realise=blocks(shapes, dict.fromkeys(shapes, count)))
    total = sum(round(d * count) for d in asked.values())  # in blocks
    assert abs(total - (1 - sparsity) * count * layers) <= 0.5 + 1e-6
    assert max(asked.values()) - min(asked.values()) <= 1 / count + 1e-9


@pytest.mark.parametrize(
    ("left", "large", "small"),
    [(74, 0, 0), (78, 0, 1), (82, 0, 1), (90, 1, 0), (94, 1, 0), (98, 1, 1)],
)
def test_of_the_layers_that_step_together_those_that_fit_are_taken(left, large, small):
    shapes = {"small": (10, 1), "fixed": (72, 1), "large": (18, 1)}

    def realise(name, density):  # two layers step from nothing to full at one half
        return 1.0 if name == "fixed" else float(density >= 0.5)

    asked = densities(shapes, 1 - left / 100, "uniform", realise=realise)
    assert asked == {"small": small, "fixed": 1.0, "large": large}


@given(networks, st.floats(0.05, 0.9), seeds)
def test_global_is_realised_too(shapes, sparsity, seed):
    scores = draw_scores(shapes, seed)
    counts = dict.fromkeys(shapes, 64)
    budget = (1 - sparsity) * cells(shapes)
    realise = blocks(shapes, counts)
    asked = densities(shapes, sparsity, "global", scores=scores, realise=realise)
    steps = [math.prod(s) / 64 for s in shapes.values()]
    assert abs(kept(shapes, asked) - budget) <= max(steps) / 2 + 1e-6


def test_a_layer_that_a_structure_leaves_dense_is_paid_for_by_the_others():
    shapes = {"narrow": (16, 16, 3, 3), "a": (64, 64, 3, 3), "b": (64, 64, 3, 3)}
    asked = densities(shapes, 0.8, "uniform", realise=lambda name, d: 1.0 if name == "narrow" else d)
    assert asked["narrow"] == 1.0
    assert asked["a"] == asked["b"] == pytest.approx((0.2 * cells(shapes) - 2304) / (2 * 36864), rel=1e-9)


def test_what_a_structure_does_not_give_back_is_asked_for_as_searched():
    # Keeps 0.1 less than it is asked for: what it keeps is no density to ask for.
    shapes = {"a": (10, 10), "b": (20, 20)}
    asked = densities(shapes, 0.5, "uniform", realise=lambda name, d: max(0.0, d - 0.1))
    assert asked == pytest.approx({"a": 0.6, "b": 0.6}, rel=1e-9)


def test_a_target_at_the_least_is_met_whatever_rounding_does():
    assert 7 / 25 * 25 > 25 - 0.72 * 25  # both are 7
    assert densities({"a": (5, 5)}, 0.72, realise=lambda name, d: max(7 / 25, d)) == pytest.approx({"a": 7 / 25})


# ------------------------------------------------------------------ refused

TWO = {"a": (4, 4), "b": (2, 3, 3, 3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: densities({}, 0.5), "shapes is empty; it needs at least one layer"),
        (
            lambda: densities({"a": (4, 0)}, 0.5),
            r"layer 'a' has shape \(4, 0\); it needs \[K, C, R, S\], \[K, C, S\] or",
        ),
        (lambda: densities({"a": (4, 4, 3, 3, 3)}, 0.5), r"layer 'a' has shape \(4, 4, 3, 3, 3\)"),
        (lambda: densities({"a": (4, 2.5)}, 0.5), "integers >= 1"),
        (lambda: densities(TWO, 1.0), r"densities\(\): sparsity is 1.0; it needs a number in \[0, 1\)"),
        (lambda: densities(TWO, -0.1), "sparsity is -0.1"),
        (lambda: densities(TWO, math.nan), "sparsity is nan"),
        (lambda: densities(TWO, 0.5, "er"), "distribution is 'er'; it needs one of 'uniform', 'erk', 'global'"),
        (lambda: densities(TWO, 0.0, "er"), "distribution is 'er'"),
        (lambda: densities(TWO, 0.5, "global"), "distribution 'global' needs scores"),
        (lambda: densities(TWO, 0.5, "global", scores={"a": torch.ones(4, 4)}), "scores has no layer 'b'"),
        (
            lambda: densities(TWO, 0.5, "global", scores=dict.fromkeys(TWO, torch.ones(4, 4))),
            r"the score of 'b' has shape \(4, 4\); it needs \(2, 3, 3, 3\)",
        ),
        (
            lambda: densities({"a": (1, 2)}, 0.5, "global", scores={"a": torch.tensor([[1.0, math.nan]])}),
            "the score of 'a' holds NaN, infinity or negative numbers",
        ),
        (
            lambda: densities({"a": (1, 2)}, 0.5, "global", scores={"a": torch.tensor([[1.0, -1.0]])}),
            "the score of 'a' holds",
        ),
        (
            lambda: densities({"a": (1, 2)}, 0.5, "global", scores={"a": torch.tensor([[1.0, math.inf]])}),
            "the score of 'a' holds",
        ),
        (lambda: densities(TWO, 0.5, realise=lambda name, d: math.nan), r"realise\('a', 0.0\) is nan; it needs"),
        (lambda: densities(TWO, 0.5, realise=lambda name, d: d + 0.1), r"realise\('a', 1.0\) is 1.1"),
        (
            lambda: densities(TWO, 0.9, realise=lambda name, d: max(d, 0.5 if name == "b" else 0.25)),
            r"sparsity 0.9 leaves 7 of 70 cells; the structure keeps at least 31, a sparsity of 0.5571. Lower the"
            r" sparsity, .* \(most of it is in 'b', 'a'\)",
        ),
        (
            lambda: densities(TWO, 0.1, realise=lambda name, d: d / 2),
            "leaves 63 of 70 cells; the structure keeps at most 35, a sparsity of 0.5000. Raise the sparsity",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------ a least density


@given(networks, st.floats(0.001, 0.99), st.sampled_from(DISTRIBUTIONS), seeds, st.floats(0, 1))
def test_no_layer_falls_below_the_least_density(shapes, sparsity, distribution, seed, share):
    least = share * (1 - sparsity)
    density = densities(shapes, sparsity, distribution, scores=draw_scores(shapes, seed), min_density=least)
    assert min(density.values()) >= least
    assert max(density.values()) <= 1
    assert kept(shapes, density) == pytest.approx((1 - sparsity) * cells(shapes), rel=1e-9, abs=1e-9 * cells(shapes))
    free = densities(shapes, sparsity, distribution, scores=draw_scores(shapes, seed))
    if min(free.values()) >= least:
        assert density == pytest.approx(free, rel=1e-6, abs=1e-9)


def test_a_least_density_over_the_mean_is_refused():
    with pytest.raises(ValueError, match=r"min_density is 0\.2; it needs a number in \[0, 0\.1\], as sparsity 0\.9"):
        densities({"a": (8, 8)}, 0.9, min_density=0.2)
