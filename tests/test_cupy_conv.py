"""The CUDA C++ kernels beyond what the suites of all backends draw: every barrier, tile, tap group and precision."""

from __future__ import annotations

import ctypes
import mmap
import os
import re

import numpy as np
import pytest
import torch
from torch import Tensor

import blocksparse as bs
import emulator
from blocksparse import BSRPattern, ConvGeometry, index
from blocksparse.kernels import cupy_conv, slot_cost, slots
from blocksparse.kernels.slots import SlotTile
from emulator import Emulator, EmulatorError
from strategies import guarded

pytestmark = pytest.mark.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("fprop", "dgrad", "wgrad")
emulated = pytest.mark.skipif(DEVICE == "cuda", reason="about the emulator's build of the kernels")


class Work:
    """A random convolution and its three products, exact and by a tile of one's own."""

    def __init__(
        self,
        shape,
        blocksize,
        x_shape,
        conv,
        *,
        density=0.5,
        dtype=torch.float16,
        order=False,
        last_tap=True,
        tensors=None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pattern = BSRPattern.random(shape, blocksize, density, generator)
        if not last_tap:
            mask = self.pattern.to_mask()
            mask[..., -1, -1] = False
            mask[-blocksize[0] :, 10:] = False  # fewer chunks than other block-rows have
            self.pattern = BSRPattern.from_mask(mask, blocksize)
        if order:
            row_order = torch.randperm(shape[0], generator=generator)
            self.pattern = BSRPattern(shape, blocksize, self.pattern.indptr, self.pattern.indices, row_order)
        self.conv = conv
        self.g = ConvGeometry.of(x_shape, shape, *conv)
        shapes = self.g.x_shape, self.g.y_shape, (self.pattern.nnzb, *blocksize)
        self.x, self.dy, self.values = tensors or [torch.randn(s, generator=generator).to(dtype) for s in shapes]

    def tile(self, kind: str) -> SlotTile:
        return slot_cost.pick(kind, self.g, self.pattern.blocksize, self.pattern.nnzb, self.x.dtype)

    def candidates(self, kind: str) -> list[SlotTile]:
        return [*slots.candidates(kind, self.g, self.pattern.blocksize, self.pattern.nnzb, self.x.dtype)]

    def run(
        self,
        kind: str,
        tile: SlotTile | None = None,
        *,
        precision: str = "ieee",
        values_at: int = 0,
    ) -> Tensor:
        tile = tile or self.tile(kind)
        x, dy = (guarded(t, DEVICE, "batch_last") for t in (self.x, self.dy))
        buffer = torch.full((self.values.numel() + values_at,), float("nan"), dtype=self.values.dtype, device=DEVICE)
        values = buffer[values_at:].view(self.values.shape).copy_(self.values)
        p = self.pattern.to(DEVICE)
        tables = index.unpack(p.index, p.shape, p.blocksize, p.nnzb)
        if kind == "fprop":
            return cupy_conv.fprop(x, values, tables, None, self.g, tile, precision=precision).cpu()
        if kind == "dgrad":
            return cupy_conv.dgrad(dy, values, tables, self.g, tile, precision=precision).cpu()
        return cupy_conv.wgrad(x, dy, tables, self.g, tuple(values.shape), tile, precision=precision).cpu()

    def exact(self, kind: str, rounded=lambda t: t) -> Tensor:
        x, dy, values = rounded(self.x), rounded(self.dy), rounded(self.values)
        if kind == "fprop":
            return bs.reference.fprop(x, values, self.pattern, None, *self.conv)
        if kind == "dgrad":
            return bs.reference.dgrad(dy, values, self.pattern, self.g.x_shape, *self.conv)
        return bs.reference.wgrad(x, dy, self.pattern, *self.conv)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative to the norm; NaN where anything is."""
    return float((got.double() - exact).norm() / exact.norm())


# ---------------------------------------------------------------------- barriers

PLAIN, PADDED = ((1, 1), (1, 1), (1, 1)), ((2, 1), (1, 1), (1, 5))
WORKS = [
    # Taps without a block, a second group of images; several chunks; a stride that leaves pixels of x no tap; wide
    # blocks, whose values come in parts; many entries of few filters.
    Work((48, 40, 2, 2), (24, 1), (17, 40, 4, 9), PLAIN, last_tap=False),
    Work((16, 40, 3, 3), (8, 1), (3, 40, 6, 14), ((3, 3), (1, 1), (3, 3)), density=0.1),
    Work((16, 40, 3, 3), (8, 1), (16, 40, 6, 14), PLAIN),
    Work((80, 64, 3, 3), (80, 16), (3, 64, 6, 14), PADDED),
    Work((16, 300, 2, 2), (8, 1), (1, 300, 4, 4), PLAIN, density=0.3),
]


def in_parts(kind: str, tile: SlotTile, work: Work) -> SlotTile:
    """The tile with lists of few entries, which several turns make, and chunks, bands and pixels shared out."""
    taps, step, blocksize = work.g.taps, 16, work.pattern.blocksize
    if kind == "dgrad":
        shared_out = slots.classes(work.g) == 1 and work.g.k > max(blocksize[0], tile.filters)
        tile = tile._replace(lists=1 + shared_out, part=min(work.g.c, 16 * tile.mt), held=2)
        own = slots.bands(work.g, blocksize[0], tile)
        tile = tile._replace(units=work.g.c, capacity=own, planes=tile.part if own > 1 else 0)
    else:
        chunk = -(-tile.units * taps // step) * step
        tile = tile._replace(capacity=chunk, part=tile.units)
        if kind == "wgrad":
            tile = tile._replace(lists=2)
    return tile._replace(splits=2, shared=slots.layout(kind, work.g, blocksize, work.x.dtype, tile).shared)


BARRIERS = [  # of what the kernels share, those in fprop
    (kind, match.start())
    for kind in KINDS
    for match in re.finditer(r"(?<=\n)[ ]+(__syncthreads|cp_async_wait)\(\);", cupy_conv.source(kind))
    if kind == "fprop" or match.start() > cupy_conv.source(kind).index(f'#line 1 "{kind}.cu"')
]


@emulated
@pytest.mark.parametrize(  # g++ compiles each
    ("kind", "at"),
    [pytest.param(*line, marks=[] if i % 8 == 0 else pytest.mark.slow) for i, line in enumerate(BARRIERS)],
)
def test_every_barrier_is_needed(kind, at, monkeypatch):
    """Without any one of their barriers and waits the kernels are wrong, and the emulator shows it."""
    text = cupy_conv.source(kind)
    mutant = text[:at] + text[text.index(";", at) + 1 :]
    monkeypatch.setattr(cupy_conv, "source", lambda kind: mutant)
    monkeypatch.setattr(cupy_conv, "runtime", Emulator(seed=1))

    def wrong(work: Work, tile: SlotTile) -> bool:
        try:
            return not error(work.run(kind, tile), work.exact(kind)) < 1e-2
        except EmulatorError:
            return True

    def tiles(work: Work) -> list[SlotTile]:
        """The one that would run, and the same with lists that come in parts: one compilation."""
        return [in_parts(kind, work.tile(kind), work), work.tile(kind)]

    shown = any(wrong(work, tile) for work in WORKS * 3 for tile in tiles(work))
    assert shown, f"{kind} is right without line {text[:at].count(chr(10))}"


@emulated
@pytest.mark.slow
def test_the_sanitizers_find_nothing():
    """Every kind and number format, in bands and not; what the sanitizers do find is test_emulator's subject."""
    prelude = """
import conftest, torch
from blocksparse.kernels import cupy_conv
from emulator import CHECKED, Emulator
from test_cupy_conv import WORKS, Work, error
cupy_conv.runtime = Emulator(CHECKED)
def run(kind, number, dtype, precision):
    work = WORKS[number]
    work = Work(work.pattern.shape, work.pattern.blocksize, work.g.x_shape, work.conv, density=0.5, dtype=dtype)
    assert error(work.run(kind, precision=precision), work.exact(kind)) < 2e-3
"""
    cases = [
        f"run({kind!r}, {number}, torch.{dtype}, {precision!r})"
        for kind, number, dtype, precision in (
            ("fprop", 0, "float16", "ieee"), ("dgrad", 3, "bfloat16", "ieee"),
            ("wgrad", 1, "float32", "ieee"), ("dgrad", 1, "float32", "tf32"),
        )
    ]  # fmt: skip
    for case, found in zip(cases, emulator.sanitized(cases, prelude), strict=True):
        assert not found, (case, found)


# ---------------------------------------------------------------------- tiles


def variants(kind: str, dtype: torch.dtype) -> list[tuple[tuple[int, int], SlotTile]]:
    """Every cut of the warps that some layer may get: the last tile of each."""
    found = {}
    for blocksize in ((8, 1), (24, 1), (64, 2)):
        g = ConvGeometry(8, 24, 5, 7, 2 * blocksize[0], 3, 3, (1, 1), (1, 1))
        for tile in slots.candidates(kind, g, blocksize, 40, dtype):
            found[tile[:4]] = blocksize, tile
    return list(found.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "every"),
    [(torch.float16, 9), *(pytest.param(t, 3, marks=pytest.mark.slow) for t in (torch.float16, torch.float32))],
    ids=str,
)
def test_every_tile_is_right(kind, dtype, every, poisoned_memory):
    for blocksize, tile in variants(kind, dtype)[::every]:
        work = Work((2 * blocksize[0], 24, 3, 3), blocksize, (8, 24, 5, 7), PLAIN, density=0.1, dtype=dtype)
        limit = 1e-3 if dtype == torch.float16 else 2e-6
        for cut in (tile, in_parts(kind, tile, work)):
            assert error(work.run(kind, cut), work.exact(kind)) <= limit, cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "blocksize", "x_shape", "conv"),
    [
        pytest.param((16, 24, 6, 6), (8, 1), (2, 24, 9, 9), PLAIN, id="36-taps"),
        pytest.param((16, 8, 1, 37), (8, 8), (2, 8, 3, 40), ((1, 2), (0, 3), (1, 1)), id="37-taps-in-a-row"),
        pytest.param((8, 1500, 1, 1), (8, 1), (2, 1500, 3, 2), ((1, 1), (0, 0), (1, 1)), id="1500-channels"),
        pytest.param((8, 150, 3, 3), (8, 1), (2, 150, 4, 4), ((2, 2), (1, 1), (1, 1)), id="150-channels-strided"),
        pytest.param((160, 6, 3, 2), (160, 2), (17, 6, 5, 3), ((1, 1), (1, 1), (2, 1)), id="a-whole-group-of-160"),
        pytest.param((16, 12, 2, 1), (16, 3), (1, 12, 3, 3), ((3, 1), (0, 0), (1, 1)), id="3-wide"),
    ],
)
def test_taps_and_channels_in_parts(kind, shape, blocksize, x_shape, conv, poisoned_memory):
    work = Work(shape, blocksize, x_shape, conv, density=0.4, order=True)
    assert error(work.run(kind), work.exact(kind)) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "n"),
    [
        (torch.float16, 5),
        *(pytest.param(torch.float16, n, marks=pytest.mark.slow) for n in (24, 33)),
        *(pytest.param(torch.float32, n, marks=pytest.mark.slow) for n in (5, 20)),
    ],
    ids=str,
)
def test_batches_that_fill_no_tile(kind, dtype, n, poisoned_memory):
    """Slots of 16 bytes and such that are not, tiles of 16 images of which the last is not whole."""
    work = Work((16, 12, 3, 3), (8, 1), (n, 12, 5, 6), ((2, 1), (1, 0), (1, 1)), dtype=dtype, order=True)
    assert error(work.run(kind), work.exact(kind)) <= (1e-3 if dtype == torch.float16 else 2e-6)


