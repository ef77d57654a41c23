"""Triton backend on the host: memory, grids and launches of the kernels in triton_kernels.py and triton_wgrad.py."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..geometry import ConvGeometry
from ..index import IndexTables, stacked
from ..layout import empty, memory_format_of, new
from .tiles import Tile, granule, group_of, wgrad_tiles
from .triton_gather import INTERPRETED
from .triton_kernels import dgrad_kernel, fprop_kernel
from .triton_wgrad import wgrad_kernel


def _channels_last(t: Tensor) -> bool:
    if t.is_contiguous(memory_format=torch.channels_last):
        return True
    if t.is_contiguous():
        return False
    raise ValueError(f"triton: strides {t.stride()} of shape {tuple(t.shape)}; it needs contiguous or channels_last")


def _on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    if t.is_cpu and not INTERPRETED:
        raise RuntimeError("triton: tensors are on the CPU; set TRITON_INTERPRET=1 before Triton is imported")
    elsewhere = t.is_cuda and t.get_device() != torch.cuda.current_device()
    return torch.cuda.device(t.device) if elsewhere else contextlib.nullcontext()


_launchers: dict[tuple[object, ...], tuple[Callable[..., None], list[object]]] = {}


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    facts: tuple[object, ...],
    describe: Callable[[], tuple[int, dict[str, object]]],
) -> None:
    """kernel[(programs,)](*tensors, *numbers, **constants) on the device of the first tensor.

    Triton spends some 40 us of a launch on finding its compiled kernel. So that is kept by all that it depends on: the
    facts, the device, which tensors are None, and that every pointer is a multiple of 16; others take Triton's way.

    Args:
        numbers: offsets of the tables, factors: what no compiled kernel depends on but by being 32 or 64 bits wide.
        facts: what the constants and the dtypes of the tensors follow from.
        describe: (programs, constants), asked on the first launch.
    """
    lead = tensors[0]
    assert lead is not None
    pointers = 0
    for t in tensors:
        if t is not None:
            pointers |= t.data_ptr()
    wide = [type(number) is int and number >> 31 for number in numbers]
    key = (id(kernel), lead.get_device(), *[t is None for t in tensors], *wide, *facts)
    found = _launchers.get(key) if pointers % 16 == 0 else None
    with _on(lead):
        if found is not None:
            found[0](*tensors, *numbers, *found[1])
            return
        programs, constants = describe()
        compiled = kernel[(programs,)](*tensors, *numbers, **constants)
        if compiled is not None and pointers % 16 == 0:  # the interpreter compiles nothing
            names = list(inspect.signature(kernel.fn).parameters)[len(tensors) + len(numbers) :]
            _launchers[key] = compiled[(programs, 1, 1)], [constants[name] for name in names]


def _in_bsr_order(dy: Tensor, tables: IndexTables) -> Tensor:
    """dy with BSR row i as channel i, in dy's memory format."""
    if tables.row_order is None:
        return dy
    if not _channels_last(dy):
        return dy.index_select(1, tables.row_order)
    return dy.permute(0, 2, 3, 1).index_select(3, tables.row_order).permute(0, 3, 1, 2)


def _sizes(g: ConvGeometry, blocksize: tuple[int, int]) -> dict[str, object]:
    return {
        "height": g.h, "width": g.w, "p_size": g.p, "q_size": g.q,
        "k_blocks": g.k // blocksize[0], "c_blocks": g.c // blocksize[1],
        "stride_h": g.stride[0], "stride_w": g.stride[1], "pad_h": g.padding[0], "pad_w": g.padding[1],
        "dilation_h": g.dilation[0], "dilation_w": g.dilation[1],
        "R": g.r, "S": g.s, "BK": blocksize[0], "BC": blocksize[1],
    }  # fmt: skip


