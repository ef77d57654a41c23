"""The native CPU backend: the same bits for any number of threads, and what it says where it cannot be compiled."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import blocksparse as bs
import processes
from blocksparse import layout, plan
from blocksparse.kernels import cpu, cpu_build
from runners import pytorch_threads
from strategies import Case, cases

ROOT = Path(__file__).parent.parent


def results(case: Case, threads: int) -> list[torch.Tensor]:
    x, values, bias, dy, pattern = case.tensors("cpu")
    with pytorch_threads(threads):
        return [
            bs.conv2d(x, values, pattern, bias, *case.conv, backend="cpu"),
            bs.conv2d_dgrad(dy, values, pattern, x.shape, *case.conv, backend="cpu"),
            bs.conv2d_wgrad(x, dy, pattern, *case.conv, backend="cpu"),
        ]


@given(cases("cpu", (torch.float32, torch.float64, torch.bfloat16)))
@settings(max_examples=60)
def test_any_number_of_threads_gives_the_same_bits(case):
    first, *others = ([t.contiguous() for t in results(case, threads)] for threads in (1, 2, 5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("blocksize", [(32, 32), (8, 8), (8, 1), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("shape", "size", "conv"),
    [
        pytest.param((64, 64, 3, 3), 56, ((1, 1), (1, 1), (1, 1)), id="3x3"),
        pytest.param((64, 32, 3, 3), 57, ((2, 2), (1, 1), (1, 1)), id="strided"),
        pytest.param((64, 128, 1, 1), 28, ((1, 1), (0, 0), (1, 1)), id="1x1"),
        pytest.param((64, 128, 1, 1), 13, ((1, 1), (0, 0), (1, 1)), id="1x1-odd"),
        pytest.param((64, 64, 3, 3), 14, ((1, 1), (2, 2), (2, 2)), id="dilated"),
        pytest.param((64, 32, 2, 2), 49, ((2, 1), (0, 0), (1, 1)), id="a-row-that-nothing-reads"),
        pytest.param((64, 32, 2, 2), 97, ((4, 4), (0, 0), (1, 1)), id="patches"),
    ],
)
def test_units_of_rows_and_images(shape, size, conv, blocksize):
    """Images that are cut into rows, rows of several images side by side, planes that are the tensor itself."""
    pattern = bs.BSRPattern.random(shape, blocksize, 0.2, torch.Generator().manual_seed(0))
    case = Case(pattern, 5, size, size, *conv, True, "contiguous", torch.float32, 0)
    x, values, bias, dy, _ = case.tensors("cpu")
    host = (values.double(), pattern)
    exact = [
        bs.reference.fprop(x.double(), *host, bias.double(), *conv),
        bs.reference.dgrad(dy.double(), *host, x.shape, *conv),
        bs.reference.wgrad(x.double(), dy.double(), pattern, *conv),
    ]
    for threads in (1, 3):
        for result, needed in zip(results(case, threads), exact, strict=True):
            torch.testing.assert_close(result.double(), needed, rtol=1e-4, atol=1e-4 * float(needed.abs().max()))


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "library", cpu_build.library.__wrapped__)
    monkeypatch.setattr(cpu_build, "_compiler", lambda: None)
    assert "no C++ compiler was found" in bs.available_backends()["cpu"]
    pattern = bs.BSRPattern.full((8, 8, 1, 1), (8, 8))
    x, values = torch.ones(1, 8, 2, 2), torch.ones(1, 8, 8)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this: no C.* compiler was found"):
        bs.conv2d(x, values, pattern, backend="cpu", stride=2)
    assert bs.conv2d(x, values, pattern).shape == (1, 8, 2, 2)


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ $# = 1 ] && exit 0\necho 'error: no room for vectors' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(broken))
    assert cpu_build.library.__wrapped__("float") == f"{broken} does not compile it: error: no room for vectors"


@pytest.mark.slow
def test_a_compiler_without_openmp_is_told_and_counted_as_one_thread(monkeypatch, tmp_path):
    partial = tmp_path / "c++"
    partial.write_text(
        "#!/bin/sh\ncase \"$*\" in *-fopenmp*) echo 'error: no omp.h' >&2; exit 1;; esac\n"
        f'exec {cpu_build._compiler()} "$@"\n'
    )
    partial.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(partial))
    with pytest.warns(RuntimeWarning, match=r"runs on one thread \(for more .*refused -fopenmp: error: no omp\.h"):
        found = cpu_build.library.__wrapped__("float")
    monkeypatch.setattr(cpu, "library", lambda number: found)
    plan.plan_conv.cache_clear()
    assert not cpu.parallel()
    pattern = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
    x, values = torch.randn(8, 64, 28, 28), torch.randn(pattern.nnzb, 8, 8)
    dense = bs.conv2d(x, values, pattern, None, 1, 1, backend="torch")
    assert bs.explain(x, values, pattern, 1, 1).backend == "cpu"
    with pytorch_threads(64):
        many = bs.explain(x, values, pattern, 1, 1)
        y = bs.conv2d(x, values, pattern, None, 1, 1, backend="cpu")
    plan.plan_conv.cache_clear()
    assert many.backend == "torch"  # 64 threads of PyTorch's against one
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_every_width_in_memory_that_held_nan(dtype):
    random = torch.Generator().manual_seed(0)
    small = {"generator": random, "dtype": dtype}
    pattern = bs.BSRPattern.random((4, 3, 3, 3), (2, 1), 0.6, generator=random)
    for width, (batch, stride, padding) in itertools.product(
        range(1, 41), ((5, 1, 1), (1, 1, 2), (3, 2, 1), (2, 2, 0), (2, 1, 0))
    ):
        if width + 2 * padding < 3:
            continue
        x = torch.randint(-4, 5, (batch, 3, 4, width), **small).requires_grad_()
        values = torch.randint(-4, 5, (pattern.nnzb, 2, 1), **small).requires_grad_()
        y = F.conv2d(x, pattern.to_dense(values), None, stride, padding)
        dy = torch.randint(-4, 5, y.shape, **small)
        expected = y, *torch.autograd.grad(y, (x, values), dy)
        for of_nan in (True, False):  # scratch memory of a call is that of the next one
            used = [torch.full_like(t, torch.nan) if of_nan else t.detach() for t in (x, values, dy)]
            here = [t.requires_grad_() for t in used[:2]]
            y = bs.conv2d(*here, pattern, None, stride, padding, backend="cpu")
            found = y, *torch.autograd.grad(y, here, used[2])
        for name, a, b in zip(("y", "dx", "dvalues"), found, expected, strict=True):
            assert torch.equal(a, b), (name, width, batch, stride, padding)


def test_a_change_of_any_source_compiles_anew(monkeypatch, tmp_path):
    commands = []

    def run(command):
        commands.append(command)
        if "-o" in command:
            Path(command[-1]).touch()
        return ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_build, "_run", run)
    sources = shutil.copytree(cpu_build.SOURCES, tmp_path / "native")
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    built = {cpu_build._built("c++", ())}
    for file in sorted(sources.iterdir()):
        file.write_text(f"{file.read_text()}\n")
        built.add(cpu_build._built("c++", ()))
    assert len(built) == 1 + len(list(sources.iterdir())) > 10
    assert all(path.exists() for path in built)
    asked = len(commands)
    assert cpu_build._built("c++", ()) in built
    assert len(commands) == asked + 2  # its version and its target: nothing is compiled


@pytest.mark.slow
def test_processes_that_start_at_once_share_one_library(tmp_path):
    code = """if True:
        from blocksparse.kernels import cpu_build
        cpu_build.FLAGS = tuple("-O0" if flag == "-O2" else flag for flag in cpu_build.FLAGS)  # compiled the sooner
        assert not isinstance(cpu_build.library('float'), str)
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    started = [processes.Process([sys.executable, "-c", code], env=env) for _ in range(2)]
    ended = [process.finish() for process in started]
    assert [process.returncode for process in ended] == [0, 0], "\n".join(process.stderr for process in ended)
    assert len(list((tmp_path / "blocksparse").iterdir())) == 1


