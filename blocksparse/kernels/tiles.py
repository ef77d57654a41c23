"""Tile: how the Triton backend cuts its work; which work it can take; the one shipped table.

A leaf: nothing here imports Triton, touches a device or looks at a mask. A tile, and with it every grid and every
workspace, is the same for all patterns of one shape and nnzb.
"""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple

import torch

from ..geometry import ConvGeometry
from ..index import stacked
from . import counted, gpu_cost
from .gpu_cost import Demand, Estimate
from .gpus import Gpu, typical

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LIMIT = 2**30  # pixels and coordinates: the sum of two still fits int32
MAX_GRID = 2**31 - 1
WORKSPACE_BYTES = 32 << 20  # at most, for the splits of wgrad: small enough to stay in L2
MOST_TAPS = 31  # kernel rows and columns together
ISSUE = 0.65  # of the rate of instructions that these kernels reach
LEAST_STEPS = 4  # steps of BLOCK_K pixels that a split of wgrad is worth


class Tile(NamedTuple):
    """Sizes of one program's tile; triton_conv's table says what M, N and K are for each kind."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1  # of wgrad's pixels


class Entry(NamedTuple):
    """A row of TABLE: where it applies, and the sizes of its tile. BLOCK_N follows from the blocksize."""

    kinds: str
    widest: int  # BLOCK_N up to this
    math: str  # "half": fp16 and bf16; "tf32" or "ieee": fp32
    archs: str
    block_m: int
    block_k: int
    num_stages: int
    num_warps: int = 4


# Chosen from counts of instructions, registers and shared memory (counts/triton.json, written by bench/count.py), not
# tuned on a device: no GPU has timed an entry. Of the rows that fit `pick` takes that of least predicted time. Four
# warps throughout: a product of 256 rows takes a third fewer instructions than two of 128. Three stages, which fit two
# programs into a multiprocessor but for wgrad of 128 pixels; on the AMD path data waits in registers and two stages are
# all.
_NVIDIA = "sm_80 sm_90 sm_100"
TABLE: tuple[Entry, ...] = (
    Entry("fprop dgrad", 32, "half", "sm_90", 256, 64, 3),
    Entry("fprop dgrad", 128, "half", "sm_90 sm_100", 64, 64, 4),
    Entry("fprop dgrad", 128, "half", "sm_90 sm_100", 128, 64, 3),
    Entry("fprop dgrad", 64, "half", "sm_80", 128, 64, 3),
    Entry("fprop dgrad", 128, "half", "sm_80", 64, 64, 3),
    Entry("fprop dgrad", 64, "tf32", "sm_80 sm_90", 128, 32, 3),
    Entry("fprop dgrad", 64, "tf32", "sm_100", 128, 32, 2),  # dgrad of three stages spills
    Entry("fprop dgrad", 128, "tf32", _NVIDIA, 64, 32, 3),
    Entry("fprop dgrad", 128, "ieee", _NVIDIA, 64, 16, 3),
    Entry("wgrad", 32, "half", "sm_90", 256, 64, 3),
    Entry("wgrad", 64, "half", "sm_90", 128, 128, 3),
    Entry("wgrad", 64, "half", "sm_100", 128, 64, 3),
    Entry("wgrad", 128, "half", "sm_90 sm_100", 64, 64, 4),
    Entry("wgrad", 64, "half", "sm_80", 128, 32, 3),
    Entry("wgrad", 128, "half", "sm_80", 64, 32, 4),
    Entry("wgrad", 64, "tf32", _NVIDIA, 128, 32, 3),
    Entry("wgrad", 128, "tf32", _NVIDIA, 64, 32, 3),
    Entry("wgrad", 128, "ieee", _NVIDIA, 64, 16, 3),
    Entry("fprop dgrad", 128, "half", "gfx", 64, 64, 2),
    Entry("fprop dgrad wgrad", 128, "half", "gfx", 128, 64, 2),
    Entry("fprop dgrad", 128, "tf32", "gfx", 64, 32, 2),
    Entry("fprop dgrad wgrad", 128, "tf32", "gfx", 128, 32, 2),
    Entry("fprop dgrad wgrad", 128, "ieee", "gfx", 64, 32, 2),
)


def granule(side: int, most: int) -> int:
    """Channels that move together: the largest power of two that divides `side`, at most `most`."""
    return min(side & -side, most)


def _programs(kind: str, g: ConvGeometry, blocksize: tuple[int, int], block_m: int) -> int:
    """Programs of fprop or dgrad."""
    if kind == "fprop":
        return -(-g.n * g.p * g.q // block_m) * (g.k // blocksize[0])
    (sh, sw), pixels = g.stride, g.n * -(-g.h // g.stride[0]) * -(-g.w // g.stride[1])
    stacks = -(-(g.c // blocksize[1]) // stacked(g.weight_shape, blocksize))
    return -(-pixels // block_m) * min(sh, g.h) * min(sw, g.w) * stacks


def refusal(
    geometry: ConvGeometry, blocksize: tuple[int, int], dtype: torch.dtype, device_type: str, arch: str = ""
) -> str | None:
    """Why the Triton backend cannot take this work (what, why, what to do), or None: the only such predicate.

    Args:
        device_type: torch.device.type of the operands.
        arch: "sm_90", "gfx942", ...; "" where unknown.
    """
    for name, side in zip(("bk", "bc"), blocksize, strict=True):
        if side % 8 or not 8 <= side <= 128:
            return (
                f"{name} = {side}: the gather granule is 16 bytes, 8 fp16 channels, and a tile is at most 128 wide, so"
                f" {name} must be a multiple of 8 from 8 to 128; use backend='torch'"
            )
    if dtype not in DTYPES:
        return f"dtype = {dtype}: it takes {', '.join(map(str, DTYPES))}; use backend='torch'"
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "device = cpu: Triton needs a GPU, or its interpreter (slow, for tests: set TRITON_INTERPRET=1 before"
                " the first import of triton); use backend='torch'"
            )
    elif device_type != "cuda":
        return f"device = {device_type}: it runs on CUDA and ROCm GPUs; use backend='torch'"
    if arch.startswith("sm_") and int(arch[3:].rstrip("af")) < 80:
        return f"arch = {arch}: asynchronous copies need sm_80 or later; use backend='torch'"
    g = geometry
    for name, size in (
        ("N*H*W", g.n * g.h * g.w), ("N*P*Q", g.n * g.p * g.q), ("K*R*S", g.k * g.taps), ("C*R*S", g.c * g.taps),
        ("H + 2*padding", g.h + 2 * g.padding[0]), ("W + 2*padding", g.w + 2 * g.padding[1]),
        ("stride", max(g.stride)), ("dilation", max(g.dilation)),
    ):  # fmt: skip
        if size >= LIMIT:
            return f"{name} = {size}: pixels and coordinates are counted in 32 bits, below {LIMIT}; split the batch"
    if g.r + g.s > MOST_TAPS:
        return (
            f"R + S = {g.r + g.s}: borders are bits of 32, one a kernel row and column, at most {MOST_TAPS}; use"
            " backend='torch'"
        )
    if (size := blocksize[0] * g.c * g.taps) >= 2**31:
        return f"bk*C*R*S = {size}: values of a block-row are counted in 32 bits, below {2**31}; use backend='torch'"
    smallest = min(entry.block_m for entry in TABLE)
    for kind in ("fprop", "dgrad"):
        if (programs := _programs(kind, g, blocksize, smallest)) > MAX_GRID:
            return f"{kind} needs {programs} programs: a grid holds {MAX_GRID}; split the batch"
    return None


def block_n(kind: str, g: ConvGeometry, blocksize: tuple[int, int]) -> int:
    """BLOCK_N: the filters of a block, in dgrad the channels of a stack, as a power of two."""
    side = blocksize[1] * stacked(g.weight_shape, blocksize) if kind == "dgrad" else blocksize[0]
    return max(16, 1 << (side - 1).bit_length())


def find(kind: str, block_n: int, math: str, arch: str) -> list[Entry]:
    """The rows of TABLE that apply."""
    return [
        entry
        for entry in TABLE
        if kind in entry.kinds.split()
        and block_n <= entry.widest
        and math == entry.math
        and arch in entry.archs.split()
    ]


def wgrad_tiles(nnzb: int, block_rows: int, bc: int, block_m: int) -> int:
    """Tiles that cover the stored chunks of every block-row, wherever they lie (triton_conv: slot)."""
    size = granule(bc, block_m)
    return nnzb * (bc // size) // (block_m // size) + block_rows


def group_of(splits: int) -> int:
    """How many splits of wgrad are added up at once: all, or groups, whose sums are then added up.

    The last program of a group adds it, and the last of all adds the groups. With some 16 of each neither takes long.
    """
    return splits if splits <= 16 else math.isqrt(splits - 1) + 1


def _splits(g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, tile: Tile) -> list[int]:
    """Numbers of splits of wgrad to choose from: powers of two, as many as are worth it and find room."""
    worth = -(-g.n * g.p * g.q // tile.block_k) // LEAST_STEPS
    room = WORKSPACE_BYTES // (4 * max(1, nnzb) * blocksize[0] * blocksize[1])
    return [1 << i for i in range(max(1, min(worth, room)).bit_length())]


def demand(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, precision: str, tile: Tile,
    gpu: Gpu, channels_last: bool = True,
) -> Demand | None:  # fmt: skip
    """What the kernel of a tile needs, by triton_kernels.py; None where no kernel like it was counted."""
    (bk, bc), size, number = blocksize, dtype.itemsize, precision if dtype == torch.float32 else "half"
    loop = counted.triton(
        kind, number, gpu.column, counted.triton_version(), channels_last, max(g.stride), blocksize, tile[:5]
    )
    if loop is None:
        return None
    x, y = gpu_cost.activations(g)
    weights = nnzb * bk * bc
    results = tile.block_m * tile.block_n * size / gpu_cost.SHARED_BYTES
    if kind == "wgrad":
        # Tiles with entries: each block-row's last one is half full on average.
        tiles = min(wgrad_tiles(nnzb, g.k // bk, bc, tile.block_m), nnzb * bc / tile.block_m + 0.5 * g.k / bk)
        programs, steps = tiles * tile.splits, float(-(-g.n * g.p * g.q // (tile.block_k * tile.splits)))
        read = g.n * g.p * g.q * size * (nnzb * bc + tiles * bk)
        written = weights * float(size)
        chain = 4 + steps / (tile.num_stages - 1)
        if tile.splits > 1:  # through the workspace, which lies in L2; the last programs add it up
            read, written = read + 4.0 * tile.splits * weights, written + 4.0 * tile.splits * weights
            chain += 4
    else:
        outer, inner, own, apart = g.k // bk, bc, bk, 1
        stored = entries = nnzb / outer
        if kind == "dgrad":
            # A program takes a stack of channel blocks, and an entry that any of them stores, for all.
            stack, apart = stacked(g.weight_shape, blocksize), min(g.stride[0], g.h) * min(g.stride[1], g.w)
            outer, inner, own = -(-(g.c // bc) // stack), bk, bc
            cells = g.k // bk * g.taps / apart
            stored = nnzb / (outer * apart)
            entries = cells * (1 - (1 - min(1.0, stored / (cells * stack))) ** stack)
        programs = float(_programs(kind, g, blocksize, tile.block_m))
        steps = entries * inner / tile.block_k + 0.5 if nnzb else 0.0
        read = programs * inner * (entries * tile.block_m + stored * own) * size
        written = (y if kind == "fprop" else x) * float(size)
        results *= 2  # stored and read again, to be written side by side
        chain = 5 + steps / (tile.num_stages - 1)
    tile_bytes = (tile.block_m + tile.block_n) * tile.block_k * size
    # Tensor cores read both operands from shared memory, B anew for every 64 rows of A (mma.sync: for every warp).
    anew = tile.block_m // 64 if gpu.column in ("sm_90", "sm_100") else tile.num_warps
    reads = (tile.block_m + anew * tile.block_n) * tile.block_k * size
    conflicts = 1 if loop.swizzled else 4
    wavefronts = (tile_bytes + conflicts * reads) / gpu_cost.SHARED_BYTES
    return Demand(
        programs,
        tile.num_warps,
        gpu_cost.resident(loop.registers, tile.num_warps, loop.shared, gpu),
        programs * tile.num_warps * (loop.outside + steps * loop.each),
        ISSUE,
        programs * (steps * wavefronts + results),
        2.0 * programs * steps * tile.block_m * tile.block_n * tile.block_k,
        gpu_cost.flops_of(dtype, precision, gpu),
        read,
        written,
        (x + y + weights) * size + 8 * nnzb,
        chain,
    )


def estimate(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, precision: str, tile: Tile,
    gpu: Gpu, channels_last: bool = True, ordered: bool = False,
) -> Estimate | None:  # fmt: skip
    """Predicted time of a product; ordered: a pattern with a row order, whose dy is copied first."""
    needs = demand(kind, g, blocksize, nnzb, dtype, precision, tile, gpu, channels_last)
    if needs is None:
        return None
    copied = 2 * gpu_cost.activations(g)[1] * dtype.itemsize if ordered and kind != "fprop" else 0
    return gpu_cost.estimate(needs, gpu, gpu_cost.passes(copied, 1, gpu) if copied else 0.0)


@functools.lru_cache(maxsize=4096)
def pick(
    kind: str,
    geometry: ConvGeometry,
    blocksize: tuple[int, int],
    nnzb: int,
    dtype: torch.dtype,
    arch: str = "",
    precision: str = "ieee",
    gpu: Gpu | None = None,
    channels_last: bool = True,
) -> Tile:
    """The tile of least predicted time for work that `refusal` lets through. Pure: sizes in, sizes out.

    Args:
        arch: "sm_90", "gfx942", ...; "" where unknown.
        precision: of fp32 products, "tf32" or "ieee"; no matter for the other dtypes.
        gpu: the device; None: a typical one of `arch`.
    """
    gpu = gpu or typical(arch)
    number, width = precision if dtype == torch.float32 else "half", block_n(kind, geometry, blocksize)
    found: dict[Tile, float] = {}
    for entry in find(kind, width, number, gpu.column):
        plain = Tile(entry.block_m, width, entry.block_k, entry.num_warps, entry.num_stages)
        for splits in _splits(geometry, blocksize, nnzb, plain) if kind == "wgrad" else (1,):
            tile = plain._replace(splits=splits)
            time = estimate(kind, geometry, blocksize, nnzb, dtype, precision, tile, gpu, channels_last)
            found[tile] = math.inf if time is None else time.seconds
    if not found:
        raise LookupError(f"tiles.pick(): TABLE has no row for {kind}, N = {width}, {number}, {gpu.column}")
    return min(found, key=lambda tile: found[tile])
