"""Backend "torch": the stored blocks as a filter bank for PyTorch's own convolution (kernels/torch_conv.py)."""

from __future__ import annotations

from torch import Tensor

from ..index import IndexTables
from ..kernels import cost, torch_conv
from . import Backend, Work


class Torch(Backend):
    """Every device, dtype and block; the default where nothing else runs, or where it is estimated to be faster."""

    order = 0

    def default(self, work: Work) -> tuple[int, str] | None:
        if work.device.type != "cuda":
            return 0, f"the default on {work.device.type} for {str(work.dtype).removeprefix('torch.')}"
        if work.density >= cost.GPU_DENSITY:
            return 0, f"the default on a GPU from density {cost.GPU_DENSITY}, an estimate"
        return 9, "dense"

    def seconds(self, kind: str, work: Work) -> float | None:
        both = work.seconds_on_a_cpu(kind)
        return both and both[1]

    def fprop(
        self, work: Work, tile: None, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None
    ) -> Tensor:
        return torch_conv.fprop(x, values, tables, bias, work.geometry)

    def dgrad(
        self, work: Work, tile: None, dy: Tensor, values: Tensor, tables: IndexTables, channels_last: bool
    ) -> Tensor:
        return torch_conv.dgrad(dy, values, tables, work.geometry, channels_last)

    def wgrad(self, work: Work, tile: None, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        return torch_conv.wgrad(x, dy, tables, work.geometry, work.values_shape)
