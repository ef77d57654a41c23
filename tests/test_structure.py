"""Every structure against a mask made from its definition, one grain at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrbp.structures.registry import STRUCTURES, choose, make_mask, structure
from hrbp.structures.regrouping import regroup

SEEDS = st.integers(0, 2**32 - 1)
SPARSITIES = st.sampled_from([0, 0.25, 0.5, 0.75, 0.9, 0.99, 1 - 1e-9]) | st.floats(0, 0.999)

# Each name with its options and the (K, C) that it needs multiples of.
GRAINS = [
    ("unstructured", {}, (1, 1)),
    ("vector", {}, (1, 1)),
    ("kernel", {}, (1, 1)),
    ("filter", {}, (1, 1)),
    ("channel", {}, (1, 1)),
    ("block", {"blocksize": (2, 4)}, (2, 4)),
    ("block", {"blocksize": (3, 1)}, (3, 1)),
    ("1xn", {"n": 4}, (4, 1)),
    ("1xn", {"n": 3, "uniform": True}, (3, 1)),
    ("1xn", {"n": 2, "rearrange": True}, (2, 1)),
    ("1xn", {"n": 2, "uniform": True, "rearrange": True}, (2, 1)),
]
OTHERS = [
    ("2:4", {}, (1, 4)),
    ("n:m", {"m": 2, "n": 1}, (1, 2)),
    ("elementwise", {"groups": 3, "min_rows": 1}, (1, 1)),
    ("hrbp", {"groups": 4, "min_rows": 2, "granule": 2}, (1, 2)),
    ("hrbp", {"groups": 2, "row_granule": 2, "balanced": True}, (2, 1)),
    ("hrbp++", {"groups": 3, "min_rows": 1, "method": "paper"}, (1, 1)),
    ("hrbp++", {"row_granule": None, "min_rows": 2}, (1, 1)),
]


def whole_numbers(shape: tuple[int, ...], seed: int, highest: int = 40) -> Tensor:
    """Scores whose sums are exact, with ties."""
    return torch.randint(0, highest, shape, generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def cases(draw: st.DrawFn, table: list) -> tuple[str, dict, Tensor]:
    name, options, (bk, bc) = draw(st.sampled_from(table))
    shape = (
        bk * draw(st.integers(1, 5)),
        bc * draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    return name, options, whole_numbers(shape, draw(SEEDS))


def grains_of(name: str, options: dict, shape: tuple[int, ...]) -> list[list[tuple[slice, ...]]]:
    """The grains of each separate choice, in order, as slices of the filter bank."""
    k, c, r, s = shape
    n = options.get("n")
    bk, bc = options.get("blocksize", (None, None))
    box = {
        "unstructured": (1, 1, 1, 1),
        "vector": (1, 1, 1, s),
        "kernel": (1, 1, r, s),
        "filter": (1, c, r, s),
        "channel": (k, 1, r, s),
        "block": (bk, bc, 1, 1),
        "1xn": (n, 1, r, s),
    }[name]
    starts = itertools.product(*(range(0, axis, size) for axis, size in zip(shape, box, strict=True)))
    grains = [tuple(slice(a, a + size) for a, size in zip(start, box, strict=True)) for start in starts]
    if not options.get("uniform"):
        return [grains]
    return [[g for g in grains if g[0].start == first] for first in range(0, k, box[0])]


@settings(max_examples=200)
@given(cases(GRAINS), SPARSITIES)
def test_the_best_grains_stay(case, sparsity):
    name, options, score = case
    filters = list(range(len(score)))
    if options.get("rearrange"):
        filters.sort(key=lambda i: (-float(score[i].sum()), i))
    ordered, expected = score[filters], np.zeros(score.shape, dtype=bool)
    for grains in grains_of(name, options, tuple(score.shape)):
        count = max(1, round((1 - sparsity) * len(grains)))
        best = sorted(range(len(grains)), key=lambda i: (-float(ordered[grains[i]].sum()), i))[:count]
        for i in best:
            expected[grains[i]] = True
    choice = choose(score, sparsity, name, **options)
    assert np.array_equal(choice.mask.numpy()[filters], expected)
    assert (list(range(len(score))) if choice.row_order is None else choice.row_order.tolist()) == filters


@settings(max_examples=80)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.data(), SEEDS)
def test_n_of_m_neighbouring_input_channels(m, runs, k, area, data, seed):
    n = data.draw(st.integers(1, m))
    score = whole_numbers((k, runs * m, 1, area), seed, 4)
    mask = make_mask(score, 1 - n / m, "n:m", m=m)
    assert torch.equal(mask, make_mask(score, 1 - n / m, f"{n}:{m}"))
    assert torch.equal(mask, make_mask(score, 1 - n / m, "n:m", m=m, n=n))
    if m == 4:
        assert torch.equal(mask, make_mask(score, 1 - n / m, "n:m"))
    for row, run, tap in itertools.product(range(k), range(runs), range(area)):
        cells = score[row, run * m : run * m + m, 0, tap]
        best = sorted(range(m), key=lambda i: (-float(cells[i]), i))[:n]
        assert mask[row, run * m : run * m + m, 0, tap].nonzero()[:, 0].tolist() == sorted(best)


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), SPARSITIES, SEEDS)
def test_elementwise_shares_cells_in_a_group(groups, rows, c, sparsity, seed):
    k = groups * rows
    score = whole_numbers((k, c, 2, 2), seed)
    made = choose(score, sparsity, "elementwise", groups=groups, min_rows=rows)
    cells = c * 4
    kept = max(1, round(cells * (1 - sparsity)))
    order = torch.arange(k) if made.row_order is None else made.row_order
    by_group = made.mask.view(k, cells)[order].view(groups, rows, cells)
    assert (by_group == by_group[:, :1]).all()
    assert (by_group.sum(2) == kept).all()
    # The cells are the best for the filters that share them.
    sums = score.view(k, cells)[order].view(groups, rows, cells).sum(1)
    assert torch.equal((sums * by_group[:, 0]).sum(1), sums.sort(1, descending=True).values[:, :kept].sum(1))
    assert made.blocksize == (rows, 1)
    assert made.grouping is None


@settings(max_examples=40)
@given(cases([row for row in OTHERS if row[0].startswith("hrbp")]), SPARSITIES, SEEDS)
def test_hrbp_is_regroup(case, sparsity, seed):
    name, options, score = case
    made = choose(score, sparsity, name, seed=seed, **options)
    options = {"tap_density": 4 / 9 if name == "hrbp++" else 1.0, **options}
    if options.get("row_granule", 1) is None:
        fits = [t for t in range(1, 9) if score.shape[0] % t == 0 and score.shape[0] // t >= options["min_rows"]]
        options["row_granule"] = score.shape[0] // max(fits, default=1)
        assert made.row_order.tolist() == list(range(score.shape[0]))
    g = regroup(score, sparsity, seed=seed, **options)
    assert torch.equal(made.mask, g.mask())
    assert torch.equal(made.row_order, g.row_order)
    assert made.blocksize == g.blocksize
    for field in ("row_order", "channels", "taps", "granule"):
        mine, theirs = getattr(made.grouping, field), getattr(g, field)
        assert mine == theirs if field == "granule" else torch.equal(mine, theirs)


@settings(max_examples=40)
@given(cases([row for row in OTHERS if row[0].startswith("hrbp")]), SPARSITIES, SEEDS)
def test_the_groups_of_a_mask_are_found_again(case, sparsity, seed):
    name, options, score = case
    made = choose(score, sparsity, name, seed=seed, **options)
    back = structure(name, **options).grouping(made.mask, made.row_order)
    for field in ("row_order", "channels", "taps"):
        assert torch.equal(getattr(back, field), getattr(made.grouping, field))
    assert (back.granule, back.shape) == (made.grouping.granule, made.grouping.shape)


@settings(max_examples=150)
@given(cases(GRAINS + OTHERS), SPARSITIES, SEEDS)
def test_density_is_that_of_the_mask_and_no_zero_is_stored(case, sparsity, seed):
    name, options, score = case
    made = structure(name, **options)
    assert made.refuses(tuple(score.shape)) is None
    if name == "2:4" or name == "n:m":
        sparsity = 0.5
    choice = made.choose(score, sparsity, seed)
    assert made.density(tuple(score.shape), 1 - sparsity) == pytest.approx(float(choice.mask.double().mean()))
    assert torch.equal(make_mask(score, sparsity, name, seed=seed, **options), choice.mask)
    if choice.blocksize is None:
        assert name in ("unstructured", "vector", "2:4", "n:m")
        with pytest.raises(ValueError, match=r"^Selection.pattern\(\): this structure keeps single weights"):
            choice.pattern()
        return
    pattern = choice.pattern()
    assert pattern.blocksize == choice.blocksize
    assert torch.equal(pattern.to_mask(), choice.mask)
    assert pattern.density == pytest.approx(float(choice.mask.double().mean()))


@pytest.mark.parametrize(
    ("name", "options", "blocksize"),
    [
        ("kernel", {}, (1, 1)),
        ("filter", {}, (1, 16)),
        ("channel", {}, (32, 1)),
        ("block", {"blocksize": (8, 4)}, (8, 4)),
        ("1xn", {}, (16, 1)),
        ("1xn", {"n": 8, "uniform": True}, (8, 1)),
        ("1xn", {"n": 2, "rearrange": True}, (2, 1)),
        ("elementwise", {}, (8, 1)),
        ("hrbp", {}, (8, 1)),
        ("hrbp", {"groups": 2, "granule": 8}, (16, 8)),
        ("hrbp++", {"granule": 4}, (8, 4)),
    ],
)
def test_the_blocks_are_as_large_as_the_structure_allows(name, options, blocksize):
    made = choose(whole_numbers((32, 16, 3, 3), 0), 0.7, name, **options)
    assert made.blocksize == blocksize
    assert made.pattern().nnzb * math.prod(blocksize) == int(made.mask.sum())


def test_uniform_blocks_are_equally_many_in_every_row():
    score = whole_numbers((16, 10, 3, 3), 1) * torch.arange(16).view(-1, 1, 1, 1)
    uniform = choose(score, 0.7, "1xn", n=4, uniform=True).pattern()
    assert uniform.indptr.diff().tolist() == [27] * 4
    assert len(set(choose(score, 0.7, "1xn", n=4).pattern().indptr.tolist())) < 5  # the heavy filters take all


def test_without_a_row_granule_filters_stay_where_they_are():
    score = whole_numbers((16, 8, 3, 3), 3)
    stay, move = (choose(score, 0.7, "hrbp++", groups=4, min_rows=4, row_granule=rows) for rows in (None, 1))
    assert stay.row_order.tolist() == list(range(16)) != move.row_order.tolist()
    assert stay.grouping.groups == move.grouping.groups == 4


def test_finer_structures_keep_more():
    score = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)).abs()
    retained = [
        float((score * make_mask(score, 0.5, name, **options)).sum())
        for name, options in [
            ("unstructured", {}),
            ("2:4", {}),
            ("vector", {}),
            ("kernel", {}),
            ("hrbp", {"groups": 2}),
            ("channel", {}),
        ]
    ]
    assert retained == sorted(retained, reverse=True)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool])
def test_scores_of_other_kinds(name, dtype):
    options = {"block": {"blocksize": (4, 2)}, "1xn": {"n": 4}}.get(name, {})
    score = whole_numbers((16, 8, 3, 3), 5, 2 if dtype == torch.bool else 40)
    expected = make_mask(score, 0.5, name, **options)
    assert expected.shape == score.shape
    assert expected.dtype == torch.bool
    others = [score.to(dtype)]
    if dtype == torch.float64:  # once for each structure
        strided = torch.stack([score, -score], 0).permute(1, 2, 3, 4, 0)[..., 0]
        others += [strided.clone(memory_format=torch.channels_last), strided, score.requires_grad_()]
    for other in others:
        assert torch.equal(make_mask(other, 0.5, name, **options), expected)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_matrix_is_a_1x1_convolution(name):
    options = {"block": {"blocksize": (4, 2)}, "1xn": {"n": 4}}.get(name, {})
    score = whole_numbers((16, 8), 2)
    mask = make_mask(score, 0.5, name, **options)
    assert mask.shape == (16, 8)
    assert torch.equal(mask, make_mask(score.view(16, 8, 1, 1), 0.5, name, **options)[..., 0, 0])


@pytest.mark.parametrize("name", STRUCTURES)
def test_scores_of_nothing_still_make_a_mask(name):
    options = {"block": {"blocksize": (4, 2)}, "1xn": {"n": 4}}.get(name, {})
    mask = make_mask(torch.zeros(16, 8, 3, 3), 0.5, name, **options)
    assert float(mask.double().mean()) == pytest.approx(
        structure(name, **options).density((16, 8, 3, 3), 0.5), abs=1e-12
    )


def test_the_default_is_hrbp_plus_plus():
    score = whole_numbers((16, 9, 3, 3), 0)
    expected = regroup(score, 0.8, tap_density=4 / 9).mask()
    assert torch.equal(make_mask(score, 0.8), expected)
    assert expected[:8].any(0).any(0).sum() <= 8  # 4 taps in each of two groups


# ---------------------------------------------------------------- what is refused


ONES = torch.ones(16, 8, 3, 3)


def refused(call: Callable[[], object], error: type[Exception]) -> str:
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("n:m", {"m": 3}, "m = 3 does not divide C = 8"),
        ("n:m", {"m": 0}, "m = 0 does not divide C = 8"),
        ("3:5", {}, "m = 5 does not divide C = 8"),
        ("1xn", {"n": 3}, "grains of 3 do not divide K = 16"),
        ("1xn", {"n": 0}, "grains of 0 do not divide K = 16"),
        ("1xn", {"n": -4}, "grains of -4 do not divide K = 16"),
        ("block", {}, "grains of 32 do not divide K = 16"),
        ("block", {"blocksize": (8, 16)}, "grains of 16 do not divide C = 8"),
        ("block", {"blocksize": (8, 0)}, "grains of 0 do not divide C = 8"),
    ],
)
def test_layers_that_cannot_have_a_structure(name, options, reason):
    made = structure(name, **options)
    assert made.refuses((16, 8, 3, 3)) == reason
    expected = f"make_mask({made.name!r}): layer (16, 8, 3, 3): {reason}; choose one that does, or keep it dense"
    assert refused(lambda: make_mask(ONES, 0.5, name, **options), ValueError) == expected
    assert refused(lambda: made.density((16, 8, 3, 3), 0.5), ValueError) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"granule": 3}, "granule = 3 does not divide 8"),
        ({"granule": 0}, "granule = 0 does not divide 8"),
        ({"row_granule": 3}, "row_granule = 3 does not divide 16"),
    ],
)
def test_layers_that_cannot_be_regrouped(options, reason):
    assert structure("hrbp", **options).refuses((16, 8, 3, 3)) == reason
    message = refused(lambda: make_mask(ONES, 0.5, "hrbp", **options), ValueError)
    assert message.startswith(f"regroup(): {next(iter(options))} is ")


@pytest.mark.parametrize(
    ("name", "sparsity", "options", "message"),
    [
        ("n:m", 0.6, {}, "make_mask('n:m'): sparsity is 0.6; n:4 has 1 - n/4"),
        ("n:m", 0.9, {}, "make_mask('n:m'): sparsity is 0.9; n:4 has 1 - n/4"),
        ("2:4", 0.6, {}, "make_mask('2:4'): sparsity is 0.6; 2:4 has 0.5"),
        ("0:4", 0.5, {}, "structure(): 0:4 would keep 0 of every 4 weights; n:m needs 1 <= n <= m"),
        (
            "8:4",
            0.5,
            {},
            "structure(): 8:4 would keep 8 of every 4 weights; n:m needs 1 <= n <= m; 4:8 keeps 4 of 8",
        ),
        ("block", 0.5, {"blocksize": 8}, "structure('block'): blocksize is 8; it needs a pair (bk, bc) of integers"),
        (
            "block",
            0.5,
            {"blocksize": (2, 2, 2)},
            "structure('block'): blocksize is (2, 2, 2); it needs a pair (bk, bc) of integers",
        ),
    ],
)
def test_sparsities_and_options_that_a_structure_does_not_have(name, sparsity, options, message):
    assert refused(lambda: make_mask(ONES, sparsity, name, **options), ValueError) == message


@pytest.mark.parametrize("name", STRUCTURES)
def test_scores_that_make_no_mask(name):
    options = {"block": {"blocksize": (4, 2)}, "1xn": {"n": 4}}.get(name, {})

    def message(score: Tensor, sparsity: float = 0.5) -> str:
        return refused(lambda: make_mask(score, sparsity, name, **options), ValueError).split("): ", 1)[1]

    for bad in (math.nan, math.inf, -1.0):
        score = ONES.clone()
        score[3, 2, 1, 0] = bad
        assert message(score) == "score has cells that are negative, infinite or NaN; it needs finite ones >= 0"
    for shape in [(8,), (1, 16, 8, 3, 3), (0, 8, 3, 3), (16, 0, 1, 1)]:
        assert message(torch.ones(shape)) == f"score has shape {shape}; it needs [K, C, R, S], none of them 0"
    assert message(ONES.int()) == "score is torch.int32; it needs floating point or bool"
    for sparsity in (1.0, -0.1, math.nan):
        assert message(ONES, sparsity) == f"sparsity is {sparsity}; it needs a number in [0, 1)"


def test_unknown_names_and_options_list_what_there_is():
    names = "unstructured, n:m, transposable, vector, kernel, filter, channel, block, 1xn, elementwise, hrbp, hrbp++"
    assert ", ".join(STRUCTURES) == names
    for name in ("hrbp+", "2:4:8", "2:", ""):
        assert refused(lambda name=name: make_mask(ONES, 0.5, name), ValueError) == (
            f"structure(): no structure {name!r}; choose one of {names} or a ratio as 2:4"
        )
    groups = "groups, tap_density, granule, row_granule, min_rows, balanced, method"
    for name, options in {
        "unstructured": "none",
        "2:4": "none",
        "n:m": "m, n",
        "transposable": "m, n",
        "vector": "none",
        "kernel": "none",
        "filter": "none",
        "channel": "none",
        "block": "blocksize",
        "1xn": "n, uniform, rearrange",
        "elementwise": "groups, min_rows, method",
        "hrbp": groups,
        "hrbp++": groups,
    }.items():
        assert refused(lambda name=name: make_mask(ONES, 0.5, name, size=3, axis=1), TypeError) == (
            f"structure({name!r}): no option axis, size; it has {options}"
        )


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_selection_has_blocks_that_store_it_and_no_zero(name):
    score = torch.rand(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    options = {"n:m": {"m": 4}, "block": {"blocksize": (4, 2)}, "1xn": {"n": 4}}.get(name, {})
    choice = choose(score, 0.5, name, **options)
    assert torch.equal(choice.pattern().to_mask(), choice.mask)
    if name not in ("elementwise", "hrbp", "hrbp++"):  # whose blocks are as high as their groups
        assert structure(name, **options).blocksize(score.shape) == choice.blocksize
