"""Single weights, kernels, vectors and n:m masks are stored as blocks, and train as a dense weight under a mask does.

The reference is written here: dense layers whose weight is multiplied by a mask at every forward, an optimizer of their
own, and after each change of the mask weights and momentum set to zero where something left or came.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import blocksparse as bs
import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")

STRUCTURES = {"unstructured": {}, "kernel": {}, "vector": {}, "1xn": {"n": 1}, "n:m": {"m": 4}}
STEPS, SHARE = 12, 0.75


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 16, (3, 1))
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.norm(self.one(self.stem(x).relu())).relu()).mean((2, 3))
        return self.head(self.hidden(x).relu())


def dense() -> Net:
    torch.manual_seed(0)
    return Net().double()


def sparse(structure: str, sparsity: float = SHARE, **options) -> Net:
    return hrbp.sparsify(dense(), sparsity, structure=structure, **STRUCTURES[structure], **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(6, 3, 9, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (6,), generator=generator)


def optimizer_of(net: nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1)
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)


class Masked:
    """The reference: plain layers under masks, [K, C, R, S] each, and their optimizer."""

    def __init__(self, masks: dict[str, Tensor], kind: str) -> None:
        self.net = dense()
        self.optimizer = optimizer_of(self.net, kind)
        self.masks = {}
        self.dense_grads: dict[str, Tensor] = {}
        for name in masks:
            layer = self.net.get_submodule(name)
            layer.forward = lambda x, name=name, layer=layer: self.forward(x, name, layer)
        self.change(masks)

    def forward(self, x: Tensor, name: str, layer: nn.Module) -> Tensor:
        weight = layer.weight * self.masks[name].view(layer.weight.shape)
        if weight.requires_grad:
            weight.register_hook(lambda grad: self.dense_grads.__setitem__(name, grad))
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.net(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def change(self, masks: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                weight = self.net.get_submodule(name).weight
                stays = (self.masks.get(name, mask) & mask).view(weight.shape)
                for t in (weight, *self.optimizer.state.get(weight, {}).values()):
                    if isinstance(t, Tensor) and t.shape == weight.shape:
                        t.mul_(stays)
        self.masks = masks


def masks_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: layer.mask() for name, layer in sparse_layers(net).items()}


def assert_alike(net: nn.Module, reference: Masked) -> None:
    for name, layer in sparse_layers(net).items():
        weight = reference.net.get_submodule(name).weight.detach().view(layer.shape) * reference.masks[name]
        torch.testing.assert_close(layer.weight(), weight, rtol=1e-9, atol=1e-11)


def step_of(net: nn.Module, optimizer: torch.optim.Optimizer, evolver: hrbp.Evolver, i: int) -> Tensor:
    x, y = batch(i)
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    evolver.step()
    optimizer.zero_grad()
    return loss.detach()


def moved(weight: Tensor, mask: Tensor, grown: Tensor, units: tuple[int, ...], share: float) -> Tensor:
    """RigL by hand: the least units by |weight| go, those of largest |gradient| come, loop by loop."""

    def sums(t: Tensor) -> Tensor:
        return t.abs().sum(units, keepdim=True).expand_as(t) if units else t.abs()

    cells = sums(torch.ones_like(weight))[0, 0, 0, 0].item()
    kept = [tuple(i) for i in mask.nonzero().tolist()]
    go = round(share * len(kept) / cells)
    go = min(go, round((mask.numel() - len(kept)) / cells))
    worth, wish = sums(weight), sums(grown)
    stay = sorted(kept, key=lambda i: -worth[i])[: round(len(kept) - go * cells)]
    new = torch.zeros_like(mask)
    for i in stay:
        new[i] = True
    others = [tuple(i) for i in (~new).nonzero().tolist()]
    for i in sorted(others, key=lambda i: -wish[i])[: round(go * cells)]:
        new[i] = True
    return new


@pytest.mark.parametrize("backend", ["cpu", "torch", None])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_static_mask_trains_as_a_dense_weight_under_it(structure, kind, backend):
    net = sparse(structure, backend=backend)
    assert all(type(layer.module) in (bs.BSRConv2d, bs.BSRLinear) for layer in sparse_layers(net).values())
    assert {layer.module.pattern.blocksize for layer in sparse_layers(net).values()} == {(1, 1)}
    reference = Masked(masks_of(net), kind)
    assert_alike(net, reference)
    start = copy.deepcopy(net.state_dict())
    optimizer = optimizer_of(net, kind)
    evolver = hrbp.Evolver(net, optimizer, "static", total_steps=STEPS)
    for i in range(STEPS):
        ours, theirs = step_of(net, optimizer, evolver, i), reference.step(*batch(i))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert_alike(net, reference)
    assert not torch.equal(net.one.values, start["one.values"])
    for layer in sparse_layers(net).values():
        for t in optimizer.state[layer.parameter].values():
            assert t is None or t.dim() == 0 or t.numel() == int(layer.mask().sum())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["set", "rigl", "gmp"])
@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "n:m"])
def test_a_mask_that_changes_trains_as_a_dense_weight_under_it(structure, method, kind):
    options = {"sparsity": 0.9} if method == "gmp" else {"drop": 0.4}
    net = sparse(structure, 0.3 if method == "gmp" else SHARE)
    reference = Masked(masks_of(net), kind)
    optimizer = optimizer_of(net, kind)
    evolver = hrbp.Evolver(net, optimizer, method, total_steps=STEPS, every=3, **options)
    parameters, changes = [layer.parameter for layer in sparse_layers(net).values()], 0
    units = {"kernel": (2, 3), "1xn": (2, 3), "vector": (3,)}.get(structure, ())
    for i in range(STEPS):
        before = masks_of(net)
        due = evolver._is_due(evolver.steps + 1)
        ours, theirs = step_of(net, optimizer, evolver, i), reference.step(*batch(i))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        now = masks_of(net)
        if due and method == "rigl":
            for name, mask in now.items():
                weight = reference.net.get_submodule(name).weight.detach().view(mask.shape) * before[name]
                grown = reference.dense_grads[name].view(mask.shape)
                expected = moved(
                    weight, before[name], grown, units, evolver._method.share(evolver.steps, evolver.total_steps)
                )
                assert torch.equal(mask, expected)
        changes += any(not torch.equal(now[name], mask) for name, mask in before.items())
        reference.change(now)
        assert_alike(net, reference)
    assert changes >= 2
    assert all(layer.parameter is p for layer, p in zip(sparse_layers(net).values(), parameters, strict=True))
    kept = sum(layer.parameter.numel() for layer in sparse_layers(net).values())
    cells = sum(layer.mask().numel() for layer in sparse_layers(net).values())
    assert kept / cells == pytest.approx(0.1 if method == "gmp" else 1 - SHARE, abs=0.03)


@pytest.mark.parametrize("method", ["set", "rigl", "gmp"])
def test_a_training_that_was_stopped_goes_on_to_the_bit(method):
    options = {"sparsity": 0.9} if method == "gmp" else {}

    def parts(net):
        optimizer = optimizer_of(net, "adamw")
        return optimizer, hrbp.Evolver(net, optimizer, method, total_steps=STEPS, every=2, **options)

    net = sparse("unstructured", 0.3)
    optimizer, evolver = parts(net)
    states: dict[str, dict] = {}
    for i in range(STEPS):
        if i == 5:
            states = copy.deepcopy({"net": net.state_dict(), "o": optimizer.state_dict(), "e": evolver.state_dict()})
        step_of(net, optimizer, evolver, i)
    again = sparse("unstructured", 0.3, seed=7)
    optimizer, evolver = parts(again)
    again.load_state_dict(states["net"])
    optimizer.load_state_dict(states["o"])
    evolver.load_state_dict(states["e"])
    for i in range(5, STEPS):
        step_of(again, optimizer, evolver, i)
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in again.state_dict().items())


def masked_state(net: nn.Module) -> dict[str, Tensor]:
    """The state_dict that a model had when layers of single weights were dense ones under a mask."""
    state = net.state_dict()
    for name, layer in sparse_layers(net).items():
        linear = isinstance(layer.module, bs.BSRLinear)
        shape = layer.shape[: 2 if linear else 4]
        for part in ("values", "indptr", "indices", "weight_shape"):
            del state[f"{name}.{part}"]
        state[f"{name}.weight"], state[f"{name}.mask"] = layer.weight().view(shape), layer.mask().view(shape)
    return state


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("assign", [False, True])
def test_states_of_masked_layers_load(structure, assign):
    net, other = sparse(structure), sparse(structure, seed=5)
    old = masked_state(net)
    keys = set(old)
    for model in (other, copy.deepcopy(other), nn.Sequential(copy.deepcopy(other)), AveragedModel(other)):
        inner = other if model is other else model.module if isinstance(model, AveragedModel) else model
        prefix = "0." if isinstance(inner, nn.Sequential) else ""
        inner.load_state_dict({prefix + name: t.clone() for name, t in old.items()}, assign=assign)
        found = {name.removeprefix(prefix): t for name, t in inner.state_dict().items()}
        assert found.keys() == net.state_dict().keys()
        assert all(torch.equal(t, net.state_dict()[name]) for name, t in found.items())
    assert set(old) == keys
    damaged = {**old, "one.mask": old["one.mask"][:4]}
    with pytest.raises(RuntimeError, match=r"one\.weight is a dense layer's"):
        other.load_state_dict(damaged)
    hrbp.densify(other)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*mask"):
        other.load_state_dict(old)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_files_of_masked_layers_load(structure, tmp_path, monkeypatch):
    """As they were written: kept weights and bits, and a plan that says whether grains were stored."""
    net = sparse(structure).eval()
    plain = hrbp.formats.model.plain_record(net)
    if structure != "n:m":
        plain["structure"]["stored"] = structure in ("kernel", "1xn")
    state, shapes = masked_state(net), {}
    for name, layer in sparse_layers(net).items():
        mask = state[f"{name}.mask"]
        shapes[name] = list(mask.shape)
        state[f"{name}.weight"] = state[f"{name}.weight"][mask]
        bits = mask.flatten().to(torch.uint8)
        bits = F.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
        state[f"{name}.mask"] = (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])).sum(1).to(torch.uint8)
        assert not layer.master
    content = {"network": None, "plan": plain, "state_dict": state, "masked": shapes}
    (tmp_path / "old.pt").write_bytes(hrbp.formats.sealed.sealed_bytes("model", content))
    again = hrbp.load(tmp_path / "old.pt", dense())
    assert record_of(again) == record_of(net)
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in again.state_dict().items())
    x = batch(0)[0]
    assert torch.equal(again(x), net(x))
    hrbp.save(net, tmp_path / "new.pt")
    assert torch.equal(hrbp.load(tmp_path / "new.pt", dense())(x), net(x))
    assert (tmp_path / "new.pt").stat().st_size < 1.02 * (tmp_path / "old.pt").stat().st_size


def test_random_generators_stay_as_they_are():
    net = dense()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    hrbp.sparsify(net, 0.5, structure="hrbp", groups=2, min_rows=2)
    assert torch.equal(torch.rand(2), expected)


def test_memory_is_what_is_stored():
    """Weights, gradients and optimizer state shrink with the density; the index is counted beside them."""
    net = sparse("unstructured", 0.9)
    rows = {row.name: row for row in hrbp.summary(net).rows}
    for name, layer in sparse_layers(net).items():
        kept, module = int(layer.mask().sum()), layer.module
        bias = 0 if module.bias is None else module.bias.numel()
        assert rows[name].parameters == kept + bias
        assert rows[name].bytes == 8 * (kept + bias) + 4 * module.index.numel()
        assert 16 * kept <= 4 * module.index.numel()
        report = hrbp.reports.report_model(net)[name].storage
        assert (report.values, report.memory_index) == (8 * kept, 4 * module.index.numel())


@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp", "synflow", "magnitude+gradient", "random"])
@pytest.mark.parametrize("structure", ["unstructured", "hrbp"])
def test_stored_weights_are_scored_as_masked_ones(structure, method):
    """By the definitions, on a dense model whose weights are multiplied by the masks."""
    net = dense()
    hrbp.sparsify(net, 0.6, structure=structure, **({"groups": 2, "min_rows": 2} if structure == "hrbp" else {}))
    names, before = list(sparse_layers(net)), copy.deepcopy(net.state_dict())
    torch.manual_seed(4)
    expected_draw = torch.rand(1)
    torch.manual_seed(4)
    found = hrbp.saliency(net, names, method, batch=batch(0))
    assert torch.equal(torch.rand(1), expected_draw)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        name: tuple(dense().get_submodule(name).weight.shape) for name in names
    }
    masks = {name: layer.mask().view(found[name].shape) for name, layer in sparse_layers(net).items()}
    if method == "random":
        drawn = hrbp.saliency(dense(), names, "random")
        assert all(torch.equal(found[name], drawn[name]) for name in names)
        return
    twin = hrbp.densify(copy.deepcopy(net))
    weights = {name: twin.get_submodule(name).weight for name in names}
    if method in ("grasp", "synflow"):  # a dropped weight is worth as much as any other dropped one
        for name in names:
            rest = found[name][~masks[name]]
            assert torch.equal(rest, rest[:1].expand_as(rest))
            assert found[name][masks[name]].unique().numel() > 5
        if method == "grasp":
            return
        x = hrbp.saliency(twin, names, "synflow", batch=batch(0))
        assert all(torch.allclose(found[name], x[name], rtol=1e-9) for name in names)
        return
    loss = F.cross_entropy(twin(batch(0)[0]), batch(0)[1])
    grads = dict(zip(names, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for name in names:
        w, g = weights[name].detach().abs(), (grads[name] * masks[name]).abs()
        expected = {"magnitude": w, "snip": w * g, "magnitude+gradient": w / w.mean() + g / g.mean()}[method]
        torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", ["set", "gmp"])
def test_averages_follow_single_weights(method):
    net = sparse("unstructured", 0.3)
    optimizer = optimizer_of(net)
    evolver = hrbp.Evolver(
        net, optimizer, method, total_steps=STEPS, every=3, **({"sparsity": 0.9} if method == "gmp" else {})
    )
    average, by_hand = AveragedModel(net), {}
    for i in range(STEPS):
        step_of(net, optimizer, evolver, i)
        average.update_parameters(net)
        now = {name: layer.weight() for name, layer in sparse_layers(net).items()}
        masks = masks_of(net)
        by_hand = {n: masks[n] * (by_hand[n] + (now[n] - by_hand[n]) / (i + 1)) for n in now} if by_hand else now
    for name, layer in sparse_layers(average).items():
        torch.testing.assert_close(layer.weight(), by_hand[name], rtol=1e-9, atol=1e-12)


def test_a_file_of_another_shape_is_refused_with_both(tmp_path):
    """The same indices are blocks of either filter bank."""
    small, large = (bs.BSRPattern((8, c, 3, 3), (2, 3), [0, 1, 1, 1, 1], [0]) for c in (12, 24))
    hrbp.save(nn.Sequential(bs.BSRConv2d(large)), tmp_path / "large.pt")
    assert hrbp.load(tmp_path / "large.pt", nn.Sequential(nn.Conv2d(24, 8, 3)))[0].pattern == large
    with pytest.raises(
        ValueError, match=r"0 has a weight of shape \(8, 24, 3, 3\) in the file, and \(8, 12, 3, 3\) here"
    ):
        hrbp.load(tmp_path / "large.pt", nn.Sequential(nn.Conv2d(12, 8, 3)))
    # A file of an older version, without the shape.
    state = nn.Sequential(bs.BSRConv2d(small)).state_dict()
    del state["0.weight_shape"]
    content = {"network": None, "plan": None, "masked": {}, "state_dict": state}
    (tmp_path / "old.pt").write_bytes(hrbp.formats.sealed.sealed_bytes("model", content))
    assert hrbp.load(tmp_path / "old.pt", nn.Sequential(nn.Conv2d(12, 8, 3)))[0].pattern == small
