"""batch_norm by Triton: what PyTorch computes in float64, however the work is cut; on a GPU, or in the interpreter."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blocksparse as bs
from blocksparse.kernels import norm_cut, triton_norm, triton_norm_kernels
from norms import FORMATS, compare, laid_out

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")]  # NumPy's, of inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
norm = importlib.import_module("blocksparse.norm")


@pytest.fixture
def kernels(monkeypatch):
    """Triton's are those of the CPU, too."""
    calls = []
    run = triton_norm._launch
    monkeypatch.setattr(norm, "_kernels", lambda device: triton_norm)
    monkeypatch.setattr(triton_norm, "_launch", lambda kernel, *args: (calls.append(kernel), run(kernel, *args)))
    return calls


@pytest.fixture
def small(monkeypatch):
    """Chunks so small that little work has several programs of several chunks."""
    sizes = {"FORWARD": 64, "BACKWARD": 32, "COLUMNS": 8, "PER_UNIT": 3 if DEVICE == "cpu" else 1, "WAVES": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(norm_cut, name, size)
    norm_cut.cut.cache_clear()
    yield
    norm_cut.cut.cache_clear()


def cases(most: int, channels: int):
    sizes = st.tuples(st.integers(1, 5), st.integers(1, channels), st.integers(1, most), st.integers(1, most))
    flags = [st.booleans() for _ in range(4)]
    return st.tuples(sizes, st.sampled_from(FORMATS), *flags, st.integers(0, 2**31))


def check(case):
    shape, layout, training, residual, relu, affine, seed = case
    if training and math.prod(shape) == shape[1]:
        shape = (2, *shape[1:])
    dtype = (torch.float32, torch.float16)[seed % 2] if affine else torch.float32
    compare(shape, dtype, layout, training, residual, relu, affine, seed, device=DEVICE)


@settings(max_examples=2, suppress_health_check=list(HealthCheck))
@given(case=cases(3, 2))
def test_it_is_what_pytorch_computes(case, kernels, small):
    check(case)


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(case=cases(9, 11))
def test_it_is_what_pytorch_computes_for_many(case, kernels, small):
    check(case)


@pytest.mark.parametrize("layout", FORMATS)
def test_every_kernel_with_whole_and_partial_chunks(layout, kernels, small):
    """Several splits, columns beyond the last channel or number, lines beyond the last one; and whole vectors of 8."""
    shape = {"contiguous": (5, 2, 7, 5), "channels_last": (3, 11, 7, 3), "batch_last": (8, 2, 4, 4)}[layout]
    compare(shape, torch.float32, layout, True, True, True, True, device=DEVICE)
    names = [kernel.fn.__name__ for kernel in kernels]
    assert names == ["norm_statistics_kernel", "norm_apply_kernel", "norm_sums_kernel", "norm_dx_kernel"]
    compare((2, 1, 3, 3), torch.bfloat16, layout, False, False, True, True, device=DEVICE)
    assert [kernel.fn.__name__ for kernel in kernels[4:]] == ["norm_apply_kernel", "norm_sums_kernel"]  # dx in one pass


def test_work_is_cut_so_that_every_number_is_read_once():
    for rows, channels, inner in (
        (12544, 256, 1),
        (7, 3, 1),
        (1, 64, 200704),
        (64, 512, 49),
        (5, 1000, 3000),
        (1, 1, 2),
    ):
        for tile in (norm_cut.FORWARD, norm_cut.BACKWARD):
            c = norm_cut.cut(rows, channels, inner, 132, tile)
            assert 1 <= c.splits <= c.chunks
            assert c.block_rows * c.block_cols <= tile
            seen = sorted(k for split in range(c.splits) for k in range(split, c.chunks, c.splits))
            assert seen == list(range(c.chunks))
            covered = (c.chunks // c.wide * c.block_rows, c.wide * c.block_cols)
            assert covered[0] >= c.lines > covered[0] - c.block_rows
            if c.across:
                assert c.tiles * c.block_cols >= channels
            else:
                assert covered[1] >= c.length > covered[1] - c.block_cols
    many = norm_cut.cut(200704, 64, 1, 132, norm_cut.FORWARD)
    assert many.programs == norm_cut.PER_UNIT * 132


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_large_mean_does_not_swallow_the_variance(layout, kernels, small):
    x = torch.randn((4, 3, 7, 4), generator=torch.Generator().manual_seed(0)) + 1000
    for first in (0, 1000.5):
        x[0, :, 0, 0] = first  # what the first chunk begins with is no good guess
        var, mean = torch.zeros(2, 3, device=DEVICE)
        bs.batch_norm(laid_out(x.to(DEVICE), layout), mean, var, training=True, momentum=1.0)
        torch.testing.assert_close(var.cpu().double(), x.double().var((0, 2, 3)), rtol=1e-4, atol=0)
        torch.testing.assert_close(mean.cpu().double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


def test_nothing_but_the_tensor_is_read_and_written(kernels, small):
    x = laid_out(torch.randn(3, 11, 5, 3), "channels_last").to(DEVICE)
    room = torch.full((3 * x.numel(),), float("nan"), device=DEVICE)
    inner = room[x.numel() : 2 * x.numel()].view(3, 5, 3, 11).permute(0, 3, 1, 2).copy_(x).requires_grad_()
    w = torch.rand(11, device=DEVICE, requires_grad=True)
    y = bs.batch_norm(inner, None, None, w, training=True, residual=inner, relu=True)
    for t in (y, *torch.autograd.grad(y, (inner, w), torch.ones_like(y))):
        assert t.isfinite().all()
    assert (room.isnan().sum(), inner.detach().equal(x)) == (2 * x.numel(), True)


def test_what_is_not_a_number_stays_in_its_channel(kernels, small):
    x = laid_out(torch.randn(2, 5, 3, 3).to(DEVICE), "channels_last").requires_grad_()
    with torch.no_grad():
        x[1, 3, 2, 1] = float("inf")
    y = bs.batch_norm(x, None, None, training=True, relu=True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for t in (y, dx):
        assert t[:, 3].isnan().all()
        assert t[:, [0, 1, 2, 4]].isfinite().all()


def test_what_backward_keeps(kernels):
    """x, and where a residual was added before a ReLU y, which the next layer keeps anyway; nothing else so large"""
    for residual in (False, True):
        kept = []
        x = torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            y = bs.batch_norm(x, None, None, training=True, residual=x.detach() if residual else None, relu=True)
        large = {t.data_ptr() for t in kept if t.numel() == x.numel()}
        assert large == {x.data_ptr(), *([y.data_ptr()] if residual else [])}


def test_what_has_no_kernel_runs_by_pytorch(kernels):
    for x in (torch.randn(2, 3, 4, 4).double(), torch.randn(0, 3, 4, 4)):
        x = bs.to_batch_last(x.to(DEVICE))
        y = bs.batch_norm(x, torch.zeros(3).to(x), torch.ones(3).to(x), relu=True)
        torch.testing.assert_close(y, (x / math.sqrt(1 + 1e-5)).relu())
        assert y.stride() == x.stride()
    assert not kernels
    assert "no kernel for" in triton_norm.refusal(torch.empty(1, 3, 1, 1).double())
    assert "numbers a channel" in triton_norm.refusal(torch.empty(2**31, 1, 1, 1, dtype=torch.half, device="meta"))


def test_momentum_that_changes_needs_no_kernel_of_its_own(kernels):
    from blocksparse.kernels import triton_conv

    kept = len(triton_conv._launchers)
    x, mean, var = torch.randn(4, 3, 2, 2, device=DEVICE), torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    for step in range(1, 4):
        bs.batch_norm(x * step, mean, var, training=True, momentum=1 / step)
    wanted = torch.nn.BatchNorm2d(3, momentum=None)
    for step in range(1, 4):
        wanted(x.cpu() * step)
    torch.testing.assert_close(mean.cpu(), wanted.running_mean)
    torch.testing.assert_close(var.cpu(), wanted.running_var)
    assert len(triton_conv._launchers) <= kept + 2


# ---------------------------------------------------------------------- planted mistakes


@triton.jit
def _no_tail(
    k, tile, lines, length, apart, wide,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """`_chunk` that takes every chunk for a whole one: lines past the end are not masked."""
    at = (k // wide * ROWS).to(tl.int64) * apart + (tile * COLS if ACROSS else tile * length + k % wide * COLS)
    inside = (tl.arange(0, ROWS) < ROWS)[:, None] & (tl.arange(0, COLS) < COLS)[None, :]
    return at, inside, ROWS + 0 * lines


@triton.jit
def _wrong_count(
    k, tile, lines, length, apart, wide,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """`_chunk` that masks, but counts whole chunks."""
    first = k // wide * ROWS
    at = first.to(tl.int64) * apart + tile * COLS
    inside = (tl.arange(0, ROWS) < lines - first)[:, None] & (tl.arange(0, COLS) < length - tile * COLS)[None, :]
    return at, inside, ROWS + 0 * lines


@pytest.mark.skipif(DEVICE == "cuda", reason="it reads past the end of a tensor")
@pytest.mark.parametrize("wrong", [_no_tail, _wrong_count], ids=["tail not masked", "wrong count"])
def test_a_mistake_is_seen(wrong, kernels, small, monkeypatch):
    monkeypatch.setattr(triton_norm_kernels, "_chunk", wrong)
    run = triton_norm._launch  # of the statistics alone: others would write past the end
    only = triton_norm.norm_statistics_kernel
    monkeypatch.setattr(triton_norm, "_launch", lambda kernel, *args: run(kernel, *args) if kernel is only else None)
    x = torch.full((4 * 40 * 8,), 1e3)  # what is read beyond the end is there
    x[: 3 * 7 * 8] = torch.randn(3 * 7 * 8)
    inside = x[: 3 * 7 * 8].view(3, 7, 1, 8).permute(0, 3, 1, 2)
    var = torch.ones(8)
    bs.batch_norm(inside, torch.zeros(8), var, training=True, momentum=1.0)
    assert not torch.allclose(var, inside.var((0, 2, 3)), rtol=1e-3)


# ---------------------------------------------------------------------- on a device alone


@pytest.mark.gpu
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_layers_of_resnet50(dtype, layout):
    for shape in ((32, 64, 56, 56), (31, 512, 7, 7), (8, 2048, 7, 7), (64, 24, 30, 30)):
        for training in (True, False):
            compare(shape, dtype, layout, training, True, True, True, offset=1.0, device="cuda")
        compare(shape, dtype, layout, True, False, True, True, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", FORMATS)
def test_the_same_bits_on_every_run(layout):
    x, r, dy = (laid_out(torch.randn(64, 64, 28, 28), layout).to("cuda") for _ in range(3))
    a, w = x.requires_grad_(), torch.ones(64, device="cuda", requires_grad=True)

    def step():
        y = bs.batch_norm(a, None, None, w, None, True, residual=r, relu=True)
        return [y.detach(), *torch.autograd.grad(y, (a, w), dy)]

    first = step()
    for _ in range(500):
        assert all(torch.equal(p, q) for p, q in zip(step(), first, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    x = torch.zeros(2**16 + 1, 32, 32, 32, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1], x[0] = 1.0, -1.0
    y = bs.batch_norm(x, None, None, training=True, relu=True)
    torch.testing.assert_close(y[-1].float().std(), torch.tensor(0.0, device="cuda"))
    assert y[-1].min() > 100
    assert (y[:-1] <= 1e-3).all()


@pytest.mark.gpu
def test_it_is_captured_in_a_graph():
    x = torch.randn(32, 64, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    dy = torch.randn_like(x)

    def step():
        y = bs.batch_norm(x, mean, var, training=True, relu=True)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    wanted = [step() for _ in range(2)][-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
