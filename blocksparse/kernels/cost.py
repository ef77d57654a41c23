"""Predicted time of a product on stored blocks and of the dense one: what chooses between them.

On a CPU both are sums of a few terms, from sizes alone, so that the same sizes always run the same way:

    stored   call + (weights listed + values copied + multiplications at the speed of their tile) / threads
    dense    call + weights scattered into a filter bank, or gathered + (values + multiplications) / threads

A multiplication on stored blocks costs more in small blocks: a vector of pixels that is loaded is used once for each
filter of a block, 8 at most. The constants are nanoseconds on one thread, measured and fitted by bench/calibrate.py on
an AMD EPYC with AVX-512 (PyTorch 2.13). On a GPU density alone decides; no GPU has timed that yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..geometry import ConvGeometry

GPU_DENSITY = 0.5  # from which on a GPU runs the dense product
MARGIN = 1.1  # the dense product runs where blocks are not estimated to be faster by this much
KINDS = ("fprop", "dgrad", "wgrad")


class Setting(NamedTuple):
    """What the time of a product depends on besides its sizes."""

    threads: int
    channels_last: bool


class Terms(NamedTuple):
    """Counts (and as constants: nanoseconds of one) of a product on one thread."""

    call: float
    weights: float  # stored: put in a list; dense: of the filter bank, stored or not
    stored: float  # dense: stored weights scattered or gathered; on stored blocks 0
    values: float  # of x and y
    in_place: float  # of x and y, where a contiguous tensor is used as it stands
    by_8: float  # multiplications in tiles of 8 filters, of 4, 2 and 1; dense: of 3x3 kernels and larger
    by_4: float
    by_2: float
    by_1: float  # dense: of 1x1 kernels


def _padded(channels: int) -> int:
    return -(-channels // 16) * 16


def stored_terms(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, channels_last: bool, half: bool
) -> Terms:
    """Counts of a product on stored blocks; half: of float16 or bfloat16, computed in float32."""
    bk, bc = blocksize
    weights = nnzb * bk * bc
    c, k = (_padded(g.c), _padded(g.k)) if channels_last else (g.c, g.k)  # vectors of channels are turned into pixels
    values = g.n * (c * g.h * g.w + k * g.p * g.q)
    in_place = not (channels_last or half) and g.taps == 1 and g.stride == (1, 1) and g.padding == (0, 0)
    gap = max(g.padding[1], (g.s - 1) * g.dilation[1] // g.stride[1])  # columns computed and dropped
    pixels = g.n * g.p * (g.q + gap)
    filters = bk if kind != "dgrad" or (bc < 4 <= bk) else bc
    tile = 8 if filters >= 8 else 4 if filters >= 4 else 2 if filters >= 2 else 1
    work = float(pixels * weights)
    return Terms(
        1.0, weights, 0.0, 0.0 if in_place else values, values if in_place else 0.0,
        *(work if tile == size else 0.0 for size in (8, 4, 2, 1)),
    )  # fmt: skip


def dense_terms(g: ConvGeometry, blocksize: tuple[int, int], nnzb: int) -> Terms:
    """Counts of the dense product."""
    values = g.n * (g.c * g.h * g.w + g.k * g.p * g.q)
    bank = g.k * g.c * g.taps
    work = float(g.n * g.p * g.q * g.taps * _padded(g.k) * _padded(g.c))
    spatial, pointwise = (work, 0.0) if g.taps > 1 else (0.0, work)
    return Terms(1.0, bank, nnzb * blocksize[0] * blocksize[1], values, 0.0, spatial, 0.0, 0.0, pointwise)


def _times(terms: Terms, constants: Terms, threads: int) -> float:
    """Seconds; everything but the call and a dense product's filter bank is shared out."""
    each = [count * ns for count, ns in zip(terms, constants, strict=True)]
    alone = each[0] + (each[1] + each[2] if terms.stored else 0.0)
    return 1e-9 * (alone + (sum(each) - alone) / threads)


def known(dtype: torch.dtype) -> bool:
    """Whether the native backend takes this dtype."""
    return dtype in CPU


