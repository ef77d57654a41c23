"""STE and SR-STE: weights, masks and what is told of them, against the equations in float64."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import hrbp
from hrbp.layers.view import sparse_layers
from hrbp.methods.evolver import Evolver
from hrbp.structures.registry import structure

LR, LAMBDA = 0.05, 2e-4


class Net(nn.Module):
    """Two sparse layers between a dense stem and a dense head; the loss is all that its gradients come from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.hidden(F.softplus(self.conv(F.softplus(self.stem(x)))).mean((2, 3)))))


def sparse(method="sr-ste", name="2:4", sparsity=0.5, seed=0, dtype=torch.float64) -> Net:
    torch.manual_seed(seed)
    return hrbp.sparsify(Net().to(dtype), sparsity, structure=name, method=method)


def batch(step: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 3, 6, 6, generator=generator, dtype=dtype), torch.randint(4, (5,), generator=generator)


def keep(weight: Tensor, n: int, m: int) -> Tensor:
    """By the definition: of every m neighbouring input channels the n of largest magnitude, the first among equals."""
    runs = weight.detach().movedim(1, -1)
    order = runs.abs().reshape(-1, m).argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return mask.view(runs.shape).movedim(-1, 1)


class ByHand:
    """The equations: W~ = E * W; W <- W - lr * update(dL/dW~ + decay * (1 - E) * W), on a plain dense network."""

    def __init__(self, net: Net, kind: str, decay: float, n: int = 2, m: int = 4) -> None:
        self.net = Net().to(torch.float64)
        self.net.load_state_dict({name: t.double() for name, t in net.state_dict().items()})
        self.weights = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.sparse = [f"{name}.weight" for name in sparse_layers(net)]
        self.kind, self.decay, self.n, self.m, self.steps = kind, decay, n, m, 0
        self.first = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.second = copy.deepcopy(self.first)

    def masks(self) -> dict[str, Tensor]:
        return {name: keep(self.weights[name], self.n, self.m) for name in self.sparse}

    def gradient(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        masks = self.masks()
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(self.weights[name] * masks.get(name, 1.0))
        loss = F.cross_entropy(self.net(x.double()), y)
        return dict(zip(self.weights, torch.autograd.grad(loss, list(self.net.parameters())), strict=True))

    def step(self, *batches: tuple[Tensor, Tensor]) -> None:
        gradients = [self.gradient(*b) for b in batches]
        masks = self.masks()
        self.steps += 1
        for name, w in self.weights.items():
            g = sum(gradient[name] for gradient in gradients)
            if name in masks:
                g = g + self.decay * w * ~masks[name]
            first, second = self.first[name], self.second[name]
            if self.kind == "sgd":
                g = g + 0.01 * w
                first.mul_(0.9).add_(g)
                w -= LR * first
            else:
                w *= 1 - LR * 0.01
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.999).add_(0.001 * g * g)
                w -= LR * (first / (1 - 0.9**self.steps)) / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)


def optimizer_of(net: nn.Module, kind: str, **options) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=0.01, **options)
    return torch.optim.AdamW(net.parameters(), LR, weight_decay=0.01, **options)


