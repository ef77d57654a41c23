"""PyTorch's own convolution where it crashes or is wrong: every place that calls it keeps clear of that."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import blocksparse as bs
import processes
from blocksparse.kernels import aten_conv

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("seed", "count"), [(0, 10), pytest.param(1, 120, marks=pytest.mark.slow)])
def test_only_padding_and_strided_pixels_against_the_reference(seed, count):
    """In a process of its own: a crash is a failure, and its last line is the convolution that crashed."""
    command = [sys.executable, str(ROOT / "tests" / "padding_sweep.py"), str(seed), str(count)]
    # Threads that do not spin while they wait: there may be more of them than cores.
    paths = os.pathsep.join(str(p) for p in (ROOT, ROOT / "tests"))
    env = os.environ | {"PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"}
    result = processes.run(command, env=env)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout.splitlines()[-1]}\n{result.stderr[-4000:]}"
    assert result.stdout.endswith("done\n")


sizes = st.tuples(st.integers(0, 5), st.integers(0, 5))
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(sizes, pairs, pairs, st.tuples(st.integers(0, 8), st.integers(0, 8)), pairs)
def test_only_padding_is_its_definition(size, kernel, stride, padding, dilation):
    g = bs.ConvGeometry(1, 1, *size, 1, *kernel, stride, padding, dilation)
    met = [
        any(
            0 <= out * stride[i] + tap * dilation[i] - padding[i] < size[i]
            for out in range(outs)
            for tap in range(taps)
        )
        for i, (outs, taps) in enumerate(zip((g.p, g.q), kernel, strict=True))
    ]
    assert g.only_padding == (not all(met))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("blocksize", [(4, 4), (2, 1)])
def test_an_image_without_rows_gives_the_bias(backend, blocksize, poisoned_memory):
    """All of it is padding."""
    x, bias = torch.randn(2, 4, 0, 3), torch.randn(4)
    pattern = bs.BSRPattern.random((4, 4, 3, 3), blocksize, 0.8)
    values = torch.randn(pattern.nnzb, *blocksize)
    y = bs.conv2d(x, values, pattern, bias, 1, 2, backend=backend)
    assert torch.equal(y, bias.view(1, 4, 1, 1).expand(2, 4, 2, 5))
    assert not bs.conv2d(x, values, pattern, None, 1, 2, backend=backend).any()
    assert bs.conv2d_dgrad(y, values, pattern, x.shape, 1, 2, backend=backend).shape == x.shape
    assert not bs.conv2d_wgrad(x, y, pattern, 1, 2, backend=backend).any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_in_the_format_that_was_asked_for(layout, dtype):
    """Whatever the product itself was computed in."""
    for g in (
        bs.ConvGeometry.of((2, 4, 7, 8), (6, 4, 3, 3), 2, 1),
        bs.ConvGeometry.of((2, 4, 7, 8), (6, 4, 1, 1), 2, 0),
        bs.ConvGeometry.of((2, 4, 7, 8), (6, 4, 1, 1), 2, 1),
        bs.ConvGeometry.of((2, 4, 4, 1), (6, 4, 3, 3), 2, (1, 5), 2),
    ):
        x, dy = (torch.randn(s, dtype=dtype).contiguous(memory_format=layout) for s in (g.x_shape, g.y_shape))
        weight = torch.randn(g.weight_shape, dtype=dtype)
        y = aten_conv.fprop(x, weight, None, g)
        dx = aten_conv.dgrad(dy, weight, g, layout == torch.channels_last)
        assert y.is_contiguous(memory_format=layout)
        assert dx.is_contiguous(memory_format=layout)
        assert (tuple(y.shape), tuple(dx.shape)) == (g.y_shape, g.x_shape)
        assert aten_conv.wgrad(x, dy, g).shape == weight.shape


@pytest.mark.parametrize("kernel", [(1, 5), (3, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("width", [1, 4])
def test_one_channel_strided_in_channels_last(kernel, width, poisoned_memory):
    """PyTorch reads outside such an x: whatever lies there, the result is the reference's."""
    g = bs.ConvGeometry.of((2, 1, 5, width), (6, 1, *kernel), (1, 3), (2, 2))
    x = torch.randn(g.x_shape).as_strided(g.x_shape, (5 * width, 1, width, 1))  # the strides of channels_last
    weight = torch.randn(g.weight_shape)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, (1, 3), 2)
    for _ in range(20):
        junk = [torch.full((size,), 1e12) for size in range(50, 2000, 150)]
        del junk
        torch.testing.assert_close(aten_conv.fprop(x, weight, None, g).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_image_under_1x1_kernels_is_a_matrix(groups, bias, monkeypatch):
    """As a GPU multiplies two-byte types, here in float64; what is no product of matrices is convolved."""
    asked, by_matrices = [], aten_conv.by_matrices

    def here(like: torch.Tensor, g: bs.ConvGeometry, channels_last: bool) -> bool:
        assert not by_matrices(like, g, channels_last)
        asked.append(g.of_matrices and not channels_last)
        return asked[-1]

    monkeypatch.setattr(aten_conv, "by_matrices", here)
    pattern = bs.BSRPattern.random((8, 6 // groups, 1, 1), (2, 1), 0.5).grouped(groups)
    values, given = torch.randn(pattern.nnzb, 2, 1, dtype=torch.float64), torch.randn(8) if bias else None
    for x_shape, stride, taken in (((1, 6, 3, 5), 1, True), ((2, 6, 3, 5), 1, False), ((1, 6, 3, 5), 2, False)):
        x, asked[:] = torch.randn(x_shape, dtype=torch.float64), []
        given = None if given is None else given.double()
        y = bs.conv2d(x, values, pattern, given, stride, backend="torch")
        dx = bs.conv2d_dgrad(y, values, pattern, x.shape, stride, backend="torch")
        assert asked == [taken and groups == 1] * 2
        torch.testing.assert_close(y, bs.reference.fprop(x, values, pattern, given, stride))
        torch.testing.assert_close(dx, bs.reference.dgrad(y, values, pattern, x.shape, stride))
