"""The CUDA C++ kernels beyond what the suites of all backends draw: every barrier, tile, tap group and precision."""

from __future__ import annotations

import mmap
import re

import numpy as np
import pytest
import torch
from torch import Tensor

import blocksparse as bs
import emulator
from blocksparse import BSRPattern, ConvGeometry, index
from blocksparse.kernels import cupy_conv, slots
from blocksparse.kernels.slots import SlotTile
from blocksparse.layout import laid_out
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
            self.pattern = BSRPattern.from_mask(mask, blocksize)
        if order:
            row_order = torch.randperm(shape[0], generator=generator)
            self.pattern = BSRPattern(shape, blocksize, self.pattern.indptr, self.pattern.indices, row_order)
        self.conv = conv
        self.g = ConvGeometry.of(x_shape, shape, *conv)
        shapes = self.g.x_shape, self.g.y_shape, (self.pattern.nnzb, *blocksize)
        self.x, self.dy, self.values = tensors or [torch.randn(s, generator=generator).to(dtype) for s in shapes]

    def tile(self, kind: str) -> SlotTile:
        return slots.pick(kind, self.g, self.pattern.blocksize, self.pattern.nnzb, self.x.dtype)

    def candidates(self, kind: str) -> list[SlotTile]:
        return [*slots.candidates(kind, self.g, self.pattern.blocksize, self.pattern.nnzb, self.x.dtype)]

    def run(
        self,
        kind: str,
        tile: SlotTile | None = None,
        *,
        precision: str = "ieee",
        channels_last: bool = False,
        guard: bool = True,
        values_at: int = 0,
    ) -> Tensor:
        tile = tile or self.tile(kind)
        layout = "channels_last" if channels_last else "contiguous"
        x, dy = (guarded(t, DEVICE, layout) if guard else laid_out(t, layout) for t in (self.x, self.dy))
        buffer = torch.full((self.values.numel() + values_at,), float("nan"), dtype=self.values.dtype, device=DEVICE)
        values = buffer[values_at:].view(self.values.shape).copy_(self.values)
        p = self.pattern.to(DEVICE)
        tables = index.unpack(p.index, p.shape, p.blocksize, p.nnzb)
        if kind == "fprop":
            return cupy_conv.fprop(x, values, tables, None, self.g, tile, precision=precision).cpu()
        if kind == "dgrad":
            return cupy_conv.dgrad(dy, values, tables, self.g, channels_last, tile, precision=precision).cpu()
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
    # A last tap without a block; a stride that leaves pixels of x no tap; several chunks; wide blocks; ranges.
    Work((24, 40, 2, 2), (24, 1), (1, 40, 4, 9), PLAIN, last_tap=False),
    Work((16, 40, 3, 3), (8, 1), (3, 40, 6, 14), ((3, 3), (1, 1), (3, 3)), density=0.1),
    Work((16, 40, 3, 3), (8, 1), (3, 40, 6, 14), PLAIN),
    Work((80, 64, 3, 3), (80, 16), (3, 64, 6, 14), PADDED),
    Work((8, 300, 2, 2), (8, 1), (1, 300, 4, 4), PLAIN, density=0.3),
]
BARRIERS = [
    (kind, match.start())
    for kind in KINDS
    for match in re.finditer(r"(?<=\n)[ ]+(__syncthreads|cp_async_wait)\(\);", cupy_conv.source(kind))
]


