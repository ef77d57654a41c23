"""Backend "torch": the stored blocks as a filter bank for PyTorch's own convolution (kernels/torch_conv.py)."""

from __future__ import annotations

from torch import Tensor

from ..index import IndexTables
from ..kernels import gpu_cost, torch_conv
from ..kernels.gpu_cost import Estimate
from ..layout import CHANNELS_LAST
from . import Backend, Work


class Torch(Backend):
    """Every device, dtype and block; the default where nothing else runs, or where it is estimated to be fastest."""

    order = 0

    def default(self, work: Work) -> tuple[int, str] | None:
        on = "a GPU" if work.device.type == "cuda" else work.device.type
        return 0, f"the default on {on} for {str(work.dtype).removeprefix('torch.')}"

    def seconds(self, kind: str, work: Work) -> float | None:
        both = work.on_a_cpu(kind)
        return both[1] if both else super().seconds(kind, work)

    def predicted(self, kind: str, work: Work) -> Estimate | None:
        if work.gpu is None or (dense := work.dense(kind)) is None:
            return None
        (bk, bc), last = work.blocksize, work.setting.channels_last
        weights, ordered = work.nnzb * bk * bc, work.layout.row_order is not None
        around = gpu_cost.scattered(kind, work.geometry, weights, work.dtype, ordered, last, work.gpu)
        return dense._replace(seconds=dense.seconds + around)

    def fprop(
        self, work: Work, tile: None, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None
    ) -> Tensor:
        return torch_conv.fprop(x, values, tables, bias, work.geometry)

    def dgrad(
        self, work: Work, tile: None, dy: Tensor, values: Tensor, tables: IndexTables, memory_format: str
    ) -> Tensor:
        return torch_conv.dgrad(dy, values, tables, work.geometry, memory_format == CHANNELS_LAST)

    def wgrad(self, work: Work, tile: None, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        return torch_conv.wgrad(x, dy, tables, work.geometry, work.values_shape)
