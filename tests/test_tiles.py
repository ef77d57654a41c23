"""Tiles: the predicate refuses by name and reason, the table covers the rest, and every shipped tile computes right."""

from __future__ import annotations

import mmap
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import blocksparse as bs
from blocksparse import ConvGeometry, index
from blocksparse.geometry import KINDS
from blocksparse.kernels import gpus, tiles
from blocksparse.kernels.tiles import TABLE, Entry, Tile

pytestmark = pytest.mark.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHS = ("", "sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942")
PLAIN = ConvGeometry(2, 64, 14, 14, 64, 3, 3, (1, 1), (1, 1))
SIDES = st.sampled_from(range(8, 129, 8))


# ---------------------------------------------------------------------- the predicate


def test_plain_work_is_taken():
    for dtype in tiles.DTYPES:
        for arch in ARCHS[1:]:
            assert tiles.refusal(PLAIN, (32, 32), dtype, "cuda", arch) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": (32, 1)}, r"bc = 1: the gather granule is 16 bytes, 8 fp16 channels.* use backend='torch'"),
        ({"blocksize": (1, 8)}, r"bk = 1: the gather granule"),
        ({"blocksize": (12, 8)}, r"bk = 12: .*multiple of 8 from 8 to 128"),
        ({"blocksize": (8, 136)}, r"bc = 136: .*at most 128 wide"),
        ({"dtype": torch.float64}, r"dtype = torch.float64: it takes torch.float16, torch.bfloat16, torch.float32"),
        ({"device_type": "mps"}, r"device = mps: it runs on CUDA and ROCm GPUs"),
        ({"arch": "sm_75"}, r"arch = sm_75: .*sm_80 or later"),
        ({"n": 2**23}, r"N\*H\*W = 1644167168: .*below 1073741824; split the batch"),
        ({"padding": (2**29, 0)}, r"N\*P\*Q = "),
        ({"padding": (2**29, 0), "n": 0}, r"H \+ 2\*padding = "),
        ({"padding": (0, 2**29), "n": 0}, r"W \+ 2\*padding = "),
        ({"stride": (2**30, 1)}, r"stride = 1073741824"),
        ({"dilation": (1, 2**30), "s": 1}, r"dilation = 1073741824"),
        ({"k": 2**27}, r"K\*R\*S = "),
        ({"c": 2**27}, r"C\*R\*S = "),
        ({"c": 2**24}, r"bk\*C\*R\*S = 4831838208: values of a block-row are counted in 32 bits"),
        ({"r": 1, "s": 31, "w": 64}, r"R \+ S = 32: borders are bits of 32, .* at most 31; use backend='torch'"),
        ({"n": 2**22, "k": 2**20}, r"fprop needs \d+ programs: a grid holds 2147483647"),
        ({"n": 2**22, "c": 2**20}, r"dgrad needs \d+ programs"),
    ],
)
def test_refusals_name_what_and_why(change, message):
    call = {"blocksize": (32, 32), "dtype": torch.float16, "device_type": "cuda", "arch": "sm_90"}
    call |= {name: value for name, value in change.items() if name in call}
    geometry = replace(PLAIN, **{name: value for name, value in change.items() if name not in call})
    reason = tiles.refusal(geometry, **call)
    assert reason is not None
    assert re.match(message, reason), reason


