"""The regularity study: recomputed from its files, stopped and continued, and what it says in a sentence."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import studies
from blocksparse import BSRConv2d, BSRLinear
from hrbp import data
from hrbp.cli import study as study_cli
from hrbp.formats.model import load, save
from hrbp.layers.view import shape4, sparse_layers
from hrbp.models import build, parameter_count
from hrbp.reports.network_costs import costs_of
from hrbp.reports.study_picture import draw_regularity
from hrbp.study import regularity
from hrbp.study.folder import read
from hrbp.study.regularity import Regularity
from hrbp.study.regularity_table import GRAINS, answers, line_name, narrow_names, rows, table

ROOT = Path(__file__).parent.parent
STRUCTURES = ("dense", "narrow", "unstructured", "kernel", "hrbp")
KINDS = nn.Conv2d | nn.Linear | BSRConv2d | BSRLinear
TIMES = {"time", "rival", "gain", "gain_low", "gain_high"}


def tiny(out, structures=STRUCTURES, **more):
    """A training of one epoch, four steps, for each link of a chain."""
    images = data.load("shapes", "train", count=128), data.load("shapes", "test", count=100)
    options = {"sparsities": (0.5, 0.75), "seeds": (0,), "batch_size": 32, "epochs": 2, "retrain": 1, "device": "cpu"}
    return Regularity(out, structures, images=images, quiet=True, **{"width": 0.5, **options, **more})


quick = studies.quick("hrbp.study.regularity.ROUNDS")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, results) of a study that was not stopped."""
    out = tmp_path_factory.mktemp("regularity") / "whole"
    return out, tiny(out).run()


def timeless(found):
    return studies.without(found, TIMES)


def saved(whole, structure, sparsity):
    name = line_name(structure, sparsity).replace("%", "").replace(" ", "-")
    return whole[0] / f"{name}-seed-0" / "model.pt"


# ---------------------------------------------------------------- what is done


def test_every_link_prunes_what_the_one_before_came_to(whole):
    """The kernels of largest sum of |w|, among those of the network before it was trained again."""
    before = load(whole[0] / "trained-seed-0" / "model.pt")
    for sparsity in (0.5, 0.75):
        after = load(saved(whole, "kernel", sparsity))
        layers = sparse_layers(after)
        assert len(layers) == 8
        for name, layer in layers.items():
            earlier = sparse_layers(before).get(name)
            weight = before.get_submodule(name).weight.detach() if earlier is None else earlier.weight()
            worth = weight.abs().sum((2, 3)).flatten()
            kept = round((1 - sparsity) * len(worth))
            best = torch.zeros(len(worth), dtype=torch.bool)
            best[worth.argsort(descending=True, stable=True)[:kept]] = True
            assert torch.equal(layer.mask().any(3).any(2).flatten(), best)
            assert layer.mask().sum() == kept * weight[0, 0].numel()
        before = after


def test_baselines_are_trained_as_long(whole):
    dense, narrow = (load(saved(whole, name, 0.75)) for name in ("dense", "narrow"))
    parameters = {row["line"]: row["parameters"] for row in rows(whole[1])}
    assert parameter_count(dense) == parameters["dense 75%"] == parameters["dense 50%"]
    assert parameter_count(narrow) == parameters["narrow 75%"] == pytest.approx(parameters["0-D weight 75%"], rel=0.02)
    assert not sparse_layers(dense) | sparse_layers(narrow)
    assert {run["steps"] for run in whole[1]["runs"]} == {4}


def rates(folder):
    """Steps and learning rate of each epoch in a training's log."""
    told = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["lr"]) for entry in told if entry["kind"] == "epoch"]


def test_every_arm_has_the_same_epochs_at_the_same_learning_rates(whole):
    """Before its chain, and at every link of it; narrow networks of each size go through the whole chain."""
    narrow = narrow_names((0.5, 0.75))
    assert narrow == ["narrow as 50%", "narrow as 75%"]
    assert line_name(narrow[0], 0.75) == "narrow as 50% 75%"
    for structure in (*(name for name in STRUCTURES if name != "narrow"), *narrow):
        begun = whole[0] / f"{structure.replace('%', '').replace(' ', '-')}-trained-seed-0"
        before = begun if structure in narrow else whole[0] / "trained-seed-0"
        assert rates(before) == rates(whole[0] / "trained-seed-0")
        assert len(rates(before)) == 2
        for sparsity in (0.5, 0.75):
            assert rates(saved(whole, structure, sparsity).parent) == rates(saved(whole, "dense", 0.5).parent)
    sizes = {run["line"]: run["parameters"] for run in whole[1]["runs"] if run["structure"].startswith("narrow")}
    assert sizes["narrow 50%"] == sizes["narrow as 50% 75%"] > sizes["narrow 75%"] == sizes["narrow as 75% 50%"]


