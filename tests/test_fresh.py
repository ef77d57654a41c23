"""Freshly drawn weights are told from trained ones, in doubt as trained; sparsify takes its default by that."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import init

import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.surgery.fresh import trained

INITIALISERS = {
    "PyTorch's own": lambda w: None,
    "kaiming normal": lambda w: init.kaiming_normal_(w, nonlinearity="relu"),
    "kaiming normal, fan out": lambda w: init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "kaiming uniform": lambda w: init.kaiming_uniform_(w, nonlinearity="relu"),
    "xavier uniform": init.xavier_uniform_,
    "xavier normal": init.xavier_normal_,
    "normal 0.01": lambda w: init.normal_(w, std=0.01),
    "truncated normal 0.02": lambda w: init.trunc_normal_(w, std=0.02),
    "zeros": init.zeros_,
}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def plain(norm: bool = False) -> nn.Sequential:
    mid = [nn.BatchNorm2d(32)] if norm else []
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), *mid, nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def train(model: nn.Module, steps: int, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for _ in range(steps):
        x, y = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
        nn.functional.cross_entropy(model.train()(x + y[:, None, None, None] / 5), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", INITIALISERS)
def test_every_initialiser_is_known(name, dtype):
    torch.manual_seed(0)
    for _ in range(10):
        for k, c, r in [(16, 3, 3), (64, 32, 3), (10, 64, 1), (1, 1, 1), (4, 2, 5), (300, 5, 1)]:
            layer = nn.Conv2d(c, k, r)
            INITIALISERS[name](layer.weight)
            assert trained(layer, {"layer": layer.to(dtype)}) is None


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "vgg19", "mobilenetv1", "mobilenetv2"])
def test_networks_of_the_papers_are_fresh_when_they_are_built(name):
    for seed in range(3):
        torch.manual_seed(seed)
        model = hrbp.models.build(name, classes=10, width=0.5)
        assert trained(model, layers_of(model)) is None


def test_one_step_of_training_shows_where_a_network_normalises():
    model = plain(norm=True)
    assert trained(model, layers_of(model)) is None
    train(model, 1, lr=1e-6)
    assert trained(model, layers_of(model)) == "1 has counted 1 batches"
    model[1].reset_running_stats()
    assert trained(model, layers_of(model)) == "1 differs between channels"


def test_a_few_steps_show_without_normalisation():
    torch.manual_seed(0)
    model = plain()
    train(model, 10)
    assert "no initialiser known here draws weights as those of" in trained(model, layers_of(model))


@pytest.mark.parametrize("kind", ["shift", "scaled filters", "scaled channels", "low rank", "tails", "pruned", "NaN"])
def test_what_no_initialiser_draws(kind):
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, bias=False)
    with torch.no_grad():
        w = init.kaiming_normal_(layer.weight)
        std = float(w.std())
        if kind == "shift":
            w += 0.05 * std
        elif kind == "scaled filters":
            w[:2] *= 1.4
        elif kind == "scaled channels":
            w[:, 5] *= 1.5
        elif kind == "low rank":
            w += 0.3 * std * torch.randn(64, 1, 1, 1) * torch.randn(1, 64, 3, 3)
            w *= std / w.std()
        elif kind == "tails":
            w.copy_(torch.distributions.StudentT(6.0).sample(w.shape))
            w *= std / w.std()
        elif kind == "pruned":
            w[torch.rand_like(w) < 0.2] = 0
        else:
            w[3, 4] = torch.nan
    assert trained(layer, {"layer": layer}) == "no initialiser known here draws weights as those of layer"


@pytest.mark.parametrize("structure", ["hrbp++", "unstructured"])
def test_auto_is_random_for_fresh_weights_and_magnitude_for_trained_ones(structure):
    torch.manual_seed(0)
    fresh = hrbp.models.build("resnet8", classes=10, width=0.5)
    made = copy.deepcopy(fresh)
    train(made, 2)
    for model, taken, why in ((fresh, "random", "the weights look freshly drawn"), (made, "magnitude", "counted")):
        masks = {}
        for asked in ("auto", "random", "magnitude"):
            sparse = hrbp.sparsify(copy.deepcopy(model), 0.8, structure=structure, seed=3, saliency=asked)
            plan = record_of(sparse)
            assert plan.saliency == (taken if asked == "auto" else asked)
            assert (why in plan.saliency_why) is (asked == "auto")
            note = f"masks first chosen by {plan.saliency}" + (" ('auto', as " if asked == "auto" else "\n")
            assert note in f"{hrbp.summary(sparse)}\n"
            masks[asked] = [layer.mask() for layer in sparse_layers(sparse).values()]
        default = hrbp.sparsify(copy.deepcopy(model), 0.8, structure=structure, seed=3)
        masks["default"] = [layer.mask() for layer in sparse_layers(default).values()]
        other = "magnitude" if taken == "random" else "random"
        for name in ("auto", "default"):
            assert all(torch.equal(a, b) for a, b in zip(masks[name], masks[taken], strict=True))
            assert not all(torch.equal(a, b) for a, b in zip(masks[name], masks[other], strict=True))


def test_a_file_says_what_chose_the_masks(tmp_path):
    model = hrbp.sparsify(hrbp.models.build("resnet8", classes=10, width=0.5), 0.5)
    hrbp.save(model, tmp_path / "model.pt")
    assert record_of(hrbp.load(tmp_path / "model.pt")) == record_of(model)
