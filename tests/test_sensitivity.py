"""One layer pruned at a time: right answers against pruning by hand, continued after a stop, and what is said of it."""

from __future__ import annotations

import argparse
import csv
import math
import os
import signal

import pytest
import torch

import hrbp
from hrbp import data
from hrbp.cli import study as study_cli
from hrbp.data.batches import Batches
from hrbp.models import build
from hrbp.study.folder import read
from hrbp.study.regularity import OPTIONS
from hrbp.study.sensitivity import Sensitivity
from hrbp.study.sensitivity_table import parts, rows

GRAINS = ["unstructured", "kernel", "n:m"]


@pytest.fixture(scope="module")
def images():
    return data.load("shapes", "test", count=60)


@pytest.fixture(scope="module")
def networks(tmp_path_factory, images):
    """Two networks that tell some shapes apart: their last layer is fitted to the test images."""
    found = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build("resnet8", classes=len(images.classes), width=0.5, image_size=16, channels=3).eval()
        ((x, y),) = Batches(images, 60, train=False).epoch()
        with torch.no_grad():
            features = torch.cat([hooked(model, x), torch.ones(60, 1)], 1)
            fitted = torch.linalg.lstsq(features, torch.eye(len(images.classes))[y]).solution
            model.fc.weight.copy_(fitted[:-1].t())
            model.fc.bias.copy_(fitted[-1])
        found[seed] = tmp_path_factory.mktemp("networks") / f"{seed}.pt"
        hrbp.save(model, found[seed])
    return found


def hooked(model, x):
    """What comes to the last layer."""
    seen = []
    handle = model.fc.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0]


def study(out, networks, images, sparsities=(0.5, 0.75)):
    return Sensitivity(out, networks, GRAINS, sparsities, Batches(images, 40, train=False), options=OPTIONS, quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, networks, images):
    out = tmp_path_factory.mktemp("sensitivity")
    return out, study(out, networks, images).run()


@pytest.mark.slow
def test_right_answers_are_those_of_a_network_pruned_by_hand(whole, networks, images):
    found = whole[1]
    ((x, y),) = Batches(images, 60, train=False).epoch()
    for seed, layer in ((0, "conv1"), (1, "layer2.0.conv1"), (1, "fc")):
        for grain in ("unstructured", "kernel"):
            model = hrbp.load(networks[seed]).eval()
            assert found["whole"][str(seed)] == int((model(x).argmax(1) == y).sum()) > 20
            weight = model.get_submodule(layer).weight
            bank = weight.detach().view(*weight.shape[:2], -1).abs()
            worth = bank.flatten() if grain == "unstructured" else bank.sum(2).flatten()
            kept = torch.zeros_like(worth)
            kept[worth.argsort(descending=True)[: round(0.25 * len(worth))]] = 1
            shape = weight.shape if grain == "unstructured" or weight.dim() == 2 else (*weight.shape[:2], 1, 1)
            with torch.no_grad():
                weight.mul_(kept.view(shape))
                right, sparsity = found["right"][f"{seed}, {layer}, {grain}, 0.75"]
                assert right == int((model(x).argmax(1) == y).sum())
                assert sparsity == pytest.approx(1 - float(kept.mean()))


