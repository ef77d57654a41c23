"""A backend is a file: added, it is found, chosen, run, refused and explained; nothing else names it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

import blocksparse as bs
from blocksparse import backends, plan
from blocksparse.backends import Backend
from blocksparse.layout import FORMATS
from oracle import assert_products
from strategies import Case

ROOT = Path(__file__).parent.parent
EXAMPLE = Path(__file__).parent / "examples_of_extension" / "backends"


def forget() -> None:
    plan.plan_conv.cache_clear()
    for name in [name for name in sys.modules if name.startswith("blocksparse.backends.")]:
        if Path(sys.modules[name].__file__).parent != ROOT / "blocksparse" / "backends":
            del sys.modules[name]
            delattr(backends, name.rpartition(".")[2])


@pytest.fixture
def add(monkeypatch):
    """Puts a folder of backends beside the library's own, for a test."""

    def added(folder: Path) -> None:
        monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(folder)])

    yield added
    monkeypatch.undo()
    forget()


def layer(dtype=torch.float32, memory_format="contiguous", ordered=False):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(16, generator=generator) if ordered else None
    mask = torch.rand(16, 12, 3, 3, generator=generator) < 0.02
    pattern = bs.BSRPattern.from_mask(mask, (4, 3), order)
    return Case(pattern, 2, 9, 8, (2, 1), (1, 0), (1, 2), True, memory_format, dtype, 0)


def test_a_file_is_a_backend(add):
    before = list(bs.available_backends())
    add(EXAMPLE)
    assert bs.available_backends() == {**dict.fromkeys(before), "dense": None}
    assert list(bs.available_backends()) == [*before, "dense"]
    case = layer()
    x, values, _, _, pattern = case.tensors("cpu")
    found = bs.explain(x, values, pattern, *case.conv, backend="dense")
    assert (found.backend, found.tiles) == ("dense", {})
    assert "backend: dense (asked for)" in str(found)
    assert "dense" not in bs.explain(x, values, pattern, *case.conv).backend  # it is nobody's default
    with pytest.raises(ValueError, match=r"backend is 'dens'; it needs one of 'torch', .*, 'dense' or None"):
        bs.conv2d(x, values, pattern, backend="dens")


@pytest.mark.parametrize("ordered", [False, True], ids=["filters", "rows-permuted"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_computes_all_products(add, dtype, memory_format, ordered):
    add(EXAMPLE)
    case = layer(dtype, memory_format, ordered)
    x, values, bias, dy, pattern = case.tensors("cpu")
    assert_products(x, values, pattern, bias, dy, *case.conv, "dense")
    # In a network: autograd, a residual, a ReLU, a module, the compiler.
    inputs = [t.requires_grad_() for t in (x, values, bias)]

    def grads(backend):
        y = bs.conv2d(x, values, pattern, bias, *case.conv, residual=dy, relu=True, backend=backend)
        return y, *torch.autograd.grad(y, inputs, dy.abs())

    for a, b in zip(grads("dense"), grads("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.stride() == b.stride()
    module = bs.BSRConv2d(pattern, *case.conv, backend="dense", dtype=dtype)
    needed = module.to_dense()(x)
    torch.testing.assert_close(module(x), needed, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), needed, rtol=1e-5, atol=1e-5)


def test_its_refusal_is_quoted(add):
    add(EXAMPLE)
    case = layer(torch.bfloat16)
    x, values, bias, _, pattern = case.tensors("cpu")
    with pytest.raises(ValueError, match=r"backend 'dense' cannot run this: dtype = torch.bfloat16: it takes float32"):
        bs.conv2d(x, values, pattern, bias, *case.conv, backend="dense")


def test_files_that_are_no_backend_say_so(add, tmp_path):
    (tmp_path / "broken.py").write_text("import a_library_that_nobody_has\n")
    (tmp_path / "nothing.py").write_text("x = 1\n")
    (tmp_path / "_helper.py").write_text("raise AssertionError\n")
    before = bs.available_backends()
    add(tmp_path)
    found = bs.available_backends()
    assert {name: found.pop(name) for name in list(found) if name not in before} == {
        "broken": "importing its file failed: ModuleNotFoundError: No module named 'a_library_that_nobody_has'",
        "nothing": f"{tmp_path / 'nothing.py'} defines 0 subclasses of Backend; it needs one",
    }
    assert found == before
    case = layer()
    x, values, bias, _, pattern = case.tensors("cpu")
    with pytest.raises(RuntimeError, match=r"backend 'broken' cannot run this: importing its file failed: "):
        bs.conv2d(x, values, pattern, bias, backend="broken")


DEFAULT = """
from blocksparse.backends import Backend
from blocksparse.layout import FORMATS
from blocksparse.backends.torch import Torch

class {name}(Backend):
    fprop, dgrad, wgrad = Torch.fprop, Torch.dgrad, Torch.wgrad
    def absent(self): return {absent}
    def refusal(self, work): return {refusal}
    def default(self, work): return {turn}, "a test"
    def seconds(self, kind, work): return {seconds}
"""


def write(folder: Path, name: str, absent=None, refusal=None, turn=0, seconds=None) -> None:
    text = DEFAULT.format(name=name.title(), absent=repr(absent), refusal=repr(refusal), turn=turn, seconds=seconds)
    (folder / f"{name}.py").write_text(text)


def test_the_default_is_the_lowest_turn_then_the_least_time(add, tmp_path):
    case = layer()
    x, values, bias, _, pattern = case.tensors("cpu")
    write(tmp_path, "first", turn=-1, absent="it is not there")
    write(tmp_path, "second", turn=-1, refusal="it will not")
    write(tmp_path, "third", turn=0, seconds="1e-12 if kind != 'dgrad' else 1e9")
    write(tmp_path, "fourth", turn=1, seconds="0.0")
    add(tmp_path)
    plan.plan_conv.cache_clear()
    found = bs.explain(x, values, pattern, *case.conv)
    assert [found.products[kind].backend == "third" for kind in ("fprop", "dgrad", "wgrad")] == [True, False, True]
    why = found.products["fprop"].why
    assert why.startswith("estimated ")
    assert "1e-09 ms by third; threads: 1" in why
    assert "fourth" not in why
    assert "; backend 'first' is not available: it is not there; backend 'second' cannot run this: it will not" in why
    y = bs.conv2d(x, values, pattern, bias, *case.conv)
    assert torch.equal(y, bs.conv2d(x, values, pattern, bias, *case.conv, backend="torch"))


def test_the_plan_names_no_backend():
    """Nor does anything between a call and the backend: their names stand in their own files."""
    names = {path.stem for path in (ROOT / "blocksparse" / "backends").glob("[a-z]*.py")}
    assert names == set(bs.available_backends())
    for file in ("plan", "ops", "modules", "batching", "backends/__init__"):
        for node in ast.walk(ast.parse((ROOT / "blocksparse" / f"{file}.py").read_text())):
            assert not (isinstance(node, ast.Constant) and node.value in names - {"cpu"}), (file, node.value)


def test_every_backend_says_what_the_protocol_asks():
    for name, backend in backends.all_backends().items():
        assert isinstance(backend, Backend)
        assert backend.name == name
        assert type(backend).__doc__
        for kind in ("fprop", "dgrad", "wgrad"):
            assert kind in vars(type(backend)), name
