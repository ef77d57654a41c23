"""A training that was saved when single weights were masked goes on with them stored, as if it had been all along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blocksparse as bs
import hrbp
from hrbp.formats.sealed import TRAINING, read
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.training.checkpoint import LAST, write_training
from hrbp.training.trainer import Trainer
from test_train import network, signalled, sparse, trainer

pytestmark = pytest.mark.usefixtures("no_figures")

CASES = [("unstructured", "rigl", "sgd"), ("vector", "gmp", "adamw"), ("kernel", "static", "adamw")]


def made(case: tuple[str, str, str], out: Path, resume: bool = False) -> Trainer:
    structure, evolve, optimizer = case
    options = {} if evolve == "static" else {"every": 2} | ({"sparsity": 0.8} if evolve == "gmp" else {})
    settings = {"evolve": evolve, "optimizer": optimizer, "lr": 0.01, "ema": 0.9, "evolve_options": options}
    return trainer(sparse(network(double=True), structure), out, resume, **settings)


def as_it_was(state: dict[str, Any], stopped: Trainer) -> None:
    """Make a checkpoint what it was: dense weights, masks, and an optimizer's state of dense weights."""
    rule = state["config"]["plan"]["structure"]
    rule["stored"] = rule["name"] == "kernel"  # though masked, too, as blocks of one weight were
    parameters = [p for group in stopped.optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(parameters):
        for name, layer in sparse_layers(stopped.model).items():
            if layer.parameter is not p:
                continue
            pattern, shape = layer.module.pattern, layer.shape[: 2 if isinstance(layer.module, bs.BSRLinear) else 4]
            for tensors, prefix in ((state["model"], ""), (state["ema"], "module.")):
                for part in ("indptr", "indices", "weight_shape"):
                    del tensors[f"{prefix}{name}.{part}"]
                values = tensors.pop(f"{prefix}{name}.values")
                tensors[f"{prefix}{name}.weight"] = pattern.to_dense(values).view(shape)
                tensors[f"{prefix}{name}.mask"] = pattern.to_mask().view(shape)
            kept = state["optimizer"]["state"][number]
            for key, t in kept.items():
                if isinstance(t, Tensor) and t.shape == p.shape:
                    kept[key] = pattern.to_dense(t).view(shape)


@pytest.mark.parametrize(
    "case", [*(pytest.param(case, marks=pytest.mark.slow) for case in CASES[:2]), CASES[2]], ids=str
)
def test_it_goes_on(case, tmp_path):
    whole = made(case, tmp_path / "whole").run()
    stopped = signalled(made(case, tmp_path / "cut"), 7)
    assert stopped.run().steps == 7
    state = read(tmp_path / "cut" / LAST, TRAINING)
    as_it_was(state, stopped)
    assert any(name.endswith(".mask") for name in state["model"])
    assert not any(name.endswith(".values") for name in (*state["model"], *state["ema"]))
    (tmp_path / "cut" / LAST).unlink()
    write_training(tmp_path / "cut", state)
    again = made(case, tmp_path / "cut", resume=True)
    assert again.step == 7
    result = again.run()
    expected = whole.model.state_dict()
    assert result.model.state_dict().keys() == expected.keys()
    for name, t in result.model.state_dict().items():
        torch.testing.assert_close(t, expected[name], rtol=1e-9, atol=1e-12)
    assert result.accuracy == whole.accuracy


@pytest.mark.parametrize("saliency", ["random", "magnitude"])
def test_groups_stay_what_they_were_by_default(saliency, tmp_path):
    """Of a training begun when 8 groups of 8 filters or more were the default, balanced where they were random."""
    were = {"groups": 8, "min_rows": 8, "balanced": saliency == "random"}

    def begin(out: Path, resume: bool = False, **options: Any) -> Trainer:
        model = hrbp.sparsify(
            network(double=True), 0.5, structure="hrbp", distribution="uniform", saliency=saliency, **options
        )
        return trainer(model, out, resume, evolve="rigl", lr=0.01, evolve_options={"every": 2})

    whole = begin(tmp_path / "whole", **were).run()
    signalled(begin(tmp_path / "cut", **were), 7).run()
    again = begin(tmp_path / "cut", resume=True)  # by today's default
    assert (again.step, record_of(again.model).structure.groups) == (7, 8)
    expected = whole.model.state_dict()
    for name, t in again.run().model.state_dict().items():
        assert torch.equal(t, expected[name]), name
    begin(tmp_path / "other", groups=4).run()
    with pytest.raises(ValueError, match=r"another training: plan\.structure\.groups is 4 there and null here"):
        begin(tmp_path / "other", resume=True)


def test_another_training_is_refused(tmp_path):
    case = CASES[0]
    signalled(made(case, tmp_path), 3).run()
    with pytest.raises(
        ValueError, match=r"another training: plan\.structure\.name is .unstructured. there and .kernel."
    ):
        made(("kernel", *case[1:]), tmp_path, resume=True)
    wider = nn.Sequential(*[nn.Identity() for _ in range(2)], network(double=True))
    with pytest.raises(ValueError, match=r"another training: .*model\.shapes"):
        trainer(
            sparse(wider, "unstructured"), tmp_path, True, evolve="rigl", lr=0.01, ema=0.9, evolve_options={"every": 2}
        )
