"""Regrouping: counts by the contract, Algorithm 1 a second time, the optimum of tiny layers, and the BSR form."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import blocksparse as bs
from hrbp.structures.grouping import Grouping, GroupOptions, GroupShape
from hrbp.structures.registry import structure
from hrbp.structures.regrouping import _alternate, _by_score, _Found, _Search, keep_by_counts, regroup
from oracle import assert_products
from runners import RUNNERS
from strategies import nonzero

SEEDS = st.integers(0, 2**32 - 1)
KINDS = ["dense", "zeros", "heavy", "counts", "filters", "constant", "nothing"]


def scores(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    score = {
        "dense": normal.abs(),
        "zeros": normal.abs() * (uniform < 0.3),
        "heavy": (2.5 * normal).exp(),
        "counts": (5 * uniform**3).floor(),
        "filters": normal.abs() * (uniform < uniform[:, :1, :1, :1]) * uniform.flatten(1)[:, 0].view(-1, 1, 1, 1).exp(),
        "constant": torch.full_like(uniform, 0.7),
        "nothing": torch.zeros_like(uniform),
    }[kind]
    return score.to(dtype)


@dataclass
class Layer:
    """A layer and the options of one call."""

    kind: str
    shape: tuple[int, int, int, int]
    sparsity: float
    seed: int
    options: dict = field(default_factory=dict)

    @property
    def score(self) -> Tensor:
        return scores(self.kind, self.shape, self.seed)

    def regroup(self, **other: object) -> Grouping:
        return regroup(self.score, self.sparsity, **{**self.options, "seed": self.seed % 2**31, **other})


@st.composite
def layers(draw: st.DrawFn, kinds: list[str] = KINDS, balanced: bool | None = None) -> Layer:
    granule, row_granule = draw(st.sampled_from([1, 1, 1, 2, 8])), draw(st.sampled_from([1, 1, 2, 3]))
    rows, runs = draw(st.integers(1, 24 // row_granule)), draw(st.integers(1, max(2, 12 // granule)))
    r, s = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2), (3, 2)]))
    options = {
        "groups": draw(st.integers(1, 9)),
        "tap_density": draw(st.sampled_from([1.0, 4 / 9, 0.2, 0.75])),
        "granule": granule,
        "row_granule": row_granule,
        "min_rows": draw(st.sampled_from([1, 1, 2, 3, 8])),
        "balanced": draw(st.booleans()) if balanced is None else balanced,
        "method": draw(st.sampled_from(["assign", "paper"])),
    }
    sparsity = draw(st.sampled_from([0, 0.3, 0.5, 0.8, 0.9, 0.99, 1 - 1e-9]) | st.floats(0, 0.999))
    return Layer(
        draw(st.sampled_from(kinds)),
        (rows * row_granule, runs * granule, r, s),
        sparsity,
        draw(SEEDS),
        options,
    )


def contract(layer: Layer) -> tuple[int, int, int]:
    """Groups, channels and taps: the rules, one case after the other."""
    (k, c, r, s), o = layer.shape, layer.options
    area, density, share = r * s, 1 - layer.sparsity, o["tap_density"]
    groups = o["groups"]
    while groups > 1 and (k % groups or k // groups < o["min_rows"] or (k // groups) % o["row_granule"]):
        groups -= 1
    taps = max(1, round(area * share))
    if density > share:  # more is kept than the taps have room for: more taps
        taps = next(p for p in range(1, area + 1) if p >= area * density - 1e-9)
        share = taps / area
    if area == 1:
        taps, share = 1, 1.0
    channels = o["granule"] * max(1, round(c * density / (share * o["granule"])))
    return groups, min(channels, c), taps


def kept(score: Tensor, grouping: Grouping) -> float:
    """The objective, from its definition."""
    k, c, r, s = score.shape
    cells, total = score.double().view(k, c, r * s), 0.0
    for rows, channels, taps in zip(
        grouping.row_order.view(grouping.groups, -1), grouping.channels, grouping.taps, strict=True
    ):
        total += float(cells[rows][:, channels][:, :, taps].sum())
    return total


# ---------------------------------------------------------------- the result is what the contract says


@given(layers())
def test_counts_are_those_of_the_contract(layer):
    g = layer.regroup()
    (k, c, r, s), granule = layer.shape, layer.options["granule"]
    groups, channels, taps = contract(layer)
    assert GroupOptions(**layer.options).size(layer.shape, layer.sparsity) == GroupShape(groups, channels, taps)
    assert (g.shape, g.granule) == (layer.shape, granule)
    assert g.channels.shape == (groups, channels)
    assert g.taps.shape == (groups, taps)
    assert {t.dtype for t in (g.row_order, g.channels, g.taps)} == {torch.int64}
    assert g.row_order.sort().values.tolist() == list(range(k))
    for chosen, size in ((g.channels, c), (g.taps, r * s)):
        assert all(row == sorted(set(row)) and row[0] >= 0 and row[-1] < size for row in chosen.tolist())
    for row in g.channels.tolist():
        assert {x // granule * granule + i for x in row for i in range(granule)} == set(row)
    rows = g.row_order.view(groups, -1).tolist()
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    run = layer.options["row_granule"]
    assert all({x // run * run + i for x in row for i in range(run)} == set(row) for row in rows)
    mask = g.mask()
    assert int(mask.sum()) == k * channels * taps
    assert g.density == pytest.approx(float(mask.double().mean()))
    score = layer.score
    assert float((score.double() * mask).sum()) == pytest.approx(kept(score, g))
    total = float(score.sum(dtype=torch.float64))
    assert g.retained(score) == pytest.approx(kept(score, g) / total if total else 1.0)


@pytest.mark.parametrize("method", ["assign", "paper"])
@pytest.mark.parametrize("granule", [8, 16, 32])
@pytest.mark.parametrize("balanced", [False, True])
def test_wide_granules(method, granule, balanced):
    score = scores("heavy", (16, 128, 3, 3), granule)
    g = regroup(score, 0.7, groups=4, granule=granule, min_rows=4, method=method, balanced=balanced, tap_density=4 / 9)
    width = granule * round(128 * (1 - 0.7) / (4 / 9 * granule))
    assert g.channels.shape == (4, width)
    assert (g.channels.view(4, -1, granule)[..., 0] % granule == 0).all()
    assert (g.channels.view(4, -1, granule).diff() == 1).all()
    pattern = g.pattern()
    assert pattern.blocksize == (4, granule)
    assert pattern.density == pytest.approx(g.density)


def test_options_are_said_once():
    """regroup's own defaults, those of the structures and those of the command line are the fields of one class."""
    fields = {f.name: f.default for f in dataclasses.fields(GroupOptions)}
    keywords = [p for p in inspect.signature(regroup).parameters.values() if p.kind == p.KEYWORD_ONLY]
    assert {p.name: p.default for p in keywords if p.name != "seed"} == fields
    for name, tap_density in (("hrbp", 1.0), ("hrbp++", 4 / 9)):
        made = dataclasses.asdict(structure(name))
        assert made == fields | {"name": name, "tap_density": tap_density}


