"""ConvPlan: which backend and tiles run a convolution, why, and what that costs.

A plan depends on static facts alone (geometry, blocksize, nnzb, dtype, device, precision, the CPU's threads), never on
which blocks are stored, so that it outlives mask updates and is safe to capture in a CUDA graph. fprop, dgrad and wgrad
are chosen one by one: one layer may run its forward pass on blocks and its input gradient dense.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .geometry import ConvGeometry, conv_pairs
from .index import IndexTables, packed_size
from .kernels import cost, slots, tiles
from .kernels.cost import Setting
from .layout import is_channels_last
from .pattern import BSRPattern, check_is_pattern
from .pattern_checks import check_strided

BACKENDS = ("torch", "cpu", "triton", "cupy")


def available_backends() -> dict[str, str | None]:
    """{backend: None if it can run here, else why not}. torch runs everywhere; others load when asked for."""
    return {name: _absent(name) for name in BACKENDS}


def _absent(backend: str) -> str | None:
    if backend == "torch":
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
class Product:
    """What runs one of fprop, dgrad and wgrad.

    Attributes:
        backend: "torch", "cpu", "triton" or "cupy".
        why: why this backend.
        tile: a Tile of the triton backend, a SlotTile of the cupy backend, else None.
    """

    backend: str
    why: str
    tile: tiles.Tile | slots.SlotTile | None = None


@dataclass(frozen=True)
class ConvPlan:
    """What will run for one convolution. `print(plan)` tells a person; the fields tell a program.

    Attributes:
        products: {kind: Product}, kind "fprop", "dgrad" or "wgrad".
        precision: how fp32 products are rounded: "tf32" or "ieee" (torch.backends.cudnn.conv.fp32_precision).
        backend: the backend of all three, or several, "cpu+torch".
        tiles: {kind: Tile or SlotTile} of the backends that tile.
        flops: floating-point operations of one kind on the stored blocks; dense_flops: on all of them.
        bytes_moved: {kind: bytes} of x, y, values and index, each counted once.
    """

    geometry: ConvGeometry
    blocksize: tuple[int, int]
    nnzb: int
    dtype: torch.dtype
    device: torch.device
    products: dict[str, Product]
    precision: str

    @property
    def backend(self) -> str:
        return "+".join(dict.fromkeys(product.backend for product in self.products.values()))

    @property
    def tiles(self) -> dict[str, tiles.Tile | slots.SlotTile]:
        return {kind: product.tile for kind, product in self.products.items() if product.tile is not None}

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

    def fprop(
        self, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None,
        residual: Tensor | None = None, relu: bool = False,
    ) -> Tensor:  # fmt: skip
        """relu(convolution + residual); `residual` in the memory format of x."""
        run = self.products["fprop"]
        if run.backend == "cpu":
            return _plain("cpu").fprop(x, values, tables, bias, self.geometry, residual, relu)
        if run.tile is None:
            y = _plain(run.backend).fprop(x, values, tables, bias, self.geometry)
        else:
            y = _tiled(run.backend).fprop(
                x, values, tables, bias, self.geometry, run.tile, precision=self.precision
            )  # fmt: skip
        y = y if residual is None else y.add_(residual)
        return y.relu_() if relu else y

    def dgrad(self, dy: Tensor, values: Tensor, tables: IndexTables, channels_last: bool) -> Tensor:
        run = self.products["dgrad"]
        if run.tile is None:
            return _plain(run.backend).dgrad(dy, values, tables, self.geometry, channels_last)
        return _tiled(run.backend).dgrad(
            dy, values, tables, self.geometry, channels_last, run.tile, precision=self.precision
        )

    def wgrad(self, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        run, shape = self.products["wgrad"], (self.nnzb, *self.blocksize)
        if run.tile is None:
            return _plain(run.backend).wgrad(x, dy, tables, self.geometry, shape)
        return _tiled(run.backend).wgrad(x, dy, tables, self.geometry, shape, run.tile, precision=self.precision)

    def gradients(
        self, x: Tensor, dy: Tensor, values: Tensor, tables: IndexTables, channels_last: bool
    ) -> tuple[Tensor, Tensor]:
        """(dx, dvalues)."""
        if self.products["dgrad"].backend == self.products["wgrad"].backend == "cpu":
            return _plain("cpu").gradients(x, dy, values, tables, self.geometry, channels_last)
        return self.dgrad(dy, values, tables, channels_last), self.wgrad(x, dy, tables)

    def __str__(self) -> str:
        g = self.geometry
        density = self.nnzb * self.blocksize[0] * self.blocksize[1] / (g.k * g.c * g.taps)
        lines = [
            str(g),
            f"{self.nnzb} blocks of {self.blocksize[0]} x {self.blocksize[1]}, density {density:.4g},"
            f" {str(self.dtype).removeprefix('torch.')} on {self.device}",
        ]
        runs = list(self.products.values())
        if all(run.backend == runs[0].backend and run.why == runs[0].why for run in runs):
            lines.append(f"backend: {self.backend} ({runs[0].why})")
        else:
            lines += [f"{kind}: {run.backend} ({run.why})" for kind, run in self.products.items()]
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
def _plain(backend: str) -> ModuleType:
    """The kernels of a backend without tiles."""
    if backend == "torch":
        from .kernels import torch_conv

        return torch_conv
    from .kernels import cpu

    return cpu


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
    setting: str | Setting,
) -> ConvPlan:
    """The plan for these static facts, made once; `conv` is (stride, padding, dilation), `setting` setting_of(x or dy).

    Raises ValueError for sizes that are no convolution, ValueError or RuntimeError when the backend that was asked for
    cannot take them; `who` is in front of the message.
    """
    stride, padding, dilation = conv
    return _plan(
        who, tuple(x_shape), tuple(weight_shape), tuple(values_shape), tuple(stride), tuple(padding), tuple(dilation),
        dtype, device, backend, setting,
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
    setting: str | Setting,
) -> ConvPlan:
    geometry = ConvGeometry.of(x_shape, weight_shape, stride, padding, dilation, who)
    nnzb, bk, bc = values_shape
    precision = setting if isinstance(setting, str) else "ieee"
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{who}: backend is {backend!r}; it needs one of {', '.join(map(repr, BACKENDS))} or None")
    products = None
    if backend is None and isinstance(setting, Setting):
        products = _on_a_cpu(geometry, (bk, bc), nnzb, dtype, setting)
    if products is None:
        chosen, why = _choose(geometry, (bk, bc), nnzb, dtype, device, backend, who)
        products = {}
        for kind in tiles.KINDS:
            tile: Any = None
            if chosen == "triton":
                tile = tiles.pick(kind, geometry, (bk, bc), nnzb, dtype, _arch(device), precision)
            elif chosen == "cupy":
                tile = slots.pick(kind, geometry, (bk, bc), nnzb, dtype)
            products[kind] = Product(chosen, why, tile)
    return ConvPlan(geometry, (bk, bc), nnzb, dtype, device, products, precision)


def _on_a_cpu(
    geometry: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype, setting: Setting
) -> dict[str, Product] | None:
    """For each kind stored blocks or the dense product, whichever is estimated to be faster; None for other dtypes."""
    if not cost.known(dtype):
        return None
    products = {}
    for kind in tiles.KINDS:
        stored, dense = cost.on_cpu(kind, geometry, blocksize, nnzb, dtype, setting)
        said = f"estimated {_ms(stored)} on stored blocks and {_ms(dense)} dense, threads: {setting.threads}"
        chosen = "cpu" if stored < dense else "torch"
        if chosen == "cpu" and (absent := _absent("cpu")) is not None:
            chosen, said = "torch", f"backend 'cpu' is not available: {absent}"
        products[kind] = Product(chosen, said)
    return products


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _choose(
    geometry: ConvGeometry,
    blocksize: tuple[int, int],
    nnzb: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
    who: str,
) -> tuple[str, str]:
    """(backend, why). A backend asked for by name runs or raises; nothing else takes its place."""
    if backend == "torch":
        return backend, "asked for"
    if backend is None and device.type != "cuda":
        return "torch", f"the default on {device.type} for {str(dtype).removeprefix('torch.')}"
    density = nnzb * blocksize[0] * blocksize[1] / max(1, geometry.k * geometry.c * geometry.taps)
    if backend is None and density >= cost.GPU_DENSITY:
        return "torch", f"the default on a GPU from density {cost.GPU_DENSITY}, an estimate"
    reasons: dict[str, str] = {}
    for name in (backend,) if backend else ("triton", "cupy"):
        reason = _absent(name) or _refusal(name, geometry, blocksize, dtype, device)
        if reason is None:
            return name, "asked for" if backend else "; ".join(["the default on a GPU", *_refusals(reasons)])
        reasons[name] = reason
    if backend is None:
        return "torch", "; ".join(["dense", *_refusals(reasons)])
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


def setting_of(t: Tensor) -> str | Setting:
    """What a plan for tensors like t depends on besides shapes and types.

    How products are rounded ("tf32" or "ieee"); on a CPU the number of threads, and the memory format.
    """
    if t.device.type == "cpu":
        return Setting(torch.get_num_threads(), is_channels_last(t))
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

    Returns the ConvPlan: backend and tile of each of fprop, dgrad and wgrad, why these, FLOPs and least bytes.
    """
    who = "explain()"
    check_is_pattern(pattern, who)
    check_strided(x, "x", who)
    pattern.check_values(values, who)
    conv = conv_pairs(stride, padding, dilation, who)
    return plan_conv(
        who, x.shape, pattern.shape, values.shape, conv, values.dtype, values.device, backend, setting_of(x)
    )
