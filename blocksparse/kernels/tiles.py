"""Tile: how the Triton backend cuts its work; which work it can take; the one shipped table.

A leaf: nothing here imports Triton, touches a device or looks at a mask. A tile, and with it every grid and every
workspace, is the same for all patterns of one shape and nnzb.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch

from ..geometry import ConvGeometry
from ..index import stacked

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LIMIT = 2**30  # pixels and coordinates: the sum of two still fits int32
MAX_GRID = 2**31 - 1
WORKSPACE_BYTES = 32 << 20  # at most, for the splits of wgrad: small enough to stay in L2
MOST_TAPS = 31  # kernel rows and columns together
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
    load: str  # how much there is to do: "few", "some" or "many" (see _load); "*": any
    archs: str
    block_m: int
    block_k: int
    num_stages: int
    num_warps: int = 4


# Chosen from counts of instructions, registers and shared memory (counts/triton.json, written by bench/count.py), not
# tuned on a device: no GPU has timed an entry. The first row that fits applies. Four warps throughout: a product of 256
# rows takes a third fewer instructions than two of 128. Three stages, which fit two programs into a multiprocessor but
# for wgrad of 128 pixels; on the AMD path data waits in registers and two stages are all.
_NVIDIA = "sm_80 sm_90 sm_100"
TABLE: tuple[Entry, ...] = (
    Entry("fprop dgrad", 32, "half", "many", "sm_90", 256, 64, 3),
    Entry("fprop dgrad", 128, "half", "few", "sm_90 sm_100", 64, 64, 4),
    Entry("fprop dgrad", 128, "half", "*", "sm_90 sm_100", 128, 64, 3),
    Entry("fprop dgrad", 128, "half", "few", "sm_80", 64, 64, 3),
    Entry("fprop dgrad", 64, "half", "*", "sm_80", 128, 64, 3),
    Entry("fprop dgrad", 128, "half", "*", "sm_80", 64, 64, 3),
    Entry("fprop dgrad", 64, "tf32", "few", "sm_80 sm_90", 64, 32, 3),
    Entry("fprop dgrad", 64, "tf32", "*", _NVIDIA, 128, 32, 3),
    Entry("fprop dgrad", 128, "tf32", "*", _NVIDIA, 64, 32, 3),
    Entry("fprop dgrad", 128, "ieee", "*", _NVIDIA, 64, 16, 3),
    Entry("wgrad", 32, "half", "many", "sm_90", 256, 64, 3),
    Entry("wgrad", 64, "half", "*", "sm_90", 128, 128, 3),
    Entry("wgrad", 64, "half", "*", "sm_100", 128, 64, 3),
    Entry("wgrad", 128, "half", "*", "sm_90 sm_100", 64, 64, 4),
    Entry("wgrad", 64, "half", "*", "sm_80", 128, 32, 4),
    Entry("wgrad", 128, "half", "*", "sm_80", 64, 32, 4),
    Entry("wgrad", 64, "tf32", "*", _NVIDIA, 128, 32, 3),
    Entry("wgrad", 128, "tf32", "*", _NVIDIA, 64, 32, 3),
    Entry("wgrad", 128, "ieee", "*", _NVIDIA, 64, 16, 3),
    Entry("fprop dgrad", 128, "half", "few", "gfx", 64, 64, 2),
    Entry("fprop dgrad wgrad", 128, "half", "*", "gfx", 128, 64, 2),
    Entry("fprop dgrad", 128, "tf32", "few", "gfx", 64, 32, 2),
    Entry("fprop dgrad wgrad", 128, "tf32", "*", "gfx", 128, 32, 2),
    Entry("fprop dgrad wgrad", 128, "ieee", "*", "gfx", 64, 32, 2),
)

# Multiprocessors of a typical device: only to tell few programs from many.
UNITS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx": 304}


def granule(side: int, most: int) -> int:
    """Channels that move together: the largest power of two that divides `side`, at most `most`."""
    return min(side & -side, most)


def column_of(arch: str) -> str:
    """The column of TABLE for a device; "sm_80" (mma.sync, 99 KB of shared memory) runs on every other NVIDIA GPU."""
    if arch.startswith("gfx"):
        return "gfx"
    number = arch.removeprefix("sm_").rstrip("af")
    return {"90": "sm_90", "100": "sm_100", "103": "sm_100"}.get(number, "sm_80")


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


def find(kind: str, block_n: int, math: str, load: str, arch: str) -> Entry:
    """The row of TABLE that applies."""
    for entry in TABLE:
        if (
            kind in entry.kinds.split()
            and block_n <= entry.widest
            and math == entry.math
            and entry.load in (load, "*")
            and arch in entry.archs.split()
        ):
            return entry
    raise LookupError(f"tiles.find(): TABLE has no row for {kind}, N = {block_n}, {math}, {load}, {arch}")


def _load(kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, arch: str) -> str:
    """TABLE's third key, from sizes alone.

    fprop, dgrad: "many" where tiles of 256 pixels fill the device twice, "some" where those of 128 do, else "few".
    wgrad, whose splits fill the device: "many" where a block-row stores enough channels to fill 256 rows, else "some".
    """
    if kind == "wgrad":
        return "many" if nnzb * blocksize[1] >= 192 * (g.k // blocksize[0]) else "some"
    for load, block_m in (("many", 256), ("some", 128)):
        if _programs(kind, g, blocksize, block_m) >= 2 * UNITS[arch]:
            return load
    return "few"


def wgrad_tiles(nnzb: int, block_rows: int, bc: int, block_m: int) -> int:
    """Tiles that cover the stored chunks of every block-row, wherever they lie (triton_conv: slot)."""
    size = granule(bc, block_m)
    return nnzb * (bc // size) // (block_m // size) + block_rows


def group_of(splits: int) -> int:
    """How many splits of wgrad are added up at once: all, or groups, whose sums are then added up.

    The last program of a group adds it, and the last of all adds the groups. With some 16 of each neither takes long.
    """
    return splits if splits <= 16 else math.isqrt(splits - 1) + 1


def _splits(g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, tile: Tile, arch: str) -> int:
    tiles = wgrad_tiles(nnzb, g.k // blocksize[0], blocksize[1], tile.block_m)
    fill = -(-4 * UNITS[arch] // tiles)
    worth = -(-g.n * g.p * g.q // tile.block_k) // LEAST_STEPS
    room = WORKSPACE_BYTES // (4 * max(1, nnzb) * blocksize[0] * blocksize[1])
    return max(1, min(fill, worth, room))


def pick(
    kind: str,
    geometry: ConvGeometry,
    blocksize: tuple[int, int],
    nnzb: int,
    dtype: torch.dtype,
    arch: str = "",
    precision: str = "ieee",
) -> Tile:
    """The shipped tile for work that `refusal` lets through. Pure: sizes in, sizes out.

    Args:
        arch: "sm_90", "gfx942", ...; "" where unknown.
        precision: of fp32 products, "tf32" or "ieee"; no matter for the other dtypes.
    """
    math, column = precision if dtype == torch.float32 else "half", column_of(arch)
    load = _load(kind, geometry, blocksize, nnzb, column)
    side = blocksize[0]
    if kind == "dgrad":
        side = blocksize[1] * stacked(geometry.weight_shape, blocksize)
    block_n = 1 << (side - 1).bit_length()
    if column == "gfx":
        block_n = max(block_n, 16)  # MFMA has no narrower tile of fp32
    block_n = max(block_n, 16)
    entry = find(kind, block_n, math, load, column)
    tile = Tile(entry.block_m, block_n, entry.block_k, entry.num_warps, entry.num_stages)
    return tile._replace(splits=_splits(geometry, blocksize, nnzb, tile, column)) if kind == "wgrad" else tile
