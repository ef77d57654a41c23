"""SlotTile: how the CUDA C++ backend cuts its work, and which work it can take.

A leaf: nothing here imports CuPy, touches a device or looks at a mask. octets.cu says what a slot, a patch and a chunk
are; `Layout` cuts the shared memory that its struct Conv names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..geometry import ConvGeometry
from .gpus import NAMED, Gpu
from .tiles import LIMIT, MAX_GRID, WORKSPACE_BYTES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MATH = {torch.float16: "FP16", torch.bfloat16: "BF16"}  # float32: TF32 or FP32

SHARED_BYTES = 99 << 10  # of one CTA: what every GPU has
IMAGES = 16  # of a tile
MOST_UNITS = 32  # channels of a chunk: bits of a word
MOST_ITEMS = 4096  # that fprop and wgrad list at once
LISTED_BYTES = 24 << 10  # of dgrad's lists, where a block-row alone needs no more
MOST_CHANNELS = 1 << 15
MOST_TAPS = 64
WARPS = (4, 8)


class SlotTile(NamedTuple):
    """Sizes of one CTA's work. The first four specialise the kernel, the others are arguments of a launch."""

    mt: int  # tiles of 16 in the product's M, of one warp
    nt: int  # octets of a warp; wgrad: tiles of 8 filters
    warps: int
    filters: int  # of a CTA; dgrad: of a step
    tile_h: int
    tile_w: int
    rows: int  # of the patch
    cols: int
    units: int  # channels of a chunk at most; dgrad: of a CTA
    capacity: int  # items listed at once; dgrad: chunks
    part: int  # channels, or dgrad's block-rows, listed at once where not all fit
    shared: int = 0  # bytes
    splits: int = 1  # CTAs that share the tiles
    lists: int = 1  # wgrad: CTAs that share the chunks of a block-row; dgrad: block-rows counted at once

    @property
    def area(self) -> int:
        return self.tile_h * self.tile_w


def slot_of(dtype: torch.dtype) -> int:
    """Images that share 16 bytes."""
    return 16 // dtype.itemsize


def step_of(math_: str) -> int:
    """STEP of instructions.cu: of the product's K, in one mma."""
    return {"TF32": 8, "FP32": 4}.get(math_, 16)


def math_of(dtype: torch.dtype, precision: str) -> str:
    return MATH.get(dtype) or {"tf32": "TF32", "ieee": "FP32"}[precision]


