"""What a backend is, and which there are: a file of this folder for each, and the file's name is the backend's.

A file defines one subclass of `Backend`. It loads what is heavy (a compiler, Triton, CuPy) when that is first needed:
the files themselves are imported to answer which backends there are.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import ConvGeometry
from ..index import IndexTables, Layout
from ..kernels import cost, gpu_cost, measured
from ..kernels.cost import Setting
from ..kernels.gpu_cost import Estimate
from ..kernels.gpus import Gpu
from ..layout import BATCH_LAST, CHANNELS_LAST, CONTIGUOUS


class Work(NamedTuple):
    """A convolution as it is known before it runs: sizes, never which blocks are stored.

    Attributes:
        setting: threads, memory format, and how fp32 products are rounded.
        layout: where the tables lie in the packed index.
        gpu: the numbers of the device, or None on a CPU.
    """

    geometry: ConvGeometry
    blocksize: tuple[int, int]
    nnzb: int
    dtype: torch.dtype
    device: torch.device
    setting: Setting
    layout: Layout
    gpu: Gpu | None

    @property
    def values_shape(self) -> tuple[int, int, int]:
        return self.nnzb, *self.blocksize

    @property
    def precision(self) -> str:
        return self.setting.precision

    @property
    def arch(self) -> str:
        return "" if self.gpu is None else self.gpu.arch

    def laid_out(self, memory_format: str) -> Work:
        """The same convolution of tensors in another memory format."""
        return self._replace(setting=self.setting._replace(memory_format=memory_format))

    def as_one_image(self) -> Work | None:
        """A 1x1 convolution of tensors in batch_last, as that of one contiguous image N times as wide; else None.

        Its image is of the pixels that are read: with a stride they are gathered first.
        """
        if self.setting.memory_format != BATCH_LAST or not self.geometry.pointwise or self.geometry.n == 0:
            return None
        g = self.geometry.of_pixels_read()
        return self.laid_out(CONTIGUOUS)._replace(geometry=replace(g, n=1, w=g.w * g.n))

    def copying(self) -> float | None:
        """Estimated seconds of x and y through copies in another memory format; None where there is no estimate."""
        if self.gpu is not None:
            return gpu_cost.passes(2 * sum(gpu_cost.activations(self.geometry)) * self.dtype.itemsize, 2, self.gpu)
        if self.device.type != "cpu" or not cost.known(self.dtype):
            return None
        return cost.copying(self.geometry, self.setting.threads)

    def gathering(self, kind: str) -> float:
        """Estimated seconds between x or dx and the pixels of as_one_image; 0 where there is no estimate."""
        g = self.geometry
        if g.stride == (1, 1):
            return 0.0
        read, filled = g.n * g.c * g.p * g.q, g.n * g.c * g.h * g.w if kind == "dgrad" else 0
        if self.gpu is not None:
            return gpu_cost.passes((2 * read + filled) * self.dtype.itemsize, 2 if filled else 1, self.gpu)
        return cost.copied(read + filled, self.setting.threads) if self.device.type == "cpu" else 0.0

    def on_a_cpu(self, kind: str) -> tuple[float, float] | None:
        """Estimated seconds of stored blocks and of the dense product; None elsewhere and for other dtypes."""
        if self.device.type != "cpu" or not cost.known(self.dtype):
            return None
        return cost.on_cpu(kind, self.geometry, self.blocksize, self.nnzb, self.dtype, self.setting)

    def dense(self, kind: str) -> Estimate | None:
        """Of PyTorch's own product on a dense filter bank, without what stored blocks need around it."""
        if (one := self.as_one_image()) is not None:
            found = one.dense(kind)
            return found and found._replace(seconds=found.seconds + self.gathering(kind))
        if self.setting.memory_format == BATCH_LAST:  # PyTorch's convolution does not read it
            copied = [self.laid_out(form).dense(kind) for form in (CONTIGUOUS, CHANNELS_LAST)]
            times = [found for found in copied if found is not None]
            if not times or (around := self.copying()) is None:
                return None
            best = min(times, key=lambda found: found.seconds)
            return best._replace(seconds=best.seconds + around)
        if self.gpu is not None:
            if self.dtype not in gpu_cost.DTYPES:
                return None
            last = self.setting.channels_last
            return gpu_cost.dense(kind, self.geometry, self.dtype, self.precision, last, self.gpu)
        both = self.on_a_cpu(kind)
        return both and Estimate(both[1], "")