def test_the_rival_is_the_narrow_network_of_equal_time_that_was_trained_as_long(whole):
    results = copy.deepcopy(whole[1])
    results["time_bounds"] = {}
    for name, seconds in (("narrow as 50%", 0.5), ("narrow as 75%", 0.25), ("kernel", 0.5**1.5), ("hrbp", 0.1)):
        results["times"][name] = {"dense": 1.0, "0.5": seconds, "0.75": seconds}
    right = {"dense": 0.9, "narrow as 50%": 0.8, "narrow as 75%": 0.6, "kernel": 0.72, "hrbp": 0.5, "unstructured": 0.8}
    for run in results["runs"]:
        run["accuracy"] = right[run["structure"]] - (0.1 if run["asked"] == 0.5 else 0.0)
    found = {row["line"]: row for row in rows(results)}
    assert found["2-D kernel 75%"]["rival"] == pytest.approx(0.7)  # halfway in the logarithm of time
    assert found["2-D kernel 75%"]["gain"] == pytest.approx(0.02)
    assert found["2-D kernel 50%"]["rival"] == pytest.approx(0.6)
    assert found["hrbp 75%"]["gain"] is None  # faster than every narrow network
    assert found["dense 75%"]["gain"] is found["narrow 75%"]["gain"] is None
    assert "+2.0, one seed" in table(results)


def test_costs_are_recomputed_from_the_files(whole):
    """Sizes on disk; parameters; records of kernels and references of them, counted one by one."""
    found = {(row["structure"], row["asked"]): row for row in rows(whole[1])}
    trained = whole[0] / "trained-seed-0" / "model.pt"
    for structure in STRUCTURES:
        for asked in (0.5, 0.75):
            row, path = found[GRAINS.get(structure, structure), asked], saved(whole, structure, asked)
            assert row["file"] == path.stat().st_size
            assert row["file_ratio"] == pytest.approx(path.stat().st_size / trained.stat().st_size)
            if structure not in ("dense", "narrow"):
                layers = sparse_layers(load(path)).values()
                kept, cells = sum(int(x.mask().sum()) for x in layers), sum(x.mask().numel() for x in layers)
                assert row["sparsity"] == pytest.approx(1 - kept / cells)
                assert row["parameters"] == parameter_count(load(trained)) - cells + kept
    for structure, asked in (("dense", 0.5), ("kernel", 0.5), ("kernel", 0.75)):
        model = load(saved(whole, structure, asked))
        bits = references = 0
        sizes = pixels(model)
        for name, module in model.named_modules():
            if not isinstance(module, KINDS):
                continue
            layer = sparse_layers(model).get(name)
            k, c, r, s = shape4(module) if layer is None else layer.shape
            if layer is not None:
                records = passed = 0
                for kept in layer.mask().any(3).any(2).flatten().tolist():
                    passed += 1
                    if kept:
                        records += 1 + (passed - 1) // 16
                        passed = 0
                bits += records * (4 + 8 * r * s)
                references += records * (1 + r * s + r * s + 1) * sizes[name]
            else:
                bits += 8 * module.weight.numel()
                references += (module.weight.numel() + c * r * s + k) * sizes[name]
        row = found[GRAINS.get(structure, structure), asked]
        assert row["references"] == references
        assert row["storage"] == pytest.approx(bits / 8 / sum(
            m.weight.numel() for m in load(trained).modules() if isinstance(m, nn.Conv2d | nn.Linear)
        ))  # fmt: skip
        if structure == "kernel":
            assert row["of_finest"] == pytest.approx(references / found["0-D weight", asked]["references"])


def pixels(model):
    """Output pixels of every layer for an image of 16 x 16: two of its three stages halve."""
    side = {"conv1": 16, "layer1": 16, "layer2": 8, "layer3": 4, "fc": 1}
    return {name: side[name.split(".")[0]] ** 2 for name, m in model.named_modules() if isinstance(m, KINDS)}


