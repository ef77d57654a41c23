"""SlotTile: how the CUDA C++ backend cuts its work, and which work it can take.

A leaf: nothing here imports CuPy, touches a device or looks at a mask. octets.cu says what a slot, a patch and a chunk
are; `Layout` cuts the shared memory that its struct Conv names.

More than 400 lines: one set of sizes cuts the work of all three products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..geometry import ConvGeometry
from .gpus import NAMED, Gpu
from .tiles import LIMIT, WORKSPACE_BYTES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MATH = {torch.float16: "FP16", torch.bfloat16: "BF16"}  # float32: TF32 or FP32

SHARED_BYTES = 99 << 10  # of one CTA: what every GPU has
IMAGES = 16  # of a tile
MOST_UNITS = 32  # channels of a chunk: bits of a word
MOST_ITEMS = 4096  # that fprop and wgrad list at once
MOST_SHARES = 32  # of the bands of dgrad: bits of a word
SHARES_BYTES = 64 << 20  # of the workspace that they meet in, of which few pages are touched
BITMAP_BYTES = 16 << 10  # of dgrad's, of all channels; else they are counted in parts
MOST_CHANNELS = 1 << 15
MOST_TAPS = 64
WARPS = (4, 8)
SMALLEST = 1, 2, 4, 8  # of dgrad, (mt, nt, warps, filters): for large or dilated kernels, where nothing else fits
TAPS = 4  # of a channel that are stored, where that is not known: between one and all of nine


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
    units: int  # channels of a chunk at most; dgrad: counted at once
    capacity: int  # items listed at once; dgrad: chunks
    part: int  # channels listed at once where not all fit
    shared: int = 0  # bytes
    splits: int = 1  # CTAs that share the tiles
    lists: int = 1  # CTAs that share, in wgrad, the chunks of a block-row; in dgrad, the bands
    planes: int = 0  # dgrad: channels whose sums a CTA holds: those that more than one of its bands store
    held: int = 0  # dgrad: steps whose values it holds

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
        smallest = NAMED["h100"]._replace(shared=SHARED_BYTES + 1024)
        tile = next(candidates(kind, geometry, blocksize, 0, dtype, smallest), None)
        if tile is None:
            return (
                f"{kind}: with {g.r}x{g.s} taps, stride {g.stride} and dilation {g.dilation} the pixels that a tile"
                f" reads do not fit {SHARED_BYTES >> 10} KB of shared memory; use backend='torch'"
            )
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


def most_taps(g: ConvGeometry) -> int:
    """dgrad: taps of the residue class that most of them reach."""

    def along(size: int, pad: int, taps: int, dilation: int, stride: int) -> int:
        return max(sum((a + pad - t * dilation) % stride == 0 for t in range(taps)) for a in range(min(stride, size)))

    down, across = zip((g.h, g.w), g.padding, (g.r, g.s), g.dilation, g.stride, strict=True)
    return along(*down) * along(*across)


def owners(kind: str, g: ConvGeometry, blocksize: tuple[int, int], tile: SlotTile) -> int:
    """CTAs of one split: what they own besides tiles."""
    if kind == "dgrad":
        return classes(g) * tile.lists
    return g.k // blocksize[0] * -(-blocksize[0] // tile.filters) * tile.lists


def grid(kind: str, g: ConvGeometry, blocksize: tuple[int, int], tile: SlotTile) -> int:
    """CTAs of a launch."""
    return owners(kind, g, blocksize, tile) * tile.splits


def bands(g: ConvGeometry, bk: int, tile: SlotTile) -> int:
    """dgrad: bands of filters of one CTA (dgrad.cu)."""
    return -(-g.k // max(bk, tile.filters) // tile.lists)


def workspace(g: ConvGeometry, shares: int) -> int:
    """Bytes in which the shares of dgrad meet, where there is more than one."""
    return 4 * shares * g.c * g.h * g.w * g.n if shares > 1 else 0


def adding(g: ConvGeometry, dtype: torch.dtype, threads: int) -> int:
    """CTAs that add up the shares of one channel."""
    return -(-g.h * g.w * -(-g.n // slot_of(dtype)) // threads)


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
    values_at: int  # within a stage; dgrad: of the first
    stage: int
    value_stage: int  # dgrad: of the values of a step
    shared: int


def layout(kind: str, g: ConvGeometry, blocksize: tuple[int, int], dtype: torch.dtype, tile: SlotTile) -> Layout:
    """How shared memory is cut."""
    size, plane = dtype.itemsize, plane_of(tile.rows * tile.cols, dtype)
    row = _row_bytes(tile.filters, size)
    numbers: tuple[int, ...]  # of int32
    if kind == "dgrad":
        bk, rows = blocksize[0], 16 * tile.mt
        own, words, taps = bands(g, bk, tile), -(-tile.units // 32), most_taps(g)
        items = -(-taps * tile.filters // 16) * 16
        numbers = (
            own * words, own * words, tile.capacity * rows, 8 + 4 * tile.capacity * max(1, bk // tile.filters) + words,
            taps, 2 * own + 1 + tile.capacity + 1 + words, items,
            tile.capacity * rows * max(1, tile.filters // bk) * taps, g.taps + 1, 2 * tile.rows * tile.cols,
            2 * tile.area, tile.units if tile.lists > 1 else 0, tile.planes * (tile.warps * tile.nt * 8 + 8),
        )  # fmt: skip
        patch, other = (tile.filters + 1) * plane * 16, -(-items // tile.filters) * rows * row
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
    if kind == "dgrad":
        values_at = at[-1] + 2 * patch
        return Layout._make((*at, values_at, patch, other, values_at + tile.held * other))
    stage = patch + other
    shared = at[-1] + 2 * stage
    if kind == "wgrad":  # what warps that share pixels leave for each other
        shared = max(shared, at[-1] + (tile.warps - 1) * tile.mt * tile.nt * 512)
    return Layout._make((*at, patch, stage, 0, shared))


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
        for mt, filters, warps in itertools.product((1, 2, 4), (8, 16, 32), WARPS):
            if bk % filters == 0 or filters % bk == 0:
                yield mt, 8 // mt, warps, filters
                if warps == max(WARPS):
                    yield mt, 16 // mt, warps, filters
        yield SMALLEST
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
    any_fits = False
    for mt, nt, warps, filters in cuts(kind, bk, dtype):
        if any_fits and (mt, nt, warps, filters) == SMALLEST:
            return
        if kind == "dgrad" and (g.k % filters or (filters == 8 and nt > 2 and _takes_16(g, bk, dtype))):
            continue
        for pixels in (warps * nt // 2,) if kind != "wgrad" else (8, 16, 32, 64):
            for tile_h, tile_w in dict.fromkeys(_shapes(kind, g, pixels)):
                rows, cols = _patch(kind, g, tile_h, tile_w)
                (step_h, step_w), (own_h, own_w) = steps(kind, g), g.stride if kind == "dgrad" else (1, 1)
                if max(rows * step_h, cols * step_w, tile_h * own_h, tile_w * own_w) >= 1 << 15:
                    continue  # rows and columns share a word
                cut = SlotTile(mt, nt, warps, filters, tile_h, tile_w, rows, cols, 0, 0, 0)
                if kind == "dgrad":
                    for tile in _shares(g, blocksize, nnzb, dtype, cut, gpu):
                        any_fits = True
                        yield from _shared_out(kind, tile, g, blocksize, nnzb, gpu)
                    continue
                fits = []
                for units in _units(kind, g, mt, warps):
                    for listed in (entries, 0):  # long lists, or the shortest
                        found = _listed(kind, g, blocksize, listed, dtype, cut._replace(units=units))
                        if found.shared <= SHARED_BYTES:
                            fits.append(found)
                            break
                # The most channels of which one, two, three and four CTAs fit a multiprocessor.
                for ctas in (1, 2, 3, 4):
                    few = [tile for tile in fits if ctas * (tile.shared + 1024) <= gpu.shared]
                    if few and (ctas == 4 or ctas * 2 * (few[-1].shared + 1024) > gpu.shared):
                        yield from _shared_out(kind, few[-1], g, blocksize, nnzb, gpu)


def _takes_16(g: ConvGeometry, bk: int, dtype: torch.dtype) -> bool:
    """Whether dgrad takes 16 filters at once: the least that fill a product's K, where their patches are small."""
    return g.k % 16 == 0 and (bk % 16 == 0 or bk == 8) and dtype.itemsize == 2 and most_taps(g) <= 9