@pytest.mark.parametrize("padding", [1, 0])
def test_images_smaller_than_the_stride(padding, poisoned_memory):
    """With padding 1 no tap reaches the only pixel: dx is zero, in every way in which its bands can be shared out."""
    conv = (2, 2), (0, padding), (1, 2)
    work = Work((16, 1, 1, 2), (8, 1), (1, 1, 1, 3 - 2 * padding), conv, density=1.0, dtype=torch.float32)
    exact = work.exact("dgrad")
    assert (exact.count_nonzero() == 0) == (padding == 1)
    for tile in {work.tile("dgrad"), *work.candidates("dgrad")[::7]}:
        assert torch.allclose(work.run("dgrad", tile).double(), exact, rtol=1e-6), tile


@pytest.mark.parametrize("kind", KINDS)
def test_tf32_rounds_its_operands_to_nearest(kind, poisoned_memory):
    """The product of the operands rounded to 10 bits of mantissa is exact but for fp32's own rounding."""

    def rounded(t: Tensor) -> Tensor:
        bits = (t.numpy().view(np.uint32) + 0x1000) & 0xFFFFE000
        return torch.from_numpy(bits.astype(np.uint32).view(np.float32))

    work = Work((32, 24, 3, 3), (16, 1), (5, 24, 6, 7), PLAIN, dtype=torch.float32)
    got = work.run(kind, precision="tf32")
    assert error(got, work.exact(kind, rounded)) < 1e-6
    assert error(got, work.exact(kind)) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_begin_anywhere(kind):
    """cp.async needs 16-byte addresses; a view of values need not begin at one."""
    work = Work((16, 16, 3, 3), (8, 1), (2, 16, 5, 5), PLAIN)
    assert error(work.run(kind, values_at=1), work.exact(kind)) < 1e-3


