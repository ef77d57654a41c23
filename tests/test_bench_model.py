"""bench/model.py and the predictions in bench/run.py: marked as predictions wherever they are shown or saved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import model, run
from bench.layers import measure, prediction, report
from bench.layers.networks import parse_layer
from bench.layers.patterns import Blocksize, Structure
from bench.layers.prediction import Question, predict, totals
from bench.layers.rows import KINDS, TOTAL, LayerRow
from bench.pages.devices import read
from bench.shared.clocks import Lap
from bench.shared.rows import REFUSED, Times
from blocksparse import plan
from blocksparse.kernels import cupy_conv, gpu_cost, measured

ABOUT = Question("h200", 64, torch.float16, "ieee", Structure())


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    """The CUDA C++ kernels are asked about a GPU, not about the emulator."""
    monkeypatch.setattr(cupy_conv, "runtime", cupy_conv.Cuda())


def rows_of(spec, block=(32, 32), sparsity=0.9, backend=None, about=ABOUT):
    return [row for layer in parse_layer(spec) for row in predict(layer, Blocksize(*block), sparsity, backend, about)]


def test_the_table_and_the_file_say_that_they_are_predictions(tmp_path, capsys):
    file = tmp_path / "model.json"
    layers = ["resnet50.layer1.1x1out", "resnet50.layer3.3x3"]
    arguments = ["--layer", *layers, "--gpu", "h100", "--density", "0.1", "0.3", "--backend", "auto", "torch"]
    assert model.main([*arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTED for h100, not measured: fp16, batch 64, channels_last; Triton 3.")
    assert "predicted us" in printed
    content = json.loads(file.read_text())
    assert content["kind"] == "model"
    assert len(content["rows"]) == 2 * 2 * 2 * 2 * 4
    for row in content["rows"]:
        assert (row["predicted"], row["gpu"], row["times"]) == (True, "h100", None)
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
    assert all(total["predicted"] for total in content["totals"])
    with pytest.raises(ValueError, match="a file of kind 'model'"):  # it is nobody's measurement
        read([file])


def test_a_row_is_what_the_plan_says():
    *products, total = rows_of("resnet50.layer3.3x3")
    (layer,) = parse_layer("resnet50.layer3.3x3")
    g = plan.ConvGeometry.of(layer.x_shape(64), layer.shape, 1, 1)
    found = plan.plan_on("h200", g, (products[0].nnzb, 32, 32), torch.float16)
    for kind, row in zip(KINDS, products, strict=True):
        product = found.products[kind]
        assert (row.kind, row.backend, row.tile) == (kind, product.backend, str(product.tile))
        assert (row.seconds, row.bound) == (product.estimate.seconds, product.estimate.bound)
        assert row.roofline_seconds < row.seconds
    assert total.kind == TOTAL
    assert total.seconds == pytest.approx(sum(row.seconds for row in products))


def test_rooflines_of_resnet50():
    """Bytes at a copy's speed: the four 3x3 layers of stride 1 on an H200, in microseconds."""
    for stage, us in ((1, 11.9), (2, 6.0), (3, 3.0), (4, 1.6)):
        row = rows_of(f"resnet50.layer{stage}.3x3")[0]
        assert 1e6 * row.roofline_seconds == pytest.approx(us, rel=0.03)
        assert 1e6 * row.dense_seconds == pytest.approx(28.9, rel=0.02)


def test_totals_count_layers_as_often_as_they_occur():
    rows = rows_of("resnet32", (8, 8))
    whole = {t.layers: t for t in totals(rows)}
    of_all = [row for row in rows if row.kind == TOTAL]
    assert whole["all"].seconds == pytest.approx(sum(row.count * row.seconds for row in of_all))
    plain = [row for row in of_all if row.shape[2:] == (3, 3) and row.stride == 1]
    assert 0 < len(plain) < len(of_all)
    assert whole["3x3 of stride 1"].dense_seconds == pytest.approx(sum(row.count * row.dense_seconds for row in plain))
    assert whole["all"].least == min(row.speedup for row in rows if row.kind != TOTAL)
    assert len(prediction.total_lines(list(whole.values()))) == 3


def test_what_does_not_fit_is_refused_in_its_line():
    (row,) = rows_of("64,64,3,1,8", (48, 8))
    assert row.status == REFUSED
    assert "refused: " in prediction.layer_lines([row])[-1]
    (row,) = rows_of("64,64,3,1,8", (8, 1), backend="triton")
    assert "bc = 1" in row.reason
    assert totals([row]) == []
    assert model.main(["--layer", "64,64,3,1,8", "--gpu", "h200", "--blocksize", "48x8"]) == 1


