"""Triton backend, wgrad: dvalues of stored blocks, [BLOCK_M stored (tap, c) of a block-row] x [bk] summed over pixels.

Chunks lie along M here, as triton_kernels.py has them along K, and stay the same in the loop over pixels. Block-row b
owns the tiles from slot(b) = indptr[b]*chunks/CH + b on: always enough of them, and their total depends on nnzb alone,
so no grid depends on the mask.

Pixels advance by carries, and their border bits are made one K-tile ahead. EVEN: no K-tile ends past the last pixel.

Splits of the pixels go through an fp32 workspace. The last program of a group of splits adds them up, and the last of
those adds up the groups, always in the order of the splits: no second launch, and the same bits each run whoever comes
last. Who is last is counted by one number a group, which that program puts back to 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_gather import (
    NEVER,
    dot,
    each,
    exchange,
    is_last,
    kernel,
    offset_of,
    outside,
    pixel_of,
    rows_of,
    runs,
    step_of,
    sums_of,
)


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
    out = outside(w, width, dilation_w, 0, S) | outside(h, height, dilation_h, S, R)
    if not EVEN:  # pixels past the last one
        out = tl.where(m < pixels, out, -1)
    out = exchange(out | NEVER, BLOCK_K)
    in_x, in_dy = out, out
    if not SAME:
        in_x = exchange(offset_of(n, h, w, height, width, channels, X_LAST).to(OFFSET), BLOCK_K)
    if not DY_LAST:
        in_dy = exchange(offset_of(n, p, q, p_size, q_size, filters, False).to(OFFSET), BLOCK_K)
    return out, in_x, in_dy


@kernel
def wgrad_kernel(
    x, dy, index, sums, counters, out, indices_at,
    pixels, tiles, steps, nnzb, splits, width_of_group, groups, height, width, p_size, q_size, k_blocks,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GRANULE: tl.constexpr, LO: tl.constexpr,
    LO_DY: tl.constexpr, EVEN: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr,
    X_LAST: tl.constexpr, DY_LAST: tl.constexpr, PRECISION: tl.constexpr,
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
    step = step_of(dh, dw, c, height, width, CHANNELS, X_LAST).to(OFFSET)
    need = each(tl.where(live, (1 << tap % S) | (1 << (tap // S + S)), NEVER), CHUNKS, GRANULE)
    channels = runs(step, (height * width).to(OFFSET), CHUNKS, GRANULE, X_LAST)

    j = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    start = split * (steps * BLOCK_K)
    m = start + k
    n, p, q = pixel_of(m, p_size, q_size)
    # Pixels advance by carries: cheaper than two divisions per pixel and step.
    more_n, more_p, more_q = pixel_of(BLOCK_K, p_size, q_size)
    out_of, in_x, in_dy = _wgrad_reach(
        m, n, p, q, pixels, height, width, p_size, q_size, CHANNELS, FILTERS,
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, R, S, BLOCK_K, EVEN, SAME, WIDE, X_LAST, DY_LAST,
    )  # fmt: skip
    at = x
    if SAME:  # pixel m of dy is pixel m of x
        lo, hi = rows_of(BLOCK_K, LO)
        at += (start.to(tl.int64) - (pad_h * width + pad_w)) * CHANNELS
    from_dy = dy + row * BK
    if DY_LAST:
        low, high = rows_of(BLOCK_K, LO_DY)
        from_dy += start.to(tl.int64) * FILTERS
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, tl.minimum(steps * BLOCK_K, pixels - start), BLOCK_K):
        if SAME:
            pointers = ((at + channels)[None, :] + (lo * CHANNELS)[:, None]) + (hi * (LO * CHANNELS))[:, None]
        else:
            pointers = at + sums_of(in_x, channels, X_LAST)
        a = tl.load(pointers, mask=(out_of[:, None] & need[None, :]) == 0, other=0.0)
        if DY_LAST:
            lines = ((from_dy + j)[None, :] + (low * FILTERS)[:, None]) + (high * (LO_DY * FILTERS))[:, None]
        else:
            lines = dy + (in_dy[:, None] + ((row * BK + j) * (p_size * q_size).to(OFFSET))[None, :])
        if EVEN and BLOCK_N == BK:
            b = tl.load(lines)
        else:
            b = tl.load(lines, mask=(k < pixels - start - done)[:, None] & (j < BK)[None, :], other=0.0)
        acc = dot(tl.trans(a), b, acc, PRECISION)
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
        out_of, in_x, in_dy = _wgrad_reach(
            m, n, p, q, pixels, height, width, p_size, q_size, CHANNELS, FILTERS,
            stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, R, S, BLOCK_K, EVEN, SAME, WIDE, X_LAST, DY_LAST,
        )  # fmt: skip

    v = begin + tl.arange(0, CHUNKS)
    to = runs((first + v // PARTS).to(OFFSET) * (BK * BC) + v % PARTS * GRANULE, 1, CHUNKS, GRANULE, True)
    to = to[None, :] + (j * BC)[:, None]
    mask = each(v < (last - first) * PARTS, CHUNKS, GRANULE)[None, :] & (j < BK)[:, None]
    total = tl.trans(acc)
    if sums is None:
        tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)
    else:
        size = nnzb.to(tl.int64) * (BK * BC)
        group = split // width_of_group
        head, members = group * width_of_group, tl.minimum(width_of_group, splits - group * width_of_group)
        tl.store(sums + split * size + to, total, mask=mask)
        counter = counters + tile * (groups + 1)
        if is_last(counter + group, members):
            total = _add_up(sums + head * size, size, members, to, mask, BLOCK_M, BLOCK_N)
            if groups == 1:
                tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)
            else:
                tl.store(sums + head * size + to, total, mask=mask)
                if is_last(counter + groups, groups):
                    total = _add_up(sums, size * width_of_group, groups, to, mask, BLOCK_M, BLOCK_N)
                    tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)
