"""Are sparse networks worth it: the rival of equal time, the arms of the study, and what it says."""

from __future__ import annotations

import argparse
import copy
import json
import math

import pytest
import torch

import studies
from hrbp import data
from hrbp.cli import study as study_cli
from hrbp.cli import worth as worth_cli
from hrbp.formats.model import load
from hrbp.layers.view import sparse_layers
from hrbp.reports.worth_picture import draw_worth
from hrbp.study import worth
from hrbp.study.rival import Point, against, curve, rival_at
from hrbp.study.study import Study
from hrbp.study.study_table import rows, step_times, update_name
from hrbp.study.variants import PRESETS, WORTH, WORTH_QUICK, Variant
from hrbp.study.worth_table import answers, parts, table

VARIANTS = (
    Variant("dense"), Variant("narrow"), Variant("narrow", options={"times": 2}), Variant("unstructured"),
    Variant("hrbp++", "rigl"), Variant("hrbp++", start="dense"),
)  # fmt: skip
quick = studies.quick("hrbp.study.study.ROUNDS")


def point(seconds, *right):
    return Point(seconds, dict(enumerate(right)))


# ---------------------------------------------------------------- the rival


def test_a_network_that_a_faster_one_beats_is_no_point_of_the_curve():
    points = [point(4.0, 0.9, 0.9), point(1.0, 0.5, 0.6), point(2.0, 0.4, 0.6), point(3.0, 0.7, 0.7), point(2.5)]
    assert [p.seconds for p in curve(points)] == [1.0, 3.0, 4.0]
    assert curve([]) == []


def test_the_rival_is_interpolated_for_each_seed_in_the_logarithm_of_time():
    points = curve([point(1.0, 0.5, 0.6), point(4.0, 0.7, 1.0)])
    assert rival_at(points, 2.0) == pytest.approx({0: 0.6, 1: 0.8})
    assert rival_at(points, 1.0) == pytest.approx({0: 0.5, 1: 0.6})
    assert rival_at(points, 4.0) == rival_at(points, 9.0) == {0: 0.7, 1: 1.0}  # slower than dense: against dense
    assert rival_at(points, 0.99) is rival_at([], 1.0) is None
    missing = curve([Point(1.0, {0: 0.5, 1: 0.6}), Point(4.0, {0: 0.7})])
    assert rival_at(missing, 2.0) == pytest.approx({0: 0.6})


def test_a_difference_holds_at_both_ends_of_the_interval_of_time():
    points = curve([point(1.0, 0.5, 0.5, 0.5), point(4.0, 0.7, 0.7, 0.7)])
    ours = {0: 0.61, 1: 0.62, 2: 0.63}
    half = 4.302653 * 0.01 / math.sqrt(3)
    exact = against(points, ours, (2.0, 2.0, 2.0))
    assert (exact.mean, exact.low, exact.high) == pytest.approx((0.02, 0.02 - half, 0.02 + half))
    wide = against(points, ours, (2.0, 1.0, 4.0))
    assert (wide.mean, wide.low, wide.high) == pytest.approx((0.02, -0.08 - half, 0.12 + half))
    assert against(points, ours, (1.0, 0.5, 1.0)).mean == pytest.approx(0.12)
    assert against(points, ours, (0.9, 0.8, 1.0)) is None


# ---------------------------------------------------------------- the arms


def tiny(out, variants=VARIANTS, **more):
    images = data.load("shapes", "train", count=128), data.load("shapes", "test", count=100)
    options = {"sparsities": (0.8,), "seeds": (0, 1), "batch_size": 32, "every": 2, "epochs": 2, "device": "cpu"}
    return Study(out, variants, images=images, quiet=True, **{**options, **more})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("worth") / "whole"
    return out, tiny(out).run()


