"""A study says what its trainings came to: stopped and continued, read again from its files, in a sentence."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch

import hrbp
import studies
from hrbp import data
from hrbp.cli import study as study_cli
from hrbp.cli.main import main
from hrbp.formats.model import load
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.methods.registry import METHODS
from hrbp.reports.study_picture import draw_study
from hrbp.study import study
from hrbp.study.folder import read
from hrbp.study.study import Study
from hrbp.study.study_table import rows, sentences, table
from hrbp.study.variants import PRESETS, PUBLISHED, Variant
from hrbp.surgery.decision import structure_for

ROOT = Path(__file__).parent.parent
VARIANTS = (
    Variant("dense"), Variant("narrow"), Variant("unstructured"), Variant("hrbp++", "rigl"), Variant("hrbp", "gmp"),
)  # fmt: skip
TIMES = {
    "seconds", "step_seconds", "step", "step_low", "step_high", "rival", "gain", "gain_low", "gain_high",
}  # fmt: skip


def tiny(out, variants=VARIANTS, **more):
    """Two epochs of four steps: a second a training."""
    images = data.load("shapes", "train", count=128), data.load("shapes", "test", count=100)
    options = {"sparsities": (0.8,), "seeds": (0, 1), "batch_size": 32, "every": 2, "epochs": 2, "device": "cpu"}
    return Study(out, variants, images=images, quiet=True, **{"width": 0.75, **options, **more})


quick = studies.quick("hrbp.study.study.ROUNDS")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, results) of a study that was not stopped."""
    out = tmp_path_factory.mktemp("study") / "whole"
    return out, tiny(out).run()


def timeless(found):
    return studies.without(found, TIMES)


# ---------------------------------------------------------------- stopped and continued


@pytest.mark.slow
def test_a_study_that_was_stopped_continues_in_the_middle_of_a_training(whole, tmp_path, monkeypatch):
    # One batch was drawn to measure; the third training's second epoch.
    batches = studies.stop_at(monkeypatch, 20, "hrbp.study.runner", "hrbp.study.study")
    results = tiny(tmp_path / "s").run()
    assert results["stopped"] == read(tmp_path / "s" / "results.json")["stopped"] == "SIGTERM"
    assert len(results["runs"]) == 2
    assert f"2 of {2 * len(VARIANTS)} trainings are finished" in table(results)
    again = tiny(tmp_path / "s").run()
    assert again["stopped"] is None
    assert batches.drawn == 1 + 2 * len(VARIANTS) * 8  # no step was done twice, nothing measured again
    assert again["steps"] == results["steps"]
    assert timeless(rows(again)) == timeless(rows(whole[1]))


TWO = (Variant("dense"), Variant("hrbp"))


def test_two_jobs_train_what_one_does(tmp_path):
    one, two = (tiny(tmp_path / f"{jobs}", TWO, jobs=jobs).run() for jobs in (1, 2))
    assert [(run["line"], run["seed"]) for run in two["runs"]] == [(run["line"], run["seed"]) for run in one["runs"]]
    assert timeless(rows(two)) == timeless(rows(one))


@pytest.mark.slow
def test_a_study_of_two_jobs_that_was_stopped_continues(tmp_path):
    out = tmp_path / "s"

    def begun():
        return [path for path in out.glob("*/log.jsonl") if not (path.parent / "result.json").exists()]

    def stop():
        while not begun():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    results = tiny(out, TWO, jobs=2, epochs=16).run()
    assert results["stopped"] == read(out / "results.json")["stopped"] == "SIGINT"
    assert any(path.parent.joinpath("last.pt").exists() for path in begun())  # what was under way has a checkpoint
    again = tiny(out, TWO, jobs=2, epochs=16).run()
    assert again["stopped"] is None
    assert timeless(rows(again)) == timeless(rows(tiny(tmp_path / "one", TWO, epochs=16).run()))


