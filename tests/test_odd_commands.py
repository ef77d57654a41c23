"""Odd commands end in one sentence on stderr that says what came and what is needed, and in status 2."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

import processes
from hrbp import data
from hrbp.__main__ import main

ROOT = Path(__file__).parent.parent

TRAIN = ("train", "--model", "resnet8", "--width", "0.25", "--epochs", "1", "--batch-size", "32", "--device", "cpu",
         "--out", "out")  # fmt: skip
STUDY = ("study", "--epochs", "1", "--seeds", "0", "--batch-size", "32", "--width", "0.25", "--out", "out",
         "--device", "cpu")  # fmt: skip
GRAINS = (*STUDY, "--preset", "regularity", "--retrain", "1", "--timed-width", "0.25",
          "--structures", "dense", "filter", "--sparsities", "0.5")  # fmt: skip
BIG = "9" * 400


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with files of many kinds; few images are generated."""
    root = tmp_path_factory.mktemp("odd")
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    weights = {
        "a.weight": torch.rand(16, 16, 3, 3),
        "b.weight": torch.rand(32, 16, 3, 3),
        "fc.weight": torch.rand(4, 9),
    }
    torch.save(weights, root / "ok.pt")
    (root / "empty.pt").write_bytes(b"")
    (root / "text.pt").write_text("hi")
    (root / "file").write_text("x")
    for name in ("folder.pt", "nothing", "cifar-10-batches-py"):
        (root / name).mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(b"nope")
    for name in ("flat/0", "classes/a/0", "classes/b/0", "onlytrain/train/a/0", "onlytrain/train/b/0",
                 *(f"good/{split}/{kind}/{i}" for split in ("train", "val") for kind in "ab" for i in range(4)),
                 *(f"other/{split}/{i}" for split, i in (("train/a", 0), ("train/b", 0), ("val/c", 0)))):  # fmt: skip
        file = root / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (20, 20), (200, 10, 30)).save(file)
    (root / "good" / "train" / "a" / "0.png").write_bytes(b"nope")
    return root


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    few, drawn = data.shapes, {}

    def shapes(split, *, count=None, **options):
        key = (split, count, *options.items())
        if key not in drawn:
            drawn[key] = few(split, count=count or 64, **options)
        return drawn[key]

    monkeypatch.chdir(place)
    monkeypatch.setattr(data.loading, "shapes", shapes)


def said(capsys, words):
    try:
        status = main(list(words))
    except SystemExit as end:  # argparse
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


