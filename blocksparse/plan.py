"""ConvPlan: which backend and tiles run a convolution, why, and what that costs.

A plan depends on static facts alone (geometry, blocksize, nnzb, dtype, device, precision), never on which blocks are
stored, so that it outlives mask updates and is safe to capture in a CUDA graph. One choice looks at the mask, on a CPU
alone: whether the dense product would be faster there.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .geometry import ConvGeometry, conv_pairs
from .index import IndexTables, packed_size, unpack
from .kernels import break_even, slots, tiles
from .pattern import BSRPattern, check_is_pattern
from .pattern_checks import check_strided

BACKENDS = ("torch", "cpu", "triton", "cupy", "dense")


def available_backends() -> dict[str, str | None]:
    """{backend: None if it can run here, else why not}. torch and dense run everywhere; others load when asked for."""
    return {name: _absent(name) for name in BACKENDS}


def _absent(backend: str) -> str | None:
    if backend in ("torch", "dense"):
        return None
    if backend == "cpu":
        return _plain("cpu").absent()
    if backend == "cupy":
        return _cupy_conv().runtime.absent()
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "no CUDA device is visible to PyTorch"
            " (TRITON_INTERPRET=1 in the environment runs the kernels in Triton's interpreter on the CPU, for tests)"
        )
    loaded = _load_triton()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _load_triton() -> ModuleType | str:
    """The Triton backend, or why it cannot be imported; loaded on first use."""
    try:
        return importlib.import_module(".kernels.triton_conv", __package__)
    except ImportError as error:
        return f"importing Triton failed: {error}"


@dataclass(frozen=True)
class ConvPlan:
    """What will run for one convolution. `print(plan)` tells a person; the fields tell a program.

    Attributes:
        backend: "torch", "cpu", "triton", "cupy" or "dense".
        why: why this backend.
        free: no backend was asked for.
        tiles: {kind: Tile, or SlotTile of the cupy backend} of a backend that tiles, else {}.
        precision: how fp32 products are rounded: "tf32" or "ieee" (torch.backends.cudnn.conv.fp32_precision).
        flops: floating-point operations of one kind on the stored blocks; dense_flops: on all of them.
        bytes_moved: {kind: bytes} of x, y, values and index, each counted once.
    """

    geometry: ConvGeometry
    blocksize: tuple[int, int]
    nnzb: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    why: str
    tiles: dict[str, tiles.Tile] | dict[str, slots.SlotTile]
    precision: str
    free: bool

    def on(self, tables: IndexTables) -> ConvPlan:
        """The plan for this mask: on a CPU the dense product where that is estimated to be faster."""
        if not (self.free and self.backend == "torch" and self.device.type == "cpu"):
            return self
        work = _torch_conv().work(tables, self.geometry, self.blocksize)
        stored = self.nnzb * self.blocksize[0] * self.blocksize[1]
        dense = break_even.dense_is_faster(self.geometry, work, stored, torch.get_num_threads())
        return self._as_dense() if dense else self

    def _as_dense(self) -> ConvPlan:
        """The same with the dense product, made once. Not a cached_property: up to Python 3.11 that holds a lock.

        A process that forks while another thread holds a lock leaves it locked in the child for ever.
        """
        made: ConvPlan | None = self.__dict__.get("_dense")
        if made is None:
            made = replace(self, backend="dense", why="estimated to be faster here than this mask's blocks")
            self.__dict__["_dense"] = made
        return made

    @property
    def flops(self) -> int:
        return self._flops_at(self.nnzb * self.blocksize[0] * self.blocksize[1])

    @property
    def dense_flops(self) -> int:
        return self._flops_at(self.geometry.k * self.geometry.c * self.geometry.taps)

    def _flops_at(self, weights: int) -> int:
        return 2 * self.geometry.n * self.geometry.p * self.geometry.q * weights

    @property
    def bytes_moved(self) -> dict[str, int]:
        g, item = self.geometry, self.dtype.itemsize
        activations = (g.n * g.c * g.h * g.w + g.n * g.k * g.p * g.q) * item
        values = self.nnzb * self.blocksize[0] * self.blocksize[1] * item
        index = 4 * packed_size(g.weight_shape, self.blocksize, self.nnzb, row_order=False)
        return dict.fromkeys(tiles.KINDS, activations + values + index)

    def fprop(self, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None) -> Tensor:
        if not self.tiles:
            return _plain(self.backend).fprop(x, values, tables, bias, self.geometry)
        tile = self.tiles["fprop"]
        return _tiled(self.backend).fprop(x, values, tables, bias, self.geometry, tile, precision=self.precision)

    def dgrad(self, dy: Tensor, values: Tensor, tables: IndexTables, channels_last: bool) -> Tensor:
        if not self.tiles:
            return _plain(self.backend).dgrad(dy, values, tables, self.geometry, channels_last)
        tile = self.tiles["dgrad"]
        return _tiled(self.backend).dgrad(
            dy, values, tables, self.geometry, channels_last, tile, precision=self.precision
        )

    def wgrad(self, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        shape = (self.nnzb, *self.blocksize)
        if not self.tiles:
            return _plain(self.backend).wgrad(x, dy, tables, self.geometry, shape)
        tile = self.tiles["wgrad"]
        return _tiled(self.backend).wgrad(x, dy, tables, self.geometry, shape, tile, precision=self.precision)

    def __str__(self) -> str:
        g = self.geometry
        density = self.nnzb * self.blocksize[0] * self.blocksize[1] / (g.k * g.c * g.taps)
        lines = [
            str(g),
            f"{self.nnzb} blocks of {self.blocksize[0]} x {self.blocksize[1]}, density {density:.4g},"
            f" {str(self.dtype).removeprefix('torch.')} on {self.device}",
            f"backend: {self.backend} ({self.why})",
        ]
        lines += [f"  {kind}: {tile}" for kind, tile in self.tiles.items()]
        if self.tiles and self.dtype == torch.float32:
            lines.append(f"  fp32 products: {self.precision}")
        lines.append(
            f"cost of each of fprop, dgrad, wgrad: {self.flops / 1e9:.4g} GFLOP (dense {self.dense_flops / 1e9:.4g}),"
            f" at least {self.bytes_moved['fprop'] / 1e6:.4g} MB through memory"
        )
        return "\n".join(lines)

    __repr__ = __str__


@functools.cache
def _torch_conv() -> ModuleType:
    from .kernels import torch_conv

    return torch_conv


@functools.cache
def _plain(backend: str) -> ModuleType:
    """The kernels of a backend without tiles."""
    if backend == "torch":
        return _torch_conv()
    if backend == "cpu":
        from .kernels import cpu

        return cpu
    from .kernels import dense_conv

    return dense_conv


@functools.cache
def _cupy_conv() -> ModuleType:
    from .kernels import cupy_conv  # CuPy itself waits for the first launch

    return cupy_conv


def _tiled(backend: str) -> ModuleType:
    """The kernels of a backend that tiles."""
    if backend == "cupy":
        return _cupy_conv()
    loaded = _load_triton()
    if isinstance(loaded, str):
        raise RuntimeError(f"backend 'triton' is not available: {loaded}")
    return loaded


def plan_conv(
    who: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    values_shape: Sequence[int],
    conv: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
) -> ConvPlan:
    """The plan for these static facts, made once; `conv` is (stride, padding, dilation).

    Raises ValueError for sizes that are no convolution, ValueError or RuntimeError when the backend that was asked for
    cannot take them; `who` is in front of the message.
    """
    stride, padding, dilation = conv
    return _plan(
        who, tuple(x_shape), tuple(weight_shape), tuple(values_shape), tuple(stride), tuple(padding), tuple(dilation),
        dtype, device, backend, _precision(dtype, device.type == "cuda"),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan(
    who: str,
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    values_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
    precision: str,
) -> ConvPlan:
    geometry = ConvGeometry.of(x_shape, weight_shape, stride, padding, dilation, who)
    nnzb, bk, bc = values_shape
    density = nnzb * bk * bc / max(1, geometry.k * geometry.c * geometry.taps)
    chosen, why = _choose(geometry, (bk, bc), density, dtype, device, backend, who)
    kind_tiles: Any = {}
    if chosen == "triton":
        arch = _arch(device)
        kind_tiles = {k: tiles.pick(k, geometry, (bk, bc), nnzb, dtype, arch, precision) for k in tiles.KINDS}
    elif chosen == "cupy":
        kind_tiles = {k: slots.pick(k, geometry, (bk, bc), nnzb, dtype) for k in tiles.KINDS}
    free = backend is None
    return ConvPlan(geometry, (bk, bc), nnzb, dtype, device, chosen, why, kind_tiles, precision, free)


def _choose(
    geometry: ConvGeometry,
    blocksize: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
    who: str,
) -> tuple[str, str]:
    """(backend, why). A backend asked for by name runs or raises; nothing else takes its place."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{who}: backend is {backend!r}; it needs one of {', '.join(map(repr, BACKENDS))} or None")
    if backend in ("torch", "dense"):
        return backend, "asked for"
    if backend is None and device.type != "cuda":
        return "torch", f"the default on {device.type}"
    if backend is None and density >= break_even.GPU_DENSITY:
        return "dense", f"the default on a GPU from density {break_even.GPU_DENSITY}, an estimate"
    reasons: dict[str, str] = {}
    for name in (backend,) if backend else ("triton", "cupy"):
        reason = _absent(name) or _refusal(name, geometry, blocksize, dtype, device)
        if reason is None:
            return name, "asked for" if backend else "; ".join(["the default on a GPU", *_refusals(reasons)])
        reasons[name] = reason
    if backend is None:
        return "torch", "; ".join(_refusals(reasons))
    usable = [name for name, absent in available_backends().items() if absent is None]
    raise (ValueError if _absent(backend) is None else RuntimeError)(
        f"{who}: backend {backend!r} cannot run this: {reasons[backend]}. Available here: {', '.join(usable)};"
        " backend=None chooses one that can"
    )