def _meta(tile: Tile, chunk: int, precision: str) -> dict[str, object]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "GRANULE": chunk, "PRECISION": precision,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def _pass(columns: int, rows: int, tile: Tile, t: Tensor) -> int:
    """Rows of a tile that all threads together fetch at once, 16 bytes each."""
    return max(1, min(rows, tile.num_warps * 32 * 16 // (columns * t.element_size())))


def fprop(
    x: Tensor,
    values: Tensor,
    tables: IndexTables,
    bias: Tensor | None,
    geometry: ConvGeometry,
    tile: Tile,
    *,
    precision: str = "ieee",
) -> Tensor:
    """y = conv(x) + bias, [N, K, P, Q] in x's memory format.

    Args:
        x: [N, C, H, W], contiguous or channels_last.
        values: [nnzb, bk, bc], contiguous, x's dtype.
        bias: [K] in filter order, or None.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    y = new(g.y_shape, x, memory_format_of(x))
    if not values.numel() or not x.numel():
        return y.zero_() if bias is None else y.copy_(bias.view(1, -1, 1, 1))
    bk, bc = values.shape[1:]
    x_last, y_last = _channels_last(x), _channels_last(y)

    def describe() -> tuple[int, dict[str, object]]:
        pixels = g.n * g.p * g.q
        constants = _sizes(g, (bk, bc)) | _meta(tile, granule(bc, tile.block_k), precision)
        constants |= {"pixels": pixels, "X_LAST": x_last, "Y_LAST": y_last}
        del constants["c_blocks"]
        constants |= {"CHANNELS": g.c, "WIDE": x.numel() >= 2**31, "LO": _pass(tile.block_k, tile.block_m, tile, x)}
        constants |= {"SAME": x_last and g.stride == (1, 1) and (g.h, g.w) == (g.p, g.q)}
        return triton.cdiv(pixels, tile.block_m) * (g.k // bk), constants

    tensors = (x, values, tables.packed, bias, tables.row_order, y)
    _launch(
        fprop_kernel,
        tensors,
        (tables.layout.indices[0],),
        (g, bk, bc, tile, precision, x.dtype, x_last, y_last),
        describe,
    )
    return y


def dgrad(
    dy: Tensor,
    values: Tensor,
    tables: IndexTables,
    geometry: ConvGeometry,
    channels_last: bool,
    tile: Tile,
    *,
    precision: str = "ieee",
) -> Tensor:
    """dx, [N, C, H, W], in channels_last or contiguous; every element is written.

    Args:
        dy: [N, K, P, Q], contiguous or channels_last.
        values: [nnzb, bk, bc], contiguous, dy's dtype.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    dx = empty(g.x_shape, dy, channels_last)
    if not values.numel() or not dx.numel():
        return dx.zero_()
    bk, bc = values.shape[1:]
    dy = _in_bsr_order(dy, tables)
    dy_last, dx_last = _channels_last(dy), _channels_last(dx)
    stack, wide = stacked(g.weight_shape, (bk, bc)), max(dy.numel(), values.numel()) >= 2**31

    def describe() -> tuple[int, dict[str, object]]:
        (sh, sw), classes = g.stride, min(g.stride[0], g.h) * min(g.stride[1], g.w)
        largest = g.n * triton.cdiv(g.h, sh) * triton.cdiv(g.w, sw)
        stacks = triton.cdiv(g.c // bc, stack)
        constants = _sizes(g, (bk, bc)) | _meta(tile, granule(bk, tile.block_k), precision)
        constants |= {"images": g.n, "STRIDED": (sh, sw) != (1, 1), "TAPS": triton.next_power_of_2(g.taps)}
        constants |= {"CHANNELS": g.k, "stacks": stacks, "STACK": stack, "DX_LAST": dx_last}
        constants |= {"SAME": dy_last and (g.h, g.w) == (g.p * sh, g.q * sw), "WIDE": wide, "DY_LAST": dy_last}
        constants |= {"LO": _pass(tile.block_k, tile.block_m, tile, dy)}
        del constants["k_blocks"]
        return triton.cdiv(largest, tile.block_m) * classes * stacks, constants

    layout = tables.layout
    found = layout.t_indptr, layout.t_indices, layout.t_perm, layout.t_perm
    if stack > 1:
        found = layout.s_indptr, layout.s_indices, layout.s_first, layout.s_ranks
    _launch(
        dgrad_kernel,
        (dy, values, tables.packed, dx),
        tuple(start for start, _ in found),
        (g, bk, bc, tile, precision, dy.dtype, wide, dy_last, dx_last),
        describe,
    )
    return dx


_counting: dict[tuple[int, int], Tensor] = {}


def _zeros(like: Tensor, size: int) -> Tensor:
    """int32 zeros that a launch on the current stream leaves as zeros: the stream's own, or the captured graph's.

    Launches on one stream run one after the other; a graph may run beside anything but itself. A buffer that becomes
    too small is given back to PyTorch, which keeps it for later launches on its stream.
    """
    with _on(like):
        if not like.is_cuda or torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.int32, device=like.device)
    key = like.get_device(), torch.cuda.current_stream(like.device).cuda_stream
    found = _counting.get(key)
    if found is None or found.numel() < size:
        found = _counting[key] = torch.zeros(max(size, 1 << 12), dtype=torch.int32, device=like.device)
    return found


def wgrad(
    x: Tensor,
    dy: Tensor,
    tables: IndexTables,
    geometry: ConvGeometry,
    values_shape: tuple[int, int, int],
    tile: Tile,
    *,
    precision: str = "ieee",
) -> Tensor:
    """dvalues, [nnzb, bk, bc], the same bits on every run.

    Args:
        x: [N, C, H, W], contiguous or channels_last.
        dy: [N, K, P, Q], contiguous or channels_last, x's dtype.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    nnzb, bk, bc = values_shape
    out = torch.empty(values_shape, dtype=x.dtype, device=x.device)
    if not out.numel() or not x.numel():
        return out.zero_()
    dy = _in_bsr_order(dy, tables)
    x_last, dy_last = _channels_last(x), _channels_last(dy)
    sums = counters = None
    wide = max(x.numel(), dy.numel(), tile.splits * out.numel()) >= 2**31
    tiles, group = wgrad_tiles(nnzb, g.k // bk, bc, tile.block_m), group_of(tile.splits)
    groups = triton.cdiv(tile.splits, group)
    if tile.splits > 1:
        sums = torch.empty((tile.splits, *values_shape), dtype=torch.float32, device=x.device)
        counters = _zeros(x, tiles * (groups + 1))

    def describe() -> tuple[int, dict[str, object]]:
        pixels = g.n * g.p * g.q
        constants = _sizes(g, (bk, bc)) | _meta(tile, granule(bc, tile.block_m), precision)
        constants |= {"pixels": pixels, "tiles": tiles, "steps": triton.cdiv(pixels, tile.block_k * tile.splits)}
        constants |= {"nnzb": nnzb, "splits": tile.splits, "width_of_group": group, "groups": groups}
        constants |= {"CHANNELS": g.c, "X_LAST": x_last, "DY_LAST": dy_last, "WIDE": wide, "FILTERS": g.k}
        constants |= {
            "LO": _pass(tile.block_m, tile.block_k, tile, x),
            "LO_DY": _pass(tile.block_n, tile.block_k, tile, x),
        }
        constants |= {"EVEN": pixels % tile.block_k == 0}
        constants |= {"SAME": x_last and g.stride == (1, 1) and (g.h, g.w) == (g.p, g.q)}
        del constants["c_blocks"]
        return tiles * tile.splits, constants

    facts = (g, values_shape, tile, precision, x.dtype, x_last, dy_last)
    tensors = (x, dy, tables.packed, sums, counters, out)
    _launch(wgrad_kernel, tensors, (tables.layout.indices[0],), facts, describe)
    return out