MISTAKES = [
    # what there is not
    (("foo",), "invalid choice: 'foo'"),
    (("",), "invalid choice: ''"),
    (("train", "--nothing"), "unrecognized arguments: --nothing"),
    ((*TRAIN, "--model", "foo"), "invalid choice: 'foo'"),
    ((*TRAIN, "--structure", "foo"), "no structure 'foo'; choose one of unstructured"),
    ((*TRAIN, "--structure", ""), "no structure ''"),
    ((*TRAIN, "--structure", "é😀"), "no structure 'é😀'"),
    ((*TRAIN, "--evolve", "foo"), "invalid choice: 'foo'"),
    ((*TRAIN, "--distribution", "foo"), "invalid choice: 'foo' (choose from"),
    ((*TRAIN, "--device", "foo"), "device is 'foo'; it needs cpu, cuda"),
    ((*TRAIN, "--device", ""), "device is ''"),
    ((*TRAIN, "--device", "meta"), "device is 'meta', which cannot be used here"),
    ((*TRAIN, "--device", "xpu"), "device is 'xpu', which cannot be used here"),
    ((*TRAIN, "--device", "cuda:-1"), "device is 'cuda:-1'"),
    ((*TRAIN, "--device", "cuda:99"), "this rank needs cuda:99 and there are"),
    # options of structures
    ((*TRAIN, "--option", "foo=1"), "no option foo; it has groups, tap_density"),
    ((*TRAIN, "--option", "n=banana"), "no option n; it has groups"),
    ((*TRAIN, "--structure", "block", "--option", "blocksize=(True,True)"), "a pair (bk, bc) of integers"),
    ((*TRAIN, "--option", "groups=0"), "groups is 0; it needs a positive integer"),
    ((*TRAIN, "--option", "groups"), "'groups' is no NAME=VALUE"),
    ((*TRAIN, "--option", "=1"), "'=1' is no NAME=VALUE"),
    ((*TRAIN, "--option", "method=paper"), "--option method: it is rule here"),
    ((*TRAIN, "--option", "seed=5"), "no option seed"),
    ((*TRAIN, "--option", "batch=1"), "no option batch"),
    ((*TRAIN, "--option", "include=conv"), "no option include"),
    ((*TRAIN, "--option", "sparsity=0.3"), "no option sparsity"),
    ((*TRAIN, "--option", "granule=7"), "granule = 7 does not divide"),
    ((*TRAIN, "--structure", "dense", "--option", "groups=4"), "--structure dense has no options"),
    ((*TRAIN, "--structure", "2:4", "--option", "n=1"), "no option n; it has none"),
    ((*TRAIN, "--structure", "block", "--option", "blocksize=4"), "it needs a pair (bk, bc)"),
    ((*TRAIN, "--structure", "2:4", "--sparsity", "0.9"), "the structure keeps at least"),
    ((*TRAIN, "--structure", "kernel", "--evolve", "hrbp"), "the structure is 'kernel'"),
    # numbers
    ((*TRAIN, "--sparsity", "1"), "1 is not in [0, 1)"),
    ((*TRAIN, "--sparsity", "nan"), "nan is not in [0, 1)"),
    ((*TRAIN, "--sparsity", "x"), "x is not in [0, 1)"),
    (
        (
            *TRAIN,
            "--structure",
            "1xn",
            "--option",
            "n=4",
            "--sparsity",
            "0.5",
            "--evolve",
            "subp",
            "--evolve-option",
            "alpha=x",
        ),
        "alpha is 'x'; it needs a number",
    ),
    ((*TRAIN, "--width", "0"), "width is 0.0"),
    ((*TRAIN, "--width", "nan"), "width is nan"),
    ((*TRAIN, "--width", "9000"), "parameters, "),
    ((*TRAIN, "--width", "1e300"), "width is 1e+300"),
    ((*TRAIN, "--image-size", "0"), "image_size 0"),
    ((*TRAIN, "--image-size", "1000000"), "64 images of 1000000x1000000 need"),
    ((*TRAIN, "--epochs", "0"), "epochs is 0; it needs an integer in [1, 1000000]"),
    ((*TRAIN, "--epochs", BIG), "it needs an integer in [1, 1000000]"),
    ((*TRAIN, "--epochs", "1.5"), "invalid int value: '1.5'"),
    ((*TRAIN, "--batch-size", "0"), "batch_size is 0"),
    ((*TRAIN, "--batch-size", "100000"), "batch_size is 100000 and there are 64 images"),
    ((*TRAIN, "--batch-size", "33", "--accumulate", "2"), "it needs a multiple of 2"),
    ((*TRAIN, "--lr", "nan"), "lr is nan; it needs a number in [0, inf)"),
    ((*TRAIN, "--lr", "inf"), "lr is inf; it needs a number in [0, inf)"),
    ((*TRAIN, "--weight-decay", "inf"), "weight_decay is inf"),
    ((*TRAIN, "--warmup", "5"), "warmup is 5.0; it needs a number in [0, 1]"),
    ((*TRAIN, "--milestones", "nan"), "milestones is (nan,)"),
    ((*TRAIN, "--save-minutes", "nan"), "save_minutes is nan"),
    ((*TRAIN, "--seed", "-1"), "-1 is not a seed, an integer from 0 on"),
    ((*TRAIN, "--seed", str(2**64)), "is not a seed"),
    ((*TRAIN, "--nesterov", "--optimizer", "adamw"), "nesterov needs optimizer 'sgd'"),
    # images
    (
        (*TRAIN, "--data", "foo"),
        "name is 'foo'; it needs shapes, digits, cifar10, cifar100, or the path of a folder with train/",
    ),
    ((*TRAIN, "--data", ""), "'' names no file or folder"),
    ((*TRAIN, "--data", "file"), "name is 'file' (a file); it needs"),
    ((*TRAIN, "--data", "nothing"), "nothing has no folder train; it has nothing; nothing needs train/CLASS"),
    ((*TRAIN, "--data", "flat"), "flat has no folder train; it has 1 image (0.png); flat needs train/CLASS/*.png"),
    ((*TRAIN, "--data", "classes"), "classes has no folder train; it has 2 folders (a, b)"),
    ((*TRAIN, "--data", "onlytrain"), "onlytrain has no folder val or test; it has 1 folder (train)"),
    ((*TRAIN, "--data", "other", "--image-size", "16"), "need the same folders; ['a', 'b', 'c'] are in one only"),
    ((*TRAIN, "--data", "good", "--image-size", "16"), "good/train/a/0.png cannot be decoded"),
    ((*TRAIN, "--data", "good", "--image-size", "-1"), "image_size is -1"),
    ((*TRAIN, "--data", "cifar10", "--root", "nothing"), "cifar10 is not in "),
    ((*TRAIN, "--data", "cifar10", "--root", "cifar-10-python.tar.gz"), "is cut short, damaged or no .tar.gz"),
    ((*TRAIN, "--data", "CIFAR10", "--root", "cifar-10-batches-py"), "has no data_batch_1, "),
    ((*TRAIN, "--data", "cifar10", "--image-size", "16"), "cifar10 has images of 32x32"),
    # where to write
    ((*TRAIN, "--out", ""), "'' names no file or folder"),
    ((*TRAIN, "--out", "file"), "file: File exists"),
    ((*TRAIN, "--out", "file/x"), "file/x: Not a directory"),
    ((*TRAIN, "--out", "a" * 300), "a: File name too long"),
    # studies
    ((*STUDY, "--structures", "foo"), "no structure 'foo'"),
    ((*STUDY, "--structures", "elementwise", "--methods", "rigl"), "none of the structures goes together"),
    ((*STUDY, "--structures", "dense", "2:4", "--sparsities", "0.9"), "none of this can be trained: 2:4 90%: "),
    ((*STUDY, "--sparsities", "1"), "between 0 and 1"),
    ((*STUDY, "--sparsities", "0.5", "0.5"), "it needs one or more, each once"),
    ((*STUDY, "--seeds", "-1"), "-1 is not a seed"),
    ((*STUDY, "--batch-size", "0"), "0 is not a positive number"),
    ((*STUDY, "--every", "0"), "every is 0"),
    ((*STUDY, "--device", "foo"), "device is 'foo'"),
    ((*STUDY, "--data", "nothing"), "nothing has no folder train"),
    ((*STUDY, "--out", "file"), "file holds something that is no study"),
    ((*STUDY, "--out", "good"), "good holds something that is no study"),
    ((*STUDY, "--weights", "ok.pt"), "--weights is of --preset regularity"),
    ((*STUDY, "--max-time", "0.5"), "--max-time is of --preset regularity"),
    ((*GRAINS, "--max-time", "0"), "0 is not in (0, inf)"),
    ((*GRAINS, "--max-storage", "nan"), "nan is not in (0, inf)"),
    ((*GRAINS, "--methods", "rigl"), "--methods is about masks that change"),
    ((*GRAINS, "--structures", "filter"), "structures has no 'dense'"),
    ((*GRAINS, "--structures", "dense", "foo"), "no structure 'foo'"),
    ((*GRAINS, "--retrain", "0"), "epochs is 0"),
    ((*GRAINS, "--timed-width", "nan"), "width is nan"),
    ((*GRAINS, "--weights", "missing.pt"), "missing.pt: No such file"),
    ((*GRAINS, "--weights", "ok.pt"), "weights are those of another network"),
    ((*GRAINS, "--model", "resnet8", "vgg19"), "takes one --model and one --data"),
    # files of weights
    (("regroup",), "the following arguments are required: FILE"),
    (("regroup", ""), "'' names no file or folder"),
    (("regroup", "missing.pt"), "missing.pt: No such file"),
    (("regroup", "folder.pt"), "folder.pt is a folder"),
    (("regroup", "empty.pt"), "empty.pt is damaged or no torch.save file"),
    (("regroup", "file"), "file ends in ''"),
    (("regroup", "ok.pt", "--groups", BIG), "is not a positive number"),
    (("regroup", "ok.pt", "--groups", "²"), "² is not a positive number"),
    (("regroup", "ok.pt", "--seed", str(2**64)), "is not a seed"),
    (("regroup", "ok.pt", "--save", "file/x.npz"), "file/x.npz: its folder does not exist"),
    (("regroup", "ok.pt", "--save", "/proc/x.npz"), "/proc/x.npz: its folder cannot be written to"),
    (("regroup", "ok.pt", "--picture", ""), "'' names no file or folder"),
    (("info", "resnet8", "--width", "1e300"), "width is 1e+300"),
    (("info", "resnet8", "--classes", str(10**18)), "classes 1000000000000000000"),
    (("info", "ok.pt", "--like", "missing"), "missing: No such file"),
    (("info", "text.pt"), "text.pt is damaged or no torch.save file"),
]


