"""fprop, dgrad and wgrad with PyTorch operators: any device, any dtype, the default on a CPU.

Only stored blocks are multiplied, and no im2col buffer exists. The index is cut, once per mask, into groups: block-rows
that store the same blocks, side by side. A layer then runs in one of two ways:

conv   Every group stores channels x taps, and at least CONV_TAPS of the taps (HRBP, kernel and filter sparsity): a
       dense convolution over gathered channels, with zeros at the taps that are not stored. Groups alike in size make
       one grouped convolution over one gather; channel lists are padded to what the convolution is fast at.
shift  Everything else. x is copied into planes [C, H*N*pitch], one for each residue of the stride,
       whose pitch leaves zeros between image rows; images interleave row by row, so that a tap is one contiguous slice
       of the plane and image rows that are padding are skipped. Each (group, tap) is then one matrix product on that
       slice, over the stored channels: views where they form wide runs, gathered otherwise. A 1x1 convolution of stride
       1 needs no copy where x is a plane as it stands.

float16 and bfloat16 are computed in float32 wherever several operators add to one result, and throughout on a CPU.
What bounds fine random patterns is gathering and the number of calls, one for each (block-row, tap): at 10% density on
two cores (8, 1) and (8, 8) blocks run at 0.6 to 1.3 times the speed of a dense 3x3 convolution, finer ones slower.
The decomposition lives on the host: a CUDA graph captured here is not valid for another mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..geometry import ConvGeometry
from ..index import IndexTables
from ..layout import empty, format_of, is_channels_last
from . import aten_conv
from .break_even import Work

CONV_TAPS = 2 / 3  # least share of stored taps for `conv`: the rest is multiplied by zeros
PADDING = 1.25  # most that padding channel lists to one length may add before groups run one by one
CHUNK_PIXELS = 12288  # pixels worked on at a time on a CPU: planes that stay in its caches
IMAGE_PIXELS = 512  # least pixels that make one image worth products of its own
RUN_CHANNELS = 32  # neighbouring channels worth a product of their own instead of a gather


# ---------------------------------------------------------------------- the decomposition of an index


class _Part(NamedTuple):
    """Consecutive blocks of a group that share a tap; their channels are a range or a gather list."""

    tap: int
    blocks: slice  # within the group
    channels: slice | Tensor


class _Group(NamedTuple):
    """Block-rows that store the same blocks. Rows and blocks count in working order: groups one after the other."""

    rows: slice
    blocks: slice
    members: int  # block-rows
    taps: Tensor | None  # int64 stored taps, ascending; None: all
    channels: slice | Tensor | None  # when they are the same for every stored tap
    parts: list[_Part]


class _Batch(NamedTuple):
    """Neighbouring groups of equally many rows: one grouped convolution over the channels of all of them.

    Each group has `width` entries in `channels`; shorter lists repeat a channel of theirs, with zero weights. `wide` is
    the same with a width that is a multiple of eight. `filters` are the groups again, merged into one where their
    filters have one shape, so that these are copied at once.
    """

    groups: int
    filters: list[_Group]
    rows: slice
    channels: slice | Tensor
    width: int
    wide: slice | Tensor
    wide_width: int

    def lists(self, x: Tensor, g: ConvGeometry) -> tuple[slice | Tensor, int]:
        """(channels, width) for inputs like x. Contiguous 3x3 and larger, and GPUs, are much faster at eights."""
        exact = x.device.type == "cpu" and (g.taps == 1 or is_channels_last(x))
        return (self.channels, self.width) if exact else (self.wide, self.wide_width)


@dataclass(frozen=True)
class _Decomposition:
    groups: list[_Group]
    batches: list[_Batch]  # of `conv`
    filters: Tensor | None  # [K] filter of each working row; None: identity
    positions: Tensor | None  # its inverse
    blocks: Tensor | None  # [nnzb] stored block of each working block; None: identity
    block_positions: Tensor | None  # its inverse
    conv_work: Work  # of `conv`
    shift_work: Work  # of `shift`, for one chunk of images

    def conv(self, g: ConvGeometry) -> bool:
        return bool(self.batches) and (g.taps > 1 or g.padding == (0, 0))


def _order(order: np.ndarray, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """A permutation and its inverse on `device`; (None, None) for the identity."""
    if np.array_equal(order, np.arange(order.size)):
        return None, None
    inverse = np.argsort(order)
    return torch.from_numpy(order.astype(np.int32)).to(device), torch.from_numpy(inverse.astype(np.int32)).to(device)


def _members(indptr: np.ndarray, indices: np.ndarray) -> list[list[int]]:
    """Non-empty block-rows that store the same blocks, in order of their first member."""
    classes: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(np.diff(indptr)).tolist():
        classes.setdefault(indices[indptr[row] : indptr[row + 1]].tobytes(), []).append(row)
    return list(classes.values())


def _shared_channels(cols: np.ndarray, taps: int, listed: Tensor, bc: int) -> slice | Tensor | None:
    """The channels of a group if its taps all store the same ones; `listed` are those of the first."""
    first = cols.size // taps
    # Within a tap blocks ascend, so that equal rows of `first` blocks can only be one tap each.
    if cols.size % taps or (cols.reshape(taps, first) != cols[:first]).any():
        return None
    start = int(cols[0])
    if int(cols[first - 1]) - start + 1 == first:
        return slice(start * bc, (start + first) * bc)
    return listed


def _batches(groups: list[_Group], device: torch.device) -> list[_Batch]:
    """One batch of all groups if they have equally many rows and lists of about the same length, else one each."""
    rows, widths = ({_length(group.rows) for group in groups}, [_width(group) for group in groups])
    together = len(rows) == 1 and len(groups) * max(widths) <= PADDING * sum(widths)
    return [_batch(part, device) for part in ([groups] if together else [[group] for group in groups])]


def _batch(groups: list[_Group], device: torch.device) -> _Batch:
    width = max(_width(group) for group in groups)
    wide = -(-width // 8) * 8
    first, last = groups[0], groups[-1]
    rows = slice(first.rows.start, last.rows.stop)
    filters = groups
    if all(group.taps is None and _width(group) == width for group in groups):
        members = sum(group.members for group in groups)
        filters = [_Group(rows, slice(first.blocks.start, last.blocks.stop), members, None, first.channels, [])]
    return _Batch(
        len(groups), filters, rows, _padded(groups, width, device), width, _padded(groups, wide, device), wide
    )


def _padded(groups: list[_Group], width: int, device: torch.device) -> slice | Tensor:
    """The channels of all groups one after the other, `width` of each."""
    first = groups[0].channels
    if len(groups) == 1 and isinstance(first, slice) and _length(first) == width:
        return first
    lists = []
    for group in groups:
        channels = group.channels
        if isinstance(channels, slice):
            channels = torch.arange(channels.start, channels.stop, dtype=torch.int32, device=device)
        assert channels is not None
        lists.append(torch.cat([channels, channels[:1].expand(width - channels.numel())]))
    return torch.cat(lists).long()  # index_add_ over the last axis is several times slower with int32


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _width(group: _Group) -> int:
    assert group.channels is not None
    return _length(group.channels) if isinstance(group.channels, slice) else group.channels.numel()


def _decompose(
    indptr: np.ndarray,
    indices: np.ndarray,
    row_order: np.ndarray | None,
    weight_shape: tuple[int, int, int, int],
    blocksize: tuple[int, int],
    device: torch.device,
) -> _Decomposition:
    _, c, r, s = weight_shape
    bk, bc = blocksize
    all_taps, all_cols = np.divmod(indices, c // bc)
    listed = torch.from_numpy((all_cols[:, None] * bc + np.arange(bc, dtype=np.int32)).ravel()).to(device)
    # Blocks of one block-row and tap make a segment, neighbours within it a run.
    new_row = np.zeros(indices.size, dtype=bool)
    new_row[indptr[:-1][np.diff(indptr) > 0]] = True
    new_tap = new_row | (np.diff(all_taps, prepend=-1) != 0)
    new_run = new_tap | (np.diff(all_cols, prepend=-1) != 1)
    segments, runs = (np.flatnonzero(cut) for cut in (new_tap, new_run))
    first_segment, first_run = np.searchsorted(segments, indptr).tolist(), np.searchsorted(runs, segments).tolist()
    first_run.append(runs.size)
    taps_of = all_taps[segments].tolist()
    lists = listed.split((np.diff(segments, append=indices.size) * bc).tolist())
    segment_at, run_at, run_col = (
        [*segments.tolist(), indices.size],
        [*runs.tolist(), indices.size],
        all_cols[runs].tolist(),
    )

    groups: list[_Group] = []
    row_of: list[int] = []
    block_of: list[np.ndarray] = [np.arange(0)]
    conv = True
    rows_done = blocks_done = 0
    for members in _members(indptr, indices):
        start, stop = int(indptr[members[0]]), int(indptr[members[0] + 1])
        mine = range(first_segment[members[0]], first_segment[members[0] + 1])
        taps = taps_of[mine.start : mine.stop]
        channels = _shared_channels(all_cols[start:stop], len(taps), lists[mine.start], bc)
        parts: list[_Part] = []
        for i in mine:
            lo, hi, cuts = segment_at[i], segment_at[i + 1], range(first_run[i], first_run[i + 1])
            if len(cuts) > 1 and (hi - lo) * bc < RUN_CHANNELS * len(cuts):  # one gather
                parts.append(_Part(taps_of[i], slice(lo - start, hi - start), lists[i]))
                continue
            for j in cuts:  # a view of each wide run
                a, b, col = run_at[j], run_at[j + 1], run_col[j]
                parts.append(_Part(taps_of[i], slice(a - start, b - start), slice(col * bc, (col + b - a) * bc)))
        rows = slice(rows_done, rows_done + len(members) * bk)
        blocks = slice(blocks_done, blocks_done + len(members) * (stop - start))
        tap_list = None if len(taps) == r * s else torch.tensor(taps).to(device)
        groups.append(_Group(rows, blocks, len(members), tap_list, channels, parts))
        conv = conv and channels is not None and len(taps) >= CONV_TAPS * r * s
        rows_done, blocks_done = rows.stop, blocks.stop
        row_of += members
        block_of += [np.arange(indptr[row], indptr[row + 1]) for row in members]

    row_of += np.flatnonzero(np.diff(indptr) == 0).tolist()
    bsr_rows = (np.asarray(row_of, dtype=np.int64)[:, None] * bk + np.arange(bk)).ravel()
    filters, positions = _order(bsr_rows if row_order is None else row_order[bsr_rows], device)
    blocks_of_groups, block_positions = _order(np.concatenate(block_of), device)
    batches = _batches(groups, device) if conv and groups else []
    if r * s == 1 and len(batches) > 1:  # `shift` is faster than many small convolutions there
        batches = []
    works = _conv_work(batches, weight_shape), _shift_work(groups, bc)
    return _Decomposition(groups, batches, filters, positions, blocks_of_groups, block_positions, *works)


def _conv_work(batches: list[_Batch], weight_shape: tuple[int, int, int, int]) -> Work:
    k, _, r, s = weight_shape
    gathered = sum(batch.groups * batch.width for batch in batches if isinstance(batch.channels, Tensor))
    weights = sum(_length(batch.rows) * batch.width for batch in batches) * r * s
    return Work(True, len(batches), gathered, k, weights)


def _shift_work(groups: list[_Group], bc: int) -> Work:
    calls = gathered = moved = weights = 0
    for group in groups:
        rows = _length(group.rows)
        if isinstance(group.channels, Tensor):
            gathered += group.channels.numel()
        for part in group.parts:
            channels = _length(part.blocks) * bc
            calls, moved, weights = calls + 1, moved + rows + channels, weights + rows * channels
            if group.channels is None and isinstance(part.channels, Tensor):
                gathered += channels
    return Work(False, calls, gathered, moved, weights)


class _Cached(NamedTuple):
    key: tuple[object, ...]
    proof: tuple[Tensor | None, ...] | int  # what the index was: a copy, or its version
    decomposition: _Decomposition


# No lock: another thread may hold it while this process forks, and the child would wait for it for ever. Each access is
# one look-up or one assignment of a dictionary; two threads that miss at once both decompose, and the last one stays.
_cache = WeakTensorKeyDictionary()


def _same(now: tuple[Tensor | None, ...], then: tuple[Tensor | None, ...]) -> bool:
    pairs = zip(now, then, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def _decomposition(tables: IndexTables, geometry: ConvGeometry, blocksize: tuple[int, int]) -> _Decomposition:
    """The decomposition of this index; cached by the packed tensor for as long as its content is provably the same.

    Masks change in place. On a CPU the content itself is compared; elsewhere, where that would synchronise, the
    tensor's version, and a tensor without one (made in inference mode) is decomposed at each call.
    """
    packed, key = tables.packed, (geometry.weight_shape, blocksize)
    index = (tables.indptr, tables.indices, tables.row_order)
    on_cpu = packed.device.type == "cpu"
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
    indptr, indices, row_order = (None if t is None else t.numpy() for t in copy)
    assert indptr is not None
    assert indices is not None
    made = _decompose(indptr, indices, row_order, *key, packed.device)
    proof = copy if on_cpu else version
    if proof is not None:
        _cache[packed] = _Cached(key, proof, made)
    return made


# ---------------------------------------------------------------------- channels of a 4-d tensor


def _pixels(t: Tensor) -> Tensor:
    """A channels_last [N, C, H, W] as the matrix [N*H*W, C]."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _take(t: Tensor, channels: slice | Tensor | None) -> Tensor:
    """The listed channels of a contiguous or channels_last t, in the same format; a slice is a view."""
    if channels is None:
        return t
    if isinstance(channels, slice):
        return t[:, channels]
    if is_channels_last(t):
        n, _, h, w = t.shape
        return _pixels(t).index_select(1, channels).view(n, h, w, -1).permute(0, 3, 1, 2)
    return t.index_select(1, channels)


