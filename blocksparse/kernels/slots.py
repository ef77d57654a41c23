"""SlotTile: how the CUDA C++ backend cuts its work, and which work it can take.

A leaf: nothing here imports CuPy, touches a device or looks at a mask. slots.cu says what a slot, a patch and a unit
are, and the budgets beside each kernel what its sizes cost; the sizes of shared memory here are theirs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..geometry import KINDS, ConvGeometry
from . import counted, gpu_cost
from .gpu_cost import Demand, Estimate
from .gpus import NAMED, Gpu
from .tiles import LIMIT, MAX_GRID, WORKSPACE_BYTES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MATH = {torch.float16: "FP16", torch.bfloat16: "BF16"}  # float32: TF32 or FP32

SHARED_BYTES = 99 << 10  # of one CTA: what sm_86 and sm_89 have, and two of them fit sm_90
SM_BYTES = 227 << 10  # of one multiprocessor of sm_90
ISSUE = 0.55  # of the rate of instructions that these kernels reach
MMA_SYNC = 0.62  # of the rate of tensor cores on sm_90
TAPS = 4  # of a channel that are stored, where a kernel has more: between one and all of nine

# slots.cu: LANES, MAX_TAPS, MAX_BLOCKS and CELLS; wgrad.cu: MAX_PIXELS.
LANES, MAX_TAPS, MAX_BLOCKS, CELLS, MAX_PIXELS = 32, 32, 512, 1024, 256
ITEMS = {"fprop": 128, "dgrad": 256, "wgrad": 128}  # rows of K in shared memory at once; in wgrad, of M: MT * 16 a warp
# Warps and mma tiles of each.
CUTS = {
    "fprop": ((4, 1), (4, 2), (8, 2), (8, 4)),
    "dgrad": ((4, 1), (4, 2), (8, 2)),
    "wgrad": ((4, 2),),
}


class SlotTile(NamedTuple):
    """Sizes of one CTA's work. The first five specialise the kernel, the others are arguments of a launch."""

    nt: int  # tiles of 8 in the product's N
    mt: int  # tiles of 16 in its M, of one warp
    warps: int
    items: int
    bands: int  # of an image, to a slot: 1, or a slot holds the bands of one image
    shared: int  # bytes
    tile_h: int
    tile_w: int
    taps: int  # of a group: all, those of one kernel row, or one
    rows: int  # of the patch
    cols: int
    units: int = 0  # fprop, wgrad: units of a chunk at most
    filters: int = 0  # dgrad: filters of a step
    range: int = 0  # dgrad: channels of a CTA
    splits: int = 1  # wgrad: of the pixels
    lists: int = 1  # wgrad: of the chunks

    @property
    def plane(self) -> int:
        return self.rows * self.cols | 1


def slot_of(dtype: torch.dtype) -> int:
    """Members of a slot: images, or bands of rows of one image, that share 16 bytes."""
    return 16 // dtype.itemsize


def unit_of(bc: int, dtype: torch.dtype) -> int:
    """G: channels of a block that lie in one 16-byte piece of values."""
    return min(bc, slot_of(dtype))


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
    bk, bc = blocksize
    if bk % 8 or bk < 8:
        return (
            f"bk = {bk}: 8 filters are the narrowest operand of its tensor-core product, so bk must be a multiple of 8;"
            " use backend='torch'"
        )
    if bc not in (1, 2, 4, 8, 16, 32, 64, 128):
        return f"bc = {bc}: it takes the powers of two up to 128; use backend='torch'"
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
        ("N*H*W", g.n * g.h * g.w), ("N*P*Q", g.n * g.p * g.q), ("K*C*R*S / 64", g.k * g.c * g.taps // 64),
        ("H + 2*padding", g.h + 2 * g.padding[0]), ("W + 2*padding", g.w + 2 * g.padding[1]),
        ("stride", max(g.stride)), ("dilation", max(g.dilation)),
    ):  # fmt: skip
        if size >= LIMIT:
            return f"{name} = {size}: pixels and entries are counted in 32 bits, below {LIMIT}; split the work"
    for kind in ("fprop", "dgrad"):
        tile = pick(kind, geometry, blocksize, 0, dtype)
        if (ctas := grid(kind, geometry, blocksize, dtype, tile)) > MAX_GRID:
            return f"{kind} needs {ctas} CTAs: a grid holds {MAX_GRID}; split the batch"
    return None