def taps_of(g: ConvGeometry, blocksize: tuple[int, int], nnzb: int) -> int:
    """Of a channel that a block-row stores, how many taps; a plan knows the number of blocks alone.

    Equal groups with all taps have a multiple of (block-rows x taps) of them. Elsewhere it is a guess.
    """
    return g.taps if nnzb % (g.k // blocksize[0] * g.taps) == 0 else min(TAPS, g.taps)


def channels_of(g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, block_rows: int) -> float:
    """How many channels so many block-rows together store, each of its own choice."""
    one = nnzb * blocksize[0] * blocksize[1] / g.k / taps_of(g, blocksize, nnzb)
    return g.c * (1 - max(0.0, 1 - one / g.c) ** block_rows)


def in_several(share: float, sets: int) -> float:
    """Share of the channels that are in more than one of so many sets, each with this share of all."""
    return 1 - (1 - share) ** sets - sets * share * (1 - share) ** (sets - 1) if sets > 1 else 0.0


def _shares(
    g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, cut: SlotTile, gpu: Gpu
) -> Iterator[SlotTile]:
    """dgrad's tiles of this cut: bands shared out so far that the device is full, and lists that have room."""
    bk, filters, rows = blocksize[0], cut.filters, 16 * cut.mt
    in_band, high = max(1, filters // bk), max(bk, filters)
    stored = channels_of(g, blocksize, nnzb, in_band)
    if cut.mt > 1 and stored <= rows // 2:
        return
    alike = nnzb % (g.k // bk * g.taps) == 0 and in_band == 1  # every band has as many
    most = stored if alike else min(g.c, stored + 2 * math.sqrt(stored) + 1)
    tiles, all_bands = math.prod(tiles_of("dgrad", g, cut)) * classes(g), g.k // high
    reached = g.stride == (1, 1)
    for shares in (1, 2, 4, 8, 16, 32):
        each = -(-all_bands // shares)
        if -(-all_bands // each) != shares:
            continue
        # With a stride some pixels may have no tap, and so no CTA that leaves its share of them.
        if shares > 1 and (not reached or workspace(g, shares) > SHARES_BYTES or shares // 2 * tiles >= 2 * gpu.units):
            return
        several = in_several(stored / g.c, each)
        planes = math.ceil(g.c * several + 3 * math.sqrt(g.c * several * (1 - several))) if each > 1 else 0
        tile = cut._replace(
            units=g.c, capacity=each * max(1, math.ceil(most / rows)), part=g.c, lists=shares,
            planes=min(g.c, planes + 2) if planes else 0,
        )  # fmt: skip
        # The shortest lists: a chunk for each band.
        least = min(g.c, rows)
        short = tile._replace(units=least, capacity=each, part=least, planes=least if each > 1 else 0)
        whole = 8 * each * -(-g.c // 32) <= BITMAP_BYTES
        steps_of_tile = tile.capacity * (high // filters)
        variants = [tile._replace(held=held) for held in dict.fromkeys((max(2, steps_of_tile), 2)) if whole]
        fits = [found for found in (_laid_out(variant, g, blocksize, each, dtype) for variant in variants)
                if found.shared <= gpu.shared - 1024]  # fmt: skip
        if not fits:
            found = _laid_out(short._replace(held=2), g, blocksize, each, dtype)
            fits = [found] if found.shared <= gpu.shared - 1024 else []
        yield from fits


def _laid_out(tile: SlotTile, g: ConvGeometry, blocksize: tuple[int, int], own: int, dtype: torch.dtype) -> SlotTile:
    """dgrad's tile with `own` bands, how many channels are listed at once where not all fit, and its bytes."""
    part = min(g.c, tile.capacity // own * 16 * tile.mt, tile.planes if own > 1 else g.c)
    tile = tile._replace(part=max(1, part), planes=max(tile.planes, 1 if own > 1 else 0))
    return tile._replace(shared=layout("dgrad", g, blocksize, dtype, tile).shared)


def _units(kind: str, g: ConvGeometry, mt: int, warps: int) -> Iterator[int]:
    """Channels of a chunk."""
    most = MOST_UNITS if kind == "fprop" else min(MOST_UNITS, mt * warps * 16 // g.taps)
    yield from (units for units in (1, 2, 4, 6, 8, 12, 16, 20, 26, 32) if units <= min(most, 2 * g.c))


def _listed(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], entries: int, dtype: torch.dtype, tile: SlotTile
) -> SlotTile:
    """The tile with its lists and the bytes that it takes."""
    chunk = -(-tile.units * g.taps // 16) * 16
    wanted = entries + entries // 4 + 15 * -(-min(g.c, entries) // tile.units)
    most = -(-min(g.c * g.taps, MOST_ITEMS) // chunk) * chunk
    capacity = max(chunk, min(wanted, most))
    found = tile._replace(capacity=capacity, part=capacity // chunk * tile.units)
    return found._replace(shared=layout(kind, g, blocksize, dtype, found).shared)


def _shared_out(
    kind: str, tile: SlotTile, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, gpu: Gpu
) -> Iterator[SlotTile]:
    """The tile with splits that fill the device once, or twice."""
    whole, tiles = owners(kind, g, blocksize, tile), math.prod(tiles_of(kind, g, tile))
    resident = min(16 // tile.warps, gpu.shared // (tile.shared + 1024))
    room = tiles
    if kind == "wgrad":
        room = WORKSPACE_BYTES // (4 * max(1, nnzb) * blocksize[0] * blocksize[1])
    for full in (resident, 2 * resident):
        splits = max(1, min(full * gpu.units // max(1, whole), tiles, room))
        yield tile._replace(splits=-(-tiles // -(-tiles // splits)) if tiles else 1)
