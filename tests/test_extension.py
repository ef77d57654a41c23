"""A method and a structure are a file each: put into their package, everything offers them. The files are examples."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import hrbp
from hrbp import data
from hrbp.cli.main import main
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.methods.registry import METHODS
from hrbp.structures.registry import CLASSES, STRUCTURES
from hrbp.study.variants import Variant

ROOT = Path(__file__).parent.parent
EXAMPLES = Path(__file__).parent / "examples_of_extension"
OWN_METHODS = ["static", "set", "rigl", "hrbp", "gmp", "ste", "sr-ste", "subp"]


@pytest.fixture
def put(monkeypatch) -> Iterator[Callable[[str, Path], None]]:
    """Adds a folder to a package of hrbp for one test, as if its files lay there."""
    before = set(sys.modules)

    def add(package: str, folder: Path) -> None:
        module = importlib.import_module(f"hrbp.{package}")
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder)])

    yield add
    for name in set(sys.modules) - before:
        if name.startswith(("hrbp.methods.", "hrbp.structures.")):
            del sys.modules[name]


@pytest.fixture
def extended(put) -> None:
    put("methods", EXAMPLES / "methods")
    put("structures", EXAMPLES / "structures")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.Flatten())


def sparse(structure: str, **options) -> nn.Module:
    return hrbp.sparsify(network(), 0.75, structure=structure, include=["0", "2"], distribution="uniform", **options)


def trained(net: nn.Module, evolver: hrbp.Evolver, steps: int) -> list[set[str]]:
    """The layers that changed, of each update."""
    changed = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        net(torch.randn(4, 8, 4, 4, generator=generator)).square().mean().backward()
        assert evolver.wants_dense_grad() is evolver._method.needs_gradient
        evolver.optimizer.step()
        update = evolver.step()
        evolver.optimizer.zero_grad()
        if update is not None:
            changed.append({name for name, share in update.changed.items() if share > 0})
    return changed


# ---------------------------------------------------------------- a file is all it takes


def test_a_new_method_and_a_new_structure_train(extended, tmp_path):
    assert list(METHODS) == [*OWN_METHODS, "mest"]
    assert list(STRUCTURES)[-1] == "diagonal"
    net = sparse("diagonal")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    evolver = hrbp.Evolver(net, optimizer, "MEST", total_steps=10, every=1, drop=0.5, mix=0.5)
    before = {name: layer.mask() for name, layer in sparse_layers(net).items()}
    changed = trained(net, evolver, 3)
    assert len(changed) == 3
    assert set().union(*changed) == {"0", "2"}
    for name, layer in sparse_layers(net).items():
        k, c = layer.shape[:2]
        places = (torch.arange(c) - torch.arange(k)[:, None]) % c
        kept = layer.mask().flatten(2)
        assert torch.equal(kept.any(2), kept.all(2))
        assert all(len(set(kept[places == d].flatten().tolist())) == 1 for d in range(c))
        assert kept.any(2).sum(1).tolist() == [c // 4] * k
        assert not torch.equal(layer.mask(), before[name])
    hrbp.save(net, tmp_path / "model.pt")
    again = hrbp.load(tmp_path / "model.pt", network())
    assert record_of(again).structure == record_of(net).structure
    assert type(record_of(again).structure) is CLASSES["Diagonals"]
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(again(x), net.eval()(x))


def test_what_says_which_there_are_has_them(extended, capsys):
    assert hrbp.make_mask(torch.rand(8, 8, 3, 3), 0.5, "diagonal").sum() == 8 * 8 * 9 // 2
    assert hrbp.Settings(1, evolve="Mest").evolve == "mest"
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "diagonal kernels on the same diagonal of filters and input channels" in text
    assert "mest the units of least |weight| + mix * |gradient| go, random ones come (Yuan et al., 2021)" in text
    assert "mix what a gradient counts for, default 1.0" in text
    assert "gmp, ste, sr-ste, subp, mest)" in text  # that take --every
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "subp, mest" in text
    assert "hrbp++, diagonal" in text
    assert Variant("diagonal", "mest").refuses() is None


def test_what_they_do_not_take_is_refused(extended):
    net = sparse("diagonal")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(TypeError, match="'mest' has no option speed; it takes: every, drop, until, seed, mix"):
        hrbp.Evolver(net, optimizer, "mest", total_steps=1000, speed=1)
    with pytest.raises(ValueError, match=r"Evolver\(\): mix is -1; it needs a number >= 0"):
        hrbp.Evolver(net, optimizer, "mest", total_steps=1000, mix=-1)
    with pytest.raises(ValueError, match=r"every is True; it needs an integer >= 1"):
        hrbp.Evolver(net, optimizer, "mest", total_steps=1000, every=True)
    with pytest.raises(ValueError, match=r"drop is True; it needs a number in \[0, 1\]"):
        hrbp.Evolver(net, optimizer, "mest", total_steps=1000, drop=True)
    with pytest.raises(ValueError, match="masks of structure 'diagonal' do not change"):
        hrbp.Evolver(net, optimizer, "gmp", total_steps=1000, sparsity=0.9)
    with pytest.raises(ValueError, match="'ste' makes masks anew at every step"):
        sparse("diagonal", method="ste")
    with pytest.raises(ValueError, match="structure is 'diagonal', whose filters are regrouped"):
        hrbp.from_prune(pruned(), structure="diagonal")


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(8, 8, 3))
    nn.utils.prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def test_a_file_is_gone_when_its_folder_is(put):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hrbp.methods, "__path__", [*hrbp.methods.__path__, str(EXAMPLES / "methods")])
        assert "mest" in METHODS
    assert list(METHODS) == OWN_METHODS


@pytest.mark.parametrize("age", [0, 3600], ids=["new", "settled"])
def test_a_file_put_into_a_folder_later_is_found(put, tmp_path, age):
    """Folders are listed again only where their times have changed, or are too new to tell."""
    put("methods", tmp_path)
    for step, present in enumerate((False, True, False)):
        if present:
            shutil.copy(EXAMPLES / "methods" / "mest.py", tmp_path)
        else:
            (tmp_path / "mest.py").unlink(missing_ok=True)
        if age:
            os.utime(tmp_path, (time.time() - age + step,) * 2)
        assert ("mest" in METHODS) is present
        assert ("mest" in METHODS) is present


def test_a_training_from_the_command_line(extended, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("hrbp.cli.train.load", lambda name, split, **_: data.load("shapes", split, count=32))
    asked = ["--structure", "diagonal", "--sparsity", "0.75", "--evolve", "mest", "--evolve-option", "mix=0.5"]
    small = ["--model", "resnet8", "--width", "0.5", "--batch-size", "8", "--epochs", "1", "--device", "cpu"]
    assert main(["train", *asked, *small, "--every", "1", "--out", str(tmp_path / "run")]) == 0
    assert "test accuracy" in capsys.readouterr().out
    written = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"mix": 0.5' in written
    assert '"kind": "update"' in written


# ---------------------------------------------------------------- what a method may keep

COUNTING = """
from dataclasses import dataclass
from hrbp.methods.set import SET

