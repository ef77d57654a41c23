"""Triton kernels of BatchNorm with the sum and the ReLU behind it, in both directions; norm_cut.py cuts the work.

    statistics   reads x                                       the mean of each channel and 1 / sqrt(var + eps)
    apply        reads x, residual; writes y                   y = max((x - mean)*scale + bias + residual, 0)
    sums         reads dy, x, [y]; writes [dresidual]          sums of g and of g*(x - mean), g = dy where y > 0
    dx           reads g or dy, x, [y]; writes dx              dx = g*scale - ((x - mean)*slope + offset)*scale

scale = weight*invstd. g is dresidual: where that is asked for, dx reads it in the place of dy and y. Where no residual
was added the sign of y follows from x, computed as it was. With running statistics mean and invstd do not depend on x:
no statistics forward, and backward `sums` writes dx, too.

Variances are sums of squares of differences. A program subtracts the mean of its first chunk, a share 1/T of what it
reads: no other number can be so far off that rounding grows by more than T, some tens. Programs are put together in the
same way, from the mean of the first of them. All in float32, in the same order on every run: by the last program of a
tile, which a counter tells.

Programs of `apply` and `dx` go through memory from its end: what was read last is still in the L2 cache.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .triton_gather import is_last

# One variant for all sizes but `apart`: that it is a multiple of 16, AMD's compiler needs to be told by Triton itself.
_kernel = functools.partial(
    triton.jit,
    do_not_specialize=["eps", "momentum", "lines", "length", "wide", "chunks", "splits", "tiles", "channels"],
)
# How backward knows where the ReLU cut: there is none; y is read; it follows from x.
PLAIN, FROM_Y, FROM_X = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _inside_of_chunk(apart, ROWS: tl.constexpr, COLS: tl.constexpr, VECTORS: tl.constexpr):
    """[ROWS, COLS]: elements from the start of a chunk."""
    to = tl.arange(0, ROWS).to(tl.int64)[:, None] * apart + tl.arange(0, COLS)[None, :]
    return tl.max_contiguous(tl.multiple_of(to, [1, 8]), [1, 8]) if VECTORS else to


@triton.jit
def _chunk(
    k, tile, lines, length, apart, wide,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Of chunk k of a tile: elements before it, which of its own there are, and how many of each channel."""
    line = k * ROWS if ACROSS else k // wide * ROWS
    column = tile * COLS if ACROSS else k % wide * COLS
    at = line.to(tl.int64) * apart + column
    if not ACROSS:
        at += tile.to(tl.int64) * length
    if VECTORS:
        at = tl.multiple_of(at, 8)
    rows, cols = tl.minimum(lines - line, ROWS), tl.minimum(length - column, COLS)
    if EVEN:
        inside = tl.full([ROWS, COLS], 1, tl.int1)
    else:
        there = tl.arange(0, COLS) < cols
        if VECTORS:
            there = tl.max_constancy(there, 8)
        inside = (tl.arange(0, ROWS) < rows)[:, None] & there[None, :]
    return at, inside, rows if ACROSS else rows * cols


@triton.jit
def _sum(v, ACROSS: tl.constexpr):
    """Over a chunk: [1, COLS] or [1, 1]."""
    found = tl.sum(v, 0, keep_dims=True)
    return found if ACROSS else tl.sum(found, 1, keep_dims=True)


@triton.jit
def _channels(tile, channels, COLS: tl.constexpr, ACROSS: tl.constexpr):
    """The channels of a tile, [1, COLS] or [1, 1], and which of them there are."""
    found = (tile * COLS + tl.arange(0, COLS))[None, :] if ACROSS else tl.zeros([1, 1], tl.int32) + tile
    return found, found < channels


@triton.jit
def _vector(p, c, there, DEFAULT: tl.constexpr):
    """Numbers of channels c; DEFAULT where there is no such vector."""
    return tl.full(c.shape, DEFAULT, tl.float32) if p is None else tl.load(p + c, mask=there, other=DEFAULT)


@triton.jit
def _inverse(var, eps):
    return tl.math.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _numbers(lines, length, ACROSS: tl.constexpr):
    """Of each channel."""
    return lines.to(tl.float32) if ACROSS else lines.to(tl.float32) * length.to(tl.float32)


