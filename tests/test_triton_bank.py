"""The filter bank in one launch: what PyTorch's indexing makes of the same blocks, to the bit."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings

import blocksparse as bs
import processes
from blocksparse import index
from blocksparse.kernels import torch_conv
from strategies import Case, cases

pytestmark = pytest.mark.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(pattern: bs.BSRPattern, dtype: torch.dtype) -> None:
    from blocksparse.kernels import triton_bank

    pattern = pattern.to(DEVICE)
    g = bs.ConvGeometry.of((1, pattern.shape[1], 16, 16), pattern.shape, 1, 3)
    tables = index.unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    values = torch.randn(pattern.nnzb, *pattern.blocksize).to(DEVICE, dtype)
    bank = triton_bank.scatter(values, tables, g)
    assert bank.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bank, pattern.to_dense(values))
    dense = torch.randn(pattern.shape).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    got = triton_bank.gather(dense, tables, g, tuple(values.shape))
    assert torch.equal(got, pattern.values_from_dense(dense))


@settings(max_examples=30)
@given(cases("torch"))
def test_any_pattern(case: Case):
    if case.pattern.nnzb and max(case.pattern.shape[2:]) <= 16:
        check(case.pattern, torch.float32 if case.dtype == torch.bfloat16 and DEVICE == "cpu" else case.dtype)


@pytest.mark.parametrize("blocksize", [(8, 1), (48, 4), (32, 32), (1, 1), (24, 8)], ids=str)
@pytest.mark.parametrize("ordered", [False, True], ids=["filters", "rows-permuted"])
def test_blocks_of_many_sizes(blocksize, ordered, poisoned_memory):
    bk, bc = blocksize
    order = torch.randperm(3 * bk) if ordered else None
    mask = torch.rand(3, 3 * 3 * 5) < 0.3
    mask[1] = False  # a block-row without blocks
    mask[0, 0] = True
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    pattern = bs.BSRPattern((3 * bk, 5 * bc, 3, 3), blocksize, indptr, mask.nonzero()[:, 1], order)
    check(pattern, torch.float16)


def test_it_is_what_the_torch_backend_uses_on_a_gpu(monkeypatch, poisoned_memory):
    """With tensors that say that they are on a GPU: the products are those of the plain way."""
    pattern = bs.BSRPattern.random((32, 24, 3, 3), (8, 4), 0.3)
    x, values = torch.randn(2, 24, 9, 9).contiguous(memory_format=torch.channels_last), torch.randn(pattern.nnzb, 8, 4)
    dy = torch.randn(2, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    g = bs.ConvGeometry.of(x.shape, pattern.shape, 1, 1)
    tables = index.unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    from blocksparse.kernels import triton_bank

    calls = []
    for name in ("scatter", "gather"):
        run = getattr(triton_bank, name)
        monkeypatch.setattr(triton_bank, name, lambda *args, run=run, name=name: (calls.append(name), run(*args))[1])

    def products():
        shape = tuple(values.shape)
        return (
            torch_conv.fprop(x, values, tables, None, g),
            torch_conv.dgrad(dy, values, tables, g, True),
            torch_conv.wgrad(x, dy, tables, g, shape),
        )

    plain = products()
    assert not calls or DEVICE == "cuda"
    calls.clear()
    monkeypatch.setattr(torch_conv, "_on_gpu", lambda t: True)
    for a, b in zip(products(), plain, strict=True):
        assert torch.equal(a, b)
    assert calls == ["scatter", "scatter", "gather"]


COMPILED = """if True:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from blocksparse.kernels import triton_bank as bank

    scatter = dict(values="*fp16", index="*i32", bank="*fp16", indices_at="i32", order_at="i32", columns="i32",
                   halvings="i32")
    gather = dict(bank="*fp16", index="*i32", out="*fp16", rows_at="i32", indices_at="i32", order_at="i32",
                  columns="i32", size="i32")
    sizes = {"BK": 8, "BC": 1, "ORDERED": True}
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        for kernel, signature, more in ((bank.scatter_kernel, scatter, {"COLUMNS": bank.COLUMNS, "ROWS": bank.ROWS}),
                                        (bank.gather_kernel, gather, {"BLOCK": bank.BLOCK})):
            constants = sizes | more
            source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
            made = compile(source, target=target)
            assert made.metadata.shared <= 48 << 10, made.metadata
"""


@pytest.mark.slow
def test_it_compiles_for_gpus_that_are_not_here():
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = processes.run([sys.executable, "-W", "ignore", "-c", COMPILED], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
