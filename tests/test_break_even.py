"""When the default runs the dense product: by estimate, the same for the same mask, never against a named backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import blocksparse as bs
from blocksparse.index import unpack
from blocksparse.kernels import break_even, torch_conv
from blocksparse.kernels.break_even import Work
from strategies import Case, cases


def groups_of(channels: int, kept: int) -> bs.BSRPattern:
    """Eight groups of filters, each with its own `kept` channels, all taps."""
    mask = torch.zeros(8, channels // 8, channels, 3, 3, dtype=torch.bool)
    for group in mask:
        group[:, torch.randperm(channels)[:kept]] = True
    return bs.BSRPattern.from_mask(mask.view(channels, channels, 3, 3), (channels // 8, 1))


def chosen(pattern: bs.BSRPattern, x: torch.Tensor, **options) -> str:
    return bs.explain(x, torch.zeros(pattern.nnzb, *pattern.blocksize), pattern, 1, 1, **options).backend


def test_zeros_and_pixels_pay_for_blocks():
    large, tiny = groups_of(256, 26), groups_of(16, 2)
    assert chosen(large, torch.empty(8, 256, 14, 14)) == "torch"
    assert chosen(tiny, torch.empty(8, 16, 8, 8)) == "dense"
    assert chosen(groups_of(256, 256), torch.empty(8, 256, 14, 14)) == "dense"
    assert chosen(bs.BSRPattern.random((256, 256, 3, 3), (8, 1), 0.5), torch.empty(8, 256, 14, 14)) == "dense"
    assert chosen(tiny, torch.empty(8, 16, 8, 8), backend="torch") == "torch"


@pytest.mark.parametrize("kept", [2, 15])
@pytest.mark.parametrize("channels", [16, 128])
def test_the_default_runs_what_explain_says(channels, kept):
    """Bit for bit: fprop and both gradients."""
    pattern = groups_of(channels, kept)
    x = torch.randn(4, channels, 12, 12, requires_grad=True)
    values = torch.randn(pattern.nnzb, *pattern.blocksize, requires_grad=True)
    dy = torch.randn(4, channels, 12, 12)

    def results(backend: str | None) -> list[torch.Tensor]:
        y = bs.conv2d(x, values, pattern, None, 1, 1, backend=backend)
        return [y, *torch.autograd.grad(y, (x, values), dy)]

    name = chosen(pattern, x)
    by_default, named, other = results(None), results(name), results("torch" if name == "dense" else "dense")
    assert all(torch.equal(a, b) for a, b in zip(by_default, named, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(by_default, other, strict=True))


def test_a_new_mask_is_looked_at_anew():
    """Groups and scattered blocks have the same static facts and run in different ways."""
    torch.manual_seed(0)
    pattern = groups_of(128, 26)
    module = bs.BSRConv2d(pattern, padding=1, bias=False)
    scattered = bs.BSRPattern.random(pattern.shape, pattern.blocksize, pattern.density)
    assert scattered.nnzb == pattern.nnzb
    x = torch.randn(2, 128, 14, 14)
    assert [chosen(p, x) for p in (pattern, scattered)] == ["torch", "dense"]
    assert torch.equal(module(x), bs.conv2d(x, module.values, pattern, None, 1, 1, backend="torch"))
    assert module.set_pattern(scattered)
    with torch.no_grad():
        module.values.normal_()
    assert torch.equal(module(x), bs.conv2d(x, module.values, scattered, None, 1, 1, backend="dense"))


@given(cases("torch"))
def test_work_counts_the_products(case: Case):
    """Every stored weight meets every output pixel once; `conv` adds zeros, never more than all taps."""
    pattern, g = case.pattern, case.geometry
    tables = unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    work = torch_conv.work(tables, g, pattern.blocksize)
    stored = pattern.nnzb * pattern.blocksize[0] * pattern.blocksize[1]
    if not work.conv:
        assert work.weights == stored
        assert (work.calls > 0) == (stored > 0 and g.n > 0)
        return
    assert stored <= work.weights <= 1.25 * stored / torch_conv.CONV_TAPS + 1
    assert work.moved == g.k


@given(st.booleans(), st.integers(1, 8))
def test_dearer_blocks_never_turn_the_choice_to_blocks(conv, threads):
    g = bs.ConvGeometry.of((8, 64, 14, 14), (64, 64, 3, 3), 1, 1)
    found = []
    for scale in range(1, 40):
        work = Work(conv, scale, 16 * scale, 64 * scale, 4096 * scale)
        found.append(break_even.dense_is_faster(g, work, 4096 * scale, threads))
    assert found == sorted(found)
    assert found[0] is False
    assert found[-1] is True
