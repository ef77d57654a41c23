"""What the property tests draw: patterns, geometries, and inputs that are fresh, non-zero and between NaN guards."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import blocksparse as bs
from blocksparse import BSRPattern
from blocksparse.layout import FORMATS, new

GUARD = 64  # elements of NaN before and after every input

# A few, because g++ compiles each: single channels, 16-byte pieces of channels, a second CTA that is not full (40).
CUPY_BLOCKSIZES = [(8, 1), (16, 1), (32, 1), (40, 2), (8, 16)]

# By what the number of random cases is divided: some of them in every run, all of them in the slow one.
DRAWS = [pytest.param(8, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]

ANY_KERNEL = st.tuples(st.integers(1, 4), st.integers(1, 4))


@st.composite
def blocksizes(draw: st.DrawFn, backend: str = "torch") -> tuple[int, int]:
    if backend == "triton":
        sizes = st.sampled_from([8, 16, 32])
        return draw(sizes), draw(sizes)
    if backend == "cupy":
        return draw(st.sampled_from(CUPY_BLOCKSIZES))
    if backend == "cpu":
        kind = draw(st.sampled_from(["any", "wide", "few"]))
        if kind == "wide":  # whole vectors of filters or channels, halves of one, and several
            return draw(st.sampled_from([8, 16, 24, 32, 40, 64, 104])), draw(st.sampled_from([1, 2, 8, 16, 32, 40]))
        if kind == "few":
            return draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return draw(st.integers(1, 9)), draw(st.one_of(st.just(1), st.integers(1, 6)))


@st.composite
def patterns(
    draw: st.DrawFn,
    backend: str = "torch",
    max_blocks: int = 4,
    kernels: st.SearchStrategy[tuple[int, int]] = ANY_KERNEL,
) -> BSRPattern:
    """Any pattern: random blocks, equal groups of channels x taps, full, empty, empty block-rows and -columns."""
    bk, bc = draw(blocksizes(backend))
    if backend == "cpu" and max(bk, bc) < 4:  # enough products of a pixel to pay for tiles in lanes
        max_blocks *= draw(st.sampled_from([1, 6]))
    k_blocks = draw(st.integers(1, max_blocks))
    # The cupy backend takes up to 32 single channels at once.
    c_blocks = draw(st.integers(1, 40 if backend == "cupy" and bc == 1 else max_blocks))
    r, s = draw(kernels)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["random", "random", "groups", "groups", "full", "empty", "holes"]))
    grid = torch.zeros(k_blocks, c_blocks, r * s, dtype=torch.bool)
    if kind == "full":
        grid[:] = True
    elif kind in ("random", "holes"):
        grid = torch.rand(grid.shape, generator=generator) < draw(st.sampled_from([0.1, 0.4, 0.8]))
        if kind == "holes":
            grid[draw(st.integers(0, k_blocks - 1))] = False
            grid[:, draw(st.integers(0, c_blocks - 1))] = False
    elif kind == "groups":
        channels, taps = draw(st.integers(1, c_blocks)), draw(st.integers(1, r * s))
        for row in grid:
            chosen = torch.randperm(c_blocks, generator=generator)[:channels]
            row[chosen[:, None], torch.randperm(r * s, generator=generator)[:taps]] = True
    mask = grid.view(k_blocks, 1, c_blocks, 1, r, s).expand(-1, bk, -1, bc, -1, -1)
    mask = mask.reshape(k_blocks * bk, c_blocks * bc, r, s)
    if not draw(st.booleans()):
        return BSRPattern.from_mask(mask, (bk, bc))
    order = torch.randperm(k_blocks * bk, generator=generator)
    return BSRPattern.from_mask(mask[torch.argsort(order)], (bk, bc), order)


@dataclass
class Case:
    """One convolution to run: everything but the tensors' content, which `tensors` makes from the seed."""

    pattern: BSRPattern
    n: int
    h: int
    w: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    bias: bool
    memory_format: str
    dtype: torch.dtype
    seed: int

    @property
    def geometry(self) -> bs.ConvGeometry:
        return bs.ConvGeometry.of(
            (self.n, self.pattern.shape[1], self.h, self.w),
            self.pattern.shape,
            self.stride,
            self.padding,
            self.dilation,
        )

    @property
    def conv(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.stride, self.padding, self.dilation

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor, BSRPattern]:
        """x, values, bias, dy, pattern on `device`; each tensor non-zero, in its own NaN guard band."""
        g = self.geometry
        generator = torch.Generator().manual_seed(self.seed)
        x = guarded(nonzero(g.x_shape, self.dtype, generator), device, self.memory_format)
        dy = guarded(nonzero(g.y_shape, self.dtype, generator), device, self.memory_format)
        shape = (self.pattern.nnzb, *self.pattern.blocksize)
        values = guarded(nonzero(shape, self.dtype, generator), device)
        bias = guarded(nonzero((g.k,), self.dtype, generator), device) if self.bias else None
        return x, values, bias, dy, self.pattern.to(device)


@st.composite
def cases(draw: st.DrawFn, backend: str = "torch", dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    """Strides, dilations and paddings that differ per axis, padding larger than needed, odd sizes, N = 0."""
    kernels = st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.sampled_from(
        [(1, 1), (3, 3), (1, 5), (5, 1), (7, 1)]
    )
    pattern = draw(patterns(backend, max_blocks=3 if backend == "triton" else 4, kernels=kernels))
    _, _, r, s = pattern.shape
    two = st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.just((1, 1)) | st.just((2, 2))
    stride, dilation = draw(two), draw(st.tuples(st.integers(1, 2), st.integers(1, 2)) | st.just((1, 1)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just((r // 2, s // 2)))
    # The smallest input with at least one output pixel, and some more.
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, (r, s), padding, strict=True)]
    wide = backend == "cpu" and draw(st.booleans())  # rows of several vectors
    h, w = (draw(st.integers(low, low + more)) for low, more in zip(least, (7, 60 if wide else 7), strict=True))
    # 9: not one slot of 8, nor vectors of images; 17: two chunks of these.
    n = draw(st.sampled_from({"cupy": [1, 1, 2, 3, 0, 9], "cpu": [1, 1, 2, 3, 0, 9, 17]}.get(backend, [1, 1, 2, 3, 0])))
    return Case(
        pattern,
        n,
        h,
        w,
        stride,
        padding,
        dilation,
        draw(st.booleans()),
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(dtypes)),
        draw(st.integers(0, 2**32 - 1)),
    )


def nonzero(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers pushed away from zero: a product that is lost always shows."""
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (t + 0.25 * torch.where(t < 0, -1.0, 1.0)).to(dtype)


def guarded(
    t: Tensor,
    device: str | torch.device,
    memory_format: str = "contiguous",
    around: float = float("nan"),
) -> Tensor:
    """`t` in the middle of a buffer of NaN: a read outside it poisons the result. Or of another number: it does not."""
    buffer = torch.full((t.numel() + 2 * GUARD,), around, dtype=t.dtype, device=device)
    strides = new(t.shape, torch.empty((), device="meta"), memory_format).stride()  # also along sizes of one
    inside = buffer.as_strided(t.shape, strides, GUARD)
    return inside.copy_(t)
