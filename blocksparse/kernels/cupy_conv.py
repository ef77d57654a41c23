"""CUDA C++ backend: compiles the .cu files beside this one through CuPy and launches them on torch's current stream.

A kernel is instructions.cu, octets.cu and one of fprop.cu, dgrad.cu and wgrad.cu, specialised by -D per dtype, tile
and width of a block; CuPy compiles it on first use, for the device at hand, and keeps the binary on disk. All memory is
torch's, and nothing here synchronises, so that a step that has run once captures into a CUDA graph. CuPy compiles with
-ftz: fp32 numbers below 1e-38 are zero.

Tensors are batch_last, the images side by side: what a step copies is 16 bytes as they lie where the batch is a
multiple of 8 (fp32: of 4), and single images elsewhere. Tensors in other formats come here as copies (converted.py).
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
from ..layout import BATCH_LAST, new
from . import slots
from .slots import SlotTile

HERE = Path(__file__).parent

_STRIDES = [(name, np.int64) for name in ("c", "h", "w")]
CONV = np.dtype(  # struct Conv of octets.cu
    [("x", _STRIDES), ("y", _STRIDES)]
    + [
        (name, np.int32)
        for name in (
            "images", "height", "width", "p_size", "q_size", "k_blocks", "channels", "bk", "r_size", "s_size",
            "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w",
            "tile_h", "tile_w", "tiles_h", "tiles_w", "tiles_n", "step_h", "step_w", "rows", "cols", "plane",
            "units", "capacity", "part", "splits", "lists", "bands", "band_rows", "band_steps", "band_shift",
            "planes", "held", *slots.Layout._fields[:-1],
        )
    ],
    align=True,
)  # fmt: skip


def source(kind: str) -> str:
    """The CUDA C++ of one kind; #line keeps the names of the files in messages."""
    names = "instructions.cu", "octets.cu", f"{kind}.cu"
    return "".join(f'#line 1 "{name}"\n{(HERE / name).read_text()}' for name in names)