@pytest.mark.slow
def test_every_arm_has_the_same_steps_at_the_same_learning_rates(whole):
    found = set()
    for file in whole[0].glob("*/log.jsonl"):
        told = [json.loads(text) for text in file.read_text().splitlines()]
        found.add(tuple((entry["step"], entry["lr"]) for entry in told if entry["kind"] == "epoch"))
    assert len(list(whole[0].glob("*/log.jsonl"))) == 2 * len(VARIANTS)
    ((first, second),) = found
    assert (first[0], second[0]) == (4, 8)


@pytest.mark.slow
def test_from_dense_is_dense_for_half_of_the_training_and_then_pruned_by_magnitude(whole):
    told = [
        json.loads(text) for text in (whole[0] / "hrbp++-from-dense-80-seed-0" / "log.jsonl").read_text().splitlines()
    ]
    (update,) = [entry for entry in told if entry["kind"] == "update"]
    assert update["step"] == 4
    assert tiny(whole[0])._trainer(VARIANTS[-1], 0.8, 0).sparsity == 0
    assert update["sparsity"] == pytest.approx(0.8, abs=0.01)
    layers = sparse_layers(load(whole[0] / "hrbp++-from-dense-80-seed-0" / "model.pt"))
    orders = [layer.row_order() for layer in layers.values()]
    assert any(order is not None and not torch.equal(order, order.sort().values) for order in orders)
    row = {row["structure"]: row for row in rows(whole[1])}["hrbp++ from dense"]
    assert row["sparsity"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.slow
def test_narrow_networks_have_so_many_times_the_parameters(whole, tmp_path):
    found = {row["structure"]: row["parameters"] for row in rows(whole[1])}
    assert found["narrow"] == pytest.approx(found["unstructured"], rel=0.02)
    assert found["narrow 2x"] == pytest.approx(2 * found["unstructured"], rel=0.02)
    results = tiny(tmp_path / "s", [*VARIANTS[:2], Variant("narrow", options={"times": 9})], seeds=(0,)).run()
    assert "and the dense network has 78,042" in results["left_out"]["narrow 9x 80%"]


@pytest.mark.slow
def test_steps_that_change_masks_count_as_often_as_they_come(whole):
    results = copy.deepcopy(whole[1])
    rigl, begun = Variant("hrbp++", "rigl"), Variant("hrbp++", start="dense")
    names = "dense", "hrbp++ 80%", update_name(rigl, 0.8), "hrbp++ magnitude 80%"
    assert {*names} <= results["steps"].keys() == results["step_bounds"].keys()
    results["steps"].update(zip(names, (4.0, 1.0, 3.0, 2.0), strict=True))
    results["step_bounds"].update(zip(names, ([4.0, 4.0], [0.9, 1.2], [2.5, 4.0], [1.5, 2.5]), strict=True))
    share = 0.75 / 2  # until / every
    assert step_times(results, rigl, 0.8) == pytest.approx(
        [(1 - share) * a + share * b for a, b in ((1.0, 3.0), (0.9, 2.5), (1.2, 4.0))]
    )
    assert step_times(results, begun, 0.8) == pytest.approx([3.0, 2.75, 3.25])
    assert step_times({"steps": {}, "settings": results["settings"]}, begun, 0.8) is None


@pytest.mark.slow
def test_times_are_measured_again_and_trainings_are_not(whole, monkeypatch):
    out, results = whole
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/result.json")}
    again = tiny(out, retime=True)
    assert again.measure() == 0.0
    monkeypatch.setattr(Study, "_measure", None)
    found = again.run()
    assert found["runs"] == results["runs"]
    assert found["steps"].keys() == results["steps"].keys()
    assert found["steps"] != results["steps"]
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert not tiny(out, fuse=False).results["steps"]  # those of fused steps are others
    assert tiny(out).results["steps"] == found["steps"]


@pytest.mark.slow
def test_damaged_bounds_are_refused(whole, tmp_path):
    (tmp_path / "s").mkdir()
    content = copy.deepcopy(whole[1])
    content["step_bounds"]["dense"] = [1.0]
    (tmp_path / "s" / "results.json").write_text(json.dumps(content))
    (tmp_path / "s" / "dense-seed-0").mkdir()
    (tmp_path / "s" / "dense-seed-0" / "result.json").write_bytes((whole[0] / "dense-seed-0/result.json").read_bytes())
    with pytest.raises(ValueError, match="'step_bounds' has no times"):
        tiny(tmp_path / "s")


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        (Variant("dense", start="dense"), "it has no mask"),
        (Variant("hrbp", "rigl", start="dense"), "pruned once, halfway, and method 'rigl' changes masks"),
        (Variant("elementwise", start="dense"), "masks of structure 'elementwise' do not change"),
        (Variant("narrow", options={"groups": 2}), "'narrow' has no option groups"),
        (Variant("narrow", options={"times": 0}), "times is 0"),
        (Variant("hrbp", start="afar"), "start is 'afar'"),
    ],
)
def test_an_arm_that_cannot_be_is_refused(variant, said):
    assert said in variant.refuses()


