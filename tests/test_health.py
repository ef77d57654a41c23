"""layer_health: every measure against its definition, on dense, stored and master layers; the model is left alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hrbp
from hrbp.layers.view import sparse_layers
from hrbp.reports.health import LayerHealth, effective_rank, layer_health, mean_health, table


def batch(seed=0, count=8):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=made), torch.randint(0, 10, (count,), generator=made)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def rank(matrix):
    """By the definition, with NumPy-like steps in float64."""
    values = torch.linalg.svdvals(matrix.double())
    shares = [float(v) / float(values.sum()) for v in values if v > 1e-12 * values[0]]
    return math.exp(-sum(p * math.log(p) for p in shares))


def by_definition(model, x, y):
    """The measures of a dense model whose zero weights are those that are not kept."""
    model, seen = copy.deepcopy(model).train(), {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name, module in layers.items():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.detach()))
    F.cross_entropy(model(x), y).backward()
    found = {}
    for name, module in layers.items():
        weight = module.weight.detach()
        kept = weight != 0
        g, w = module.weight.grad[kept].double(), weight[kept].double()
        groups = getattr(module, "groups", 1)
        cells = kept.flatten(2) if kept.dim() == 4 else kept[..., None]
        read = [bool(cells[k0 : k0 + len(cells) // groups, c].any())
                for k0 in range(0, len(cells), len(cells) // groups) for c in range(cells.shape[1])]  # fmt: skip
        out = seen[name].double()
        out = out.transpose(0, 1).flatten(1) if out.dim() == 4 else out.T
        out = out - out.mean(1, keepdim=True)
        matrix = weight.flatten(1)
        found[name] = LayerHealth(
            density=float(kept.double().mean()), read=sum(read) / len(read), dead=float((g == 0).double().mean()),
            gradient=float(g.norm() / w.norm()), weight_rank=rank(matrix) / min(matrix.shape),
            feature_rank=rank(out) / min(out.shape),
        )  # fmt: skip
    return found


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        for key, value in vars(one).items():
            assert value == pytest.approx(getattr(theirs[name], key), rel=1e-4, abs=1e-5), (name, key)


def test_effective_rank():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    halves = math.exp(-0.5 * math.log(0.5) - 0.5 * math.log(0.25))
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(halves)


def test_dense():
    model, (x, y) = network(), batch()
    same(layer_health(model, x, y), by_definition(model, x, y))


@pytest.mark.parametrize(
    ("structure", "method"),
    [("unstructured", None), ("hrbp++", None), ("channel", None), ("n:m", "sr-ste"), ("1xn", "subp")],
)
def test_sparse_layers_as_their_dense_form(structure, method):
    """Stored blocks, moved rows and master weights; sparse and dense layers beside one another."""
    options = {"hrbp++": {"saliency": "magnitude"}, "1xn": {"n": 8}}.get(structure, {})
    model = hrbp.sparsify(network(), 0.75, structure=structure, method=method, exclude=["0"], **options)
    assert len(sparse_layers(model)) >= 2
    x, y = batch()
    same(layer_health(model, x, y), by_definition(hrbp.densify(copy.deepcopy(model)), x, y))


def test_weights_that_nobody_reads_are_dead():
    model = network()
    with torch.no_grad():
        model[3].weight[:, [2, 5]] = 0  # of 16 filters two are read by nobody
    found = layer_health(model, *batch())
    assert found["0"].dead == pytest.approx(2 / 16)
    assert found["3"].dead == 0  # a weight of a plain layer is kept, also one that is 0


def test_one_dead_input_is_dead_weight():
    x, y = batch()
    x[:, 1] = 0
    found = layer_health(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), x, y % 4)
    assert found["0"].dead == pytest.approx(1 / 3)


def test_the_model_stays_as_it_is():
    model = hrbp.sparsify(network(), 0.75, structure="hrbp++").eval()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    model[1].weight.requires_grad_(False)
    before, grads = copy.deepcopy(model), [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        layer_health(model, x, y)
    assert torch.equal(state, torch.get_rng_state())
    for (name, ours), theirs in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    for ours, theirs, grad in zip(model.parameters(), before.parameters(), grads, strict=True):
        assert ours.requires_grad == theirs.requires_grad
        assert torch.equal(ours.grad, grad)
    assert all(not module.training and not module._forward_hooks for module in model.modules())


def test_frozen_weights_and_layers_that_are_not_used():
    model, (x, y) = network(), batch()
    whole = layer_health(model, x, y)
    model.unused = nn.Linear(3, 3)  # in a Sequential it would be called
    sequence = copy.deepcopy(model._modules)

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Sequential(*list(sequence.values())[:-1]), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    part = Part().requires_grad_(False)
    same(layer_health(part, x, y), {f"used.{name}": one for name, one in whole.items()})


def test_what_cannot_be_measured():
    x, y = batch()
    with pytest.raises(ValueError, match=r"layer_health\(\): the loss is nan"):
        layer_health(network(), x * float("nan"), y)
    with pytest.raises(ValueError, match="depends on no weight"):
        layer_health(nn.Flatten(), x, y)
    with pytest.raises(ValueError, match="no layer"):
        mean_health({})


def test_mean_and_table():
    found = {"a": LayerHealth(1, 1, 0, 0.25, 0.5, 0.75), "b": LayerHealth(0.5, 0.75, 0.5, 0.75, 0.25, 0.25)}
    assert mean_health(found) == LayerHealth(0.75, 0.875, 0.25, 0.5, 0.375, 0.5)
    head, first, second = table(found).splitlines()
    assert head.split()[:4] == ["layer", "density%", "read%", "dead%"]
    assert first.split() == ["a", "100.0", "100.0", "0.0", "0.25", "50.0", "75.0"]
    assert second.split() == ["b", "50.0", "75.0", "50.0", "0.75", "25.0", "25.0"]
