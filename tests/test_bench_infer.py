"""bench/infer.py: a whole network in every way, each checked before it is timed."""

from __future__ import annotations

import json

import pytest
import torch

import hrbp
from bench import infer
from bench.shared.clocks import Lap
from bench.shared.rows import ABSENT, ERROR, FAIL, OK, Times

QUICK = ["--network", "resnet8", "--image-size", "16", "--quick", "--device", "cpu"]


def run(tmp_path, *options: str) -> tuple[int, list[dict]]:
    file = tmp_path / "infer.json"
    status = infer.main([*QUICK, *options, "--json", str(file)])
    content = json.loads(file.read_text())
    assert content["kind"] == "infer"
    return status, content["rows"]


def test_every_way_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "onnx_absent", lambda device: "not here")
    threads = torch.get_num_threads()
    status, rows = run(tmp_path, "--no-compile", "--structure", "block", "--blocksize", "8x8", "--threads", "2")
    assert status == 0
    assert torch.get_num_threads() == threads
    ways = [(row["weights"], row["mode"], row["variant"]) for row in rows]
    assert ways == [
        (weights, mode, layout)
        for weights, modes in (("dense", ("eager", "folded")), ("sparse", ("eager", "fused")))
        for mode in modes
        for layout in ("contiguous", "channels_last")
    ] + [("dense", "onnx", "contiguous")]
    *timed, onnx = rows
    assert (onnx["status"], onnx["reason"], onnx["times"]) == (ABSENT, "not here", None)
    best = min(row["times"]["p50"] for row in timed if row["weights"] == "dense")
    for row in timed:
        assert row["status"] == OK
        assert row["images_per_second"] == pytest.approx(1000 / row["times"]["p50"])
        assert row["speedup"] == pytest.approx(best / row["times"]["p50"])
    printed = capsys.readouterr().out
    assert "90% block 8x8 (uniform)" in printed
    assert "fused: 9 BatchNorms, 6 ReLUs, 3 sums" in printed
    assert "n/a: not here" in printed


@pytest.mark.slow
def test_compiled_ways_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "onnx_absent", lambda device: "not here")
    status, rows = run(tmp_path)
    assert status == 0
    assert sum(row["mode"] == "compiled" and row["status"] == OK for row in rows) == 4


def test_a_fused_network_that_computes_something_else_gets_no_time(tmp_path, monkeypatch, capsys):
    right = hrbp.fuse

    def wrong(model):
        fused = right(model)
        fused.fc.weight.mul_(1.01)
        return fused

    monkeypatch.setattr(infer.hrbp, "fuse", wrong)
    monkeypatch.setattr(infer, "onnx_absent", lambda device: "not here")
    status, rows = run(tmp_path, "--no-compile")
    assert status == 1
    for row in rows[:-1]:
        right_one = row["mode"] == "eager"
        assert row["status"] == (OK if right_one else FAIL)
        assert (row["times"] is not None) == right_one
    assert "the output is off by" in capsys.readouterr().out


def test_a_way_that_cannot_run_ends_nothing(tmp_path, monkeypatch):
    def raising(model, x):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(infer, "onnx_absent", lambda device: None)
    monkeypatch.setattr(infer, "onnx_call", raising)
    status, rows = run(tmp_path, "--no-compile")
    assert status == 1
    assert (rows[-1]["status"], rows[-1]["reason"]) == (ERROR, "RuntimeError: no such operator")
    assert all(row["status"] == OK for row in rows[:-1])


def test_ratios_are_to_the_fastest_dense_way_of_pytorch():
    def row(weights, mode, ms):
        return infer.InferRow(network="net", weights=weights, mode=mode, times=Times.of([Lap(1e-3 * ms)]))

    rows = [row("dense", "eager", 8), row("dense", "folded", 4), row("dense", "onnx", 1), row("sparse", "fused", 2)]
    infer.compare(rows, batch=3)
    assert [r.speedup for r in rows] == pytest.approx([0.5, 1, 4, 2])
    assert rows[3].images_per_second == pytest.approx(1500)


def test_what_onnx_needs_is_said(monkeypatch):
    monkeypatch.setattr(infer.importlib.util, "find_spec", lambda name: None)
    said = infer.onnx_absent(torch.device("cpu"))
    assert said == "no onnxruntime and onnx: pip install 'blocksparse-conv[bench]'"
    assert infer.onnx_absent(torch.device("cuda")) == "timed on a CPU alone"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sparsity", "1"], "--sparsity: 1 is not between 0 and 1"),
        (["--batch", "0"], "--batch: 0 is not a positive number"),
        (["--threads", "0"], "--threads: 0 is not a positive number"),
        (["--blocksize", "8x8"], "--blocksize 8x8: of --structure block alone, not of hrbp"),
        (["--structure", "block", "--blocksize", "group"], "--blocksize group: it needs BKxBC"),
        (["--structure", "block", "--blocksize", "8"], "it needs BKxBC"),
        (["--network", "lenet"], "invalid choice"),
    ],
)
def test_wrong_options_end_a_run(options, says, capsys):
    with pytest.raises(SystemExit) as stop:
        infer.main([*QUICK, *options])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