@pytest.mark.parametrize(("words", "needed"), MISTAKES, ids=lambda v: " ".join(v)[-60:] if isinstance(v, tuple) else "")
def test_a_mistake_is_one_sentence(capsys, place, words, needed):
    status, _, err = said(capsys, words)
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("python -m hrbp")
    assert needed in err
    assert "Traceback" not in err
    assert not (place / "out").exists()


def test_names_in_any_case(capsys, tmp_path):
    out = tmp_path / "out"
    words = (*TRAIN[:-1], str(out), "--structure", "hrbp++", "--data", "shapes", "--distribution", "erk")
    given = ("ResNet8", "HRBP++", "Shapes", "ERK")
    odd = [{name.lower(): name for name in given}.get(word, word) for word in words]
    assert said(capsys, (*odd, "--optimizer", "SGD", "--device", "CPU"))[0] == 0
    assert said(capsys, (*words, "--resume"))[0] == 0  # the same training
    _, lower, _ = said(capsys, ("info", "resnet20"))
    assert said(capsys, ("info", "ResNet20")) == (0, lower, "")
    assert said(capsys, ("regroup", "ok.pt", "--structure", "HRBP", "--method", "Paper"))[0] == 0


def test_what_does_not_fit_into_memory_is_told(capsys, monkeypatch):
    def greedy(*_):
        torch.empty(2**60)

    monkeypatch.setattr("hrbp.cli.train._network", greedy)
    status, _, err = said(capsys, TRAIN)
    assert (status, err.count("\n")) == (2, 1)
    assert "out of memory: " in err
    assert "lower --batch-size" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_under_the_output_is_told(place):
    command = [sys.executable, "-m", "hrbp", "info", str(place / "ok.pt")]
    result = processes.run(
        ["sh", "-c", f"{shlex.join(command)} > /dev/full"], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (result.returncode, result.stderr) == (2, "python -m hrbp: standard output: No space left on device\n")
