"""fprop, dgrad and wgrad with PyTorch operators: any device, any dtype, the default on a CPU.

Only stored blocks are multiplied, and no im2col buffer exists. The index is cut, once per mask, into groups: block-rows
that store the same blocks, side by side. A layer then runs in one of two ways:

conv   Every group stores channels x taps with at least CONV_TAPS of the taps (HRBP, every 1x1 layer, kernel and filter
       sparsity): one small dense convolution a group, over its gathered channels.
shift  Everything else. x is copied once into planes [C, H*N*pitch], one for each residue of the stride, whose pitch
       leaves zeros between image rows; images interleave row by row, so that a tap is one contiguous slice of the plane
       and the rows that padding would supply are skipped. Each (group, tap) is then one matrix product on that slice,
       over the stored channels: views where the stored channel blocks form wide runs, gathered otherwise.

float16 and bfloat16 are computed in float32 wherever several operators add to one result, and throughout on a CPU.
Very fine random patterns (a handful of filters and channels a block) are bound by gathering and by the cost of a call:
on a CPU they can be slower than a dense convolution.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.weak import WeakTensorKeyDictionary

from ..geometry import ConvGeometry
from ..index import IndexTables

CONV_TAPS = 2 / 3  # least share of stored taps for `conv`: the rest is multiplied by zeros
RUN_CHANNELS = 32  # neighbouring channels worth a product of their own instead of a gather

aten = torch.ops.aten


# ---------------------------------------------------------------------- the decomposition of an index


class _Part(NamedTuple):
    """Consecutive blocks of a group that share a tap; their channel blocks are a range or a gather list."""

    tap: int
    blocks: slice  # within the group
    channels: slice | Tensor


class _Group(NamedTuple):
    """Block-rows that store the same blocks. Rows and blocks count in working order: groups one after the other."""

    rows: slice
    blocks: slice
    members: int  # block-rows
    taps: list[int]  # stored, ascending
    channels: slice | Tensor | None  # channel blocks when they are the same for every stored tap
    parts: list[_Part]


@dataclass(frozen=True)
class _Decomposition:
    groups: list[_Group]
    filters: Tensor | None  # [K] filter of each working row; None: identity
    positions: Tensor | None  # its inverse
    blocks: Tensor | None  # [nnzb] stored block of each working block; None: identity
    block_positions: Tensor | None  # its inverse
    conv: bool


def _order(order: np.ndarray, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """A permutation and its inverse on `device`; (None, None) for the identity."""
    if np.array_equal(order, np.arange(order.size)):
        return None, None
    return tuple(torch.from_numpy(o.astype(np.int32)).to(device) for o in (order, np.argsort(order)))  # type: ignore[return-value]


def _run(cols: np.ndarray) -> bool:
    return int(cols[-1]) - int(cols[0]) + 1 == cols.size


def _members(indptr: np.ndarray, indices: np.ndarray) -> list[list[int]]:
    """Non-empty block-rows that store the same blocks, in order of their first member."""
    classes: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(np.diff(indptr)).tolist():
        classes.setdefault(indices[indptr[row] : indptr[row + 1]].tobytes(), []).append(row)
    return list(classes.values())


def _decompose(
    indptr: np.ndarray,
    indices: np.ndarray,
    row_order: np.ndarray | None,
    weight_shape: tuple[int, int, int, int],
    blocksize: tuple[int, int],
    device: torch.device,
) -> _Decomposition:
    k, c, r, s = weight_shape
    bk, bc = blocksize
    c_blocks = c // bc
    tap_of, col_of = indices // c_blocks, indices % c_blocks
    on_device = torch.from_numpy(col_of).to(device)

    groups: list[_Group] = []
    row_of: list[int] = []
    block_of: list[np.ndarray] = []
    conv = True
    rows_done = blocks_done = 0
    for members in _members(indptr, indices):
        start, stop = int(indptr[members[0]]), int(indptr[members[0] + 1])
        n, m = stop - start, len(members)
        cols = col_of[start:stop]
        bounds = [0, *(np.flatnonzero(np.diff(tap_of[start:stop])) + 1).tolist(), n]
        taps = tap_of[start:stop][bounds[:-1]].tolist()
        first = bounds[1]
        channels: slice | Tensor | None = None
        if first * len(taps) == n and (cols.reshape(-1, first) == cols[:first]).all():
            run = slice(int(cols[0]), int(cols[0]) + first)
            channels = run if _run(cols[:first]) else on_device[start : start + first]
        conv = conv and channels is not None and len(taps) >= CONV_TAPS * r * s
        parts: list[_Part] = []
        for tap, lo, hi in zip(taps, bounds[:-1], bounds[1:], strict=True):
            if channels is not None:
                parts.append(_Part(tap, slice(lo, hi), channels))
                continue
            cuts = [lo, *(np.flatnonzero(np.diff(cols[lo:hi]) != 1) + 1 + lo).tolist(), hi]
            if len(cuts) > 2 and (hi - lo) * bc < RUN_CHANNELS * (len(cuts) - 1):
                parts.append(_Part(tap, slice(lo, hi), on_device[start + lo : start + hi]))
            else:
                parts += [
                    _Part(tap, slice(a, b), slice(int(cols[a]), int(cols[a]) + b - a))
                    for a, b in zip(cuts[:-1], cuts[1:], strict=True)
                ]
        groups.append(
            _Group(
                slice(rows_done, rows_done + m * bk), slice(blocks_done, blocks_done + m * n), m, taps, channels, parts
            )
        )
        rows_done, blocks_done = rows_done + m * bk, blocks_done + m * n
        row_of += members
        block_of += [np.arange(indptr[row], indptr[row + 1]) for row in members]

    row_of += np.flatnonzero(np.diff(indptr) == 0).tolist()
    bsr_rows = (np.asarray(row_of, dtype=np.int64)[:, None] * bk + np.arange(bk)).ravel()
    filters, positions = _order(bsr_rows if row_order is None else row_order[bsr_rows], device)
    blocks, block_positions = _order(np.concatenate(block_of) if block_of else np.arange(0), device)
    return _Decomposition(groups, filters, positions, blocks, block_positions, conv)


class _Cached(NamedTuple):
    key: tuple[object, ...]
    proof: tuple[Tensor | None, ...] | int  # what the index was: a copy, or its version
    decomposition: _Decomposition


_cache = WeakTensorKeyDictionary()
_cache_lock = threading.Lock()


def _same(now: tuple[Tensor | None, ...], then: tuple[Tensor | None, ...]) -> bool:
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(now, then, strict=True))  # type: ignore[arg-type]


def _decomposition(tables: IndexTables, geometry: ConvGeometry, blocksize: tuple[int, int]) -> _Decomposition:
    """The decomposition of this index; cached by the packed tensor for as long as its content is provably the same.

    Masks change in place. On a CPU the content itself is compared; elsewhere, where that would synchronise, the
    tensor's version, and a tensor without one (made in inference mode) is decomposed at each call.
    """
    packed, key = tables.packed, (geometry.weight_shape, blocksize)
    index = (tables.indptr, tables.indices, tables.row_order)
    on_cpu = packed.device.type == "cpu"
    with _cache_lock:
        found: _Cached | None = _cache.get(packed)
    if found is not None and found.key == key:
        if isinstance(found.proof, int):
            if found.proof == packed._version:
                return found.decomposition
        elif _same(index, found.proof):
            return found.decomposition
    version = None if packed.is_inference() else packed._version
    # The decomposition is made from the copy, so that a concurrent update cannot come between the two.
    copy = tuple(None if t is None else t.detach().to("cpu", copy=True) for t in index)
    arrays = [None if t is None else t.numpy() for t in copy]
    made = _decompose(*arrays, *key, packed.device)  # type: ignore[arg-type]
    proof = copy if on_cpu else version
    if proof is not None:
        with _cache_lock:
            _cache[packed] = _Cached(key, proof, made)
    return made


# ---------------------------------------------------------------------- channels of a 4-d tensor


def _is_channels_last(t: Tensor) -> bool:
    return suggest_memory_format(t) == torch.channels_last


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty(shape: tuple[int, ...], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=_format(channels_last))


def _pixels(t: Tensor) -> Tensor:
    """A channels_last [N, C, H, W] as the matrix [N*H*W, C]."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _take(t: Tensor, channels: slice | Tensor | None, width: int = 1) -> Tensor:
    """The listed channels (blocks of `width`) of a contiguous or channels_last t, in the same format."""
    if channels is None:
        return t
    if isinstance(channels, slice):
        return t[:, channels.start * width : channels.stop * width]
    n, _, h, w = t.shape
    if _is_channels_last(t):
        chosen = _pixels(t).unflatten(1, (-1, width)).index_select(1, channels)
        return chosen.view(n, h, w, -1).permute(0, 3, 1, 2)
    return t.unflatten(1, (-1, width)).index_select(1, channels).flatten(1, 2)


