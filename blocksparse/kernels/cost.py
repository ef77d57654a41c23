"""Predicted time of a product on stored blocks and of the dense one: what chooses between them.

On a CPU both are sums of a few terms, from sizes alone, so that the same sizes always run the same way:

    stored   call + (weights listed + values copied + multiplications at the speed of their tile) / threads
    dense    call + weights scattered into a filter bank, or gathered + (values + multiplications) / threads

A multiplication on stored blocks costs more in small blocks: a vector of pixels that is loaded is used once for each
filter of a block, 8 at most. In channels_last a pixel is loaded for each vector of a block's filters. The constants are
nanoseconds on one thread, measured and fitted by bench/calibrate.py (cost_constants.py). gpu_cost.py is about GPUs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..geometry import ConvGeometry
from ..layout import BATCH_LAST, CHANNELS_LAST
from . import cost_constants

DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16  # that the native backend takes


class Setting(NamedTuple):
    """What the time of a product depends on besides its sizes.

    Attributes:
        threads: of PyTorch on a CPU; 0 elsewhere.
        memory_format: of x or dy.
        precision: how fp32 products are rounded: "tf32" or "ieee" (torch.backends.cudnn.conv.fp32_precision).
    """

    threads: int
    memory_format: str
    precision: str = "ieee"

    @property
    def channels_last(self) -> bool:
        return self.memory_format == CHANNELS_LAST


class Terms(NamedTuple):
    """Counts (and as constants: nanoseconds of one) of a product on one thread."""

    call: float
    weights: float  # stored: put in a list; dense: of the filter bank, stored or not
    stored: float  # dense: stored weights scattered or gathered; on stored blocks 0
    values: float  # of x and y
    in_place: float  # of x and y, where the tensors are used as they stand
    by_8: float  # multiplications in tiles of 8 filters, of 4, 2 and 1; dense: of 3x3 kernels and larger
    by_4: float
    by_2: float
    by_1: float  # dense: of 1x1 kernels


ONE_VECTOR = 1.4  # time of a multiplication in channels_last where a block is one vector, over that of two: each loads


def _half(dtype: torch.dtype) -> bool:
    """Of 16 bits, computed in float32."""
    return dtype in (torch.float16, torch.bfloat16)


def _padded(channels: int) -> int:
    return -(-channels // 16) * 16


def stored_terms(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, channels_last: bool, dtype: torch.dtype
) -> Terms:
    """Counts of a product on stored blocks."""
    bk, bc = blocksize
    weights = nnzb * bk * bc
    pointwise = g.taps == 1 and g.stride == (1, 1) and g.padding == (0, 0)
    beside = bc if kind == "dgrad" else bk  # results of a block beside each other
    lanes = 8 if dtype == torch.float64 else 16
    if channels_last and not _half(dtype) and beside % lanes == 0 and (beside > lanes or g.taps == 1):
        values = g.n * (g.c * g.h * g.w + g.k * g.p * g.q)
        slower = 1.0 if beside > lanes else ONE_VECTOR
        return Terms(1.0, weights, 0.0, 0.0, values, slower * g.n * g.p * g.q * weights, 0.0, 0.0, 0.0)
    c, k = (_padded(g.c), _padded(g.k)) if channels_last else (g.c, g.k)  # vectors of channels are turned into pixels
    values = g.n * (c * g.h * g.w + k * g.p * g.q)
    gap = max(g.padding[1], (g.s - 1) * g.dilation[1] // g.stride[1])  # columns computed and dropped
    pixels = g.n * g.p * (g.q + gap)
    filters = bk if kind != "dgrad" or (bc < 4 <= bk) else bc
    tile = 8 if filters >= 8 else 4 if filters >= 4 else 2 if filters >= 2 else 1
    aligned = kind == "wgrad" or tile >= 4 or g.h * g.w % lanes == 0  # else the channels are copied (lists.h)
    in_place = pointwise and aligned and not (channels_last or _half(dtype))
    work = float(pixels * weights)
    return Terms(
        1.0, weights, 0.0, 0.0 if in_place else values, values if in_place else 0.0,
        *(work if tile == size else 0.0 for size in (8, 4, 2, 1)),
    )  # fmt: skip


def dense_terms(g: ConvGeometry, blocksize: tuple[int, int], nnzb: int) -> Terms:
    """Counts of the dense product.

    In groups PyTorch multiplies within each alone, its filters filled up to whole vectors, not its channels: 4, 8, 16
    and 24 of both were measured to take 3.3, 1.5, 1 and 1.1 times as long for a multiplication.
    """
    values = g.n * (g.c * g.h * g.w + g.k * g.p * g.q)
    of_group = _padded(g.k // g.groups) * (g.c // g.groups if g.groups > 1 else _padded(g.c))
    work = float(g.n * g.p * g.q * g.taps * g.groups * of_group)
    spatial, pointwise = (work, 0.0) if g.taps > 1 else (0.0, work)
    return Terms(1.0, g.weights, nnzb * blocksize[0] * blocksize[1], values, 0.0, spatial, 0.0, 0.0, pointwise)


def seconds(terms: Terms, constants: Terms, threads: int) -> float:
    """Seconds; everything but the call and a dense product's filter bank is shared out."""
    each = [count * ns for count, ns in zip(terms, constants, strict=True)]
    alone = each[0] + (each[1] + each[2] if terms.stored else 0.0)
    return 1e-9 * (alone + (sum(each) - alone) / threads)


MARGIN = 1.1  # the dense product runs where blocks are not estimated to be faster by this factor


def known(dtype: torch.dtype) -> bool:
    """Whether the native backend takes this dtype."""
    return dtype in DTYPES


def constants(kind: str, dtype: torch.dtype, channels_last: bool) -> tuple[Terms, Terms]:
    """Of a product: those on stored blocks and those of the dense one."""
    stored, dense = cost_constants.constants()[str(dtype).removeprefix("torch."), channels_last, kind]
    return Terms(*stored), Terms(*dense)


# Time of the native kernels in batch_last over contiguous: where the batch is one chunk of images, and beyond, where
# planes are filled from pieces of pixels. Of the 3x3 layers of ResNet-50 in five kinds of blocks, fp32, in the mean.
BATCH_LAST_SLOWER = (1.03, 1.22)
ONE_CHUNK = 16

COPIED = 3.0  # nanoseconds of a value into or out of batch_last by PyTorch's copy on one thread: 0.5 to 11


def copied(values: int, threads: int) -> float:
    """Seconds of so many values through such a copy."""
    return 1e-9 * COPIED * values / threads


def copying(g: ConvGeometry, threads: int) -> float:
    """Of x and y: what a kernel costs that does not read batch_last."""
    return copied(g.n * (g.c * g.h * g.w + g.k * g.p * g.q), threads)


@lru_cache(maxsize=4096)
def on_cpu(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, setting: Setting
) -> tuple[float, float]:
    """Seconds of a product on stored blocks, with the margin, and of the dense one in contiguous or channels_last."""
    stored, dense = constants(kind, dtype, setting.channels_last)
    slower = 1.0
    if setting.memory_format == BATCH_LAST:
        slower = BATCH_LAST_SLOWER[g.n > ONE_CHUNK]
    counts = stored_terms(kind, g, blocksize, nnzb, setting.channels_last, dtype)
    return (
        slower * MARGIN * seconds(counts, stored, setting.threads),
        seconds(dense_terms(g, blocksize, nnzb), dense, setting.threads),
    )