def options(kind: str, dtype: torch.dtype, bc: int, tile: SlotTile, precision: str, aligned: bool) -> tuple[str, ...]:
    """What specialises a kernel of one kind."""
    names: dict[str, int | str] = {"MATH": slots.math_of(dtype, precision), "BC": bc, "MT": tile.mt, "NT": tile.nt}
    names |= {"WARPS": tile.warps, "ALIGNED": int(aligned)}
    if kind == "dgrad":
        names["FILTERS"] = tile.filters
    return ("--std=c++17", f"-D{kind.upper()}", *(f"-D{name}={value}" for name, value in names.items()))


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
        kernel.max_dynamic_shared_size_bytes = cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]
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
    aligned: bool,
    g: ConvGeometry,
    blocksize: tuple[int, int],
    dtype: torch.dtype,
    tile: SlotTile,
    precision: str,
) -> tuple[tuple[str, ...], int, np.ndarray[Any, Any]]:
    """(compiler flags, CTAs, struct Conv) of a launch, made once: they take as long as the launch itself."""
    (bk, bc), in_band = blocksize, max(1, tile.filters // blocksize[0])
    conv = np.array(
        (
            x_strides[1:], y_strides[1:],
            g.n, g.h, g.w, g.p, g.q, g.k // bk, g.c, bk, g.r, g.s, *g.stride, *g.padding, *g.dilation,
            tile.tile_h, tile.tile_w, *slots.tiles_of(kind, g, tile), *slots.steps(kind, g), tile.rows, tile.cols,
            slots.plane_of(tile.rows * tile.cols, dtype), tile.units, tile.capacity, tile.part, tile.splits, tile.lists,
            slots.bands(g, bk, tile), in_band, max(1, bk // tile.filters), bk.bit_length() - 1 if in_band > 1 else 31,
            tile.planes, tile.held, *slots.layout(kind, g, blocksize, dtype, tile)[:-1],
        ),
        CONV,
    )  # fmt: skip
    slot = slots.slot_of(dtype)
    aligned = aligned and all(stride % slot == 0 for stride in (*x_strides[1:], *y_strides[1:]))
    return options(kind, dtype, bc, tile, precision, aligned), slots.grid(kind, g, blocksize, tile), conv


def _index(tables: IndexTables) -> tuple[Piece | None, Piece | None, Piece | None]:
    return tables.piece("indptr"), tables.piece("indices"), tables.piece("row_order")


def _by_channel(values: Tensor) -> Tensor:
    """Values as [block, channel, filter]: an entry's filters are copied to shared memory 16 bytes at a time."""
    if values.shape[2] > 1:
        return values.transpose(1, 2).contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


def _aligned(*tensors: Tensor) -> bool:
    return all(t.data_ptr() % 16 == 0 for t in tensors)


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
    """y = conv(x) + bias, [N, K, P, Q], batch_last.

    Args:
        x: [N, C, H, W], batch_last.
        values: [nnzb, bk, bc], contiguous, x's dtype.
        bias: [K] in filter order, or None.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    y = new(g.y_shape, x, BATCH_LAST)
    if not values.numel() or not x.numel():
        return y.zero_() if bias is None else y.copy_(bias.view(1, -1, 1, 1))
    blocksize = values.shape[1], values.shape[2]
    flags, ctas, conv = _prepared(
        "fprop", x.stride(), y.stride(), _aligned(x, y), g, blocksize, x.dtype, tile, precision
    )
    indptr, indices, order = _index(tables)
    args = (x, _by_channel(values), indptr, indices, bias, order, y, conv)
    runtime.launch("fprop", "fprop", flags, ctas, 32 * tile.warps, tile.shared, args)
    return y


def dgrad(
    dy: Tensor,
    values: Tensor,
    tables: IndexTables,
    geometry: ConvGeometry,
    tile: SlotTile,
    *,
    precision: str = "ieee",
) -> Tensor:
    """dx, [N, C, H, W], batch_last; every element is written, the same bits on every run.

    Args:
        dy: [N, K, P, Q], batch_last.
        values: [nnzb, bk, bc], contiguous, dy's dtype.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    dx = new(g.x_shape, dy, BATCH_LAST)
    if not values.numel() or not dx.numel():
        return dx.zero_()
    blocksize = values.shape[1], values.shape[2]
    flags, ctas, conv = _prepared(
        "dgrad", dx.stride(), dy.stride(), _aligned(dx, dy), g, blocksize, dy.dtype, tile, precision
    )
    sums = readers = None
    if tile.lists > 1:
        sums = torch.empty(slots.workspace(g, tile.lists) // 4, dtype=torch.float32, device=dy.device)
        readers = torch.empty(g.c, dtype=torch.int32, device=dy.device)
    threads = 32 * tile.warps
    args = (dy, _by_channel(values), *_index(tables), dx, sums, readers, conv)
    runtime.launch("dgrad", "dgrad", flags, ctas, threads, tile.shared, args)
    if tile.lists > 1:
        ctas = g.c * slots.adding(g, dy.dtype, threads)
        runtime.launch("add_shares", "dgrad", flags, ctas, threads, 0, (sums, readers, dx, conv))
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
        x: [N, C, H, W], batch_last.
        dy: [N, K, P, Q], batch_last, x's dtype.
        precision: how fp32 products are formed, "tf32" or "ieee".
    """
    g = geometry
    nnzb, bk, bc = values_shape
    out = torch.empty((nnzb, bc, bk), dtype=x.dtype, device=x.device)
    if not out.numel() or not x.numel():
        return out.zero_().transpose(1, 2).contiguous()
    flags, ctas, conv = _prepared(
        "wgrad", x.stride(), dy.stride(), _aligned(x, dy), g, (bk, bc), x.dtype, tile, precision
    )
    sums = None
    if tile.splits > 1:
        sums = torch.empty((tile.splits, *out.shape), dtype=torch.float32, device=x.device)
    threads, size = 32 * tile.warps, np.int64(out.numel())
    args = (x, dy, *_index(tables), out, sums, size, conv)
    runtime.launch("wgrad", "wgrad", flags, ctas, threads, tile.shared, args)
    if sums is not None:
        ctas = -(-out.numel() // threads)
        runtime.launch("add_splits", "wgrad", flags, ctas, threads, 0, (sums, out, size, np.int32(tile.splits)))
    return out.transpose(1, 2).contiguous()
