"""python -m hrbp regroup | info: what is printed, written and drawn is what the library says; mistakes are one line."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hrbp
import processes
from blocksparse import BSRConv2d, BSRPattern
from hrbp.__main__ import main
from hrbp.formats.weights import read_weights
from hrbp.models import build, parameter_count
from hrbp.reports.mask_report import report_mask
from hrbp.structures.registry import choose
from hrbp.structures.regrouping import regroup

ROOT = Path(__file__).parent.parent


@pytest.fixture
def dense(tmp_path):
    """A small network's weights: a stem, two convolutions, a 1x1, a classifier."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 64, 1),
        nn.Linear(64, 10),
    )  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


def run(capsys, *args):
    """(exit status, stdout, stderr)"""
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as end:  # argparse
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_regroup_prints_what_the_library_finds(dense, capsys):
    status, out, err = run(capsys, "regroup", dense, "--sparsity", "0.8", "--distribution", "uniform", "--json")
    assert status == 0
    found = json.loads(out)
    assert list(found["layers"]) == ["1", "3", "4"]
    assert found["left_dense"] == {"0": "3 input channels", "5": "last layer"}
    assert [line.split()[:2] for line in err.replace(",", "").splitlines()] == [
        ["[1/3]", "1"], ["[2/3]", "3"], ["[3/3]", "4"],
    ]  # fmt: skip
    weights, kept = read_weights(dense), 0.0
    for name, row in found["layers"].items():
        score = weights[f"{name}.weight"].abs()
        taps = 4 if score.shape[2] == 3 else 1
        assert row["taps"] == taps
        assert row["rows"] * row["groups"] == row["shape"][0]
        assert row["density"] == row["channels"] * taps / math.prod(row["shape"][1:])
        # Found again from what the row says: the same channels, taps and rows.
        wish = row["channels"] / row["shape"][1] * 4 / 9 if taps == 4 else row["channels"] / row["shape"][1]
        for method, key in (("assign", "retained"), ("paper", "retained_by_paper")):
            again = regroup(score, 1 - wish, tap_density=4 / 9, method=method)
            assert again.retained(score) == pytest.approx(row[key])
        ranked = score.flatten().sort(descending=True).values
        best = float(ranked[: round(row["density"] * score.numel())].sum())
        assert row["of_unstructured"] == pytest.approx(row["retained"] * float(score.sum()) / best, rel=1e-5)
        assert row["retained_by_paper"] <= row["retained"]
        kept += row["density"] * score.numel()
    cells = sum(math.prod(row["shape"]) for row in found["layers"].values())
    assert found["total"]["density"] == pytest.approx(kept / cells) == pytest.approx(0.2, abs=0.01)
    sums = {name: float(weights[f"{name}.weight"].abs().sum()) for name in found["layers"]}
    for key in ("retained", "retained_by_paper"):
        total = sum(sums[name] * row[key] for name, row in found["layers"].items())
        assert found["total"][key] == pytest.approx(total / sum(sums.values()))


def test_regroup_table(dense, capsys):
    _, out, _ = run(capsys, "regroup", dense, "--sparsity", "0.8", "--json")
    found = json.loads(out)
    status, out, _ = run(capsys, "regroup", dense, "--sparsity", "0.8")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["layer", "K", "x", "C"]
    for line, (name, row) in zip(lines[1:4], found["layers"].items(), strict=True):
        cells = line.split()
        assert cells[:2] == [name, "x".join(map(str, row["shape"]))]
        assert cells[2:8] == [str(row["groups"]), "x", str(row["rows"]), str(row["channels"]), str(row["taps"]),
                              f"{row['coverage']:.2f}"]  # fmt: skip
        assert row["coverage"] == row["groups"] * row["channels"] / row["shape"][1]
        assert cells[8] == f"{100 * row['density']:.2f}"
        assert cells[9:12] == [f"{row[key]:.4f}" for key in ("retained_by_paper", "retained", "of_unstructured")]
    assert lines[4].split()[0] == "all"
    assert lines[-1] == "left dense: 0 (3 input channels); 5 (last layer)"


