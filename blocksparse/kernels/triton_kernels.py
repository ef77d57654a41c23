"""Triton backend: fprop, dgrad and wgrad of a BSR filter bank as gathered GEMMs on tensor cores, no im2col buffer.

Each program owns one output tile and walks the stored blocks that feed it:

| kind  | M (rows of the tile)          | N      | K, walked in a loop            | tables                          |
|-------|-------------------------------|--------|--------------------------------|---------------------------------|
| fprop | BLOCK_M of the N*P*Q pixels   | bk     | stored (tap, c) of a block-row | indptr, indices                 |
| dgrad | BLOCK_M pixels of x, one      | bc     | stored (tap, k) of a c_block   | t_indptr, t_indices, t_perm     |
|       | residue class of the stride   |        |                                |                                 |
| wgrad | BLOCK_M stored (tap, c) of a  | bk     | a split of the N*P*Q pixels    | indptr, indices                 |
|       | block-row                     |        |                                |                                 |

Chunks. The stored list is walked in chunks of `granule` channels: the largest power of two that divides the block's
side, at most one tile. BLOCK_K / granule chunks, each with a tap and a channel of its own, make one K-tile: a 3-d tile
of pointers [pixels, chunks, granule] reshaped for tl.dot. In channels_last a chunk of a pixel is contiguous, so it
moves in 16-byte copies from 8 channels of fp16 on, and a block of any multiple of 8 wastes nothing along K.

Borders. A tap displaces every pixel of the tile alike: element (n, h + dh, w + dw, c) lies at offset(n, h, w) +
step(dh, dw, c). Both are 64-bit; only the bounds test is per (pixel, chunk). Pixels past the end sit at h = FAR, out of
every bound.

Strided dgrad. The pixels of x with (h, w) = (a, b) modulo the stride form a sub-problem of their own, reached by the
taps with (a + padding - r*dilation) % stride == 0 only. All of them run in one launch. The entries of those taps are
several ranges of the transposed list, numbered 0, 1, ... through a shift that never decreases from tap to tap, so the
lookup is a maximum over taps.

Splits of wgrad go through an fp32 workspace that a second kernel adds up in order: no atomics, the same bits each run.
Block-row b owns the tiles from slot(b) = indptr[b]*chunks/CH + b on: always enough of them, and their total depends on
nnzb alone, so no grid depends on the mask.

Tables are offsets into the one packed index, whose first is indptr.

Budget, per K-tile of 2-byte values: 2*BLOCK_K*(BLOCK_M + N) bytes for 2*BLOCK_M*N*BLOCK_K FLOP. So N = bk (fprop,
wgrad) or bc (dgrad) sets how often activations come from L2 again, and narrow blocks are bound by it, dgrad of bc = 8
first: adjacent channel blocks rarely share a tap and block-row, so they do not share dy. HBM sees each activation about
once, because programs of one pixel tile run side by side. wgrad adds 8 bytes per split and value.

Row order. fprop stores BSR row i to channel row_order[i]. dgrad and wgrad start with a copy of dy in BSR row order: one
pass over dy, where gathering single channels in the kernel would turn every load of dy into 2-byte loads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)
_NEVER = tl.constexpr(-(2**31))  # a bit that no tap has
_FAR = tl.constexpr(-(2**30))  # tiles.refusal keeps every coordinate below 2**30


# ---------------------------------------------------------------------- shared by the kernels


@triton.jit
def _pixel(m, height, width):
    """(image, row, column) of pixel number m."""
    return m // width // height, m // width % height, m % width


@triton.jit
def _offset(n, h, w, height, width, channels, LAST: tl.constexpr):
    """Elements from the start of a dense [N, C, H, W] tensor to channel 0 of pixel (n, h, w)."""
    n = n.to(tl.int64)
    return ((n * height + h) * width + w) * channels if LAST else (n * channels * height + h) * width + w


@triton.jit
def _step(dh, dw, c, height, width, channels, LAST: tl.constexpr):
    """Elements from channel 0 of a pixel to channel c of the pixel (dh, dw) further."""
    dh, c = dh.to(tl.int64), c.to(tl.int64)
    return (dh * width + dw) * channels + c if LAST else (c * height + dh) * width + dw


@triton.jit
def _channel(i, height, width, LAST: tl.constexpr):
    """Elements from channel 0 to channel i of one pixel."""
    return i if LAST else i.to(tl.int64) * height * width


@triton.jit
def _gather(
    base, h, w, dh, dw, step, live, height, width,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, GRANULE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """[ROWS, CHUNKS*GRANULE]: `GRANULE` channels of each pixel displaced by each chunk's (dh, dw); zero outside."""
    hh, ww = h[:, None] + dh[None, :], w[:, None] + dw[None, :]
    mask = live[None, :] & (hh >= 0) & (hh < height) & (ww >= 0) & (ww < width)
    inner = _channel(tl.arange(0, GRANULE), height, width, LAST)
    pointers = (base[:, None] + step[None, :])[:, :, None] + inner[None, None, :]
    return tl.reshape(tl.load(pointers, mask=mask[:, :, None], other=0.0), [ROWS, CHUNKS * GRANULE])