def test_batch_norms_behind_layers(tmp_path, capsys):
    """What each pass moves: 8 tensors instead of 13, 11 instead of 16 with a sum; 8 alike where nothing follows."""
    file = tmp_path / "model.json"
    layers = ["resnet50.layer1.3x3", "resnet50.layer1.1x1out", "resnet50.layer2.0.skip"]
    assert model.main(["--layer", *layers, "--gpu", "h100", "--norms", "--json", str(file)]) == 0
    assert "predicted, BatchNorm in training behind each layer, forward and backward:" in capsys.readouterr().out
    rows = json.loads(file.read_text())["norms"]
    assert [row["what"] for row in rows] == ["BatchNorm+ReLU", "BatchNorm+sum+ReLU", "BatchNorm"]
    tensors = [[n / (2 * torch.Size(r["shape"]).numel()) for n in (r["nbytes"], r["pytorch_nbytes"])] for r in rows]
    assert tensors == [[8, 13], [11, 16], [8, 8]]
    for row in rows:
        assert row["predicted"]
        assert row["seconds"] >= row["nbytes"] / 3.35e12
        assert row["seconds"] < 1.2 * row["pytorch_seconds"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layer", "resnet51", "--gpu", "h200"], "layer 'resnet51': it needs a network"),
        (["--layer", "resnet50"], "required: --gpu"),
        (["--layer", "resnet50", "--gpu", "h200", "--density", "0"], "0 is not in (0, 1]"),
    ],
)
def test_options_that_are_wrong_say_what_is_right(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        model.main(arguments)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------- beside measurements


def measured_row(kind="fprop", ms=2.0, **more):
    row = LayerRow(
        net="resnet50", layer="resnet50.layer3.3x3", geometry="", count=6, shape=(256, 256, 3, 3),
        x_shape=(64, 256, 14, 14), stride=1, padding=(1, 1), structure="random blocks", blocksize_asked="32x32",
        sparsity_asked=0.9, backend_asked="auto", kind=kind, variant="channels_last", blocksize=(32, 32), nnzb=58,
        density=0.1, backend="triton", times=Times.of([Lap(1e-3 * ms, None)] * 3),
    )  # fmt: skip
    return replace(row, **more)


def test_the_error_of_a_prediction():
    row = measured_row(predicted_ms=1.5)
    assert row.prediction_error == pytest.approx(-0.25)
    assert row.as_json()["percent_prediction_error"] == pytest.approx(-25)
    assert measured_row().prediction_error is None
    (line,) = report._row_lines(row, on_gpu=True)
    assert line.split()[-2:] == ["1.500", "-25"]
    assert report.table_head(on_gpu=True).endswith("pred ms   err%")
    assert "err%" not in report.table_head(on_gpu=False)


def test_a_plan_of_a_gpu_has_predictions_and_one_of_a_cpu_has_none():
    g = plan.ConvGeometry.of((64, 256, 14, 14), (256, 256, 3, 3), 1, 1)
    found = plan.plan_on("h200", g, (58, 32, 32), torch.float16)
    assert measure.predicted_ms(found, KINDS) == pytest.approx(
        sum(1e3 * product.estimate.seconds for product in found.products.values())
    )
    assert measure.bound_of(found, "fprop") == found.products["fprop"].estimate.bound
    timed = replace(found.products["dgrad"], estimate=gpu_cost.Estimate(1e-6, "", True))
    found.products["dgrad"] = timed
    assert measure.predicted_ms(found, KINDS) is None
    assert measure.predicted_ms(found, ("fprop",)) is not None
    pattern = plan.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
    here = plan.explain(torch.empty(1, 64, 8, 8), torch.empty(pattern.nnzb, 8, 8), pattern, 1, 1)
    assert measure.predicted_ms(here, KINDS) is None
    assert measure.bound_of(here, "fprop") is None


def test_kept_times_override_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "HERE", tmp_path / "measured")
    measured._table.cache_clear()
    rows = [measured_row(), measured_row("total"), measured_row("dgrad", status=REFUSED, times=None),
            measured_row("wgrad", backend="torch", ms=0.001)]  # fmt: skip
    path = run.keep_products(rows, torch.float16, "ieee", "h200")
    try:
        assert [row["kind"] for row in json.loads(path.read_text())["rows"]] == ["fprop", "wgrad"]
        g = plan.ConvGeometry.of((64, 256, 14, 14), (256, 256, 3, 3), 1, 1)
        found = plan.plan_on("h200", g, (58, 32, 32), torch.float16).products
        assert {kind: product.backend for kind, product in found.items()} == {
            "fprop": "cupy", "dgrad": "triton", "wgrad": "torch"
        }  # fmt: skip
        assert "measured 1 us" in found["wgrad"].why
        assert "measured 2e+03 us by triton" in found["fprop"].why
    finally:
        measured._table.cache_clear()


def test_a_cpu_keeps_nothing(capsys):
    with pytest.raises(SystemExit):
        run.main(["--layer", "16,16,3,1,6", "--device", "cpu", "--keep"])
    assert "--keep: it keeps times of GPU kernels" in capsys.readouterr().err