def test_a_mask_written_in_place_is_never_missed():
    """No version counter sees the last of these."""
    x, pattern = torch.randn(1, 64, 6, 6), bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
    module = bs.BSRConv2d(pattern, padding=1, backend="cpu")
    for how in ("copy_", "data", "numpy"):
        module(x)
        new = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
        if how == "copy_":
            module.index.copy_(new.index)
        elif how == "data":
            module.index.data.copy_(new.index)
        else:
            module.index.numpy()[:] = new.index.numpy()
        torch.testing.assert_close(module(x), module.to_dense()(x), rtol=1e-4, atol=1e-4)
        assert module.pattern == new


def test_the_default_without_a_compiler_is_pytorch(monkeypatch):
    pattern = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
    x, values = torch.randn(8, 64, 28, 28), torch.randn(pattern.nnzb, 8, 8)
    assert bs.explain(x, values, pattern, 1, 1).backend == "cpu"
    monkeypatch.setattr(cpu, "library", cpu_build.library.__wrapped__)
    monkeypatch.setattr(cpu_build, "_compiler", lambda: None)
    plan.plan_conv.cache_clear()
    try:
        found = bs.explain(x, values, pattern, 1, 1)
    finally:
        plan.plan_conv.cache_clear()
    assert found.backend == "torch"
    assert "backend 'cpu' is not available: no C++ compiler was found" in str(found)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("blocksize", [(64, 1), (32, 32), (8, 8), (1, 1)], ids=str)
