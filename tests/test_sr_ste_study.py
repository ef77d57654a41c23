"""The study of SR-STE's lambda: SAD of every look, what becomes of it in table, answer and figure, the command."""

from __future__ import annotations

import argparse
import csv
import json
import math
from dataclasses import asdict

import numpy as np
import pytest

import studies
from hrbp import data
from hrbp.cli import study as study_cli
from hrbp.formats.model import load
from hrbp.layers.view import sparse_layers
from hrbp.methods.registry import METHODS
from hrbp.reports.sad_picture import draw_sad
from hrbp.study.folder import read
from hrbp.study.sr_ste import Lambdas
from hrbp.study.sr_ste_table import answers, curves, kind_of, parts, rows, strength, table
from hrbp.study.variants import PRESETS, Variant, lambda_variants
from hrbp.training.settings import Settings

VARIANTS = lambda_variants(lambdas=(-0.5, 0.0, 0.5))
quick = studies.quick("hrbp.study.study.ROUNDS")


def tiny(out, **more):
    images = data.load("shapes", "train", count=128), data.load("shapes", "test", count=100)
    options = {"sparsities": (0.5,), "seeds": (0,), "batch_size": 32, "every": 1, "epochs": 2, "device": "cpu"}
    return Lambdas(out, VARIANTS, images=images, quiet=True, **{**options, **more})


def run(decay, seed, accuracy, sad, drift, asked=0.5):
    """A training of two layers of 80 and 20 weights with four looks, as result.json has it."""
    variant = Variant("n:m", "sr-ste", evolve={"decay": decay}) if decay else Variant("n:m", "ste")
    masks = {"a": {"cells": 80, "sad": sad, "drift": drift}, "b": {"cells": 20, "sad": [0] * 4, "drift": [10] * 4}}
    return {
        "line": f"{variant.name} {100 * asked:g}%", **variant.record, "asked": asked, "seed": seed,
        "accuracy": accuracy, "seconds": 1.0, "step_seconds": 1.0, "memory": 1, "sparsity": asked, "parameters": 50,
        "storage": 50, "looks": [5, 10, 15, 20], "masks": masks,
    }  # fmt: skip


def planted():
    """The results of a study of 2:4 with three lambda and three seeds."""
    settings = {
        "model": "resnet8", "width": 1.0, "data": "shapes", "images": [64, 10], "seeds": [0, 1, 2], "batch_size": 32,
        "variants": [v.record for v in VARIANTS], "every": 5, "trainings": 9, "dense_parameters": 100,
        "training": asdict(Settings(epochs=2, lr=0.1, schedule="step", milestones=(0.5,), gamma=0.1)),
    }  # fmt: skip
    runs = []
    for seed in range(3):
        runs.append(run(-0.5, seed, 0.5 + 0.1 * seed, [30, 20, 10, 4], [30, 40, 44, 46]))
        runs.append(run(0.0, seed, 0.5 + 0.09 * seed, [20, 10, 5, 2], [20, 24, 25, 26]))
        runs.append(run(0.5, seed, 0.55 + 0.09 * seed, [10, 4, 2, 0], [10, 10, 8, 6]))
    return {"settings": settings, "machine": "1 CPU thread", "steps": {}, "runs": runs, "stopped": None}