def _add(t: Tensor, channels: slice | Tensor, part: Tensor, width: int) -> None:
    """Adds `part` to the listed channels of t, both in t's format."""
    if isinstance(channels, slice):
        t[:, channels.start * width : channels.stop * width].add_(part)
    elif _is_channels_last(t):
        _pixels(t).unflatten(1, (-1, width)).index_add_(1, channels, _pixels(part).unflatten(1, (-1, width)))
    else:
        t.unflatten(1, (-1, width)).index_add_(1, channels, part.unflatten(1, (-1, width)))


# ---------------------------------------------------------------------- conv: one dense convolution a group


def _conv_args(g: ConvGeometry) -> tuple[object, ...]:
    return list(g.stride), list(g.padding), list(g.dilation), False, [0, 0], 1


def _kernel(values: Tensor, group: _Group, g: ConvGeometry, channels_last: bool) -> Tensor:
    """The group's filters [rows, channels, R, S], zero at the taps that it does not store."""
    bk, bc = values.shape[1:]
    m, t = group.members, len(group.taps)
    w = values[group.blocks].view(m, t, -1, bk, bc).permute(0, 3, 1, 2, 4).reshape(m * bk, t, -1)
    if t < g.taps:
        full = w.new_zeros(m * bk, g.taps, w.shape[2])
        full[:, group.taps] = w
        w = full
    w = w.view(m * bk, g.r, g.s, -1).permute(0, 3, 1, 2)
    return w.contiguous(memory_format=_format(channels_last))


