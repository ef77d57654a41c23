"""What chooses between stored blocks and the dense product on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import blocksparse as bs
from blocksparse.geometry import KINDS
from blocksparse.kernels import cost, cost_constants, machine
from strategies import Case, cases

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def one_processor(monkeypatch):
    """The choice is that of the first processor of the shipped table, wherever the tests run."""
    monkeypatch.setattr(machine, "vendor", lambda: None)
    monkeypatch.setattr(cost_constants, "_own", dict)
    caches = cost_constants.constants, cost.on_cpu, bs.plan.plan_conv
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def chosen(shape, blocksize, density, size, n=8, dtype=torch.float32, stride=1):
    pattern = bs.BSRPattern.random(shape, blocksize, density, torch.Generator().manual_seed(0))
    x = torch.empty(n, shape[1], size, size, dtype=dtype)
    plan = bs.explain(x, torch.empty(pattern.nnzb, *blocksize, dtype=dtype), pattern, stride, shape[2] // 2)
    return plan.backend


@pytest.mark.parametrize("channels_size", [(64, 56), (128, 28), (256, 14), (512, 7)], ids=str)
@pytest.mark.parametrize("blocksize", [(32, 32), (8, 8), (8, 1), (4, 4), (1, 1)], ids=str)
def test_resnet_layers_at_ten_percent_run_on_blocks(channels_size, blocksize):
    channels, size = channels_size
    assert chosen((channels, channels, 3, 3), blocksize, 0.1, size) == "cpu"
    assert chosen((channels, channels, 3, 3), blocksize, 1.0, size) == "torch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases("torch"), threads=st.integers(1, 64))
def test_times_are_finite_and_grow_with_the_blocks(dtype, case: Case, threads):
    pattern, g, setting = case.pattern, case.geometry, cost.Setting(threads, case.memory_format)
    for kind in KINDS:
        blocks = (0, pattern.nnzb, 9 * pattern.nnzb)
        times = [cost.on_cpu(kind, g, pattern.blocksize, nnzb, dtype, setting) for nnzb in blocks]
        assert all(0 < t < 1e6 for pair in times for t in pair)
        assert [stored for stored, _ in times] == sorted(stored for stored, _ in times)


def test_a_plan_says_both_times():
    pattern = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
    text = str(bs.explain(torch.empty(8, 64, 28, 28), torch.empty(pattern.nnzb, 8, 8), pattern, 1, 1))
    assert text.count("ms by torch, ") == text.count("ms by cpu; threads: 1") == 3


def test_each_product_is_chosen_alone(monkeypatch):
    monkeypatch.setattr(cost, "on_cpu", lambda kind, *_: (1.0, 2.0) if kind == "fprop" else (2.0, 1.0))
    bs.plan.plan_conv.cache_clear()
    pattern = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
    x, values = torch.randn(1, 64, 8, 8), torch.randn(pattern.nnzb, 8, 8, requires_grad=True)
    try:
        plan = bs.explain(x, values, pattern, 1, 1)
        y = bs.conv2d(x, values, pattern, None, 1, 1)
    finally:
        bs.plan.plan_conv.cache_clear()
    assert plan.backend == "cpu+torch"
    assert torch.equal(y, bs.conv2d(x, values, pattern, None, 1, 1, backend="cpu"))
