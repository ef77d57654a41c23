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
            "math": self.math,
            "stride": self.stride,
            "kernel": self.kernel,
            "batch": self.batch,
            "height": self.height,
            "density": self.density,
            "tile": self.tile._asdict(),
        }


def entry_of(case: Case) -> tuple[str, tiles.Entry]:
    """The row of tiles.TABLE that a case gets its tile from."""
    column = tiles.column_of(case.arch)
    math = case.math if case.dtype == torch.float32 else "half"
    load = tiles._load(case.kind, case.geometry, case.blocksize, case.nnzb, column)
    return case.kind, tiles.find(case.kind, case.tile.block_n, math, load, column)


def entries(arch: str) -> set[tuple[str, tiles.Entry]]:
    """The rows of tiles.TABLE for one target."""
    column = tiles.column_of(arch)
    return {(kind, row) for row in tiles.TABLE if column in row.archs.split() for kind in row.kinds.split()}


def _shipped(arch: str) -> list[Case]:
    """Blocks that matter most, odd ones on sm_90, and then one more case for each row of the table without one."""
    cases = [Case(kind, arch, blocksize) for kind in KINDS for blocksize in ((32, 32), (64, 8))]
    if arch == "sm_90":
        cases += [Case(kind, arch, blocksize) for kind in KINDS for blocksize in ((16, 16), (64, 64))]
        cases += [
            Case("fprop", arch, (24, 48), "bf16", row_order=True),
            Case("fprop", arch, (8, 64)),
            Case("fprop", arch, (64, 64), kernel=1, density=0.5),
            Case("fprop", arch, (32, 32), stride=2, height=56),
            Case("dgrad", arch, (32, 32), stride=2, height=56),
            Case("dgrad", arch, (8, 64), "bf16"),
            Case("dgrad", arch, (8, 8)),
            Case("wgrad", arch, (32, 32), stride=2, height=56),
        ]
    if arch == "gfx950":  # gfx942's table
        return cases
    found = {entry_of(case) for case in cases}
    for kind in KINDS:
        for math in ("half", "tf32", "ieee"):
            for blocksize in ((32, 32), (64, 64), (128, 128)):
                for batch, density in ((64, 0.1), (1, 0.1), (64, 0.04)):
                    case = Case(kind, arch, blocksize, math, batch=batch, density=density)
                    if entry_of(case) not in found:
                        found.add(entry_of(case))
                        cases.append(case)
    return cases


SHIPPED = {arch: _shipped(arch) for arch in TARGETS}  # the rows of the table of counts