@pytest.mark.slow
def test_a_job_that_is_killed_is_told_and_its_training_continues(tmp_path):
    out, children = tmp_path / "s", Path(f"/proc/self/task/{os.getpid()}/children")

    def kill():
        while not list(out.glob("*/log.jsonl")):
            time.sleep(0.05)
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(ChildProcessError, match="by signal 9"):
        tiny(out, TWO, jobs=2, epochs=16).run()
    assert not children.read_text().split()  # the other one has ended, too
    assert tiny(out, TWO, jobs=2, epochs=16).run()["stopped"] is None


@pytest.mark.slow
def test_what_a_job_raises_is_raised(tmp_path):
    tiny(tmp_path, TWO, seeds=(0,), epochs=1).run()
    folder = tmp_path / "hrbp-80-seed-1"
    folder.mkdir()
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="hrbp-80-seed-1"):
        tiny(tmp_path, TWO, jobs=2, epochs=1).run()


def test_jobs_that_cannot_be(tmp_path, capsys):
    with pytest.raises(ValueError, match="jobs is 0"):
        tiny(tmp_path, jobs=0)
    assert main(["study", "--preset", "regularity", "--jobs", "2"]) == 2
    assert "study: --jobs: --preset regularity" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_that_was_killed_continues(whole, tmp_path):
    with studies.killed("test_study", tmp_path / "s", results=3):
        results = tiny(tmp_path / "s").run()
    assert timeless(rows(results)) == timeless(rows(whole[1]))