def test_the_preset_has_every_question_and_every_arm_fits():
    preset = PRESETS["worth"]
    assert all(variant in WORTH for variant in WORTH_QUICK)
    assert all(variant.refuses() is None for variant in WORTH)
    assert len({variant.name for variant in WORTH}) == len(WORTH)
    assert preset.seeds == (0, 1, 2, 3, 4)
    assert preset.sparsities == (0.9, 0.95)
    assert {v.times for v in WORTH if v.structure == "narrow"} >= {1, 2, 3}
    kinds = {v.structure for v in WORTH}
    assert kinds >= {"dense", "narrow", "unstructured", "hrbp", "hrbp++", "elementwise", "1xn", "n:m", "block"}
    assert {v.method for v in WORTH} == {"static", "rigl"}
    assert {v.start for v in WORTH} == {"scratch", "dense"}


# ---------------------------------------------------------------- the command


def command(*args):
    parser = argparse.ArgumentParser()
    study_cli.add_study(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["study", *map(str, args)])
    parsed.words = ["study", *map(str, args)]
    return parsed.run(parsed)


def test_the_command_says_its_time_first_and_ends_with_the_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_cli, "load", lambda name, split, **more: data.load("shapes", split, count=128))
    args = ("--preset", "worth", "--quick", "--width", 1, "--data", "shapes", "--structures", "dense", "narrow",
            "block", "--seeds", 0, 1, "--epochs", 1, "--device", "cpu", "--out", tmp_path / "w", "--html")  # fmt: skip
    assert command(*args) == 0
    out = capsys.readouterr().out
    expected, first, end = (out.index(words) for words in ("expected: ", "[1/12, ", "above narrow of equal"))
    assert expected < first < end
    assert "[12/12, " in out
    assert "best so far block 90% " in out
    assert "paired by seed" in out
    assert {file.name for file in (tmp_path / "w").iterdir()} == {"worth.png", "study.html", "resnet8-x1-shapes"}
    assert "At equal parameters, resnet8 x 1 on shapes" in (tmp_path / "w" / "study.html").read_text()
    assert command(*args) == 0
    assert "expected: 0 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--quick",), "--quick is of --preset worth"),
        (("--full", "--preset", "regularity"), "--full is of --preset worth"),
        (("--width", "1", "2"), "--preset quick takes one --width"),
        (("--preset", "worth", "--quick", "--full"), "two sizes of the study; take one"),
        (("--preset", "regularity", "--retime"), "--retime is not of --preset regularity"),
        (("--preset", "worth", "--retrain", "2"), "--retrain is of --preset regularity"),
    ],
)
def test_options_of_another_preset_are_refused(args, said):
    with pytest.raises(ValueError, match=said):
        command(*args)


