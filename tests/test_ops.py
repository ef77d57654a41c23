"""The torch surface: opcheck, gradcheck, torch.compile, autocast, memory formats, CUDA graphs, one derivative."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import blocksparse as bs
from blocksparse import ops
from blocksparse.layout import FORMATS, laid_out, memory_format_of
from runners import RUNNERS

pytestmark = pytest.mark.device


def layer(device="cpu", dtype=torch.float32, layout="contiguous", blocksize=(8, 8), density=0.3):
    """x, values, bias and pattern of a small strided layer; every tensor requires a gradient."""
    pattern = bs.BSRPattern.random((16, 24, 3, 3), blocksize, density).to(device)
    x = laid_out(torch.randn(2, 24, 6, 7, device=device, dtype=dtype), layout)
    values = torch.randn(pattern.nnzb, *blocksize, device=device, dtype=dtype)
    bias = torch.randn(16, device=device, dtype=dtype)
    return x.requires_grad_(), values.requires_grad_(), bias.requires_grad_(), pattern


@pytest.mark.parametrize(
    "runner",
    [pytest.param(r, marks=pytest.mark.slow) if r == ("triton", "cpu") else r for r in RUNNERS],
    ids="-".join,
)
@pytest.mark.parametrize("layout", [FORMATS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FORMATS[1:])])
def test_opcheck(runner, layout):
    backend, device = runner
    x, values, bias, pattern = layer(device, layout=layout)
    ints = (pattern.shape, (2, 1), (1, 2), (1, 1))
    dy = torch.randn_like(bs.conv2d(x, values, pattern, bias, *ints[1:]).detach())
    plain, v = x.detach(), values.detach()
    shape = tuple(v.shape)
    torch.library.opcheck(torch.ops.bsrconv.fprop.default, (x, values, pattern.index, bias, *ints, backend))
    torch.library.opcheck(torch.ops.bsrconv.fprop.default, (x, values, pattern.index, None, *ints, backend))
    torch.library.opcheck(torch.ops.bsrconv.fprop.default, (plain, values, pattern.index, bias, *ints, backend))
    torch.library.opcheck(
        torch.ops.bsrconv.dgrad.default, (dy, v, pattern.index, list(x.shape), *ints, layout, backend)
    )
    torch.library.opcheck(torch.ops.bsrconv.wgrad.default, (plain, dy, pattern.index, shape, *ints, backend))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("shape", "blocksize", "conv"),
    [
        ((4, 6, 3, 2), (2, 1), ((2, 1), (1, 2), (1, 2))),
        ((6, 4, 1, 1), (3, 2), ((2, 2), (0, 0), (1, 1))),
        ((4, 4, 2, 3), (4, 4), ((1, 1), (2, 0), (1, 1))),
    ],
)
def test_gradcheck(layout, shape, blocksize, conv):
    order = torch.randperm(shape[0])
    pattern = bs.BSRPattern.from_mask(torch.rand(shape) < 0.2, blocksize, order)
    x = torch.randn(2, shape[1], 4, 5, dtype=torch.float64)
    x = laid_out(x, layout).requires_grad_()
    values = torch.randn(pattern.nnzb, *blocksize, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v, b: bs.conv2d(x, v, pattern, b, *conv), (x, values, bias))


@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
def test_autograd_is_the_dense_gradient(runner):
    backend, device = runner
    x, values, bias, pattern = layer(device)
    conv = ((2, 1), (1, 2), (1, 1))
    y = bs.conv2d(x, values, pattern, bias, *conv, backend=backend)
    needed = F.conv2d(x, pattern.to_dense(values), bias, *conv)
    # An expanded dy, as from sum(): it must be read with its strides.
    for dy in (torch.randn_like(y), torch.ones((), device=device).expand_as(y)):
        grads = torch.autograd.grad(y, (x, values, bias), dy, retain_graph=True)
        for grad, dense in zip(
            grads, torch.autograd.grad(needed, (x, values, bias), dy, retain_graph=True), strict=True
        ):
            tolerance = 2e-2 if device == "cuda" else 1e-4  # tf32
            torch.testing.assert_close(grad, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_differentiable_once(backend):
    x, values, bias, pattern = layer()
    y = bs.conv2d(x, values, pattern, bias, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="conv2d\\(\\) is differentiable once"):
        dx.sum().backward()


def test_only_what_a_gradient_needs_is_kept_alive():
    for frozen in ("x", "values"):
        x, values, _, pattern = layer()
        (x if frozen == "x" else values).requires_grad_(False)
        inner = (x if frozen == "values" else values).clone()  # kept only if the graph holds it
        alive = weakref.ref(inner)
        y = bs.conv2d(inner, values, pattern) if frozen == "values" else bs.conv2d(x, inner, pattern)
        assert y.requires_grad
        del inner
        gc.collect()
        assert alive() is None


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("runner", "layout"),
    [
        pytest.param(
            r,
            f,
            marks=pytest.mark.slow if r == ("triton", "cpu") and f != "channels_last" else [],
            id=f"{f}-{'-'.join(r)}",
        )
        for r in RUNNERS
        for f in FORMATS
    ],
)
def test_compile_without_breaks_or_recompiles(runner, layout):
    backend, device = runner
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, values, bias, pattern: bs.conv2d(x, values, pattern, bias, 2, 1, backend=backend),
        fullgraph=True,
        backend=counter,
    )
    for _ in range(3):  # new values and a new pattern of equal nnzb each time
        x, values, bias, pattern = layer(device, layout=layout)
        y = compiled(x, values, bias, pattern)
        eager = bs.conv2d(x, values, pattern, bias, 2, 1, backend=backend)
        assert torch.equal(y, eager)
        assert y.stride() == eager.stride()
        dy = torch.randn_like(y)
        for a, b in zip(
            torch.autograd.grad(y, (x, values, bias), dy),
            torch.autograd.grad(eager, (x, values, bias), dy),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_with_inductor_and_dynamic_batch():
    torch._dynamo.reset()
    x, values, bias, pattern = layer()
    compiled = torch.compile(
        lambda x, values: F.relu(bs.conv2d(F.relu(x), values, pattern, bias, 2, 1)), fullgraph=True
    )
    for n in (2, 5, 3):
        x = torch.randn(n, 24, 6, 7, requires_grad=True)
        y = compiled(x, values)
        needed = F.relu(F.conv2d(F.relu(x), pattern.to_dense(values), bias, 2, 1))
        torch.testing.assert_close(y, needed, rtol=1e-4, atol=1e-4)
        for a, b in zip(
            torch.autograd.grad(y.sum(), (x, values)),
            torch.autograd.grad(needed.sum(), (x, values)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- autocast, formats, modes


@pytest.mark.parametrize("device", sorted({device for _, device in RUNNERS}))
def test_autocast_casts_and_returns_gradients_in_the_parameters_dtype(device):
    x, values, bias, pattern = layer(device)
    with torch.autocast(device, torch.bfloat16):
        y = bs.conv2d(x, values, pattern, bias)
        z = bs.linear(torch.randn(3, 24, device=device), *linear_layer(device))
    assert y.dtype == z.dtype == torch.bfloat16
    assert torch.equal(y, bs.conv2d(x.bfloat16(), values.bfloat16(), pattern, bias.bfloat16()))
    y.float().square().sum().backward()
    assert x.grad.dtype == values.grad.dtype == bias.grad.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        doubles = [t.detach().double() for t in (x, values)]
        assert bs.conv2d(*doubles, pattern, backend="torch").dtype == torch.float64


def linear_layer(device):
    pattern = bs.BSRPattern.random((16, 24, 1, 1), (8, 8), 0.5).to(device)
    return torch.randn(pattern.nnzb, 8, 8, device=device), pattern


@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
@pytest.mark.parametrize("layout", FORMATS)
def test_results_follow_the_memory_format_of_x(runner, layout):
    backend, device = runner
    x, values, bias, pattern = layer(device, layout=layout)
    y = bs.conv2d(x, values, pattern, bias, backend=backend)
    assert memory_format_of(y) == layout
    other = FORMATS[FORMATS.index(layout) - 1]
    dx, dv = torch.autograd.grad(y, (x, values), laid_out(torch.randn_like(y), other))
    assert memory_format_of(dx) == layout
    assert dv.is_contiguous()
    dy = laid_out(torch.randn(y.shape, device=device), layout)
    assert memory_format_of(bs.conv2d_dgrad(dy, values, pattern, x.shape, backend=backend)) == layout


def test_fake_tensors_have_the_real_strides():
    from torch._subclasses import FakeTensorMode

    for layout in FORMATS:
        for shape in [(2, 24, 6, 7), (1, 24, 3, 3), (2, 24, 1, 1), (0, 24, 6, 7)]:
            _, values, bias, pattern = layer()
            x = laid_out(torch.randn(shape), layout)
            real = bs.conv2d(x, values, pattern, bias, 1, 1)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = bs.conv2d(mode.from_tensor(x), mode.from_tensor(values), pattern, bias, 1, 1)
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24), (2, 0, 24)], ids=str)
def test_linear_is_linear(runner, shape):
    backend, device = runner
    values, pattern = linear_layer(device)
    bias = torch.randn(16, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    values.requires_grad_()
    y = bs.linear(x, values, pattern, bias, backend=backend)
    needed = F.linear(x, pattern.to_dense(values)[:, :, 0, 0], bias)
    tolerance = 2e-2 if device == "cuda" else 1e-5
    torch.testing.assert_close(y, needed, rtol=tolerance, atol=tolerance)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (x, values), dy), torch.autograd.grad(needed, (x, values), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_inference_mode():
    with torch.inference_mode():
        x, values, bias, pattern = layer()
        y = bs.conv2d(x, values, pattern, bias)
        torch.testing.assert_close(y, F.conv2d(x, pattern.to_dense(values), bias), rtol=1e-4, atol=1e-4)


def test_explain_names_backend_reason_and_cost():
    x, values, _, pattern = layer()
    text = str(bs.explain(x, values, pattern, 2, 1))
    assert "fprop: " in text
    assert "ms by cpu; threads: 1)" in text
    assert "GFLOP" in text
    assert "backend: torch (asked for)" in str(bs.explain(x, values, pattern, 2, 1, backend="torch"))
    plan = bs.explain(x, values, pattern, 2, 1)
    assert plan.flops == 2 * 2 * 3 * 4 * pattern.nnzb * 64
    assert plan.dense_flops == 2 * 2 * 3 * 4 * 16 * 24 * 9
    named = bs.explain(
        x.to(RUNNERS[-1][1]), values.to(RUNNERS[-1][1]), pattern.to(RUNNERS[-1][1]), 2, 1, backend="triton"
    )
    assert named.backend == "triton"
    assert set(named.tiles) == {"fprop", "dgrad", "wgrad"}


# ---------------------------------------------------------------- the short way past the dispatcher


def parts(y, x, values, bias):
    return (y, *torch.autograd.grad(y, (x, values, bias), torch.linspace(-1, 1, y.numel()).view_as(y)))


@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
@pytest.mark.parametrize("layout", FORMATS)
def test_the_short_way_is_the_op(runner, layout):
    """Eager calls skip the dispatcher; the op itself, called by name, gives the same bits and strides."""
    backend, device = runner
    x, values, bias, pattern = layer(device, layout=layout)
    short = parts(bs.conv2d(x, values, pattern, bias, 2, 1, backend=backend).cpu(), x, values, bias)
    op = torch.ops.bsrconv.fprop(x, values, pattern.index, bias, pattern.shape, [2, 2], [1, 1], [1, 1], backend)
    for a, b in zip(short, parts(op.cpu(), x, values, bias), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


class Recorder(TorchDispatchMode):
    """Notes which of our ops pass, and runs them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bsrconv":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_ops():
    x, values, bias, pattern = layer()
    needed = parts(bs.conv2d(x, values, pattern, bias), x, values, bias)
    with Recorder() as mode:
        got = parts(bs.conv2d(x, values, pattern, bias), x, values, bias)
    assert mode.seen == ["fprop", "dgrad", "wgrad"]
    assert all(torch.equal(a, b) for a, b in zip(got, needed, strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        parts(bs.conv2d(x, values, pattern, bias), x, values, bias)
    names = {event.name for event in profile.events()}
    assert {"bsrconv::fprop", "bsrconv::dgrad", "bsrconv::wgrad"} <= names


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gets_the_op():
    x, values, bias, pattern = (t.detach() if isinstance(t, torch.Tensor) else t for t in layer())
    xs = torch.stack([x, -2 * x])
    got = torch.vmap(lambda x: bs.conv2d(x, values, pattern, bias))(xs)
    assert torch.equal(got, torch.stack([bs.conv2d(x, values, pattern, bias) for x in xs]))


class Tagged(torch.Tensor):
    """A subclass that sees every function called on it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += "bsrconv" in str(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_get_the_op():
    x, values, bias, pattern = layer()
    y = bs.conv2d(x.detach().as_subclass(Tagged), values, pattern, bias)
    assert Tagged.calls == 1
    assert torch.equal(y.as_subclass(torch.Tensor), bs.conv2d(x, values, pattern, bias))


def test_a_repeated_call_checks_nothing_again(monkeypatch):
    x, values, bias, pattern = layer()
    first = parts(bs.conv2d(x, values, pattern, bias), x, values, bias)

    def checked(*_):
        raise AssertionError("checked twice")

    for op in (ops.FPROP, ops.DGRAD, ops.WGRAD):
        monkeypatch.setattr(op, "check", checked)
    again = parts(bs.conv2d(x, values, pattern, bias), x, values, bias)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(AssertionError, match="checked twice"):
        bs.conv2d(x.double(), values, pattern, bias)


# ---------------------------------------------------------------- CUDA graphs


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_a_training_step_captures_and_follows_a_new_mask(backend):
    """Forward, both gradients and the update in one graph; a new pattern of equal nnzb is seen by the replay."""
    torch.manual_seed(0)
    pattern = bs.BSRPattern.random((64, 64, 3, 3), (32, 32), 0.3)
    module = bs.BSRConv2d(pattern, padding=1, backend=backend, device="cuda")
    x = torch.randn(4, 64, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step():
        module.zero_grad(set_to_none=False)
        y = module(x)
        y.square().mean().backward()
        return y

    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(2):
        new = bs.BSRPattern.random(pattern.shape, (32, 32), 0.3)
        assert module.set_pattern(new.to("cuda"))
        with torch.no_grad():
            module.values.normal_()
        graph.replay()
        dense = module.to_dense()
        needed = dense(x)
        torch.testing.assert_close(y, needed, rtol=2e-2, atol=2e-2)
        (dw,) = torch.autograd.grad(needed.square().mean(), dense.weight)
        torch.testing.assert_close(module.values.grad, module.pattern.values_from_dense(dw), rtol=3e-2, atol=1e-3)


# ---------------------------------------------------------------- streams


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_launches_go_to_the_current_stream(backend):
    """Work queued on a stream of one's own behind a long kernel sees that kernel's result, and runs after it."""
    x, values, bias, pattern = layer("cuda", layout="contiguous")
    needed = bs.conv2d(3 * x, values, pattern, bias, 1, 1, backend=backend).detach()
    stream, scaled = torch.cuda.Stream(), torch.empty_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        torch.mul(x, 3, out=scaled)
        y = bs.conv2d(scaled, values, pattern, bias, 1, 1, backend=backend)
        assert not stream.query()  # nothing waited for the device
    stream.synchronize()
    assert torch.equal(y, needed)