@emulated
@pytest.mark.parametrize(  # g++ compiles each
    ("kind", "at"),
    [pytest.param(*line, marks=[] if i % 4 == 0 else pytest.mark.slow) for i, line in enumerate(BARRIERS)],
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
        """The one that would run and the one of most warps and tap groups."""
        found = [work.tile(kind), work.candidates(kind)[-1]]
        if kind == "wgrad":  # several tiles to a split, several chunks to a list
            return [tile._replace(splits=max(1, tile.splits // 3), lists=2) for tile in found]
        return found

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
def run(kind, number, dtype, precision, bands):
    work = WORKS[number]
    work = Work(work.pattern.shape, work.pattern.blocksize, work.g.x_shape, work.conv, density=0.5, dtype=dtype)
    tile = [tile for tile in work.candidates(kind) if (tile.bands > 1) == bands][0]
    assert error(work.run(kind, tile, precision=precision), work.exact(kind)) < 2e-3
"""
    cases = [
        f"run({kind!r}, {number}, torch.{dtype}, {precision!r}, {bands})"
        for kind, number, dtype, precision, bands in (
            ("fprop", 0, "float16", "ieee", True), ("dgrad", 3, "bfloat16", "ieee", False),
            ("wgrad", 1, "float32", "ieee", True), ("dgrad", 1, "float32", "tf32", True),
        )
    ]  # fmt: skip
    for case, found in zip(cases, emulator.sanitized(cases, prelude), strict=True):
        assert not found, (case, found)


# ---------------------------------------------------------------------- tiles


def variants(kind: str, dtype: torch.dtype) -> list[tuple[tuple[int, int], SlotTile]]:
    """Every cut of the warps, every group of taps that some layer may get, and bands: the last tile of each."""
    found = {}
    for blocksize in ((16, 1), (24, 32)):
        g = ConvGeometry(9, 64, 7, 10, 2 * blocksize[0], 3, 3, (1, 1), (1, 1))
        for tile in slots.candidates(kind, g, blocksize, 40, dtype):
            taps = tile.taps if tile.warps * tile.mt == 4 else 0
            cut = (tile.mt, tile.warps, taps) if tile.bands == 1 else ()
            found[tile.nt, tile.bands, cut] = blocksize, tile
    return list(found.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "every"),
    [(torch.float16, 4), *(pytest.param(t, 1, marks=pytest.mark.slow) for t in (torch.float16, torch.float32))],
    ids=str,
)
def test_every_tile_is_right(kind, dtype, every, poisoned_memory):
    for blocksize, tile in variants(kind, dtype)[::every]:
        work = Work((2 * blocksize[0], 64, 3, 3), blocksize, (9, 64, 7, 10), PLAIN, density=0.1, dtype=dtype)
        splits = {"splits": 3, "lists": 2} if kind == "wgrad" else {}
        limit = 1e-3 if dtype == torch.float16 else 2e-6
        assert error(work.run(kind, tile._replace(**splits)), work.exact(kind)) <= limit, tile


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "blocksize", "x_shape", "conv"),
    [
        pytest.param((16, 24, 6, 6), (8, 1), (2, 24, 9, 9), PLAIN, id="36-taps-by-row"),
        pytest.param((16, 8, 1, 37), (8, 8), (2, 8, 3, 40), ((1, 2), (0, 3), (1, 1)), id="37-taps-one-by-one"),
        pytest.param((16, 8, 3, 3), (8, 4), (2, 8, 150, 9), ((2, 1), (70, 1), (70, 1)), id="vast-dilation"),
        pytest.param((8, 1500, 1, 1), (8, 1), (2, 1500, 3, 2), ((1, 1), (0, 0), (1, 1)), id="1500-channels"),
        pytest.param((8, 150, 3, 3), (8, 1), (2, 150, 4, 4), ((2, 2), (1, 1), (1, 1)), id="150-channels-strided"),
        pytest.param((160, 6, 3, 2), (160, 2), (17, 6, 5, 3), ((1, 1), (1, 1), (2, 1)), id="a-whole-group-of-160"),
        pytest.param((16, 128, 2, 1), (16, 128), (1, 128, 3, 3), ((3, 1), (0, 0), (1, 1)), id="128-wide"),
    ],
)
def test_taps_and_channels_in_parts(kind, channels_last, shape, blocksize, x_shape, conv, poisoned_memory):
    work = Work(shape, blocksize, x_shape, conv, density=0.4, order=True)
    assert error(work.run(kind, channels_last=channels_last), work.exact(kind)) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [pytest.param(n, marks=[] if n in (1, 4, 6) else pytest.mark.slow) for n in range(1, 8)])
def test_small_batches(kind, dtype, n, poisoned_memory):
    """A slot holds bands of rows of one image: more bands than rows too, borders and strides between them."""
    conv = [PLAIN, ((2, 1), (1, 0), (2, 1)), ((3, 2), (4, 1), (1, 1))][n % 3]
    work = Work((16, 12, 3, 3), (8, 1), (n, 12, 2 + 5 * n, 6), conv, dtype=dtype, order=True)
    banded = [tile for tile in work.candidates(kind) if tile.bands > 1]
    assert bool(banded) == (n % slots.slot_of(dtype) > 0)
    for tile in [work.tile(kind), *banded[-1:]]:
        for channels_last in (False, True):
            got = work.run(kind, tile, channels_last=channels_last)
            assert error(got, work.exact(kind)) <= (1e-3 if dtype == torch.float16 else 2e-6), tile


@pytest.mark.parametrize("kind", KINDS)
def test_tf32_rounds_its_operands_to_nearest(kind, poisoned_memory):
    """The product of the operands rounded to 10 bits of mantissa is exact but for fp32's own rounding."""

    def rounded(t: Tensor) -> Tensor:
        bits = (t.numpy().view(np.uint32) + 0x1000) & 0xFFFFE000
        return torch.from_numpy(bits.astype(np.uint32).view(np.float32))

    for blocksize in ((16, 1), (8, 8)):
        work = Work((32, 24, 3, 3), blocksize, (5, 24, 6, 7), PLAIN, dtype=torch.float32)
        got = work.run(kind, precision="tf32")
        assert error(got, work.exact(kind, rounded)) < 1e-6
        assert error(got, work.exact(kind)) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_begin_anywhere(kind):
    """cp.async needs 16-byte addresses; a view of values need not begin at one."""
    work = Work((16, 16, 3, 3), (8, 1), (2, 16, 5, 5), PLAIN)
    assert error(work.run(kind, values_at=1), work.exact(kind)) < 1e-3


VAST = 2**27  # 3 * VAST * 8 elements: past 2**31, and never touched but for a few pages


def vast(shape: tuple[int, int, int, int], channels_last: bool) -> Tensor:
    """Zeros whose pages exist once they are touched."""
    n, c, h, w = shape
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    zeros = torch.frombuffer(mmap.mmap(-1, 2 * n * c * h * w, flags=flags), dtype=torch.float16)
    return zeros.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else zeros.view(shape)


@emulated
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("far", ["taps", "pixels"])
def test_inputs_past_2_to_31_elements(channels_last, far):
    """The pixels at both ends of three lines, read by six taps or by six output pixels."""
    kernel, near_conv = (3, 2) if far == "taps" else (1, 1), ((1, 1), (0, 0), (1, 1))
    far_conv = ((1, 1), (0, 0), (1, VAST - 1)) if far == "taps" else ((1, VAST - 1), (0, 0), (1, 1))
    near = Work((8, 8, *kernel), (8, 1), (1, 8, 3, 2), near_conv, density=1)
    x = vast((1, 8, 3, VAST), channels_last)
    x[..., :: VAST - 1] = near.x
    work = Work((8, 8, *kernel), (8, 1), x.shape, far_conv, density=1, tensors=(x, near.dy, near.values))
    for kind in ("fprop", "wgrad"):
        assert error(work.run(kind, guard=False, channels_last=channels_last), near.exact(kind)) < 1e-3


@emulated
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_past_2_to_31_elements(channels_last):
    """dgrad of three pixels inside a padding of VAST / 2 on both sides."""
    near = Work((8, 8, 1, 1), (8, 1), (1, 8, 3, 1), ((1, 1), (0, 0), (1, 1)), density=1)
    conv = ((1, 1), (0, VAST // 2), (1, 1))
    dy = vast((1, 8, 3, VAST + 1), channels_last)
    dy[..., VAST // 2 : VAST // 2 + 1] = near.dy
    work = Work((8, 8, 1, 1), (8, 1), (1, 8, 3, 1), conv, density=1, tensors=(near.x, dy, near.values))
    assert error(work.run("dgrad", guard=False, channels_last=channels_last), near.exact("dgrad")) < 1e-3
