"""Averages of weights whose masks change are those of the dense weights under the masks."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.methods.evolver import Evolver

METHODS = {
    "set": ("set", "hrbp", {"groups": 2}, 0.7, {}),
    "single": ("set", "unstructured", {}, 0.7, {}),
    "gmp": ("gmp", "block", {"blocksize": (4, 4)}, 0.0, {"sparsity": 0.8}),
    "subp": ("subp", "1xn", {"n": 4}, 0.7, {}),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu())).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())


def sparse(name: str) -> Net:
    method, structure, options, sparsity, _ = METHODS[name]
    torch.manual_seed(0)
    method = "subp" if method == "subp" else None
    return hrbp.sparsify(Net().double(), sparsity, structure=structure, method=method, **options)


def evolver_of(name: str, net: nn.Module, optimizer, model: nn.Module | None = None, **options) -> Evolver:
    method, _, _, _, own = METHODS[name]
    return Evolver(model or net, optimizer, method, total_steps=12, every=2, until=1.0, **own, **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64),
        torch.randint(4, (6,), generator=generator),
    )


def train(net: nn.Module, optimizer, evolver: Evolver, step: int):
    x, y = batch(step)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    update = evolver.step()
    optimizer.zero_grad()
    return update


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight() for name, layer in sparse_layers(net).items()}


def differ(one: nn.Module, other: nn.Module) -> float:
    theirs = weights(other)
    return max(float((w - theirs[n]).norm() / theirs[n].norm()) for n, w in weights(one).items())


@pytest.mark.parametrize("kind", ["swa", "ema", "buffers"])
@pytest.mark.parametrize("name", METHODS)
def test_an_average_follows_without_being_told_of(name, kind):
    net = sparse(name)
    options = {"ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, "swa": {}, "buffers": {"use_buffers": True}}[kind]
    if kind == "buffers":  # integers, as those of an index, are rounded
        options |= {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
    average = AveragedModel(net, **options)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    evolver = evolver_of(name, net, optimizer)
    mean: dict[str, Tensor] = {}
    moved = 0
    for step in range(12):
        update = train(net, optimizer, evolver, step)
        average.update_parameters(net)
        for layer_name, layer in sparse_layers(net).items():
            mask = layer.mask()
            now = layer.parameter.detach().view(layer.shape) if layer.master else layer.weight()
            if not step:
                mean[layer_name] = now.clone()
                continue
            if not layer.master:
                mean[layer_name] = mean[layer_name] * mask
            share = 1 / (step + 1) if kind == "swa" else 0.1
            mean[layer_name] = mean[layer_name] + share * (now - mean[layer_name])
        moved += 0 if update is None else sum(update.sad.values())
        for layer_name, layer in sparse_layers(average).items():
            assert torch.equal(layer.mask(), sparse_layers(net)[layer_name].mask())
            ours = layer.parameter.detach().view(layer.shape) if layer.master else layer.weight()
            torch.testing.assert_close(ours, mean[layer_name], rtol=1e-9, atol=1e-12)
    assert moved > 0
    x, _ = batch(99)
    torch.testing.assert_close(average.eval()(x), hrbp.densify(copy.deepcopy(average.module)).eval()(x))
    update_bn([batch(step)[0] for step in range(3)], average)


@pytest.mark.parametrize("name", ["set", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gmp", "subp"))])
def test_it_is_what_an_average_that_the_evolver_knows_becomes(name):
    found = []
    for known in (True, False):
        net = sparse(name)
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        evolver = evolver_of(name, net, optimizer, ema=[average] if known else [])
        for step in range(12):
            train(net, optimizer, evolver, step)
            average.update_parameters(net)
        found.append(average)
        assert ("update_parameters" in vars(average)) != known
    states = [average.state_dict() for average in found]
    assert all(torch.equal(t, states[1][key]) for key, t in states[0].items())


def test_averages_made_late_inside_of_a_larger_model_or_copied():
    net = sparse("set")
    outer = nn.Sequential(net, nn.Linear(4, 4).double())
    optimizer = torch.optim.SGD(outer.parameters(), 0.1)
    evolver = evolver_of("set", net, optimizer)
    train(outer, optimizer, evolver, 0)
    train(outer, optimizer, evolver, 1)
    late, whole = AveragedModel(net), AveragedModel(outer)
    copied = None
    for step in range(2, 12):
        train(outer, optimizer, evolver, step)
        late.update_parameters(net)
        whole.update_parameters(outer)
        if step == 5:
            copied = copy.deepcopy(late)
        if step >= 6:
            copied.update_parameters(net)
    assert differ(late, copied) == 0
    assert differ(late, whole.module[0]) == 0
    assert copied is not late
    assert all(torch.equal(late.module.get_parameter(n), p) for n, p in copied.module.named_parameters())


def test_an_average_that_is_complete_stays_as_it_is():
    net = sparse("set")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    evolver = evolver_of("set", net, optimizer)
    average, copied = AveragedModel(net), copy.deepcopy(net)
    average.update_parameters(net)
    before = copy.deepcopy((average.state_dict(), copied.state_dict()))
    for step in range(12):
        train(net, optimizer, evolver, step)
    for made, state in zip((average, copied), before, strict=True):
        assert all(torch.equal(t, state[key]) for key, t in made.state_dict().items())
    assert "update_parameters" not in vars(copied)


def test_an_average_of_another_model_is_left_alone():
    net = sparse("set")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    twin = copy.deepcopy(net)
    theirs, own = AveragedModel(twin), AveragedModel(net)
    evolver = evolver_of("set", net, optimizer)
    for step in range(4):
        train(net, optimizer, evolver, step)
    assert "update_parameters" not in vars(theirs)
    assert "update_parameters" in vars(own)
    theirs.update_parameters(twin)
    assert differ(theirs, twin) == 0


def test_a_training_that_was_stopped_between_an_update_and_the_average():
    def made():
        net = sparse("set")
        average, optimizer = AveragedModel(net), torch.optim.SGD(net.parameters(), 0.1)
        return net, average, optimizer, evolver_of("set", net, optimizer, drop=0.9)

    net, average, optimizer, evolver = made()
    for step in range(6):
        update = train(net, optimizer, evolver, step)
        if step < 3:
            average.update_parameters(net)
    assert update.step == 6
    assert any(
        not torch.equal(layer.mask(), sparse_layers(net)[n].mask()) for n, layer in sparse_layers(average).items()
    )
    again = made()
    for part, old in zip(again, (net, average, optimizer, evolver), strict=True):
        part.load_state_dict(copy.deepcopy(old.state_dict()))
    before = weights(again[1])
    train(again[0], again[2], again[3], 6)
    again[1].update_parameters(again[0])
    for name, now in weights(again[0]).items():
        kept = before[name] * sparse_layers(again[0])[name].mask()
        torch.testing.assert_close(weights(again[1])[name], kept + (now - kept) / 4)


def test_lineages():
    net = sparse("set")
    lineage = record_of(net).lineage
    twin = copy.deepcopy(net)
    assert record_of(twin).lineage.parent is lineage
    assert record_of(twin) == record_of(net)
    assert set(lineage.copies) == {record_of(twin).lineage}
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert record_of(loaded).lineage.parent is None
    del twin
    gc.collect()
    assert not lineage.copies


def test_models_that_are_no_copies_are_refused():
    net = sparse("set")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for other in (Net(), sparse("subp"), nn.Sequential(sparse("set"))):
        with pytest.raises(ValueError, match=r"ema\[0\] has no sparse layer 'conv' as the model has; it needs copies"):
            evolver_of("set", net, optimizer, ema=[other])
