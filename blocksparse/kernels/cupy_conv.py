"""CUDA C++ backend: compiles the .cu files beside this one through CuPy and launches them on torch's current stream.

A kernel is instructions.cu, slots.cu and one of fprop.cu, dgrad.cu and wgrad.cu, specialised by -D per dtype, tile and
width of a block; CuPy compiles it on first use, for the device at hand, and keeps the binary on disk. All memory is
torch's, and nothing here synchronises, so that a step that has run once captures into a CUDA graph. CuPy compiles with
-ftz: fp32 numbers below 1e-38 are zero.

The kernels take strides, so any memory format is right. Contiguous is the native one for narrow blocks: pixels of one
channel are neighbours there, while channels_last makes single channels 2-byte pieces of 32-byte sectors.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..geometry import ConvGeometry
from ..index import IndexTables, Piece
from ..layout import empty, memory_format_of, new
from . import slots
from .slots import MATH, SlotTile

HERE = Path(__file__).parent

_STRIDES = [(name, np.int64) for name in ("n", "c", "h", "w")]
CONV = np.dtype(  # struct Conv of slots.cu
    [("x", _STRIDES), ("y", _STRIDES)]
    + [
        (name, np.int32)
        for name in (
            "images", "height", "width", "p_size", "q_size", "k_blocks", "c_blocks", "bk", "bc", "r_size", "s_size",
            "log_parts", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "channels_last",
            "tile_h", "tile_w", "tiles_h", "tiles_w", "taps", "step_h", "step_w", "rows", "cols", "plane", "units",
            "splits", "lists", "filters", "range",
        )
    ],
    align=True,
)  # fmt: skip


def source(kind: str) -> str:
    """The CUDA C++ of one kind; #line keeps the names of the files in messages."""
    names = "instructions.cu", "slots.cu", f"{kind}.cu"
    return "".join(f'#line 1 "{name}"\n{(HERE / name).read_text()}' for name in names)


def options(dtype: torch.dtype, bc: int, tile: SlotTile, precision: str) -> tuple[str, ...]:
    """What specialises a kernel of one kind."""
    math = MATH.get(dtype) or {"tf32": "TF32", "ieee": "FP32"}[precision]
    names = {"MATH": math, "G": slots.unit_of(bc, dtype)}
    names |= {"NT": tile.nt, "MT": tile.mt, "WARPS": tile.warps, "ITEMS": tile.items, "BANDS": tile.bands}
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in names.items()))


class Cuda:
    """Where kernels run: compiles for the tensors' device and launches there."""

    device_type = "cuda"

    def absent(self) -> str | None:
        """Why nothing can run here, or None."""
        if not torch.cuda.is_available():
            return "no CUDA device is visible to PyTorch"
        if torch.version.hip:
            return "PyTorch is built for ROCm; this backend is CUDA C++"
        try:
            import cupy
            from cupy_backends.cuda.libs import nvrtc

            nvrtc.getVersion()
            if not hasattr(cupy.cuda.Stream, "from_external"):
                return f"CuPy {cupy.__version__} is installed; this backend needs 14 or later"
        except Exception as error:  # an import, a driver or a compiler that is not there: each says so in its own way
            return f"importing CuPy failed: {error}"
        return None

    @functools.cache  # noqa: B019 the one instance lives as long as the process
    def _kernel(self, device: int, name: str, kind: str, flags: tuple[str, ...]) -> Any:
        import cupy

        kernel = cupy.RawModule(code=source(kind), options=flags).get_function(name)
        kernel.max_dynamic_shared_size_bytes = slots.SHARED_BYTES
        return kernel

    def launch(
        self, name: str, kind: str, flags: tuple[str, ...], ctas: int, threads: int, shared: int, args: tuple[Any, ...]
    ) -> None:
        """Run `name` of the kind's source. Tensors and pieces become pointers, None a null pointer."""
        import cupy

        device = next(a.device.index for a in args if isinstance(a, Tensor))
        plain = tuple(_pointer(a) for a in args)
        with torch.cuda.device(device), cupy.cuda.Device(device):
            kernel = self._kernel(device, name, kind, flags)
            # The stream of now: one kept from before would leave a captured graph empty.
            with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
                kernel((ctas,), (threads,), plain, shared_mem=shared)


def _pointer(arg: Any) -> Any:
    if arg is None:
        return np.uint64(0)
    return np.uint64(arg.data_ptr()) if isinstance(arg, Tensor | Piece) else arg


runtime: Any = Cuda()