def test_without_scikit_learn_the_digits_are_left_out_and_that_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("hrbp.cli.worth.has_digits", lambda: False)
    args = argparse.Namespace(full=True, root=tmp_path)
    assert worth_cli._sets(args) == ["shapes"]
    told = capsys.readouterr().out
    assert "left out: digits, as scikit-learn is not installed" in told
    assert f"left out: cifar10, as it is not in {tmp_path}" in told
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert worth_cli._sets(args) == ["shapes", "cifar10"]


# ---------------------------------------------------------------- what is said


def planted(whole, **accuracies):
    """The results with planted accuracies and times: of dense 4, of narrow 1 and 2, of all others 2 seconds."""
    results = copy.deepcopy(whole[1])
    for name in results["steps"]:
        results["steps"][name] = {"dense": 4.0, "narrow 80%": 1.0}.get(name, 2.0)
        results["step_bounds"][name] = [results["steps"][name]] * 2
    for run in results["runs"]:
        run["accuracy"] = accuracies[run["line"].replace(" ", "_").replace("+", "").rstrip("%")][run["seed"]]
    return results


EVEN = {
    "dense": (0.9, 0.9), "narrow_80": (0.5, 0.5), "narrow_2x_80": (0.6, 0.62), "unstructured_80": (0.65, 0.671),
    "hrbp_rigl_80": (0.55, 0.571), "hrbp_from_dense_80": (0.5, 0.9),
}  # fmt: skip


@pytest.mark.slow
def test_the_answer_is_computed_from_the_results(whole):
    results = planted(whole, **EVEN)
    at_time, at_size, against_single = answers(results, rows(results))
    assert at_time == (
        "At equal measured step time, resnet8 x 1 on shapes: 1 of 3 sparse arms is above the narrow dense network whose"
        " step takes as long, 1 below, of 1 no difference is shown; best is unstructured at 80%: +5.1 [+4.4, +5.7]"
        " points."
    )
    assert at_size.startswith("At equal parameters, resnet8 x 1 on shapes: 1 of 3 sparse arms is above the narrow")
    assert against_single.startswith("Against single weights at 80%, resnet8 x 1 on shapes: the best HRBP++, hrbp++ ")
    assert "no difference shown" in against_single
    text = table([results])
    assert (
        "Sparse networks are worth their time here in 1 of 3 comparisons with the narrow dense network of equal"
        " measured step time; in 1 they are below it, in 1 no difference is shown (by chance alone 0.1 would be above"
        " and as many below)."
    ) in text
    worse = table([planted(whole, **{**EVEN, "unstructured_80": (0.5, 0.52)})])
    assert "not shown to be worth their time here: of 3 comparisons with" in worse
    assert "they are above it in 0, in 2 they are below it" in worse
    assert "no difference shown" in text
    assert at_time in text
    assert "12 of 12 trainings are finished" in text


@pytest.mark.slow
def test_the_table_of_two_studies_names_each(whole):
    other = planted(whole, **EVEN)
    other["settings"]["data"] = "digits"
    found = parts([planted(whole, **EVEN), other])
    assert [line[0] for line in found.lines][::6] == ["resnet8 x 1 on shapes: dense", "resnet8 x 1 on digits: dense"]
    assert len(found.sentences) == 7
    assert parts([{**other, "runs": []}]) is None


@pytest.mark.slow
def test_the_figure_shows_the_results(whole, tmp_path):
    from matplotlib.image import imread

    pictures = []
    for name, right in (("a", (0.65, 0.671)), ("b", (0.65, 0.671)), ("c", (0.75, 0.76))):
        (tmp_path / name).mkdir()
        pictures.append(imread(worth.draw(tmp_path / name, [planted(whole, **{**EVEN, "unstructured_80": right})])))
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0].shape != pictures[2].shape or (pictures[0] != pictures[2]).any()
    with pytest.raises(ValueError, match="no training is finished"):
        draw_worth(tmp_path / "none.png", {"nothing": []}, "here")
    assert not (tmp_path / "none.png").exists()