def test_balance_is_weighed_by_work(whole):
    study, model = tiny(whole[0]), build("resnet8", classes=10, image_size=16)
    assert costs_of(model, study.train.shape)["fprop_balance"] == pytest.approx(
        1, abs=0.01
    )  # ten classes are no whole lanes
    weight = model.layer3[0].conv2.weight.detach()
    weight[::2] = 0
    even = costs_of(model, study.train.shape)
    assert even["fprop_balance"] == pytest.approx(1, abs=0.01)  # every eight filters have four
    weight[:32] = 0
    found = costs_of(model, study.train.shape)
    work = {name: int((model.get_submodule(name).weight != 0).sum()) * size for name, size in pixels(model).items()}
    share = work["layer3.0.conv2"] / sum(work.values())
    assert found["fprop_balance"] == pytest.approx(1 + share, abs=0.01)  # twice the work on half of the filters
    assert found["dgrad_balance"] == pytest.approx(even["dgrad_balance"], abs=0.01)


def test_times_are_of_a_wide_network_and_relative_to_dense(whole, tmp_path, monkeypatch):
    results = copy.deepcopy(whole[1])
    assert results["times"].keys() == {*STRUCTURES, *narrow_names((0.5, 0.75))} - {"dense", "narrow"}
    assert results["times"].keys() == results["time_bounds"].keys()
    results["times"]["kernel"] = {"dense": 0.1, "0.5": 0.2, "0.75": 0.05}
    times = {(row["structure"], row["asked"]): row["time"] for row in rows(results)}
    shown = [times[line] for line in (("2-D kernel", 0.5), ("2-D kernel", 0.75), ("dense", 0.5))]
    assert shown == pytest.approx([2, 0.5, 1])
    timed = []
    monkeypatch.setattr(Regularity, "_step", lambda self, model, images: timed.append(model) or (lambda: 1.0))
    tiny(tmp_path / "s", ("dense", "filter"), timed_width=2).run()
    assert [model.conv1.out_channels for model in timed] == [32, 32, 32]
    kept = [sum(int(x.mask().sum()) for x in sparse_layers(model).values()) for model in timed]
    assert kept[0] == 0
    assert kept[1] == pytest.approx(2 * kept[2])


# ---------------------------------------------------------------- stopped and continued


@pytest.mark.slow
def test_a_study_that_was_stopped_continues_in_the_middle_of_a_training(whole, tmp_path, monkeypatch):
    batches = studies.stop_at(monkeypatch, 19, "hrbp.study.runner")  # in what comes before the third link
    results = tiny(tmp_path / "s").run()
    assert results["stopped"] == read(tmp_path / "s" / "results.json")["stopped"] == "SIGTERM"
    assert len(results["runs"]) == 2
    assert "2 of 12 trainings are finished" in table(results)
    again = tiny(tmp_path / "s").run()
    assert again["stopped"] is None
    assert batches.drawn == 4 * (2 + 8 + 2 * (2 + 2))  # no step was done twice
    assert again["times"] == results["times"]
    assert timeless(rows(again)) == timeless(rows(whole[1]))


@pytest.mark.slow
def test_a_study_that_was_killed_continues(whole, tmp_path):
    with studies.killed("test_regularity", tmp_path / "s", results=4):
        results = tiny(tmp_path / "s").run()
    assert timeless(rows(results)) == timeless(rows(whole[1]))


def test_a_finished_study_only_reads(whole, monkeypatch):
    out, results = whole
    monkeypatch.setattr(regularity, "Trainer", None)
    monkeypatch.setattr(Regularity, "_step", None)
    assert tiny(out).run() == results


