"""python bench/tiles_check.py: every tile that this device may get, numerically, on real layers against float64."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import blocksparse as bs
import contenders
import machine
import report
from blocksparse import index
from blocksparse.kernels import slots, tiles
from contenders import Problem, Truth, judge
from layers import Layer, parse_layer
from patterns import Blocksize, Structure, build
from rows import ERROR, FAIL, KINDS, OK

DESCRIPTION = """\
Runs every row of the Triton table that applies to this device (with its own number of warps, and with eight), and the
CUDA C++ tiles of real layers, and holds each result against the dense float64 convolution by the benchmark's own rule.
Outputs are poisoned with NaN first.
"""

# A strided 3x3, a plain one, a 1x1; channels that 128 divides.
REAL = ("resnet50.layer2.0.3x3", "resnet50.layer3.3x3", "resnet50.layer4.1x1in")
SMALL = ("128,128,3,2,5", "128,128,3,1,4", "128,128,1,1,5")
OTHER_SIDES = (32, 8, 128)  # of a block: the side that is not the tile's N
SLOT_BLOCKS = ((8, 1), (64, 1), (32, 8))
DTYPES = {"half": (torch.float16, "ieee"), "bf16": (torch.bfloat16, "ieee"),
          "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}  # fmt: skip


class Work(NamedTuple):
    """One kernel to run."""

    layer: str
    blocksize: tuple[int, int]
    math: str  # a key of DTYPES
    backend: str
    kind: str
    tile: tiles.Tile | None  # None: what slots.pick says


@dataclass
class Row:
    backend: str
    kind: str
    layer: str
    blocksize: tuple[int, int]
    math: str
    tile: str
    status: str
    reason: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments(argv)
    begin, device = time.perf_counter(), args.device
    absent = bs.available_backends()
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else ""
    work = list(triton_work(arch, args.small)) if absent["triton"] is None else []
    work += list(slot_work(args.small)) if absent["cupy"] is None and device.type == "cuda" else []
    part, parts = args.part
    work = sorted(work[part::parts])  # equal layers, blocks and precisions follow each other
    rows: list[Row] = []
    checker = Checker(device, 2 if args.small else 16)
    for at, item in enumerate(work):
        rows.append(checker.check(item))
        if rows[-1].status != OK:
            print(f"{rows[-1].status}: {rows[-1]}", flush=True)
        if args.json and (at % 10 == 9 or at == len(work) - 1):
            content = {"kind": "tiles", "complete": at == len(work) - 1, "seconds": time.perf_counter() - begin}
            report.write_json(args.json, content | {"absent": absent, "rows": [asdict(row) for row in rows]})
    bad = sum(row.status != OK for row in rows)
    missing = "; ".join(f"{name}: {why}" for name, why in absent.items() if why)
    print(f"{len(rows)} tiles, {bad} wrong" + (f" (not run: {missing})" if missing else ""))
    return 1 if bad or not rows else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/tiles_check.py", description=DESCRIPTION)
    parser.add_argument("--device", type=machine.device, help="default: cuda if there is one")
    parser.add_argument("--small", action="store_true", help="layers of a few pixels: for checkers of memory accesses")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="only every N-th, from the I-th on")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def _part(text: str) -> tuple[int, int]:
    at, _, parts = text.partition("/")
    if not (at.isdigit() and parts.isdigit() and int(at) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: it needs I/N with I < N, such as 0/8")
    return int(at), int(parts)


def triton_work(arch: str, small: bool) -> Iterator[Work]:
    """Every row of the table that this device may get: on each layer, with its own warps and with eight."""
    column = tiles.column_of(arch)
    for entry in tiles.TABLE:
        if column not in entry.archs.split():
            continue
        for kind in entry.kinds.split():
            for layer, other in zip(SMALL if small else REAL, OTHER_SIDES, strict=True):
                block = (other, entry.widest) if kind == "dgrad" else (entry.widest, other)
                maths = ("half", "bf16") if entry.math == "half" else (entry.math,)
                for warps in dict.fromkeys((entry.num_warps, 8)):
                    for math in maths[:1] if warps == 8 or small else maths:
                        tile = tiles.Tile(
                            entry.block_m, entry.widest, entry.block_k, warps, entry.num_stages,
                            3 if kind == "wgrad" else 1,
                        )  # fmt: skip
                        yield Work(layer, block, math, "triton", kind, tile)


def slot_work(small: bool) -> Iterator[Work]:
    for layer in SMALL if small else REAL:
        for block in SLOT_BLOCKS:
            for math in DTYPES:
                for kind in KINDS:
                    yield Work(layer, block, math, "cupy", kind, None)


class Checker:
    """Keeps the tensors and the truth of the last layer, blocksize and precision."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device, self.batch, self.key = device, batch, None

    def check(self, work: Work) -> Row:
        row = Row(work.backend, work.kind, work.layer, work.blocksize, work.math, str(work.tile or "picked"), OK, "")
        try:
            self._prepare(work)
            got, exact, own = self._run(work)
        except Exception as error:  # one tile that cannot run ends nothing
            row.status, row.reason = ERROR, f"{type(error).__name__}: {error}"[:500]
            return row
        dtype, precision = DTYPES[work.math]
        eps = contenders.precision_eps(dtype, precision == "tf32")
        verdict = judge(got, exact, own, eps, self.truth.terms[work.kind])
        row.status, row.reason = OK if verdict.ok else FAIL, str(verdict)
        return row

    def _prepare(self, work: Work) -> None:
        key: Any = (work.layer, work.blocksize, work.math)
        if key == self.key:
            return
        (layer,) = parse_layer(work.layer)
        dtype, precision = DTYPES[work.math]
        if self.device.type == "cuda":
            machine.set_up_gpu(self.device, precision == "tf32")
        generator = torch.Generator().manual_seed(len(str(key)))
        self.problem = Problem(layer, self.batch, dtype, self.device, generator)
        pattern = build(layer.shape, Blocksize(*work.blocksize), Structure(), 0.85, generator).to(self.device)
        fan_in = pattern.density * layer.weights / layer.k
        self.values = self.problem.draw((pattern.nnzb, *pattern.blocksize), fan_in**-0.5)
        self.truth = Truth.of(self.problem, pattern.to_dense(self.values), KINDS)
        self.tables = index.unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
        self.pattern, self.geometry, self.key = pattern, _geometry(layer, self.batch), key

    def _run(self, work: Work) -> tuple[Tensor, Tensor, Tensor]:
        """(result, float64, PyTorch's own) of one kernel, in the memory format that it is made for."""
        layout = "channels_last" if work.backend == "triton" else "contiguous"
        x, dy, g = self.problem.x[layout], self.problem.dy[layout], self.geometry
        dtype, precision = DTYPES[work.math]
        backend: Any
        if work.backend == "triton":
            from blocksparse.kernels import triton_conv as backend
        else:
            from blocksparse.kernels import cupy_conv as backend
        tile = work.tile or slots.pick(work.kind, g, work.blocksize, self.pattern.nnzb, dtype)
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN
        try:
            if work.kind == "fprop":
                got = backend.fprop(x, self.values, self.tables, None, g, tile, precision=precision)
            elif work.kind == "dgrad":
                last = layout == "channels_last"
                got = backend.dgrad(dy, self.values, self.tables, g, last, tile, precision=precision)
            else:
                shape = tuple(self.values.shape)
                got = backend.wgrad(x, dy, self.tables, g, shape, tile, precision=precision)
                got = self.pattern.to_dense(got)
        finally:
            torch.use_deterministic_algorithms(False)
        exact, own = self.truth.exact[work.kind], self.truth.own["contiguous"][work.kind]
        if work.kind == "wgrad":
            mask = self.pattern.to_mask()
            exact, own = exact * mask, own * mask
        return got, exact, own


def _geometry(layer: Layer, batch: int) -> bs.ConvGeometry:
    return bs.ConvGeometry.of(layer.x_shape(batch), layer.shape, layer.stride, layer.padding)


if __name__ == "__main__":
    sys.exit(main())