def test_long_sums_round_no_worse_than_pytorch(blocksize, memory_format):
    """Hundreds of products in a row: added up one by one they would be off by five times as much."""
    pattern = bs.BSRPattern.random((256, 512, 3, 3), blocksize, 0.2, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    x, dy = (layout.laid_out(torch.randn(2, c, 7, 7, generator=generator), memory_format) for c in (512, 256))
    values = torch.randn(pattern.nnzb, *blocksize, generator=generator)
    double = values.double(), pattern
    for exact, call in (
        (
            bs.reference.fprop(x.double(), *double, None, 1, 1),
            lambda b: bs.conv2d(x, values, pattern, None, 1, 1, backend=b),
        ),
        (
            bs.reference.dgrad(dy.double(), *double, x.shape, 1, 1),
            lambda b: bs.conv2d_dgrad(dy, values, pattern, x.shape, 1, 1, backend=b),
        ),
        (
            bs.reference.wgrad(x.double(), dy.double(), pattern, 1, 1),
            lambda b: bs.conv2d_wgrad(x, dy, pattern, 1, 1, backend=b),
        ),
    ):
        ours, own = (float((call(backend) - exact).square().mean().sqrt()) for backend in ("cpu", "torch"))
        assert ours <= 1.5 * own


@pytest.mark.parametrize("blocksize", [(8, 8), (8, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(("n", "stride"), [(3, 1), (3, 2), (5, 1), (20, 2)])
def test_windows_of_batch_last(blocksize, n, stride):
    """Images whose rows pass through the cache a few at a time, and whose rows are no whole vectors."""
    pattern = bs.BSRPattern.random((64, 64, 3, 3), blocksize, 0.05, torch.Generator().manual_seed(0))
    values, x = torch.randn(pattern.nnzb, *blocksize, dtype=torch.float64), torch.randn(n, 64, 40, 41).double()
    dy = torch.randn(n, 64, *(-(-size // stride) for size in (40, 41))).double()

    def products(x, dy):
        conv = {"stride": stride, "padding": 1, "backend": "cpu"}
        yield bs.conv2d(x, values, pattern, **conv)
        yield bs.conv2d_dgrad(dy, values, pattern, x.shape, **conv)
        yield bs.conv2d_wgrad(x, dy, pattern, **conv)

    for a, b in zip(products(x, dy), products(bs.to_batch_last(x), bs.to_batch_last(dy)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


class Bands:
    """Results between two bands of memory, which `check` finds as they were."""

    SIZE, FILL = 4096, 7.0

    def __init__(self):
        self.made: list[tuple[torch.Tensor, int]] = []

    def new(self, shape, like, memory_format, dtype=None):
        plain = layout.new(shape, like, memory_format, dtype)
        buffer = torch.full((plain.numel() + 2 * self.SIZE,), self.FILL, dtype=plain.dtype)
        self.made.append((buffer, plain.numel()))
        return buffer.as_strided(plain.shape, plain.stride(), self.SIZE)

    def check(self):
        assert self.made
        for buffer, size in self.made:
            assert bool((buffer[: self.SIZE] == self.FILL).all())
            assert bool((buffer[self.SIZE + size :] == self.FILL).all())
        self.made.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nothing_is_written_outside_of_the_results(monkeypatch, dtype):
    """By the library as it is compiled for users: a compiler may make a mistake that its sources do not have.

    g++ 12.2 made one for processors like skylake-avx512: the last pixels of the last of an odd number of filters were
    written once more behind y.
    """
    bands = Bands()
    monkeypatch.setattr(cpu, "new", bands.new)
    torch.manual_seed(0)
    for filters in (1, 2, 3, 4, 5, 8, 9, 13, 16, 24, 32):
        for channels in (1, filters):
            for taps, stride, size, rows in ((1, 1, 15, 3), (1, 1, 12, 2), (1, 2, 15, 2), (3, 1, 9, 3), (3, 2, 15, 2)):
                shape = rows * filters, 2 * channels, taps, taps
                pattern = bs.BSRPattern.random(shape, (filters, channels), 0.7)
                values = torch.randn(pattern.nnzb, filters, channels).to(dtype)
                for memory_format in "contiguous", "channels_last", "batch_last":
                    x = layout.laid_out(torch.randn(2, shape[1], size, size + 1).to(dtype), memory_format)
                    conv = stride, taps // 2
                    y = bs.conv2d(x, values, pattern, None, *conv, backend="cpu")
                    dx = bs.conv2d_dgrad(y, values, pattern, x.shape, *conv, backend="cpu")
                    dvalues = bs.conv2d_wgrad(x, y, pattern, *conv, backend="cpu")
                    bands.check()
                    needed = bs.reference.fprop(x.double(), values.double(), pattern, None, *conv)
                    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-5
                    assert float((y.double() - needed).norm()) <= allowed * float(needed.norm())
                    assert dx.isfinite().all()
                    assert dvalues.isfinite().all()


@pytest.mark.parametrize("blocksize", [(32, 16), (24, 1), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_what_follows_a_convolution_in_channels_last(blocksize, taps, relu):
    """A residual and a ReLU on filters that lie together, and on those that a row order takes apart."""
    generator = torch.Generator().manual_seed(0)
    shape = 4 * blocksize[0], 2 * blocksize[1], taps, taps
    random = bs.BSRPattern.random(shape, blocksize, 0.5, generator)
    order = torch.randperm(shape[0], generator=generator)
    mask = random.to_dense(torch.ones(random.nnzb, *blocksize)) != 0
    ordered = bs.BSRPattern.from_mask(mask[torch.argsort(order)], blocksize, order)
    x = torch.randn(3, shape[1], 9, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(3, shape[0], 9, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    bias, values = torch.randn(shape[0], generator=generator), torch.randn(random.nnzb, *blocksize, generator=generator)
    for pattern in random, ordered:
        found = bs.conv2d(x, values, pattern, bias, 1, taps // 2, backend="cpu", residual=residual, relu=relu)
        needed = (
            bs.reference.fprop(x.double(), values.double(), pattern, bias.double(), 1, taps // 2) + residual.double()
        )
        torch.testing.assert_close(found.double(), needed.relu() if relu else needed, rtol=1e-5, atol=1e-5)
        assert found.is_contiguous(memory_format=torch.channels_last)


def in_memory(t: torch.Tensor, memory_format: str) -> torch.Tensor:
    """`t` as it is named, or as every second column of something."""
    if memory_format != "gaps":
        return layout.laid_out(t, memory_format)
    whole = torch.full((*t.shape[:3], 2 * t.shape[3] + 1), float("nan"), dtype=t.dtype)
    whole[..., 1::2] = t
    return whole[..., 1::2]


@pytest.mark.parametrize("formats", [*zip(*[("contiguous", "channels_last", "gaps")] * 2, strict=True),
                                     ("contiguous", "channels_last")], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    ("n", "size", "conv"),
    [
        pytest.param(8, (14, 14), ((1, 1), (1, 1), (1, 1)), id="one-tile-a-row"),
        pytest.param(3, (7, 33), ((1, 1), (1, 1), (1, 1)), id="tiles-beyond-the-image"),
        pytest.param(2, (21, 17), ((1, 1), (2, 2), (2, 2)), id="dilated"),
        pytest.param(9, (16, 9), ((1, 1), (0, 2), (1, 1)), id="padded-on-two-sides"),
        pytest.param(2, (29, 35), ((2, 2), (1, 1), (1, 1)), id="strided"),
        pytest.param(2, (29, 35), ((1, 3), (1, 0), (1, 1)), id="strided-on-one-axis"),
    ],
)
@pytest.mark.parametrize("blocksize", [(1, 1), (1, 3), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tiles_in_lanes(dtype, blocksize, n, size, conv, formats):
    """Few filters a block, many products of a pixel: tiles at every border, units of which not all lanes have one."""
    generator = torch.Generator().manual_seed(0)
    k, c = 24 // blocksize[0] * blocksize[0], 18
    random = bs.BSRPattern.random((k, c, 3, 3), blocksize, 0.4, generator)
    order = torch.randperm(k, generator=generator)
    mask = random.to_dense(torch.ones(random.nnzb, *blocksize)) != 0
    ordered = bs.BSRPattern.from_mask(mask[torch.argsort(order)], blocksize, order)
    x = in_memory(torch.randn(n, c, *size, generator=generator).to(dtype), formats[0])
    values, bias = torch.randn(random.nnzb, *blocksize, generator=generator).to(dtype), torch.randn(k).to(dtype)
    shape = bs.ConvGeometry.of(x.shape, random.shape, *conv).y_shape
    dy, residual = (in_memory(torch.randn(shape, generator=generator).to(dtype), formats[1]) for _ in range(2))
    allowed = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype]
    wide = [t.double() for t in (x, values, bias, dy, residual)]
    for pattern in random, ordered:
        found, others = [], []
        for threads, results in (1, others), (3, found):
            with pytorch_threads(threads):
                results += (
                    bs.conv2d(x, values, pattern, bias, *conv, backend="cpu", residual=residual, relu=True),
                    bs.conv2d_dgrad(dy, values, pattern, x.shape, *conv, backend="cpu"),
                    bs.conv2d_wgrad(x, dy, pattern, *conv, backend="cpu"),
                )
        assert all(torch.equal(a, b) for a, b in zip(found, others, strict=True))
        y = bs.reference.fprop(wide[0], wide[1], pattern, wide[2], *conv)
        needed = [
            ((y.to(dtype).double() if dtype == torch.bfloat16 else y) + wide[4]).relu(),
            bs.reference.dgrad(wide[3], wide[1], pattern, x.shape, *conv),
            bs.reference.wgrad(wide[0], wide[3], pattern, *conv),
        ]
        for a, b in zip(found, needed, strict=True):
            assert float((a.double() - b).abs().max()) <= allowed * float(b.abs().max())


@pytest.mark.parametrize(
    "pixels", [(1, 1, 1), (300, 1, 1), (7, 1, 1), (1, 13, 1), (8, 7, 7), (3, 29, 31), (2, 56, 56)], ids=str
)
@pytest.mark.parametrize("blocksize", [(16, 16), (1, 1), (2, 5)], ids=str)
def test_pixels_of_1x1_kernels_as_rows(pixels, blocksize):
    """Images of a batch are joined and cut anew, any number of pixels, a prime one too; rows with a gap are not."""
    generator = torch.Generator().manual_seed(0)
    (n, h, w), shape = pixels, (32, 3 * blocksize[1], 1, 1)
    pattern = bs.BSRPattern.random(shape, blocksize, 0.5, generator)
    values = torch.randn(pattern.nnzb, *blocksize, generator=generator)
    whole = torch.randn(n, h, w + 1, shape[1], generator=generator).permute(0, 3, 1, 2)
    dense = whole[..., :w].contiguous(memory_format=torch.channels_last)
    dy = torch.randn(n, shape[0], h, w, generator=generator).contiguous(memory_format=torch.channels_last)
    for x in dense, whole[..., 1:]:
        for found, needed in (
            (bs.conv2d(x, values, pattern, backend="cpu"), bs.reference.fprop(x.double(), values.double(), pattern)),
            (
                bs.conv2d_dgrad(dy, values, pattern, x.shape, backend="cpu"),
                bs.reference.dgrad(dy.double(), values.double(), pattern, x.shape),
            ),
            (
                bs.conv2d_wgrad(x, dy, pattern, backend="cpu"),
                bs.reference.wgrad(x.double(), dy.double(), pattern),
            ),
        ):
            torch.testing.assert_close(found.double(), needed, rtol=1e-4, atol=1e-5 * float(needed.abs().max() + 1))
