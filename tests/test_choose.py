"""The highest, and the best fair choice: against sorting, the Hungarian method and a linear program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from hrbp.structures.selection import _by_prices, _cheapest_path, _repair, _take, balanced, check_score, top, top_of_few

SEEDS = st.integers(0, 2**32 - 1)
KINDS = ["continuous", "integers", "zeros", "constant", "same items", "same groups", "copies", "heavy", "negative"]


def values(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """float64 [..., groups, items] of one kind; most of them are full of ties."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    copies = torch.randint(0, max(1, shape[-1] // 3), shape[-1:], generator=generator)
    return {
        "continuous": u,
        "integers": (4 * u).floor(),
        "zeros": u * (u > 0.7),
        "constant": torch.full_like(u, 0.3),
        "same items": u[..., :1].expand(shape).clone(),
        "same groups": u[..., :1, :].expand(shape).clone(),
        "copies": u[..., copies],
        "heavy": (40 * (u - 0.5)).exp(),
        "negative": u - 0.7,
    }[kind]


# ---------------------------------------------------------------- the highest


@given(st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 20), st.data(), SEEDS)
def test_top_is_a_stable_sort(kind, rows, n, data, seed):
    count = data.draw(st.integers(0, n) | st.sampled_from([0, n]))
    value = values(kind, (rows, n), seed).to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    first = value.argsort(dim=1, descending=True, stable=True)[:, :count]
    expected = torch.zeros(rows, n, dtype=torch.bool).scatter_(1, first, True)
    assert torch.equal(top(value, count), expected)
    assert torch.equal(top(value[0], count), expected[0])
    assert torch.equal(top_of_few(value, count, 1), expected)
    assert torch.equal(top_of_few(value.t(), count, 0), expected.t())


# ---------------------------------------------------------------- the best fair choice


def assert_fair(chosen: Tensor, quota: int) -> None:
    """Every group has `quota` items, every item as many groups as any other, give or take one."""
    _, groups, items = chosen.shape
    assert chosen.dtype == torch.bool
    assert (chosen.sum(2) == quota).all()
    times = chosen.sum(1)
    lo = groups * quota // items
    assert ((times == lo) | (times == lo + 1)).all()
    assert ((times == lo + 1).sum(1) == groups * quota % items).all()


def most(value: np.ndarray, quota: int) -> float:
    """What the best fair choice of one problem [groups, items] is worth, found by others."""
    groups, items = value.shape
    if quota * groups == items:
        rows, columns = linear_sum_assignment(np.repeat(value, quota, axis=0), maximize=True)
        return float(value[rows // quota, columns].sum())
    lo = groups * quota // items
    of_group = np.kron(np.eye(groups), np.ones(items))
    of_item = np.kron(np.ones(groups), np.eye(items))
    scale = np.abs(value).max() or 1.0
    found = linprog(
        -value.ravel() / scale,
        A_ub=np.concatenate([of_item, -of_item]),
        b_ub=np.repeat([lo + 1, -lo], items),
        A_eq=of_group,
        b_eq=np.full(groups, quota),
        bounds=(0, 1),
        method="highs-ds",
    )
    chosen = found.x.reshape(groups, items) > 0.5
    assert np.abs(chosen - found.x.reshape(groups, items)).max() < 1e-6  # a vertex: the problem is a flow
    return float(value[chosen].sum())


def assert_best(value: Tensor, chosen: Tensor, quota: int) -> None:
    assert_fair(chosen, quota)
    for one, mine in zip(value.double(), chosen, strict=True):
        # A tie is a difference below 1e-11 of the largest value, for each choice that is made.
        slack = (2e-11 * quota * len(one) + 1e-13 * one.numel()) * float(one.abs().max())
        assert float(one[mine].sum()) >= most(one.numpy(), quota) - slack


@settings(max_examples=150)
@given(st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 8), st.integers(1, 6), st.booleans(), SEEDS)
def test_each_item_to_one_group_is_the_best_assignment(kind, problems, groups, quota, single, seed):
    value = values(kind, (problems, groups, groups * quota), seed)
    value = value.float() if single else value
    assert_best(value, balanced(value, quota), quota)


@settings(max_examples=150)
@given(st.sampled_from(KINDS), st.integers(1, 2), st.integers(1, 8), st.integers(1, 16), st.data(), SEEDS)
def test_items_shared_fairly_are_the_best_choice(kind, problems, groups, items, data, seed):
    quota = data.draw(st.integers(0, items))
    value = values(kind, (problems, groups, items), seed)
    assert_best(value, balanced(value, quota), quota)


@settings(max_examples=150)
@given(st.sampled_from(KINDS), st.integers(2, 8), st.integers(2, 14), st.data(), SEEDS)
def test_the_repair_alone_is_exact(kind, groups, items, data, seed):
    """From what free prices give, and no round over the prices."""
    quota = data.draw(st.integers(1, items - 1))
    value = values(kind, (1, groups, items), seed)
    lo, extra = divmod(groups * quota, items)
    chosen = _take(value, lo, extra)
    _repair(value[0], chosen[0], (chosen[0].sum(1) - quota).tolist(), lo)
    assert_best(value, chosen, quota)


@settings(max_examples=50)
@given(st.sampled_from(KINDS), st.integers(2, 8), st.integers(1, 6), st.sampled_from([0, 1, 1e3]), SEEDS)
def test_prices_of_another_problem_change_nothing(kind, groups, quota, scale, seed):
    items = groups * quota
    value = values(kind, (2, groups, items), seed)
    prices = scale * torch.randn(2, groups, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chosen = balanced(value, quota, prices)
    assert_best(value, chosen, quota)
    assert torch.isfinite(prices).all()


@pytest.mark.parametrize("quota", [32, 20, 100])
def test_prices_leave_little_to_repair(quota):
    generator = torch.Generator().manual_seed(1)
    value = torch.rand(4, 8, 256, generator=generator, dtype=torch.float64)
    value *= 1 + torch.arange(8)[:, None]  # without prices nearly all take the last group
    lo, extra = divmod(8 * quota, 256)
    free = (_take(value, lo, extra).sum(2) - quota).abs().sum()
    prices = torch.zeros(4, 8, 1, dtype=torch.float64)
    chosen, surplus = _by_prices(value, quota, lo, extra, prices)
    assert surplus == (chosen.sum(2) - quota).tolist()
    left = sum(abs(count) for counts in surplus for count in counts)
    assert left <= 16 < 400 < free
    # They are handed back: with them the next search starts where this one ended.
    assert (_take(value - prices, lo, extra).sum(2) - quota).abs().sum() == left


# The cheapest way out of a group that has too many items leads through another one that has.
@pytest.mark.parametrize(("seed", "quota"), [(1378, 103), (1468, 47), (1930, 97), (2356, 69)])
def test_the_repair_goes_through_groups_with_too_many(seed, quota):
    generator = torch.Generator().manual_seed(seed)
    groups = int(torch.randint(2, 9, (1,), generator=generator))
    columns = int(torch.randint(1, 40, (1,), generator=generator))
    value = torch.rand(1, groups, columns, generator=generator).repeat(1, 1, groups)
    assert_best(value, balanced(value, quota), quota)


def test_a_path_closes_no_cycle():
    """From node 0 to node 3, where going round by 1 and 2 gains by rounding."""
    inf = float("inf")
    costs = [
        [inf, 1.0, inf, inf, inf],
        [inf, inf, 0.5, inf, inf],
        [inf, -0.5 - 1e-16 - 1e-15, inf, 2.0, inf],
        [inf] * 5,
        [inf] * 5,
    ]
    path = _cheapest_path(costs, [True, False, False, False], [False, False, False, True])
    assert path == [(2, 3), (1, 2), (0, 1)]


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 12), st.data(), SEEDS)
def test_all_or_nothing(kind, groups, items, data, seed):
    quota = data.draw(st.sampled_from([0, items]))
    chosen = balanced(values(kind, (2, groups, items), seed), quota)
    assert torch.equal(chosen, torch.full((2, groups, items), quota > 0))