def test_filters_that_stay_are_those_of_runs_as_large_as_a_group():
    score = torch.rand(24, 16, 3, 3)
    assert regroup(score, 0.8, row_granule=None) == regroup(score, 0.8, row_granule=8)
    assert regroup(score, 0.8, row_granule=None).row_order.tolist() == list(range(24))


def test_the_shapes_of_the_house():
    """Counts worked out by hand."""

    def sizes(shape: tuple[int, ...], sparsity: float, **options: float) -> tuple[int, int, int]:
        size = GroupOptions(**options).size(shape, sparsity)
        return size.groups, size.channels, size.taps

    assert sizes((64, 64, 3, 3), 0.9) == (8, 6, 9)
    assert sizes((64, 64, 3, 3), 0.9, tap_density=4 / 9) == (8, 14, 4)
    assert sizes((64, 64, 3, 3), 0.9, tap_density=4 / 9, granule=8) == (8, 16, 4)
    assert sizes((64, 64, 1, 1), 0.9, tap_density=4 / 9) == (8, 6, 1)  # a 1x1 kernel has no taps to drop
    assert sizes((64, 64, 3, 3), 0.5, tap_density=4 / 9) == (8, 58, 5)  # ceil(9 * 0.5) taps, round(64 * 0.9) channels
    assert sizes((64, 64, 3, 3), 0) == (8, 64, 9)
    assert sizes((64, 64, 3, 3), 0, tap_density=1 / 9) == (8, 64, 9)
    assert sizes((64, 64, 3, 3), 1 - 1e-12, granule=16) == (8, 16, 9)
    assert sizes((60, 4, 1, 1), 0) == (6, 4, 1)  # 8 and 7 do not divide 60
    assert sizes((16, 4, 1, 1), 0) == (2, 4, 1)  # groups of at least 8
    assert sizes((4, 4, 1, 1), 0) == (1, 4, 1)
    assert sizes((96, 4, 1, 1), 0, row_granule=16) == (6, 4, 1)
    assert sizes((13, 4, 1, 1), 0, groups=13, min_rows=1) == (13, 4, 1)