@pytest.mark.slow
def test_every_look_is_kept(tmp_path):
    """At every step, so that the masks can be made again from the weights: the last drift is |E_end - E_start|_1."""
    made = tiny(tmp_path / "s", epochs=1)
    results = made.run()
    assert [r["line"] for r in results["runs"]] == [
        "dense", "n:m sr-ste decay=-0.5 50%", "n:m ste 50%", "n:m sr-ste decay=0.5 50%",
    ]  # fmt: skip
    dense, *sparse = results["runs"]
    assert "masks" not in dense
    for (variant, sparsity), told in zip(made.lines[1:], sparse, strict=True):
        first = {n: layer.mask().clone() for n, layer in sparse_layers(made._network(variant, sparsity, 0)).items()}
        ended = sparse_layers(load(made._folder(variant, sparsity, 0) / "model.pt"))
        assert told["looks"] == [1, 2, 3, 4]
        assert told["masks"].keys() == first.keys() == ended.keys()
        for name, mask in told["masks"].items():
            assert mask["cells"] == first[name].numel() == 2 * ended[name].mask().sum()  # 2:4, in every layer
            assert mask["drift"][-1] == int((ended[name].mask() != first[name]).sum())
            assert len(mask["sad"]) == 4
            assert mask["sad"][0] == mask["drift"][0]
    with (tmp_path / "s" / "sad.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 3 * 4 * len(sparse[0]["masks"])
    name, mask = next(iter(sparse[1]["masks"].items()))
    found = [row for row in written if row["line"] == "n:m ste 50%" and row["layer"] == name]
    assert [int(row["sad"]) for row in found] == mask["sad"]
    assert table(read(tmp_path / "s" / "results.json")) == table(results)


@pytest.mark.slow
def test_a_study_that_was_stopped_has_every_look_once(tmp_path, monkeypatch):
    whole = tiny(tmp_path / "whole").run()
    studies.stop_at(monkeypatch, 1 + 8 + 5, "hrbp.study.runner", "hrbp.study.study")  # one to measure; then the second
    assert tiny(tmp_path / "s").run()["stopped"] == "SIGTERM"
    again = tiny(tmp_path / "s").run()
    for ours, theirs in zip(again["runs"], whole["runs"], strict=True):
        assert ours.get("masks") == theirs.get("masks")
        assert ours.get("looks") == theirs.get("looks")


def test_rows_are_shares_of_all_weights_and_pairs_of_seeds():
    results = planted()
    below, ste, above = rows(results)
    assert [row["decay"] for row in (below, ste, above)] == [-0.5, 0.0, 0.5]
    assert {row["kind"] for row in (below, ste, above)} == {"2:4"}
    assert [row["sad_last"] for row in (below, ste, above)] == pytest.approx([0.04, 0.02, 0.0])
    assert [row["sad_all"] for row in (below, ste, above)] == pytest.approx([0.64, 0.37, 0.16])
    assert [row["moved"] for row in (below, ste, above)] == pytest.approx([0.56, 0.36, 0.16])
    # Two epochs of two steps at 0.1, 0.1, 0.01, 0.01; momentum 0.9.
    assert above["left"] == pytest.approx(math.exp(-0.5 * 2.2))
    assert below["left"] == pytest.approx(math.exp(0.5 * 2.2))
    assert ste["of_ste"] is None
    assert (above["of_ste"], above["of_ste_low"], above["of_ste_high"]) == pytest.approx((0.05, 0.05, 0.05))
    low, high = np.array([0, 0.01, 0.02]).mean() + np.array([-1, 1]) * 4.3026527 * 0.01 / math.sqrt(3)
    assert (below["of_ste"], below["of_ste_low"], below["of_ste_high"]) == pytest.approx((0.01, low, high))
    assert curves(results)["2:4", 0.5][-0.5] == [([5, 10, 15, 20], [0.3, 0.2, 0.1, 0.04])] * 3
    assert kind_of({"structure": "n:m", "options": {"m": 8}, "asked": 0.75}) == "2:8"
    assert kind_of({"structure": "kernel", "options": {}, "asked": 0.75}) == "kernel"
    assert [strength({"method": name}) for name in ("static", "ste", "sr-ste", "subp")] == [None, 0.0, 2e-4, None]
    results["settings"]["training"] |= {"optimizer": "adamw"}
    assert {row["left"] for row in rows(results)} == {None}


def test_the_answer_and_the_table():
    results = planted()
    assert answers(rows(results)) == [
        "2:4 at 50%: SAD in all is 64% at -0.5, 37% at 0, 16% at 0.5; against lambda 0 accuracy is higher at 0.5 (+5.0"
        " [+5.0, +5.0] points)."
    ]
    shown = parts(results)
    assert [line[:3] for line in shown.lines] == [["2:4", "50.0", f] for f in ("-0.5", "0", "0.5")]
    assert shown.lines[0][4].startswith("no difference shown +1.0")
    assert shown.lines[2][5:] == ["0.00", "16", "16", "33"]
    for one in results["runs"]:
        if one.get("evolve"):
            one["accuracy"] = None
    assert [line[3] for line in parts(results).lines] == ["diverged", "59.0 [36.6, 81.4]", "diverged"]
    assert answers(rows(results)) == []
    assert table({**results, "runs": []}) == "no training is finished yet"


@pytest.mark.slow
def test_the_figure_shows_the_curves(tmp_path):
    from matplotlib.image import imread

    def drawn(results):
        draw_sad(tmp_path / "s.png", "a title", 5, curves(results), rows(results))
        return imread(tmp_path / "s.png")

    first, other = drawn(planted()), planted()
    other["runs"][0]["masks"]["a"]["sad"][1] = 60
    assert first.std() > 0.05
    assert (first != drawn(other)).any()
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_sad(tmp_path / "none.png", "", 5, {}, [])


def test_options_of_methods_in_a_variant():
    variant = Variant("n:m", "sr-ste", evolve={"decay": 2e-4})
    assert (variant.name, variant.record["evolve"]) == ("n:m sr-ste decay=0.0002", {"decay": 2e-4})
    assert "evolve" not in Variant("n:m", "sr-ste").record
    assert variant.layout == Variant("n:m", "sr-ste")  # lambda takes no time
    refused = Variant("n:m", "ste", evolve={"decay": 1.0}).refuses()
    assert refused == "method 'ste' has no option decay; it takes: every"
    assert METHODS["sr-ste"](decay=-1.0).decay == -1.0
    with pytest.raises(ValueError, match="decay is inf; it needs a finite number"):
        METHODS["sr-ste"](decay=math.inf)
    with pytest.raises(ValueError, match=r"decay is -1\.0; it needs a number >= 0"):
        METHODS["subp"](decay=-1.0)


def command(monkeypatch, *args):
    monkeypatch.setattr(study_cli, "load", lambda name, split, **more: data.load(name, split, count=64, **more))
    parser = argparse.ArgumentParser()
    study_cli.add_study(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["study", "--preset", *map(str, args)])
    return parsed.run(parsed)


@pytest.mark.slow
def test_the_command(monkeypatch, tmp_path, capsys):
    out = tmp_path / "s"
    few = "--lambdas", 0, 0.1, "--seeds", 1, "--epochs", 1
    assert command(monkeypatch, "sr-ste", "--quick", *few, "--device", "cpu", "--out", out, "--html") == 0
    results = json.loads((out / "results.json").read_text())
    assert [run["line"] for run in results["runs"]] == ["dense", "n:m ste 50%", "n:m sr-ste decay=0.1 50%"]
    said = capsys.readouterr().out
    assert table(results) in said
    assert "sr-ste.png" in (out / "study.html").read_text() or "data:image/png" in (out / "study.html").read_text()
    assert {file.name for file in out.glob("*.*") if file.is_file()} == {
        "results.json", "table.csv", "sad.csv", "sr-ste.png", "study.html",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("sr-ste", "--methods", "rigl"), "--preset sr-ste has ste and sr-ste"),
        (("sr-ste", "--lambdas", 0, 0.0), "--lambdas is 0 0; give each once"),
        (("sr-ste", "--full"), "--full is of --preset worth"),
        (("quick", "--lambdas", 0), "--lambdas is of --preset sr-ste"),
        (("sr-ste", "--model", "resnet8", "vgg19"), "takes one --model"),
    ],
)
def test_what_the_command_refuses(monkeypatch, args, said):
    with pytest.raises(ValueError, match=said):
        command(monkeypatch, *args)


def test_the_preset_has_the_papers_lambda_none_and_one_below():
    decays = [v.evolve.get("decay", 0.0) for v in PRESETS["sr-ste"].variants if v.structure != "dense"]
    assert {2e-4, 0.0} < set(decays)
    assert min(decays) < 0 < max(decays)
    assert {v.refuses() for v in PRESETS["sr-ste"].variants} == {None}
    assert PRESETS["sr-ste"].sparsities == (0.5, 0.75)
