"""fprop, dgrad and wgrad of every backend: the reference, adjointness, determinism, memory formats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blocksparse as bs
from blocksparse.layout import laid_out, memory_format_of
from oracle import assert_products
from runners import RUNNERS
from strategies import DRAWS, Case, cases

pytestmark = pytest.mark.device
# Triton's interpreter is slow: some tests leave it to the slow run.
MOST = [pytest.param(r, marks=pytest.mark.slow) if r == ("triton", "cpu") else r for r in RUNNERS]
TILED = [runner for runner in RUNNERS if runner[0] in ("triton", "cupy")]
HALF = (torch.float16, torch.bfloat16)


def share(runner: tuple[str, str], part: int) -> settings:
    """Triton's interpreter takes seconds a case; on a GPU, and under g++, a new case compiles for a second."""
    default = settings.get_profile(settings.get_current_profile_name()).max_examples
    draws = {"cpu": default // 12, "cuda": default // 5}[runner[1]] if runner in TILED else default * 3
    if runner[0] == "cpu" and part == 1:  # planes, units, rows in place, transpositions: many ways through its source
        draws *= 3
    return settings(
        max_examples=max(1, draws // part),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("part", DRAWS)
def test_products_match_the_reference(runner, dtype, part, poisoned_memory):
    backend, device = runner

    @share(runner, part)
    @given(cases(backend, (dtype,)))
    def check(case: Case):
        x, values, bias, dy, pattern = case.tensors(device)
        results = assert_products(x, values, pattern, bias, dy, *case.conv, backend)
        for result, like in ((results["fprop"], x), (results["dgrad"], dy)):
            assert laid_out(result, memory_format_of(like)) is result
        again = bs.conv2d(x, values, pattern, bias, *case.conv, backend=backend)
        assert torch.equal(again, results["fprop"])
        assert torch.equal(bs.conv2d_dgrad(dy, values, pattern, x.shape, *case.conv, backend=backend), results["dgrad"])
        assert torch.equal(bs.conv2d_wgrad(x, dy, pattern, *case.conv, backend=backend), results["wgrad"])

    check()


@pytest.mark.parametrize("device", sorted({device for _, device in RUNNERS}))
@given(case=cases("torch", (torch.float64,)))
@settings(max_examples=60)
def test_adjointness_in_float64(device, case: Case):
    """<dy, fprop(x)> = <dgrad(dy), x> = <wgrad(x, dy), values>, to float64's last digits: no reference involved."""
    x, values, _, dy, pattern = case.tensors(device)
    y = bs.conv2d(x, values, pattern, None, *case.conv, backend="torch")
    dx = bs.conv2d_dgrad(dy, values, pattern, x.shape, *case.conv, backend="torch")
    dv = bs.conv2d_wgrad(x, dy, pattern, *case.conv, backend="torch")
    scale = float((dv.abs() * values.abs()).sum()) + float((y.abs() * dy.abs()).sum()) + 1e-300
    products = [float((a * b).sum()) for a, b in ((dy, y), (dx, x), (dv, values))]
    assert abs(products[0] - products[1]) <= 1e-12 * scale
    assert abs(products[0] - products[2]) <= 1e-12 * scale


@pytest.mark.parametrize("runner", TILED, ids="-".join)
@pytest.mark.parametrize("part", DRAWS)
def test_adjointness_in_float32(runner, part):
    @share(runner, part)
    @given(cases(runner[0], (torch.float32,)))
    def check(case: Case):
        x, values, _, dy, pattern = case.tensors(runner[1])
        with full_fp32():
            y = bs.conv2d(x, values, pattern, None, *case.conv, backend=runner[0])
            dx = bs.conv2d_dgrad(dy, values, pattern, x.shape, *case.conv, backend=runner[0])
            dv = bs.conv2d_wgrad(x, dy, pattern, *case.conv, backend=runner[0])
        y, dx, dv, dy, x, values = (t.double() for t in (y, dx, dv, dy, x, values))
        scale = float((dv.abs() * values.abs()).sum()) + float((y.abs() * dy.abs()).sum()) + 1e-300
        assert abs(float((dy * y).sum() - (dx * x).sum())) <= 1e-5 * scale
        assert abs(float((dy * y).sum() - (dv * values).sum())) <= 1e-5 * scale

    check()


@pytest.mark.parametrize("runner", TILED, ids="-".join)
@pytest.mark.parametrize("part", DRAWS)
def test_backends_agree(runner, part):
    """The same numbers from implementations that share no code, in full fp32."""

    @share(runner, part)
    @given(cases(runner[0], (torch.float32,)))
    def check(case: Case):
        *tensors, pattern = case.tensors(runner[1])
        sizes = [None if t is None else t.abs() for t in tensors]

        def results(backend: str, x, values, bias, dy):
            yield bs.conv2d(x, values, pattern, bias, *case.conv, backend=backend)
            yield bs.conv2d_dgrad(dy, values, pattern, x.shape, *case.conv, backend=backend)
            yield bs.conv2d_wgrad(x, dy, pattern, *case.conv, backend=backend)

        with full_fp32():
            for ours, theirs, terms in zip(
                results(runner[0], *tensors), results("torch", *tensors), results("torch", *sizes), strict=True
            ):  # the sums of the sizes of what is added
                assert ((ours - theirs).abs() <= 1e-6 * terms + 1e-12).all(), (ours - theirs).abs().max()

    check()


@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
@pytest.mark.parametrize(
    ("shape", "blocksize", "h", "conv"),
    [
        # Real layers at a size that the interpreter can run: shapes, not pixels, are what matters here.
        pytest.param((64, 64, 3, 3), (32, 32), 9, ((1, 1), (1, 1), (1, 1)), id="resnet50-stage1"),
        pytest.param((128, 64, 3, 3), (64, 32), 9, ((2, 2), (1, 1), (1, 1)), id="strided-3x3"),
        pytest.param((128, 64, 1, 1), (32, 64), 8, ((2, 2), (0, 0), (1, 1)), id="strided-1x1"),
        pytest.param((64, 128, 1, 1), (64, 128), 7, ((1, 1), (0, 0), (1, 1)), id="1x1"),
        pytest.param((32, 32, 7, 7), (16, 16), 11, ((2, 2), (3, 3), (1, 1)), marks=pytest.mark.slow, id="7x7"),
        pytest.param((32, 32, 5, 5), (32, 8), 7, ((1, 1), (2, 2), (1, 1)), id="5x5"),
        pytest.param((32, 48, 1, 7), (16, 16), 9, ((1, 1), (0, 3), (1, 1)), id="1x7"),
        pytest.param((32, 32, 3, 3), (16, 16), 12, ((1, 1), (4, 2), (4, 2)), id="dilated"),
        pytest.param((128, 128, 3, 3), (128, 128), 4, ((1, 1), (1, 1), (1, 1)), id="widest-blocks"),
    ],
)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_layers_of_real_networks(runner, shape, blocksize, h, conv, memory_format, poisoned_memory):
    backend, device = runner
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    pattern = bs.BSRPattern.random(shape, blocksize, 0.25, torch.Generator().manual_seed(seed))
    halves = (torch.float16,) if backend == "cupy" and shape[2] == 7 else ()
    for dtype in (torch.float32, *halves):
        case = Case(pattern, 2, h, h + 1, *conv, True, memory_format, dtype, seed)
        x, values, bias, dy, there = case.tensors(device)
        assert_products(x, values, there, bias, dy, *conv, backend)


@pytest.mark.parametrize("runner", MOST, ids="-".join)
@given(data=st.data())
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
def test_inputs_with_any_strides(runner, data):
    """Expanded, transposed, sliced and flipped-memory inputs give what their contiguous copies give."""
    backend, device = runner
    case = data.draw(cases(backend, (torch.float32,)))
    x, values, bias, dy, pattern = case.tensors(device)

    def odd(t: torch.Tensor) -> torch.Tensor:
        how = data.draw(st.sampled_from(["step", "transposed", "expanded"]))
        if how == "step":
            wide = torch.full((*t.shape[:3], 2 * t.shape[3]), float("nan"), device=device)
            return wide[..., ::2].copy_(t)
        if how == "transposed":
            return t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        return t[:, :1].expand_as(t)

    x, dy = odd(x), odd(dy)
    assert_products(x, values, pattern, bias, dy, *case.conv, backend)


def full_fp32():
    """fp32 products without tf32, whatever the caller's settings were."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@pytest.mark.parametrize("runner", RUNNERS[:2], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["sum", "relu"])
def test_what_follows_a_convolution(runner, dtype, relu, poisoned_memory):
    """The same bits as operators of their own, which is also how it is differentiated."""
    backend, device = runner

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cases(backend, (dtype,)))
    def check(case: Case):
        x, values, bias, residual, pattern = case.tensors(device)
        alone = bs.conv2d(x, values, pattern, bias, *case.conv, backend=backend)
        needed = alone + residual
        needed = needed.relu() if relu else needed
        more = {"residual": residual, "relu": relu, "backend": backend}
        assert torch.equal(bs.conv2d(x, values, pattern, bias, *case.conv, **more), needed)
        only = bs.conv2d(x, values, pattern, bias, *case.conv, relu=relu, backend=backend)
        assert torch.equal(only, alone.relu() if relu else alone)
        values.requires_grad_()
        y = bs.conv2d(x, values, pattern, bias, *case.conv, **more)
        assert torch.equal(y, needed)
        if case.n:
            y.sum().backward()
            dy = (needed > 0).to(dtype) if relu else torch.ones_like(needed)
            assert torch.equal(values.grad, bs.conv2d_wgrad(x, dy, pattern, *case.conv, backend=backend))

    check()


def test_a_residual_of_another_shape_is_refused():
    pattern = bs.BSRPattern.full((8, 8, 3, 3), (8, 8))
    x, values = torch.ones(1, 8, 5, 5), torch.ones(9, 8, 8, requires_grad=True)
    for residual, text in (
        (torch.ones(1, 8, 5, 5), r"residual has shape \(1, 8, 5, 5\); this convolution needs \(1, 8, 3, 3\)"),
        (torch.ones(1, 8, 3, 3).double(), r"residual is torch.float64 on cpu and x torch.float32 on cpu"),
    ):
        for v in (values, values.detach()):
            with pytest.raises(ValueError, match=text):
                bs.conv2d(x, v, pattern, residual=residual)
