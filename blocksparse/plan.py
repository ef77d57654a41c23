"""ConvPlan: which backend and tiles run a convolution, why, and what that costs.

A plan depends on static facts alone (geometry, blocksize, nnzb, dtype, device, memory format, precision, the CPU's
threads), never on which blocks are stored, so that it outlives mask updates and is safe to capture in a CUDA graph.
fprop, dgrad and wgrad are chosen one by one: one layer may run its forward pass on blocks and its input gradient dense.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, Work, all_backends, named
from .converted import reading
from .geometry import KINDS, ConvGeometry, conv_pairs
from .index import IndexTables, Layout, layout_of, packed_size
from .kernels import gpus
from .kernels.cost import Setting
from .kernels.gpu_cost import Estimate
from .layout import CHANNELS_LAST, memory_format_of
from .pattern import BSRPattern, check_is_pattern
from .pattern_checks import check_strided


def available_backends() -> dict[str, str | None]:
    """{backend: None if it can run here, else why not}. torch runs everywhere; others load when asked for."""
    return {name: backend.absent() for name, backend in all_backends().items()}


@dataclass(frozen=True)
class Product:
    """What runs one of fprop, dgrad and wgrad.

    Attributes:
        backend: its name, a key of `available_backends()`.
        why: why this backend.
        tile: how it cuts the product, where it has something to say (a NamedTuple of sizes); else None.
        estimate: its seconds, what bounds them, and whether they were measured; None: there is no estimate.
        dense: the same of PyTorch's own product on a dense weight.
    """

    backend: str
    why: str
    tile: Any = None
    estimate: Estimate | None = None
    dense: Estimate | None = None


@dataclass(frozen=True)
class ConvPlan:
    """What will run for one convolution. `print(plan)` tells a person; the fields tell a program.

    Attributes:
        products: {kind: Product}, kind "fprop", "dgrad" or "wgrad".
        precision: how fp32 products are rounded: "tf32" or "ieee" (torch.backends.cudnn.conv.fp32_precision).
        backend: the backend of all three, or several, "cpu+torch".
        tiles: {kind: tile} of the backends that tile.
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
    # The products themselves: methods of the backends, bound to what they need besides tensors.
    layout: Layout = field(repr=False, compare=False)
    fprop: Callable[[Tensor, Tensor, IndexTables, Tensor | None], Tensor] = field(repr=False, compare=False)
    fprop_then: Callable[..., Tensor] = field(repr=False, compare=False)
    dgrad: Callable[[Tensor, Tensor, IndexTables, str], Tensor] = field(repr=False, compare=False)
    wgrad: Callable[[Tensor, Tensor, IndexTables], Tensor] = field(repr=False, compare=False)
    gradients: Callable[..., tuple[Tensor, Tensor]] = field(repr=False, compare=False)

    @property
    def backend(self) -> str:
        return "+".join(dict.fromkeys(product.backend for product in self.products.values()))

    @property
    def tiles(self) -> dict[str, Any]:
        return {kind: product.tile for kind, product in self.products.items() if product.tile is not None}

    @property
    def flops(self) -> int:
        return self._flops_at(self.nnzb * self.blocksize[0] * self.blocksize[1])

    @property
    def dense_flops(self) -> int:
        return self._flops_at(self.geometry.weights)

    def _flops_at(self, weights: int) -> int:
        return 2 * self.geometry.n * self.geometry.p * self.geometry.q * weights

    @property
    def bytes_moved(self) -> dict[str, int]:
        g, item = self.geometry, self.dtype.itemsize
        activations = (g.n * g.c * g.h * g.w + g.n * g.k * g.p * g.q) * item
        values = self.nnzb * self.blocksize[0] * self.blocksize[1] * item
        index = 4 * packed_size(g.weight_shape, self.blocksize, self.nnzb, row_order=False)
        return dict.fromkeys(KINDS, activations + values + index)

    def __str__(self) -> str:
        g = self.geometry
        density = self.nnzb * self.blocksize[0] * self.blocksize[1] / g.weights
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
        dense = self.products["fprop"].dense
        if said := _said(dense):
            lines.append(f"PyTorch's product of a dense weight: {said}")
        if self.tiles and self.dtype == torch.float32:
            lines.append(f"  fp32 products: {self.precision}")
        lines.append(
            f"cost of each of fprop, dgrad, wgrad: {self.flops / 1e9:.4g} GFLOP (dense {self.dense_flops / 1e9:.4g}),"
            f" at least {self.bytes_moved['fprop'] / 1e6:.4g} MB through memory"
        )
        return "\n".join(lines)

    __repr__ = __str__


