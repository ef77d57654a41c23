"""Which kernels are counted: a case is one launch of the Triton backend, on a layer that picks the tile of its row."""

from __future__ import annotations

from typing import NamedTuple

import torch

from blocksparse import ConvGeometry
from blocksparse.geometry import KINDS
from blocksparse.kernels import tiles
from blocksparse.kernels.tiles import Tile

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}
DTYPES = {"half": "float16", "bf16": "bfloat16", "tf32": "float32", "ieee": "float32"}


class Case(NamedTuple):
    """One kernel to compile, for a layer with C = K = about 256."""

    kind: str
    arch: str
    blocksize: tuple[int, int]
    math: str = "half"  # "half" (fp16), "bf16", "tf32" or "ieee"
    stride: int = 1
    batch: int = 64
    density: float = 0.1
    height: int = 28
    kernel: int = 3
    row_order: bool = False
    format: str = "channels_last"
    asked: Tile | None = None  # None: what tiles.pick says

    @classmethod
    def of(cls, fields: list[object]) -> Case:
        """From JSON."""
        case = cls(*fields)  # type: ignore[arg-type]
        case = case._replace(blocksize=tuple(case.blocksize))  # type: ignore[arg-type]
        return case if case.asked is None else case._replace(asked=Tile(*case.asked))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, DTYPES[self.math])

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        bk, bc = self.blocksize
        return 256 // bk * bk, 256 // bc * bc, self.kernel, self.kernel

    @property
    def geometry(self) -> ConvGeometry:
        x_shape = (self.batch, self.weight_shape[1], self.height, self.height + 1)
        return ConvGeometry.of(x_shape, self.weight_shape, self.stride, self.kernel // 2)

    @property
    def nnzb(self) -> int:
        (k, c, r, s), (bk, bc) = self.weight_shape, self.blocksize
        return max(1, round(self.density * (k // bk) * (c // bc) * r * s))

    @property
    def precision(self) -> str:
        return "tf32" if self.math == "tf32" else "ieee"

    @property
    def tile(self) -> Tile:
        if self.asked is not None:
            return self.asked
        return tiles.pick(self.kind, self.geometry, self.blocksize, self.nnzb, self.dtype, self.arch, self.precision)

    def row(self, triton: str) -> dict[str, object]:
        """What names this case in the table of counts."""
        return {
            "kind": self.kind,
            "dtype": DTYPES[self.math],
            "precision": self.precision,
            "target": self.arch,
            "triton": triton,
            "blocksize": list(self.blocksize),
            "format": self.format,
            "stride": self.stride,
            "kernel": self.kernel,
            "tile": self.tile._asdict(),
        }


def _shipped(arch: str) -> list[Case]:
    sizes = ((32, 32), (64, 8), (16, 16), (64, 64))
    return [Case(kind, arch, blocksize) for kind in KINDS for blocksize in sizes]


SHIPPED = {arch: _shipped(arch) for arch in TARGETS}  # the rows of the table of counts
