"""The native CPU backend: native/cpu.cpp, called on tensors as they lie, whatever their strides, without the GIL.

It keeps nothing between calls: a stored weight's offset follows from the packed index, so that a mask may change at any
time. Threads are PyTorch's own number, and its own OpenMP threads where the library finds the runtime that PyTorch
loaded. The results are the same bits for any number of them.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..geometry import ConvGeometry
from ..index import IndexTables, Layout
from ..layout import BATCH_LAST, CONTIGUOUS, memory_format_of, new
from .cpu_build import library

int64 = ctypes.c_int64
NUMBERS = {torch.float64: "double", torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class _Conv(ctypes.Structure):
    """Conv in native/call.h."""

    _fields_ = [
        *((name, int64) for name in ("n", "c", "h", "w", "k", "p", "q", "r", "s")),
        *((name, int64 * 2) for name in ("stride", "padding", "dilation")),
        *((name, int64) for name in ("bk", "bc", "nnzb")),
        *((name, int64 * 4) for name in ("x_strides", "y_strides")),
        ("threads", int64),
        ("batch_last", int64),
        *((name, int64) for name in ("indptr", "indices", "t_indptr", "t_indices", "t_perm", "row_order")),
    ]


def absent() -> str | None:
    """Why the backend cannot run here, or None; compiles it for float32 if that has not been done yet."""
    found = library(NUMBERS[torch.float32])
    return found if isinstance(found, str) else None


def parallel() -> bool:
    """Whether the products run on several threads: False where the compiler has no OpenMP."""
    lib = library(NUMBERS[torch.float32])
    return isinstance(lib, str) or bool(lib.bsr_parallel())


def peak_flops(dtype: torch.dtype) -> float | None:
    """FLOP/s of fused multiply-adds on PyTorch's number of threads, measured now; None where the backend is absent."""
    lib = library(NUMBERS[dtype])
    if isinstance(lib, str):
        return None
    lib.bsr_peak_flops.restype = ctypes.c_double
    return lib.bsr_peak_flops(int64(torch.get_num_threads()))


@lru_cache(maxsize=4096)
def _conv(
    g: ConvGeometry, blocksize: tuple[int, int], layout: Layout, x_strides: tuple[int, ...],
    y_strides: tuple[int, ...], threads: int, batch_last: bool,
) -> _Conv:  # fmt: skip
    pair, four = int64 * 2, int64 * 4
    tables = layout.indptr, layout.indices, layout.t_indptr, layout.t_indices, layout.t_perm
    return _Conv(
        g.n, g.c, g.h, g.w, g.k, g.p, g.q, g.r, g.s, pair(*g.stride), pair(*g.padding), pair(*g.dilation),
        *blocksize, layout.indices[1], four(*x_strides), four(*y_strides), threads, batch_last,
        *(start for start, _ in tables), -1 if layout.row_order is None else layout.row_order[0],
    )  # fmt: skip


def _call(
    name: str, g: ConvGeometry, blocksize: tuple[int, int], x: Tensor, y: Tensor, tables: IndexTables,
    inputs: tuple[Tensor | int | None, ...], *results: Tensor,
) -> None:  # fmt: skip
    """Run a product; inputs, the index and results are the arguments of the C function, in this order."""
    lib = library(NUMBERS[x.dtype])
    if isinstance(lib, str):
        raise RuntimeError(f"backend 'cpu' is not available: {lib}")
    last = BATCH_LAST in (memory_format_of(x), memory_format_of(y))
    conv = _conv(g, blocksize, tables.layout, x.stride(), y.stride(), torch.get_num_threads(), last)
    failed = called(getattr(lib, f"bsr_{name}"), conv, *inputs, tables.packed, *results)
    if failed == 1:
        raise MemoryError(f"{name} of {g} on backend 'cpu': no memory for the planes of an image")
    if failed:
        raise ValueError(
            f"{name} of {g} on backend 'cpu': the planes of one row of an image pass 2**31 values; use backend='torch'"
        )


def called(function: Any, sizes: ctypes.Structure, *args: Tensor | int | None) -> int:
    """What a C function returns that takes a pointer to `sizes`, then tensors as pointers, None as nullptr, int64s."""
    if function.argtypes is None:  # ctypes then converts plain numbers, in half the time that objects of its own take
        function.argtypes = [ctypes.c_void_p, *(int64 if isinstance(arg, int) else ctypes.c_void_p for arg in args)]
    return function(ctypes.byref(sizes), *[arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args])


def fprop(
    x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None, geometry: ConvGeometry,
    residual: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """y [N, K, P, Q] in the memory format of x; bias [K] in filter order, or None.

    With a residual of y's strides it is added, and with relu negative results become zero, before y leaves the cache.
    """
    y = new(geometry.y_shape, x, memory_format_of(x))
    if y.numel():
        _, bk, bc = values.shape
        _call("fprop", geometry, (bk, bc), x, y, tables, (x, values, bias, residual, int(relu)), y)
    return y


def dgrad(dy: Tensor, values: Tensor, tables: IndexTables, geometry: ConvGeometry, memory_format: str) -> Tensor:
    """dx [N, C, H, W] in this format."""
    dx = new(geometry.x_shape, dy, memory_format)
    if dx.numel():
        _, bk, bc = values.shape
        _call("dgrad", geometry, (bk, bc), dx, dy, tables, (dy, values), dx)
    return dx


def wgrad(
    x: Tensor, dy: Tensor, tables: IndexTables, geometry: ConvGeometry, values_shape: tuple[int, int, int]
) -> Tensor:
    """dvalues [nnzb, bk, bc]."""
    if not (x.numel() and dy.numel()):
        return x.new_zeros(values_shape)
    dvalues = new(values_shape, x, CONTIGUOUS)
    _, bk, bc = values_shape
    _call("wgrad", geometry, (bk, bc), x, dy, tables, (x, dy), dvalues)
    return dvalues


def gradients(
    x: Tensor, dy: Tensor, values: Tensor, tables: IndexTables, geometry: ConvGeometry, memory_format: str
) -> tuple[Tensor, Tensor]:
    """(dx, dvalues) in one call, whose cost a small layer feels."""
    dx = new(geometry.x_shape, dy, memory_format)
    if not (x.numel() and dy.numel()) or dx.stride() != x.stride():
        dx = dgrad(dy, values, tables, geometry, memory_format)
        return dx, wgrad(x, dy, tables, geometry, (values.shape[0], values.shape[1], values.shape[2]))
    dvalues = torch.empty_like(values)
    _, bk, bc = values.shape
    _call("gradients", geometry, (bk, bc), x, dy, tables, (x, dy, values), dx, dvalues)
    return dx, dvalues
