"""What the CUDA C++ kernels need, by the loops of the .cu files and counts/cupy.json; the tile of least predicted time.

Which channels and taps a block-row stores is not known to a plan: `slots.taps_of` and `slots.channels_of` say what is
taken for granted.
"""

from __future__ import annotations

import functools
import math

import torch

from ..geometry import ConvGeometry
from . import counted, gpu_cost, slots
from .counted import Phases
from .gpu_cost import Demand, Estimate
from .gpus import NAMED, Gpu
from .slots import IMAGES, SlotTile, math_of, slot_of

ISSUE = 0.55  # of the rate of instructions that these kernels reach
MMA_SYNC = 0.62  # of the rate of tensor cores on sm_90
CLEARED = 10.0  # instructions for 32 slots of zeros

Costs = tuple[float, float, float]  # instructions and wavefronts of all warps, bytes from L2


def _sum(*costs: Costs) -> Costs:
    return sum(c[0] for c in costs), sum(c[1] for c in costs), sum(c[2] for c in costs)


def _times(times: float, cost: Costs) -> Costs:
    return times * cost[0], times * cost[1], times * cost[2]


def _copied(
    channels: float, pixels: int, inside: int, tile: SlotTile, count: Phases, dtype: torch.dtype
) -> Costs:  # fmt: skip
    """A patch: `inside` of its pixels are not beyond the borders."""
    groups = -(-pixels * IMAGES // (32 * slot_of(dtype)))
    parts = max(1, tile.warps // groups)
    each = math.ceil(channels / parts)
    issue = groups * parts * (count.task + each // 4 * 4 * count.load + each % 4 * count.rest)
    return issue, 4.0 * groups * channels, channels * inside * IMAGES * dtype.itemsize


def demand(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, precision: str,
    tile: SlotTile, gpu: Gpu,
) -> Demand:  # fmt: skip
    """What the kernel of a tile needs."""
    (bk, bc), size, math_ = blocksize, dtype.itemsize, math_of(dtype, precision)
    count = counted.cupy(kind, math_, tile.mt, tile.nt, tile.warps, tile.filters)
    if g.n % slot_of(dtype):  # pixels begin anywhere: image by image, in and out
        count = count._replace(load=count.members, rest=count.members, result=2 * count.result)
    step = {"TF32": 8, "FP32": 1}.get(math_, 16)  # of K, in what count.mma counts
    rows = g.k // bk
    entries = nnzb * bc / rows  # of a block-row, in channels
    channels = slots.channels_of(g, blocksize, nnzb, 1)  # of a block-row
    tiles, warps, patch = math.prod(slots.tiles_of(kind, g, tile)), tile.warps, tile.rows * tile.cols
    each = max(1, -(-tiles // tile.splits))  # tiles of a CTA
    whole = slots.grid(kind, g, blocksize, tile._replace(splits=-(-tiles // each)))  # CTAs that have work
    weights, (x, y) = nnzb * bk * bc, gpu_cost.activations(g)
    slots_of_octet = 8 // slot_of(dtype)
    step_h, step_w = slots.steps(kind, g)
    read_h, read_w = (g.p, g.q) if kind == "dgrad" else (-(-g.h // step_h), -(-g.w // step_w))
    inside = min(tile.rows, read_h) * min(tile.cols, read_w)
    written = float((y, x, weights)[("fprop", "dgrad", "wgrad").index(kind)] * size)

    def multiplied(items: float, a: float, b: float) -> Costs:
        """M x N of a warp, over so many items, by all warps; a, b: tiles of M and N."""
        products = warps * items / step * a * b
        fragments = {"TF32": 8 * a + 4 * b, "FP32": 2 * a + 2 * b}.get(math_, 4 * a + 2 * b)
        return products * count.mma, warps * items / step * fragments, 0.0

    chunks: float  # of a tile
    values: Costs
    chain: float
    items: float  # of K, in fprop all, in dgrad those of a step, in wgrad (of M) those of a chunk
    if kind == "fprop":
        chunks = max(1, math.ceil(channels / tile.units)) if nnzb else 1
        items = math.ceil((entries + chunks * slots.step_of(math_) / 2) / step) * step if nnzb else 0
        pieces = items * tile.filters * size / 16 / 32
        values = pieces * count.value, 4 * pieces, items * tile.filters * size
        results = warps * 16 * tile.mt * tile.nt * slots_of_octet / 32
        of_tile = _sum(
            _times(chunks, _copied(channels / chunks, patch, inside, tile, count, dtype)),
            multiplied(items, tile.mt, tile.nt),
            (chunks * warps * count.step + warps * count.tile + results * count.result, 0.0, 0.0),
            values if chunks > 2 else (0.0, 0.0, 0.0),
        )
        listed = _listed(entries, warps, count)
        relisted = entries * 1.1 > tile.capacity
        cost = _sum(_times(each, of_tile), _times(each if relisted else 1, listed), values)
        chain = 8 + each * chunks + (4 * each if relisted else 0)
        flops = each * multiplied(items, tile.mt, tile.nt)[0] / count.mma
    elif kind == "dgrad":
        classes, bands, rows_of_chunk = slots.classes(g), slots.bands(g, bk, tile), 16 * tile.mt
        stored = slots.channels_of(g, blocksize, nnzb, max(1, tile.filters // bk))  # of a band
        parts = max(1, bk // tile.filters)  # steps of a chunk
        chunks = bands * math.ceil(stored / rows_of_chunk) if nnzb else 0
        steps = chunks * parts
        patches = steps if parts > 1 else bands * min(1.0, stored)
        own = g.taps / classes
        items = math.ceil(own * tile.filters / slots.step_of(math_)) * slots.step_of(math_)
        pieces = items * rows_of_chunk * size / 16 / 32
        values = _times(steps, (pieces * count.value, 4 * pieces, 0.0))
        octets = rows_of_chunk * warps * tile.nt  # of a chunk
        several = slots.in_several(stored / g.c, bands)
        left = 1 - (1 - stored / g.c) ** (bands * tile.lists) if stored else 0.0  # channels that any block-row stores
        zeros = (1 - left) * g.c * tile.area * (IMAGES // slot_of(dtype)) / 32 / tile.lists
        of_tile = _sum(
            _times(patches, _copied(tile.filters, patch, inside, tile, count, dtype)),
            _times(steps, multiplied(items, tile.mt, tile.nt)),
            (steps * warps * count.step, 0.0, steps * stored / math.ceil(max(1.0, stored) / rows_of_chunk) * own
             * tile.filters * size),
            _times(chunks, (octets * slots_of_octet / 32 * count.result, 0.0, 0.0)),
            (zeros * CLEARED + warps * count.tile, 4 * zeros, 0.0),
        )  # fmt: skip
        if bands > 1:
            of_tile = _sum(of_tile, _times(chunks, (warps * count.add, several * octets * 32 / 64, 0.0)))
        if tile.lists > 1:
            of_tile = _sum(of_tile, (chunks * warps * count.partial, 0.0, 0.0))
        # Entries are counted, of all block-rows where other CTAs share them, and listed: half of count.entry each.
        read = (rows + rows / tile.lists) / 2
        once = read * math.ceil(entries / 32) * count.entry + warps * count.outside, 0.0, 12.0 * read * entries
        relisted = tile.part < g.c and (tile.units < g.c or chunks > tile.capacity or several * g.c > tile.planes)
        cost = _sum(_times(each, of_tile), _times(each * g.c / tile.part if relisted else 1, once))
        cost = _sum(cost, values if steps <= tile.held and not relisted else _times(each, values))
        chain = 8 + each * max(1.0, steps) + (4 * each * g.c / tile.part if relisted else 0)
        flops = each * steps * multiplied(items, tile.mt, tile.nt)[0] / count.mma
        written += met(g, stored, bands, tile.lists)
    else:
        chunks = max(1, math.ceil(channels / tile.units)) if nnzb else 0
        items = entries / max(1, chunks)
        tall = max(1, math.ceil(items / 16))  # tiles of 16 entries
        across = min(warps, 1 << (math.ceil(tall / tile.mt) - 1).bit_length())
        deep = tile.area * IMAGES * math.ceil(tall / across) * across / warps  # of K, by each warp
        filters = min(tile.filters, bk)
        of_tile = _sum(
            _copied(channels / max(1, chunks), patch, inside, tile, count, dtype),
            _copied(filters, tile.area, tile.area, tile, count, dtype),
            multiplied(deep, 1, tile.nt),
            (warps * count.step, 0.0, 0.0),
        )
        turns = each * chunks / tile.lists
        cost = _sum(_times(turns, of_tile), _listed(entries, warps, count))
        chain = 8 + turns
        flops = turns * multiplied(deep, 1, tile.nt)[0] / count.mma
        if tile.splits > 1:
            written = 4.0 * tile.splits * weights
    return Demand(
        float(whole),
        warps,
        gpu_cost.resident(count.registers, warps, tile.shared, gpu),
        whole * cost[0],
        ISSUE,
        whole * cost[1],
        whole * flops * 2 * 16 * 8 * step,
        gpu_cost.flops_of(dtype, precision, gpu) * (1.0 if math_ == "FP32" else MMA_SYNC),
        whole * cost[2],
        written,
        (x + y + weights) * size + 8 * nnzb,
        chain,
    )


def met(g: ConvGeometry, stored: float, bands: int, shares: int) -> float:
    """dgrad: bytes of the workspace that shares of so many bands, of so many channels each, write."""
    share = 1 - (1 - stored / g.c) ** bands
    return share * (1 - (1 - share) ** (shares - 1)) * slots.workspace(g, shares)


def _listed(entries: float, warps: int, count: Phases) -> Costs:
    """fprop and wgrad: a block-row's lists, and what surrounds them."""
    return math.ceil(entries / (32 * warps)) * warps * count.entry + warps * count.outside, 0.0, 12 * entries


def estimate(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, precision: str,
    tile: SlotTile, gpu: Gpu,
) -> Estimate:  # fmt: skip
    """Predicted time of a product."""
    (bk, bc), before = blocksize, 0.0
    if tile.splits > 1 and kind == "wgrad":  # add_splits reads what lies in L2
        before = gpu_cost.passes(4 * tile.splits * nnzb * bk * bc / 2, 1, gpu)
    if tile.lists > 1 and kind == "dgrad":  # add_shares, too
        stored = slots.channels_of(g, blocksize, nnzb, max(1, tile.filters // bk))
        before = gpu_cost.passes(met(g, stored, slots.bands(g, bk, tile), tile.lists) / 2, 1, gpu)
    if bc > 1:  # values, or their gradient, in another order
        before += gpu_cost.passes(2 * nnzb * bk * bc * dtype.itemsize, 1, gpu)
    return gpu_cost.estimate(demand(kind, g, blocksize, nnzb, dtype, precision, tile, gpu), gpu, before)


@functools.lru_cache(maxsize=4096)
def pick(
    kind: str,
    geometry: ConvGeometry,
    blocksize: tuple[int, int],
    nnzb: int,
    dtype: torch.dtype,
    precision: str = "ieee",
    gpu: Gpu = NAMED["h100"],
) -> SlotTile:
    """The tile of least predicted time for work that `slots.refusal` lets through. Pure: sizes in, sizes out."""

    def seconds(tile: SlotTile) -> float:
        return estimate(kind, geometry, blocksize, nnzb, dtype, precision, tile, gpu).seconds

    return min(slots.candidates(kind, geometry, blocksize, nnzb, dtype, gpu), key=seconds)