def test_problems_side_by_side_are_alone():
    value = values("continuous", (5, 4, 12), 3)
    together = balanced(value, 5)
    assert all(torch.equal(balanced(value[b : b + 1], 5)[0], together[b]) for b in range(5))


@pytest.mark.parametrize("quota", [-1, 5])
def test_a_quota_out_of_range_is_refused(quota):
    with pytest.raises(ValueError, match=rf"^balanced\(\): quota is {quota}; it needs 0 .. 4, the number of items$"):
        balanced(torch.rand(1, 2, 4), quota)


# ---------------------------------------------------------------- the score


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-200, -120, -14, 0, 9, 120, 1000])
def test_scores_lose_their_unit_and_nothing_else(dtype, exponent):
    unit = torch.rand(2, 3, 2, 1, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.25
    score = (unit.double() * 2.0**exponent).to(dtype)
    if not (torch.isfinite(score).all() and torch.equal(score.double(), unit.double() * 2.0**exponent)):
        return  # this dtype has no such numbers
    cells = check_score(score, 0.5, "f()")
    assert cells.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(cells, check_score(unit, 0.5, "f()"))
    assert 0.5 <= float(cells.max()) < 1
    assert torch.equal(cells.double() * 2.0 ** float(torch.log2(unit.double() / cells)[0, 0, 0, 0]), unit.double())


def test_scores_of_bool_zero_and_those_in_a_graph():
    mask = torch.tensor([True, False]).view(1, 2, 1, 1)
    assert check_score(mask, 0, "f()").flatten().tolist() == [0.5, 0]
    assert check_score(torch.zeros(1, 2, 1, 1), 0, "f()").flatten().tolist() == [0, 0]
    assert not check_score(torch.ones(1, 2, 1, 1, requires_grad=True), 0, "f()").requires_grad
    assert check_score(torch.rand(3, 2, 1, 1).transpose(0, 1), 0, "f()").is_contiguous()


@pytest.mark.parametrize(
    ("score", "sparsity", "message"),
    [
        (torch.ones(3, 4), 0.5, "f(): score has shape (3, 4); it needs [K, C, R, S], none of them 0"),
        (torch.ones(3, 0, 1, 1), 0.5, "f(): score has shape (3, 0, 1, 1); it needs [K, C, R, S], none of them 0"),
        (torch.ones(1, 1, 1, 1), 1, "f(): sparsity is 1; it needs a number in [0, 1)"),
        (torch.ones(1, 1, 1, 1), -0.1, "f(): sparsity is -0.1; it needs a number in [0, 1)"),
        (torch.ones(1, 1, 1, 1), float("nan"), "f(): sparsity is nan; it needs a number in [0, 1)"),
        (torch.ones(1, 1, 1, 1).long(), 0, "f(): score is torch.int64; it needs floating point or bool"),
        *[
            (
                torch.tensor([1.0, bad]).view(2, 1, 1, 1),
                0,
                "f(): score has cells that are negative, infinite or NaN; it needs finite ones >= 0",
            )
            for bad in (float("nan"), float("inf"), -1e-30)
        ],
    ],
)
def test_a_score_that_is_none_is_refused(score, sparsity, message):
    with pytest.raises(ValueError, match=r"^f\(\): ") as error:
        check_score(score, sparsity, "f()")
    assert str(error.value) == message