class Backend:
    """One way to compute the three products. A subclass needs fprop, dgrad and wgrad; the rest has a default.

    The products get checked tensors: x, dy and residual dense in the memory format of `work.setting`, one of `formats`;
    values and bias contiguous; all of `work.dtype` on `work.device`. They read no tensor on the host, write every
    element of what they return, and keep nothing that a new mask of equal nnzb would make wrong. `tile` is what
    `tile()` returned for this kind and work.

    Attributes:
        name: that of the file; "cpu" for blocksparse/backends/cpu.py.
        order: where it stands in lists, by rising numbers, then names.
        formats: memory formats that its kernels read and write. Tensors in others are copied to the one of these that
            is estimated to be fastest, and results back (converted.py): that is counted, and `explain` says it.
        note: what `explain` adds to why it runs.
    """

    name: str = ""
    order: int = 100
    formats: tuple[str, ...] = (CONTIGUOUS, CHANNELS_LAST)
    note: str = ""

    # ------------------------------------------------------------------ before anything runs

    def absent(self) -> str | None:
        """Why it cannot run on this machine (a library, a compiler or a device that is missing), or None."""
        return None

    def refusal(self, work: Work) -> str | None:
        """Why it cannot run this convolution where it is present (a block size, a dtype, a device), or None."""
        return None

    def default(self, work: Work) -> tuple[int, str] | None:
        """(turn, why) where it may run without being asked for by name, else None.

        Of all that can run a product the one of the lowest turn does; among equal turns, of fewest estimated seconds.
        """
        return None

    def seconds(self, kind: str, work: Work) -> float | None:
        """Estimated time of the product "fprop", "dgrad" or "wgrad"; None: there is no estimate."""
        found = self.predicted(kind, work)
        return found and found.seconds

    def predicted(self, kind: str, work: Work) -> Estimate | None:
        """The same with what bounds it, for a backend that knows. Only for work that it does not refuse."""
        return None

    def estimate(self, kind: str, work: Work) -> Estimate | None:
        """What `explain` says and the choice goes by: measured where there is a table, else predicted, else None."""
        found = self.measured(kind, work) or self.predicted(kind, work)
        if found is None and (seconds := self.seconds(kind, work)) is not None:
            return Estimate(seconds, "")
        return found

    def measured(self, kind: str, work: Work) -> Estimate | None:
        """From the table of this GPU, where it has the very product."""
        if work.gpu is None:
            return None
        facts = measured.facts(
            self.name, kind, work.geometry, work.blocksize, work.nnzb, work.dtype, work.precision,
            work.setting.channels_last,
        )  # fmt: skip
        timed = measured.seconds(work.gpu.name, facts)
        return None if timed is None else Estimate(timed, "", measured=True)

    def at_least(self, kind: str, work: Work) -> float:
        """Seconds below which no estimate is, known much sooner: where others take less, none is made. 0: not known."""
        return 0.0

    def tile(self, kind: str, work: Work) -> Any:
        """How the product is cut, from sizes alone. `explain` shows it; None: nothing to show."""
        return None

    # ------------------------------------------------------------------ the products

    def fprop(
        self, work: Work, tile: Any, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None
    ) -> Tensor:
        """y [N, K, P, Q] in the memory format of x; bias [K] in filter order, or None."""
        raise NotImplementedError

    def dgrad(
        self, work: Work, tile: Any, dy: Tensor, values: Tensor, tables: IndexTables, memory_format: str
    ) -> Tensor:
        """dx [N, C, H, W] in this memory format, that of `work`."""
        raise NotImplementedError

    def wgrad(self, work: Work, tile: Any, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        """dvalues [nnzb, bk, bc]."""
        raise NotImplementedError

    def fprop_then(
        self, work: Work, tile: Any, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None,
        residual: Tensor | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        """relu(fprop + residual), either left out, for a backend that does both before y leaves its cache."""
        y = self.fprop(work, tile, x, values, tables, bias)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if relu else y

    def gradients(
        self, work: Work, tiles: tuple[Any, Any], x: Tensor, dy: Tensor, values: Tensor, tables: IndexTables,
        memory_format: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(dgrad, wgrad), for a backend that saves a call; `tiles` of dgrad and wgrad."""
        dx = self.dgrad(work, tiles[0], dy, values, tables, memory_format)
        return dx, self.wgrad(work, tiles[1], x, dy, tables)


def all_backends() -> dict[str, Backend]:
    """{name: backend}, every file of this folder; folders that are added to `__path__` count."""
    return _found(tuple(__path__))


@functools.lru_cache(maxsize=16)
def _found(path: tuple[str, ...]) -> dict[str, Backend]:
    names = [module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]
    found = [_loaded(name) for name in names]
    return {backend.name: backend for backend in sorted(found, key=lambda backend: (backend.order, backend.name))}


def _loaded(name: str) -> Backend:
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # a file that somebody has added: the others still run
        backend: Backend = _Broken(f"importing its file failed: {type(error).__name__}: {error}")
    else:
        classes = [
            value for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Backend) and value.__module__ == module.__name__
        ]  # fmt: skip
        backend = classes[0]() if len(classes) == 1 else _Broken(
            f"{module.__file__} defines {len(classes)} subclasses of Backend; it needs one"
        )  # fmt: skip
    backend.name = name
    return backend


class _Broken(Backend):
    """A file that is no backend, and why."""

    def __init__(self, why: str) -> None:
        self.why = why

    def absent(self) -> str | None:
        return self.why


def named(name: str, who: str) -> Backend:
    """The backend of this name; ValueError with all names otherwise."""
    found = all_backends()
    if name not in found:
        raise ValueError(f"{who}: backend is {name!r}; it needs one of {', '.join(map(repr, found))} or None")
    return found[name]