FAR = 2**29  # elements from one channel to the next: the eighth begins beyond 2**31 of them, and beyond 2**32 bytes


def far_apart(t: Tensor, released: list) -> Tensor:
    """t, batch_last, its channels FAR apart in addresses that are reserved; only their own pages exist."""
    n, c, h, w = t.shape
    size, libc = ((c - 1) * FAR + n * h * w) * t.element_size(), ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4]
    libc.munmap.argtypes, libc.mprotect.argtypes = (
        [ctypes.c_void_p, ctypes.c_size_t], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    )  # fmt: skip
    at = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert at != 2**64 - 1, os.strerror(ctypes.get_errno())
    released.append(lambda: libc.munmap(at, size))
    for i in range(c):  # FAR is a multiple of a page
        allowed = libc.mprotect(at + i * FAR * t.element_size(), n * h * w * t.element_size(), 3)  # to read and write
        assert not allowed, os.strerror(ctypes.get_errno())
    whole = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=t.dtype)
    return whole.as_strided((n, c, h, w), (1, FAR, w * n, n)).copy_(t)


@emulated
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_past_2_to_31_elements(kind, monkeypatch):
    """x, dy and results whose last channels lie beyond what 32 bits count, in elements and in bytes."""
    work, released = Work((8, 8, 2, 2), (8, 1), (16, 8, 3, 3), PLAIN), []
    p, tile = work.pattern, work.tile(kind)
    tables = index.unpack(p.index, p.shape, p.blocksize, p.nnzb)
    try:
        x, dy = far_apart(work.x, released), far_apart(work.dy, released)
        monkeypatch.setattr(
            cupy_conv, "new", lambda shape, *_: far_apart(torch.full(shape, torch.nan).half(), released)
        )
        if kind == "fprop":
            got = cupy_conv.fprop(x, work.values, tables, None, work.g, tile)
        elif kind == "dgrad":
            got = cupy_conv.dgrad(dy, work.values, tables, work.g, tile)
        else:
            got = cupy_conv.wgrad(x, dy, tables, work.g, tuple(work.values.shape), tile)
        assert error(got, work.exact(kind)) < 1e-3
    finally:
        for release in released:
            release()