def _refusal(
    backend: str, geometry: ConvGeometry, blocksize: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    arch = _arch(device)
    if backend == "cpu":
        return _plain("cpu").refusal(device.type)
    if backend == "triton":
        return tiles.refusal(geometry, blocksize, dtype, device.type, arch)
    home = _cupy_conv().runtime.device_type
    return slots.refusal(geometry, blocksize, dtype, device.type, arch, home)


def _refusals(reasons: dict[str, str]) -> list[str]:
    return [f"{name} cannot run this: {reason}" for name, reason in reasons.items()]


def product_precision(t: Tensor) -> str:
    """How products of tensors like t are rounded now: "tf32" or "ieee". A plan holds for one of them."""
    return _precision(t.dtype, t.is_cuda)


def _precision(dtype: torch.dtype, on_gpu: bool) -> str:
    """PyTorch's own switches for fp32 convolutions on a GPU, the most specific first."""
    if not on_gpu or dtype != torch.float32:
        return "ieee"
    cudnn: Any = torch.backends.cudnn
    for switch in (cudnn.conv, cudnn, torch.backends):
        if switch.fp32_precision != "none":
            return "tf32" if switch.fp32_precision == "tf32" else "ieee"
    return "ieee"


@functools.cache
def _arch(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "" where there is no GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def explain(
    x: Tensor,
    values: Tensor,
    pattern: BSRPattern,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str | None = None,
) -> ConvPlan:
    """What conv2d with these arguments would run: `print(explain(...))`. Nothing is computed.

    Returns the ConvPlan: backend and tiles, why them, FLOPs and least bytes of each of fprop, dgrad and wgrad.
    """
    who = "explain()"
    check_is_pattern(pattern, who)
    check_strided(x, "x", who)
    pattern.check_values(values, who)
    conv = conv_pairs(stride, padding, dilation, who)
    plan = plan_conv(who, x.shape, pattern.shape, values.shape, conv, values.dtype, values.device, backend)
    return plan.on(unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb, who))