def _add(t: Tensor, channels: slice | Tensor, part: Tensor) -> None:
    """Adds `part` to the listed channels of t, both in t's format."""
    if isinstance(channels, slice):
        t[:, channels].add_(part)
    elif is_channels_last(t):
        _pixels(t).index_add_(1, channels, _pixels(part))
    else:
        t.index_add_(1, channels, part)


# ---------------------------------------------------------------------- conv: one grouped convolution a batch


def _filters(w: Tensor, batch: _Batch, group: _Group, blocksize: tuple[int, int]) -> Tensor:
    """The group's share of the batch's filters `w` [rows, width, R, S] as [members, bk, blocks a tap, bc, taps]."""
    bk, bc = blocksize
    start = group.rows.start - batch.rows.start
    mine = w[start : start + _length(group.rows), : _width(group)]
    return mine.unflatten(0, (-1, bk)).unflatten(2, (-1, bc)).flatten(4)


def _kernel(values: Tensor, batch: _Batch, width: int, g: ConvGeometry, channels_last: bool) -> Tensor:
    """The batch's filters [rows, width, R, S]: zero at taps that a group does not store, and at padded channels."""
    bk, bc = values.shape[1:]
    w = empty((_length(batch.rows), width, g.r, g.s), values, channels_last).zero_()
    for group in batch.filters:
        mine = _filters(w, batch, group, (bk, bc))
        taps = g.taps if group.taps is None else group.taps.numel()
        blocks = values[group.blocks].view(group.members, taps, -1, bk, bc).permute(0, 3, 2, 4, 1)
        if group.taps is None:
            mine.copy_(blocks)
        else:
            mine.index_copy_(4, group.taps, blocks)
    return w