def test_options_reach_the_search(dense, capsys):
    options = ["--structure", "hrbp", "--groups", "2", "--granule", "8", "--row-granule", "stay", "--distribution",
               "uniform", "--layers", "^[35]$", "--sparsity", "0.75", "--min-rows", "4"]  # fmt: skip
    _, out, _ = run(capsys, "regroup", dense, *options, "--json")
    found = json.loads(out)
    assert list(found["layers"]) == ["3", "5"]  # named ones, the classifier too
    row, score = found["layers"]["3"], read_weights(dense)["3.weight"].abs()
    again = regroup(score, 0.75, groups=2, granule=8, row_granule=16)
    assert (row["groups"], row["rows"], row["channels"], row["taps"]) == (2, 16, 8, 9)
    assert row["retained"] == pytest.approx(again.retained(score))
    _, out, _ = run(capsys, "regroup", dense, "--method", "paper", "--layers", "3", "--tap-density", "2/9", "--json")
    row = json.loads(out)["layers"]["3"]
    assert (row["taps"], row["retained"]) == (2, row["retained_by_paper"])


def test_layers_that_a_granule_does_not_divide_stay_dense(tmp_path, capsys):
    torch.save({"a.weight": torch.rand(16, 12, 3, 3), "b.weight": torch.rand(16, 16, 3, 3)}, tmp_path / "w.pt")
    _, out, _ = run(capsys, "regroup", tmp_path / "w.pt", "--granule", "8", "--sparsity", "0.7", "--json")
    found = json.loads(out)
    assert list(found["layers"]) == ["b"]
    assert found["left_dense"] == {"a": "granule = 8 does not divide 12"}


def test_balanced_channels(dense, tmp_path, capsys):
    for flag in ([], ["--balanced"]):
        run(capsys, "regroup", dense, "--layers", "3", "--sparsity", "0.8", "--save", tmp_path / "g.npz", *flag)
        channels = np.load(tmp_path / "g.npz")["3.channels"]
        counts = np.bincount(channels.flatten(), minlength=32)
        assert (counts.max() - counts.min() <= 1) == bool(flag)


def test_saved_groups_are_masks_that_info_knows(dense, tmp_path, capsys):
    out_file = tmp_path / "groups.npz"
    _, out, _ = run(capsys, "regroup", dense, "--sparsity", "0.8", "--save", out_file, "--json")
    rows = json.loads(out)["layers"]
    saved = np.load(out_file)
    for name, row in rows.items():
        mask = saved[f"{name}.mask"]
        assert mask.mean() == pytest.approx(row["density"])
        order, channels, taps = (saved[f"{name}.{part}"] for part in ("row_order", "channels", "taps"))
        again = np.zeros((row["shape"][0], row["shape"][1], row["shape"][2] ** 2), dtype=bool)
        for g, rows_of in enumerate(order.reshape(row["groups"], -1)):
            again[np.ix_(rows_of, channels[g], taps[g])] = True
        assert (again.reshape(mask.shape) == mask).all()
    status, out, _ = run(capsys, "info", out_file)
    assert status == 0
    for line, (name, row) in zip(out.splitlines()[1:], rows.items(), strict=False):
        assert line.split()[0] == name
        assert f"of {row['shape'][1]} channels" in line
        assert line.split()[-1] == "100"