@functools.lru_cache(maxsize=4096)
def plan_conv(
    who: str,
    geometry: ConvGeometry,
    values_shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    index: Layout,
    backend: str | None,
    setting: Setting,
) -> ConvPlan:
    """The plan for these static facts, made once; `setting` is setting_of(x or dy).

    Raises ValueError or RuntimeError when the backend that was asked for cannot take them, with `who` in front.
    """
    nnzb, bk, bc = values_shape
    work = Work(geometry, (bk, bc), nnzb, dtype, device, setting, index, gpus.of(device))
    return _plan(work, who, backend, here=True)


def plan_on(
    gpu: str,
    geometry: ConvGeometry,
    values_shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    precision: str = "ieee",
    memory_format: str = CHANNELS_LAST,
    row_order: bool = False,
    backend: str | None = None,
) -> ConvPlan:
    """The plan that this convolution would get on a GPU that need not be here, with every backend present.

    Its times are predictions. It is there to be read: its products run nowhere.

    Args:
        gpu: "h100", "h200", "a100", "b200" or "mi300x".
        values_shape: (nnzb, bk, bc).
        memory_format: of x and dy: "contiguous", "channels_last" or "batch_last".
        row_order: whether the pattern has one.
    """
    who, (nnzb, *blocksize) = "plan_on()", values_shape
    size = packed_size(geometry.weight_shape, blocksize, nnzb, row_order)
    index = layout_of((size,), torch.int32, geometry.weight_shape, blocksize, nnzb, who)
    setting = Setting(0, memory_format, precision if dtype == torch.float32 else "ieee")
    device = torch.device("cuda")
    work = Work(geometry, (blocksize[0], blocksize[1]), nnzb, dtype, device, setting, index, gpus.named(gpu, who))
    return _plan(work, who, backend, here=False)


def _plan(work: Work, who: str, backend: str | None, here: bool) -> ConvPlan:
    if backend is None:
        chosen = _defaults(work, who, here)
    else:
        run = _asked_for(reading(named(backend, who), work), work, who, here)
        said = {kind: _said(run.estimate(kind, work)) for kind in KINDS}
        chosen = {kind: (run, f"asked for; {words}" if words else "asked for") for kind, words in said.items()}
    runs = {kind: run for kind, (run, _) in chosen.items()}
    tiles = {kind: run.tile(kind, work) for kind, run in runs.items()}
    estimates = {kind: run.estimate(kind, work) for kind, run in runs.items()}
    dgrad = functools.partial(runs["dgrad"].dgrad, work, tiles["dgrad"])
    wgrad = functools.partial(runs["wgrad"].wgrad, work, tiles["wgrad"])
    return ConvPlan(
        *work[:5],
        {
            kind: Product(
                run.name, f"{why}; {run.note}" if run.note else why, tiles[kind], estimates[kind], work.dense(kind)
            )
            for kind, (run, why) in chosen.items()
        },
        work.precision, work.layout,
        functools.partial(runs["fprop"].fprop, work, tiles["fprop"]),
        functools.partial(runs["fprop"].fprop_then, work, tiles["fprop"]),
        dgrad, wgrad,
        functools.partial(runs["dgrad"].gradients, work, (tiles["dgrad"], tiles["wgrad"]))
        if runs["dgrad"] is runs["wgrad"] else functools.partial(_one_by_one, dgrad, wgrad),
    )  # fmt: skip