# ---------------------------------------------------------------- refused, and what goes wrong


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"structures": ("kernel",)}, "structures has no 'dense'"),
        ({"structures": ("dense", "dense")}, "each once"),
        ({"structures": ("dense", "round")}, "no structure 'round'"),
        ({"structures": ("dense", "n:m"), "sparsities": (0.3,)}, "none of this can be trained: n:8 30%: .*0.3"),
        ({"structures": ("dense", "filter"), "sparsities": (0.999,)}, "3-D filter 99.9%: .*at least"),
        ({"timed_width": math.nan}, "width is nan"),
        ({"batch_size": 10**6}, "batch_size is 1000000"),
        ({"sparsities": (0.0, 0.5)}, "between 0 and 1"),
        ({"weights": "w.pt"}, "structures has 'narrow'"),
        ({"retrain": 0}, "epochs is 0"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_written(tmp_path, option, said):
    with pytest.raises(ValueError, match=said):
        tiny(tmp_path / "s", **option)
    assert not (tmp_path / "s").exists()


def test_a_folder_of_another_study_is_refused(whole):
    with pytest.raises(ValueError, match=r"retraining\.epochs is 1 there and 2 here"):
        tiny(whole[0], retrain=2)
    with pytest.raises(ValueError, match="structures is"):
        tiny(whole[0], STRUCTURES[:-1])


def test_trained_weights_are_taken_from_a_file(whole, tmp_path):
    torch.manual_seed(5)
    model = build("resnet8", classes=10, image_size=16, width=0.5)
    save(model, tmp_path / "w.pt")
    results = tiny(tmp_path / "s", ("dense", "filter"), weights=tmp_path / "w.pt", sparsities=(0.5,)).run()
    kept = load(tmp_path / "s" / "trained" / "model.pt").state_dict()
    assert all(map(torch.equal, kept.values(), model.state_dict().values()))
    assert len(results["runs"]) == 2
    assert "accuracy" not in results["trained"]
    assert "before pruning" not in table(results)
    save(build("resnet8", classes=10, image_size=16, width=0.5), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds a study with other settings: weights is"):
        tiny(tmp_path / "s", ("dense", "filter"), weights=tmp_path / "w.pt", sparsities=(0.5,))
    save(build("resnet14", classes=10), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"weights are those of another network: .*layer1\.1"):
        tiny(tmp_path / "s", ("dense", "filter"), weights=tmp_path / "w.pt")


def test_a_chain_that_diverges_is_said_and_the_others_go_on(tmp_path):
    results = tiny(tmp_path / "s", ("dense", "filter"), retrain_lr=1e12, weight_decay=0.0).run()
    assert len(results["runs"]) == 4
    assert [(row["accuracy"], row["diverged"]) for row in rows(results)] == [(None, 1)] * 4
    assert table(results).count("diverged") == 4
    assert answers(rows(results), max_time=1, max_storage=1) == []


def test_layers_that_a_grain_does_not_fit_are_named(tmp_path):
    results = tiny(tmp_path / "s", ("dense", "1xn"), sparsities=(0.5,), width=0.75).run()
    assert [run["refused"] for run in results["runs"]] == [[], ["layer1.0.conv1", "layer1.0.conv2"]]
    assert "1x8: dense where it does not fit: layer1.0.conv1 layer1.0.conv2" in table(results)


# ---------------------------------------------------------------- what is said


def test_the_table_is_that_of_the_json(whole):
    out, results = whole
    assert table(read(out / "results.json")) == table(results)
    with (out / "table.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    found = rows(results)
    assert written == [{key: "" if value is None else str(value) for key, value in row.items()} for row in found]
    assert [row["line"] for row in found] == [line_name(s, a) for s in STRUCTURES for a in (0.5, 0.75)]
    dense = {row["asked"]: row["accuracy"] for row in found if row["structure"] == "dense"}
    for row in found:
        run = next(run for run in results["runs"] if run["line"] == row["line"])
        assert (row["accuracy"], row["seeds"], row["deviation"]) == (run["accuracy"], 1, None)
        assert row["loss"] == pytest.approx(dense[row["asked"]] - run["accuracy"])
        assert f"{100 * row['accuracy']:.2f}" in table(results)


def line(structure, asked, accuracy, time, file_ratio):
    return {"structure": structure, "asked": asked, "accuracy": accuracy, "loss": 0.9 - accuracy, "time": time,
            "file_ratio": file_ratio, "seeds": 2, "deviation": 0.01}  # fmt: skip


HAND_MADE = [
    line("dense", 0.5, 0.9, 1.0, 1.0),
    line("narrow", 0.5, 0.82, 0.4, 0.5),
    line("0-D weight", 0.5, 0.89, 1.1, 0.6),
    line("0-D weight", 0.875, 0.85, 1.1, 0.2),
    line("hrbp", 0.75, 0.84, 0.45, 0.3),
    line("hrbp", 0.875, 0.81, 0.35, 0.15),
]


def test_the_answer_is_the_most_accurate_within_the_budget():
    assert answers(HAND_MADE, max_time=0.5, max_storage=0.2) == [
        "Within 0.5 of the dense time hrbp at 75% is the most accurate: 84.0% (6.0 points less than dense) in 0.45 of "
        "the time and 0.30 of the file.",
        "Within 0.2 of the dense file 0-D weight at 87.5% is the most accurate: 85.0% (5.0 points less than dense) in "
        "1.10 of the time and 0.20 of the file.",
        "Within 0.5 of the dense time and 0.2 of the dense file hrbp at 87.5% is the most accurate: 81.0% (9.0 points "
        "less than dense) in 0.35 of the time and 0.15 of the file.",
        "Differences under 2.0 points are within the spread of the seeds.",
    ]


def test_the_answer_says_when_a_baseline_wins_or_nothing_fits():
    by_time, by_file, by_both, _ = answers(HAND_MADE, max_time=0.42, max_storage=0.1)
    assert by_time == (
        "Within 0.42 of the dense time the narrow network as large as 50% is the most accurate: 82.0% (8.0 points less "
        "than dense) in 0.40 of the time and 0.50 of the file; among sparse networks hrbp at 87.5%: 81.0% (9.0 points "
        "less than dense) in 0.35 of the time and 0.15 of the file."
    )
    assert by_file == (
        "Within 0.1 of the dense file nothing fits; hrbp at 87.5% comes nearest: 81.0% (9.0 points less than dense) in "
        "0.35 of the time and 0.15 of the file."
    )
    assert by_both.startswith("Within 0.42 of the dense time and 0.1 of the dense file nothing fits; hrbp at 87.5%")
    first = answers(HAND_MADE[:2], max_time=0.5, max_storage=2)[0]
    assert first.endswith("0.50 of the file; nothing sparse fits.")
    assert answers(HAND_MADE, max_time=9, max_storage=2)[0].startswith(
        "Within 9 of the dense time the dense network is"
    )
    unknown = [*HAND_MADE, {**line("1x8", 0.5, 0.99, 0.1, 0.1), "time": None}]
    assert answers(unknown, max_time=0.5, max_storage=0.2) == answers(HAND_MADE, max_time=0.5, max_storage=0.2)


def test_the_figure_shows_the_results(whole, tmp_path):
    from matplotlib.image import imread

    out, results = whole
    found, settings = rows(results), results["settings"]
    pictures = [imread(out / "regularity.png")]
    for key in (None, "accuracy", "file_ratio", "time"):
        changed = [{**row, **({key: 0.5} if key else {})} for row in found]
        draw_regularity(tmp_path / "r.png", changed, settings, results["machine"])
        pictures.append(imread(tmp_path / "r.png"))
    assert pictures[0].std() > 0.05
    assert (pictures[0] == pictures[1]).all()
    assert all((pictures[0] != other).any() for other in pictures[2:])
    with pytest.raises(ValueError, match="no training is finished"):
        draw_regularity(tmp_path / "none.png", [], settings, "")
    assert not (tmp_path / "none.png").exists()


# ---------------------------------------------------------------- the command


def command(*args):
    parser = argparse.ArgumentParser()
    study_cli.add_study(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["study", "--preset", "regularity", *map(str, args)])
    return parsed.run(parsed)


def test_the_command_ends_with_the_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study_cli, "load", lambda name, split, **more: data.load(name, split, count=128, **more))
    args = ("--structures", "dense", "hrbp", "--sparsities", "0.5", "--seeds", "3", "--epochs", "1", "--retrain", "1",
            "--width", "0.5", "--timed-width", "0.5", "--device", "cpu", "--out", tmp_path / "s")  # fmt: skip
    assert command(*args, "--max-time", "0.001", "--max-storage", "0.9") == 0
    out = capsys.readouterr().out
    results = read(tmp_path / "s" / "results.json")
    assert [run["line"] for run in results["runs"]] == ["dense 50%", "hrbp 50%"]
    assert table(results, max_time=0.001, max_storage=0.9) in out
    assert "Within 0.001 of the dense time nothing fits" in out
    assert "Within 0.9 of the dense file hrbp at 50% is the most accurate" in out
    assert {file.name for file in (tmp_path / "s").glob("*.*")} == {"results.json", "table.csv", "regularity.png"}
    for wrong in (("--methods", "set"), ("--every", "2"), ("--model", "resnet8", "resnet14")):
        with pytest.raises(ValueError, match="regularity"):
            command(*args, *wrong)


def test_what_the_command_asks_for(monkeypatch):
    given = {}

    def note(out, structures, **options):
        given.update(options, out=out, structures=tuple(structures))
        raise InterruptedError

    monkeypatch.setattr(study_cli, "Regularity", note)
    monkeypatch.setattr(study_cli, "load", lambda *_, **more: None)
    for args, width in (((), 8), (("--width", 2), 2), (("--model", "resnet14"), 1), (("--timed-width", 3), 3)):
        with pytest.raises(InterruptedError):
            command(*args)
        assert (given["timed_width"], given["epochs"], given["retrain"]) == (width, 6, 2)
        assert given["structures"] == ("dense", "narrow", *GRAINS)
    del given["epochs"]
    with pytest.raises(InterruptedError):
        command("--weights", "w.pt", "--lr", 0.01)
    assert "epochs" not in given  # and no baseline that would be trained for as long
    assert (given["weights"], given["lr"], given["structures"]) == ("w.pt", 0.01, ("dense", *GRAINS))