@pytest.mark.slow
def test_every_layer_grain_and_sparsity_and_nothing_else(whole):
    out, found = whole
    layers = list(found["layers"])
    assert layers[0] == "conv1"
    assert layers[-1] == "fc"
    refused = [key for key in found["refused"] if key.startswith("conv1, n:m")]
    assert len(refused) == 2  # three channels
    assert "m = 8 does not divide C = 3" in found["refused"][refused[0]]
    assert len(found["right"]) == 2 * (len(layers) * 3 * 2 - len(found["refused"]))
    with (out / "sensitivity.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows(found)) == len(found["right"]) // 2
    assert (out / "sensitivity.png").stat().st_size > 10_000
    assert read(out / "sensitivity.json") == found


@pytest.mark.slow
def test_one_that_was_stopped_continues_and_a_finished_one_only_reads(whole, networks, images, tmp_path, monkeypatch):
    tested, right = [], Sensitivity._right

    def counted(self, model):
        tested.append(1)
        if len(tested) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return right(self, model)

    monkeypatch.setattr(Sensitivity, "_right", counted)
    monkeypatch.setattr("hrbp.study.sensitivity.draw_sensitivity", lambda *_: None)
    assert study(tmp_path, networks, images).run()["stopped"] == signal.SIGTERM
    assert study(tmp_path, networks, images).run() == whole[1]
    assert len(tested) == 2 + len(whole[1]["right"])  # nothing twice
    monkeypatch.setattr(Sensitivity, "_right", None)
    assert study(tmp_path, networks, images).run() == whole[1]
    fewer = study(tmp_path, networks, images, sparsities=(0.5,)).run()
    assert {row["asked"] for row in rows(fewer)} == {0.5}
    assert study(tmp_path, networks, images).run() == whole[1]  # the others were not lost


@pytest.mark.slow
def test_other_networks_and_images_are_refused(whole, networks, images):
    swapped = {0: networks[1], 1: networks[0]}
    with pytest.raises(ValueError, match="the network of seed 0 is another one; remove it, or use another folder"):
        study(whole[0], swapped, images)
    with pytest.raises(ValueError, match="the test images are others"):
        study(whole[0], networks, data.load("shapes", "test", count=50))


def test_what_is_said():
    """Two seeds of 100 images each: 80 and 90 are right with the whole network."""
    right = {
        "0, a, unstructured, 0.5": [70, 0.5], "1, a, unstructured, 0.5": [84, 0.5],
        "0, b, unstructured, 0.5": [80, 0.5], "1, b, unstructured, 0.5": [90, 0.5], "0, b, kernel, 0.5": [30, 0.5],
    }  # fmt: skip
    found = {
        "settings": {"networks": {"0": 1, "1": 2}, "images": ["shapes", 100, 1], "sparsities": [0.5],
                     "structures": ["unstructured", "kernel"]},
        "whole": {"0": 80, "1": 90}, "layers": {"a": 1000, "b": 20}, "right": right,
        "refused": {"a, kernel, 0.5": "why"}, "stopped": None,
    }  # fmt: skip
    first, second, third = rows(found)
    half = 12.7062047 * 0.04 / math.sqrt(2) / math.sqrt(2)
    assert (first["lost"], first["low"], first["high"]) == pytest.approx((0.08, 0.08 - half, 0.08 + half))
    assert (second["lost"], second["accuracy"]) == pytest.approx((0.0, 0.85))
    assert (third["seeds"], third["lost"], third["low"]) == (1, 0.5, None)
    shown = parts(found)
    assert shown.lines == [
        ["a", "1,000", "50", f"8.0 +- {100 * half:.1f}", "-"],
        ["b", "20", "50", "0.0 +- 0.0", "50.0"],
    ]
    assert shown.notes[1:] == ["2-D kernel: not in a"]
    assert shown.sentences == ["0-D weight at 50% density: most is lost by a (8.0 points), least by b (0.0)."]
    assert shown.figure == "sensitivity.png"
    assert parts({**found, "right": {}}) is None


def command(monkeypatch, *args):
    few = {"train": 128, "test": 60}
    monkeypatch.setattr(study_cli, "load", lambda name, split, **more: data.load(name, split, count=few[split]))
    parser = argparse.ArgumentParser()
    study_cli.add_study(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["study", "--preset", *map(str, args)])
    return parsed.run(parsed)


def test_it_is_of_the_regularity_study(monkeypatch):
    with pytest.raises(ValueError, match="--sensitivity is of --preset regularity"):
        command(monkeypatch, "quick", "--sensitivity")
    with pytest.raises(ValueError, match="--tolerance is of --preset regularity"):
        command(monkeypatch, "worth", "--tolerance", "1")


@pytest.mark.slow
def test_the_command_shows_all_three_tables(monkeypatch, tmp_path, capsys):
    """Another tolerance needs no training, and the page has what the terminal shows."""
    monkeypatch.setattr("hrbp.study.regularity.ROUNDS", 1)
    args = ("regularity", "--structures", "dense", "kernel", "--sparsities", "0.5", "0.75", "--seeds", 0, "--epochs", 1,
            "--retrain", 1, "--timed-width", 1, "--device", "cpu", "--out", tmp_path / "s", "--sensitivity", "--html",
            "--batch-size", 32)  # fmt: skip
    assert command(monkeypatch, *args) == 0
    first = capsys.readouterr().out
    for said in ("SCNN", "At equal accuracy", "minus 1 point\n", "One layer pruned at a time", "2-D kernel at 25%"):
        assert said in first
    page = (tmp_path / "s" / "study.html").read_text()
    assert page.count("<img") == 2
    assert "One layer pruned at a time" in page
    assert command(monkeypatch, *args, "--tolerance", 0.5) == 0
    assert "minus 0.5 points\n" in capsys.readouterr().out
    made = rows(read(tmp_path / "s" / "sensitivity.json"))
    assert {row["structure"] for row in made} == {"2-D kernel"}