def test_info_of_masks(tmp_path, capsys):
    score = torch.rand(32, 16, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    made = {name: choose(score, 0.75, name) for name in ("unstructured", "elementwise", "hrbp")}
    torch.save({f"{name}.weight": (score * c.mask).half() for name, c in made.items()}, tmp_path / "w.pt")
    status, out, err = run(capsys, "info", tmp_path / "w.pt")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    for name, words in (("unstructured", "single weights"), ("elementwise", "element-wise groups of 8"),
                        ("hrbp", "4 groups of 8: 4 of 16 channels, 9 of 9 taps")):  # fmt: skip
        report = report_mask(made[name].mask, dtype=torch.float16)
        assert f"  {words}  " in lines[name]
        cells = lines[name].split()
        assert cells[-1] == f"{100 * report.dgrad_fill:.0f}"
        size = report.storage.values + report.storage.memory_index
        assert cells[-6] == f"{size / 1e3:.1f}"
    assert lines["all"].split()[1] == "25.00"


def test_zeros_by_chance_are_no_mask(tmp_path, capsys):
    """One weight of a dense layer that training happened to leave at zero; whole filters that are zero are a mask."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(32, 16, 3, 3) for name in ("dense", "one", "many", "pair", "filter", "half")}
    tensors["fc"] = torch.randn(4, 8)
    tensors["one"][3, 4, 1, 1] = tensors["fc"][2, 2] = 0
    tensors["pair"][8, 4:6, 0, 0] = 0  # what could be a block of 1x2
    tensors["many"].flatten()[torch.randperm(4608)[:46]] = 0
    tensors["filter"][5] = 0
    tensors["half"].flatten()[torch.randperm(4608)[:500]] = 0
    torch.save({f"{name}.weight": t for name, t in tensors.items()}, tmp_path / "w.pt")
    status, out, _ = run(capsys, "info", tmp_path / "w.pt")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for name in ("dense", "one", "many", "pair", "fc"):
        assert lines[name].split()[2:5] == ["100.00", "dense", "100.0"], name
    assert "zeros in dense weights, counted as chance: one (1), many (46), pair (2), fc (1)" in out
    assert lines["filter"].split()[3] == "filters"
    assert "single weights" in lines["half"]
    assert float(lines["half"].split()[5]) == pytest.approx(133.7, abs=0.5)
    assert "over 100 model%: half: the index takes more than the zeros save" in out
    model = nn.Sequential(nn.Conv2d(16, 32, 3))
    model[0].weight.data.copy_(tensors["one"])
    assert hrbp.reports.report_model(model)["0"].structure == "dense"
    mask = tensors["one"] != 0  # a mask is what somebody chose
    assert report_mask(mask).structure == "single weights"


def test_info_of_a_model_of_single_weights(tmp_path, capsys):
    """What is on disk: half-precision weights that are kept, and a bit a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32, 10)).half()
    hrbp.save(hrbp.sparsify(model, 0.75, structure="kernel"), tmp_path / "m.pt")
    status, out, _ = run(capsys, "info", tmp_path / "m.pt")
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("1 "))
    state = torch.load(tmp_path / "m.pt", weights_only=True)["state_dict"]
    saved = sum(state[key].numel() * state[key].itemsize for key in ("1.weight", "1.mask"))
    assert saved == 2 * 1152 + 4608 / 8
    assert f"{saved / 1e3:.1f}" in line.split()
    assert f"{(2 * 1152 + 4 * model[1].index.numel()) / 1e3:.1f}" in line.split()


def test_info_of_a_sparse_checkpoint(tmp_path, capsys):
    torch.manual_seed(0)
    pattern = choose(torch.rand(32, 16, 3, 3), 0.8, "hrbp++").pattern()
    sparse = nn.Sequential(nn.Conv2d(3, 16, 3), BSRConv2d(pattern), nn.Linear(32, 10))
    densed = nn.Sequential(sparse[0], sparse[1].to_dense(), sparse[2])
    torch.save(sparse.state_dict(), tmp_path / "sparse.pt")
    torch.save({"state_dict": densed.state_dict()}, tmp_path / "dense.pt")
    status, full, _ = run(capsys, "info", tmp_path / "sparse.pt")
    assert status == 0
    rows = [line.split()[0] for line in full.splitlines()[1:]]
    assert rows == ["0", "1", "2", "all"]
    _, by_zeros, _ = run(capsys, "info", tmp_path / "dense.pt")
    assert full == by_zeros  # the same masks, whichever way they are stored
    for like in (tmp_path / "dense.pt", "resnet20"):  # says nothing else, or nothing of such a layer
        assert run(capsys, "info", tmp_path / "sparse.pt", "--like", like) == (0, full, "")
    torch.save({"1.weight": torch.ones(32, 8, 1, 1)}, tmp_path / "other.pt")
    status, _, err = run(capsys, "info", tmp_path / "sparse.pt", "--like", tmp_path / "other.pt")
    assert status == 2
    assert "1: the saved layer has a weight of shape (32, 16, 3, 3); (32, 8, 1, 1) was asked for" in err