@dataclass(frozen=True)
class Counting(SET):
    name = "counting"

    def selections(self, now):
        now.state["updates"] = now.state.get("updates", 0) + 1
        return super().selections(now)
"""


def test_what_a_method_keeps_is_in_the_state(put, tmp_path):
    (tmp_path / "counting.py").write_text(COUNTING)
    put("methods", tmp_path)
    net = sparse("kernel")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    evolver = hrbp.Evolver(net, optimizer, "counting", total_steps=10, every=1)
    assert "own" not in evolver.state_dict()
    trained(net, evolver, 3)
    state = evolver.state_dict()
    assert state["own"] == {"updates": 3}
    again = hrbp.Evolver(net, optimizer, "counting", total_steps=10, every=1)
    again.load_state_dict(state)
    trained(net, again, 1)
    assert again.state_dict()["own"] == {"updates": 4}
    assert state["own"] == {"updates": 3}


# ---------------------------------------------------------------- files that are wrong

UNSET = """
from dataclasses import dataclass, field
from hrbp.methods.static import Static

@dataclass(frozen=True)
class Unset(Static):
    name = "unset"
    often: list = field(default_factory=list)
"""


@pytest.mark.parametrize(
    ("package", "text", "error", "message"),
    [
        ("methods", "raise RuntimeError('broken on purpose')", RuntimeError, "broken on purpose"),
        ("methods", "def broken(:", SyntaxError, r"new\.py, line 1"),
        ("structures", "import nowhere_at_all", ModuleNotFoundError, "nowhere_at_all"),
        (
            "methods",
            COUNTING.replace('"counting"', '"rigl"'),
            ValueError,
            r"both .*new\.py and .*rigl\.py offer 'rigl'",
        ),
        ("methods", COUNTING.replace("@dataclass(frozen=True)", ""), TypeError, r"new\.py: Counting is no dataclass"),
        ("methods", COUNTING.replace('"counting"', '"Counting"'), TypeError, "name is 'Counting'; it needs small"),
        (
            "methods",
            UNSET,
            TypeError,
            "Unset.often has no default; an option that has to be given has None",
        ),
        (
            "methods",
            COUNTING.replace('"counting"', '"counting"\n    begins_dense = True'),
            TypeError,
            "does not ask for one: it needs dense_weights = True",
        ),
        (
            "methods",
            "from hrbp.methods.base import Method\nclass Lazy(Method):\n    name = 'lazy'\n",
            TypeError,
            "Lazy has a name and no due, selections; define them",
        ),
        (
            "structures",
            "from hrbp.structures.grains import Grains\nclass Other(Grains):\n    pass\n",
            TypeError,
            "Other is no dataclass; files of models hold its fields",
        ),
    ],
)
def test_a_broken_file_says_so_itself(put, tmp_path, package, text, error, message):
    (tmp_path / "new.py").write_text(text)
    put(package, tmp_path)
    names = {"methods": METHODS, "structures": CLASSES}[package]
    for _ in range(2):  # it does not go away
        with pytest.raises(error, match=message):
            list(names)
        sys.modules.pop(f"hrbp.{package}.new", None)


def test_the_registries_are_in_order_again():
    assert list(METHODS) == OWN_METHODS
    assert {"Grains", "NM", "Transposable", "Groups", "Elementwise", "Mixed"} == set(CLASSES)


# ---------------------------------------------------------------- nobody asks for a method by its name


def test_no_file_but_its_own_compares_the_name_of_a_method():
    names = set(METHODS) - set(STRUCTURES)
    for path in (ROOT / "hrbp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
            elif isinstance(node, ast.Tuple | ast.List | ast.Set):
                sides = [node] if sum(isinstance(e, ast.Constant) and e.value in names for e in node.elts) > 1 else []
            else:
                continue
            found = {leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)}
            assert not found & names, f"{path}, line {node.lineno}"
