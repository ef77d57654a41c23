"""What a method of the Evolver takes, and when its updates come: nothing that would do nothing is accepted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hrbp
from hrbp.layers.view import sparse_layers
from hrbp.methods.evolver import Evolver
from hrbp.methods.registry import METHODS
from hrbp.training.settings import Settings

EXCHANGING = ("set", "rigl", "hrbp")
VALUES = {
    "every": 1, "drop": 0.5, "until": 0.5, "sparsity": 0.9, "decay": 0.1, "seed": 3, "score": "l1", "alpha": 2.0,
    "tau": 2.0, "pace": "linear", "begin": 0.1,
}  # fmt: skip


def model(method: str = "static", structure: str | None = None, sparsity: float | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Flatten(), nn.Linear(32, 16))
    named = {"subp": "1xn", "ste": "2:4", "sr-ste": "2:4", "hrbp": "hrbp"}.get(method, "block")
    structure = structure or named
    options = {"1xn": {"n": 4}, "hrbp": {"groups": 2}, "block": {"blocksize": (2, 2)}}.get(structure, {}) | options
    master = method if METHODS[method].dense_weights else None
    sparsity = 0.5 if sparsity is None else sparsity
    return hrbp.sparsify(net, sparsity, structure=structure, method=master, include=["0", "2", "4"], **options)


def evolver(method: str, net: nn.Module | None = None, **options) -> Evolver:
    net = net or model(method.lower())
    options = {"sparsity": 0.8} | options if method.lower() == "gmp" else options
    return Evolver(net, torch.optim.SGD(net.parameters(), 0.1), method, **{"total_steps": 100, **options})


def updates(made: Evolver) -> list[int]:
    """The steps of the updates of a whole training; gradients are drawn."""
    told = []
    for step in range(made.total_steps):
        generator = torch.Generator().manual_seed(step)
        made.model(torch.randn(2, 8, 3, 3, generator=generator)).square().sum().backward()
        update = made.step()
        made.optimizer.zero_grad()
        told += [] if update is None else [update.step]
    return told


# ---------------------------------------------------------------------- names and options


@pytest.mark.parametrize(
    ("name", "method"), [("RigL", "rigl"), ("SET", "set"), ("Hrbp", "hrbp"), ("SR-STE", "sr-ste"), ("GMP", "gmp")]
)
def test_names_are_accepted_in_any_case(name, method):
    made = evolver(name, model(method), every=5)
    assert made.method == method
    assert made.state_dict()["method"] == method
    assert made.wants_dense_grad() is False
    evolver(method, model(method), every=5).load_state_dict(made.state_dict())
    assert Settings(1, evolve=name).evolve == method


@pytest.mark.parametrize("method", METHODS)
def test_options_that_a_method_does_not_take_are_refused(method):
    for name, value in VALUES.items():
        if name in METHODS[method].options():
            evolver(method, **{"every": 1, name: value})
            continue
        with pytest.raises(TypeError, match=rf"method '{method}' has no option {name}; it takes: "):
            evolver(method, **{name: value})
    with pytest.raises(TypeError, match=rf"method '{method}' has no option speed, warmth; it takes: "):
        evolver(method, speed=1, warmth=2)


def test_the_usual_call_is_accepted():
    for method in EXCHANGING:
        net = model(method)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        made = Evolver(net, optimizer, method, total_steps=1000, every=10, drop=0.3, until=0.75, seed=1)
        assert (made.every, made.drop, made.until, made.seed) == (10, 0.3, 0.75, 1)
    made = Evolver(net, optimizer, total_steps=1000)
    assert (made.method, made.every, made.drop, made.until, made.seed) == ("rigl", 100, 0.3, 0.75, 0)


# ---------------------------------------------------------------------- steps that are too few


@pytest.mark.parametrize("method", EXCHANGING)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 133}, r"every = 100, and masks stay from step until \* total_steps = 0\.75 \* 133 = 99\.75 on;"
                               r" lower every to at most 99, or raise until or total_steps"),
        ({"total_steps": 200, "until": 0.5}, "lower every to at most 99"),
        ({"total_steps": 1, "every": 1}, r"= 0\.75 on; raise until or total_steps"),
        ({"total_steps": 50, "every": 10, "until": 0.0}, "= 0 on; raise until"),
    ],
)  # fmt: skip
def test_exchanges_that_would_never_come_are_refused(method, options, message):
    with pytest.raises(ValueError, match=rf"'{method}' would never change a mask: .*{message}"):
        evolver(method, **options)


@pytest.mark.parametrize("method", ["gmp", "subp"])
def test_a_sparsity_that_would_not_be_reached_is_refused(method):
    for options in ({"total_steps": 60}, {"total_steps": 105, "every": 50, "until": 0.96}, {"total_steps": 99}):
        with pytest.raises(ValueError, match=rf"'{method}' reaches its sparsity at step .* \(every = \d+ will do\)"):
            evolver(method, **options)
    evolver(method, total_steps=100)


def test_methods_that_act_in_every_step_may_be_looked_at_seldom():
    for method in ("ste", "sr-ste"):
        assert updates(evolver(method, total_steps=5)) == []
    assert updates(evolver("static", total_steps=5)) == []


# ---------------------------------------------------------------------- gradual pruning arrives


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0]))
def test_schedules_end_with_one_update_at_or_after_until(total_steps, every, until):
    """The first multiple of `every` from `until` on, or the refusal to begin; float rounding decides nothing."""
    exact = -(-round(100 * until) * total_steps // 100)  # whole numbers
    arrives = every * max(1, -(-exact // every))
    made = {}
    for method in ("gmp", "subp"):
        if arrives > total_steps:
            with pytest.raises(ValueError, match=f"'{method}' reaches its sparsity at step {arrives},"):
                evolver(method, total_steps=total_steps, every=every, until=until)
        else:
            made[method] = evolver(method, total_steps=total_steps, every=every, until=until)
    for one in made.values():
        assert [step for step in range(1, total_steps + 1) if one._is_due(step)] == [*range(every, arrives + 1, every)]


@pytest.mark.parametrize("final", [0.8, 0.9])
@pytest.mark.parametrize(
    ("structure", "options"),
    [("unstructured", {}), ("block", {}), ("hrbp", {}), ("hrbp++", {"groups": 2}), ("1xn", {"uniform": True})],
)
@pytest.mark.parametrize(("steps", "every", "until"), [(20, 7, 1.0 - 1e-3), (14, 7, 0.6), (3, 1, 0.0), (10, 3, 0.3)])
def test_gradual_pruning_ends_where_sparsify_begins(structure, options, final, steps, every, until):
    """With the density of every layer that a model made at the final sparsity has."""
    net = model("gmp", structure, 0.0, **options)
    if every * math.ceil(until * steps / every) > steps:
        with pytest.raises(ValueError, match="reaches its sparsity at step 21"):
            evolver("gmp", net, sparsity=final, total_steps=steps, every=every, until=until)
        return
    made = evolver("gmp", net, sparsity=final, total_steps=steps, every=every, until=until)
    told = updates(made)
    assert len(told) >= 1
    wanted = model("gmp", structure, final, **options)
    for name, layer in sparse_layers(net).items():
        assert int(layer.mask().sum()) == int(sparse_layers(wanted)[name].mask().sum()), name


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_gradual_pruning_that_has_arrived_can_be_taken_up_again(distribution):
    net = model("gmp", "block", 0.0, distribution=distribution)
    made = evolver("gmp", net, sparsity=0.9, total_steps=20, every=3)
    updates(made)
    again = evolver("gmp", net, sparsity=0.9, total_steps=20, every=3)
    again.load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match=r"sparse already; 'gmp' to 0\.7 cannot grow it"):
        evolver("gmp", net, sparsity=0.7, total_steps=20, every=3)


def test_a_sparsity_that_the_structure_cannot_have_is_refused_at_once():
    net = model("gmp", "hrbp", 0.0)
    with pytest.raises(ValueError, match=r"sparsity 0\.999 leaves .* cells; the structure keeps at least"):
        evolver("gmp", net, sparsity=0.999, total_steps=100, every=10)


# ---------------------------------------------------------------------- how often by default


@given(
    st.sampled_from([method for method in METHODS if METHODS[method].changes]), st.integers(1, 5000),
    st.sampled_from([None, 0.1, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99, 1.0]), st.integers(1, 300),
)  # fmt: skip
def test_the_default_of_a_training_updates_often_enough(method, total_steps, until, most):
    every = METHODS[method].default_every(total_steps, until, most)
    assert 1 <= every <= most
    end = (0.75 if until is None else until) * total_steps
    if method in ("ste", "sr-ste"):
        count = total_steps // every
        possible = total_steps
    elif method in EXCHANGING:
        count = len([step for step in range(every, total_steps + 1, every) if step < end])
        possible = math.ceil(end) - 1
    else:
        arrives = every * max(1, math.ceil(end / every - 1e-9))
        assert arrives <= total_steps
        count, possible = arrives // every, max(1, math.ceil(end - 1e-9))
    assert count >= min(20, possible)
