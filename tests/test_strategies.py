"""The strategies reach what the suites claim to cover, and their guards and inputs are what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import blocksparse as bs
from blocksparse.layout import laid_out
from strategies import GUARD, Case, cases, guarded, nonzero, patterns

QUICK = settings(max_examples=2000, phases=[Phase.generate])  # the first that is found will do, not the smallest


@pytest.mark.parametrize("backend", ["torch", "triton", "cupy"])
@pytest.mark.parametrize(
    ("what", "holds"),
    [
        ("no block at all", lambda p: p.nnzb == 0),
        ("every block", lambda p: p.density == 1 and p.nnzb > 1),
        ("an empty block-row beside a full one", lambda p: p.nnzb > 0 and bool((p.indptr.diff() == 0).any())),
        ("an empty channel block", lambda p: p.nnzb > 0 and not p.to_mask().any(0).flatten(1).any(1).all()),
        ("a row order", lambda p: p.row_order is not None and p.nnzb > 0),
        ("bk != bc", lambda p: p.blocksize[0] != p.blocksize[1]),
    ],
)
def test_patterns_reach(backend, what, holds):
    find(patterns(backend), holds, settings=QUICK)


def test_patterns_reach_single_channels():
    for backend in ("torch", "cupy"):
        find(patterns(backend), lambda p: p.blocksize[1] == 1 and p.blocksize[0] > 1, settings=QUICK)


@pytest.mark.parametrize(
    "holds",
    [
        lambda c: c.n == 0,
        lambda c: c.stride == (2, 2) and c.pattern.shape[2:] == (3, 3),
        lambda c: c.stride[0] != c.stride[1] and c.n > 1,
        lambda c: c.padding[0] > c.pattern.shape[2],
        lambda c: c.dilation == (2, 1),
        lambda c: c.memory_format == "channels_last" and c.bias,
        lambda c: bs.memory_format_of(c.tensors("cpu")[0]) == "batch_last" and c.pattern.shape[2:] == (3, 3),
        lambda c: c.h % 2 == 1 and c.w != c.h,
        lambda c: c.pattern.shape[2:] == (1, 1) and c.stride != (1, 1),
        lambda c: c.geometry.p == 1 and c.h > 1,
    ],
)
def test_cases_reach(holds):
    find(cases(), holds, settings=QUICK)


@given(cases(dtypes=(torch.float16, torch.bfloat16, torch.float32)))
def test_inputs_are_fresh_nonzero_and_guarded(case: Case):
    x, values, bias, dy, _ = case.tensors("cpu")
    for t in (x, dy):
        assert laid_out(t, case.memory_format) is t
    for t in (x, values, dy, bias):
        if t is None or t.numel() == 0:
            continue
        assert (t != 0).all()
        assert torch.isfinite(t).all()
        whole = torch.as_strided(t, (t.numel() + 2 * GUARD,), (1,), 0)
        assert whole[:GUARD].isnan().all()
        assert whole[-GUARD:].isnan().all()


@given(st.integers(0, 2**32 - 1))
def test_a_read_outside_shows(seed):
    t = guarded(nonzero((3, 4), torch.float32, torch.Generator().manual_seed(seed)), "cpu")
    outside = torch.as_strided(t, (3, 5), (4, 1), t.storage_offset())
    assert outside.sum().isnan()
