"""Memory formats: which one strides are, and that results, modules, the compiler and backends go by it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._prims_common import suggest_memory_format

import blocksparse as bs
from blocksparse.layout import BATCH_LAST, CHANNELS_LAST, CONTIGUOUS, FORMATS, laid_out, memory_format_of, new
from runners import RUNNERS

STRIDES = {
    CONTIGUOUS: lambda n, c, h, w: (c * h * w, h * w, w, 1),
    CHANNELS_LAST: lambda n, c, h, w: (c * h * w, 1, w * c, c),
    BATCH_LAST: lambda n, c, h, w: (1, h * w * n, w * n, n),
}
SIZES = st.sampled_from([1, 1, 2, 3, 5])


def test_a_format_is_its_strides():
    x = torch.randn(2, 3, 4, 5)
    for form in FORMATS:
        t = laid_out(x, form)
        assert torch.equal(t, x)
        assert t.stride() == new(x.shape, x, form).stride() == STRIDES[form](2, 3, 4, 5)
        assert memory_format_of(t) == bs.memory_format_of(t) == form
        assert laid_out(t, form) is t
    assert bs.to_batch_last(x).stride() == (1, 40, 10, 2)


@pytest.mark.parametrize(
    ("shape", "strides", "form"),
    [
        # One image is the same memory either way, and so is one number an image.
        ((1, 3, 4, 5), (1, 20, 5, 1), CONTIGUOUS),
        ((4, 1, 1, 1), (1, 4, 4, 4), CONTIGUOUS),
        ((4, 1, 1, 1), (7, 1, 1, 1), CONTIGUOUS),
        # One pixel: a matrix whose columns are dense. One channel, one row, one column.
        ((4, 3, 1, 1), (1, 4, 4, 4), BATCH_LAST),
        ((4, 3, 1, 1), (1, 4, 1, 1), BATCH_LAST),
        ((4, 3, 1, 1), (3, 1, 1, 1), CONTIGUOUS),
        ((4, 3, 1, 1), (3, 1, 3, 3), CHANNELS_LAST),
        ((4, 1, 3, 5), (1, 60, 20, 4), BATCH_LAST),
        ((4, 1, 3, 5), (15, 15, 5, 1), CONTIGUOUS),
        ((4, 3, 1, 5), (1, 20, 20, 4), BATCH_LAST),
        ((4, 3, 5, 1), (1, 20, 4, 4), BATCH_LAST),
        ((4, 1, 1, 5), (1, 1, 1, 4), BATCH_LAST),
        # Slices keep it; repeated images or channels do not.
        ((4, 2, 3, 5), (1, 120, 20, 4), BATCH_LAST),
        ((4, 3, 2, 2), (1, 60, 40, 8), BATCH_LAST),
        ((2, 3, 3, 5), (2, 60, 20, 4), BATCH_LAST),
        ((4, 3, 3, 5), (0, 15, 5, 1), CONTIGUOUS),
        ((4, 3, 3, 5), (1, 0, 20, 4), CONTIGUOUS),
        # Neither: rows and columns changed places; columns outermost.
        ((4, 3, 3, 5), (1, 60, 4, 12), CONTIGUOUS),
        ((4, 3, 3, 5), (3, 1, 12, 36), CONTIGUOUS),
        ((0, 3, 3, 5), (1, 1, 1, 1), CONTIGUOUS),
    ],
)
def test_sizes_of_one_and_other_doubts(shape, strides, form):
    t = torch.zeros(400).as_strided(shape, strides)
    assert memory_format_of(t) == form
    by_strides = []
    torch.vmap(lambda one: by_strides.append(memory_format_of(one)) or one.sum())(t[None])
    assert by_strides == [form]
    for other in FORMATS:  # one copy settles it
        assert laid_out(laid_out(t, other), other).stride() == laid_out(t, other).stride()


@given(st.tuples(SIZES, SIZES, SIZES, SIZES), st.permutations(range(4)), st.sampled_from([1, 2]))
@settings(max_examples=150)
def test_what_pytorch_calls_contiguous_stays_so(shape, order, step):
    """A dense tensor that fits contiguous or channels_last is what it always was, whatever else fits."""
    t = torch.empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
    t = t[:, :, ::step]
    before = {torch.contiguous_format: CONTIGUOUS, torch.channels_last: CHANNELS_LAST}[suggest_memory_format(t)]
    if t.is_contiguous() or before == CHANNELS_LAST:
        assert memory_format_of(t) == before
    else:
        dense = t.is_contiguous(memory_format=torch.channels_last)  # but of steps that PyTorch does not take for it
        assert memory_format_of(t) in ((CHANNELS_LAST,) if dense else (CONTIGUOUS, BATCH_LAST))
    assert memory_format_of(t.contiguous()) in (CONTIGUOUS, CHANNELS_LAST)


def test_to_batch_last():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = bs.to_batch_last(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(x))
    assert bs.to_batch_last(y) is y
    for keeps in (y.relu(), y + y, y * 2, torch.dropout(y, 0.5, True), y.double()):
        assert memory_format_of(keeps) == BATCH_LAST
    for wrong, text in (
        (torch.zeros(3, 4), r"x is a torch.strided tensor of shape \(3, 4\); it needs a strided tensor \[N, C, H, W\]"),
        ([1.0], "x is list"),
        (torch.zeros(2, 3, 4, 5).to_sparse(), "x is a torch.sparse_coo tensor"),
    ):
        with pytest.raises(ValueError, match=text):
            bs.to_batch_last(wrong)


@pytest.mark.device
@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
def test_linear_follows_its_matrix(runner):
    """[N, C] with N fastest gives [N, K] with N fastest, any other matrix contiguous."""
    backend, device = runner
    pattern = bs.BSRPattern.random((16, 24, 1, 1), (8, 8), 0.5).to(device)
    values = torch.randn(pattern.nnzb, 8, 8, device=device)
    x = torch.randn(24, 10, device=device).t().requires_grad_()
    y = bs.linear(x, values, pattern, backend=backend)
    assert y.t().is_contiguous()
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.t().is_contiguous()
    needed = bs.linear(x.contiguous(), values, pattern, backend=backend)
    assert needed.is_contiguous()
    torch.testing.assert_close(y, needed, rtol=1e-3, atol=1e-3)
    (expected,) = torch.autograd.grad(needed.square().sum(), x)
    torch.testing.assert_close(dx, expected, rtol=1e-2, atol=1e-2)
    assert bs.linear(x.t().reshape(2, 12, 10).permute(2, 0, 1).flatten(1), values, pattern).shape == (10, 16)
    three = torch.randn(24, 5, 2, device=device).permute(2, 1, 0)  # merges into one matrix, columns dense
    assert bs.linear(three, values, pattern, backend=backend).is_contiguous()


def test_modules_copy_compile_and_cast_in_it():
    pattern = bs.BSRPattern.random((16, 8, 3, 3), (4, 2), 0.4)
    module = bs.BSRConv2d(pattern, padding=1)
    x = torch.randn(3, 8, 6, 7)
    last = bs.to_batch_last(x)
    needed = module(x)
    for call in (module, copy.deepcopy(module), torch.compile(module, fullgraph=True, backend="aot_eager")):
        y = call(last)
        assert memory_format_of(y) == BATCH_LAST
        torch.testing.assert_close(y, needed)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(last)
    assert (half.dtype, memory_format_of(half)) == (torch.bfloat16, BATCH_LAST)
    torch.testing.assert_close(half.float(), needed, rtol=0.05, atol=0.05)
    for backend in ("cpu", "torch"):  # a result is no view: it may be changed in place
        y = bs.conv2d(last, module.values, pattern, module.bias, 1, 1, backend=backend)
        y += 1
        (dv,) = torch.autograd.grad(y.relu_().sum(), module.values)
        (expected,) = torch.autograd.grad((module(x) + 1).relu().sum(), module.values)
        torch.testing.assert_close(dv, expected)
    residual = torch.randn(needed.shape)  # in another format
    with torch.no_grad():
        fused = bs.conv2d(last, module.values, pattern, module.bias, 1, 1, residual=residual, relu=True)
        alone = bs.conv2d(x, module.values, pattern, module.bias, 1, 1, residual=residual, relu=True)
    assert memory_format_of(fused) == BATCH_LAST
    torch.testing.assert_close(fused, alone)


def test_a_plan_says_what_copies_cost():
    pattern = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
    x, values = torch.randn(8, 64, 14, 14), torch.randn(pattern.nnzb, 8, 8)
    last = bs.to_batch_last(x)
    forms = x, x.contiguous(memory_format=torch.channels_last), last
    *alone, copied = (bs.explain(t, values, pattern, 1, 1, backend="torch") for t in forms)
    assert "copied" not in "".join(map(str, alone))
    assert "batch_last is copied to " in str(copied)
    assert " and back" in str(copied)
    for kind in ("fprop", "dgrad", "wgrad"):
        *dense, through = (plan.products[kind].estimate.seconds for plan in (*alone, copied))
        assert through > min(dense) + 1e-9 * (x.numel() + 8 * 64 * 14 * 14)
        assert copied.products[kind].dense.seconds == through  # of a dense weight: PyTorch does not read it, either


@pytest.mark.parametrize("stride", [1, (2, 1), (1, 3), 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_1x1_convolution_reads_batch_last_as_one_image(groups, stride):
    pattern = bs.BSRPattern.random((8, 6 // groups, 1, 1), (2, 1), 0.5).grouped(groups)
    for n, h, w in ((4, 3, 5), (2, 1, 1), (3, 1, 7), (5, 4, 1)):
        x = torch.randn(n, 6, h, w, dtype=torch.float64)
        values = torch.randn(pattern.nnzb, 2, 1, dtype=torch.float64)
        dy, found = torch.randn_like(nn.functional.conv2d(x, x.new_ones(8, 6, 1, 1), stride=stride)), []
        for form in (torch.clone, bs.to_batch_last):
            here = form(x).requires_grad_(), values.clone().requires_grad_()
            y = bs.conv2d(*here, pattern, None, stride, backend="torch")
            found.append((y.detach().clone(), *torch.autograd.grad(y, here, form(dy))))
            bs.conv2d(form(x), values, pattern, None, stride, backend="torch").add_(1)  # no view
            bs.conv2d_dgrad(form(dy), values, pattern, x.shape, stride, backend="torch").add_(1)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        if dy.numel() > 8 * n:
            assert bs.memory_format_of(found[1][0]) == bs.memory_format_of(found[1][1]) == "batch_last"
    plan = bs.explain(
        bs.to_batch_last(torch.randn(8, 6, 9, 9)), torch.randn(pattern.nnzb, 2, 1), pattern, stride, backend="torch"
    )
    of_pixels = "" if stride == 1 else " of the pixels that are read"
    assert f"batch_last is read as one image{of_pixels}" in str(plan)
    assert "copied" not in str(plan)


def test_an_op_refuses_other_names():
    pattern = bs.BSRPattern.full((4, 4, 1, 1), (4, 4))
    dy, values = torch.randn(2, 4, 3, 3), torch.randn(1, 4, 4)
    text = r"conv2d_dgrad\(\): memory_format is 'NHWC'; it needs one of contiguous, channels_last, batch_last"
    with pytest.raises(ValueError, match=text):
        torch.ops.bsrconv.dgrad(dy, values, pattern.index, [2, 4, 3, 3], [4, 4, 1, 1], [1, 1], [0, 0], [1, 1], "NHWC")


def test_a_network_of_elementwise_operators_stays_in_it():
    """What PyTorch's own operators do with such strides, on which to_batch_last(model) rests."""
    x = bs.to_batch_last(torch.randn(3, 4, 5, 6))
    block = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.GELU(), nn.Identity())
    assert memory_format_of(block(x) + x) == BATCH_LAST
