"""A model away from its Python: torch.export, AOTInductor, ONNX, and a file for plain PyTorch."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hrbp
import processes
from hrbp.layers.view import sparse_layers

MODEL = """
import torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                      nn.Conv2d(16, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 5))
"""


def sparse(structure: str = "hrbp++") -> nn.Module:
    scope: dict = {}
    exec(MODEL, scope)
    return hrbp.sparsify(scope["model"], 0.6, structure=structure).eval()


@pytest.mark.slow
def test_export_keeps_the_sparse_operators_and_any_batch(tmp_path):
    model, x = sparse(), torch.randn(3, 3, 9, 9)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("bsrconv.fprop.default") == len(sparse_layers(model)) == 3
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 9, 9)
        torch.testing.assert_close(loaded(x), model(x))


AOT = """
import torch, hrbp
model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU())
hrbp.sparsify(model, 0.6, structure="unstructured", include=["0"]).eval()
batch = torch.export.Dim("batch", min=1, max=64)
program = torch.export.export(model, (torch.randn(3, 8, 9, 9),), dynamic_shapes=({0: batch},))
torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")
run = torch._inductor.aoti_load_package("model.pt2")
for batch in (1, 3, 5):
    x = torch.randn(batch, 8, 9, 9)
    torch.testing.assert_close(run(x), model(x))
"""


@pytest.mark.slow
def test_aot_inductor_runs_the_sparse_operators(tmp_path):
    """In processes of their own: the compiler leaves variables in the environment."""
    env = {**os.environ, "PYTHONPATH": str(Path(hrbp.__file__).parents[1])}
    made = processes.run([sys.executable, "-c", AOT], cwd=tmp_path, env=env)
    assert made.returncode == 0, made.stderr
    # The kernels are called through Python: a process that has not imported blocksparse is told what is missing.
    use = "torch._inductor.aoti_load_package('model.pt2')(torch.ones(3, 8, 9, 9))"
    told = processes.run([sys.executable, "-c", f"import torch; {use}"], cwd=tmp_path, env=env)
    assert told.returncode != 0
    assert "Could not find schema for bsrconv::fprop" in told.stderr
    told = processes.run([sys.executable, "-c", f"import torch, blocksparse; {use}"], cwd=tmp_path, env=env)
    assert told.returncode == 0, told.stderr


@pytest.mark.slow
def test_a_file_for_plain_pytorch(tmp_path):
    model, x = sparse(), torch.randn(3, 3, 9, 9)
    torch.save(hrbp.dense_state_dict(model), tmp_path / "dense.pt")
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "pair.pt")
    code = f"""{MODEL}
import sys
model.load_state_dict(torch.load("dense.pt"))
pair = torch.load("pair.pt")
torch.testing.assert_close(model.eval()(pair["x"]), pair["y"])
assert not {{"hrbp", "blocksparse"}} & {{name.partition(".")[0] for name in sys.modules}}
"""
    result = processes.run([sys.executable, "-c", code], cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_onnx_gets_the_dense_model(tmp_path, monkeypatch, capsys):
    model, x, given = sparse().train(), torch.randn(3, 3, 9, 9), {}

    def export(dense, args, path, **options):
        given.update(dense=dense, args=args, path=path, options=options)

    monkeypatch.setattr(torch.onnx, "export", export)
    hrbp.export_onnx(model, x, tmp_path / "model.onnx", opset_version=20)
    assert "3 sparse layers were written as dense ones, with zeros in the 6" in capsys.readouterr().out
    assert not given["dense"].training
    assert not sparse_layers(given["dense"])
    assert torch.equal(given["args"][0], x)
    assert given["options"]["opset_version"] == 20
    torch.testing.assert_close(given["dense"](x), model.eval()(x))
    assert len(sparse_layers(model)) == 3
    hrbp.export_onnx(model, (x,), tmp_path / "model.onnx", quiet=True)
    assert capsys.readouterr().out == ""

    def absent(*args, **options):
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", absent)
    with pytest.raises(ImportError, match=r"export_onnx\(\): .*onnxscript.*pip install onnx onnxscript"):
        hrbp.export_onnx(model, x, tmp_path / "model.onnx")


NO_ONNX = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_ONNX), reason=f"not installed: {', '.join(NO_ONNX)}")
def test_onnx_runtime_computes_the_same(tmp_path):
    import onnxruntime

    model, x = sparse(), torch.randn(3, 3, 9, 9)
    path = tmp_path / "model.onnx"
    hrbp.export_onnx(model, x, path, dynamic_shapes=({0: "batch"},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 9, 9)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)
