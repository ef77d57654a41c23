"""A training that is continued for more epochs than it was begun with."""

import json
import signal

import pytest

from hrbp.training.log import configuration
from hrbp.training.optimizer import learning_rate
from test_train import network, signalled, sparse, trainer

pytestmark = pytest.mark.usefixtures("no_figures")

EVOLVE = {"evolve": "rigl", "evolve_options": {"every": 2}}


@pytest.mark.parametrize("stops_early", [False, True])
def test_more_epochs(tmp_path, stops_early):
    made = trainer(sparse(network()), tmp_path, epochs=2, **EVOLVE)
    first = (signalled(made, 4, signal.SIGINT) if stops_early else made).run()
    assert first.steps == (4 if stops_early else 10)
    longer = trainer(sparse(network()), tmp_path, resume=True, epochs=4, **EVOLVE)
    result = longer.run()
    epochs = [entry for entry in result.history if entry["kind"] == "epoch"]
    assert [entry["epoch"] for entry in epochs] == [1, 2, 3, 4]
    assert result.steps == 20
    assert epochs[-1]["lr"] == pytest.approx(learning_rate(longer.settings, 19, 5))
    # Masks change when they would have changed in two epochs: up to three quarters of ten steps.
    assert [entry["step"] for entry in result.history if entry["kind"] == "update"] == [2, 4, 6]
    config = configuration(tmp_path / "log.jsonl")
    assert (config["settings"]["epochs"], config["mask_epochs"]) == (4, 2)
    # The same command again finds it complete; fewer epochs are another training.
    assert trainer(sparse(network()), tmp_path, resume=True, epochs=4, **EVOLVE).run().steps == 20
    assert trainer(sparse(network()), tmp_path, resume=True, epochs=5, **EVOLVE).mask_epochs == 2
    with pytest.raises(ValueError, match=r"settings\.epochs is 4 there and 3 here"):
        trainer(sparse(network()), tmp_path, resume=True, epochs=3, **EVOLVE)


def test_other_changes_are_refused_beside_more_epochs(tmp_path):
    trainer(sparse(network()), tmp_path, epochs=1, **EVOLVE).run()
    with pytest.raises(ValueError, match=r"settings\.lr is 0\.1 there and 0\.2 here"):
        trainer(sparse(network()), tmp_path, resume=True, epochs=2, lr=0.2, **EVOLVE)


def test_a_log_that_says_nothing(tmp_path):
    for text in ("", "no json", "[]", json.dumps({"kind": "epoch"})):
        (tmp_path / "log.jsonl").write_text(text)
        assert configuration(tmp_path / "log.jsonl") is None
    assert configuration(tmp_path / "absent") is None
