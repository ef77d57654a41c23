"""The summary claims what is known: operations that are run, and times that were measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hrbp
from hrbp.layers.view import sparse_layers


class Net(nn.Module):
    """A layer that is called twice, and one that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.named, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)).relu()).mean((2, 3))
        return self.head(input=self.named(x))


def rows_of(summary) -> dict:
    return {row.name: row for row in summary.rows}


def cells_of(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.split()[:1] == [name]).split()


X = (2, 3, 12, 12)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"structure": "unstructured", "backend": "cpu"}, "cpu"),
        ({"structure": "2:4", "backend": "torch"}, "torch"),
        ({"structure": "unstructured", "method": "sr-ste"}, "masked"),
        ({"structure": "1xn", "n": 4, "backend": "cpu"}, "cpu"),
        ({"structure": "1xn", "n": 4, "backend": "torch"}, "torch"),
        ({"structure": "1xn", "n": 4, "method": "subp", "backend": "cpu"}, "cpu"),
    ],
)
def test_what_is_run_is_told_from_what_is_kept(options, backend):
    net = hrbp.sparsify(Net(), 0.5, include=["twice", "named"], distribution="uniform", **options)
    result = hrbp.summary(net, X)
    rows, text = rows_of(result), str(result)
    for name, outputs, calls in (("twice", 16 * 2 * (8 * 8 + 6 * 6), 2), ("named", 32 * 2, 1)):
        row = rows[name]
        kept = int(sparse_layers(net)[name].mask().sum())
        assert row.dense_flops == 2 * outputs * (16 * 9 if calls == 2 else 16)
        assert row.flops * (16 * 16 * 9 if calls == 2 else 32 * 16) == row.dense_flops * kept
        assert row.run_flops == (row.flops if backend == "cpu" else row.dense_flops)
        assert row.backend == backend
        share = f"{kept / (16 * 16 * 9 if calls == 2 else 32 * 16):.0%}" if backend == "cpu" else "100%"
        assert cells_of(text, name)[-2:] == [share, backend]
    assert cells_of(text, "stem")[-1] == "100%"
    run, dense = (sum(getattr(row, part) for row in result.rows) for part in ("run_flops", "dense_flops"))
    assert f"are run ({run / dense:.0%}); that is work, not time: measure=True times the layers" in text
    assert not any(word in text for word in ("gain", "1x ", "<=", "x fewer", "speed"))


@pytest.mark.parametrize("structure", ["unstructured", "1xn"])
def test_speed_is_measured_masks_included(structure):
    net = hrbp.sparsify(Net(), 0.5, include=["twice", "named"], structure=structure)
    state = torch.get_rng_state()
    result = hrbp.summary(net, X, measure=True)
    assert torch.equal(torch.get_rng_state(), state)
    rows, text = rows_of(result), str(result)
    assert text.splitlines()[0].endswith("speed")
    for name in ("twice", "named"):
        row = rows[name]
        assert row.seconds > 0
        assert row.dense_seconds > 0
        assert cells_of(text, name)[-1] == f"{row.dense_seconds / row.seconds:.2f}x"
    assert rows["stem"].seconds is None
    assert "x" not in cells_of(text, "stem")[-1]
    assert "measured forward + backward of the sparse layers" in text


def test_measuring_runs_no_hooks_of_the_layers():
    net = hrbp.sparsify(Net(), 0.5, include=["named"], structure="unstructured")
    calls = []
    net.named.register_forward_hook(lambda *_: calls.append(1))
    hrbp.summary(net, X, measure=True)
    assert len(calls) == 1  # of the one pass of the whole model


def test_without_an_input_nothing_is_said_of_operations():
    net = hrbp.sparsify(Net(), 0.5, structure="unstructured")
    text = str(hrbp.summary(net))
    assert "GFLOP" not in text.split("\n", 2)[2]
    assert "%" not in " ".join(cells_of(text, "twice"))
    assert "forward:" not in text


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_parameters_are_those_that_a_layer_has():
    net = nn.Sequential(nn.Linear(8, 4), nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4, bias=False))
    result = hrbp.summary(net, (1, 8))
    assert [row.parameters for row in result.rows] == [36, 4 + 16 + 4, 16]
    assert result.parameters == sum(p.numel() for p in net.parameters()) == sum(r.parameters for r in result.rows)