def _one_by_one(
    dgrad: Callable[..., Tensor], wgrad: Callable[..., Tensor],
    x: Tensor, dy: Tensor, values: Tensor, tables: IndexTables, memory_format: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both gradients where two backends compute them."""
    return dgrad(dy, values, tables, memory_format), wgrad(x, dy, tables)


def _asked_for(backend: Backend, work: Work, who: str, here: bool) -> Backend:
    """A backend asked for by name runs or raises; nothing else takes its place."""
    absent = backend.absent() if here else None
    reason = absent or backend.refusal(work)
    if reason is None:
        return backend
    usable = [name for name, why in available_backends().items() if why is None]
    raise (ValueError if absent is None else RuntimeError)(
        f"{who}: backend {backend.name!r} cannot run this: {reason}. Available here: {', '.join(usable)};"
        " backend=None chooses one that can"
    )


def _defaults(work: Work, who: str, here: bool) -> dict[str, tuple[Backend, str]]:
    """For each kind the backend that runs it and why: of the lowest turn, and there of the least estimated time."""
    every = [reading(backend, work) for backend in all_backends().values()]
    offers = [(backend, *offer) for backend in every if (offer := backend.default(work)) is not None]
    obstacles: dict[str, str | None] = {}  # asked for where a backend's turn comes: its answer may compile, or import
    chosen = {}
    for kind in KINDS:
        times: dict[str, Estimate | None] = {}
        skipped = []
        # By turn, then time, then the order of all_backends(). An estimate is made where its least comes first.
        waiting = [(turn, run.at_least(kind, work), i) for i, (run, turn, _) in enumerate(offers)]
        heapq.heapify(waiting)
        while waiting:
            turn, least, i = heapq.heappop(waiting)
            run, _, why = offers[i]
            if run.name not in times:
                found = times[run.name] = run.estimate(kind, work)
                heapq.heappush(waiting, (turn, math.inf if found is None else max(least, found.seconds), i))
                continue
            if run.name not in obstacles:
                obstacles[run.name] = _obstacle(run, work, here)
            if (obstacle := obstacles[run.name]) is not None:
                skipped.append(obstacle)
                continue
            alike = [other for other, at, _ in offers if at == turn]
            known = {other.name: found for other in alike if (found := times.get(other.name)) is not None}
            beyond = {other.name: other.at_least(kind, work) for other in alike if other.name not in times}
            if run.name in known and len(known) + len(beyond) > 1:
                why = _compared(run.name, known, beyond)
                why += f"; threads: {work.setting.threads}" if work.gpu is None else ""
            chosen[kind] = run, "; ".join([why, *skipped])
            break
        else:
            raise RuntimeError(f"{who}: no backend can run this: {'; '.join(skipped)}")
    return chosen


def _compared(name: str, known: dict[str, Estimate], beyond: dict[str, float]) -> str:
    """The times of all, those beyond the chosen one's as at least; on a GPU its own first, with what bounds it."""
    own = known[name]
    if not _said(own):
        return "estimated " + ", ".join(f"{1e3 * found.seconds:.3g} ms by {other}" for other, found in known.items())
    others = [f"{_microseconds(found)} by {other}" for other, found in known.items() if other != name]
    others += [f"at least {1e6 * seconds:.3g} us by {other}" for other, seconds in beyond.items()]
    return f"{_said(own)}; {', '.join(others)}"


def _said(found: Estimate | None) -> str:
    """ "predicted 17.9 us, bound by issue"; "" where there is no estimate, or on a CPU."""
    if found is None or not (found.bound or found.measured):
        return ""
    return _microseconds(found) if found.measured else f"predicted {_microseconds(found)}, bound by {found.bound}"


def _microseconds(found: Estimate) -> str:
    return f"{'measured ' if found.measured else ''}{1e6 * found.seconds:.3g} us"


def _obstacle(backend: Backend, work: Work, here: bool) -> str | None:
    """Why it cannot run this, in a sentence, or None."""
    if here and (absent := backend.absent()) is not None:
        return f"backend {backend.name!r} is not available: {absent}"
    refusal = backend.refusal(work)
    return None if refusal is None else f"backend {backend.name!r} cannot run this: {refusal}"


def setting_of(t: Tensor, memory_format: str) -> Setting:
    """What a plan for tensors like t, in this memory format, depends on besides shapes and types."""
    threads = torch.get_num_threads() if t.device.type == "cpu" else 0
    return Setting(threads, memory_format, _precision(t.dtype, t.is_cuda))


def _precision(dtype: torch.dtype, on_gpu: bool) -> str:
    """PyTorch's own switches for fp32 convolutions on a GPU, the most specific first."""
    if not on_gpu or dtype != torch.float32:
        return "ieee"
    cudnn: Any = torch.backends.cudnn
    for switch in (cudnn.conv, cudnn, torch.backends):
        if switch.fp32_precision != "none":
            return "tf32" if switch.fp32_precision == "tf32" else "ieee"
    return "ieee"


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

    Returns the ConvPlan: backend and tile of each of fprop, dgrad and wgrad, why these, FLOPs and least bytes. On a GPU
    also the time of each, what bounds it, and that of a dense weight: predicted, or measured where
    `bench/run.py --keep` has timed this very product.
    """
    who = "explain()"
    check_is_pattern(pattern, who)
    check_strided(x, "x", who)
    pattern.check_values(values, who)
    conv = conv_pairs(stride, padding, dilation, who)
    geometry = ConvGeometry.of(x.shape, pattern.bank, *conv, who)
    index = layout_of(
        pattern.index.shape, pattern.index.dtype, geometry.weight_shape, pattern.blocksize, pattern.nnzb, who
    )
    shape, setting = (pattern.nnzb, *pattern.blocksize), setting_of(x, memory_format_of(x))
    return plan_conv(who, geometry, shape, values.dtype, values.device, index, backend, setting)
