"""Tile: how the Triton backend cuts its work; which work it can take; the one shipped table.

A leaf: nothing here imports Triton, touches a device or looks at a mask, so that a tile (and with it every grid and
workspace) is the same for all patterns of one shape and nnzb.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import torch

from ..geometry import ConvGeometry

Kind = Literal["fprop", "dgrad", "wgrad"]
KINDS: tuple[Kind, ...] = ("fprop", "dgrad", "wgrad")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LIMIT = 2**30  # pixels and coordinates: sums of two still fit int32
MAX_GRID = 2**31 - 1
WORKSPACE_BYTES = 32 << 20  # at most, for wgrad's splits: small enough to stay in L2


class Tile(NamedTuple):
    """Sizes of one program's tile; triton_conv's table says what M and K are for each kind."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1  # wgrad alone: how many programs share the pixels of one tile


def granule(side: int, most: int) -> int:
    """Channels that move together: the largest power of two that divides `side`, at most `most`."""
    return min(side & -side, most)


def refusal(
    geometry: ConvGeometry, blocksize: tuple[int, int], dtype: torch.dtype, device_type: str, arch: str = ""
) -> str | None:
    """Why the Triton backend cannot take this work (name, reason, what to do instead), or None when it can.

    Args:
        device_type: torch.device.type of the operands.
        arch: "sm_90", "gfx942", ...; "" when unknown.
    """
    bk, bc = blocksize
    for name, side in (("bk", bk), ("bc", bc)):
        if side % 8 or not 8 <= side <= 128:
            return (
                f"{name} = {side}: the gather granule is 16 bytes, 8 fp16 channels, so bk and bc must be multiples of 8"
                " from 8 to 128; use backend='torch'"
            )
    if dtype not in DTYPES:
        return f"dtype = {dtype}: it takes {', '.join(map(str, DTYPES))}; use backend='torch'"
    if device_type not in ("cuda", "cpu"):
        return f"device = {device_type}: it runs on CUDA and ROCm GPUs; use backend='torch'"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "device = cpu: Triton needs a GPU, or its (slow) interpreter: set TRITON_INTERPRET=1 before Triton is"
            " imported; use backend='torch'"
        )
    if arch.startswith("sm_") and int(arch[3:].rstrip("af")) < 80:
        return f"arch = {arch}: asynchronous copies and bf16 need sm_80; use backend='torch'"
    g = geometry
    for name, size in (
        ("N*H*W", g.n * g.h * g.w), ("N*P*Q", g.n * g.p * g.q), ("K*R*S", g.k * g.taps), ("C*R*S", g.c * g.taps),
        ("H + 2*padding", g.h + 2 * g.padding[0]), ("W + 2*padding", g.w + 2 * g.padding[1]),
        ("stride", max(g.stride)), ("dilation", max(g.dilation)),
    ):  # fmt: skip
        if size >= LIMIT:
            return f"{name} = {size}: it counts pixels and coordinates in 32 bits, below {LIMIT}; split the batch"
    return None

# placeholder
def wgrad_tiles(nnzb, geometry, blocksize, tile):
    """Programs that cover the stored chunks of all block-rows, whatever the mask."""
    g = granule(blocksize[1], tile.block_m)
    return nnzb * (blocksize[1] // g) // (tile.block_m // g) + geometry.k // blocksize[0]
