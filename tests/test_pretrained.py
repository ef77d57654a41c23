"""train --weights: a network begins with trained weights, of a file or of torchvision."""

import sys
import types

import pytest
import torch

import hrbp
from hrbp.cli import train as train_cli
from hrbp.formats.pretrained import pretrained, start_from
from hrbp.models import build
from hrbp.training.log import configuration
from test_train import SMALL, command, images

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def small_shapes(monkeypatch):
    monkeypatch.setattr(train_cli, "load", lambda name, split, **_: images(60 if split == "train" else 20))


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision whose resnet18 has the weights that are returned."""
    weights = build("resnet18", classes=1000, image_size=224).state_dict()
    entry = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(get_state_dict=lambda **_: weights))
    models = types.ModuleType("torchvision.models")
    models.get_model_weights = {"resnet18": entry}.__getitem__
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return weights


def test_trained_sparse_and_fine_tuned_in_one_command(tmp_path, small_shapes, capsys):
    dense = build("resnet8", classes=7, width=0.5, image_size=9)
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    words = (*SMALL, "--weights", str(tmp_path / "dense.pt"), "--out", str(tmp_path / "run"), "--structure", "block")
    words = (*words, "--option", "blocksize=(4, 4)", "--layer-sparsity", "*.conv1=0.25", "--min-density", "0.05")
    assert command(*words) == 0
    out = capsys.readouterr().out
    assert "begins with" in out
    assert "stays as drawn: 7 classes in the weights, 4 here" in out
    assert "masks first chosen by magnitude" in out
    config = configuration(tmp_path / "run" / "log.jsonl")
    assert config["settings"]["lr"] == 0.01
    assert config["saliency"] == "magnitude"
    density = hrbp.summary(hrbp.load(tmp_path / "run" / "model.pt")).rows[1].density
    assert density == pytest.approx(0.75, abs=0.05)
    assert command(*words, "--resume") == 0
    torch.save({name: 2 * t for name, t in dense.state_dict().items()}, tmp_path / "dense.pt")
    with pytest.raises(ValueError, match="weights is "):
        command(*words, "--resume")


def test_weights_of_torchvision(torchvision):
    model = build("resnet18", classes=5, image_size=224)
    told = start_from(model, pretrained("torchvision:resnet18"), "torchvision:resnet18")
    assert told == "fc stays as drawn: 1000 classes in the weights, 5 here"
    for name, t in model.state_dict().items():
        assert torch.equal(t, torchvision[name]) == (not name.startswith("fc.")), name


def test_what_does_not_fit_is_refused(tmp_path, torchvision, monkeypatch):
    model = build("resnet18", classes=5, image_size=32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"conv1\.weight has shape \(64, 3, 7, 7\) there and \(64, 3, 3, 3\) here"):
        start_from(model, torchvision, "torchvision:resnet18")
    with pytest.raises(ValueError, match=r"x\.pt is of another network: it lacks conv1\.weight.* and has conv0"):
        start_from(model, {f"conv0.{name.partition('.')[2]}": t for name, t in before.items()}, "x.pt")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    torch.save(hrbp.sparsify(model, 0.9).state_dict(), tmp_path / "sparse.pt")
    with pytest.raises(ValueError, match=r"holds stored blocks .*dense_state_dict"):
        pretrained(str(tmp_path / "sparse.pt"))
    with pytest.raises(ValueError, match=r"here are torchvision:resnet18, .*Any other network of torchvision"):
        pretrained("torchvision:convnext_tiny")
    with pytest.raises(ValueError, match=r"are of resnet18, and --model is resnet50"):
        command(*SMALL, "--weights", "torchvision:resnet18", "--model", "resnet50")
    with pytest.raises(ValueError, match="--structure narrow has fewer channels"):
        command(*SMALL, "--weights", "x.pt", "--structure", "narrow")
    with pytest.raises(ValueError, match=r"are of sparse layers; --structure is dense"):
        command(*SMALL, "--structure", "dense", "--min-density", "0.1")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"torchvision cannot be imported .*pip install torchvision, or give a file"):
        pretrained("torchvision:resnet18")
