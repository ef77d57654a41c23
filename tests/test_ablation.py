"""The study of HRBP++, one change at a time: its health is that of its networks; rows, answer, table, the command."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import pytest

import studies
from hrbp import data
from hrbp.cli import study as study_cli
from hrbp.formats.model import load
from hrbp.layers.view import sparse_layers
from hrbp.reports.health import layer_health, mean_health
from hrbp.study.ablation import Ablation
from hrbp.study.ablation_table import answers, base_name, parts, rows, table
from hrbp.study.folder import read
from hrbp.study.variants import PRESETS, Variant
from hrbp.training.settings import Settings

quick = studies.quick("hrbp.study.study.ROUNDS")
VARIANTS = (Variant("dense"), Variant("hrbp++"), Variant("narrow"), Variant("hrbp++", "rigl"))


def tiny(out, variants=VARIANTS, **more):
    images = data.load("shapes", "train", count=64), data.load("shapes", "test", count=50)
    options = {"sparsities": (0.8,), "seeds": (0,), "batch_size": 32, "every": 1, "epochs": 1, "device": "cpu"}
    return Ablation(out, variants, images=images, quiet=True, **{**options, **more})


def run(variant, seed, accuracy, rank, gradient=0.5, asked=0.9):
    """A training as result.json has it."""
    health = {"density": 0.1, "read": 1.0, "dead": 0.0, "gradient": gradient, "weight_rank": 0.5, "feature_rank": rank}
    line = variant.name if variant.structure == "dense" else f"{variant.name} {100 * asked:g}%"
    made = {
        "line": line, **variant.record, "asked": 0.0 if variant.structure == "dense" else asked, "seed": seed,
        "accuracy": accuracy, "seconds": 1.0, "step_seconds": 1.0, "memory": 1, "sparsity": asked, "parameters": 50,
        "storage": 50,
    }  # fmt: skip
    return made if accuracy is None else made | {"health": {"start": health, "end": {**health, "feature_rank": rank}}}


CHANGES = [Variant("hrbp++"), *(Variant("hrbp++", saliency=name) for name in ("snip", "grasp", "synflow"))]
CHANGES += [Variant("dense"), Variant("unstructured")]


def planted():
    """snip is better than the base, grasp worse, synflow not shown to differ; accuracy goes with the feature rank."""
    settings = {
        "model": "resnet8", "width": 1.0, "data": "shapes", "images": [64, 10], "seeds": [0, 1, 2], "batch_size": 32,
        "variants": [v.record for v in CHANGES], "every": 5, "trainings": 18, "dense_parameters": 100,
        "sparsities": [0.9], "training": asdict(Settings(epochs=2, lr=0.1)),
    }  # fmt: skip
    runs = []
    for seed in range(3):
        means = (0.5, 0.6 + 0.01 * seed, 0.4 - 0.01 * seed, 0.51 + 0.05 * (seed - 1), 0.9, 0.55)
        for i, (variant, value) in enumerate(zip(CHANGES, means, strict=True)):
            runs.append(run(variant, seed, value + 0.1 * seed, (0.3, 0.7, 0.1, 0.4, 0.2, 0.5)[i], 0.1 * (i % 2)))
    return {"settings": settings, "machine": "1 CPU thread", "steps": {}, "runs": runs, "stopped": None}


def test_health_is_that_of_the_networks_at_the_start_and_at_the_end(tmp_path):
    made = tiny(tmp_path / "s")
    results = made.run()
    assert [r["line"] for r in results["runs"]] == ["dense", "hrbp++ 80%", "narrow 80%", "hrbp++ rigl 80%"]
    x, y = next(iter(made._batches(0)[0].epoch()))
    names = sparse_layers(made._network(Variant("unstructured"), 0.8, 0)).keys()
    for (variant, sparsity), told in zip(made.lines, results["runs"], strict=True):
        networks = {
            "start": made._network(variant, sparsity, 0),
            "end": load(made._folder(variant, sparsity, 0) / "model.pt") if "hrbp" in variant.structure else None,
        }
        for when, network in networks.items():
            if network is not None:
                found = layer_health(network, x, y)
                expected = asdict(mean_health({name: found[name] for name in names}))
                assert told["health"][when] == pytest.approx(expected, rel=1e-5)
    dense, base = results["runs"][:2]
    assert dense["health"]["start"]["density"] == 1 > base["health"]["start"]["density"]
    assert base["health"]["start"] != base["health"]["end"]
    assert table(read(tmp_path / "s" / "results.json")) == table(results)
    assert base_name(results) == "hrbp++"


def test_rows_are_above_the_base_by_pairs_of_seeds():
    results = planted()
    found = {row["structure"]: row for row in rows(results)}
    assert base_name(results) == "hrbp++"
    assert found["hrbp++"]["above_base"] is None
    assert found["hrbp++ snip"]["above_base"] == pytest.approx(0.11)
    assert found["dense"]["above_base"] == pytest.approx(0.4)
    assert found["hrbp++ grasp"]["above_base_low"] < found["hrbp++ grasp"]["above_base"] == pytest.approx(-0.11)
    assert found["hrbp++ synflow"]["above_base_low"] < 0 < found["hrbp++ synflow"]["above_base_high"]
    assert found["hrbp++ snip"]["feature_rank"] == pytest.approx(0.7)
    assert found["hrbp++ snip"]["of_base"] is None  # no time is measured


def test_the_answer_and_the_table():
    results = planted()
    first, second = answers(results, rows(results))
    assert first == (
        "At 90% better than hrbp++: hrbp++ snip (+11.0 [+8.5, +13.5]), unstructured (+5.0 [+5.0, +5.0]); worse: hrbp++"
        " grasp (-11.0 [-13.5, -8.5]); no difference is shown for 1 of 4."
    )
    assert second.startswith("Over the 5 sparse networks at 90% accuracy goes with feature rank at the start (+1.00")
    assert "it is not shown to go with gradient at the start, gradient at the end" in second
    shown = parts(results)
    assert [line[0] for line in shown.lines] == [row["structure"] for row in rows(results)]
    line = next(line for line in shown.lines if line[0] == "hrbp++ grasp")
    assert line[3] == "-11.0 [-13.5, -8.5]"
    assert line[6:] == ["100", "0", "0", "0", "50", "10", "10"]
    for one in results["runs"]:
        if one["saliency"] == "grasp":
            one["accuracy"] = None
            del one["health"]
    line = next(line for line in parts(results).lines if line[0] == "hrbp++ grasp")
    assert (line[2], line[6:]) == ("diverged", ["-"] * 7)
    assert "grasp" not in " ".join(answers(results, rows(results)))
    assert table({**results, "runs": []}) == "no training is finished yet"


def command(monkeypatch, *args):
    monkeypatch.setattr(study_cli, "load", lambda name, split, **more: data.load(name, split, count=64, **more))
    parser = argparse.ArgumentParser()
    study_cli.add_study(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["study", "--preset", "ablation", *map(str, args)])
    return parsed.run(parsed)


@pytest.mark.slow
def test_the_command(monkeypatch, tmp_path, capsys):
    out = tmp_path / "s"
    few = "--width", 0.5, "--seeds", 1, "--epochs", 2, "--every", 1, "--device", "cpu"
    assert command(monkeypatch, *few, "--out", out, "--html") == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == len(PRESETS["ablation"].variants)
    assert table(results) in capsys.readouterr().out
    assert {file.name for file in out.glob("*.*") if file.is_file()} == {
        "results.json", "table.csv", "ablation.png", "study.html",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--methods", "rigl"), "--methods: --preset ablation has its own"),
        (("--structures", "block"), "--structures: --preset ablation has its own"),
        (("--quick",), "--quick is of --preset worth"),
        (("--data", "shapes", "digits"), "takes one --data"),
    ],
)
def test_what_the_command_refuses(monkeypatch, args, said):
    with pytest.raises(ValueError, match=said):
        command(monkeypatch, *args)


def test_every_arm_has_a_name_and_goes_together():
    names = [variant.name for variant in PRESETS["ablation"].variants]
    assert len(set(names)) == len(names)
    assert names[0] == "hrbp++"
    assert {variant.refuses() for variant in PRESETS["ablation"].variants} == {None}
    assert Variant("hrbp++", distribution="uniform").name == "hrbp++ uniform"
    assert Variant("unstructured", saliency="snip", distribution="global").name == "unstructured snip"