def test_the_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in tiles.refusal(PLAIN, (32, 32), torch.float16, "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tiles.refusal(PLAIN, (32, 32), torch.float16, "cpu") is None


# ---------------------------------------------------------------------- the table


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("entry", TABLE, ids=str)
def test_entries_are_legal(entry: Entry):
    assert set(entry.kinds.split()) <= set(KINDS)
    assert entry.math in ("half", "tf32", "ieee")
    assert set(entry.archs.split()) <= set(gpus.TYPICAL)
    assert all(map(is_power_of_two, (entry.block_m, entry.block_k, entry.widest)))
    assert entry.block_m >= (64 if "sm_90" in entry.archs and entry.math != "ieee" else 16)  # wgmma has 64 rows
    assert 16 <= entry.block_k <= 128
    assert entry.num_warps == 4  # eight have given wrong results in other convolution templates
    assert 2 <= entry.num_stages <= 7


def test_no_entry_is_dead():
    found = {
        entry
        for kind in KINDS
        for side in (8, 16, 32, 64, 128)
        for math in ("half", "tf32", "ieee")
        for arch in gpus.TYPICAL
        for entry in tiles.find(kind, side, math, arch)
    }
    assert found == set(TABLE)


@st.composite
def work(draw: st.DrawFn) -> tuple[ConvGeometry, tuple[int, int], int, torch.dtype, str, str]:
    """Anything the predicate may meet: sizes from a pixel to a large layer."""
    bk, bc = draw(SIDES), draw(SIDES)
    r, s = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    k, c = bk * draw(st.integers(1, 64)), bc * draw(st.integers(1, 64))
    stride, padding = draw(st.tuples(*[st.integers(1, 4)] * 2)), draw(st.tuples(*[st.integers(0, 4)] * 2))
    n, h, w = draw(st.integers(0, 512)), draw(st.integers(r, 256)), draw(st.integers(s, 256))
    geometry = ConvGeometry.of((n, c, h, w), (k, c, r, s), stride, padding)
    nnzb = draw(st.integers(0, (k // bk) * (c // bc) * r * s))
    precision = draw(st.sampled_from(["tf32", "ieee"]))
    return geometry, (bk, bc), nnzb, draw(st.sampled_from(tiles.DTYPES)), draw(st.sampled_from(ARCHS)), precision


@given(work())
def test_pick_is_total_and_pure(case):
    geometry, (bk, bc), nnzb, dtype, arch, precision = case
    assert tiles.refusal(geometry, (bk, bc), dtype, "cuda", arch) is None
    for kind in KINDS:
        tile = tiles.pick(kind, geometry, (bk, bc), nnzb, dtype, arch, precision)
        assert tile == tiles.pick(kind, geometry, (bk, bc), nnzb, dtype, arch, precision)
        side = bc * index.stacked(geometry.weight_shape, (bk, bc)) if kind == "dgrad" else bk
        assert side <= tile.block_n < max(2 * side, 17)
        assert is_power_of_two(tile.block_n)
        assert tile.splits >= 1
        if kind != "wgrad":
            assert tile.splits == 1
        elif tile.splits > 1:
            assert 4 * tile.splits * nnzb * bk * bc <= tiles.WORKSPACE_BYTES
            assert tile.splits * tile.block_k <= geometry.n * geometry.p * geometry.q


def test_half_types_share_tiles_and_precision_matters_to_float32_alone():
    def pick(*args: object) -> Tile:
        return tiles.pick("fprop", PLAIN, (32, 32), 100, *args)

    assert pick(torch.float16, "sm_90", "tf32") == pick(torch.bfloat16, "sm_90", "ieee")
    assert pick(torch.float32, "sm_90", "tf32") != pick(torch.float32, "sm_90", "ieee")


@pytest.mark.parametrize(
    ("channels", "h", "least", "most"), [(64, 56, 100, 300), (128, 28, 30, 120), (256, 14, 10, 40), (512, 7, 3, 12)]
)
def test_wgrad_splits_fill_the_device(channels, h, least, most):
    """The 3x3 layers of ResNet-50 at batch 64, 90% sparse."""
    geometry = ConvGeometry(64, channels, h, h, channels, 3, 3, (1, 1), (1, 1))
    nnzb = round((channels // 32) ** 2 * 9 * 0.1)
    assert least <= tiles.pick("wgrad", geometry, (32, 32), nnzb, torch.float16, "sm_90").splits <= most


@given(SIDES, st.sampled_from([32, 64, 128]), st.lists(st.integers(0, 40), min_size=1, max_size=40))
def test_wgrad_tiles_cover_every_block_row(bc, block_m, counts):
    """slot(b) = indptr[b]*parts//chunks + b never overlaps the next row's, and the total depends on nnzb alone."""
    size = tiles.granule(bc, block_m)
    parts, chunks = bc // size, block_m // size
    first = 0
    for row, count in enumerate(counts):
        slot, following = first * parts // chunks + row, (first + count) * parts // chunks + row + 1
        assert following - slot >= -(-count * parts // chunks)
        first += count
    assert following == tiles.wgrad_tiles(sum(counts), len(counts), bc, block_m)


@given(SIDES, st.sampled_from([16, 32, 64, 128]))
def test_granule_divides_the_side_and_the_tile(side, most):
    size = tiles.granule(side, most)
    assert side % size == 0
    assert most % size == 0
    assert size >= 8


# ---------------------------------------------------------------------- what the predicate lets through runs right


def run(kind: str, x: Tensor, dy: Tensor, values: Tensor, tables, g: ConvGeometry, tile: Tile):
    from blocksparse.kernels import triton_conv

    if kind == "fprop":
        return triton_conv.fprop(x, values, tables, None, g, tile)
    if kind == "dgrad":
        return triton_conv.dgrad(dy, values, tables, g, True, tile)
    return triton_conv.wgrad(x, dy, tables, g, tuple(values.shape), tile)


def shipped() -> list[tuple[str, Tile, torch.dtype]]:
    """Every tile of the table that this device may get; in the interpreter, every tile."""
    from blocksparse.kernels.gpus import arch_of

    column = gpus.column_of(arch_of(torch.device(DEVICE))) if DEVICE == "cuda" else None
    found = {}
    for entry in TABLE:
        for kind in entry.kinds.split():
            if column is None or column in entry.archs.split():
                splits = 3 if kind == "wgrad" else 1
                tile = Tile(entry.block_m, entry.widest, entry.block_k, entry.num_warps, entry.num_stages, splits)
                found[kind, tile, torch.float16 if entry.math == "half" else torch.float32] = None
    # The interpreter knows no stages: tiles that differ there alone are one.
    return list(found) if column else list({(k, t._replace(num_stages=2), d): None for k, t, d in found})


@pytest.mark.parametrize(("kind", "tile", "dtype"), shipped(), ids=str)
def test_every_shipped_tile_is_right(kind, tile, dtype, poisoned_memory):
    bk, bc = (32, tile.block_n) if kind == "dgrad" else (tile.block_n, 32)
    generator = torch.Generator().manual_seed(5)
    pattern = bs.BSRPattern.random((2 * bk, 2 * bc, 2, 2), (bk, bc), 0.6, generator)
    g = ConvGeometry.of((2, 2 * bc, 9, 10), pattern.shape, (2, 1), (1, 0))
    shapes = g.x_shape, g.y_shape, (pattern.nnzb, bk, bc)
    x, dy, values = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    exact = {
        "fprop": lambda: bs.reference.fprop(x, values, pattern, None, (2, 1), (1, 0)),
        "dgrad": lambda: bs.reference.dgrad(dy, values, pattern, g.x_shape, (2, 1), (1, 0)),
        "wgrad": lambda: bs.reference.wgrad(x, dy, pattern, (2, 1), (1, 0)),
    }[kind]()
    tables = index.unpack(pattern.to(DEVICE).index, pattern.shape, pattern.blocksize, pattern.nnzb)
    on_device = [t.to(DEVICE) for t in (x, dy)]
    x_last, dy_last = (t.contiguous(memory_format=torch.channels_last) for t in on_device)
    for inputs in ((x_last, dy_last), on_device):
        got = run(kind, *inputs, values.to(DEVICE), tables, g, tile).cpu().double()
        assert (got - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


VAST = 2**27  # 3 * VAST * 8 elements: well past 2**31, and never touched but for a few pages


def vast(shape: tuple[int, ...]) -> Tensor:
    """Zeros whose pages exist once they are touched."""
    size = 2 * torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float16).view(shape)


def vast_images(shape: tuple[int, int, int, int], channels_last: bool) -> Tensor:
    n, c, h, w = shape
    return vast((n, h, w, c)).permute(0, 3, 1, 2) if channels_last else vast(shape)


interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has no pages that exist on touch")


@interpreted
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("far", ["taps", "pixels"])
def test_inputs_past_2_to_31_elements(channels_last, far):
    """fprop and wgrad of the six pixels at both ends of each line, read by six taps or by six output pixels."""
    x = vast_images((1, 8, 3, VAST), channels_last)
    ends = torch.randn(1, 8, 3, 2, generator=torch.Generator().manual_seed(0)).half()
    x[..., :: VAST - 1] = ends
    # The same product on the six pixels alone.
    kernel, conv = ((3, 2), (1, 0, (1, VAST - 1))) if far == "taps" else ((1, 1), ((1, VAST - 1), 0, 1))
    near = (1, 0, 1)
    pattern = bs.BSRPattern.full((8, 8, *kernel), (8, 8))
    g = ConvGeometry.of(x.shape, pattern.shape, *conv)
    values, dy = torch.randn(pattern.nnzb, 8, 8).half(), torch.randn(g.y_shape).half()
    tables = index.unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    y = run("fprop", x, dy, values, tables, g, Tile(16, 8, 16, 4, 2))
    torch.testing.assert_close(y.double(), bs.reference.fprop(ends, values, pattern, None, *near), rtol=5e-3, atol=5e-3)
    dv = run("wgrad", x, dy, values, tables, g, Tile(32, 8, 16, 4, 2, 2))
    torch.testing.assert_close(dv.double(), bs.reference.wgrad(ends, dy, pattern, *near), rtol=5e-3, atol=5e-3)


@interpreted
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_gradients_past_2_to_31_elements(channels_last):
    """dgrad of three pixels inside a padding of VAST / 2 on both sides."""
    pattern = bs.BSRPattern.full((8, 8, 1, 1), (8, 8))
    g = ConvGeometry.of((1, 8, 3, 1), pattern.shape, 1, (0, VAST // 2))
    dy = vast_images(g.y_shape, channels_last)
    middle = torch.randn(1, 8, 3, 1, generator=torch.Generator().manual_seed(0)).half()
    dy[..., VAST // 2 : VAST // 2 + 1] = middle
    values = torch.randn(1, 8, 8).half()
    tables = index.unpack(pattern.index, pattern.shape, pattern.blocksize, 1)
    dx = run("dgrad", dy, dy, values, tables, g, Tile(16, 16, 16, 4, 2))
    exact = bs.reference.dgrad(middle, values, pattern, g.x_shape)
    torch.testing.assert_close(dx.double(), exact, rtol=5e-3, atol=5e-3)


@interpreted
def test_values_past_2_to_31_elements():
    """A table that points at the last of 2**21 + 1 blocks of 1024 values."""
    last = 2**21
    values = vast((last + 1, 32, 32))
    values[last] = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).half()
    g, blocks = ConvGeometry(1, 32, 3, 3, 32, 1, 1), ((32, 32), last + 1)
    size = index.packed_size(g.weight_shape, *blocks, row_order=False)
    tables = index.unpack(torch.zeros(size, dtype=torch.int32), g.weight_shape, *blocks)
    tables.indptr.copy_(torch.tensor([last, last + 1]))
    tables.t_indptr.copy_(torch.tensor([0, 1]))
    tables.t_perm[0] = last
    x = torch.randn(g.x_shape).half().contiguous(memory_format=torch.channels_last)
    for kind, exact in (("fprop", "ncpq,kc->nkpq"), ("dgrad", "nkpq,kc->ncpq")):
        got = run(kind, x, x, values, tables, g, Tile(16, 32, 16, 4, 2))
        torch.testing.assert_close(
            got.double(), torch.einsum(exact, x.double(), values[last].double()), rtol=5e-3, atol=5e-3
        )


@pytest.mark.parametrize("splits", [1, 15, 16, 17, 100, 264])
def test_groups_of_splits(splits):
    group = tiles.group_of(splits)
    groups = -(-splits // group)
    assert (groups == 1) == (splits <= 16)
    assert max(group, groups) <= max(16, 17 * splits // 256)
    assert 0 < splits - (groups - 1) * group <= group  # none is empty


@pytest.mark.parametrize(
    ("blocksize", "spoilt"),
    [
        pytest.param(
            blocksize,
            spoilt,
            marks=pytest.mark.slow if blocksize != (8, 8) else [],
            id=f"{blocksize}-{spoilt}",
        )
        for blocksize in ((8, 8), (32, 16), (64, 8), (16, 32))
        for i, spoilt in enumerate((float("nan"), float("inf")))
    ],
)
def test_a_gradient_that_is_not_finite_stays_where_it_belongs(blocksize, spoilt):
    """dgrad takes narrow channel blocks side by side: a block that is not stored must not meet its neighbour's dy."""
    bk, bc = blocksize
    generator = torch.Generator().manual_seed(3)
    pattern = bs.BSRPattern.random((2 * bk, 5 * bc, 3, 3), blocksize, 0.3, generator).to(DEVICE)
    x_shape = (1, 5 * bc, 6, 5)
    values = (torch.rand(pattern.nnzb, bk, bc, generator=generator) + 0.5).to(DEVICE)  # positive: nothing cancels
    dy = torch.rand(1, 2 * bk, 6, 5, generator=generator).to(DEVICE)
    dy[0, bk + 3, 2, 2] = spoilt
    for layout in (torch.channels_last, torch.contiguous_format):
        dx = bs.conv2d_dgrad(dy.contiguous(memory_format=layout), values, pattern, x_shape, 1, 1, backend="triton")
        meets = torch.zeros_like(dy)
        meets[0, bk + 3, 2, 2] = 1
        reached = bs.conv2d_dgrad(meets, values, pattern, x_shape, 1, 1, backend="torch") != 0
        assert torch.equal(~dx.isfinite() | reached, reached)  # nowhere else
        assert not dx[reached].isfinite().any()
        needed = bs.conv2d_dgrad(dy.nan_to_num(0, 0, 0), values, pattern, x_shape, 1, 1, backend="torch")
        torch.testing.assert_close(dx[~reached], needed[~reached])


@pytest.mark.parametrize("draws", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_splits_agree_with_one_program_per_tile(draws):
    given_splits = given(
        seed=st.integers(0, 2**32 - 1),
        splits=st.sampled_from([1, 2, 5, 16, 17, 23]),
        rows=st.sampled_from([(8, 8), (8, 32), (24, 40)]),
    )
    settings(max_examples=draws)(given_splits(splits_agree))()


def splits_agree(seed, splits, rows):
    """Any number of splits, also in groups and more than there are pixels, and the same bits twice."""
    generator = torch.Generator().manual_seed(seed)
    bk, bc = rows
    pattern = bs.BSRPattern.random((3 * bk, 2 * bc, 2, 2), rows, 0.4, generator)
    g = ConvGeometry.of((2, 2 * bc, 5, 4), pattern.shape, 1, 1)
    x, dy = (torch.randn(shape, generator=generator).to(DEVICE) for shape in (g.x_shape, g.y_shape))
    tables = index.unpack(pattern.to(DEVICE).index, pattern.shape, pattern.blocksize, pattern.nnzb)
    values = torch.empty((pattern.nnzb, bk, bc), device=DEVICE)
    tile = Tile(64, 1 << (bk - 1).bit_length(), 16, 4, 2, splits)
    counting = torch.zeros(1 << 12, dtype=torch.int32, device=DEVICE)
    with mock.patch("blocksparse.kernels.triton_conv._zeros", lambda like, size: counting[:size]):
        got = run("wgrad", x, dy, values, tables, g, tile)
        assert not counting.any()  # as the next launch on this stream needs them
        assert torch.equal(got, run("wgrad", x, dy, values, tables, g, tile))
    exact = bs.reference.wgrad(x.cpu(), dy.cpu(), pattern, 1, 1)
    torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-4, atol=1e-4)