@triton.jit
def _put_together(parts, c, there, tile, splits, tiles, channels, size, MEMBERS: tl.constexpr):
    """Mean and squares of channels c, of what the splits of a tile have stored."""
    to_squares = splits.to(tl.int64) * channels
    first = tl.load(parts + c, mask=there, other=0.0, cache_modifier=".cg")
    total = tl.zeros([MEMBERS, c.shape[1]], tl.float32)
    square = tl.zeros([MEMBERS, c.shape[1]], tl.float32)
    for start in range(0, splits, MEMBERS):
        member = start + tl.arange(0, MEMBERS)[:, None]
        known = (member < splits) & there
        each = parts + member.to(tl.int64) * channels + c
        count = parts + 2 * to_squares + member * tiles + tile
        n = tl.load(count, mask=member < splits, other=0.0, cache_modifier=".cg")
        d = tl.where(known, tl.load(each, mask=known, other=0.0, cache_modifier=".cg") - first, 0.0)
        total += n * d
        square += tl.load(each + to_squares, mask=known, other=0.0, cache_modifier=".cg") + n * d * d
    whole = tl.sum(total, 0, keep_dims=True)
    step = whole / size
    return first + step, tl.sum(square, 0, keep_dims=True) - step * whole


@triton.jit
def _added_up(parts, c, there, splits, channels, MEMBERS: tl.constexpr):
    """The two sums of channels c, of what the splits of a tile have stored."""
    total = tl.zeros([MEMBERS, c.shape[1]], tl.float32)
    product = tl.zeros([MEMBERS, c.shape[1]], tl.float32)
    for start in range(0, splits, MEMBERS):
        member = start + tl.arange(0, MEMBERS)[:, None]
        known = (member < splits) & there
        each = parts + member.to(tl.int64) * channels + c
        total += tl.load(each, mask=known, other=0.0, cache_modifier=".cg")
        each += splits.to(tl.int64) * channels
        product += tl.load(each, mask=known, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0, keep_dims=True), tl.sum(product, 0, keep_dims=True)