def refusal(
    geometry: ConvGeometry,
    blocksize: tuple[int, int],
    dtype: torch.dtype,
    device_type: str,
    arch: str = "",
    home: str = "cuda",
) -> str | None:
    """Why the CUDA C++ backend cannot take this work (what, why, what to do), or None: the only such predicate.

    Args:
        device_type: torch.device.type of the operands.
        arch: "sm_90", ...; "" where unknown.
        home: the device type that launches go to.
    """
    bk, _ = blocksize
    if bk % 8 or bk < 8:
        return (
            f"bk = {bk}: values move in pieces of 16 bytes, 8 fp16 filters, so bk must be a multiple of 8; use"
            " backend='torch'"
        )
    if dtype not in DTYPES:
        return f"dtype = {dtype}: it takes {', '.join(map(str, DTYPES))}; use backend='torch'"
    if device_type != home:
        return f"device = {device_type}: it runs on CUDA GPUs; use backend='torch'"
    if arch.startswith("gfx"):
        return f"arch = {arch}: it is CUDA C++, for NVIDIA GPUs; use backend='triton'"
    if arch.startswith("sm_") and int(arch[3:].rstrip("af")) < 80:
        return f"arch = {arch}: asynchronous copies need sm_80 or later; use backend='torch'"
    g = geometry
    for name, size in (
        ("N*H*W", g.n * g.h * g.w), ("N*P*Q", g.n * g.p * g.q), ("K*C*R*S / 8", g.k * g.c * g.taps // 8),
        ("H + 2*padding", g.h + 2 * g.padding[0]), ("W + 2*padding", g.w + 2 * g.padding[1]),
        ("stride", max(g.stride)), ("dilation", max(g.dilation)),
    ):  # fmt: skip
        if size >= LIMIT:
            return f"{name} = {size}: pixels and entries are counted in 32 bits, below {LIMIT}; split the work"
    if g.c > MOST_CHANNELS:
        return f"C = {g.c}: it lists at most {MOST_CHANNELS} channels; use backend='torch'"
    if g.taps > MOST_TAPS:
        return f"R*S = {g.taps}: it lists at most {MOST_TAPS} taps of a channel; use backend='torch'"
    for kind in ("fprop", "dgrad", "wgrad"):
        tile = next(candidates(kind, geometry, blocksize, 0, dtype), None)
        if tile is None:
            return (
                f"{kind}: with {g.r}x{g.s} taps, stride {g.stride} and dilation {g.dilation} the pixels that a tile"
                f" reads do not fit {SHARED_BYTES >> 10} KB of shared memory; use backend='torch'"
            )
        if (ctas := grid(kind, geometry, blocksize, tile)) > MAX_GRID:
            return f"{kind} needs {ctas} CTAs: a grid holds {MAX_GRID}; split the work"
    return None


def tiled(kind: str, g: ConvGeometry) -> tuple[int, int]:
    """Rows and columns of pixels that are cut into tiles: of y, or of one residue class of x."""
    return (-(-g.h // g.stride[0]), -(-g.w // g.stride[1])) if kind == "dgrad" else (g.p, g.q)


def tiles_of(kind: str, g: ConvGeometry, tile: SlotTile) -> tuple[int, int, int]:
    """Tiles down, across, and groups of images."""
    high, wide = tiled(kind, g)
    return -(-high // tile.tile_h), -(-wide // tile.tile_w), -(-g.n // IMAGES)


def classes(g: ConvGeometry) -> int:
    """dgrad: residues of a pixel's row and column modulo the stride."""
    return min(g.stride[0], g.h) * min(g.stride[1], g.w)


def owners(kind: str, g: ConvGeometry, blocksize: tuple[int, int], tile: SlotTile) -> int:
    """CTAs of one split: what they own besides tiles."""
    if kind == "dgrad":
        return classes(g) * -(-g.c // tile.units)
    return g.k // blocksize[0] * -(-blocksize[0] // tile.filters)


def grid(kind: str, g: ConvGeometry, blocksize: tuple[int, int], tile: SlotTile) -> int:
    """CTAs of a launch."""
    return owners(kind, g, blocksize, tile) * tile.splits * (tile.lists if kind == "wgrad" else 1)


def steps(kind: str, g: ConvGeometry) -> tuple[int, int]:
    """Pixels of the tensor from one row, and one column, of the patch to the next."""
    if kind == "dgrad":
        return 1, 1
    (sh, sw), (dh, dw) = g.stride, g.dilation
    return (math.gcd(sh, dh) if g.r > 1 else sh, math.gcd(sw, dw) if g.s > 1 else sw)


def _patch(kind: str, g: ConvGeometry, high: int, wide: int) -> tuple[int, int]:
    """Rows and columns of the patch under a tile of high x wide pixels."""
    (sh, sw), (dh, dw) = g.stride, g.dilation
    if kind == "dgrad":
        return high + (g.r - 1) * dh // sh, wide + (g.s - 1) * dw // sw
    step_h, step_w = steps(kind, g)
    return ((high - 1) * sh + (g.r - 1) * dh) // step_h + 1, ((wide - 1) * sw + (g.s - 1) * dw) // step_w + 1


def _row_bytes(count: int, size: int) -> int:
    return ((count * size + 15) // 16 | 1) * 16


def plane_of(pixels: int, dtype: torch.dtype) -> int:
    """Slots from one channel of a patch to the next: odd."""
    return pixels * IMAGES // slot_of(dtype) | 1


class Layout(NamedTuple):
    """Bytes from the start of shared memory to each table (struct Conv of octets.cu), and how many there are."""

    bitmap_at: int
    before_at: int
    channels_at: int
    bits_at: int
    starts_at: int
    chunks_at: int
    items_at: int
    entries_at: int
    taps_at: int
    places_at: int
    pixels_at: int
    filters_at: int
    sums_at: int
    stage_at: int
    values_at: int  # within a stage
    stage: int
    shared: int


def layout(kind: str, g: ConvGeometry, dtype: torch.dtype, tile: SlotTile) -> Layout:
    """How shared memory is cut."""
    size, plane = dtype.itemsize, plane_of(tile.rows * tile.cols, dtype)
    row = _row_bytes(tile.filters, size)
    numbers: tuple[int, ...]  # of int32
    if kind == "dgrad":
        listed = min(g.k, tile.lists)
        chunks = tile.capacity * 16
        items = -(-g.taps * tile.filters // 16) * 16
        numbers = (
            listed * -(-tile.units // 32), listed + 1, chunks, 0, g.taps, 0, items, chunks * g.taps, g.taps + 1,
            2 * tile.rows * tile.cols, 2 * tile.area, 0, tile.units * (tile.warps * tile.nt * 8 + 8),
        )  # fmt: skip
        patch, other = (tile.filters + 1) * plane * 16, (g.taps + 1) * 16 * row
    else:
        words, ranks = -(-g.c // 32), min(g.c, tile.capacity)
        chunks = -(-ranks // tile.units)
        numbers = (
            words, words + 1, ranks, chunks * g.taps, chunks * g.taps, 2 * chunks + 1, tile.capacity, tile.capacity,
            g.taps, 2 * tile.rows * tile.cols, 2 * tile.area, 2 * tile.filters if kind == "fprop" else 0,
            tile.area if kind == "wgrad" else 0,
        )  # fmt: skip
        if kind == "fprop":
            patch, other = (tile.units + 1) * plane * 16, -(-tile.units * g.taps // 16) * 16 * row
        else:
            patch, other = tile.units * plane * 16, tile.filters * plane_of(tile.area, dtype) * 16
    at = [0]
    for number in numbers:
        at.append(at[-1] + -(-number // 4) * 16)
    stage = patch + other
    shared = at[-1] + 2 * stage
    if kind == "wgrad":  # what warps that share pixels leave for each other
        shared = max(shared, at[-1] + (tile.warps - 1) * tile.mt * tile.nt * 512)
    return Layout._make((*at, patch, stage, shared))


def _shapes(kind: str, g: ConvGeometry, most: int) -> Iterator[tuple[int, int]]:
    """Tiles of at most `most` pixels: even cuts of the rows, and as many rows as fit, evenly cut too."""
    high, wide = tiled(kind, g)
    for cuts in sorted({*range(1, 9), *(-(-wide // (1 << i)) for i in range(8))}):
        across = -(-wide // cuts)
        if across <= most:
            down = min(high, most // across)
            yield -(-high // -(-high // down)), across


def cuts(kind: str, bk: int, dtype: torch.dtype) -> Iterator[tuple[int, int, int, int]]:
    """(mt, nt, warps, filters) that some tile may have."""
    if kind == "fprop":
        mt = 1 if bk <= 16 else 2 if bk <= 32 else 4
        for nt, warps in itertools.product((8 // mt, 16 // mt), WARPS):
            if nt >= 2:
                yield mt, nt, warps, 16 * mt
    elif kind == "dgrad":
        for nt, warps, filters in itertools.product((4, 8, 16), WARPS, (8, 16, 32)):
            if bk % filters == 0:
                yield 1, nt, warps, filters
    else:
        most = 64 if dtype.itemsize == 2 else 32
        nt = next(n for n in (1, 2, 4, 8) if 8 * n >= min(bk, most))
        for mt, warps in itertools.product((1, 2), WARPS):
            yield mt, nt, warps, 8 * nt


def candidates(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, gpu: Gpu = NAMED["h100"]
) -> Iterator[SlotTile]:
    """Every tile that fits, its lists as long as a block-row's mean number of entries needs and there is room for."""
    bk, bc = blocksize
    entries = -(-nnzb * bc * bk // g.k)  # of a block-row
    for mt, nt, warps, filters in cuts(kind, bk, dtype):
        for pixels in (warps * nt // 2,) if kind != "wgrad" else (8, 16, 32, 64):
            for tile_h, tile_w in dict.fromkeys(_shapes(kind, g, pixels)):
                rows, cols = _patch(kind, g, tile_h, tile_w)
                (step_h, step_w), (own_h, own_w) = steps(kind, g), g.stride if kind == "dgrad" else (1, 1)
                if max(rows * step_h, cols * step_w, tile_h * own_h, tile_w * own_w) >= 1 << 15:
                    continue  # rows and columns share a word
                fits = []
                for units in _units(kind, g, mt, warps):
                    tile = SlotTile(mt, nt, warps, filters, tile_h, tile_w, rows, cols, units, 0, 0)
                    most = gpu.shared - 1024 if kind == "dgrad" else SHARED_BYTES
                    for listed in (entries, 0):  # long lists, or the shortest
                        found = _listed(kind, g, blocksize, listed, dtype, tile)
                        if found.shared <= most:
                            fits.append(found)
                            break
                # The most channels of which one, two, three and four CTAs fit a multiprocessor.
                for ctas in (1, 2, 3, 4):
                    few = [tile for tile in fits if ctas * (tile.shared + 1024) <= gpu.shared]
                    if few and (ctas == 4 or ctas * 2 * (few[-1].shared + 1024) > gpu.shared):
                        yield from _shared_out(kind, few[-1], g, blocksize, nnzb, gpu)


def _units(kind: str, g: ConvGeometry, mt: int, warps: int) -> Iterator[int]:
    """Channels of a chunk; dgrad: of a CTA."""
    if kind == "dgrad":
        yield from (width for width in (16, 32, 64, 128) if width < 2 * g.c or width == 16)
        return
    most = MOST_UNITS if kind == "fprop" else min(MOST_UNITS, mt * warps * 16 // g.taps)
    yield from (units for units in (1, 2, 4, 6, 8, 12, 16, 20, 26, 32) if units <= min(most, 2 * g.c))


def _listed(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], entries: int, dtype: torch.dtype, tile: SlotTile
) -> SlotTile:
    """The tile with its lists and the bytes that it takes."""
    bk, _ = blocksize
    if kind == "dgrad":
        rows, most = g.k // bk, -(-min(tile.units, g.c) // 16)  # chunks of a block-row
        each = 64 * (g.taps + 1) + 8
        capacity = min(rows * most, max(most, LISTED_BYTES // each))
        part = capacity // most
        lists = rows if rows <= 512 else part
        found = tile._replace(capacity=capacity, part=part, lists=lists)
    else:
        chunk = -(-tile.units * g.taps // 16) * 16
        wanted = entries + entries // 4 + 15 * -(-min(g.c, entries) // tile.units)
        most = -(-min(g.c * g.taps, MOST_ITEMS) // chunk) * chunk
        capacity = max(chunk, min(wanted, most))
        found = tile._replace(capacity=capacity, part=capacity // chunk * tile.units)
    return found._replace(shared=layout(kind, g, dtype, found).shared)


def _shared_out(
    kind: str, tile: SlotTile, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, gpu: Gpu
) -> Iterator[SlotTile]:
    """The tile with splits that fill the device once, or twice."""
    tile = tile._replace(lists=1) if kind == "wgrad" else tile
    whole, tiles = owners(kind, g, blocksize, tile), math.prod(tiles_of(kind, g, tile))
    resident = min(16 // tile.warps, gpu.shared // (tile.shared + 1024))
    room = tiles
    if kind == "wgrad":
        room = WORKSPACE_BYTES // (4 * max(1, nnzb) * blocksize[0] * blocksize[1])
    for full in (resident, 2 * resident):
        splits = max(1, min(full * gpu.units // max(1, whole), tiles, room))
        yield tile._replace(splits=-(-tiles // -(-tiles // splits)) if tiles else 1)