def test_info_of_a_sparse_checkpoint_of_an_older_version(tmp_path, capsys):
    torch.manual_seed(0)
    pattern = choose(torch.rand(32, 16, 3, 3), 0.8, "hrbp++").pattern()
    sparse = nn.Sequential(nn.Conv2d(3, 16, 3), BSRConv2d(pattern), nn.Linear(32, 10))
    state = {key: t for key, t in sparse.state_dict().items() if not key.endswith("weight_shape")}
    densed = nn.Sequential(sparse[0], sparse[1].to_dense(), sparse[2])
    torch.save(sparse.state_dict(), tmp_path / "new.pt")
    torch.save(state, tmp_path / "sparse.pt")
    torch.save({"state_dict": densed.state_dict()}, tmp_path / "dense.pt")
    status, alone, _ = run(capsys, "info", tmp_path / "sparse.pt")
    assert status == 0
    line = next(line for line in alone.splitlines() if line.startswith("1 "))
    size = sum(t.numel() * t.itemsize for k, t in state.items() if k.startswith("1.") and "bias" not in k)
    assert line.split()[1:] == ["32", str(pattern.nnzb), f"{pattern.blocksize[0]}x1", f"{size / 1e3:.1f}"]
    assert "--like" in alone
    status, full, _ = run(capsys, "info", tmp_path / "sparse.pt", "--like", tmp_path / "dense.pt")
    assert (status, full) == run(capsys, "info", tmp_path / "new.pt")[:2]
    status, _, err = run(capsys, "info", tmp_path / "sparse.pt", "--like", "resnet20")
    assert status == 0  # a network without such a layer says nothing of it
    torch.save({"1.weight": torch.ones(32, 8, 1, 1)}, tmp_path / "other.pt")
    status, _, err = run(capsys, "info", tmp_path / "sparse.pt", "--like", tmp_path / "other.pt")
    assert status == 2
    assert "1: the saved index does not fit a layer (32, 8, 1, 1)" in err


def test_info_of_a_sparse_network_by_name(tmp_path, capsys):
    model = build("resnet8", classes=10)
    conv = model.layer2[0].conv2
    shape = tuple(conv.weight.shape)
    pattern = BSRPattern.random(shape, (8, 8), 0.25)
    model.layer2[0].conv2 = BSRConv2d.from_dense(conv, pattern)
    torch.save(model.state_dict(), tmp_path / "sparse.pt")
    status, out, _ = run(capsys, "info", tmp_path / "sparse.pt", "--like", "resnet8")
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("layer2.0.conv2 "))
    assert "blocks 8x8" in line
    assert line.split()[2] == "25.00"


def test_info_of_a_network(capsys):
    status, out, _ = run(capsys, "info", "resnet20", "--width", "0.5", "--classes", "7")
    assert status == 0
    model = build("resnet20", classes=7, width=0.5)
    lines = [line.split() for line in out.splitlines()]
    assert lines[-1] == ["all", f"{parameter_count(model):,}"]
    assert ["fc", "Linear", "7x32", f"{7 * 33}"] in lines
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert [name, "Conv2d", "x".join(map(str, module.weight.shape)), f"{module.weight.numel():,}"] in lines


# ---------------------------------------------------------------- pictures


