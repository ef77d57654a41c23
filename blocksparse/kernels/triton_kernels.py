"""Triton backend: fprop and dgrad of a BSR filter bank as gathered GEMMs on tensor cores, no im2col buffer.

Each program owns one output tile and walks the stored blocks that feed it (wgrad: triton_wgrad.py):

| kind  | M (rows of the tile)          | N           | K, walked in a loop            | tables                      |
|-------|-------------------------------|-------------|--------------------------------|-----------------------------|
| fprop | BLOCK_M of the N*P*Q pixels   | bk          | stored (tap, c) of a block-row | indptr, indices             |
| dgrad | BLOCK_M pixels of x, one      | bc, or a    | stored (tap, k) of a c_block,  | t_indptr, t_indices, t_perm |
|       | residue class of the stride   | stack of bc | or of any block of the stack   | or s_*                      |

Chunks. The stored list is walked in chunks of `granule` channels: the largest power of two that divides the block's
side, at most one tile. BLOCK_K / granule chunks, each with a tap and a channel of its own, make one K-tile. A block of
any multiple of 8 wastes nothing along K. Past the last chunk the last one is read again, with a tap that no pixel has.
Tables are read one K-tile ahead, into registers: left to Triton's pipeline they would go through shared memory.

Borders. A tap displaces every pixel of the tile alike. Which kernel rows and columns of a pixel lie outside the image
are bits of one number, made once; a chunk has the bits of its own two, and a copy is masked where both have a bit.

SAME. Where pixel m of the result is pixel m of the operand (stride 1, equal sizes) rows of the tile lie equally far
apart, and the compiler has fewer addresses to make.

Strided dgrad. The pixels of x with (h, w) = (a, b) modulo the stride form a sub-problem of their own, reached by the
taps with (a + padding - r*dilation) % stride == 0 only. All of them run in one launch. The entries of those taps are
several ranges of the transposed list, numbered 0, 1, ... through a shift that never decreases from tap to tap, so the
lookup is a maximum over taps.

Narrow blocks in dgrad. Of 8 or 16 channels a program takes as many blocks as fill 64, and walks the (tap, block-row)
pairs that any of them stores: dy is read once for all. 16 columns, the least of wgmma in use, would need four programs.

Tables are offsets into the one packed index, whose first is indptr.

Row order. fprop stores BSR row i to channel row_order[i]. dgrad and wgrad start with a copy of dy in BSR row order: one
pass over dy, where gathering single channels in the kernel would turn every load of dy into 2-byte loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_gather import (
    NEVER,
    channel_of,
    dot,
    each,
    exchange,
    kernel,
    offset_of,
    outside,
    pixel_of,
    rows_of,
    runs,
    step_of,
    sums_of,
)


@kernel
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
    n, p, q = pixel_of(m, p_size, q_size)
    h, w = p * stride_h - pad_h, q * stride_w - pad_w
    out = tl.where(m < pixels, NEVER, -1) | outside(w, width, dilation_w, 0, S)
    out = exchange(out | outside(h, height, dilation_h, S, R), BLOCK_M)
    if SAME:  # pixel m of y is pixel m of x
        lo, hi = rows_of(BLOCK_M, LO)
        at = x + ((tile * BLOCK_M).to(tl.int64) - (pad_h * width + pad_w)) * CHANNELS
    else:
        lo = exchange(offset_of(n, h, w, height, width, CHANNELS, X_LAST).to(OFFSET), BLOCK_M)
        at = x

    u = tl.arange(0, CHUNKS)
    j = tl.arange(0, BLOCK_N)
    lines = (values + first.to(tl.int64) * (BK * BC)) + j * BC
    col = tl.load(index + indices_at + first + tl.minimum(u, count - 1) // PARTS)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, count, CHUNKS):
        tap = col // (CHANNELS // BC)
        c = (col - tap * (CHANNELS // BC)) * BC + u % PARTS * GRANULE
        dh, dw = tap // S * dilation_h, tap % S * dilation_w
        step = step_of(dh, dw, c, height, width, CHANNELS, X_LAST).to(OFFSET)
        need = tl.where(u < count, (1 << tap % S) | (1 << (tap // S + S)), NEVER)
        inside = (out[:, None] & each(need, CHUNKS, GRANULE)[None, :]) == 0
        steps = runs(step, (height * width).to(OFFSET), CHUNKS, GRANULE, X_LAST)
        if SAME:
            pointers = ((at + steps)[None, :] + (lo * CHANNELS)[:, None]) + (hi * (LO * CHANNELS))[:, None]
        else:
            pointers = at + sums_of(lo, steps, X_LAST)
        a = tl.load(pointers, mask=inside, other=0.0)
        v = tl.minimum(u, count - 1)
        block = runs(v // PARTS * (BK * BC) + v % PARTS * GRANULE, 1, CHUNKS, GRANULE, True)
        if BLOCK_N == BK:
            b = tl.load(lines[:, None] + block[None, :])
        else:
            b = tl.load(lines[:, None] + block[None, :], mask=(j < BK)[:, None], other=0.0)
        acc = dot(a, tl.trans(b), acc, PRECISION)
        u += CHUNKS
        col = tl.load(index + indices_at + first + tl.minimum(u, count - 1) // PARTS)

    k = row * BK + j
    if row_order is not None:
        k = tl.load(row_order + k, mask=j < BK, other=0)
    if bias is not None:
        acc += tl.load(bias + k, mask=j < BK, other=0.0).to(tl.float32)[None, :]
    filters = k_blocks * BK
    to = y + (m.to(tl.int64) * filters if Y_LAST else offset_of(n, p, q, p_size, q_size, filters, False))
    mask = (m < pixels)[:, None] & (j < BK)[None, :]
    tl.store(to[:, None] + channel_of(k, p_size, q_size, Y_LAST)[None, :], acc.to(y.dtype.element_ty), mask=mask)


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
        step = step_of(dp, dq, k, p_size, q_size, CHANNELS, DY_LAST).to(OFFSET)
        need = tl.where(u < count, (1 << tap % S) | (1 << (tap // S + S)), NEVER)
        if STACK > 1:
            need = tl.where((only < 0) | (rank >> 4 * only & 15 != 0), need, NEVER)
        inside = (out[:, None] & each(need, CHUNKS, GRANULE)[None, :]) == 0
        steps = runs(step, (p_size * q_size).to(OFFSET), CHUNKS, GRANULE, DY_LAST)
        if SAME:
            pointers = ((at + steps)[None, :] + (lo * CHANNELS)[:, None]) + (hi * (LO * CHANNELS))[:, None]
        else:
            pointers = at + sums_of(lo, steps, DY_LAST)
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
        acc = dot(g, v, acc, PRECISION)
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
        n, i, j = pixel_of(m, rows_in, cols_in)
        to = dx + offset_of(n, a + i * stride_h, b + j * stride_w, height, width, c_blocks * BC, DX_LAST)
    else:  # pixel m of the one class is pixel m of dx
        to = dx + m.to(tl.int64) * (c_blocks * BC)
    to = to[:, None] + channel_of(c, height, width, DX_LAST)[None, :]
    inside = m < images * rows_in * cols_in
    tl.store(to, acc.to(dx.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


@kernel
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
    n, i, j = pixel_of(m, rows_in, cols_in)
    out = tl.where(m < images * rows_in * cols_in, NEVER, -1)
    if STRIDED:
        for s in tl.static_range(S):
            out |= outside(j + (b + pad_w - s * dilation_w) // stride_w, q_size, 0, s, 1)
        for r in tl.static_range(R):
            out |= outside(i + (a + pad_h - r * dilation_h) // stride_h, p_size, 0, S + r, 1)
    else:
        out |= outside(j + pad_w, q_size, -dilation_w, 0, S) | outside(i + pad_h, p_size, -dilation_h, S, R)
    out = exchange(out, BLOCK_M)
    if SAME:  # pixel m of the class is pixel m of dy
        lo, hi = rows_of(BLOCK_M, LO)
        at = dy + (tile * BLOCK_M).to(tl.int64) * CHANNELS
    else:
        lo = exchange(offset_of(n, i, j, p_size, q_size, CHANNELS, DY_LAST).to(OFFSET), BLOCK_M)
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
