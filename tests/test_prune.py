"""Models pruned by torch.nn.utils.prune: sparsify leaves their layers, from_prune takes their masks over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import blocksparse as bs
import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.point = nn.Conv2d(32, 32, 1)
        self.split = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.hidden = nn.Linear(32, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(self.stem(x).relu())).relu()
        return self.head(self.hidden(self.split(self.point(x)).mean((2, 3))).relu())


TAKEN = ("stem", "wide", "point", "hidden", "head")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 4, 12, 12, generator=torch.Generator().manual_seed(1))


def pruned(net: Net, how: str) -> Net:
    """Layers of the net with masks of one kind."""
    for i, name in enumerate(TAKEN):
        layer = net.get_submodule(name)
        shape = (*layer.weight.shape, 1, 1)[:4]
        if how == "single weights":
            prune.l1_unstructured(layer, "weight", 0.7)
        elif how == "filters":
            prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
        elif how == "channels":
            prune.random_structured(layer, "weight", 0.5, dim=1)
        elif how == "mixed":
            prune.ln_structured(layer, "weight", 0.5, n=2, dim=0) if i % 2 else prune.l1_unstructured(
                layer, "weight", 0.7
            )
        else:
            options = {"1xn": {"n": 2}, "block": {"blocksize": (2, 4)}, "2:4": {}, "kernel": {}, "vector": {}}[how]
            mask = hrbp.make_mask(torch.rand(shape), 0.5, how, **options).view(layer.weight.shape)
            prune.custom_from_mask(layer, "weight", mask)
    return net


HOW = {  # structure of the plan, and the blocks that layers are stored in; None: all of an axis
    "single weights": ("unstructured", (1, 1)),
    "vector": ("vector", (1, 1)),
    "kernel": ("kernel", (1, 1)),
    "2:4": ("2:4", (1, 1)),
    "filters": ("filter", (1, None)),
    "channels": ("channel", (None, 1)),
    "1xn": ("1xn", (2, 1)),
    "block": ("block", (2, 4)),
    "mixed": ("mixed", (1, 1)),  # every other layer: of filters
}


@pytest.mark.parametrize("how", HOW)
def test_masks_are_taken_over(net, x, how, tmp_path):
    fresh = copy.deepcopy(net)
    pruned(net.eval(), how)
    with torch.no_grad():  # trained on after pruning: what prune left in `weight` is old
        for name in TAKEN:
            net.get_submodule(name).weight_orig.add_(0.01)
    expected = net(x)
    masks = {name: net.get_submodule(name).weight_mask.bool() for name in TAKEN}
    weights = {name: net.get_submodule(name).weight.detach().clone() for name in TAKEN}
    assert hrbp.from_prune(net) is net
    assert not prune.is_pruned(net)
    name, blocksize = HOW[how]
    plan = record_of(net)
    assert (plan.structure.name, plan.method, plan.saliency) == (name, None, "torch.nn.utils.prune")
    assert plan.dense == {"split": "not pruned"}
    layers = sparse_layers(net)
    assert list(layers) == list(TAKEN)
    for i, (layer_name, layer) in enumerate(layers.items()):
        mask = masks[layer_name]
        assert torch.equal(layer.mask(), mask.view(layer.shape))
        assert torch.equal(layer.weight(), weights[layer_name].view(layer.shape))
        assert type(layer.module) in (bs.BSRConv2d, bs.BSRLinear)
        bk, bc = (1, None) if how == "mixed" and i % 2 else blocksize
        assert layer.module.pattern.blocksize == (bk or layer.shape[0], bc or layer.shape[1])
        assert layer.parameter.numel() == int(mask.sum())
        assert plan.asked[layer_name] == pytest.approx(float(mask.float().mean()))
    assert [n.rpartition(".")[0] for n, _ in net.named_parameters()] == [
        n.rpartition(".")[0] for n, _ in fresh.named_parameters()
    ]
    assert torch.allclose(net(x), expected, rtol=1e-5, atol=1e-6)

    hrbp.save(net, tmp_path / "net.pt")
    loaded = hrbp.load(tmp_path / "net.pt", fresh)
    assert torch.equal(loaded(x), net(x))
    assert record_of(loaded) == plan
    assert "masks first chosen by torch.nn.utils.prune" in str(hrbp.summary(net, x))
    assert hrbp.summary(net).sparsity == pytest.approx(
        1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    )
    dense = hrbp.densify(copy.deepcopy(net))
    assert not sparse_layers(dense)
    assert torch.allclose(dense(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["static", "set", "rigl", "gmp"])
@pytest.mark.parametrize("how", ["single weights", "block", "filters"])
def test_masks_that_were_taken_over_evolve(net, x, how, method):
    hrbp.from_prune(pruned(net, how))
    before = {name: layer.mask() for name, layer in sparse_layers(net).items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    options = {"sparsity": 0.9} if method == "gmp" else {}
    options |= {} if method == "static" else {"every": 2}
    evolver = hrbp.Evolver(net, optimizer, method, total_steps=20, **options)
    for _ in range(20):
        net(x).square().mean().backward()
        optimizer.step()
        evolver.step()
        optimizer.zero_grad()
    after = {name: layer.mask() for name, layer in sparse_layers(net).items()}
    changed = any(not torch.equal(before[name], after[name]) for name in before)
    assert changed is (method != "static")
    if method == "gmp":
        assert hrbp.summary(net).sparsity == pytest.approx(0.9, abs=0.02)
    else:
        assert all(int(before[name].sum()) == int(after[name].sum()) for name in before)


def test_mixed_masks_stay_unless_their_structure_is_named(net, x):
    pruned(net.eval(), "mixed")
    expected, named = net(x), copy.deepcopy(Net())
    pruned(named, "mixed")
    hrbp.from_prune(net)
    assert torch.allclose(net(x), expected, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    hrbp.Evolver(net, optimizer, "static", total_steps=10)
    with pytest.raises(ValueError, match="masks of structure 'mixed' do not change; use method='static'"):
        hrbp.Evolver(net, optimizer, "rigl", total_steps=10)
    hrbp.from_prune(named, structure="Unstructured")
    assert record_of(named).structure.name == "unstructured"
    assert {layer.module.pattern.blocksize for layer in sparse_layers(named).values()} == {(1, 1)}
    hrbp.Evolver(named, torch.optim.SGD(named.parameters(), 0.1), "rigl", total_steps=10, every=1)


def test_what_is_not_taken_over_stays_pruned_and_is_named(net, x):
    prune.l1_unstructured(net.wide, "weight", 0.5)
    prune.l1_unstructured(net.split, "weight", 0.5)
    prune.l1_unstructured(net.norm, "bias", 0.5)
    prune.l1_unstructured(net.hidden, "weight", 0.5)
    prune.l1_unstructured(net.hidden, "bias", 0.5)
    prune.l1_unstructured(net.head, "bias", 0.5)
    prune.custom_from_mask(net.point, "weight", torch.full((32, 32, 1, 1), 0.5))
    expected = net.eval()(x)
    hrbp.from_prune(net)
    still = "torch.nn.utils.prune still masks its"
    assert record_of(net).dense == {
        "stem": "not pruned",
        "norm": f"{still} bias: a BatchNorm2d",
        "point": f"{still} weight: its mask has values other than 0 and 1",
        "split": f"{still} weight: depthwise",
        "hidden": f"{still} weight and bias: its bias is pruned, too",
        "head": f"{still} bias: its weight is not pruned",
    }
    torch.testing.assert_close(net(x), expected)
    text = str(hrbp.summary(net, x))
    assert f"dense ({still} weight: depthwise)" in text
    assert f"left as they were: norm ({still} bias: a BatchNorm2d)" in text
    hrbp.densify(net)
    assert torch.equal(net(x), expected)


def test_iterative_pruning_and_hooks_of_others(net, x):
    seen = []
    handle = net.wide.register_forward_pre_hook(lambda module, args: seen.append(type(module)))
    for _ in range(3):
        prune.l1_unstructured(net.wide, "weight", 0.3)  # a PruningContainer
    prune.global_unstructured([(net.point, "weight"), (net.hidden, "weight")], prune.L1Unstructured, amount=0.5)
    net.wide.weight_orig.requires_grad_(False)
    net.eval()
    expected = net(x)
    hrbp.from_prune(net)
    assert torch.allclose(net(x), expected, rtol=1e-5, atol=1e-6)
    assert seen == [nn.Conv2d, bs.BSRConv2d]
    assert not net.wide.values.requires_grad
    assert not net.wide.training
    handle.remove()
    net(x)
    assert len(seen) == 2


def test_refusals_leave_the_model_untouched(net, x):
    before = list(net.state_dict())
    with pytest.raises(ValueError, match=r"from_prune\(\): no Conv2d, Conv1d or Linear has a mask .*nothing is pruned"):
        hrbp.from_prune(net)
    assert list(net.state_dict()) == before
    prune.l1_unstructured(net.split, "weight", 0.5)
    with pytest.raises(ValueError, match=r"split: torch.nn.utils.prune still masks its weight: depthwise"):
        hrbp.from_prune(net)
    prune.l1_unstructured(net.wide, "weight", 0.5)
    prune.ln_structured(net.hidden, "weight", 0.5, n=2, dim=0)
    expected, state = net.eval()(x), list(net.state_dict())
    for arguments, error, message in [
        ({"structure": "filter"}, ValueError, "the mask of wide is not of structure 'filter'"),
        ({"structure": "2:4"}, ValueError, "the mask of wide is not of structure '2:4'"),
        ({"structure": "hrbp++"}, ValueError, "structure is 'hrbp[+][+]', whose filters are regrouped"),
        ({"n": 4}, TypeError, "no option n without a structure"),
        ({"structure": "filter", "n": 4}, TypeError, "no option n"),
    ]:
        with pytest.raises(error, match=message):
            hrbp.from_prune(net, **arguments)
        assert list(net.state_dict()) == state
        assert torch.equal(net(x), expected)
        assert record_of(net, required=False) is None
    hrbp.from_prune(net)
    with pytest.raises(ValueError, match=r"from_prune\(\): the model is sparse already"):
        hrbp.from_prune(net)


# ---------------------------------------------------------------------- what sparsify does with such layers


@pytest.mark.parametrize("structure", ["hrbp++", "unstructured"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: weight_norm(layer), "its weight is computed by WeightNorm"),
        (lambda layer: spectral_norm(layer), "its weight is computed by SpectralNorm"),
        (
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            "torch.nn.utils.prune masks its weight; hrbp.from_prune(model) takes masks of weights over",
        ),
        (
            lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
            "torch.nn.utils.prune masks its bias; hrbp.from_prune(model) takes masks of weights over",
        ),
        (lambda layer: parametrizations.weight_norm(layer), "its weight is parametrized"),
        (lambda layer: parametrizations.spectral_norm(layer), "its weight is parametrized"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_computed_weights_stay_dense_with_their_reason(net, x, change, reason, structure):
    change(net.point)
    with torch.no_grad():
        net.eval()(x)
    hrbp.sparsify(net, 0.5, structure=structure)
    assert record_of(net).dense["point"] == reason
    assert list(sparse_layers(net)) == ["wide", "hidden"]
    assert f"dense ({reason})" in str(hrbp.summary(net, x))
    net.train()(x).sum().backward()
    dense = hrbp.dense_state_dict(net)  # of a copy, though what hooks compute has a gradient
    assert dense.keys() == hrbp.densify(net).state_dict().keys()
    net(x)
