"""Predicted time of a product on stored blocks and of the dense one: what chooses between them.

On a CPU both are sums of a few terms, from sizes alone, so that the same sizes always run the same way:

    stored   call + (weights listed + values copied + multiplications at the speed of their tile) / threads
    dense    call + weights scattered into a filter bank, or gathered + (values + multiplications) / threads

A multiplication on stored blocks costs more in small blocks: a vector of pixels that is loaded is used once for each
filter of a block, 8 at most. The constants are nanoseconds on one thread, measured and fitted by bench/calibrate.py on
an AMD EPYC with AVX-512 (PyTorch 2.13). gpu_cost.py is about GPUs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..geometry import ConvGeometry
from ..layout import BATCH_LAST, CHANNELS_LAST


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


def margin(g: ConvGeometry, channels_last: bool) -> float:
    """The dense product runs where blocks are not estimated to be faster by this factor.

    It is larger where the estimate is least certain: a dense 1x1 kernel reads x in channels_last as it lies, and the
    blocks transpose it.
    """
    return 1.25 if channels_last and g.taps == 1 else 1.1


def known(dtype: torch.dtype) -> bool:
    """Whether the native backend takes this dtype."""
    return (dtype, False) in CPU


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
    stored, dense = CPU[dtype, setting.channels_last][kind]
    slower = 1.0
    if setting.memory_format == BATCH_LAST:
        slower = BATCH_LAST_SLOWER[g.n > ONE_CHUNK]
    half = dtype in (torch.float16, torch.bfloat16)
    counts = stored_terms(kind, g, blocksize, nnzb, setting.channels_last, half)
    return (
        slower * margin(g, setting.channels_last) * seconds(counts, stored, setting.threads),
        seconds(dense_terms(g, blocksize, nnzb), dense, setting.threads),
    )


# (stored, dense) of each dtype, memory format (channels_last?) and kind, as bench/calibrate.py prints them
CPU: dict[tuple[torch.dtype, bool], dict[str, tuple[Terms, Terms]]] = {
    (torch.float32, False): {
        "fprop": (
            Terms(6.64e04, 0.677, 0, 0.545, 0.303, 0.0202, 0.0231, 0.0247, 0.0516),
            Terms(1.76e05, 1.22, 2.16, 0.727, 0, 0.0182, 0, 0, 0.0215),
        ),
        "dgrad": (
            Terms(5.23e04, 1.12, 0, 0.674, 0.313, 0.0214, 0.0254, 0.025, 0.0583),
            Terms(1.81e05, 0.927, 2.22, 0.965, 0, 0.0195, 0, 0, 0.0208),
        ),
        "wgrad": (
            Terms(4.92e04, 1.8, 0, 0.436, 0.147, 0.0226, 0.0264, 0.027, 0.055),
            Terms(1.52e05, 1.46, 1.68, 0.679, 0, 0.0215, 0, 0, 0.0214),
        ),
    },
    (torch.float32, True): {
        "fprop": (
            Terms(7.17e04, 1.17, 0, 0.579, 0, 0.021, 0.0224, 0.0367, 0.0484),
            Terms(1.66e05, 1.48, 2.65, 0.444, 0, 0.0174, 0, 0, 0.0184),
        ),
        "dgrad": (
            Terms(4.55e04, 1.43, 0, 0.664, 0, 0.0208, 0.0238, 0.0313, 0.0508),
            Terms(1.67e05, 1.22, 2.45, 0.532, 0, 0.0182, 0, 0, 0.0179),
        ),
        "wgrad": (
            Terms(4.49e04, 2.02, 0, 0.511, 0, 0.0231, 0.0251, 0.0383, 0.0514),
            Terms(1.39e05, 2.26, 2.02, 0.321, 0, 0.0198, 0, 0, 0.0208),
        ),
    },
    (torch.float64, False): {
        "fprop": (
            Terms(6.1e04, 2.64, 0, 0.868, 0.349, 0.0363, 0.0385, 0.0394, 0.0929),
            Terms(1.16e05, 3.54, 7.02, 0.983, 0, 0.0542, 0, 0, 0.0421),
        ),
        "dgrad": (
            Terms(3.16e04, 3.04, 0, 1.15, 0.35, 0.036, 0.0429, 0.0429, 0.111),
            Terms(1.12e05, 4.26, 7.99, 1.12, 0, 0.0467, 0, 0, 0.0454),
        ),
        "wgrad": (
            Terms(3.09e04, 2.79, 0, 0.79, 0.168, 0.0385, 0.0417, 0.0453, 0.0993),
            Terms(1.28e05, 0.916, 7.35, 0.716, 0, 0.0475, 0, 0, 0.0424),
        ),
    },
    (torch.float64, True): {
        "fprop": (
            Terms(5.99e04, 2.4, 0, 0.724, 0, 0.0405, 0.0418, 0.0542, 0.0925),
            Terms(1.12e05, 2.86, 8.55, 1.79, 0, 0.0679, 0, 0, 0.071),
        ),
        "dgrad": (
            Terms(3.51e04, 2.75, 0, 0.754, 0, 0.0415, 0.0511, 0.0529, 0.104),
            Terms(9.45e04, 3.83, 8.66, 2.45, 0, 0.0586, 0, 0, 0.0627),
        ),
        "wgrad": (
            Terms(3.43e04, 3.25, 0, 0.654, 0, 0.0441, 0.0477, 0.0644, 0.0998),
            Terms(9.28e04, 1.42, 7.3, 1.88, 0, 0.0554, 0, 0, 0.0581),
        ),
    },
    (torch.bfloat16, False): {
        "fprop": (
            Terms(7.47e04, 1.58, 0, 0.512, 0, 0.0175, 0.0194, 0.0224, 0.0487),
            Terms(1.34e05, 1.41, 4.21, 0.904, 0, 0.0149, 0, 0, 0.0192),
        ),
        "dgrad": (
            Terms(4.47e04, 2.01, 0, 0.996, 0, 0.0155, 0.0184, 0.0225, 0.0505),
            Terms(1.38e05, 1.3, 2.85, 1.05, 0, 0.0173, 0, 0, 0.0179),
        ),
        "wgrad": (
            Terms(4.38e04, 2.88, 0, 0.477, 0, 0.0183, 0.0216, 0.022, 0.0498),
            Terms(1.19e05, 1.67, 2.75, 0.813, 0, 0.018, 0, 0, 0.0184),
        ),
    },
    (torch.bfloat16, True): {
        "fprop": (
            Terms(6.5e04, 1.53, 0, 1.03, 0, 0.0209, 0.0218, 0.0295, 0.0499),
            Terms(1.26e05, 1.24, 5.49, 0.715, 0, 0.0162, 0, 0, 0.0208),
        ),
        "dgrad": (
            Terms(4.61e04, 1.67, 0, 0.966, 0, 0.0207, 0.0254, 0.0288, 0.0562),
            Terms(1.39e05, 0.874, 5.03, 0.659, 0, 0.0166, 0, 0, 0.0203),
        ),
        "wgrad": (
            Terms(4.01e04, 3.29, 0, 0.786, 0, 0.0211, 0.0234, 0.0324, 0.0494),
            Terms(1.09e05, 1.3, 5.05, 0.494, 0, 0.0187, 0, 0, 0.0226),
        ),
    },
    (torch.float16, False): {
        "fprop": (
            Terms(8.16e04, 2.65, 0, 0.933, 0, 0.0181, 0.0207, 0.0193, 0.0504),
            Terms(1.46e05, 1.18, 6.01, 1.07, 0, 0.0155, 0, 0, 0.0201),
        ),
        "dgrad": (
            Terms(5.32e04, 3.52, 0, 1.6, 0, 0.016, 0.02, 0.022, 0.0507),
            Terms(1.45e05, 0.849, 5.1, 1.12, 0, 0.0184, 0, 0, 0.0196),
        ),
        "wgrad": (
            Terms(5.49e04, 3.73, 0, 0.941, 0, 0.0198, 0.0238, 0.0217, 0.0542),
            Terms(1.18e05, 1.48, 4.83, 0.976, 0, 0.0187, 0, 0, 0.0178),
        ),
    },
    (torch.float16, True): {
        "fprop": (
            Terms(7.26e04, 2.14, 0, 1.47, 0, 0.0223, 0.0245, 0.0303, 0.0551),
            Terms(1.35e05, 1.1, 4.87, 0.796, 0, 0.0173, 0, 0, 0.0211),
        ),
        "dgrad": (
            Terms(5.15e04, 2.76, 0, 1.42, 0, 0.0213, 0.0296, 0.0294, 0.0655),
            Terms(1.39e05, 0.862, 4.61, 0.703, 0, 0.017, 0, 0, 0.0214),
        ),
        "wgrad": (
            Terms(4.29e04, 3.79, 0, 1.28, 0, 0.0214, 0.0262, 0.0328, 0.0562),
            Terms(1.13e05, 1.13, 4.93, 0.462, 0, 0.0197, 0, 0, 0.0243),
        ),
    },
}