@settings(max_examples=200)
@given(
    st.integers(1, 96), st.integers(1, 96), st.integers(1, 96), st.integers(1, 9), st.sampled_from([1, 2, 4])
)  # fmt: skip
def test_the_default_of_models_is_the_least_number_of_groups_that_covers(k, c, channels, min_rows, run):
    """Never fewer groups than the 8 of at least 8 filters; more only where those leave channels unread."""
    channels, row_granule = min(channels, c), run if k % run == 0 else 1
    options = GroupOptions(groups=None, min_rows=min_rows, row_granule=row_granule)
    able = [t for t in range(1, k + 1) if k % t == 0 and k // t >= min_rows and k // t % row_granule == 0] or [1]
    usual = max((t for t in able if t <= 8 and k // t >= 8), default=1)
    covering = [t for t in able if t * channels >= c and t >= usual]
    assert options.count((k, c, 3, 3), channels) == min(covering, default=max(able))


def test_coverage_and_unread_channels():
    """By hand: 16 filters in 2 groups that read 2 of 16 channels each, as 8 filters a group make it at 87.5%."""
    score = torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    few, all_read = (regroup(score, 0.875, balanced=True, groups=t, min_rows=n) for t, n in ((8, 8), (None, 2)))
    assert (few.groups, few.coverage, few.unread) == (2, 0.25, 12)
    assert (all_read.groups, all_read.coverage, all_read.unread) == (8, 1.0, 0)
    one = Grouping((2, 4, 1, 1), torch.arange(2), torch.tensor([[0, 1], [1, 2]]), torch.zeros(2, 1).long())
    assert (one.coverage, one.unread) == (1.0, 1)  # channel 1 is read twice


@settings(max_examples=60)
@given(layers(balanced=True))
def test_balanced_channels_are_kept_equally_often(layer):
    g = layer.regroup()
    c = layer.shape[1]
    times = torch.bincount(g.channels.flatten(), minlength=c)
    even = g.groups * g.channels.shape[1] / c
    assert math.floor(even + 1e-9) <= int(times.min())
    assert int(times.max()) <= math.ceil(even - 1e-9)


@pytest.mark.parametrize("method", ["assign", "paper"])
def test_channels_that_all_filters_want_are_shared_out(method):
    score = scores("zeros", (16, 12, 3, 3), 0) * torch.arange(12).view(1, -1, 1, 1)  # channel 0 is worth nothing
    options = {"groups": 4, "min_rows": 1, "method": method}
    fair, free = (regroup(score, 0.7, **options, balanced=balanced).channels for balanced in (True, False))
    assert fair.shape == free.shape == (4, 4)
    assert sorted(torch.bincount(fair.flatten(), minlength=12).tolist()) == [1] * 8 + [2] * 4
    assert int(torch.bincount(free.flatten(), minlength=12).min()) == 0


@settings(max_examples=20)
@given(layers())
def test_the_same_seed_gives_the_same_groups(layer):
    first, second = layer.regroup(), layer.regroup()
    torch.manual_seed(layer.seed)  # the global generator has no say
    third = layer.regroup()
    for name in ("row_order", "channels", "taps"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(getattr(first, name), getattr(third, name))


def test_another_seed_gives_another_search():
    found = {
        tuple(regroup(scores("dense", (24, 8, 3, 3), 0), 0.8, min_rows=3, method="paper", seed=i).row_order.tolist())
        for i in range(8)
    }
    assert len(found) > 1


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    regroup(scores("dense", (16, 8, 3, 3), 0), 0.8, min_rows=2)
    assert torch.equal(torch.rand(3), expected)


@settings(max_examples=25)
@given(layers(), st.sampled_from([-60, -3, 1, 40]))
def test_the_unit_of_the_score_changes_nothing(layer, exponent):
    scaled = regroup(
        torch.ldexp(layer.score, torch.tensor(exponent)),
        layer.sparsity,
        **{**layer.options, "seed": layer.seed % 2**31},
    )
    assert torch.equal(scaled.mask(), layer.regroup().mask())


@settings(max_examples=12)
@given(layers(kinds=["counts"]), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_dtypes_and_layouts_of_the_score(layer, dtype):
    options = {**layer.options, "seed": layer.seed % 2**31}
    expected = regroup(layer.score, layer.sparsity, **options).mask()
    strided = torch.stack([layer.score, -layer.score], -1)[..., 0]
    assert not strided.is_contiguous() or strided.numel() == 1
    for score in (layer.score.to(dtype), strided, layer.score.to(memory_format=torch.channels_last)):
        assert torch.equal(regroup(score, layer.sparsity, **options).mask(), expected)
    in_graph = layer.score.requires_grad_()
    g = regroup(in_graph, layer.sparsity, **options)
    assert torch.equal(g.mask(), expected)
    assert g.retained(in_graph) == g.retained(in_graph.detach())
    some = layer.score > 0
    assert torch.equal(
        regroup(some, layer.sparsity, **options).mask(), regroup(some.float(), layer.sparsity, **options).mask()
    )


# ---------------------------------------------------------------- there and back


@settings(max_examples=60)
@given(layers())
def test_mask_grouping_and_pattern_round_trip(layer):
    g = layer.regroup()
    mask = g.mask()
    back = Grouping.from_mask(mask, g.groups)
    assert torch.equal(back.mask(), mask)
    assert (back.groups, back.channels.shape, back.taps.shape) == (g.groups, g.channels.shape, g.taps.shape)
    assert back.granule % g.granule == 0
    kinds = {(tuple(c), tuple(p)) for c, p in zip(g.channels.tolist(), g.taps.tolist(), strict=True)}
    if len(kinds) == g.groups:
        for name in ("row_order", "channels", "taps"):
            assert torch.equal(getattr(back, name), getattr(g, name))
        assert Grouping.from_mask(mask).groups == g.groups
    for bk in [d for d in range(1, g.rows + 1) if g.rows % d == 0]:
        for bc in [d for d in range(1, g.granule + 1) if g.granule % d == 0]:
            pattern = g.pattern((bk, bc))
            assert torch.equal(pattern.to_mask(), mask)
            assert pattern.nnzb * bk * bc == int(mask.sum())
    assert g.pattern() == g.pattern(g.blocksize)
    assert g.blocksize == (g.rows, g.granule)
    order = g.pattern().row_order
    assert (list(range(layer.shape[0])) if order is None else order.tolist()) == g.row_order.tolist()


def test_blocks_of_many_rows_are_cut():
    g = Grouping((300, 2, 1, 1), torch.arange(300), torch.zeros(1, 1).long(), torch.zeros(1, 1).long())
    assert g.blocksize == (100, 1)
    assert g.pattern().nnzb == 3


PRODUCTS = [
    ((16, 16, 3, 3), {"groups": 2, "granule": 8, "tap_density": 4 / 9}),
    ((32, 16, 1, 1), {"groups": 4, "granule": 8, "balanced": True}),
    ((16, 32, 2, 3), {"groups": 2, "granule": 16, "row_granule": 4, "method": "paper"}),
]


@pytest.mark.device
@pytest.mark.parametrize(
    ("backend", "device", "shape", "options"),
    [
        pytest.param(*runner, *layer, marks=pytest.mark.slow if runner == ("cupy", "cpu") and i else [])
        for runner in RUNNERS
        for i, layer in enumerate(PRODUCTS)
    ],
)
def test_all_three_products_through_the_pattern(backend, device, shape, options):
    g = regroup(scores("heavy", shape, 7).to(device), 0.6, **options)
    mask, pattern = g.mask(), g.pattern()
    generator = torch.Generator().manual_seed(2)
    conv = ((2, 1), (1, 1), (1, 1))
    weight = nonzero(shape, torch.float32, generator).to(device)
    x = nonzero((2, shape[1], 5, 4), torch.float32, generator).to(device)
    values = pattern.values_from_dense(weight)
    assert torch.equal(pattern.to_dense(values), weight * mask)
    y = F.conv2d(x, weight * mask, None, *conv)
    dy = nonzero(tuple(y.shape), torch.float32, generator).to(device)
    assert_products(x, values, pattern, None, dy, *conv, backend)
    # And by autograd against the dense convolution with the mask.
    x64, w64 = x.double().cpu().requires_grad_(), weight.double().cpu().requires_grad_()
    F.conv2d(x64, w64 * mask.cpu(), None, *conv).backward(dy.double().cpu())
    x, values = x.requires_grad_(), values.requires_grad_()
    bs.conv2d(x, values, pattern, None, *conv, backend=backend).backward(dy)
    torch.testing.assert_close(x.grad.cpu().double(), x64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pattern.to_dense(values.grad).cpu().double(), w64.grad, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- method="paper", a second time


def numpy_counts(layer: Layer) -> np.ndarray:
    """The non-zeros that Algorithm 1 counts, in runs: [rows, channels, taps]."""
    score = layer.score.numpy().astype(np.float64)
    mask = score != 0
    if mask.all():
        flat = np.argsort(-score.ravel(), kind="stable")[: round((1 - layer.sparsity) * score.size)]
        mask = np.isin(np.arange(score.size), flat).reshape(score.shape)
    k, c, r, s = layer.shape
    h, g = layer.options["row_granule"], layer.options["granule"]
    return mask.reshape(k // h, h, c // g, g, r * s).sum((1, 3))


def kernel_mask(layer: Layer, counts: np.ndarray, taps: int) -> np.ndarray:
    """Step 1: the kernels with the most non-zeros, the first ones among equals."""
    per_kernel = counts.sum(2)
    area = layer.shape[2] * layer.shape[3]
    number = round(per_kernel.size * min(1.0, (1 - layer.sparsity) * area / taps))
    best = sorted(range(per_kernel.size), key=lambda i: (-per_kernel.flat[i], i))[:number]
    kernels = np.zeros(per_kernel.size, dtype=bool)
    kernels[best] = True
    return kernels.reshape(per_kernel.shape)


@settings(max_examples=100)
@given(layers(balanced=False))
def test_channels_and_taps_by_algorithm_1(layer):
    """Steps 1, 3 and 4, for the groups that it found."""
    g = layer.regroup(method="paper")
    h, granule = layer.options["row_granule"], layer.options["granule"]
    counts = numpy_counts(layer)
    kernels = kernel_mask(layer, counts, g.taps.shape[1])
    for rows, channels, taps in zip(
        g.row_order.view(g.groups, -1).tolist(), g.channels.tolist(), g.taps.tolist(), strict=True
    ):
        runs = sorted({row // h for row in rows})
        key = [(-int(kernels[runs, c].sum()), -int(counts[runs, c].sum()), c) for c in range(counts.shape[1])]
        chosen = sorted(c for *_, c in sorted(key)[: len(channels) // granule])
        assert channels == [c * granule + i for c in chosen for i in range(granule)]
        per_tap = counts[runs][:, chosen].sum((0, 1))
        assert taps == sorted(sorted(range(counts.shape[2]), key=lambda p: (-per_tap[p], p))[: len(taps)])


def jaccard(kernels: np.ndarray, groups: np.ndarray) -> float:
    """Mean similarity of the rows of a group, a row at a time."""
    total, pairs = 0.0, 0
    for rows in groups:
        for i, j in itertools.combinations(rows, 2):
            either = (kernels[i] | kernels[j]).sum()
            total += (kernels[i] & kernels[j]).sum() / either if either else 0.0
            pairs += 1
    return total / max(1, pairs)


@pytest.mark.parametrize("seed", range(12))
def test_rows_of_a_group_are_similar(seed):
    """Step 2: clearly more alike than at random, though these filters share nothing but chance."""
    kind = ["zeros", "dense", "filters", "counts"][seed % 4]
    layer = Layer(kind, (24, 16, 3, 3), 0.8, seed, {"groups": 4, "min_rows": 1, "granule": 1, "row_granule": 1})
    g = layer.regroup(method="paper")
    kernels = kernel_mask(layer, numpy_counts(layer), 9)
    random = np.random.default_rng(seed)
    chance = np.mean([jaccard(kernels, random.permutation(24).reshape(4, 6)) for _ in range(50)])
    assert jaccard(kernels, g.row_order.view(4, -1).numpy()) >= 1.2 * chance


@settings(max_examples=30)
@given(layers(kinds=["zeros", "counts", "filters"]))
def test_the_paper_never_looks_at_sizes(layer):
    score = layer.score
    other = score * torch.rand(score.shape, generator=torch.Generator().manual_seed(1)).add(0.01)
    if (score > 0).all():
        return  # a dense score is counted by its highest cells
    found = regroup(other, layer.sparsity, **{**layer.options, "seed": layer.seed % 2**31, "method": "paper"})
    assert torch.equal(found.mask(), layer.regroup(method="paper").mask())


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.data(), SEEDS)
def test_one_group_alone_by_counts(rows, runs, granule, area, data, seed):
    channels, taps = data.draw(st.integers(1, runs)), data.draw(st.integers(1, area))
    cells = torch.rand(rows, runs * granule, area, generator=torch.Generator().manual_seed(seed)) < 0.4
    found_channels, found_taps = keep_by_counts(cells, channels * granule, taps, granule)
    counts = cells.numpy().reshape(rows, runs, granule, area).sum(2)
    layer = Layer("", (rows, runs, 1, area), 1 - channels * taps / (runs * area), 0)
    kernels = kernel_mask(layer, counts, taps)
    key = [(-kernels[:, c].sum(), -counts[:, c].sum(), c) for c in range(runs)]
    chosen = sorted(c for *_, c in sorted(key)[:channels])
    assert found_channels.tolist() == [c * granule + i for c in chosen for i in range(granule)]
    per_tap = counts[:, chosen].sum((0, 1))
    assert found_taps.tolist() == sorted(sorted(range(area), key=lambda p: (-per_tap[p], p))[:taps])


# ---------------------------------------------------------------- method="assign": never worse, no step loses


@settings(max_examples=80)
@given(layers())
def test_assign_keeps_at_least_what_the_paper_keeps(layer):
    score = layer.score
    assert kept(score, layer.regroup(method="assign")) >= kept(score, layer.regroup(method="paper")) * (1 - 1e-6)


def test_assign_keeps_clearly_more_of_a_trained_layer():
    score = scores("heavy", (32, 32, 3, 3), 0)
    best, paper = (
        regroup(score, 0.9, tap_density=4 / 9, groups=4, method=method).retained(score)
        for method in ("assign", "paper")
    )
    assert best > 1.1 * paper


@settings(max_examples=60)
@given(layers(kinds=["dense", "zeros", "heavy", "counts"]))
def test_no_half_step_loses(layer):
    """From random rows, channels and taps; each half-step is also the best, as trying single changes shows."""
    k, c, r, s = layer.shape
    generator = torch.Generator().manual_seed(layer.seed)
    groups, channels, taps = contract(layer)
    h, granule = layer.options["row_granule"], layer.options["granule"]
    cells = layer.score.double().view(k // h, h, c // granule, granule, r * s).sum((1, 3))
    size = GroupShape(groups, channels, taps)
    search = _Search(cells, size, granule, layer.options["balanced"], 0)

    def some(axis: int, count: int) -> Tensor:
        ranks = torch.rand(1, groups, axis, generator=generator).argsort(2).argsort(2)
        return ranks < count

    order = torch.randperm(search.rows, generator=generator).view(groups, -1)
    member = torch.zeros(1, groups, search.rows, dtype=torch.bool)
    member[0].scatter_(1, order, True)
    chosen = some(search.channels, search.kept_channels)
    if search.balanced:  # fair ones
        turns = torch.arange(groups * search.kept_channels) % search.channels
        chosen = torch.zeros_like(chosen)
        chosen[0].scatter_(1, turns.view(groups, -1), True)
    kept_taps = some(search.taps, taps)

    def value(member: Tensor, chosen: Tensor, kept_taps: Tensor) -> float:
        return float(
            torch.einsum("gk,gc,gp,kcp->", member[0].double(), chosen[0].double(), kept_taps[0].double(), cells)
        )

    def highest(value: Tensor, count: int) -> float:
        return float(value.sort(1, descending=True).values[:, :count].sum())

    steps = [value(member, chosen, kept_taps)]
    for _ in range(3):
        sums = torch.einsum("gk,kcp->gcp", member[0].double(), cells)
        chosen = search.best_channels(search.sums(member), kept_taps)
        steps.append(value(member, chosen, kept_taps))
        if not search.balanced:
            assert steps[-1] == pytest.approx(highest((sums * kept_taps[0, :, None]).sum(2), search.kept_channels))
        kept_taps = search.best_taps(search.sums(member), chosen)
        steps.append(value(member, chosen, kept_taps))
        assert steps[-1] == pytest.approx(highest((sums * chosen[0, :, :, None]).sum(1), taps))
        member = search.best_rows(search.worth(chosen, kept_taps))
        steps.append(value(member, chosen, kept_taps))
    slack = 1e-9 * float(cells.sum())
    assert all(after >= before - slack for before, after in itertools.pairwise(steps)), steps
    assert (member.sum(1) == 1).all()
    assert (member.sum(2) == search.rows // groups).all()
    # What the last half-step found cannot be bettered by exchanging two rows.
    group, worth = member[0].int().argmax(0), search.worth(chosen, kept_taps)[0]
    own = worth[group, torch.arange(search.rows)]
    swapped = worth[group[None], torch.arange(search.rows)[:, None]]
    assert (swapped + swapped.t() <= own[:, None] + own[None] + slack).all()
    found, total = _alternate(search, _Found(member, chosen, kept_taps))
    assert float(total) >= steps[-1] - slack
    assert float(total) == pytest.approx(value(found.member, found.channels, found.taps))


# ---------------------------------------------------------------- planted structures


@pytest.mark.parametrize("method", ["assign", "paper"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(
    ("k", "c", "kernel", "groups", "channels", "taps", "granule"),
    [
        (24, 16, (3, 3), 4, 4, 4, 1),
        (32, 16, (3, 3), 8, 2, 9, 1),
        (16, 32, (1, 1), 4, 8, 1, 8),
        (24, 24, (2, 2), 3, 8, 2, 2),
        (16, 16, (3, 3), 2, 8, 3, 1),
    ],
)
@pytest.mark.parametrize("noise", ["zero", "small"])
def test_planted_groups_are_found_again(method, balanced, k, c, kernel, groups, channels, taps, granule, noise):
    """Groups with channels and taps of their own, filters in random order, and what is not kept small."""
    area = kernel[0] * kernel[1]
    generator = torch.Generator().manual_seed(k + c + taps)
    runs = torch.randperm(c // granule, generator=generator).view(groups, -1)[:, : channels // granule].sort(1).values
    own_channels = (runs[:, :, None] * granule + torch.arange(granule)).flatten(1)
    own_taps = torch.stack([torch.randperm(area, generator=generator)[:taps].sort().values for _ in range(groups)])
    planted = Grouping((k, c, *kernel), torch.randperm(k, generator=generator), own_channels, own_taps, granule).mask()
    u = torch.rand(planted.shape, generator=generator)
    score = (0.7 + 0.3 * u) * planted + (0.2 * u * ~planted if noise == "small" else 0)
    found = regroup(
        score,
        1 - channels * taps / (c * area),
        groups=groups,
        tap_density=taps / area,
        granule=granule,
        min_rows=1,
        balanced=balanced,
        method=method,
    )
    assert torch.equal(found.mask(), planted)


# ---------------------------------------------------------------- the order of the filters


def tie_free(shape: tuple[int, ...], seed: int) -> Tensor:
    """Different whole numbers whose sums are exact in any order; filters of different size."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(2**16, generator=generator)[: math.prod(shape)].view(shape).double()
    sizes = 1 + torch.rand(shape[0], generator=generator, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return (numbers * sizes * 2**30).floor() + 1


@pytest.mark.parametrize("seed", [1, 3, 4, 5, 8, 9, 10, 11])
@pytest.mark.parametrize("method", ["assign", "paper"])
def test_permuted_filters_are_regrouped_alike(seed, method):
    """1x1 kernels: the counts of larger ones have ties, which Algorithm 1 breaks by the order of the filters."""
    score = tie_free((12, 997, 1, 1), seed)
    rows = np.argsort(np.argsort(-score.numpy().ravel())).reshape(12, -1) < round(0.3 * score.numel())
    similar = {(rows[i] & rows[j]).sum() / (rows[i] | rows[j]).sum() for i, j in itertools.combinations(range(12), 2)}
    assert (len(score.unique()), len(similar), len(set(rows.sum(1)))) == (score.numel(), 66, 12)  # no ties
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    options = {"groups": 3, "min_rows": 1, "method": method, "seed": seed}
    first, second = regroup(score, 0.7, **options), regroup(score[order], 0.7, **options)
    assert torch.equal(second.mask(), first.mask()[order])
    assert {tuple(sorted(order[rows].tolist())) for rows in second.row_order.view(3, -1)} == {
        tuple(rows) for rows in first.row_order.view(3, -1).tolist()
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("balanced", [False, True])
def test_the_search_follows_permuted_filters(seed, balanced):
    """With taps, from the same start."""
    cells = tie_free((12, 10, 9), seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    size = GroupShape(3, 4, 4)
    member = torch.eye(3, dtype=torch.bool).repeat_interleave(4, 1)[None]
    channels = (torch.arange(12).view(1, 3, 4) % 10)[..., None] == torch.arange(10)
    taps = torch.arange(9).expand(1, 3, -1) < 4
    first, second = (
        _by_score(_Search(cells[rows], size, 1, balanced, seed), _Found(member[..., rows], channels.any(2), taps))
        for rows in (torch.arange(12), order)
    )

    def groups(found: _Found, names: list[int]) -> set:
        return {
            (tuple(sorted(names[i] for i in m.nonzero()[:, 0].tolist())), *(tuple(t.tolist()) for t in (c, p)))
            for m, c, p in zip(found.member[0], found.channels[0], found.taps[0], strict=True)
        }

    assert groups(second, order.tolist()) == groups(first, list(range(12)))


# ---------------------------------------------------------------- the optimum of tiny layers


def partitions(rows: tuple[int, ...], size: int) -> list[list[tuple[int, ...]]]:
    """Every way to cut rows into groups of this size."""
    if not rows:
        return [[]]
    return [
        [(rows[0], *rest), *others]
        for rest in itertools.combinations(rows[1:], size - 1)
        for others in partitions(tuple(r for r in rows[1:] if r not in rest), size)
    ]


def optimum(score: np.ndarray, groups: int, channels: int, taps: int, balanced: bool) -> float:
    """The most that any grouping keeps, by trying all; score [K, C, taps]."""
    k, c, area = score.shape
    subsets = np.array([[i in s for i in range(c)] for s in itertools.combinations(range(c), channels)], dtype=float)
    picks = np.array(list(itertools.product(range(len(subsets)), repeat=groups)))
    times = subsets[picks].sum(1)
    lo = groups * channels // c
    fair = picks[((times >= lo) & (times <= lo + 1)).all(1)] if balanced else picks
    best = 0.0
    for partition in partitions(tuple(range(k)), k // groups):
        # worth[g, subset]: the group with these channels and its best taps
        sums = np.stack([score[list(rows)].sum(0) for rows in partition])
        worth = np.sort(np.einsum("sc,gcp->gsp", subsets, sums), axis=2)[:, :, area - taps :].sum(2)
        best = max(best, worth[np.arange(groups), fair].sum(1).max())
    return best


TINY = [  # K, C, kernel, groups, channels, taps
    (6, 4, (1, 3), 2, 2, 1),
    (6, 4, (2, 2), 3, 2, 2),
    (6, 5, (1, 1), 3, 2, 1),
    (8, 4, (1, 2), 2, 1, 2),
    (8, 3, (2, 2), 4, 1, 2),
    (6, 4, (3, 3), 2, 2, 4),
]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kind", ["dense", "heavy", "zeros", "counts"])
def test_tiny_layers_reach_their_optimum_or_nearly(kind, balanced):
    """Never 5% below the optimum, and mostly at it."""
    reached = []
    for (k, c, kernel, groups, channels, taps), seed in itertools.product(TINY, range(2)):
        area = kernel[0] * kernel[1]
        score = scores(kind, (k, c, *kernel), seed)
        g = regroup(
            score,
            1 - channels * taps / (c * area),
            groups=groups,
            tap_density=taps / area,
            min_rows=1,
            balanced=balanced,
            seed=seed,
        )
        assert (g.groups, g.channels.shape[1], g.taps.shape[1]) == (groups, channels, taps)
        reached.append(
            kept(score, g) / optimum(score.double().view(k, c, area).numpy(), groups, channels, taps, balanced)
        )
    assert max(reached) <= 1 + 1e-6
    assert min(reached) >= 0.95
    assert sum(share > 1 - 1e-6 for share in reached) >= 10


# ---------------------------------------------------------------- what is refused


ONES = torch.ones(16, 8, 3, 3)


@pytest.mark.parametrize(
    ("score", "sparsity", "options", "message"),
    [
        (ONES, 0.5, {"method": "best"}, "method is 'best'; it needs 'assign' or 'paper'"),
        (ONES[0], 0.5, {}, "score has shape (8, 3, 3); it needs [K, C, R, S], none of them 0"),
        (ONES[:0], 0.5, {}, "score has shape (0, 8, 3, 3); it needs [K, C, R, S], none of them 0"),
        (ONES[..., :0], 0.5, {}, "score has shape (16, 8, 3, 0); it needs [K, C, R, S], none of them 0"),
        (ONES.long(), 0.5, {}, "score is torch.int64; it needs floating point or bool"),
        *[
            (ONES * bad, 0.5, {}, "score has cells that are negative, infinite or NaN; it needs finite ones >= 0")
            for bad in (math.nan, math.inf, -math.inf, -1)
        ],
        *[(ONES, bad, {}, f"sparsity is {bad!r}; it needs a number in [0, 1)") for bad in (1, 1.0, -0.5, math.nan)],
        *[
            (ONES, 0.5, {"tap_density": bad}, f"tap_density is {bad!r}; it needs a number in (0, 1]")
            for bad in (0, 1.1, -1, math.nan)
        ],
        *[
            (ONES, 0.5, {name: bad}, f"{name} is {bad}; it needs a positive integer")
            for name in ("groups", "granule", "row_granule", "min_rows")
            for bad in (0, -8)
        ],
        (ONES, 0.5, {"granule": 3}, "granule is 3; it needs a divisor of C = 8 (1 takes any C)"),
        (ONES, 0.5, {"row_granule": 3}, "row_granule is 3; it needs a divisor of K = 16 (1 takes any K)"),
    ],
)
def test_what_cannot_be_regrouped_is_refused(score, sparsity, options, message):
    with pytest.raises(ValueError, match=r"^regroup\(\): ") as error:
        regroup(score, sparsity, **options)
    assert str(error.value) == f"regroup(): {message}"


LONG = {"dtype": torch.int64}
GOOD = {
    "row_order": torch.tensor([1, 0, 2, 3]),
    "channels": torch.tensor([[0, 1], [2, 3]]),
    "taps": torch.tensor([[0], [1]]),
    "granule": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_order": torch.arange(4).int()}, "row_order is torch.int32 with 1 axes; it needs int64 with 1"),
        ({"taps": torch.zeros(2, **LONG)}, "taps is torch.int64 with 1 axes; it needs int64 with 2"),
        ({"row_order": torch.arange(3)}, "row_order is no permutation of 0 .. 3"),
        ({"row_order": torch.tensor([0, 1, 1, 3])}, "row_order is no permutation of 0 .. 3"),
        (
            {"taps": torch.zeros(3, 1, **LONG)},
            "channels has 2 groups, taps 3; both need the same number, a divisor of K = 4",
        ),
        (
            {"channels": torch.zeros(3, 2, **LONG), "taps": torch.zeros(3, 1, **LONG)},
            "channels has 3 groups, taps 3; both need the same number, a divisor of K = 4",
        ),
        ({"channels": torch.tensor([[1, 0], [2, 3]])}, "channels needs rows that ascend, within 0 .. 3"),
        ({"channels": torch.tensor([[0, 1], [3, 4]])}, "channels needs rows that ascend, within 0 .. 3"),
        ({"channels": torch.tensor([[-1, 0], [2, 3]])}, "channels needs rows that ascend, within 0 .. 3"),
        ({"channels": torch.zeros(2, 0, **LONG)}, "channels needs rows that ascend, within 0 .. 3"),
        ({"taps": torch.tensor([[0], [2]])}, "taps needs rows that ascend, within 0 .. 1"),
        ({"granule": 3}, "granule is 3; it needs a divisor of C and of channels' width"),
        ({"granule": 0}, "granule is 0; it needs a divisor of C and of channels' width"),
        ({"channels": torch.tensor([[0, 1], [1, 2]])}, "channels are not in aligned runs of granule = 2"),
        ({"channels": torch.tensor([[0, 1], [0, 3]])}, "channels are not in aligned runs of granule = 2"),
    ],
)
def test_tensors_that_are_no_groups_are_refused(change, message):
    Grouping((4, 4, 1, 2), **GOOD)
    with pytest.raises(ValueError, match=r"^Grouping\(\): ") as error:
        Grouping((4, 4, 1, 2), **{**GOOD, **change})
    assert str(error.value) == f"Grouping(): {message}"


def test_other_refusals():
    g = Grouping((4, 4, 1, 2), **GOOD)
    assert repr(g) == (
        "Grouping((4, 4, 1, 2), 2 groups of 2, channels 2 of 4, taps 1 of 2, density 0.2500, coverage 1.00, rows moved)"
    )
    for blocksize in ((3, 1), (1, 4), (4, 2), (0, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"bk needs to divide 2, the rows of a group, and bc 2, the granule"):
            g.pattern(blocksize)
    with pytest.raises(ValueError, match=r"score has shape \(4, 4, 2, 1\); it needs \(4, 4, 1, 2\)"):
        g.retained(torch.ones(4, 4, 2, 1))
    assert g.retained(torch.zeros(4, 4, 1, 2)) == 1.0


def mask_of(*rows: list[list[int]]) -> Tensor:
    """bool [K, C, 1, S] from one matrix [C, S] for each filter."""
    return torch.tensor(rows, dtype=torch.bool)[:, :, None]


A, B, C = [[1, 1], [0, 0]], [[0, 0], [1, 1]], [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("mask", "groups", "message"),
    [
        (
            torch.ones(2, 2, 1, 1),
            None,
            "mask is torch.float32 (2, 2, 1, 1); it needs bool [K, C, R, S], none of them 0",
        ),
        (mask_of(A)[0], None, "mask is torch.bool (2, 1, 2); it needs bool [K, C, R, S], none of them 0"),
        (mask_of(A)[:0], None, "mask is torch.bool (0, 2, 1, 2); it needs bool [K, C, R, S], none of them 0"),
        (mask_of(A, B), 3, "groups is 3; it needs a divisor of K = 2"),
        (mask_of(A, B), 0, "groups is 0; it needs a divisor of K = 2"),
        (mask_of(A, A, A, B), 2, "[1, 3] filters have equal masks; groups of 2 need multiples of that"),
        (mask_of(A, C), None, "a group does not keep channels x taps: its channels differ in taps"),
        (mask_of(A, [[1, 1], [1, 1]]), None, "groups keep [1, 2] channels; they need equally many"),
        (mask_of(A, [[1, 0], [0, 0]]), None, "groups keep [1, 2] taps; they need equally many"),
        (mask_of([[0, 0], [0, 0]]), None, "groups keep [0] channels; they need equally many"),
    ],
)
def test_masks_without_groups_are_refused(mask, groups, message):
    with pytest.raises(ValueError, match=r"^Grouping.from_mask\(\): ") as error:
        Grouping.from_mask(mask, groups)
    assert str(error.value) == f"Grouping.from_mask(): {message}"


def test_filters_with_equal_masks_are_cut_into_as_few_groups_as_possible():
    g = Grouping.from_mask(mask_of(A, B, A, A, B, A))
    assert g.row_order.tolist() == [0, 2, 1, 4, 3, 5]
    assert g.channels.tolist() == [[0], [1], [0]]
    assert Grouping.from_mask(mask_of(A, A, A)).groups == 1
    assert Grouping.from_mask(mask_of(A, A, A), 3).groups == 3


def test_groupings_compare_by_content():
    score = torch.rand(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    one, same = regroup(score, 0.8, groups=4), regroup(score, 0.8, groups=4)
    assert one == same
    assert one != regroup(score, 0.8, groups=2)
    assert one != regroup(score.flip(0), 0.8, groups=4)
    assert one != "a grouping"
