"""Backend "cupy": CUDA C++ for single channels and other narrow blocks, batch_last (kernels/cupy_conv.py, *.cu)."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..index import IndexTables
from ..kernels import gpu_cost, slot_cost, slots
from ..kernels.gpu_cost import Estimate
from ..kernels.gpus import NAMED
from ..kernels.slots import SlotTile
from ..layout import BATCH_LAST
from . import Backend, Work


@functools.cache
def _kernels() -> Any:
    """The host code of the kernels; CuPy itself waits for the first launch."""
    from ..kernels import cupy_conv

    return cupy_conv


class Cupy(Backend):
    """NVIDIA sm_80 and later; the default on a GPU where it is predicted to be fastest."""

    order = 3
    formats = (BATCH_LAST,)

    def absent(self) -> str | None:
        return _kernels().runtime.absent()

    def refusal(self, work: Work) -> str | None:
        home = _kernels().runtime.device_type
        return slots.refusal(work.geometry, work.blocksize, work.dtype, work.device.type, work.arch, home)

    def default(self, work: Work) -> tuple[int, str] | None:
        return (0, "the default on a GPU") if work.device.type == "cuda" else None

    def predicted(self, kind: str, work: Work) -> Estimate | None:
        if work.gpu is None or self.refusal(work) is not None:
            return None
        return slot_cost.estimate(kind, *work[:4], work.precision, self.tile(kind, work), work.gpu)

    def at_least(self, kind: str, work: Work) -> float:
        if work.gpu is None or self.measured(kind, work) is not None:
            return 0.0
        return gpu_cost.least(sum(gpu_cost.activations(work.geometry)) * work.dtype.itemsize, work.gpu)

    def tile(self, kind: str, work: Work) -> SlotTile:
        return slot_cost.pick(kind, *work[:4], work.precision, work.gpu or NAMED["h100"])

    def fprop(
        self, work: Work, tile: SlotTile, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None
    ) -> Tensor:
        return _kernels().fprop(x, values, tables, bias, work.geometry, tile, precision=work.precision)

    def dgrad(
        self, work: Work, tile: SlotTile, dy: Tensor, values: Tensor, tables: IndexTables, memory_format: str
    ) -> Tensor:
        return _kernels().dgrad(dy, values, tables, work.geometry, tile, precision=work.precision)

    def wgrad(self, work: Work, tile: SlotTile, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        return _kernels().wgrad(x, dy, tables, work.geometry, work.values_shape, tile, precision=work.precision)
