"""A training chooses how often its masks change, and refuses what would do nothing."""

from __future__ import annotations

import json
import math

import pytest

import hrbp
import studies
from hrbp.cli import train as train_cli
from hrbp.formats import model as saved
from hrbp.study.study import Study
from hrbp.study.variants import Variant
from hrbp.training.settings import Settings
from test_train import command, images, network, sparse, trainer

pytestmark = pytest.mark.usefixtures("no_figures")
quick = studies.quick("hrbp.study.study.ROUNDS")

SMALL = ("--model", "resnet8", "--width", "0.5", "--epochs", "1", "--batch-size", "20", "--device", "cpu")


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.setattr(train_cli, "load", lambda name, split, **_: images(60 if split == "train" else 20))


def updates(result) -> list[int]:
    return [entry["step"] for entry in result.history if entry["kind"] == "update"]


@pytest.mark.parametrize(
    ("method", "count", "epochs", "every"),
    [*((method, 36, 3, 1) for method in ("set", "rigl", "hrbp", "gmp", "sr-ste", "subp")), ("gmp", 96, 10, 2)],
)
def test_masks_change_twenty_times_where_there_are_the_steps(method, count, epochs, every, tmp_path):
    """3 or 8 steps an epoch; masks stay after three quarters of them."""
    steps = epochs * count // 12
    structure = {"sr-ste": "2:4", "subp": "1xn"}.get(method, "hrbp")
    model = sparse(network(), structure, 0.0 if method == "gmp" else 0.5, method)
    sets = images(count), images(20, seed=1)
    options = {"sparsity": 0.8} if method == "gmp" else {}
    made = trainer(
        model,
        tmp_path if epochs == 3 else None,
        sets=sets,
        epochs=epochs,
        evolve=method.upper(),
        evolve_options=options,
    )
    result = made.run()
    if method == "sr-ste":
        possible, every = steps, max(1, steps // 21)
    else:
        possible = math.ceil(0.75 * steps) - (method not in ("gmp", "subp"))
    told = updates(result)
    assert made.evolver.every == every
    assert len(told) >= min(20, possible)
    assert told == [every * (i + 1) for i in range(len(told))]
    if epochs == 3:
        config = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
        assert config["settings"]["evolve"] == method
        assert config["settings"]["evolve_options"]["every"] == every
    if method == "gmp":
        assert result.sparsity == pytest.approx(0.8, abs=0.03)
        assert told[-1] == math.ceil(0.75 * steps / every) * every


def test_updates_are_a_hundred_steps_or_an_epoch_apart_in_long_trainings():
    for method, structure, every in (("rigl", "hrbp", 100), ("subp", "1xn", 5), ("ste", "2:4", 100)):
        made = trainer(sparse(network(), structure, 0.5, method), epochs=1000, evolve=method)
        assert made.evolver.every == every
    made = trainer(sparse(network()), epochs=1000, evolve="rigl", evolve_options={"every": 7})
    assert made.evolver.every == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"evolve": "rigl", "evolve_options": {"every": 12}},
            "'rigl' would never change a mask: .* every to at most 11",
        ),
        ({"evolve": "gmp", "evolve_options": {"sparsity": 0.9, "every": 8}}, "reaches its sparsity at step 16"),
        ({"evolve": "static", "evolve_options": {"decay": 0.1}}, "method 'static' has no option decay; it takes: none"),
        ({"evolve": "gmp", "evolve_options": {"sparsity": 0.9, "drop": 0.1}}, "method 'gmp' has no option drop"),
        ({"evolve": "rigl", "evolve_options": {"total_steps": 7}}, "method 'rigl' has no option total_steps"),
        ({"evolve": "set", "evolve_options": {"until": "late"}}, "until is 'late'"),
        ({"evolve": "set", "evolve_options": {"every": None}}, "every is None|never"),
    ],
)
def test_what_would_do_nothing_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(sparse(network(), sparsity=0.0 if settings["evolve"] == "gmp" else 0.5), tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_names_are_accepted_in_any_case():
    assert Settings(1, evolve="SR-STE").evolve == "sr-ste"
    assert trainer(sparse(network()), evolve="SET").evolver.method == "set"


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "sparsity"),
    [
        (("--structure", "unstructured", "--evolve", "gmp"), 0.9),
        (
            ("--structure", "hrbp", "--option", "groups=2", "--evolve", "GMP", "--until", "1.0", "--sparsity", "0.8"),
            0.8,
        ),
        (("--structure", "unstructured", "--evolve", "RigL", "--drop", "0.5"), 0.9),
        (("--structure", "1xn", "--option", "n=4", "--evolve", "subp", "--sparsity", "0.5"), 0.5),
    ],
)
def test_the_shortest_training_ends_where_it_says(words, sparsity, tmp_path, shapes, capsys):
    assert command(*SMALL, *words, "--out", str(tmp_path / "run")) == 0
    assert hrbp.summary(saved.load(tmp_path / "run" / "model.pt")).sparsity == pytest.approx(sparsity, abs=0.03)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any(entry["kind"] == "update" for entry in log)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--decay", "0.1"), "--evolve static: method 'static' has no option decay"),
        (("--every", "2"), "method 'static' has no option every"),
        (("--drop", "0.2"), "method 'static' has no option drop"),
        (("--until", "0.5"), "method 'static' has no option until"),
        (("--evolve-option", "score=l1"), "method 'static' has no option score"),
        (("--initial-sparsity", "0.5"), "--initial-sparsity is where --evolve gmp starts; --evolve is static"),
        (("--evolve", "gmp", "--drop", "0.2"), "--evolve gmp: method 'gmp' has no option drop; it takes: every, until"),
        (("--evolve", "rigl", "--decay", "0.2"), "method 'rigl' has no option decay"),
        (("--evolve", "rigl", "--evolve-option", "total_steps=7"), "method 'rigl' has no option total_steps"),
        (
            ("--evolve", "rigl", "--every", "100"),
            "'rigl' would never change a mask: its first update comes at step every",
        ),
        (("--evolve", "gmp", "--every", "2", "--structure", "unstructured"), "'gmp' reaches its sparsity at step 4"),
    ],
)
def test_options_that_mean_nothing_are_refused(words, message, tmp_path, shapes, capsys):
    with pytest.raises(ValueError, match=message):
        command(*SMALL, *words, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_study_gives_each_method_the_options_it_takes(tmp_path):
    variants = [Variant("hrbp++", "rigl"), Variant("hrbp++", "gmp")]
    options = {
        "sparsities": (0.8,),
        "seeds": (0,),
        "batch_size": 32,
        "epochs": 1,
        "device": "cpu",
        "quiet": True,
        "width": 0.5,
    }
    sets = tuple(images(n, seed) for n, seed in ((96, 0), (32, 1)))
    with pytest.raises(ValueError, match="evolve_options has decay, which no method of the variants takes"):
        Study(tmp_path / "no", variants, images=sets, evolve_options={"decay": 0.1}, **options)
    made = Study(tmp_path / "yes", variants, images=sets, evolve_options={"drop": 0.5, "until": 0.9}, **options)
    results = made.run()
    assert [run["method"] for run in results["runs"]] == ["rigl", "gmp"]
    assert results["runs"][1]["sparsity"] == pytest.approx(0.8, abs=0.03)