def far(net: Net, hand: ByHand) -> float:
    """The largest distance of a weight from the equations', relative to the largest weight of its layer."""
    ours = dict(net.named_parameters())
    return max(float((ours[n].detach().double() - w).abs().max() / w.abs().max()) for n, w in hand.weights.items())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_weights_follow_the_equation(kind, decay):
    net = sparse()
    optimizer = optimizer_of(net, kind)
    evolver = Evolver(net, optimizer, "sr-ste", total_steps=40, every=10, decay=decay)
    hand = ByHand(net, kind, LAMBDA if decay is None else decay)
    start = hand.masks()
    for step in range(40):
        parts = [batch(2 * step), batch(2 * step + 1)] if step % 3 == 0 else [batch(2 * step)]
        for x, y in parts:
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        evolver.step()
        optimizer.zero_grad()
        hand.step(*parts)
        assert far(net, hand) < 1e-9, step
    moved = sum(int((hand.masks()[name] != start[name]).sum()) for name in start)
    assert moved > 0
    undecayed = ByHand(sparse(), kind, 0.0)
    for step in range(40):
        undecayed.step(*([batch(2 * step), batch(2 * step + 1)] if step % 3 == 0 else [batch(2 * step)]))
    assert far(net, undecayed) > 1e-7


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_ste_does_not_decay(kind):
    net = sparse("ste")
    optimizer, hand = optimizer_of(net, kind), ByHand(net, kind, 0.0)
    evolver = Evolver(net, optimizer, "ste", total_steps=30)
    for step in range(30):
        F.cross_entropy(net(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        evolver.step()
        optimizer.zero_grad()
        hand.step(batch(step))
    assert far(net, hand) < 1e-9
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_the_decay_is_added_to_unscaled_gradients_and_not_to_skipped_steps(kind, fused, unscale_first):
    decay = 0.3
    net = sparse(dtype=torch.float32)
    optimizer = optimizer_of(net, kind, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    evolver, hand = Evolver(net, optimizer, "sr-ste", total_steps=30, decay=decay), ByHand(net, kind, decay)
    skipped = 0
    for step in range(33):
        x, y = batch(step, torch.float32)
        loss = F.cross_entropy(net(x), y)
        overflows = step in (4, 17, 18)
        scaler.scale(loss * math.inf if overflows else loss).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        before = [p.detach().clone() for p in net.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        evolver.step()
        if overflows:
            assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
            skipped += 1
        else:
            hand.step((x, y))
        assert far(net, hand) < 2e-4, step
    assert skipped == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype):
    """The masks are those of the float32 weights, and the decay has their precision."""
    net = sparse(dtype=torch.float32)
    optimizer, hand = optimizer_of(net, "sgd"), ByHand(net, "sgd", 0.3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    evolver = Evolver(net, optimizer, "sr-ste", total_steps=30, decay=0.3)
    for step in range(30):
        x, y = batch(step, torch.float32)
        with torch.autocast("cpu", dtype):
            logits = net(x)
        scaler.scale(F.cross_entropy(logits.float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        evolver.step()
        hand.step((x, y))
    assert far(net, hand) < 0.02
    for name, layer in sparse_layers(net).items():
        dropped = ~layer.mask().view(layer.parameter.shape) & ~hand.masks()[f"{name}.weight"]
        ours, theirs = layer.parameter.detach()[dropped].double(), hand.weights[f"{name}.weight"][dropped]
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@settings(max_examples=60)
@given(st.data())
def test_exactly_n_of_m_stay(data):
    m = data.draw(st.sampled_from([1, 2, 3, 4, 8, 16, 20, 32]))
    n = data.draw(st.integers(1, m))
    runs, taps = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([(1, 1), (3, 2)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    weight = torch.randn(4, m * runs, *taps, generator=generator)
    if data.draw(st.booleans()):
        weight = (weight * 2).round()  # ties, and zeros
    layer = nn.Conv2d(m * runs, 4, taps)
    with torch.no_grad():
        layer.weight.copy_(weight)
    model = hrbp.sparsify(nn.Sequential(layer), 1 - n / m, structure=f"{n}:{m}", method="ste", include=["0"])
    mask = sparse_layers(model)["0"].mask()
    assert (mask.view(4, runs, m, -1).sum(2) == n).all()
    assert torch.equal(mask, keep(weight, n, m))
    assert torch.equal(mask, structure("n:m", m=m).choose(weight.abs(), 1 - n / m).mask)


@pytest.mark.parametrize(("method", "name", "sparsity"), [("sr-ste", "2:4", 0.5), ("ste", "unstructured", 0.7)])
def test_what_is_told_is_counted_by_hand(method, name, sparsity):
    net = sparse(method, name, sparsity)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    evolver = Evolver(net, optimizer, method, total_steps=12, every=3)
    layers = sparse_layers(net)
    start = before = {n: layer.mask() for n, layer in layers.items()}
    told = []
    for step in range(1, 13):
        F.cross_entropy(net(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        update = evolver.step()
        assert (update is not None) == (step % 3 == 0)
        if update is None:
            continue
        now = {n: layer.mask() for n, layer in layers.items()}
        assert update.step == step
        assert not update.reallocated
        for n in layers:
            assert update.sad[n] == int((now[n] != before[n]).sum())
            assert update.drift[n] == int((now[n] != start[n]).sum())
            assert update.changed[n] == int((now[n] & ~before[n]).sum()) / int(now[n].sum())
        before = now
        told.append(update)
    assert sum(told[-1].drift.values()) > 0
    assert [sum(u.sad.values()) for u in told] != [sum(u.drift.values()) for u in told]


def test_exchanges_tell_the_same():
    """SET moves a known number of weights; each is two cells of the difference."""
    torch.manual_seed(0)
    net = hrbp.sparsify(Net(), 0.5, structure="unstructured", distribution="uniform")
    evolver = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "set", total_steps=10, every=1, until=1.0)
    start = before = {n: layer.mask() for n, layer in sparse_layers(net).items()}
    for _ in range(3):
        update = evolver.step()
        for n, layer in sparse_layers(net).items():
            assert update.sad[n] == int((layer.mask() ^ before[n]).sum())
            assert update.drift[n] == int((layer.mask() ^ start[n]).sum())
            assert update.sad[n] == round(2 * update.changed[n] * int(layer.mask().sum())) > 0
        before = {n: layer.mask() for n, layer in sparse_layers(net).items()}


def test_resuming_repeats_every_bit():
    def run(resume_at: int | None) -> tuple[dict[str, Tensor], list]:
        net = sparse()
        optimizer = optimizer_of(net, "adamw")
        evolver, told = Evolver(net, optimizer, "sr-ste", total_steps=20, every=2, decay=0.2), []
        for step in range(20):
            if step == resume_at:
                saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), evolver.state_dict()))
                net = sparse(seed=9)
                optimizer = optimizer_of(net, "adamw")
                evolver = Evolver(net, optimizer, "sr-ste", total_steps=20, every=2, decay=0.2)
                for part, state in zip((net, optimizer, evolver), saved, strict=True):
                    part.load_state_dict(state)
            F.cross_entropy(net(batch(step)[0]), batch(step)[1]).backward()
            optimizer.step()
            told.append(evolver.step())
            optimizer.zero_grad()
        return net.state_dict(), told

    whole, told = run(None)
    for at in (5, 8):
        again, retold = run(at)
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert retold == told


def test_a_model_decays_once_and_as_long_as_its_evolver():
    net = sparse()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    weight, mask = net.conv.weight, sparse_layers(net)["conv"].mask()
    before = weight.detach().clone()

    def stepped() -> Tensor:
        with torch.no_grad():
            weight.copy_(before)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return weight.detach().clone()

    expected = before - 0.25 * before * ~mask
    first = Evolver(net, optimizer, "sr-ste", total_steps=5, decay=0.25)
    assert torch.equal(stepped(), expected)
    again = Evolver(net, optimizer, "sr-ste", total_steps=5, decay=0.25)
    assert torch.equal(stepped(), expected)
    other = sparse(seed=1)  # another model's does not end this one's
    optimizer.add_param_group({"params": list(other.parameters())})
    theirs = Evolver(other, optimizer, "sr-ste", total_steps=5, decay=0.25)
    assert torch.equal(stepped(), expected)
    del first, again
    gc.collect()
    assert torch.equal(stepped(), before)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    del theirs
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks


def test_layers_without_gradients_are_left_alone_and_closures_refused():
    net = sparse()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    evolver = Evolver(net, optimizer, "sr-ste", total_steps=5, decay=0.25)
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(closure\): gradients that a closure computes come"):
            call()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert evolver.step() is None


def test_averaged_copies_have_the_masks_of_their_own_weights():
    net = sparse()
    average = AveragedModel(net, avg_fn=lambda a, b, _: 0.9 * a + 0.1 * b)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    evolver = Evolver(net, optimizer, "sr-ste", total_steps=10, every=1, ema=[average])
    for step in range(6):
        F.cross_entropy(net(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        evolver.step()
        average.update_parameters(net)
    for layer in sparse_layers(average).values():
        assert torch.equal(layer.mask().view(layer.parameter.shape), keep(layer.parameter.detach(), 2, 4))


def test_asp_is_one_shot_magnitude_and_a_mask_that_stays():
    torch.manual_seed(0)
    net = Net()
    trained = copy.deepcopy(net.state_dict())
    hrbp.sparsify(net, 0.5, structure="2:4", saliency="magnitude")
    optimizer = optimizer_of(net, "sgd")
    masks = {name: layer.mask() for name, layer in sparse_layers(net).items()}
    for name, mask in masks.items():
        weight = trained[f"{name}.weight"]
        assert torch.equal(mask.view(weight.shape), keep(weight, 2, 4))
        assert torch.equal(sparse_layers(net)[name].weight().view(weight.shape), weight * keep(weight, 2, 4))
    for step in range(5):
        F.cross_entropy(net(batch(step, torch.float32)[0]), batch(step)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in sparse_layers(net).items():
        assert torch.equal(layer.weight() != 0, masks[name])
        assert not torch.equal(layer.weight(), trained[f"{name}.weight"].view(layer.shape) * masks[name])


def test_refusals():
    net = sparse()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for arguments, message in [
        ({"method": "ste"}, "method is 'ste' and the model was made by .* method='sr-ste'; they need the same"),
        ({"method": "static"}, "method is 'static' and the model was made by"),
        ({"method": "sr-ste", "decay": math.inf}, "decay is inf; it needs a finite number"),
        ({"method": "sr-ste", "decay": math.nan}, "decay is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            Evolver(net, optimizer, total_steps=10, **arguments)
    assert not optimizer._optimizer_step_pre_hooks
    plain = hrbp.sparsify(Net(), 0.5, structure="2:4")
    with pytest.raises(ValueError, match=r"method is 'sr-ste' and the model was .* without a method"):
        Evolver(plain, torch.optim.SGD(plain.parameters(), 0.1), "sr-ste", total_steps=10)
    one = Evolver(net, optimizer, "sr-ste", total_steps=5)
    with pytest.raises(ValueError, match="the state is of method 'ste'; this is 'sr-ste'"):
        one.load_state_dict({"method": "ste"})