def tiled(kind: str, g: ConvGeometry, bands: int) -> tuple[int, int]:
    """Rows (of a band) and columns of pixels that are cut into tiles."""
    high, wide = (-(-g.h // g.stride[0]), -(-g.w // g.stride[1])) if kind == "dgrad" else (g.p, g.q)
    return -(-high // bands), wide


def tiles_of(kind: str, g: ConvGeometry, dtype: torch.dtype, tile: SlotTile) -> int:
    """Tiles of pixels, of all slots."""
    high, wide = tiled(kind, g, tile.bands)
    return -(-high // tile.tile_h) * -(-wide // tile.tile_w) * -(-g.n * tile.bands // slot_of(dtype))


def steps(kind: str, g: ConvGeometry, taps: int) -> tuple[int, int]:
    """Pixels of the tensor from one row, and one column, of the patch to the next."""
    if kind == "dgrad":
        return 1, 1
    tall, wide = _group(g, taps)
    (sh, sw), (dh, dw) = g.stride, g.dilation
    return (math.gcd(sh, dh) if tall > 1 else sh, math.gcd(sw, dw) if wide > 1 else sw)


def grid(kind: str, g: ConvGeometry, blocksize: tuple[int, int], dtype: torch.dtype, tile: SlotTile) -> int:
    """CTAs of a launch."""
    bk, _ = blocksize
    parts = g.k // bk * -(-bk // (8 * tile.nt))
    if kind == "wgrad":
        return parts * tile.lists * tile.splits
    tiles = tiles_of(kind, g, dtype, tile)
    if kind == "fprop":
        return tiles * parts
    return tiles * min(g.stride[0], g.h) * min(g.stride[1], g.w) * -(-g.c // tile.range)


def _group(g: ConvGeometry, taps: int) -> tuple[int, int]:
    """Kernel rows and columns of a group of taps."""
    tall = g.r if taps == g.taps else 1
    return tall, taps // tall


def _patch(kind: str, g: ConvGeometry, taps: int, high: int, wide: int) -> tuple[int, int]:
    """Rows and columns of the patch under a tile of high x wide pixels."""
    tall, broad = _group(g, taps)
    (sh, sw), (dh, dw) = g.stride, g.dilation
    if kind == "dgrad":
        return high + (tall - 1) * dh // sh, wide + (broad - 1) * dw // sw
    step_h, step_w = steps(kind, g, taps)
    return ((high - 1) * sh + (tall - 1) * dh) // step_h + 1, ((wide - 1) * sw + (broad - 1) * dw) // step_w + 1


def _row_bytes(count: int, size: int) -> int:
    return ((count * size + 15) // 16 | 1) * 16


def _tables(kind: str, items: int, nt: int, bc: int, dtype: torch.dtype) -> int:
    """Bytes of shared memory in front of the patch: PATCH_AT of each kernel."""
    size = dtype.itemsize
    values_at = 8 * items + 4 * LANES * slot_of(dtype) + 4 * MAX_TAPS + 8 * MAX_BLOCKS + 16 + 4 * CELLS
    if kind == "wgrad":
        return values_at + 4 * 8 * nt + 4 * (MAX_PIXELS + 4)
    by_item = (bc == 1) == (kind == "fprop")
    return values_at + (items * _row_bytes(8 * nt, size) if by_item else 8 * nt * _row_bytes(items, size))


def _shapes(kind: str, g: ConvGeometry, bands: int, most: int) -> Iterator[tuple[int, int]]:
    """Tiles of at most `most` pixels: even cuts of the rows, and as many rows as fit, evenly cut too."""
    high, wide = tiled(kind, g, bands)
    for cuts in {*range(1, 9), *(-(-wide // (1 << i)) for i in range(8))}:
        across = -(-wide // cuts)
        if across <= most:
            down = min(high, most // across)
            yield -(-high // -(-high // down)), across


@functools.lru_cache(maxsize=4096)
def pick(
    kind: str,
    geometry: ConvGeometry,
    blocksize: tuple[int, int],
    nnzb: int,
    dtype: torch.dtype,
    precision: str = "ieee",
    gpu: Gpu = NAMED["h100"],
    channels_last: bool = False,
) -> SlotTile:
    """The tile of least predicted time for work that `refusal` lets through. Pure: sizes in, sizes out."""

    def seconds(tile: SlotTile) -> float:
        return estimate(kind, geometry, blocksize, nnzb, dtype, precision, tile, gpu, channels_last).seconds

    return min(candidates(kind, geometry, blocksize, nnzb, dtype, gpu), key=seconds)


def demand(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, precision: str,
    tile: SlotTile, gpu: Gpu, channels_last: bool = False,
) -> Demand:  # fmt: skip
    """What the kernel of a tile needs, by the loops of the .cu files and the counts of counts/cupy.json.

    Which taps a channel has is not known here: TAPS of them, or all that there are.
    """
    (bk, bc), slot, size = blocksize, slot_of(dtype), dtype.itemsize
    unit, math_ = unit_of(bc, dtype), MATH.get(dtype) or {"tf32": "TF32", "ieee": "FP32"}[precision]
    count = counted.cupy(kind, math_, unit, tile.nt, tile.mt, tile.warps, tile.bands)
    step = {"TF32": 8, "FP32": 4}.get(math_, 16)  # slots.cu: STEP
    block_rows, groups = g.k // bk, g.taps / tile.taps
    entries = nnzb * bc / block_rows  # of a block-row, in channels
    taps = min(TAPS, g.taps)  # of a channel
    channels = min(float(g.c), entries / taps)  # of a block-row
    here = max(1.0, taps / groups)  # taps of a channel in a group
    tiles, ctas = tiles_of(kind, g, dtype, tile), float(grid(kind, g, blocksize, dtype, tile))
    patch, area = tile.rows * tile.cols, tile.tile_h * tile.tile_w
    members = g.n * tile.bands / max(1, -(-g.n * tile.bands // slot))  # of a slot, on average
    per_warp = tile.mt * tile.nt
    weights, (x, y) = nnzb * bk * bc, gpu_cost.activations(g)
    written = float((y, x, weights)[KINDS.index(kind)] * size)

    def sectors(rows: int, cols: int, width: int, of: float, all_: int) -> float:
        """Bytes from L2 of `of` channels of a patch, of `all_` that the tensor has."""
        if channels_last:  # pixel by pixel; channels beside each other share sectors
            return members * rows * cols * 32 * min(of, all_ * size / 32)
        lines, line = (rows, cols) if cols < width else (1, rows * width)  # what lies in one piece
        return members * lines * 32 * (line * size / 32 + 1) * of

    turns: tuple[float, ...]
    if kind == "fprop":
        most = min(tile.units * unit, tile.items / here)  # channels of a chunk
        chunks = groups * (channels / most + 0.5) if nnzb else 0.0
        slots_in = groups * channels * patch
        products = entries / step * per_warp
        turns = (chunks, groups, groups)
        slots_out = min(8.0 * tile.nt, bk) * area
        read = groups * sectors(tile.rows, tile.cols, g.w, channels, g.c) + entries * 8 * tile.nt * size
        chain = 4 + 3 * chunks
    elif kind == "dgrad":
        classes = min(g.stride[0], g.h) * min(g.stride[1], g.w)
        reached = channels * min(tile.range, g.c) / g.c  # channels of the range that a block-row stores
        active = block_rows * min(1.0, reached / unit) if nnzb else 0.0
        loads = active * max(1.0, bk / tile.filters) * max(1.0, groups / classes)
        chunks = loads * max(1.0, reached / (8 * tile.nt))
        slots_in = loads * tile.filters * patch
        products = chunks * math.ceil(tile.filters * max(1.0, here / classes) / step) * per_warp
        turns = (chunks, loads, block_rows * groups, groups)
        slots_out = min(tile.range, g.c) * area
        read = loads * sectors(tile.rows, tile.cols, g.q, tile.filters, g.k)
        read += active * reached * taps / classes * bk * size
        chain = 4 + 2 * block_rows + 2 * loads + chunks
    else:
        most = min(tile.units * unit, tile.items / here)
        chunks = groups * (channels / most / tile.lists + 0.5) if nnzb else 0.0  # of a CTA
        turned = chunks * tiles / tile.splits
        filters = min(8.0 * tile.nt, bk)
        each = min(most, channels)
        slots_in = turned * (each * patch + filters * area)
        products = turned * area * slot / step * math.ceil(each * here / (16 * tile.warps)) * tile.nt
        turns = (turned, chunks, groups, groups)
        slots_out = 0.0
        read = turned * sectors(tile.rows, tile.cols, g.w, each, g.c)
        read += turned * sectors(tile.tile_h, tile.tile_w, g.q, filters, g.k)
        written = 4.0 * tile.splits * weights if tile.splits > 1 else written
        chain = 4 + 3 * turned + chunks
    around = count.outside + sum(a * b for a, b in zip(count.nest, turns, strict=True))
    issue = slots_in / 32 * count.load + slots_out / 32 * count.result
    issue += tile.warps * (products * count.mma + around)
    wavefronts = slots_in / 32 * (slot + 4) + slots_out / 32 * 2 * slot  # 1 for each load of a slot, 4 for its store
    wavefronts += tile.warps * products * (4 / tile.nt + 2 / tile.mt)
    return Demand(
        ctas,
        tile.warps,
        gpu_cost.resident(count.registers, tile.warps, tile.shared, gpu),
        ctas * issue,
        ISSUE,
        ctas * wavefronts,
        ctas * tile.warps * products * 2 * 16 * 8 * step,
        gpu_cost.flops_of(dtype, precision, gpu) * MMA_SYNC,
        ctas * read,
        written,
        (x + y + weights) * size + 8 * nnzb,
        chain,
    )


def estimate(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, precision: str,
    tile: SlotTile, gpu: Gpu, channels_last: bool = False,
) -> Estimate:  # fmt: skip
    """Predicted time of a product."""
    before = 0.0
    if tile.splits > 1:  # add_splits reads what lies in L2
        before = gpu_cost.passes(4 * tile.splits * nnzb * blocksize[0] * blocksize[1] / 2, 1, gpu)
    return gpu_cost.estimate(demand(kind, g, blocksize, nnzb, dtype, precision, tile, gpu, channels_last), gpu, before)


def candidates(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, gpu: Gpu = NAMED["h100"]
) -> Iterator[SlotTile]:
    bk, bc = blocksize
    slot, unit = slot_of(dtype), unit_of(bc, dtype)
    nt = (2 if bc < 32 else 4) if kind == "dgrad" else next(n for n in (1, 2, 4) if 8 * n >= min(bk, 32))
    items = ITEMS[kind]
    for bands, (warps, mt) in itertools.product((1, slot) if _small(g, slot) else (1,), CUTS[kind]):
        if nt * mt > 8:  # mma tiles of a warp: 4 registers each, of 128
            continue
        tables = _tables(kind, items, nt, bc, dtype)
        pixels = MAX_PIXELS // 2 if kind == "wgrad" else warps * mt * 16 // slot
        for taps in sorted({g.taps, g.s, 1}, reverse=True):
            if taps > MAX_TAPS or taps * unit > items:
                continue
            for tile_h, tile_w in _shapes(kind, g, bands, pixels):
                rows, cols = _patch(kind, g, taps, tile_h, tile_w)
                tile = SlotTile(nt, mt, warps, items, bands, 0, tile_h, tile_w, taps, rows, cols)
                for budget in (SM_BYTES // 4 - 1024, SHARED_BYTES):
                    if kind == "dgrad":
                        found = _fit_dgrad(tile, tables, budget, g, bk, bc, slot)
                    else:
                        found = _fit(kind, tile, tables, budget, g, bc, slot, unit)
                    if found is not None:
                        yield _split(found, g, blocksize, nnzb, dtype, 2 * gpu.units) if kind == "wgrad" else found


def _small(g: ConvGeometry, slot: int) -> bool:
    """Whether slots of whole images have room left that bands of one image would fill.

    On a 3x3 layer of 128 channels at 200 x 200 one, two and four images are predicted to cost about 0.15, 0.3 and 0.6
    of what eight cost where slots hold bands, and as much as eight where they hold whole images. On small images, which
    fill the device neither way, wgrad alone gains. The last bands may begin behind the last row: that, too, is counted
    in 32 bits.
    """
    return g.n % slot > 0 and g.n < 2 * slot and 2 * slot * (g.h + 2 * g.padding[0] + g.stride[0]) < LIMIT


def _fit(
    kind: str, tile: SlotTile, tables: int, budget: int, g: ConvGeometry, bc: int, slot: int, unit: int
) -> SlotTile | None:
    """fprop or wgrad with as many units as fit, up to a full list of items."""
    n = 8 * tile.nt
    if kind == "fprop":
        other, spare = 0, 1  # the plane of zeros
        results = n * (tile.warps * tile.mt * 16 // slot | 1) * 16
    else:
        other, spare, results = n * (tile.tile_h * tile.tile_w + 1 | 1) * 16, 0, 0
    room = (budget - tables - other) // (16 * tile.plane) - spare
    units = min(LANES, room // unit, -(-g.c // unit))
    if units < 1 or results > budget:
        return None
    shared = max(tables + other + (units * unit + spare) * tile.plane * 16, results)
    return tile._replace(units=units, shared=shared)


def _fit_dgrad(
    tile: SlotTile, tables: int, budget: int, g: ConvGeometry, bk: int, bc: int, slot: int
) -> SlotTile | None:
    """The most channels, then the most filters, that fit."""
    channel = (tile.warps * tile.mt * 16 + 4) * 4
    for width in (128, 64, 32, 16, 8):
        if (width > 8 and width >= 2 * g.c) or -(-width // bc) * tile.taps > CELLS:
            continue
        for filters in (32, 16, 8):
            if filters > bk or filters * tile.taps > tile.items:
                continue
            shared = tables + (filters + 1) * tile.plane * 16 + width * channel
            if shared <= budget:
                return tile._replace(filters=filters, range=width, shared=shared)
    return None


def _split(
    tile: SlotTile, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, full: int
) -> SlotTile:
    """wgrad's splits of the pixels, then of the chunks, to fill the device: `full` CTAs."""
    bk, bc = blocksize
    parts = g.k // bk * -(-bk // (8 * tile.nt))
    tiles = tiles_of("wgrad", g, dtype, tile)
    room = WORKSPACE_BYTES // (4 * max(1, nnzb) * bk * bc)
    splits = max(1, min(-(-2 * full // parts), tiles, room))
    chunks = -(-nnzb * bc // (g.k // bk * tile.items))
    lists = max(1, min(-(-2 * full // (parts * splits)), chunks))
    return tile._replace(splits=splits, lists=lists)
