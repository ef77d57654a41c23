"""Where the dense product is faster than stored blocks: few pixels, few channels, few zeros.

On a CPU an estimate of both times decides, from sizes alone, so that the same mask always runs the same way:

    dense    start + pixels * (values in and out + multiplications) / threads + weights, to scatter
    stored   calls + pixels * (values gathered, copied, added to + multiplications) / threads + weights, to arrange

The constants are nanoseconds on one core of an AMD EPYC, PyTorch 2.13: fitted to 435 layers of 16 to 2048 channels, 4x4
to 56x56 pixels, 2% to 100% density, in every structure. Against the faster of the two ways on each, the choice takes 8%
longer in the mean, and stored blocks alone 68%. On a GPU density alone decides; no GPU has timed that yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..geometry import ConvGeometry

GPU_DENSITY = 0.5  # from which on a GPU runs the dense product

START = 180e3
# dense: a value in or out, a multiplication, a weight of the filter bank, a stored weight
DENSE_VALUE, DENSE_MULTIPLY, DENSE_WEIGHT, DENSE_STORED = 0.3, 0.026, 0.6, 1.9
# grouped convolutions over gathered channels: each, a value gathered, a value out, a multiplication, a weight
CONV_CALL, CONV_GATHER, CONV_VALUE, CONV_MULTIPLY, CONV_WEIGHT = 250e3, 0.9, 0.57, 0.03, 2.2
# matrix products on slices: each, a value read or added to, a multiplication, a value copied, a value gathered
SHIFT_CALL, SHIFT_VALUE, SHIFT_MULTIPLY, SHIFT_COPY, SHIFT_GATHER = 23e3, 0.28, 0.023, 1.0, 0.23


class Work(NamedTuple):
    """What the products of a mask come to. Channels count once for every product that reads, or adds to, them."""

    conv: bool  # grouped convolutions; else matrix products, one for each tap of a group
    calls: int
    gathered: int  # channels
    moved: int  # channels read and filters added to
    weights: int  # multiplied with each output pixel, zeros between them included


@lru_cache(maxsize=4096)
def dense_is_faster(geometry: ConvGeometry, work: Work, stored: int, threads: int) -> bool:
    """Whether a CPU with this many threads is estimated to run the dense product in less time.

    Args:
        work: of the stored blocks.
        stored: weights in them.
    """
    g = geometry
    inputs, outputs = g.n * g.h * g.w, g.n * g.p * g.q
    values, weights = inputs * g.c + outputs * g.k, g.k * g.c * g.taps
    dense = START + (DENSE_VALUE * values + DENSE_MULTIPLY * outputs * weights) / threads
    dense += DENSE_WEIGHT * weights + DENSE_STORED * stored
    if work.conv:
        moved = CONV_GATHER * inputs * work.gathered + CONV_VALUE * outputs * g.k
        fixed = CONV_CALL * work.calls + CONV_WEIGHT * work.weights
        return dense < fixed + (moved + CONV_MULTIPLY * outputs * work.weights) / threads
    moved = SHIFT_VALUE * outputs * work.moved + SHIFT_COPY * values + SHIFT_GATHER * inputs * work.gathered
    fixed = START + SHIFT_CALL * work.calls
    return dense < fixed + (moved + SHIFT_MULTIPLY * outputs * work.weights) / threads