def test_a_finished_study_only_reads(whole, monkeypatch):
    out, results = whole
    monkeypatch.setattr(study, "Trainer", None)
    monkeypatch.setattr(Study, "_measure", None)
    assert tiny(out).run() == results


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"epochs": 3}, r"training\.epochs is 2 there and 3 here"),
        ({"seeds": (0,)}, r"seeds is \[0, 1\] there and \[0\] here"),
        ({"variants": VARIANTS[:2]}, "variants is"),
        ({"sparsities": (0.9,)}, "sparsities is"),
    ],
)
def test_a_folder_of_another_study_is_refused(whole, other, said):
    before = (whole[0] / "results.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds a study with other settings: .*{said}.*another folder"):
        tiny(whole[0], **other)
    assert (whole[0] / "results.json").read_bytes() == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something that is no study; use a new folder"):
        tiny(tmp_path)
    with pytest.raises(ValueError, match="holds something that is no study"):
        tiny(tmp_path / "letter.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_result_of_another_training_is_refused(tmp_path):
    variants = VARIANTS[:2]
    tiny(tmp_path / "s", variants, seeds=(0,)).run()
    dense, narrow = (tmp_path / "s" / name / "result.json" for name in ("dense-seed-0", "narrow-80-seed-0"))
    narrow.write_bytes(dense.read_bytes())
    with pytest.raises(ValueError, match=r"narrow-80-seed-0.result\.json is of another training"):
        tiny(tmp_path / "s", variants, seeds=(0,)).run()
    narrow.write_text('{"line": "narr')
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        tiny(tmp_path / "s", variants, seeds=(0,)).run()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"seeds": (0, 0)}, r"seeds is \[0, 0\]; it needs one or more, each once"),
        ({"variants": ()}, r"variants is \[\]"),
        ({"sparsities": (0.5, 1.0)}, "between 0 and 1"),
        ({"every": 0}, "every is 0"),
        ({"variants": [Variant("dense", "rigl")]}, "'dense rigl' cannot be trained: it has no mask"),
        ({"variants": [Variant("elementwise", "set")]}, "masks of structure 'elementwise' do not change"),
        ({"variants": [Variant("kernel", "hrbp")]}, "method 'hrbp' updates groups; the structure is 'kernel'"),
        ({"variants": [Variant("round")]}, "no structure 'round'"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_written(tmp_path, option, said):
    with pytest.raises(ValueError, match=said):
        tiny(tmp_path / "s", **option)
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------- what is said


def test_the_table_is_that_of_the_json(whole):
    out, results = whole
    assert table(read(out / "results.json")) == table(results)
    with (out / "table.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    found = rows(results)
    assert written == [{key: "" if value is None else str(value) for key, value in row.items()} for row in found]
    assert [row["line"] for row in found] == [
        "dense", "narrow 80%", "unstructured 80%", "hrbp++ rigl 80%", "hrbp gmp 80%",
    ]  # fmt: skip
    for row in found:
        runs = [json.loads(file.read_text()) for file in out.glob("*/result.json")]
        right = [run["accuracy"] for run in runs if run["line"] == row["line"]]
        assert len(right) == row["seeds"] == 2
        assert row["accuracy"] == pytest.approx(sum(right) / 2)
        assert row["deviation"] == pytest.approx(statistics.stdev(right))
        assert f"{100 * row['accuracy']:.2f} +- {100 * row['deviation']:4.2f}" in table(results)
        assert row["step"] > 0


def test_parameters_and_memory_are_those_of_what_is_stored(whole):
    dense, narrow, unstructured, groups, gradual = rows(whole[1])
    assert dense["model_sparsity"] == dense["sparsity"] == 0
    for row in (unstructured, groups, gradual):
        assert row["sparsity"] == pytest.approx(0.8, abs=0.01)
        assert row["model_sparsity"] == pytest.approx(1 - row["parameters"] / dense["parameters"])
        assert abs(narrow["parameters"] - row["parameters"]) < 0.02 * row["parameters"]
        assert row["storage"] < 0.4 * dense["storage"]
    assert groups["memory"] < 0.3 * dense["memory"] < unstructured["memory"] < dense["memory"]
    assert "under a mask" not in table(whole[1])


def draw(path, results):
    draw_study(path, rows(results), results["settings"], results["machine"])


def planted(results, **accuracies):
    """The results with other accuracies: structure -> one for each seed."""
    results = copy.deepcopy(results)
    for run in results["runs"]:
        if run["structure"] in accuracies:
            run["accuracy"] = accuracies[run["structure"]][run["seed"]]
    return results


def test_a_seed_is_that_of_weights_masks_and_batches(whole):
    for run in whole[1]["runs"]:
        folder = whole[0] / f"{run['line'].replace('%', '').replace(' ', '-')}-seed-{run['seed']}"
        config = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
        assert config["seed"] == config["data"]["train"]["seed"] == run["seed"]
    saved = [load(whole[0] / f"hrbp++-rigl-80-seed-{seed}" / "model.pt").state_dict() for seed in (0, 1)]
    assert (saved[0]["conv1.weight"] != saved[1]["conv1.weight"]).any()
    assert any((saved[0][key] != saved[1][key]).any() for key in saved[0] if key.endswith("indices"))


def test_the_sentence_is_computed_from_the_results(whole):
    numbers = {"dense": (0.8, 0.8), "narrow": (0.4, 0.4), "unstructured": (0.7, 0.74), "hrbp++": (0.6, 0.6),
               "hrbp": (0.5, 0.54)}  # fmt: skip
    results = planted(whole[1], **numbers)
    # Variances of 8, 8, 0 and 0 square points: 4 of a difference of two means of 2 seeds, twice the root of which is 4.
    assert sentences(rows(results)) == [
        "At 80% sparsity, of the dense network's 80.0% accuracy, unstructured keeps 90.0% (72.0%), hrbp++ rigl 75.0% "
        "(60.0%), hrbp gmp 65.0% (52.0%) and narrow 50.0% (40.0%); differences under 4.0 points are within the spread "
        "of the seeds."
    ]
    other = planted(results, narrow=(0.8, 0.8), unstructured=(0.3, 0.3), hrbp=(0.5, 0.5))
    assert sentences(rows(other)) == [
        "At 80% sparsity, of the dense network's 80.0% accuracy, narrow keeps 100.0% (80.0%), hrbp++ rigl 75.0% "
        "(60.0%), hrbp gmp 62.5% (50.0%) and unstructured 37.5% (30.0%); differences under 0.0 points are within the "
        "spread of the seeds."
    ]
    assert sentences(rows(other))[0] in table(other)
    other["runs"] = [run for run in other["runs"] if run["structure"] in ("hrbp", "narrow") and run["seed"] == 0]
    assert sentences(rows(other)) == [
        "At 80% sparsity the accuracy is 80.0% with narrow and 50.0% with hrbp gmp; with one seed, small differences "
        "say nothing."
    ]


def test_slower_than_dense_is_said(whole):
    results = copy.deepcopy(whole[1])
    steps = {"dense": 0.01, "narrow 80%": 0.005, "unstructured 80%": 0.0101, "hrbp++ 80%": 0.02, "hrbp 80%": 0.004}
    assert results["steps"].keys() == results["step_bounds"].keys() == {*steps, "hrbp++ rigl 80%, an update"}
    results["steps"] = steps
    assert [row["step"] for row in rows(results)] == pytest.approx([1, 0.5, 1.01, 2, 0.4])
    assert "slower than dense here: hrbp++ rigl\n" in table(results)
    results["steps"]["hrbp++ 80%"] = 0.002
    assert "slower than dense" not in table(results)


def test_the_figure_shows_the_results(whole, tmp_path):
    from matplotlib.image import imread

    assert imread(whole[0] / "study.png").std() > 0.05
    flat = {"dense": (0.8, 0.8), "narrow": (0.4, 0.4), "unstructured": (0.7, 0.7), "hrbp++": (0.6, 0.6),
            "hrbp": (0.5, 0.5)}  # fmt: skip
    pictures = []
    for narrow in ((0.4, 0.4), (0.4, 0.4), (0.45, 0.55)):
        draw(tmp_path / "s.png", planted(whole[1], **{**flat, "narrow": narrow}))
        pictures.append(imread(tmp_path / "s.png"))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()
    with pytest.raises(ValueError, match="no training is finished"):
        draw(tmp_path / "none.png", {**whole[1], "runs": []})
    assert not (tmp_path / "none.png").exists()


def test_a_training_that_diverges_is_said_and_the_others_go_on(tmp_path):
    results = tiny(tmp_path / "s", VARIANTS[:2], seeds=(0,), lr=1e12, weight_decay=0.0).run()
    dense, narrow = rows(results)
    assert len(results["runs"]) == 2
    assert dense["accuracy"] is narrow["accuracy"] is None
    assert dense["diverged"] == narrow["diverged"] == 1
    assert table(results).count("diverged") == 2
    assert sentences(rows(results)) == []


# ---------------------------------------------------------------- the paper


def paper(whole, **settings):
    """The results as if they were of the paper's training."""
    results = copy.deepcopy(whole[1])
    training = {name: list(v) if isinstance(v, tuple) else v for name, v in PRESETS["paper"].training.items()}
    results["settings"].update(model="resnet32", width=2.0, data="cifar10", batch_size=128)
    results["settings"]["training"].update(training)
    results["settings"].update(settings)
    for run in results["runs"]:
        run["asked"] = 0.9 if run["asked"] else 0.0
    return results


def test_published_numbers_stand_beside_the_same_training_alone(whole):
    shown = {row["structure"]: row["published"] for row in rows(paper(whole))}
    assert shown == {"dense": 0.948, "narrow": None, "unstructured": 0.9281, "hrbp++ rigl": None, "hrbp gmp": None}
    assert "paper %" in table(paper(whole))
    for other in ({"width": 1.0}, {"data": "shapes"}, {"batch_size": 64}):
        assert "paper" not in table(paper(whole, **other))
    short = paper(whole)
    short["settings"]["training"]["epochs"] = 10
    assert "paper" not in table(short)


def test_the_paper_has_a_number_for_every_line_of_its_table():
    for (model, _), published in PUBLISHED.items():
        for variant in PRESETS["paper"].variants if model != "resnet50" else ():
            if variant.structure != "narrow":
                assert set(published[variant.name]) == ({0.0} if variant.structure == "dense" else {0.9, 0.95})
    assert PUBLISHED["resnet32", "cifar10"]["hrbp++"] == {0.9: (92.30, 1.4), 0.95: (90.84, 1.6)}
    assert PUBLISHED["resnet32", "cifar10"]["hrbp++ tap_density=1/9"] == {0.9: (92.65, None), 0.95: (91.3, None)}
    assert PUBLISHED["vgg19", "cifar100"]["hrbp++ hrbp"][0.95] == (68.04, None)
    assert PUBLISHED["vgg19", "cifar100"]["hrbp++ paper hrbp"][0.95] == (68.04, None)
    names = {variant.name for variant in PRESETS["imagenet"].variants}
    assert set(PUBLISHED["resnet50", "imagenet"]) <= names
    assert PUBLISHED["resnet50", "imagenet"]["hrbp++ paper"][0.8] == (70.90, 1.26)
    assert PUBLISHED["vgg19", "cifar10"]["unstructured grasp"][0.9] == (93.30, None)


# ---------------------------------------------------------------- the command


def command(*args):
    parser = argparse.ArgumentParser()
    study_cli.add_study(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["study", *map(str, args)])
    return parsed.run(parsed)


@pytest.fixture
def few(monkeypatch):
    """`load` gives few images."""
    monkeypatch.setattr(study_cli, "load", lambda name, split, **more: data.load(name, split, count=128, **more))


def test_the_command_trains_what_goes_together_and_ends_with_the_table(few, tmp_path, capsys):
    args = ("--structures", "dense", "elementwise", "hrbp", "--methods", "static", "set", "--sparsities", "0.8",
            "--seeds", "3", "--epochs", "1", "--width", "0.5", "--device", "cpu", "--out", tmp_path / "s")  # fmt: skip
    assert command(*args) == 0
    out = capsys.readouterr().out
    assert "left out: elementwise set, as masks of structure 'elementwise' do not change; use method='static'" in out
    assert "[4/4, " in out
    results = read(tmp_path / "s" / "results.json")
    assert [run["line"] for run in results["runs"]] == ["dense", "elementwise 80%", "hrbp 80%", "hrbp set 80%"]
    assert table(results) in out
    assert {file.name for file in (tmp_path / "s").glob("*.*")} == {"results.json", "table.csv", "study.png"}
    assert command(*args) == 0
    assert table(results) in capsys.readouterr().out


def test_masks_that_follow_dense_weights(tmp_path):
    lines = [Variant("dense"), Variant("2:4"), Variant("2:4", "sr-ste"), Variant("unstructured", "ste")]
    results = tiny(tmp_path / "s", lines, sparsities=(0.5,), seeds=(0,)).run()
    assert set(results["steps"]) == {"dense", "2:4 50%", "2:4 sr-ste 50%", "unstructured ste 50%"}
    dense, static, srste, ste = rows(results)
    for row in (static, srste, ste):
        assert row["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert row["memory"] >= dense["memory"]  # half of the weights need as much index, in memory
        assert row["storage"] < dense["storage"] + 4 * dense["parameters"]
    assert load(tmp_path / "s" / "2-4-sr-ste-50-seed-0" / "model.pt").layer1[0].conv1.pattern.blocksize == (1, 1)
    assert "2:4 sr-ste, unstructured ste: trains a dense weight, with a dense layer's memory" in table(results)
    with pytest.raises(ValueError, match="'hrbp ste' cannot be trained: method 'ste' makes masks anew at every step"):
        tiny(tmp_path / "none", [Variant("hrbp", "ste")])


def test_soft_pruning_is_compared_at_its_final_sparsity(tmp_path):
    line = Variant("1xn", "subp", options={"n": 4, "uniform": 1})
    results = tiny(tmp_path / "s", [Variant("dense"), line], sparsities=(0.75,), seeds=(0,), every=None).run()
    assert line.name == "1xn n=4 uniform=1 subp"
    dense, soft = rows(results)
    assert soft["sparsity"] == pytest.approx(0.75, abs=0.05)
    assert soft["memory"] >= dense["memory"]
    assert soft["storage"] < 0.7 * dense["storage"]
    assert "1xn n=4 uniform=1 subp: trains a dense weight, with a dense layer's memory" in table(results)
    assert "under a mask" not in table(results)
    folder = tmp_path / "s" / "1xn-n=4-uniform=1-subp-75-seed-0"
    told = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in told if entry["kind"] == "update"]
    assert steps == list(range(1, 7))  # of eight steps three quarters: twenty updates, or every step
    assert Variant("1xn", "subp").refuses() is None
    with pytest.raises(
        ValueError, match="'1xn uniform=0 subp' cannot be trained: method 'subp' trains uniform 1xn blocks"
    ):
        tiny(tmp_path / "none", [Variant("1xn", "subp", options={"uniform": 0})])


def test_the_papers_study_says_where_cifar_goes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not in .*; put cifar-10-python.tar.gz"):
        command("--preset", "paper", "--root", tmp_path, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("model", "data_set", "lines"), [("resnet32", "cifar10", 18), ("vgg19", "cifar100", 13)])
def test_the_papers_study_is_its_table(model, data_set, lines):
    args = argparse.Namespace(preset="paper", structures=None, methods=None, distribution=None)
    chosen = study_cli._variants(args, PRESETS["paper"], model, data_set)
    assert len({variant.name for variant in chosen}) == lines
    assert {variant.refuses() for variant in chosen} == {None}


def test_the_papers_groups_are_as_printed():
    """8 groups of 8 filters or more by Algorithm 1, wherever filters have to go for that, and unread channels."""
    torch.manual_seed(0)
    (variant,) = (v for v in PRESETS["paper"].variants if v.name == "hrbp++ paper")
    model = hrbp.models.build("resnet8", classes=4, width=4)
    hrbp.sparsify(model, 0.9, structure=variant.structure, **variant.options)
    layer = sparse_layers(model)["layer1.0.conv1"]
    rule = record_of(model).structure
    made = rule.grouping(layer.mask(), layer.row_order())
    assert (rule.method, made.groups, layer.row_order() is None, rule.balanced) == ("paper", 8, False, False)
    with pytest.raises(ValueError, match="method of structure 'hrbp' is given as rule="):
        structure_for(None, "hrbp", {"method": "paper"})


def test_the_study_of_subp_is_that_of_its_released_code():
    preset = PRESETS["subp"]
    assert [v.name for v in preset.variants] == ["dense", "1xn n=16 subp", "1xn n=32 subp"]
    made = METHODS["subp"](**preset.training["evolve_options"])
    assert (made.begin * 250, made.until * 250, made.ranks) == (10, 180, "live")


def asked(preset, *args):
    """The variants of a command."""
    parser = argparse.ArgumentParser()
    study_cli.add_study(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["study", "--preset", preset, *args])
    return study_cli._variants(parsed, PRESETS[preset], "resnet8", "shapes")


def test_the_distribution_is_that_of_every_sparse_variant():
    names = [v.name for v in asked("worth", "--structures", "narrow", "hrbp", "--distribution", "uniform")]
    assert names == ["narrow", "narrow 2x", "narrow 3x", "narrow 5x", "hrbp uniform"]
    every = asked("worth", "--distribution", "uniform")
    assert {v.distribution for v in every if v.structure not in ("dense", "narrow")} == {"uniform"}
    assert len({v.name for v in every}) == len(every) == len(PRESETS["worth"].variants)
    assert [v.record for v in asked("quick")] == [v.record for v in PRESETS["quick"].variants]
    with pytest.raises(ValueError, match="--distribution: n:m sr-ste comes with one of its own"):
        asked("worth", "--structures", "n:m", "--methods", "sr-ste", "--distribution", "erk")
    with pytest.raises(ValueError, match="--distribution is not of --preset ablation"):
        command("--preset", "ablation", "--distribution", "uniform")
