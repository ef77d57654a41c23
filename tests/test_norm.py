"""batch_norm: PyTorch's own operators in float64 are what it computes, in every format, dtype and mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import blocksparse as bs
from blocksparse.kernels import cpu_norm
from norms import FORMATS, compare, laid_out
from runners import pytorch_threads

if why := cpu_norm.absent(torch.float32):
    pytest.skip(why, allow_module_level=True)

shapes = st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))


@given(
    shape=shapes, layout=st.sampled_from(FORMATS), training=st.booleans(), residual=st.booleans(), relu=st.booleans(),
    affine=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@example((2, 64, 8, 8), FORMATS[1], True, True, True, True, 0)  # whole vectors
@example((3, 5, 60, 41), FORMATS[0], True, True, True, True, 0)  # more than one piece of a channel
@example((2, 2, 150, 141), FORMATS[0], True, False, True, True, 1)
@example((3, 160, 40, 41), FORMATS[1], True, True, True, True, 0)  # more than one chunk of rows
@example((2, 40000, 1, 1), FORMATS[1], True, True, True, True, 0)  # a row larger than a chunk
@example((7, 33, 1, 1), FORMATS[0], True, True, True, True, 0)
def test_float64_is_what_pytorch_computes(shape, layout, training, residual, relu, affine, seed):
    if training and shape[0] * shape[2] * shape[3] == 1:
        shape = (2, *shape[1:])
    compare(shape, torch.float64, layout, training, residual, relu, affine, seed)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_as_exact_as_they_can_be(dtype, layout):
    for training in (True, False):
        for shape in ((4, 48, 13, 11), (2, 7, 6, 5)):
            compare(shape, dtype, layout, training, residual=True, relu=False, affine=True)
            compare(shape, dtype, layout, training, residual=False, relu=False, affine=True)
            compare(shape, dtype, layout, training, residual=False, relu=False, affine=False, tracked=not training)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_the_relu_passes_gradients_where_its_result_is_positive(layout, residual):
    generator = torch.Generator().manual_seed(1)
    x, r, dy = (laid_out(torch.randn(3, 24, 9, 7, generator=generator), layout) for _ in range(3))
    x.requires_grad_(), r.requires_grad_()
    weight, bias = torch.rand(24, generator=generator) + 0.5, torch.randn(24, generator=generator)
    y = bs.batch_norm(x, None, None, weight, bias, True, residual=r if residual else None, relu=True)
    # the same function with the ReLU as a factor, so that both cut the same numbers
    passed = (y > 0).double()
    exact = [t.detach().double().requires_grad_() for t in (x, r)]
    z = F.batch_norm(exact[0], None, None, weight.double(), bias.double(), True) + (exact[1] if residual else 0)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, r)[: 1 + residual], dy), torch.autograd.grad(z * passed, exact[: 1 + residual],
        dy.double()), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.double(), z * passed, rtol=1e-5, atol=1e-5)


def test_two_axes_slices_and_weights_of_16_bits():
    x, w = torch.randn(64, 10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    torch.testing.assert_close(bs.batch_norm(x, None, None, w, None, True), F.batch_norm(x, None, None, w, None, True))
    x = torch.randn(4, 20, 9, 9)[1:, 3:17, :, 2:]
    torch.testing.assert_close(bs.batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True))
    x = torch.randn(4, 6, 5, 5).bfloat16()
    own = {"weight": torch.rand(6).bfloat16(), "bias": torch.rand(6).bfloat16()}
    statistics = [torch.zeros(6).bfloat16(), torch.ones(6).bfloat16()]
    theirs = [t.clone() for t in statistics]
    got = bs.batch_norm(x, *statistics, own["weight"].requires_grad_(), own["bias"], training=True)
    torch.testing.assert_close(got, F.batch_norm(x, *theirs, **own, training=True), rtol=2e-2, atol=2e-2)
    for a, b in zip(statistics, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.grad(got.float().sum(), own["weight"])[0].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_a_large_mean_does_not_swallow_the_variance(layout):
    for shape in ((8, 16, 40, 40), (2, 70, 6, 6)):
        x = laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1000, layout)
        var = torch.zeros(shape[1])
        bs.batch_norm(x, torch.zeros(shape[1]), var, training=True, momentum=1.0)
        torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(layout):
    for shape in ((8, 48, 30, 30), (2, 7, 5, 5)):
        x, r, dy = (laid_out(torch.randn(shape), layout) for _ in range(3))
        found = []
        for threads in (1, 2, 3, 7):
            with pytorch_threads(threads):
                a, w = x.clone().requires_grad_(), torch.ones(shape[1], requires_grad=True)
                y = bs.batch_norm(a, None, None, w, None, True, residual=r, relu=True)
                found.append([y, *torch.autograd.grad(y, (a, w), dy)])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_what_is_not_a_number_stays_in_its_channel(layout):
    x = laid_out(torch.randn(2, 40, 6, 6), layout).requires_grad_()
    with torch.no_grad():
        x[1, 17, 2, 3] = float("nan")
    y = bs.batch_norm(x, None, None, training=True, relu=True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for t in (y, dx):
        assert t[:, 17].isnan().all()
        assert t[:, [*range(17), *range(18, 40)]].isfinite().all()


def test_nothing_but_the_tensor_is_written():
    for layout in FORMATS[:2]:
        room = torch.full((3 * 4 * 37 * 45,), float("nan"))
        x = room[4 * 37 * 45 : 2 * 4 * 37 * 45].view(4, 37, 9, 5)
        x.copy_(torch.randn(x.shape))
        x = x if layout == FORMATS[0] else x.view(4, 9, 5, 37).permute(0, 3, 1, 2)
        y = bs.batch_norm(x, None, None, training=True, residual=x, relu=True)
        assert y.isfinite().all()  # nothing beside it was read


def test_transforms_compilers_and_second_derivatives():
    x, w = torch.randn(4, 6, 5, 5), torch.ones(6)

    def loss(w):
        return bs.batch_norm(x, None, None, w, training=True, relu=True).square().sum()

    (wanted,) = torch.autograd.grad(loss(w.requires_grad_()), w)
    torch.testing.assert_close(torch.func.grad(loss)(w.detach()), wanted)
    compiled = torch.compile(
        lambda x: bs.batch_norm(x, None, None, w.detach(), training=True, relu=True), backend="eager"
    )
    torch.testing.assert_close(compiled(x), bs.batch_norm(x, None, None, w.detach(), training=True, relu=True))


def test_a_profiler_sees_what_runs_without_it():
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        bs.batch_norm(x, None, None, training=True, relu=True).sum().backward()
    seen = {event.key for event in profiled.key_averages()}
    assert "blocksparse::batch_norm" in seen
    assert not {name for name in seen if "native_batch_norm" in name or "threshold" in name}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_can_be_differentiated(training, residual):
    x, r = (torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def y(x, r, w, b):
        mean, var = torch.full((2, 4), 0.5, dtype=torch.float64)
        return bs.batch_norm(x, mean, var, w, b, training, residual=r if residual else None, relu=True)

    inputs = (x, r, w, b) if residual else (x, torch.zeros_like(r), w, b)
    assert torch.autograd.gradcheck(y, inputs)
    assert torch.autograd.gradgradcheck(y, inputs)


def test_mistakes_are_told():
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"batch_norm\(\): residual is \(2, 4, 3, 1\) .*; it needs \(2, 4, 3, 3\)"):
        bs.batch_norm(x, None, None, training=True, residual=torch.ones(2, 4, 3, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bs.batch_norm(torch.ones(1, 4, 1, 1), None, None, training=True)
    with pytest.raises((ValueError, RuntimeError), match="running_mean"):
        bs.batch_norm(x, torch.ones(3), torch.ones(3), training=True)
    assert bs.batch_norm(x[:0], torch.zeros(4), torch.ones(4), relu=True).shape == (0, 4, 3, 3)
