"""Backend "cpu": native code for stored weights as offsets into planes of an image (kernels/cpu.py, native/)."""

from __future__ import annotations

from torch import Tensor

from ..index import IndexTables
from ..kernels import cost, cpu
from ..layout import FORMATS
from . import Backend, Work


class Cpu(Backend):
    """CPUs with a C++ compiler; the default there where it is estimated to be faster than the dense product."""

    order = 1
    formats = FORMATS

    def absent(self) -> str | None:
        return cpu.absent()

    def refusal(self, work: Work) -> str | None:
        kind = work.device.type
        return None if kind == "cpu" else f"x is on {kind}; it needs tensors on the CPU"

    def default(self, work: Work) -> tuple[int, str] | None:
        return (0, "the default on a CPU") if work.device.type == "cpu" and cost.known(work.dtype) else None

    def seconds(self, kind: str, work: Work) -> float | None:
        if work.device.type == "cpu" and not cpu.parallel():
            work = work._replace(setting=work.setting._replace(threads=1))
        both = work.on_a_cpu(kind)
        return both and both[0]

    def fprop(
        self, work: Work, tile: None, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None
    ) -> Tensor:
        return cpu.fprop(x, values, tables, bias, work.geometry)

    def fprop_then(
        self, work: Work, tile: None, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None,
        residual: Tensor | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        return cpu.fprop(x, values, tables, bias, work.geometry, residual, relu)

    def dgrad(
        self, work: Work, tile: None, dy: Tensor, values: Tensor, tables: IndexTables, memory_format: str
    ) -> Tensor:
        return cpu.dgrad(dy, values, tables, work.geometry, memory_format)

    def wgrad(self, work: Work, tile: None, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        return cpu.wgrad(x, dy, tables, work.geometry, work.values_shape)

    def gradients(
        self, work: Work, tiles: tuple[None, None], x: Tensor, dy: Tensor, values: Tensor, tables: IndexTables,
        memory_format: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return cpu.gradients(x, dy, values, tables, work.geometry, memory_format)