def test_picture(dense, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    for name in ("mask.png", "mask.svg"):
        status, _, err = run(capsys, "regroup", dense, "--layers", "3|4", "--picture", tmp_path / name)
        assert status == 0
        assert f"wrote {tmp_path / name}" in err
    pixels = image.imread(tmp_path / "mask.png")
    assert min(pixels.shape[:2]) > 1000
    assert (tmp_path / "mask.svg").read_text().startswith("<?xml")
    assert pixels[:, :, :3].std() > 0.05


def test_the_panels_show_every_weight_in_its_place(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from hrbp.reports import picture

    score = torch.rand(16, 8, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    g = regroup(score, 0.6, groups=4, min_rows=4, tap_density=0.5)
    shown = []
    monkeypatch.setattr(picture, "_draw", lambda axis, matrix, title: shown.append(matrix))
    found = report_mask(g.mask(), score).score
    picture.draw_grouping(tmp_path / "a.png", g, score, found)
    before, after, turned = shown
    mask, order = g.mask(), g.row_order.tolist()
    best = set(score.flatten().argsort(descending=True)[: int(mask.sum())].tolist())
    for o, c, i, j in torch.ones(16, 8, 3, 2).nonzero().tolist():
        tap, place = i * 2 + j, order.index(o)
        group = place // 4 if mask[o, c, i, j] else -1
        flat = ((o * 8 + c) * 3 + i) * 2 + j
        assert int(before[o, tap * 8 + c]) == (-2 if flat in best else -1)
        assert int(after[place, tap * 8 + c]) == group
        assert int(turned[c, (5 - tap) * 16 + place]) == group
    assert before.shape == after.shape == (16, 48)
    assert turned.shape == (8, 96)


def test_large_panels_are_averaged():
    pytest.importorskip("matplotlib")
    from hrbp.reports.picture import _averaged

    colour = np.random.default_rng(0).random((7, 10, 3)).astype(np.float32)
    small = _averaged(_averaged(colour, 0, 3), 1, 10)
    assert small.shape == (3, 10, 3)
    for i, rows in enumerate(((0, 3), (3, 6), (6, 7))):
        assert np.allclose(small[i], colour[slice(*rows)].mean(0))


# ---------------------------------------------------------------- mistakes


def mistake(capsys, words, *args):
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    return err


def test_mistakes_are_one_line_and_status_2(dense, tmp_path, capsys, monkeypatch):
    def one_line(words, *args):
        assert mistake(capsys, words, *args).count("\n") == 1

    one_line("missing.pt: No such file or directory", "regroup", tmp_path / "missing.pt")
    one_line("resnet7: No such file or directory", "info", "resnet7")
    one_line("is a folder", "info", tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    one_line("is damaged or no torch.save file", "regroup", tmp_path / "text.pt")
    torch.save({"bias": torch.ones(3)}, tmp_path / "bias.pt")
    for command in ("regroup", "info"):
        one_line("has no weights of convolutions or linear layers", command, tmp_path / "bias.pt")
    torch.save({"a": torch.full((16, 16, 3, 3), math.nan)}, tmp_path / "nan.pt")
    status, _, err = run(capsys, "regroup", tmp_path / "nan.pt")
    assert (status, "NaN" in err, "Traceback" in err) == (2, True, False)
    one_line("no such layer among 1, 3, 4", "regroup", dense, "--layer", "9", "--picture", tmp_path / "a.png")
    one_line("give --picture OUT.png too", "regroup", dense, "--layer", "3")
    one_line("no layer of", "regroup", dense, "--layers", "nothing")
    one_line("its folder does not exist", "regroup", dense, "--save", tmp_path / "no" / "a.npz")
    one_line("a folder; it needs a file name", "regroup", dense, "--save", tmp_path)
    one_line("it needs a name that ends in .png", "regroup", dense, "--picture", tmp_path / "a.txt")
    one_line("width is 0.0", "info", "resnet20", "--width", "0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    one_line("pip install 'blocksparse-conv[plot]'", "regroup", dense, "--picture", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--sparsity", "1", "1 is not in [0, 1)"),
        ("--sparsity", "nan", "nan is not in [0, 1)"),
        ("--groups", "0", "0 is not a positive number"),
        ("--granule", "x", "x is not a positive number"),
        ("--row-granule", "move", "move is not a positive number"),
        ("--tap-density", "3/2", "3/2 is not a fraction in (0, 1]"),
        ("--layers", "(", "( is no regular expression"),
        ("--structure", "2:4", "invalid choice: '2:4'"),
        ("--distribution", "global", "invalid choice: 'global'"),
    ],
)
def test_wrong_options(dense, capsys, option, value, words):
    mistake(capsys, words, "regroup", dense, option, value)


def test_help_teaches(capsys):
    for args in ((), ("regroup",), ("info",)):
        status, out, _ = run(capsys, *args, "--help")
        assert status == 0
        assert "python -m hrbp" in out
    err = mistake(capsys, "python -m hrbp regroup model.pt")  # without a command: the help, and the status of a mistake
    assert err == run(capsys, "--help")[1]


def test_as_a_program(dense):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hrbp", "regroup", str(dense), "--layers", "3"]
    result = processes.run(command, env=env)
    assert (result.returncode, result.stderr) == (0, "[1/1] 3\n")
    assert len(result.stdout.splitlines()) == 2