def _conv_fprop(x: Tensor, values: Tensor, d: _Decomposition, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    bc, last = values.shape[2], _is_channels_last(x)
    parts = []
    for group in d.groups:
        assert group.channels is not None
        w = _kernel(values, group, g, last)
        b = None if bias is None else bias[group.rows]
        parts.append(aten.convolution(_take(x, group.channels, bc), w, b, *_conv_args(g)))
    empty = g.k - (d.groups[-1].rows.stop if d.groups else 0)
    if empty:
        rest = _empty((g.n, empty, g.p, g.q), x, last)
        parts.append(rest.zero_() if bias is None else rest.copy_(bias[-empty:].view(-1, 1, 1)))
    return _take(parts[0] if len(parts) == 1 else torch.cat(parts, 1), d.positions)


def _conv_dgrad(dy: Tensor, values: Tensor, d: _Decomposition, g: ConvGeometry, last: bool, dx: Tensor) -> None:
    bc = values.shape[2]
    for group in d.groups:
        assert group.channels is not None
        w = _kernel(values, group, g, last)
        like = _empty((g.n, w.shape[1], g.h, g.w), dy, last)  # only its shape is read
        args = (None, *_conv_args(g), [True, False, False])
        part, _, _ = aten.convolution_backward(dy[:, group.rows], like, w, *args)
        _add(dx, group.channels, part, bc)


def _conv_wgrad(x: Tensor, dy: Tensor, d: _Decomposition, g: ConvGeometry, dvalues: Tensor) -> None:
    bk, bc = dvalues.shape[1:]
    last = _is_channels_last(x)
    for group in d.groups:
        assert group.channels is not None
        m, t, part = group.members, len(group.taps), _take(x, group.channels, bc)
        w = _empty((m * bk, part.shape[1], g.r, g.s), x, last)  # only its shape is read
        args = (None, *_conv_args(g), [False, True, False])
        _, dw, _ = aten.convolution_backward(dy[:, group.rows], part, w, *args)
        dw = dw.flatten(2) if t == g.taps else dw.flatten(2)[:, :, group.taps]
        dvalues[group.blocks].view(m, t, -1, bk, bc).copy_(dw.view(m, bk, -1, bc, t).permute(0, 4, 2, 1, 3))


# ---------------------------------------------------------------------- shift: a tap is a slice of a padded plane


class _Tap(NamedTuple):
    """Where one tap reads: y[:, y_start : y_start+length] takes x[:, x_start : x_start+length] of plane `phase`."""

    phase: tuple[int, int]
    x_start: int
    y_start: int
    length: int


class _Grid(NamedTuple):
    """How [C, H, N, W] lies in a plane: rows of `pitch`, `lead` zeros in front and `tail` zeros behind."""

    pitch: int
    lead: int
    tail: int
    taps: list[_Tap | None]  # None: the tap meets nothing but padding


class _Axis(NamedTuple):
    """One kernel offset on one axis: outputs `start` .. `stop` read input (p + shift)*stride + phase."""

    phase: int
    shift: int
    extent: int  # inputs of this phase
    start: int
    stop: int


def _axis(offset: int, size: int, out: int, stride: int, padding: int, dilation: int) -> _Axis:
    shift, phase = divmod(offset * dilation - padding, stride)
    extent = max(0, -(-(size - phase) // stride))
    return _Axis(phase, shift, extent, max(0, -shift), min(out, extent - shift))


@lru_cache(maxsize=256)
def _grid(g: ConvGeometry) -> _Grid:
    down = [_axis(i, g.h, g.p, g.stride[0], g.padding[0], g.dilation[0]) for i in range(g.r)]
    across = [_axis(i, g.w, g.q, g.stride[1], g.padding[1], g.dilation[1]) for i in range(g.s)]
    used = [a for a in across if a.start < a.stop]
    # A slice starts `shift` columns away from its output row. What it reads beyond its image row must be zeros: the
    # end of its own row to the right, the end of the row before to the left.
    pitch = max([g.q, *(max(a.extent + max(0, -a.shift), g.q + a.shift) for a in used)])
    pitch = max([pitch, *(a.extent for a in used)])
    lead, tail = (max([0, *(sign * a.shift for a in used)]) for sign in (-1, 1))
    line = g.n * pitch
    taps = [
        _Tap((a.phase, b.phase), lead + (a.start + a.shift) * line + b.shift, a.start * line, (a.stop - a.start) * line)
        if a.start < a.stop and b.start < b.stop
        else None
        for a in down
        for b in across
    ]
    return _Grid(pitch, lead, tail, taps)


def _new_plane(like: Tensor, channels: int, length: int, rows_last: bool) -> Tensor:
    """Zeros [channels, length]; stored [length, channels] when `rows_last`."""
    return like.new_zeros(length, channels).t() if rows_last else like.new_zeros(channels, length)


def _image(plane: Tensor, n: int, h: int, w: int, start: int, pitch: int) -> Tensor:
    """The [N, C, h, w] that lies in a plane from `start`."""
    rows = plane[:, start : start + h * n * pitch].unflatten(1, (h, n, pitch))
    return rows[..., :w].permute(2, 0, 1, 3)


def _phase_of(x: Tensor, phase: tuple[int, int], g: ConvGeometry) -> Tensor:
    return x[:, :, phase[0] :: g.stride[0], phase[1] :: g.stride[1]]


def _phase_plane(x: Tensor, phase: tuple[int, int], g: ConvGeometry, grid: _Grid, rows_last: bool) -> tuple[Tensor, Tensor]:
    """Zeros for one phase of x, and the view of it where that phase's image belongs."""
    h, w = _phase_of(x, phase, g).shape[2:]
    plane = _new_plane(x, g.c, grid.lead + h * g.n * grid.pitch + grid.tail, rows_last)
    return plane, _image(plane, g.n, h, w, grid.lead, grid.pitch)


def _filled(x: Tensor, g: ConvGeometry, grid: _Grid, rows_last: bool) -> Callable[[tuple[int, int]], Tensor]:
    """The planes of x, each made when first asked for."""
    planes: dict[tuple[int, int], Tensor] = {}

    def plane(phase: tuple[int, int]) -> Tensor:
        if phase not in planes:
            planes[phase], image = _phase_plane(x, phase, g, grid, rows_last)
            image.copy_(_phase_of(x, phase, g))
        return planes[phase]

    return plane


def _y_plane(dy: Tensor, g: ConvGeometry, grid: _Grid, rows_last: bool) -> Tensor:
    plane = _new_plane(dy, g.k, g.p * g.n * grid.pitch, rows_last)
    _image(plane, g.n, g.p, g.q, 0, grid.pitch).copy_(dy)
    return plane


def _rows(plane: Tensor, channels: slice | Tensor, width: int) -> Tensor:
    """The listed channel blocks of a plane, stored like it: a view of a slice, a copy of a list."""
    if isinstance(channels, slice):
        return plane[channels.start * width : channels.stop * width]
    if plane.stride(1) == 1:
        return plane.unflatten(0, (-1, width)).index_select(0, channels).flatten(0, 1)
    return plane.t().unflatten(1, (-1, width)).index_select(1, channels).flatten(1, 2).t()


def _add_rows(plane: Tensor, channels: Tensor, part: Tensor, width: int) -> None:
    if plane.stride(1) == 1:
        plane.unflatten(0, (-1, width)).index_add_(0, channels, part.unflatten(0, (-1, width)))
    else:
        part = part.t().unflatten(1, (-1, width))
        plane.t().unflatten(1, (-1, width)).index_add_(1, channels, part)


def _slices(
    group: _Group, plane: Callable[[tuple[int, int]], Tensor], grid: _Grid, bc: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(group rows of the weight matrix, columns of y, input rows) of every product of a group."""
    gathered: dict[tuple[int, int], Tensor] = {}  # channels that all taps share are gathered once
    for part in group.parts:
        tap = grid.taps[part.tap]
        if tap is None:
            continue
        cols = slice(tap.x_start, tap.x_start + tap.length)
        if group.channels is None:
            x = _rows(plane(tap.phase)[:, cols], part.channels, bc)
        else:
            if tap.phase not in gathered:
                gathered[tap.phase] = _rows(plane(tap.phase), group.channels, bc)
            x = gathered[tap.phase][:, cols]
        weights = slice(part.blocks.start * bc, part.blocks.stop * bc)
        yield weights, slice(tap.y_start, tap.y_start + tap.length), x


def _matrix(values: Tensor, group: _Group) -> Tensor:
    """The group's weights [blocks*bc, members*bk], so that consecutive blocks are consecutive rows."""
    bk, bc = values.shape[1:]
    return values[group.blocks].view(group.members, -1, bk, bc).permute(1, 3, 0, 2).reshape(-1, group.members * bk)


def _rows_last(channels_last: bool, blocksize: tuple[int, int]) -> bool:
    return channels_last and min(blocksize) >= 16  # thin products and short gathers want long rows


def _shift_fprop(x: Tensor, values: Tensor, d: _Decomposition, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    grid, bc, last = _grid(g), values.shape[2], _is_channels_last(x)
    rows_last = _rows_last(last, values.shape[1:])
    y = _new_plane(x, g.k, g.p * g.n * grid.pitch, rows_last)
    if bias is not None:
        y.copy_(bias[:, None])
    plane = _filled(x, g, grid, rows_last)
    for group in d.groups:
        w, out = _matrix(values, group), y[group.rows]
        for weights, cols, part in _slices(group, plane, grid, bc):
            out[:, cols].addmm_(w[weights].t(), part)
    if d.positions is not None:
        y = _rows(y, d.positions, 1)
    return _image(y, g.n, g.p, g.q, 0, grid.pitch).contiguous(memory_format=_format(last))


def _shift_dgrad(dy: Tensor, values: Tensor, d: _Decomposition, g: ConvGeometry, last: bool, dx: Tensor) -> None:
    grid, bc = _grid(g), values.shape[2]
    rows_last = _rows_last(last, values.shape[1:])
    dy = _y_plane(dy, g, grid, rows_last)
    planes: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for group in d.groups:
        w, mine = _matrix(values, group), dy[group.rows]
        shared: dict[tuple[int, int], Tensor] = {}
        for part in group.parts:
            tap = grid.taps[part.tap]
            if tap is None:
                continue
            if tap.phase not in planes:
                planes[tap.phase] = _phase_plane(dx, tap.phase, g, grid, rows_last)
            plane = planes[tap.phase][0]
            cols = slice(tap.x_start, tap.x_start + tap.length)
            weights = w[part.blocks.start * bc : part.blocks.stop * bc]
            source = mine[:, tap.y_start : tap.y_start + tap.length]
            if isinstance(part.channels, slice):
                _rows(plane, part.channels, bc)[:, cols].addmm_(weights, source)
            elif group.channels is None:
                product = torch.mm(source.t(), weights.t()).t() if rows_last else torch.mm(weights, source)
                _add_rows(plane[:, cols], part.channels, product, bc)
            else:
                if tap.phase not in shared:
                    shared[tap.phase] = _new_plane(plane, weights.shape[0], plane.shape[1], rows_last)
                shared[tap.phase][:, cols].addmm_(weights, source)
        for phase, part_sum in shared.items():
            assert isinstance(group.channels, Tensor)
            _add_rows(planes[phase][0], group.channels, part_sum, bc)
    for phase, (_, image) in planes.items():
        _phase_of(dx, phase, g).copy_(image)


def _shift_wgrad(x: Tensor, dy: Tensor, d: _Decomposition, g: ConvGeometry, dvalues: Tensor) -> None:
    grid = _grid(g)
    bk, bc = dvalues.shape[1:]
    rows_last = _rows_last(_is_channels_last(x), (bk, bc))
    dy, plane = _y_plane(dy, g, grid, rows_last), _filled(x, g, grid, rows_last)
    for group in d.groups:
        m, mine = group.members, dy[group.rows]
        dw = x.new_zeros((group.blocks.stop - group.blocks.start) // m * bc, m * bk)
        for weights, cols, part in _slices(group, plane, grid, bc):
            torch.mm(part, mine[:, cols].t(), out=dw[weights])
        dvalues[group.blocks].view(m, -1, bk, bc).copy_(dw.view(-1, bc, m, bk).permute(2, 0, 3, 1))


# ---------------------------------------------------------------------- the three products


def _compute_dtype(t: Tensor, conv: bool) -> torch.dtype:
    half = t.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and not (conv and t.device.type != "cpu") else t.dtype


def _working(values: Tensor, d: _Decomposition, dtype: torch.dtype) -> Tensor:
    """The blocks in the order of the groups."""
    return (values if d.blocks is None else values.index_select(0, d.blocks)).to(dtype)


@torch.no_grad()
def fprop(x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """y [N, K, P, Q] in the memory format of x; bias [K] in filter order, or None."""
    d = _decomposition(tables, geometry, (values.shape[1], values.shape[2]))
    dtype = _compute_dtype(x, d.conv)
    if bias is not None:
        bias = (bias if d.filters is None else bias.index_select(0, d.filters)).to(dtype)
    if x.numel() == 0:
        return _empty(geometry.y_shape, x, _is_channels_last(x))
    run = _conv_fprop if d.conv else _shift_fprop
    y = run(x.to(dtype), _working(values, d, dtype), d, bias, geometry).to(x.dtype)
    return y.contiguous(memory_format=_format(_is_channels_last(x)))


@torch.no_grad()
def dgrad(
    dy: Tensor, values: Tensor, tables: IndexTables, geometry: ConvGeometry, channels_last: bool
) -> Tensor:
    """dx [N, C, H, W], channels_last or contiguous."""
    d = _decomposition(tables, geometry, (values.shape[1], values.shape[2]))
    dtype, out = _compute_dtype(dy, d.conv), _compute_dtype(dy, False)
    dx = _empty(geometry.x_shape, dy, channels_last, out).zero_()
    if dy.numel() and d.groups:
        dy = _take(dy.contiguous(memory_format=_format(channels_last)).to(dtype), d.filters)
        run = _conv_dgrad if d.conv else _shift_dgrad
        run(dy, _working(values, d, dtype), d, geometry, channels_last, dx)
    return dx.to(values.dtype)


@torch.no_grad()
def wgrad(
    x: Tensor, dy: Tensor, tables: IndexTables, geometry: ConvGeometry, values_shape: tuple[int, int, int]
) -> Tensor:
    """dvalues [nnzb, bk, bc]."""
    d = _decomposition(tables, geometry, (values_shape[1], values_shape[2]))
    dtype = _compute_dtype(x, d.conv)
    dvalues = x.new_empty(values_shape, dtype=dtype)
    if x.numel() == 0:
        return dvalues.zero_().to(x.dtype)
    dy = dy.contiguous(memory_format=_format(_is_channels_last(x)))
    run = _conv_wgrad if d.conv else _shift_wgrad
    run(x.to(dtype), _take(dy.to(dtype), d.filters), d, geometry, dvalues)
    return (dvalues if d.block_positions is None else dvalues.index_select(0, d.block_positions)).to(x.dtype)
