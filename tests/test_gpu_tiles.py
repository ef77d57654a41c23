"""Every tile that a GPU may get, numerically, on real layers: by the one rule for 'equal', memory poisoned with NaN.

Every row of the Triton table that applies to the device, with its own number of warps and with eight, and the CUDA C++
tiles of real layers. `-k small` runs them on layers of a few pixels, for checkers of memory accesses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import blocksparse as bs
from bench.layers.contenders import Problem, Truth
from bench.layers.networks import parse_layer
from bench.layers.patterns import Blocksize, Structure, build
from bench.layers.rows import KINDS
from bench.shared import machine
from bench.shared.equal import Verdict, judge
from blocksparse import index
from blocksparse.kernels import gpus, slot_cost, tiles

GPU = torch.cuda.is_available()
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
    tile: tiles.Tile | None  # None: what slot_cost.pick says

    def __str__(self) -> str:
        tile = "picked" if self.tile is None else "x".join(map(str, self.tile))
        layer, (bk, bc) = self.layer.replace(",", "_"), self.blocksize
        return f"{self.backend}-{self.kind}-{self.math}-{layer}-{bk}x{bc}-{tile}"


def triton_work(arch: str, small: bool) -> Iterator[Work]:
    """Every row of the table that this device may get: on each layer, with its own warps and with eight."""
    column = gpus.column_of(arch)
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


def all_work(small: bool) -> list[Work]:
    """In an order in which equal layers, blocks and precisions follow each other."""
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability()) if GPU else "sm_90"
    return sorted([*triton_work(arch, small), *slot_work(small)], key=str)


class Layer:
    """The tensors of a layer, blocksize and precision, and what each product must equal."""

    def __init__(self, device: str, batch: int, layer: str, blocksize: tuple[int, int], math: str) -> None:
        (conv,) = parse_layer(layer)
        self.dtype, self.precision = DTYPES[math]
        if device == "cuda":
            machine.set_up_gpu(torch.device("cuda", 0), self.precision == "tf32")
        generator = torch.Generator().manual_seed(0)
        self.problem = Problem(conv, batch, self.dtype, torch.device(device), generator)
        self.pattern = build(conv.shape, Blocksize(*blocksize), Structure(), 0.85, generator).to(device)
        fan_in = self.pattern.density * conv.weights / conv.k
        self.values = self.problem.draw((self.pattern.nnzb, *blocksize), fan_in**-0.5)
        self.truth = Truth.of(self.problem, self.pattern.to_dense(self.values), KINDS)
        self.tables = index.unpack(self.pattern.index, self.pattern.shape, blocksize, self.pattern.nnzb)
        self.geometry = bs.ConvGeometry.of(conv.x_shape(batch), conv.shape, conv.stride, conv.padding)

    def run(self, work: Work) -> Tensor:
        """One kernel, in the memory format that it is made for."""
        last = work.backend == "triton"
        x, dy, g = self.problem.x["channels_last"], self.problem.dy["channels_last"], self.geometry
        backend: Any
        if last:
            from blocksparse.kernels import triton_conv as backend
        else:
            from blocksparse.kernels import cupy_conv as backend

            x, dy = bs.to_batch_last(x), bs.to_batch_last(dy)
        tile = work.tile or slot_cost.pick(work.kind, g, work.blocksize, self.pattern.nnzb, self.dtype)
        if work.kind == "fprop":
            return backend.fprop(x, self.values, self.tables, None, g, tile, precision=self.precision)
        if work.kind == "dgrad":
            memory_format = (last,) if last else ()
            return backend.dgrad(dy, self.values, self.tables, g, *memory_format, tile, precision=self.precision)
        return backend.wgrad(x, dy, self.tables, g, tuple(self.values.shape), tile, precision=self.precision)

    def check(self, work: Work) -> Verdict:
        got = self.run(work)
        exact, own = self.truth.exact[work.kind], self.truth.own[work.kind]
        if work.kind == "wgrad":
            exact, own = (self.pattern.values_from_dense(t) for t in (exact, own))
        return judge(got, exact, own, self.truth.largest[work.kind])


@functools.lru_cache(maxsize=1)  # the works of one layer follow each other
def layer_of(device: str, batch: int, *which: Any) -> Layer:
    return Layer(device, batch, *which)


def check(work: Work, device: str, batch: int) -> Verdict:
    return layer_of(device, batch, *work[:3]).check(work)


@pytest.fixture
def settings():
    """What a layer sets of PyTorch is set back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.usefixtures("settings", "poisoned_memory")
@pytest.mark.parametrize("work", all_work(small=False), ids=str)
def test_a_tile_on_a_real_layer(work):
    verdict = check(work, "cuda", 16)
    assert verdict.ok, verdict


@pytest.mark.gpu
@pytest.mark.usefixtures("settings", "poisoned_memory")
@pytest.mark.parametrize("work", all_work(small=True), ids=str)
def test_a_tile_on_a_small_layer(work):
    verdict = check(work, "cuda", 2)
    assert verdict.ok, verdict


# ---------------------------------------------------------------- the check itself, where there is no GPU


@pytest.mark.skipif(GPU, reason="a GPU runs the checks for real")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_that_computes_wrong_is_found(kind, monkeypatch):
    from blocksparse.kernels import triton_conv

    work = next(w for w in triton_work("", small=True) if w.kind == kind)
    assert check(work, "cpu", 1).ok
    right = getattr(triton_conv, kind)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[(0,) * out.dim()] += 0.5 * out.abs().max()
        return out

    monkeypatch.setattr(triton_conv, kind, wrong)
    verdict = check(work, "cpu", 1)
    assert not verdict.ok
    assert "max error" in str(verdict)
    monkeypatch.setattr(triton_conv, kind, lambda *args, **kwargs: torch.full_like(right(*args, **kwargs), torch.nan))
    assert "not finite" in str(check(work, "cpu", 1))


def test_every_row_of_the_table_is_checked_with_its_own_warps_and_with_eight():
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = {(w.kind, w.tile[:3], w.tile.num_stages, w.tile.num_warps) for w in triton_work(arch, False)}
        needed = {
            (kind, (row.block_m, row.widest, row.block_k), row.num_stages, warps)
            for row in tiles.TABLE if arch in row.archs.split()
            for kind in row.kinds.split() for warps in (row.num_warps, 8)
        }  # fmt: skip
        assert found == needed
    assert len(set(map(str, all_work(small=False)))) == len(all_work(small=False))