@lru_cache(maxsize=4096)
def on_cpu(
    kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, setting: Setting
) -> tuple[float, float]:
    """Seconds of a product on stored blocks, with the margin, and of the dense one."""
    stored, dense = CPU[dtype][kind]
    half = dtype in (torch.float16, torch.bfloat16)
    return (
        MARGIN * _times(stored_terms(kind, g, blocksize, nnzb, setting.channels_last, half), stored, setting.threads),
        _times(dense_terms(g, blocksize, nnzb), dense, setting.threads),
    )


# (stored, dense) of each dtype and kind, as bench/calibrate.py prints them
CPU: dict[torch.dtype, dict[str, tuple[Terms, Terms]]] = {
    torch.float32: {
        "fprop": (
            Terms(6.89e04, 0.832, 0, 0.571, 0.298, 0.0205, 0.0228, 0.0281, 0.05),
            Terms(1.75e05, 1.34, 2.32, 0.484, 0, 0.018, 0, 0, 0.0209),
        ),
        "dgrad": (
            Terms(4.94e04, 1.24, 0, 0.663, 0.32, 0.0212, 0.0247, 0.0276, 0.0548),
            Terms(1.79e05, 1.06, 2.27, 0.594, 0, 0.0191, 0, 0, 0.0207),
        ),
        "wgrad": (
            Terms(4.73e04, 1.91, 0, 0.485, 0.15, 0.0227, 0.0256, 0.0302, 0.0531),
            Terms(1.52e05, 1.78, 1.77, 0.363, 0, 0.021, 0, 0, 0.0227),
        ),
    },
    torch.float64: {
        "fprop": (
            Terms(6.76e04, 3.86, 0, 0.768, 0.463, 0.0402, 0.0407, 0.0384, 0.0899),
            Terms(1.4e05, 3.19, 13.2, 0.938, 0, 0.064, 0, 0, 0.0735),
        ),
        "dgrad": (
            Terms(4.14e04, 3.69, 0, 0.693, 0.464, 0.0416, 0.0522, 0.0494, 0.107),
            Terms(1.18e05, 4.03, 13.7, 1.3, 0, 0.0584, 0, 0, 0.0742),
        ),
        "wgrad": (
            Terms(3.9e04, 3.23, 0, 0.589, 0.281, 0.0461, 0.0484, 0.0514, 0.102),
            Terms(1.33e05, 0.815, 14.1, 0.918, 0, 0.0543, 0, 0, 0.0628),
        ),
    },
    torch.bfloat16: {
        "fprop": (
            Terms(8.08e04, 0.627, 0, 0.57, 0, 0.021, 0.0215, 0.0252, 0.055),
            Terms(1.31e05, 0.881, 8.26, 0.911, 0, 0.0166, 0, 0, 0.0178),
        ),
        "dgrad": (
            Terms(4.34e04, 1.21, 0, 0.972, 0, 0.0192, 0.0212, 0.0246, 0.0567),
            Terms(1.44e05, 0.695, 7.28, 0.92, 0, 0.0163, 0, 0, 0.0159),
        ),
        "wgrad": (
            Terms(4.61e04, 2.3, 0, 0.561, 0, 0.0205, 0.0213, 0.0236, 0.0533),
            Terms(1.17e05, 0.834, 7.6, 0.769, 0, 0.0198, 0, 0, 0.0184),
        ),
    },
    torch.float16: {
        "fprop": (
            Terms(6.16e04, 1.73, 0, 1.09, 0, 0.0204, 0.0238, 0.0219, 0.0562),
            Terms(1.15e05, 0.521, 10.1, 0.891, 0, 0.0175, 0, 0, 0.0209),
        ),
        "dgrad": (
            Terms(3.9e04, 2.08, 0, 1.43, 0, 0.0197, 0.0273, 0.0269, 0.0666),
            Terms(1.23e05, 0.397, 9.28, 0.859, 0, 0.0169, 0, 0, 0.0196),
        ),
        "wgrad": (
            Terms(4.17e04, 2.96, 0, 0.999, 0, 0.0211, 0.0251, 0.0241, 0.0625),
            Terms(1.03e05, 0.652, 9.45, 0.613, 0, 0.0205, 0, 0, 0.0219),
        ),
    },
}