@triton.jit
def _each(v, SIZE: tl.constexpr, TIMES: tl.constexpr):
    """[SIZE] -> [SIZE*TIMES], every element TIMES times over."""
    return tl.max_constancy(tl.reshape(tl.broadcast_to(v[:, None], [SIZE, TIMES]), [SIZE * TIMES]), 8)


@triton.jit
def _run(v, step, SIZE: tl.constexpr, TIMES: tl.constexpr, LAST: tl.constexpr):
    """[SIZE] -> [SIZE*TIMES], every element followed by the TIMES - 1 that lie `step` further each."""
    if LAST:
        runs = tl.reshape(v[:, None] + tl.arange(0, TIMES)[None, :], [SIZE * TIMES])
        return tl.max_contiguous(tl.multiple_of(runs, 8), 8)
    return tl.reshape(v[:, None] + (tl.arange(0, TIMES) * step)[None, :], [SIZE * TIMES])


@triton.jit
def _rows(ROWS: tl.constexpr, LO: tl.constexpr):
    """0, 1, ... ROWS - 1 as lo + LO*hi. Of LO rows, one pass of all threads over a tile, hi is then a constant."""
    lo = tl.reshape(tl.broadcast_to(tl.arange(0, LO)[None, :], [ROWS // LO, LO]), [ROWS])
    hi = tl.reshape(tl.broadcast_to(tl.arange(0, ROWS // LO)[:, None], [ROWS // LO, LO]), [ROWS])
    return lo.to(tl.int64), hi


@triton.jit
def _outside(first, size, dilation, BIT: tl.constexpr, TAPS: tl.constexpr):
    """Bits BIT, BIT + 1, ... of the taps first, first + dilation, ... along an axis that lie outside 0 .. size."""
    bits = first * 0
    for tap in tl.static_range(TAPS):
        # What lies before 0 is, without its sign, far past the end.
        bits |= ((first + tap * dilation).to(tl.uint32) >= size.to(tl.uint32)).to(tl.int32) << (BIT + tap)
    return bits


@triton.jit
def _exchange(v, SIZE: tl.constexpr):
    """v itself. One thread computes an element, and gives it to the others that need it."""
    return tl.gather(v, tl.arange(0, SIZE), 0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:  # the interpreter multiplies the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# ---------------------------------------------------------------------- kernels


_SIZES = (
    "pixels", "images", "height", "width", "p_size", "q_size", "k_blocks", "c_blocks", "stride_h", "stride_w",
    "pad_h", "pad_w", "dilation_h", "dilation_w", "tiles", "steps", "nnzb", "splits", "width_of_group", "groups",
    "stacks", "indices_at", "indptr_at", "blocks_at", "ranks_at",
)  # fmt: skip


def _kernel(fn: Callable[..., None]) -> Any:
    """triton.jit, with one variant for all sizes: a 1 or a multiple of 16 is not worth a compilation of its own."""
    return triton.jit(fn, do_not_specialize=[n for n in inspect.signature(fn).parameters if n in _SIZES])


@_kernel
def fprop_kernel(
    x, values, index, bias, row_order, y, indices_at,
    pixels, height, width, p_size, q_size, k_blocks,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    CHANNELS: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GRANULE: tl.constexpr, LO: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = BLOCK_K // GRANULE
    PARTS: tl.constexpr = BC // GRANULE  # chunks of one stored block
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    # Block-rows run fastest: they share the pixel tile, which so stays in L2.
    row, tile = tl.program_id(0) % k_blocks, tl.program_id(0) // k_blocks
    first, last = tl.load(index + row), tl.load(index + row + 1)
    count = (last - first) * PARTS

    i = tl.arange(0, BLOCK_M)
    m = tile * BLOCK_M + i
    n, p, q = _pixel(m, p_size, q_size)
    h, w = p * stride_h - pad_h, q * stride_w - pad_w
    out = tl.where(m < pixels, _NEVER, -1) | _outside(w, width, dilation_w, 0, S)
    out = _exchange(out | _outside(h, height, dilation_h, S, R), BLOCK_M)
    if SAME:  # pixel m of y is pixel m of x
        lo, hi = _rows(BLOCK_M, LO)
        at = x + ((tile * BLOCK_M).to(tl.int64) - (pad_h * width + pad_w)) * CHANNELS
    else:
        lo = _exchange(_offset(n, h, w, height, width, CHANNELS, X_LAST).to(OFFSET), BLOCK_M)
        at = x

    u = tl.arange(0, CHUNKS)
    j = tl.arange(0, BLOCK_N)
    rows = (values + first.to(tl.int64) * (BK * BC)) + j * BC
    col = tl.load(index + indices_at + first + tl.minimum(u, count - 1) // PARTS)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, count, CHUNKS):
        tap = col // (CHANNELS // BC)
        c = (col - tap * (CHANNELS // BC)) * BC + u % PARTS * GRANULE
        dh, dw = tap // S * dilation_h, tap % S * dilation_w
        step = _step(dh, dw, c, height, width, CHANNELS, X_LAST).to(OFFSET)
        need = tl.where(u < count, (1 << tap % S) | (1 << (tap // S + S)), _NEVER)
        inside = (out[:, None] & _each(need, CHUNKS, GRANULE)[None, :]) == 0
        steps = _run(step, (height * width).to(OFFSET), CHUNKS, GRANULE, X_LAST)
        if SAME:
            pointers = ((at + steps)[None, :] + (lo * CHANNELS)[:, None]) + (hi * (LO * CHANNELS))[:, None]
        else:
            pointers = at + (lo[:, None] + steps[None, :])
        a = tl.load(pointers, mask=inside, other=0.0)
        v = tl.minimum(u, count - 1)
        block = _run(v // PARTS * (BK * BC) + v % PARTS * GRANULE, 1, CHUNKS, GRANULE, True)
        if BLOCK_N == BK:
            b = tl.load(rows[:, None] + block[None, :])
        else:
            b = tl.load(rows[:, None] + block[None, :], mask=(j < BK)[:, None], other=0.0)
        acc = _dot(a, tl.trans(b), acc, PRECISION)
        u += CHUNKS
        col = tl.load(index + indices_at + first + tl.minimum(u, count - 1) // PARTS)

    k = row * BK + j
    if row_order is not None:
        k = tl.load(row_order + k, mask=j < BK, other=0)
    if bias is not None:
        acc += tl.load(bias + k, mask=j < BK, other=0.0).to(tl.float32)[None, :]
    if Y_LAST:
        to = y + m.to(tl.int64) * (k_blocks * BK)
    else:
        to = y + _offset(n, p, q, p_size, q_size, k_blocks * BK, Y_LAST)
    mask = (m < pixels)[:, None] & (j < BK)[None, :]
    tl.store(to[:, None] + _channel(k, p_size, q_size, Y_LAST)[None, :], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _dgrad_sum(
    dy, values, index, indptr, indices, blocks, ranks, stack, only,
    out, lo, hi, at, a, b, p_size, q_size,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    CHANNELS: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDED: tl.constexpr, TAPS: tl.constexpr,
    BK: tl.constexpr, BC: tl.constexpr, STACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GRANULE: tl.constexpr, LO: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr, DY_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of dx; `only`: one channel block of the stack alone, or all of them if it is negative."""
    CHUNKS: tl.constexpr = BLOCK_K // GRANULE
    PARTS: tl.constexpr = BK // GRANULE
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    if STRIDED:  # number the entries of the class's own taps
        taps = tl.arange(0, TAPS)
        reach_h, reach_w = a + pad_h - taps // S * dilation_h, b + pad_w - taps % S * dilation_w
        own = (taps < R * S) & (reach_h % stride_h == 0) & (reach_w % stride_w == 0)
        begin = tl.load(indptr + stack * (R * S) + taps, mask=own, other=0)
        size = tl.load(indptr + stack * (R * S) + taps + 1, mask=own, other=0) - begin
        before = tl.cumsum(size, 0) - size
        count = tl.sum(size, 0) * PARTS
        shift = tl.where(own, begin - before, 0)
    else:
        first = tl.load(indptr + stack * (R * S))
        count = (tl.load(indptr + (stack + 1) * (R * S)) - first) * PARTS

    u = tl.arange(0, CHUNKS)
    ordinal = tl.maximum(tl.minimum(u, count - 1), 0) // PARTS
    if STRIDED:
        entry = ordinal + tl.max(tl.where(before[None, :] <= ordinal[:, None], shift[None, :], 0), 1)
    else:
        entry = first + ordinal
    col, block = tl.load(indices + entry), tl.load(blocks + entry)
    if STACK > 1:
        rank = tl.load(ranks + entry)
    c = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, count, CHUNKS):
        part = u % PARTS
        tap = col // (CHANNELS // BK)
        k = (col - tap * (CHANNELS // BK)) * BK + part * GRANULE
        dp, dq = a + pad_h - tap // S * dilation_h, b + pad_w - tap % S * dilation_w
        if STRIDED:
            dp, dq = dp // stride_h, dq // stride_w  # exact: the class's own taps
        step = _step(dp, dq, k, p_size, q_size, CHANNELS, DY_LAST).to(OFFSET)
        need = tl.where(u < count, (1 << tap % S) | (1 << (tap // S + S)), _NEVER)
        if STACK > 1:
            need = tl.where((only < 0) | (rank >> 4 * only & 15 != 0), need, _NEVER)
        inside = (out[:, None] & _each(need, CHUNKS, GRANULE)[None, :]) == 0
        steps = _run(step, (p_size * q_size).to(OFFSET), CHUNKS, GRANULE, DY_LAST)
        if SAME:
            pointers = ((at + steps)[None, :] + (lo * CHANNELS)[:, None]) + (hi * (LO * CHANNELS))[:, None]
        else:
            pointers = at + (lo[:, None] + steps[None, :])
        g = tl.load(pointers, mask=inside, other=0.0)
        row = tl.arange(0, GRANULE) * BC
        if STACK == 1:
            line = block.to(OFFSET) * (BK * BC) + part * (GRANULE * BC)
            line = tl.multiple_of(tl.reshape(line[:, None] + row[None, :], [BLOCK_K]), 8)
            if BLOCK_N == BC:
                v = tl.load((values + line)[:, None] + c[None, :])
            else:
                v = tl.load((values + line)[:, None] + c[None, :], mask=(c < BC)[None, :], other=0.0)
        else:
            inner = tl.arange(0, BC)
            own_rank = rank[:, None] >> 4 * tl.arange(0, STACK)[None, :] & 15
            line = (block[:, None] + own_rank - 1).to(OFFSET) * (BK * BC) + (part * (GRANULE * BC))[:, None]
            line = line[:, None, :, None] + row[None, :, None, None] + inner[None, None, None, :]
            line = tl.max_contiguous(tl.multiple_of(tl.reshape(line, [BLOCK_K, BLOCK_N]), [1, 8]), [1, 8])
            stored = tl.broadcast_to((own_rank != 0)[:, None, :, None], [CHUNKS, GRANULE, STACK, BC])
            stored = tl.max_constancy(tl.reshape(stored, [BLOCK_K, BLOCK_N]), [1, 8])
            v = tl.load(values + line, mask=stored, other=0.0)
        acc = _dot(g, v, acc, PRECISION)
        u += CHUNKS
        ordinal = tl.maximum(tl.minimum(u, count - 1), 0) // PARTS
        if STRIDED:
            entry = ordinal + tl.max(tl.where(before[None, :] <= ordinal[:, None], shift[None, :], 0), 1)
        else:
            entry = first + ordinal
        col, block = tl.load(indices + entry), tl.load(blocks + entry)
        if STACK > 1:
            rank = tl.load(ranks + entry)
    return acc


@triton.jit
def _dgrad_store(
    acc, dx, stack, only, tile, images, rows_in, cols_in, a, b, height, width, c_blocks, stride_h, stride_w,
    STRIDED: tl.constexpr, BC: tl.constexpr, STACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DX_LAST: tl.constexpr,
):  # fmt: skip
    """Write the tile to dx; `only`: one channel block of the stack alone, or all of them if it is negative."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    c = stack * (STACK * BC) + column
    wanted = (column < STACK * BC) & (c < c_blocks * BC)
    if STACK > 1:
        wanted = tl.max_constancy(wanted & (column // BC == tl.where(only < 0, column // BC, only)), 8)
    if STRIDED or not DX_LAST:
        n, i, j = _pixel(m, rows_in, cols_in)
        to = dx + _offset(n, a + i * stride_h, b + j * stride_w, height, width, c_blocks * BC, DX_LAST)
    else:  # pixel m of the one class is pixel m of dx
        to = dx + m.to(tl.int64) * (c_blocks * BC)
    to = to[:, None] + _channel(c, height, width, DX_LAST)[None, :]
    inside = m < images * rows_in * cols_in
    tl.store(to, acc.to(dx.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


@_kernel
def dgrad_kernel(
    dy, values, index, dx, indptr_at, indices_at, blocks_at, ranks_at,
    images, height, width, p_size, q_size, stacks, c_blocks,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    CHANNELS: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDED: tl.constexpr, TAPS: tl.constexpr,
    BK: tl.constexpr, BC: tl.constexpr, STACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GRANULE: tl.constexpr, LO: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr, DY_LAST: tl.constexpr, DX_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    stack, rest = tl.program_id(0) % stacks, tl.program_id(0) // stacks
    # Residue class (a, b) of x's pixels, then a tile of its (image, i, j): h = a + i*stride_h, w = b + j*stride_w.
    if STRIDED:
        columns = tl.minimum(stride_w, width)
        classes = tl.minimum(stride_h, height) * columns
        a, b, tile = rest % classes // columns, rest % classes % columns, rest // classes
        rows_in, cols_in = tl.cdiv(height - a, stride_h), tl.cdiv(width - b, stride_w)
    else:
        a, b, tile = 0, 0, rest
        rows_in, cols_in = height, width
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n, i, j = _pixel(m, rows_in, cols_in)
    out = tl.where(m < images * rows_in * cols_in, _NEVER, -1)
    for s in tl.static_range(S):
        q = j + (b + pad_w - s * dilation_w) // stride_w if STRIDED else j + (pad_w - s * dilation_w)
        out |= ((q < 0) | (q >= q_size)).to(tl.int32) << s
    for r in tl.static_range(R):
        p = i + (a + pad_h - r * dilation_h) // stride_h if STRIDED else i + (pad_h - r * dilation_h)
        out |= ((p < 0) | (p >= p_size)).to(tl.int32) << (S + r)
    out = _exchange(out, BLOCK_M)
    if SAME:  # pixel m of the class is pixel m of dy
        lo, hi = _rows(BLOCK_M, LO)
        at = dy + (tile * BLOCK_M).to(tl.int64) * CHANNELS
    else:
        lo = _exchange(_offset(n, i, j, p_size, q_size, CHANNELS, DY_LAST).to(OFFSET), BLOCK_M)
        hi = lo
        at = dy

    if STACK == 1:
        acc = _dgrad_sum(
            dy, values, index, index + indptr_at, index + indices_at, index + blocks_at, index, stack, -1,
            out, lo, hi, at, a, b, p_size, q_size, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
            CHANNELS, R, S, STRIDED, TAPS, BK, BC, STACK, BLOCK_M, BLOCK_N, BLOCK_K, GRANULE, LO,
            SAME, WIDE, DY_LAST, PRECISION,
        )  # fmt: skip
        _dgrad_store(
            acc, dx, stack, -1, tile, images, rows_in, cols_in, a, b, height, width, c_blocks, stride_h, stride_w,
            STRIDED, BC, STACK, BLOCK_M, BLOCK_N, DX_LAST,
        )  # fmt: skip
    else:
        # The stack's blocks share dy: where one is not stored its zeros meet what another one needs. Zero times NaN or
        # infinity is NaN, so a tile with NaN is made again, a channel block at a time.
        only = stack * 0 - 1
        end = stack * 0
        # The first number of indptr, 0. A sum with it, which no compiler knows to be the same each time, is made where
        # it stands: addresses made before the loop would take the registers that the loop needs.
        zero = tl.load(index + indptr_at)
        while only < end:
            acc = _dgrad_sum(
                dy, values, index, index + indptr_at, index + indices_at, index + blocks_at, index + ranks_at, stack,
                only, out, lo, hi, at, a, b, p_size, q_size, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
                CHANNELS, R, S, STRIDED, TAPS, BK, BC, STACK, BLOCK_M, BLOCK_N, BLOCK_K, GRANULE, LO,
                SAME, WIDE, DY_LAST, PRECISION,
            )  # fmt: skip
            if only < 0:
                spoilt = tl.sum(tl.sum(acc * 0.0, 1), 0)
                end = tl.where(spoilt != spoilt, STACK, 0)
            tile += zero
            _dgrad_store(
                acc, dx, stack, only, tile, images, rows_in, cols_in, a, b, height, width, c_blocks, stride_h, stride_w,
                STRIDED, BC, STACK, BLOCK_M, BLOCK_N, DX_LAST,
            )  # fmt: skip
            only += 1


@triton.jit
def _is_last(counter, members):
    """Whether `members` programs have come here, this one last; all that they have stored can then be read.

    The last one puts the counter back to 0.
    """
    tl.debug_barrier()  # all threads of the program have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == members - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _add_up(first, apart, members, to, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of `members` tiles, `apart` elements from each to the next, in their order: the same bits each time."""
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for member in range(members):
        total += tl.load(first + member * apart + to, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _wgrad_reach(
    m, n, p, q, pixels, height, width, p_size, q_size, channels, filters,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, SAME: tl.constexpr,
    WIDE: tl.constexpr, X_LAST: tl.constexpr, DY_LAST: tl.constexpr,
):  # fmt: skip
    """For pixels m: bits of the taps outside, and where they lie in x and in dy, as far as that is asked for."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    h, w = p * stride_h - pad_h, q * stride_w - pad_w
    out = _outside(w, width, dilation_w, 0, S) | _outside(h, height, dilation_h, S, R)
    if not EVEN:  # pixels past the last one
        out = tl.where(m < pixels, out, -1)
    out = _exchange(out | _NEVER, BLOCK_K)
    in_x, in_dy = out, out
    if not SAME:
        in_x = _exchange(_offset(n, h, w, height, width, channels, X_LAST).to(OFFSET), BLOCK_K)
    if not DY_LAST:
        in_dy = _exchange(_offset(n, p, q, p_size, q_size, filters, False).to(OFFSET), BLOCK_K)
    return out, in_x, in_dy


@_kernel
def wgrad_kernel(
    x, dy, index, sums, counters, out, indices_at,
    pixels, tiles, steps, nnzb, splits, width_of_group, groups, height, width, p_size, q_size, k_blocks,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GRANULE: tl.constexpr, LO: tl.constexpr,
    LO_DY: tl.constexpr, EVEN: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr, X_LAST: tl.constexpr, DY_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = BLOCK_M // GRANULE
    PARTS: tl.constexpr = BC // GRANULE
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    # Tiles of one split run side by side: they share its pixels.
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles

    # The last block-row whose first tile, slot(row), is not past this one.
    passed = 0
    for start in range(0, k_blocks, 256):
        rows = start + tl.arange(0, 256)
        slot = tl.load(index + rows, mask=rows < k_blocks, other=0).to(tl.int64) * PARTS // CHUNKS + rows
        passed += tl.sum(((slot <= tile) & (rows < k_blocks)).to(tl.int32), 0)
    row = passed - 1
    first, last = tl.load(index + row), tl.load(index + row + 1)
    begin = (tile - (first.to(tl.int64) * PARTS // CHUNKS + row).to(tl.int32)) * CHUNKS
    if begin >= (last - first) * PARTS:  # a tile that this block-row does not need
        return

    u = begin + tl.arange(0, CHUNKS)
    live = u < (last - first) * PARTS
    col = tl.load(index + indices_at + first + u // PARTS, mask=live, other=0)
    tap = col // (CHANNELS // BC)
    c = (col - tap * (CHANNELS // BC)) * BC + u % PARTS * GRANULE
    dh, dw = tap // S * dilation_h, tap % S * dilation_w
    step = _step(dh, dw, c, height, width, CHANNELS, X_LAST).to(OFFSET)
    need = _each(tl.where(live, (1 << tap % S) | (1 << (tap // S + S)), _NEVER), CHUNKS, GRANULE)
    channels = _run(step, (height * width).to(OFFSET), CHUNKS, GRANULE, X_LAST)

    j = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    start = split * (steps * BLOCK_K)
    m = start + k
    n, p, q = _pixel(m, p_size, q_size)
    # Pixels advance by carries: cheaper than two divisions per pixel and step.
    more_n, more_p, more_q = _pixel(BLOCK_K, p_size, q_size)
    outside, in_x, in_dy = _wgrad_reach(
        m, n, p, q, pixels, height, width, p_size, q_size, CHANNELS, FILTERS,
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, R, S, BLOCK_K, EVEN, SAME, WIDE, X_LAST, DY_LAST,
    )  # fmt: skip
    at = x
    if SAME:  # pixel m of dy is pixel m of x
        lo, hi = _rows(BLOCK_K, LO)
        at += (start.to(tl.int64) - (pad_h * width + pad_w)) * CHANNELS
    from_dy = dy + row * BK
    if DY_LAST:
        low, high = _rows(BLOCK_K, LO_DY)
        from_dy += start.to(tl.int64) * FILTERS
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, tl.minimum(steps * BLOCK_K, pixels - start), BLOCK_K):
        if SAME:
            pointers = ((at + channels)[None, :] + (lo * CHANNELS)[:, None]) + (hi * (LO * CHANNELS))[:, None]
        else:
            pointers = at + (in_x[:, None] + channels[None, :])
        a = tl.load(pointers, mask=(outside[:, None] & need[None, :]) == 0, other=0.0)
        if DY_LAST:
            lines = ((from_dy + j)[None, :] + (low * FILTERS)[:, None]) + (high * (LO_DY * FILTERS))[:, None]
        else:
            lines = dy + (in_dy[:, None] + ((row * BK + j) * (p_size * q_size).to(OFFSET))[None, :])
        if EVEN and BLOCK_N == BK:
            b = tl.load(lines)
        else:
            b = tl.load(lines, mask=(k < pixels - start - done)[:, None] & (j < BK)[None, :], other=0.0)
        acc = _dot(tl.trans(a), b, acc, PRECISION)
        if SAME:
            at += BLOCK_K * CHANNELS
        if DY_LAST:
            from_dy += BLOCK_K * FILTERS
        m += BLOCK_K
        q += more_q
        carry = (q >= q_size).to(tl.int32)
        q -= carry * q_size
        p += more_p + carry
        carry = (p >= p_size).to(tl.int32)
        p -= carry * p_size
        n += more_n + carry
        outside, in_x, in_dy = _wgrad_reach(
            m, n, p, q, pixels, height, width, p_size, q_size, CHANNELS, FILTERS,
            stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, R, S, BLOCK_K, EVEN, SAME, WIDE, X_LAST, DY_LAST,
        )  # fmt: skip

    v = begin + tl.arange(0, CHUNKS)
    to = _run((first + v // PARTS).to(OFFSET) * (BK * BC) + v % PARTS * GRANULE, 1, CHUNKS, GRANULE, True)
    to = to[None, :] + (j * BC)[:, None]
    mask = _each(v < (last - first) * PARTS, CHUNKS, GRANULE)[None, :] & (j < BK)[:, None]
    total = tl.trans(acc)
    if sums is None:
        tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)
    else:
        size = nnzb.to(tl.int64) * (BK * BC)
        group = split // width_of_group
        head, members = group * width_of_group, tl.minimum(width_of_group, splits - group * width_of_group)
        tl.store(sums + split * size + to, total, mask=mask)
        counter = counters + tile * (groups + 1)
        if _is_last(counter + group, members):
            total = _add_up(sums + head * size, size, members, to, mask, BLOCK_M, BLOCK_N)
            if groups == 1:
                tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)
            else:
                tl.store(sums + head * size + to, total, mask=mask)
                if _is_last(counter + groups, groups):
                    total = _add_up(sums, size * width_of_group, groups, to, mask, BLOCK_M, BLOCK_N)
                    tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)