def _conv_fprop(x: Tensor, values: Tensor, d: _Decomposition, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    last, done = is_channels_last(x), d.batches[-1].rows.stop
    parts = []
    for batch in d.batches:
        channels, width = batch.lists(x, g)
        w, b = _kernel(values, batch, width, g, last), None if bias is None else bias[batch.rows]
        parts.append(aten_conv.fprop(_take(x, channels), w, b, g, batch.groups))
    if len(parts) == 1 and done == g.k:
        return _take(parts[0], d.positions)
    y = empty(g.y_shape, x, last)
    for batch, part in zip(d.batches, parts, strict=True):
        y[:, batch.rows] = part
    y[:, done:] = 0 if bias is None else bias[done:].view(-1, 1, 1)
    return _take(y, d.positions)


def _conv_dgrad(dy: Tensor, values: Tensor, d: _Decomposition, g: ConvGeometry, last: bool, dx: Tensor) -> None:
    for batch in d.batches:
        channels, width = batch.lists(dx, g)
        w = _kernel(values, batch, width, g, last)
        part = aten_conv.dgrad(dy[:, batch.rows], w, g, batch.groups, is_channels_last(dx))
        _add(dx, channels, part.to(dx.dtype))


def _conv_wgrad(x: Tensor, dy: Tensor, d: _Decomposition, g: ConvGeometry, dvalues: Tensor) -> None:
    bk, bc = dvalues.shape[1:]
    for batch in d.batches:
        channels, _ = batch.lists(x, g)
        dw = aten_conv.wgrad(_take(x, channels), dy[:, batch.rows], g, batch.groups)
        for group in batch.filters:
            mine = _filters(dw, batch, group, (bk, bc))
            mine = mine if group.taps is None else mine.index_select(4, group.taps)
            blocks = mine.permute(0, 4, 2, 1, 3)
            dvalues[group.blocks].view(blocks.shape).copy_(blocks)


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


def _pointwise(g: ConvGeometry) -> bool:
    return g.taps == 1 and g.stride == (1, 1) and g.padding == (0, 0)


def _own_plane(t: Tensor, like: Tensor, g: ConvGeometry, rows_last: bool) -> Tensor | None:
    """The plane that t [N, C, H, W] is already, where a 1x1 convolution of stride 1 needs no zeros between rows."""
    if not _pointwise(g) or g.n > 1 or t.dtype != like.dtype:
        return None
    if rows_last:
        return _pixels(t).t()
    return t[0].flatten(1) if t.is_contiguous() else None


def _image(plane: Tensor, n: int, h: int, w: int, start: int, pitch: int) -> Tensor:
    """The [N, C, h, w] that lies in a plane from `start`."""
    rows = plane[:, start : start + h * n * pitch].unflatten(1, (h, n, pitch))
    return rows[..., :w].permute(2, 0, 1, 3)


def _phase_of(x: Tensor, phase: tuple[int, int], g: ConvGeometry) -> Tensor:
    return x[:, :, phase[0] :: g.stride[0], phase[1] :: g.stride[1]]


class _XPlanes(dict[tuple[int, int], Tensor]):
    """The planes of x, each made when first asked for: its phase of x (`fill`), or zeros to add to."""

    def __init__(self, x: Tensor, like: Tensor, g: ConvGeometry, rows_last: bool, fill: bool) -> None:
        super().__init__()
        self._x, self._like, self._g, self._rows_last, self._fill = x, like, g, rows_last, fill

    def __missing__(self, phase: tuple[int, int]) -> Tensor:
        g, grid = self._g, _grid(self._g)
        own = _own_plane(self._x, self._like, g, self._rows_last)
        if own is not None:
            self[phase] = own
            return own
        h = _phase_of(self._x, phase, g).shape[2]
        self[phase] = _new_plane(self._like, g.c, grid.lead + h * g.n * grid.pitch + grid.tail, self._rows_last)
        if self._fill:
            self._image(phase).copy_(_phase_of(self._x, phase, g))
        return self[phase]

    def _image(self, phase: tuple[int, int]) -> Tensor:
        h, w = _phase_of(self._x, phase, self._g).shape[2:]
        return _image(self[phase], self._g.n, h, w, _grid(self._g).lead, _grid(self._g).pitch)

    def write_back(self) -> None:
        for phase, plane in self.items():
            if plane.untyped_storage().data_ptr() != self._x.untyped_storage().data_ptr():
                _phase_of(self._x, phase, self._g).copy_(self._image(phase))


def _y_plane(dy: Tensor, like: Tensor, d: _Decomposition, g: ConvGeometry, rows_last: bool) -> Tensor:
    """dy in working order; zeros in the columns between its image rows."""
    if d.filters is None and (own := _own_plane(dy, like, g, rows_last)) is not None:
        return own
    grid = _grid(g)
    plane = _new_plane(like, g.k, g.p * g.n * grid.pitch, rows_last)
    _image(plane, g.n, g.p, g.q, 0, grid.pitch).copy_(_take(dy, d.filters))
    return plane


def _rows(plane: Tensor, channels: slice | Tensor) -> Tensor:
    """The listed channels of a plane, stored like it: a view of a slice, a copy of a list."""
    if isinstance(channels, slice):
        return plane[channels]
    if plane.stride(1) == 1:
        return plane.index_select(0, channels)
    return plane.t().index_select(1, channels).t()


def _products(group: _Group, x: _XPlanes, grid: _Grid, bc: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of the group's matrix, columns of y, rows of x) of every matrix product of a group."""
    gathered: dict[tuple[int, int], Tensor] = {}  # channels that all taps share are gathered once
    for part in group.parts:
        tap = grid.taps[part.tap]
        if tap is None:
            continue
        cols = slice(tap.x_start, tap.x_start + tap.length)
        if isinstance(part.channels, slice) or group.channels is None:
            rows = _rows(x[tap.phase][:, cols], part.channels)
        else:
            if tap.phase not in gathered:
                gathered[tap.phase] = _rows(x[tap.phase], group.channels)
            rows = gathered[tap.phase][:, cols]
        weights = slice(part.blocks.start * bc, part.blocks.stop * bc)
        yield weights, slice(tap.y_start, tap.y_start + tap.length), rows


def _matrix(values: Tensor, group: _Group) -> Tensor:
    """The group's weights [blocks*bc, members*bk], so that consecutive blocks are consecutive rows."""
    bk, bc = values.shape[1:]
    return values[group.blocks].view(group.members, -1, bk, bc).permute(1, 3, 0, 2).reshape(-1, group.members * bk)


def _rows_last(channels_last: bool, blocksize: torch.Size) -> bool:
    return channels_last and min(blocksize) >= RUN_CHANNELS  # thin products and gathers want long rows


def _chunk_images(g: ConvGeometry, device: torch.device, rows_last: bool) -> int:
    """Images to work on at a time, on a CPU so few that their planes stay in its cache."""
    pixels = max(g.h, g.p) * max(g.w, g.q)
    if _pointwise(g) and not rows_last and pixels >= IMAGE_PIXELS:
        return 1  # see _own_plane
    return max(1, g.n if device.type != "cpu" else CHUNK_PIXELS // pixels)


def _chunks(g: ConvGeometry, device: torch.device, rows_last: bool) -> Iterator[tuple[slice, ConvGeometry]]:
    """Images to work on at a time, and the geometry of that part.

    A 1x1 convolution of stride 1 sees images in channels_last as one tall image.
    """
    n = _chunk_images(g, device, rows_last)
    for start in range(0, g.n, n):
        stop = min(g.n, start + n)
        part = replace(g, n=stop - start)
        if rows_last and _pointwise(g):
            part = replace(g, n=1, h=part.n * g.h)
        yield slice(start, stop), part


def _images(t: Tensor, images: slice, g: ConvGeometry) -> Tensor:
    """These images of t; as one tall image where g counts them so (t is channels_last then)."""
    part = t[images]
    n, c, h, w = part.shape
    return part if n == g.n else part.permute(0, 2, 3, 1).view(1, n * h, w, c).permute(0, 3, 1, 2)


def _shift_fprop(x: Tensor, values: Tensor, d: _Decomposition, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    bc, last = values.shape[2], is_channels_last(x)
    rows_last = _rows_last(last, values.shape[1:])
    y = empty(geometry.y_shape, x, last)
    matrices = [_matrix(values, group) for group in d.groups]
    for images, g in _chunks(geometry, x.device, rows_last):
        grid, planes = _grid(g), _XPlanes(_images(x, images, g), values, g, rows_last, fill=True)
        own = None if d.positions is not None else _own_plane(_images(y, images, g), values, g, rows_last)
        out = _new_plane(values, g.k, g.p * g.n * grid.pitch, rows_last) if own is None else own.zero_()
        if bias is not None:
            out.copy_(bias[:, None])
        for group, w in zip(d.groups, matrices, strict=True):
            mine = out[group.rows]
            for weights, cols, part in _products(group, planes, grid, bc):
                mine[:, cols].addmm_(w[weights].t(), part)
        if own is not None:
            continue
        if d.positions is not None:
            out = _rows(out, d.positions)
        _images(y, images, g).copy_(_image(out, g.n, g.p, g.q, 0, grid.pitch))
    return y


def _shift_dgrad(dy: Tensor, values: Tensor, d: _Decomposition, geometry: ConvGeometry, dx: Tensor) -> None:
    rows_last = _rows_last(is_channels_last(dx), values.shape[1:])
    matrices = [_matrix(values, group) for group in d.groups]
    for images, g in _chunks(geometry, dy.device, rows_last):
        planes = _XPlanes(_images(dx, images, g), values, g, rows_last, fill=False)
        y = _y_plane(_images(dy, images, g), values, d, g, rows_last)
        for group, w in zip(d.groups, matrices, strict=True):
            _add_group(planes, y[group.rows], w, group, _grid(g), values.shape[2])
        planes.write_back()


def _add_group(planes: _XPlanes, y: Tensor, w: Tensor, group: _Group, grid: _Grid, bc: int) -> None:
    """Adds one group's share of dx to the planes."""
    shared: dict[tuple[int, int], Tensor] = {}  # channels that all taps share are scattered once
    for part in group.parts:
        tap = grid.taps[part.tap]
        if tap is None:
            continue
        plane, cols = planes[tap.phase], slice(tap.x_start, tap.x_start + tap.length)
        weights = w[part.blocks.start * bc : part.blocks.stop * bc]
        source = y[:, tap.y_start : tap.y_start + tap.length]
        if isinstance(part.channels, slice):
            plane[part.channels, cols].addmm_(weights, source)
        elif group.channels is None:
            rows_last = plane.stride(1) != 1
            product = torch.mm(source.t(), weights.t()).t() if rows_last else torch.mm(weights, source)
            plane[:, cols].index_add_(0, part.channels, product)
        else:
            if tap.phase not in shared:
                shared[tap.phase] = _new_plane(plane, weights.shape[0], plane.shape[1], plane.stride(1) != 1)
            shared[tap.phase][:, cols].addmm_(weights, source)
    for phase, total in shared.items():
        assert isinstance(group.channels, Tensor)
        planes[phase].index_add_(0, group.channels, total)


def _shift_wgrad(x: Tensor, dy: Tensor, d: _Decomposition, geometry: ConvGeometry, dvalues: Tensor) -> None:
    bk, bc = dvalues.shape[1:]
    rows_last = _rows_last(is_channels_last(x), dvalues.shape[1:])
    sums = [
        dvalues.new_zeros((group.blocks.stop - group.blocks.start) // group.members * bc, group.members * bk)
        for group in d.groups
    ]
    for images, g in _chunks(geometry, x.device, rows_last):
        planes = _XPlanes(_images(x, images, g), dvalues, g, rows_last, fill=True)
        y = _y_plane(_images(dy, images, g), dvalues, d, g, rows_last)
        for group, dw in zip(d.groups, sums, strict=True):
            mine = y[group.rows]
            for weights, cols, part in _products(group, planes, _grid(g), bc):
                dw[weights].addmm_(part, mine[:, cols].t())
    for group, dw in zip(d.groups, sums, strict=True):
        blocks = dw.view(-1, bc, group.members, bk).permute(2, 0, 3, 1)
        dvalues[group.blocks].view(group.members, -1, bk, bc).copy_(blocks)


# ---------------------------------------------------------------------- the three products


def compute_dtype(t: Tensor, conv: bool) -> torch.dtype:
    """float32 for the 16-bit types, but for single convolutions on devices that are fast at them."""
    half = t.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and (t.device.type == "cpu" or not conv) else t.dtype


def _working(values: Tensor, d: _Decomposition, dtype: torch.dtype) -> Tensor:
    """The blocks in the order of the groups."""
    return (values if d.blocks is None else values.index_select(0, d.blocks)).to(dtype)


def work(tables: IndexTables, g: ConvGeometry, blocksize: tuple[int, int]) -> Work:
    """What the products of this mask come to."""
    d = _decomposition(tables, g, blocksize)
    if d.conv(g):
        return d.conv_work
    chunks = -(-g.n // _chunk_images(g, torch.device("cpu"), rows_last=False))
    return d.shift_work._replace(calls=d.shift_work.calls * chunks)


def _pixels_read(x: Tensor, g: ConvGeometry, channels_last: bool) -> Tensor:
    """The pixels of x that are read at all, once for all batches that gather from them."""
    return aten_conv.pixels_read(x, g).contiguous(memory_format=format_of(channels_last))


@torch.no_grad()
def fprop(x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """y [N, K, P, Q] in the memory format of x; bias [K] in filter order, or None."""
    d = _decomposition(tables, geometry, (values.shape[1], values.shape[2]))
    last, conv = is_channels_last(x), d.conv(geometry)
    dtype = compute_dtype(x, conv)
    if x.numel() == 0:
        return aten_conv.bias_alone(geometry.y_shape, x, bias, last)
    if bias is not None:
        bias = (bias if d.filters is None else bias.index_select(0, d.filters)).to(dtype)
    values = _working(values, d, dtype)
    if not conv:
        return _shift_fprop(x, values, d, bias, geometry)
    read, g = _pixels_read(x, geometry, last), aten_conv.dense_steps(geometry)
    y = _conv_fprop(read.to(dtype), values, d, bias, g).to(x.dtype)
    return y.contiguous(memory_format=format_of(last))


@torch.no_grad()
def dgrad(dy: Tensor, values: Tensor, tables: IndexTables, geometry: ConvGeometry, channels_last: bool) -> Tensor:
    """dx [N, C, H, W], channels_last or contiguous."""
    d = _decomposition(tables, geometry, (values.shape[1], values.shape[2]))
    conv = d.conv(geometry)
    dtype = compute_dtype(dy, conv)
    sums = compute_dtype(dy, False) if conv else dy.dtype  # `conv` adds its groups up in dx itself
    dx = empty(geometry.x_shape, dy, channels_last, sums).zero_()
    if dy.numel():
        dy, values = dy.contiguous(memory_format=format_of(channels_last)), _working(values, d, dtype)
        if conv:
            g = aten_conv.dense_steps(geometry)
            read = dx if g is geometry else empty(g.x_shape, dx, channels_last).zero_()
            _conv_dgrad(_take(dy.to(dtype), d.filters), values, d, g, channels_last, read)
            if read is not dx:
                aten_conv.pixels_read(dx, geometry).copy_(read)
        else:
            _shift_dgrad(dy, values, d, geometry, dx)
    return dx.to(dy.dtype)


@torch.no_grad()
def wgrad(
    x: Tensor, dy: Tensor, tables: IndexTables, geometry: ConvGeometry, values_shape: tuple[int, int, int]
) -> Tensor:
    """dvalues [nnzb, bk, bc]."""
    d = _decomposition(tables, geometry, (values_shape[1], values_shape[2]))
    conv = d.conv(geometry)
    dtype = compute_dtype(x, conv)
    dvalues = x.new_empty(values_shape, dtype=dtype)
    if x.numel() == 0:
        return dvalues.zero_().to(x.dtype)
    dy = dy.contiguous(memory_format=format_of(is_channels_last(x)))
    if conv:
        read, g = _pixels_read(x, geometry, is_channels_last(x)), aten_conv.dense_steps(geometry)
        _conv_wgrad(read.to(dtype), _take(dy.to(dtype), d.filters), d, g, dvalues)
    else:
        _shift_wgrad(x, dy, d, geometry, dvalues)
    return (dvalues if d.block_positions is None else dvalues.index_select(0, d.block_positions)).to(x.dtype)
