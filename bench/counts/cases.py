"""Which kernels are counted: a case is one launch of the Triton backend, on a layer that picks the tile of its row."""

from __future__ import annotations

from typing import NamedTuple

import torch

from blocksparse import ConvGeometry
from blocksparse.geometry import KINDS
from blocksparse.kernels import gpus, tiles
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
    number, sizes = case.math if case.dtype == torch.float32 else "half", case.tile
    for row in tiles.find(case.kind, sizes.block_n, number, gpus.column_of(case.arch)):
        if (row.block_m, row.block_k, row.num_warps, row.num_stages) == (sizes.block_m, *sizes[2:5]):
            return case.kind, row
    raise LookupError(f"cases.entry_of(): no row of tiles.TABLE has the tile of {case}")


def entries(arch: str) -> set[tuple[str, tiles.Entry]]:
    """The rows of tiles.TABLE for one target."""
    column = gpus.column_of(arch)
    return {(kind, row) for row in tiles.TABLE if column in row.archs.split() for kind in row.kinds.split()}


def _every_tile(case: Case) -> list[Case]:
    """The case with each tile that it could get, the smaller ones, which fill a device with little work, for one image.

    wgrad has eight splits, so that its sum is counted, too.
    """
    number = case.math if case.dtype == torch.float32 else "half"
    width, splits = tiles.block_n(case.kind, case.geometry, case.blocksize), 8 if case.kind == "wgrad" else 1
    rows = tiles.find(case.kind, width, number, gpus.column_of(case.arch))
    most = max(row.block_m for row in rows)
    return [
        case._replace(
            asked=Tile(row.block_m, width, row.block_k, row.num_warps, row.num_stages, splits),
            batch=case.batch if row.block_m == most else 1,
        )
        for row in rows
    ]


def _shipped(arch: str) -> list[Case]:
    """Blocks that matter most with every tile that they could get, odd ones on sm_90, and every other row of the table.

    Which tile a layer gets follows from these very counts: so none of them asks `pick`.
    """
    sizes = ((32, 32), (64, 8), (16, 16), (64, 64)) if arch == "sm_90" else ((32, 32), (64, 8))
    cases = [tiled for kind in KINDS for size in sizes for tiled in _every_tile(Case(kind, arch, size))]
    if arch == "sm_90":
        odd = (
            Case("fprop", arch, (24, 48), "bf16", row_order=True),
            Case("fprop", arch, (8, 64)),
            Case("fprop", arch, (64, 64), kernel=1, density=0.5),
            Case("fprop", arch, (32, 32), stride=2, height=56),
            Case("dgrad", arch, (32, 32), stride=2, height=56),
            Case("dgrad", arch, (8, 64), "bf16"),
            Case("dgrad", arch, (8, 8)),
            Case("wgrad", arch, (32, 32), stride=2, height=56),
        )
        cases += [_every_tile(case)[-1] for case in odd]
    if arch == "gfx950":  # gfx942's table
        return cases
    found = {entry_of(case) for case in cases}
    for kind in KINDS:
        for math in ("half", "tf32", "ieee"):
            for side in (32, 64, 128):
                for case in _every_tile(Case(kind, arch, (side, side), math)):
                    if entry_of(case) not in found:
                        found.add(entry_of(case))
                        cases.append(case)
    return cases


SHIPPED = {arch: _shipped(arch) for arch in TARGETS}  # the rows of the table of counts