@_kernel
def norm_statistics_kernel(
    x, running_mean, running_var, parts, counters, mean, invstd, eps, momentum,
    lines, length, apart, wide, chunks, splits, tiles, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, VECTORS: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    to = _inside_of_chunk(apart, ROWS, COLS, VECTORS)
    at, inside, count = _chunk(split, tile, lines, length, apart, wide, ROWS, COLS, ACROSS, EVEN, VECTORS)
    v = tl.load(x + at + to, mask=inside, other=0.0).to(tl.float32)
    shift = _sum(v, ACROSS) / count
    d = tl.where(inside, v - shift, 0.0)
    total, square = d, d * d
    for k in range(split + splits, chunks, splits):
        at, inside, more = _chunk(k, tile, lines, length, apart, wide, ROWS, COLS, ACROSS, EVEN, VECTORS)
        v = tl.load(x + at + to, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, v - shift, 0.0)
        total += d
        square += d * d
        count += more
    whole = _sum(total, ACROSS)
    step = whole / count
    average, squares = shift + step, _sum(square, ACROSS) - step * whole

    c, there = _channels(tile, channels, COLS, ACROSS)
    size = _numbers(lines, length, ACROSS)
    done = parts is None
    if parts is not None:  # [splits, channels] of means, then of squares; [splits, tiles] of counts
        to_squares = splits.to(tl.int64) * channels
        mine = parts + split.to(tl.int64) * channels + c
        tl.store(mine, average, mask=there)
        tl.store(mine + to_squares, squares, mask=there)
        tl.store(parts + 2 * to_squares + split * tiles + tile, count.to(tl.float32))
        done = is_last(counters + tile, splits)
        if done:
            average, squares = _put_together(parts, c, there, tile, splits, tiles, channels, size, MEMBERS)
    if done:
        squares = tl.where(squares < 0, 0.0, squares)  # by rounding; NaN stays
        tl.store(mean + c, average, mask=there)
        tl.store(invstd + c, _inverse(squares / size, eps), mask=there)
        if running_mean is not None:
            kept = tl.load(running_mean + c, mask=there, other=0.0)
            tl.store(running_mean + c, (1 - momentum) * kept + momentum * average, mask=there)
            kept = tl.load(running_var + c, mask=there, other=0.0)
            tl.store(running_var + c, (1 - momentum) * kept + momentum * (squares / (size - 1)), mask=there)


@_kernel
def norm_apply_kernel(
    x, residual, weight, bias, mean, spread, y, used_mean, used_invstd, eps,
    lines, length, apart, wide, chunks, splits, tiles, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, VECTORS: tl.constexpr,
    KEPT: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """spread: invstd; KEPT: the running variance, and what follows from it is stored in used_mean and used_invstd."""
    tile, split = tl.program_id(0) % tiles, splits - 1 - tl.program_id(0) // tiles
    c, there = _channels(tile, channels, COLS, ACROSS)
    average, inverse = _vector(mean, c, there, 0.0), _vector(spread, c, there, 1.0)
    if KEPT:
        inverse = _inverse(inverse, eps)
        if split == 0:
            tl.store(used_mean + c, average, mask=there)
            tl.store(used_invstd + c, inverse, mask=there)
    scale, shift = _vector(weight, c, there, 1.0) * inverse, _vector(bias, c, there, 0.0)
    to = _inside_of_chunk(apart, ROWS, COLS, VECTORS)
    mine = (chunks - 1 - split) // splits  # chunks of this program, but for the first one
    for back in range(mine + 1):
        k = split + (mine - back) * splits
        at, inside, _ = _chunk(k, tile, lines, length, apart, wide, ROWS, COLS, ACROSS, EVEN, VECTORS)
        v = tl.load(x + at + to, mask=inside, other=0.0).to(tl.float32)
        v = tl.fma(v - average, scale, shift)
        if residual is not None:
            v += tl.load(residual + at + to, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            v = tl.where(v < 0, 0.0, v)  # NaN stays
        tl.store(y + at + to, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(dy, y, at, inside, d, scale, shift, RELU: tl.constexpr):
    """dy where the ReLU let it pass, as it is stored; NaN as PyTorch."""
    g = tl.load(dy + at, mask=inside, other=0.0)
    if RELU == FROM_Y:
        g = tl.where(tl.load(y + at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, g)
    if RELU == FROM_X:
        g = tl.where(tl.fma(d, scale, shift) <= 0, 0.0, g)
    return g


@_kernel
def norm_sums_kernel(
    dy, x, y, weight, bias, mean, invstd, parts, counters, dweight, dbias, offset, slope, dresidual, dx,
    lines, length, apart, wide, chunks, splits, tiles, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, VECTORS: tl.constexpr,
    MEMBERS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """dx is written here where mean and invstd do not depend on x."""
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    c, there = _channels(tile, channels, COLS, ACROSS)
    average, inverse = _vector(mean, c, there, 0.0), _vector(invstd, c, there, 1.0)
    scale, shift = _vector(weight, c, there, 1.0) * inverse, _vector(bias, c, there, 0.0)
    to = _inside_of_chunk(apart, ROWS, COLS, VECTORS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    product = total
    for k in range(split, chunks, splits):
        at, inside, _ = _chunk(k, tile, lines, length, apart, wide, ROWS, COLS, ACROSS, EVEN, VECTORS)
        d = tl.load(x + at + to, mask=inside, other=0.0).to(tl.float32) - average
        g = _gradient(dy, y, at + to, inside, d, scale, shift, RELU)
        if dresidual is not None:
            tl.store(dresidual + at + to, g.to(dresidual.dtype.element_ty), mask=inside)
        g = g.to(tl.float32)
        if dx is not None:
            tl.store(dx + at + to, (g * scale).to(dx.dtype.element_ty), mask=inside)
        total += g
        product += g * d  # g is 0 beyond the end
    totals, products = _sum(total, ACROSS), _sum(product, ACROSS)

    done = parts is None
    if parts is not None:  # [splits, channels] of totals, then of products
        mine = parts + split.to(tl.int64) * channels + c
        tl.store(mine, totals, mask=there)
        tl.store(mine + splits.to(tl.int64) * channels, products, mask=there)
        done = is_last(counters + tile, splits)
        if done:
            totals, products = _added_up(parts, c, there, splits, channels, MEMBERS)
    if done:
        tl.store(dbias + c, totals, mask=there)
        tl.store(dweight + c, products * inverse, mask=there)
        if offset is not None:
            size = _numbers(lines, length, ACROSS)
            tl.store(offset + c, totals / size, mask=there)
            tl.store(slope + c, products / size * inverse * inverse, mask=there)


@_kernel
def norm_dx_kernel(
    dy, x, y, weight, bias, mean, invstd, offset, slope, dx,
    lines, length, apart, wide, chunks, splits, tiles, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, VECTORS: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0) % tiles, splits - 1 - tl.program_id(0) // tiles
    c, there = _channels(tile, channels, COLS, ACROSS)
    average, inverse = _vector(mean, c, there, 0.0), _vector(invstd, c, there, 1.0)
    scale, shift = _vector(weight, c, there, 1.0) * inverse, _vector(bias, c, there, 0.0)
    off, steep = _vector(offset, c, there, 0.0) * scale, _vector(slope, c, there, 0.0) * scale
    to = _inside_of_chunk(apart, ROWS, COLS, VECTORS)
    mine = (chunks - 1 - split) // splits
    for back in range(mine + 1):
        k = split + (mine - back) * splits
        at, inside, _ = _chunk(k, tile, lines, length, apart, wide, ROWS, COLS, ACROSS, EVEN, VECTORS)
        d = tl.load(x + at + to, mask=inside, other=0.0).to(tl.float32) - average
        g = _gradient(dy, y, at + to, inside, d, scale, shift, RELU).to(tl.float32)
        tl.store(dx + at + to, (g * scale - (d * steep + off)).to(dx.dtype.element_ty), mask=inside)
