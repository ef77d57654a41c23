"""Backend "triton": blocks of 8 and more on tensor cores, channels_last (kernels/triton_conv.py, tiles.py)."""

from __future__ import annotations

import functools
import os
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..index import IndexTables
from ..kernels import tiles
from ..kernels.gpu_cost import Estimate
from ..kernels.tiles import Tile
from ..layout import CHANNELS_LAST
from . import Backend, Work


@functools.cache
def _kernels() -> Any:
    """The kernels, or a sentence: why Triton cannot be imported. Loaded on first use."""
    try:
        from ..kernels import triton_conv
    except ImportError as error:
        return f"importing Triton failed: {error}"
    return triton_conv


@functools.cache
def _interpreter_refuses() -> str | None:
    """Why Triton's interpreter cannot run here, or None."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return (
            f"the interpreter of Triton {version('triton')} does not take NumPy {version('numpy')}; install"
            " triton>=3.7 or numpy<2.4"
        )
    return None


class Triton(Backend):
    """NVIDIA sm_80 and later, AMD; the default on a GPU where it is predicted to be fastest."""

    order = 2

    def absent(self) -> str | None:
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "no CUDA device is visible to PyTorch (TRITON_INTERPRET=1 in the environment runs the kernels in"
                " Triton's interpreter on the CPU, for tests)"
            )
        kernels = _kernels()
        if isinstance(kernels, str):
            return kernels
        return None if torch.cuda.is_available() else _interpreter_refuses()

    def refusal(self, work: Work) -> str | None:
        return tiles.refusal(work.geometry, work.blocksize, work.dtype, work.device.type, work.arch)

    def default(self, work: Work) -> tuple[int, str] | None:
        return (0, "the default on a GPU") if work.device.type == "cuda" else None

    def predicted(self, kind: str, work: Work) -> Estimate | None:
        if work.gpu is None or self.refusal(work) is not None:
            return None
        last, ordered = work.setting.channels_last, work.layout.row_order is not None
        return tiles.estimate(kind, *work[:4], work.precision, self.tile(kind, work), work.gpu, last, ordered)

    def tile(self, kind: str, work: Work) -> Tile:
        return tiles.pick(kind, *work[:4], work.arch, work.precision, work.gpu, work.setting.channels_last)

    def fprop(
        self, work: Work, tile: Tile, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None
    ) -> Tensor:
        return _kernels().fprop(x, values, tables, bias, work.geometry, tile, precision=work.precision)

    def dgrad(
        self, work: Work, tile: Tile, dy: Tensor, values: Tensor, tables: IndexTables, memory_format: str
    ) -> Tensor:
        last = memory_format == CHANNELS_LAST
        return _kernels().dgrad(dy, values, tables, work.geometry, last, tile, precision=work.precision)

    def wgrad(self, work: Work, tile: Tile, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        return _kernels().wgrad(x, dy, tables, work.geometry, work.values_shape, tile, precision=work.precision)
