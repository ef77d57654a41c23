"""What compiled kernels were counted to need: the rows of counts/*.json, and the one nearest to a kernel.

bench/count.py writes the files, from machine code; tests hold them to the kernels as they stand.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent / "counts"
Row = dict[str, Any]
# Where no kernel of a target was counted, those of another stand for it.
STAND_INS = {"sm_80": ("sm_90",), "sm_90": ("sm_80",), "sm_100": ("sm_90", "sm_80"), "gfx": ("sm_80", "sm_90")}
TILE = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
NUMBERS = {"half": ("float16", "bfloat16"), "tf32": ("float32",), "ieee": ("float32",)}


@functools.cache
def rows(backend: str) -> tuple[Row, ...]:
    """All rows of a backend; none where it has no file."""
    path = HERE / f"{backend}.json"
    return tuple(json.loads(path.read_text())) if path.exists() else ()


@functools.cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the Triton that is installed; where there is none, of the oldest that was counted."""
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found = min((row["triton"] for row in rows("triton")), default="3.6")
    major, minor = found.split(".")[:2]
    return int(major), int(minor)


class Loop(NamedTuple):
    """A Triton kernel: instructions of one warp, and what limits how many programs run at once.

    Attributes:
        each: of one K-tile.
        outside: before and behind the loop.
        registers: of a thread.
        shared: bytes of a program.
        swizzled: whether the tensor cores read both operands without bank conflicts.
    """

    each: float
    outside: float
    registers: int
    shared: int
    swizzled: bool


def _number(row: Row) -> str:
    return "half" if row["dtype"] in NUMBERS["half"] else str(row["precision"])


def _rows_of(kind: str, math_: str, column: str, layout: str) -> list[Row]:
    """Of this target, or one that stands in for it; of this number type, or of half."""
    fits = [row for row in rows("triton") if (row["kind"], row["format"]) == (kind, layout)]
    for target in (column, *STAND_INS[column]):
        for number in (math_, "half"):
            found = [row for row in fits if row["target"].startswith(target) and _number(row) == number]
            if found:
                return found
    return []


@functools.lru_cache(maxsize=4096)
def triton(
    kind: str, math_: str, column: str, version: tuple[int, int], channels_last: bool, stride: int,
    sides: tuple[int, int], tile: tuple[int, int, int, int, int],
) -> Loop | None:  # fmt: skip
    """The counts of a Triton kernel; None where nothing like it was counted.

    Of the rows of this kind, memory format, target and number type (or those that stand in for them) the nearest tile
    with the nearest blocks counts. Its loop is scaled by the bytes that a warp stages, its end by a warp's results.

    Args:
        math_: "half", "tf32" or "ieee".
        version: (major, minor) of Triton; the rows of the nearest are taken.
        sides: (bk, bc).
        tile: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages).
    """
    found = _rows_of(kind, math_, column, "channels_last" if channels_last else "contiguous")
    if not found:
        return None
    block_m, block_n, block_k, warps, stages = tile

    def distance(row: Row) -> tuple[float, ...]:
        near = [row["tile"][name] for name in TILE]
        tiles = sum(abs(math.log2(a / b)) for a, b in zip(near[:4], tile[:4], strict=True))
        blocks = sum(abs(math.log2(a / b)) for a, b in zip(row["blocksize"], sides, strict=True))
        major, minor = (int(part) for part in row["triton"].split(".")[:2])
        apart = abs(100 * (version[0] - major) + version[1] - minor)
        return apart, abs(row["stride"] - stride), tiles + 0.1 * abs(near[4] - stages), blocks

    row = min(found, key=distance)
    m, n, k, row_warps, row_stages = (row["tile"][name] for name in TILE)
    size, row_size = (2 if numbers == "half" else 4 for numbers in (math_, _number(row)))
    staged = (block_m + block_n) * block_k * size / ((m + n) * k * row_size)
    results = block_m * block_n / warps / (m * n / row_warps)
    each = row["loop"] * staged * row_warps / warps
    if math_ == "ieee" and _number(row) != "ieee":  # multiplied without tensor cores, operands read anew
        each += 1.5 * block_m * block_n * block_k / (32 * warps)
    return Loop(
        each,
        row["outside"] * (0.5 + 0.5 * results),
        min(255, max(40, round(row["registers"] * (0.5 + 0.5 * results)))),
        round(row["shared"] * staged * stages / row_stages),
        row["swizzled"],
    )


class Phases(NamedTuple):
    """A CUDA C++ kernel: instructions of one warp.

    Attributes:
        load: of 32 slots that are copied, four channels at a time.
        rest: the same, one channel at a time.
        members: the same where slots are no 16 bytes that lie together, or not all inside: image by image.
        task: of 32 slots of a patch, before their first channel.
        value: of 32 pieces of 16 bytes of values.
        add: dgrad, of a chunk: what is passed on from band to band.
        partial: dgrad, of a chunk: what goes to the workspace of all shares.
        mma: of a multiplication of 16 x 8 x STEP (fp32: x 1), with what it reads from shared memory.
        result: of 32 slots of results; 0 in wgrad.
        step: of the rest of a step, one chunk of a tile.
        tile: of the rest of a tile; dgrad: of a chunk of it.
        entry: of 32 stored entries, listed.
        outside: of the rest, once.
        registers: of a thread.
    """

    load: float
    rest: float
    members: float
    task: float
    value: float
    mma: float
    result: float
    add: float
    partial: float
    step: float
    tile: float
    entry: float
    outside: float
    registers: int


@functools.lru_cache(maxsize=4096)
def cupy(kind: str, math_: str, mt: int, nt: int, warps: int, filters: int) -> Phases:
    """The counts of a CUDA C++ kernel: of the counted specialisations of this kind and number type, the nearest.

    Args:
        math_: "FP16" (BF16 is alike), "TF32" or "FP32".
    """
    numbers = "FP16" if math_ == "BF16" else math_
    found = [row for row in rows("cupy") if (row["kind"], row["math"]) == (kind, numbers)]

    def distance(row: Row) -> float:
        pairs = (row["mt"], mt), (row["nt"], nt), (row["warps"], warps), (row["filters"], filters)
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    row = min(found, key=distance)
    return Phases(**{name: row[name] for name in Phases._fields})


class Turn(NamedTuple):
    """A Triton kernel of BatchNorm: instructions of one warp.

    Attributes:
        loop: of one chunk.
        outside: before and behind the loop; what only the last program of a tile runs is counted, too.
        registers: of a thread.
        shared: bytes of a program.
    """

    loop: float
    outside: float
    registers: int
    shared: int


@functools.lru_cache(maxsize=256)
def norm(kind: str, math_: str, column: str, version: tuple[int, int], memory_format: str, residual: bool) -> Turn:
    """The counts of a kernel of BatchNorm: of the counted ones of this kind, the nearest.

    Args:
        kind: "norm_statistics", "norm_apply", "norm_sums" or "norm_dx".
        math_: "half" or "ieee".
    """

    def distance(row: Row) -> tuple[float, ...]:
        targets = column, *STAND_INS[column]
        far = targets.index(row["target"]) if row["target"] in targets else len(targets)
        major, minor = (int(part) for part in row["triton"].split(".")[:2])
        odd = (row["math"] != math_, row["format"] != memory_format, row["residual"] != residual)
        return far, abs(100 * (version[0] - major) + version[1] - minor), *odd

    row = min((row for row in rows("norm") if row["kind"] == kind), key=distance)
    return Turn(row["loop"], row["outside"], row["registers"], row["shared"])
