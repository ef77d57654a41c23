"""What the Triton kernels share: where pixels and channels lie, which taps lie outside, and how a tile is addressed.

Every operand of a product is a 2-d tile of pointers whose rows are pixels (or filters) and whose columns are chunks: a
chunk is `granule` channels of one tap, contiguous in channels_last, and moves in 16-byte copies. What a chunk adds to
the address of its pixel, and the bit of its tap, are made once for a K-tile; a copy costs one test and one addition.

Three things keep the machine code short, and bench/count.py counts whether they still do:

- Columns are made from chunks by reshapes of pure arithmetic, with hints (runs, each): Triton then sees 16 bytes.
- A row is lo + LO*hi (rows_of), with LO the rows that all threads fetch at once: hi is a constant for the compiler.
- What belongs to a pixel is computed by one thread and exchanged through shared memory (exchange): eight threads share
  a row, and each would otherwise divide by the sizes of the image for itself.

Offsets are 32 bits wide, or 64 where a tensor has 2**31 elements or more; a chunk that is masked may overflow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)
NEVER = tl.constexpr(-(2**31))  # a bit that no tap has


_SIZES = (
    "pixels", "images", "height", "width", "p_size", "q_size", "k_blocks", "c_blocks", "stride_h", "stride_w",
    "pad_h", "pad_w", "dilation_h", "dilation_w", "tiles", "steps", "nnzb", "splits", "width_of_group", "groups",
    "stacks", "indices_at", "indptr_at", "blocks_at", "ranks_at",
)  # fmt: skip


def kernel(fn: Callable[..., None]) -> Any:
    """triton.jit, with one variant for all sizes: a 1 or a multiple of 16 is not worth a compilation of its own."""
    return triton.jit(fn, do_not_specialize=[n for n in inspect.signature(fn).parameters if n in _SIZES])


@triton.jit
def pixel_of(m, height, width):
    """(image, row, column) of pixel number m."""
    return m // width // height, m // width % height, m % width


@triton.jit
def offset_of(n, h, w, height, width, channels, LAST: tl.constexpr):
    """Elements from the start of a dense [N, C, H, W] tensor to channel 0 of pixel (n, h, w)."""
    n = n.to(tl.int64)
    return ((n * height + h) * width + w) * channels if LAST else (n * channels * height + h) * width + w


@triton.jit
def step_of(dh, dw, c, height, width, channels, LAST: tl.constexpr):
    """Elements from channel 0 of a pixel to channel c of the pixel (dh, dw) further."""
    dh, c = dh.to(tl.int64), c.to(tl.int64)
    return (dh * width + dw) * channels + c if LAST else (c * height + dh) * width + dw


@triton.jit
def channel_of(i, height, width, LAST: tl.constexpr):
    """Elements from channel 0 to channel i of one pixel."""
    return i if LAST else i.to(tl.int64) * height * width


@triton.jit
def each(v, SIZE: tl.constexpr, TIMES: tl.constexpr):
    """[SIZE] -> [SIZE*TIMES], every element TIMES times over."""
    return tl.max_constancy(tl.reshape(tl.broadcast_to(v[:, None], [SIZE, TIMES]), [SIZE * TIMES]), 8)


@triton.jit
def runs(v, step, SIZE: tl.constexpr, TIMES: tl.constexpr, LAST: tl.constexpr):
    """[SIZE] -> [SIZE*TIMES], every element followed by the TIMES - 1 that lie `step` further each."""
    if LAST:
        found = tl.reshape(v[:, None] + tl.arange(0, TIMES)[None, :], [SIZE * TIMES])
        return tl.max_contiguous(tl.multiple_of(found, 8), 8)
    return tl.reshape(v[:, None] + (tl.arange(0, TIMES) * step)[None, :], [SIZE * TIMES])


@triton.jit
def sums_of(rows, columns, LAST: tl.constexpr):
    """[ROWS] and [COLUMNS] -> [ROWS, COLUMNS] of offsets, with the hint that an exchange loses."""
    found = rows[:, None] + columns[None, :]
    return tl.max_contiguous(tl.multiple_of(found, [1, 8]), [1, 8]) if LAST else found


@triton.jit
def rows_of(ROWS: tl.constexpr, LO: tl.constexpr):
    """0, 1, ... ROWS - 1 as lo + LO*hi. Of LO rows, one pass of all threads over a tile, hi is then a constant."""
    lo = tl.reshape(tl.broadcast_to(tl.arange(0, LO)[None, :], [ROWS // LO, LO]), [ROWS])
    hi = tl.reshape(tl.broadcast_to(tl.arange(0, ROWS // LO)[:, None], [ROWS // LO, LO]), [ROWS])
    return lo.to(tl.int64), hi


@triton.jit
def outside(first, size, dilation, BIT: tl.constexpr, TAPS: tl.constexpr):
    """Bits BIT, BIT + 1, ... of the taps first, first + dilation, ... along an axis that lie outside 0 .. size."""
    bits = first * 0
    for tap in tl.static_range(TAPS):
        # What lies before 0 is, without its sign, far past the end.
        bits |= ((first + tap * dilation).to(tl.uint32) >= size.to(tl.uint32)).to(tl.int32) << (BIT + tap)
    return bits


@triton.jit
def exchange(v, SIZE: tl.constexpr):
    """v itself. One thread computes an element, and gives it to the others that need it."""
    return tl.gather(v, tl.arange(0, SIZE), 0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:  # the interpreter multiplies the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def is_last(counter, members):
    """Whether `members` programs have come here, this one last; all that they have stored can then be read.

    The last one puts the counter back to 0.
    """
    tl.debug_barrier()  # all threads of the program have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == members - 1
    if last:
        tl.store(counter, 0)
    return last