@functools.lru_cache(maxsize=4096)
def _prepared(
    kind: str,
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    g: ConvGeometry,
    blocksize: tuple[int, int],
    dtype: torch.dtype,
    tile: SlotTile,
    precision: str,
) -> tuple[tuple[str, ...], int, np.ndarray[Any, Any]]:
    """(compiler flags, CTAs, struct Conv) of a launch, made once: they take as long as the launch itself."""
    high, wide = slots.tiled(kind, g, tile.bands)
    step_h, step_w = slots.steps(kind, g, tile.taps)
    (bk, bc), last = blocksize, x_strides[1] == 1 and x_strides[3] != 1
    log_parts = (bc // slots.unit_of(bc, dtype)).bit_length() - 1
    conv = np.array(
        (
            x_strides, y_strides,
            g.n, g.h, g.w, g.p, g.q, g.k // bk, g.c // bc, bk, bc, g.r, g.s,
            log_parts, *g.stride, *g.padding, *g.dilation, last,
            tile.tile_h, tile.tile_w, -(-high // tile.tile_h), -(-wide // tile.tile_w), tile.taps, step_h, step_w,
            tile.rows, tile.cols, tile.plane, tile.units, tile.splits, tile.lists, tile.filters, tile.range,
        ),
        CONV,
    )  # fmt: skip
    return options(dtype, bc, tile, precision), slots.grid(kind, g, blocksize, dtype, tile), conv


def _index(tables: IndexTables) -> tuple[Piece | None, Piece | None, Piece | None]:
    return tables.piece("indptr"), tables.piece("indices"), tables.piece("row_order")


def _aligned(values: Tensor) -> Tensor:
    """Values are copied to shared memory 16 bytes at a time."""
    return values if values.data_ptr() % 16 == 0 else values.clone()


def fprop(
    x: Tensor,
    values: Tensor,
    tables: IndexTables,
    bias: Tensor | None,
    geometry: ConvGeometry,
    tile: SlotTile,
    *,
    precision: str = "ieee",
) -> Tensor:
    """y = conv(x) + bias, [N, K, P, Q] in x's memory format.

    Args:
        x: [N, C, H, W].
        values: [nnzb, bk, bc], contiguous, x's dtype.
        bias: [K] in filter order, or None.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    y = new(g.y_shape, x, memory_format_of(x))
    if not values.numel() or not x.numel():
        return y.zero_() if bias is None else y.copy_(bias.view(1, -1, 1, 1))
    blocksize = values.shape[1], values.shape[2]
    flags, ctas, conv = _prepared("fprop", x.stride(), y.stride(), g, blocksize, x.dtype, tile, precision)
    indptr, indices, order = _index(tables)
    args = (x, _aligned(values), indptr, indices, bias, order, y, conv)
    runtime.launch("fprop", "fprop", flags, ctas, 32 * tile.warps, tile.shared, args)
    return y


def dgrad(
    dy: Tensor,
    values: Tensor,
    tables: IndexTables,
    geometry: ConvGeometry,
    channels_last: bool,
    tile: SlotTile,
    *,
    precision: str = "ieee",
) -> Tensor:
    """dx, [N, C, H, W], in channels_last or contiguous; every element is written, the same bits on every run.

    Args:
        dy: [N, K, P, Q].
        values: [nnzb, bk, bc], contiguous, dy's dtype.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    dx = empty(g.x_shape, dy, channels_last)
    if not values.numel() or not dx.numel():
        return dx.zero_()
    blocksize = values.shape[1], values.shape[2]
    flags, ctas, conv = _prepared("dgrad", dx.stride(), dy.stride(), g, blocksize, dy.dtype, tile, precision)
    args = (dy, _aligned(values), *_index(tables), dx, conv)
    runtime.launch("dgrad", "dgrad", flags, ctas, 32 * tile.warps, tile.shared, args)
    return dx


def wgrad(
    x: Tensor,
    dy: Tensor,
    tables: IndexTables,
    geometry: ConvGeometry,
    values_shape: tuple[int, int, int],
    tile: SlotTile,
    *,
    precision: str = "ieee",
) -> Tensor:
    """dvalues, [nnzb, bk, bc], the same bits on every run.

    Args:
        x: [N, C, H, W].
        dy: [N, K, P, Q], x's dtype.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    out = torch.empty(values_shape, dtype=x.dtype, device=x.device)
    if not out.numel() or not x.numel():
        return out.zero_()
    blocksize = values_shape[1], values_shape[2]
    flags, ctas, conv = _prepared("wgrad", x.stride(), dy.stride(), g, blocksize, x.dtype, tile, precision)
    sums = None
    if tile.splits > 1:
        sums = torch.empty((tile.splits, *values_shape), dtype=torch.float32, device=x.device)
    threads, size = 32 * tile.warps, np.int64(out.numel())
    args = (x, dy, *_index(tables), out, sums, size, conv)
    runtime.launch("wgrad", "wgrad", flags, ctas, threads, tile.shared, args)
    if sums is not None:
        ctas = -(-out.numel() // threads)
        runtime.launch("add_splits", "wgrad", flags, ctas, threads, 0, (sums, out, size, np.int32(tile.splits)))
    return out
