"""A backend on tensors in a memory format that its kernels do not read: copies in one that they do, and back.

Copies are counted in its estimates, so that the choice of a backend weighs them, and `explain` names them. A 1x1
convolution needs none in batch_last: its tensors [C, H, W, N] in memory are those of one contiguous image. With a
stride the pixels that it reads are gathered first.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .backends import Backend, Work
from .geometry import KINDS
from .index import IndexTables
from .kernels.gpu_cost import Estimate
from .layout import BATCH_LAST, CONTIGUOUS, batch_last_of, images_of, laid_out, new, one_image


def reading(backend: Backend, work: Work) -> Backend:
    """The backend itself where its kernels read the memory format of `work`, else through copies."""
    if work.setting.memory_format in backend.formats:
        return backend
    one = CONTIGUOUS in backend.formats and work.as_one_image() is not None
    return _OneImage(backend, work) if one else _Converted(backend, work)


class _Converted(Backend):
    def __init__(self, backend: Backend, work: Work) -> None:
        self.backend, self.name, self.order = backend, backend.name, backend.order
        self.formats = (work.setting.memory_format,)
        first, *more = backend.formats
        self.inner = min(backend.formats, key=lambda form: self._seconds_in(work.laid_out(form))) if more else first
        self.note = f"{work.setting.memory_format} is copied to {self.inner} and back"

    def _seconds_in(self, work: Work) -> float:
        """Of all three products, as far as that is known."""
        if work.gpu is not None and self.backend.refusal(work) is not None:
            return math.inf
        found = [self.backend.estimate(kind, work) for kind in KINDS]
        return sum(one.seconds for one in found if one is not None)

    def _work(self, work: Work) -> Work:
        return work.laid_out(self.inner)

    def _copying(self, kind: str, work: Work) -> float | None:
        return work.copying()

    def _in(self, t: Tensor) -> Tensor:
        return laid_out(t, self.inner)

    def _out(self, t: Tensor) -> Tensor:
        return laid_out(t, self.formats[0])

    def _x_in(self, x: Tensor) -> Tensor:
        return self._in(x)

    def _dx_out(self, dx: Tensor) -> Tensor:
        return self._out(dx)

    def absent(self) -> str | None:
        return self.backend.absent()

    def refusal(self, work: Work) -> str | None:
        return self.backend.refusal(self._work(work))

    def default(self, work: Work) -> tuple[int, str] | None:
        return self.backend.default(self._work(work))

    def estimate(self, kind: str, work: Work) -> Estimate | None:
        found, around = self.backend.estimate(kind, self._work(work)), self._copying(kind, work)
        return found and found._replace(seconds=found.seconds + (around or 0.0))

    def at_least(self, kind: str, work: Work) -> float:
        around = self._copying(kind, work) if work.gpu is not None else None
        return 0.0 if around is None else self.backend.at_least(kind, self._work(work)) + around

    def tile(self, kind: str, work: Work) -> Any:
        return self.backend.tile(kind, self._work(work))

    def fprop(
        self, work: Work, tile: Any, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None
    ) -> Tensor:
        return self._out(self.backend.fprop(self._work(work), tile, self._x_in(x), values, tables, bias))

    def fprop_then(
        self, work: Work, tile: Any, x: Tensor, values: Tensor, tables: IndexTables, bias: Tensor | None,
        residual: Tensor | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        residual = None if residual is None else self._in(residual)
        args = self._work(work), tile, self._x_in(x), values, tables, bias, residual, relu
        return self._out(self.backend.fprop_then(*args))

    def dgrad(
        self, work: Work, tile: Any, dy: Tensor, values: Tensor, tables: IndexTables, memory_format: str
    ) -> Tensor:
        return self._dx_out(self.backend.dgrad(self._work(work), tile, self._in(dy), values, tables, self.inner))

    def wgrad(self, work: Work, tile: Any, x: Tensor, dy: Tensor, tables: IndexTables) -> Tensor:
        return self.backend.wgrad(self._work(work), tile, self._x_in(x), self._in(dy), tables)

    def gradients(
        self, work: Work, tiles: tuple[Any, Any], x: Tensor, dy: Tensor, values: Tensor, tables: IndexTables,
        memory_format: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inner = self._work(work), tiles, self._x_in(x), self._in(dy), values, tables, self.inner
        dx, dvalues = self.backend.gradients(*inner)
        return self._dx_out(dx), dvalues


class _OneImage(_Converted):
    """Of tensors in batch_last, for 1x1 convolutions: [C, H, W, N] in memory is one image of N times the width."""

    def __init__(self, backend: Backend, work: Work) -> None:
        self.backend, self.name, self.order = backend, backend.name, backend.order
        self.formats, self.inner = (work.setting.memory_format,), CONTIGUOUS
        self.geometry = work.geometry
        of_pixels = "" if work.geometry.stride == (1, 1) else " of the pixels that are read"
        self.note = f"{work.setting.memory_format} is read as one image{of_pixels}"

    def _work(self, work: Work) -> Work:
        one = work.as_one_image()
        assert one is not None  # as in `reading`
        return one

    def _copying(self, kind: str, work: Work) -> float:
        return work.gathering(kind)

    def _in(self, t: Tensor) -> Tensor:
        return one_image(t)

    def _out(self, t: Tensor) -> Tensor:
        _, k, p, width = t.shape
        n = self.geometry.n
        return batch_last_of(t.contiguous(), (n, k, p, width // n))

    def _pixels_read(self, x: Tensor) -> Tensor:
        down, across = self.geometry.stride
        return x[:, :, ::down, ::across]

    def _x_in(self, x: Tensor) -> Tensor:
        return one_image(self._pixels_read(x)).contiguous()

    def _dx_out(self, dx: Tensor) -> Tensor:
        if self.geometry.stride == (1, 1):
            return self._out(dx)
        whole = new(self.geometry.x_shape, dx, BATCH_LAST).zero_()
        self._pixels_read(whole).copy_(images_of(dx, self.geometry.n))
        return whole
