"""SUBP in training: counts of every update, weights against the equations in float64, what stops and continues."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel

import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.methods.evolver import Evolver
from hrbp.methods.subp import PACES
from test_subp import slow_scores

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")

LR, WEIGHT_DECAY, LAMBDA = 0.1, 0.01, 2e-4


class Net(nn.Module):
    """Sparse layers of 3x3, strided 1x1 and linear between a dense stem and a dense head; no gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.three = nn.Conv2d(10, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 8, 1, stride=2, bias=False)
        self.hidden = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(F.softplus(self.three(F.softplus(self.stem(x)))))
        return self.head(F.softplus(self.hidden(F.softplus(x).mean((2, 3)))))


def sparse(sparsity: float = 0.7, seed: int = 0, dtype=torch.float64, n: int = 4, **options) -> Net:
    torch.manual_seed(seed)
    return hrbp.sparsify(Net().to(dtype), sparsity, structure="1xn", n=n, method="subp", seed=seed, **options)


def batch(step: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 3, 6, 6, generator=generator, dtype=dtype), torch.randint(4, (5,), generator=generator)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=WEIGHT_DECAY)


def train(net: Net, optimizer, evolver: Evolver, step: int):
    x, y = batch(step, net.head.weight.dtype)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return evolver.step()


def blocks(net: Net, name: str) -> Tensor:
    """bool [K/n, C]: the blocks that take part; the mask is made of them."""
    layer = sparse_layers(net)[name]
    n, order = record_of(net).structure.box[0], layer.row_order()
    mask = layer.mask() if order is None else layer.mask()[order]
    k, c, r, s = mask.shape
    cells = mask.view(k // n, n, c, r * s)
    kept = cells[:, 0, :, 0]
    assert torch.equal(cells, kept[:, None, :, None].expand_as(cells))
    return kept


def share(pace: str, epoch: float, begin: float, end: float) -> float:
    x = min(1.0, max(0.0, (epoch - begin) / (end - begin)))
    return {
        "cubic": x * x * x,
        "linear": x,
        "cosine": 1 - math.cos(x * math.pi / 2),
        "exponential": (1 - math.exp(-0.05 * (end - begin) * x)) / (1 - math.exp(-0.05 * (end - begin))),
    }[pace]


# ---------------------------------------------------------------------- counts, and what is kept


@settings(max_examples=15)
@given(
    st.sampled_from(list(PACES)), st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9]), st.sampled_from([0.0, 0.25]),
    st.sampled_from(["l1", "bpar"]), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_every_row_keeps_what_the_formula_says(pace, sparsity, begin, score, rearrange, seed):
    net = sparse(sparsity, seed, rearrange=rearrange, saliency="magnitude")
    assert record_of(net).dense.keys() == {"stem", "head"}
    optimizer = sgd(net)
    evolver = Evolver(
        net, optimizer, "subp", total_steps=16, every=2, until=0.75, seed=seed, score=score, pace=pace, begin=begin
    )
    channels = {"three": 10, "one": 16, "hidden": 8}
    orders = {name: layer.row_order() for name, layer in sparse_layers(net).items()}
    assert all((order is None) != rearrange for order in orders.values())
    before = {name: blocks(net, name) for name in channels}
    assert all(bool(live.all()) for live in before.values())
    for step in range(1, 17):
        update = train(net, optimizer, evolver, step)
        now = {name: blocks(net, name) for name in channels}
        assert (update is not None) == (step in (2, 4, 6, 8, 10, 12))
        if update is None:
            assert all(torch.equal(now[name], before[name]) for name in channels)
            continue
        p = sparsity * share(pace, step / 2, begin * 8, 6) if step < 12 else sparsity
        for name, c in channels.items():
            dropped, back = int(sparsity * c), int((sparsity - p) * c)
            assert now[name].sum(1).tolist() == [c - dropped + back] * len(now[name])
            layer, order = sparse_layers(net)[name], orders[name]
            weight = layer.parameter.detach().view(layer.shape)
            worth = slow_scores(weight if order is None else weight[order], 4, score, 1.0)
            for row, scores in zip(now[name], worth, strict=True):
                assert row[sorted(range(c), key=lambda i: -scores[i])[: c - dropped]].all()
            assert order is None or torch.equal(layer.row_order(), order)
        assert update.reallocated == any(now[name].sum() != before[name].sum() for name in channels)
        before = now
    assert hrbp.summary(net).sparsity == pytest.approx(
        sum(int(sparsity * c) / c * m for c, m in ((10, 1440), (16, 128), (8, 96))) / 1664
    )


def test_dropped_blocks_come_back_by_their_weight():
    """What is dropped learns on: when it has grown, it is kept; and until then it may be drawn."""
    net = sparse(0.5)
    still = torch.optim.SGD(net.parameters(), 0.0)
    evolver = Evolver(net, still, "subp", total_steps=8, every=1, until=1.0, pace="linear")
    seen = torch.zeros(4, 10, dtype=torch.bool)
    for _ in range(8):
        before = blocks(net, "three")
        evolver.step()
        seen |= blocks(net, "three") & ~before
    assert seen.any()
    gone = (~blocks(net, "three")[0]).nonzero()[0]
    again = Evolver(net, still, "subp", total_steps=1, every=1)
    with torch.no_grad():
        net.three.weight[:4, gone] += 100 * torch.randn(4, 1, 3, 3, dtype=torch.float64)
    again.step()
    assert blocks(net, "three")[0, gone].all()


def test_draws_depend_on_the_seed_the_step_and_the_layer():
    def drawn(seed: int) -> list[Tensor]:
        net = nn.Sequential(*(nn.Conv2d(12, 12, 1) for _ in range(4)))
        with torch.no_grad():
            for layer in net:
                layer.weight.copy_(torch.randn(12, 12, 1, 1, generator=torch.Generator().manual_seed(0)))
        hrbp.sparsify(net, 0.75, structure="1xn", n=4, method="subp")
        still = torch.optim.SGD(net.parameters(), 0.0)
        evolver = Evolver(net, still, "subp", total_steps=100, every=1, pace="linear", seed=seed)
        found = []
        for _ in range(40):
            evolver.step()
            found += [layer.mask() for layer in sparse_layers(net).values()]
        return found[-4:]

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[1])


# ---------------------------------------------------------------------- weights


class ByHand:
    """y = f(m * W); W <- W - lr * (momentum of dL/d(m * W) + lambda * (1 - m) * W + weight decay), all dense."""

    def __init__(self, net: Net, decay: float) -> None:
        self.net = Net().double()
        self.weights = {name: p.detach().clone().double() for name, p in net.named_parameters()}
        self.momentum = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.decay = decay

    def step(self, masks: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(self.weights[name] * masks.get(name, 1.0))
        loss = F.cross_entropy(self.net(x), y)
        gradients = torch.autograd.grad(loss, list(self.net.parameters()))
        for (name, w), g in zip(self.weights.items(), gradients, strict=True):
            left_out = (1 - masks[name].double()) * w if name in masks else torch.zeros_like(w)
            total = g + self.decay * left_out + WEIGHT_DECAY * w
            self.momentum[name] = 0.9 * self.momentum[name] + total
            self.weights[name] = w - LR * self.momentum[name]


@pytest.mark.parametrize(("decay", "rearrange", "n"), [(None, False, 4), (0.2, True, 4), (0.2, False, 2)])
def test_weights_follow_the_equations_over_updates(decay, rearrange, n):
    net = sparse(0.7, rearrange=rearrange, saliency="magnitude", n=n)
    optimizer = sgd(net)
    evolver = Evolver(net, optimizer, "subp", total_steps=40, every=4, decay=decay, pace="linear")
    hand = ByHand(net, LAMBDA if decay is None else decay)
    layers = sparse_layers(net)
    assert all(layer.blocksize for layer in layers.values())
    sizes = []
    for step in range(40):
        masks = {f"{name}.weight": layer.mask().view(layer.parameter.shape) for name, layer in layers.items()}
        sizes.append(sum(int(mask.sum()) for mask in masks.values()))
        hand.step(masks, *batch(step))
        train(net, optimizer, evolver, step)
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), hand.weights[name], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(
                optimizer.state[p]["momentum_buffer"], hand.momentum[name], rtol=1e-8, atol=1e-11
            )
    assert len(set(sizes)) >= 6
    assert sizes == sorted(sizes, reverse=True)


def test_what_runs_is_the_live_blocks():
    """Weights that take no part may be anything; their gradient is that of a dense layer."""
    net = sparse(0.75)
    evolver = Evolver(net, sgd(net), "subp", total_steps=1, every=1)
    evolver.step()
    x, _ = batch(0)
    expected = net(x)
    with torch.no_grad():
        for layer in sparse_layers(net).values():
            assert layer.module.values.shape[0] == layer.module.nnzb < layer.parameter.numel() / 4
            layer.parameter[~layer.mask().view(layer.parameter.shape)] = math.nan
    assert torch.equal(net(x), expected)
    net(x).square().sum().backward()
    for layer in sparse_layers(net).values():
        assert torch.isfinite(layer.parameter.grad).all()
        assert (layer.parameter.grad[layer.parameter.isnan()] != 0).any()


# ---------------------------------------------------------------------- stopping, averaging, compiling, leaving


def test_resuming_repeats_every_bit():
    def run(resume_at: int | None) -> tuple[dict[str, Tensor], list]:
        net = sparse()
        optimizer = sgd(net)
        evolver, told = Evolver(net, optimizer, "subp", total_steps=24, every=3, decay=0.1, seed=5), []
        for step in range(24):
            if step == resume_at:
                saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), evolver.state_dict()))
                net = sparse(seed=9)
                optimizer = sgd(net)
                evolver = Evolver(net, optimizer, "subp", total_steps=24, every=3, decay=0.1, seed=5)
                for part, state in zip((net, optimizer, evolver), saved, strict=True):
                    part.load_state_dict(state)
            told.append(train(net, optimizer, evolver, step))
        return net.state_dict(), told

    whole, told = run(None)
    for at in (7, 12, 22):
        again, retold = run(at)
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert retold == told


def test_averaged_models_follow():
    net = sparse(dtype=torch.float32)
    average = AveragedModel(net)
    optimizer = sgd(net)
    evolver = Evolver(net, optimizer, "subp", total_steps=10, every=1, ema=[average])
    mean = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(8):
        train(net, optimizer, evolver, step)
        average.update_parameters(net)
        for name, p in net.named_parameters():
            mean[name] = p.detach().clone() if step == 0 else mean[name] + (p.detach() - mean[name]) / (step + 1)
    for name, layer in sparse_layers(average).items():
        assert torch.equal(layer.mask(), sparse_layers(net)[name].mask())
        torch.testing.assert_close(layer.parameter.detach(), mean[f"{name}.weight"], rtol=1e-4, atol=1e-6)
    x, _ = batch(0, torch.float32)
    torch.testing.assert_close(average(x), hrbp.densify(copy.deepcopy(average.module))(x))


def test_compiled_models_are_recompiled_when_blocks_go():
    net = sparse(0.5, dtype=torch.float32)
    counter = CompileCounter()
    run = torch.compile(net, backend=counter)
    evolver = Evolver(net, sgd(net), "subp", total_steps=6, every=1, pace="linear")
    x, _ = batch(0, torch.float32)
    compiled = []
    for _ in range(6):
        update = evolver.step()
        before = counter.frame_count
        torch.testing.assert_close(run(x), net(x))
        compiled.append((update is not None and update.reallocated, counter.frame_count > before))
    assert (True, True) in compiled
    assert (True, False) not in compiled


def test_files_and_release(tmp_path):
    net = sparse(0.7, dtype=torch.float32, rearrange=True, saliency="magnitude")
    optimizer = sgd(net)
    evolver = Evolver(net, optimizer, "subp", total_steps=8, every=2)
    for step in range(5):
        train(net, optimizer, evolver, step)
    hrbp.save(net, tmp_path / "model.pt")
    again = hrbp.load(tmp_path / "model.pt", Net())
    assert record_of(again) == record_of(net)
    assert record_of(again).target == dict.fromkeys(("three", "one", "hidden"), 0.7)
    x, _ = batch(0, torch.float32)
    assert torch.equal(again(x), net(x))
    assert "the sparse layers end 69.47% sparse" in str(hrbp.summary(net))
    for step in range(5, 8):
        train(net, optimizer, evolver, step)
    expected = net(x)
    released = hrbp.release(net)
    assert not any("subp" in note for note in hrbp.summary(released).notes)
    assert not record_of(released).target
    torch.testing.assert_close(released(x), expected)
    assert hrbp.summary(released).sparsity == pytest.approx(0.6947, abs=1e-4)
    for name in ("three", "one", "hidden"):
        module = released.get_submodule(name)
        assert module.pattern.blocksize == (4, 1)
        assert len(set(module.pattern.indptr.diff().tolist())) == 1


def test_densities_may_differ_between_layers():
    """The paper's is one sparsity for all layers, which is the default."""
    for distribution in (None, "uniform"):
        plan = record_of(sparse(0.3, distribution=distribution))
        assert (plan.distribution, set(plan.target.values())) == ("uniform", {0.3})
    net = sparse(0.8, distribution="erk")
    target = record_of(net).target
    assert len(set(target.values())) > 1
    sizes = {"three": 1440, "one": 128, "hidden": 96}
    assert sum(target[name] * size for name, size in sizes.items()) == pytest.approx(0.8 * 1664)
    evolver = Evolver(net, sgd(net), "subp", total_steps=1, every=1)
    evolver.step()
    for name, c in (("three", 10), ("one", 16), ("hidden", 8)):
        assert set(blocks(net, name).sum(1).tolist()) == {c - int(target[name] * c)}


def test_mobilenets_keep_depthwise_layers_dense():
    net = hrbp.models.build("mobilenetv1", classes=10, width=0.25)
    hrbp.sparsify(net, 0.5, structure="1xn", n=32, method="subp")
    dense = record_of(net).dense
    depthwise = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise
    assert all(dense[name] == "depthwise" for name in depthwise)
    assert any(reason == "1xn: grains of 32 do not divide K = 16" for reason in dense.values())
    assert all(layer.shape[0] % 32 == 0 for layer in sparse_layers(net).values())


def test_refusals():
    with pytest.raises(ValueError, match="'subp' trains uniform 1xn blocks; it needs structure '1xn' with uniform"):
        hrbp.sparsify(Net(), 0.5, structure="1xn", n=4, uniform=False, method="subp")
    net = sparse()
    optimizer = sgd(net)
    for arguments, kind, message in [
        ({"score": "best"}, ValueError, "score is 'best'; it needs one of bpar, l1"),
        ({"pace": "slow"}, ValueError, "pace is 'slow'; it needs one of cubic, linear, cosine, exponential"),
        ({"tau": 0.0}, ValueError, r"tau is 0\.0; it needs a number > 0"),
        ({"alpha": -1.0}, ValueError, r"alpha is -1\.0; it needs a number >= 0"),
        ({"begin": 1.5}, ValueError, r"begin is 1\.5; it needs a number in \[0, 1\]"),
        ({"begin": 0.9}, ValueError, r"begin is 0\.9 and until 0\.75; it needs begin <= until"),
        ({"every": 6}, ValueError, r"reaches its sparsity at step 12, .* one of the 10 steps: lower until or every"),
        ({"sparsity": 0.9}, TypeError, "method 'subp' has no option sparsity; it takes: every, until, decay, seed, sc"),
        ({"temperature": 2}, TypeError, "method 'subp' has no option temperature; it takes: every, until, decay, seed"),
    ]:
        with pytest.raises(kind, match=message):
            Evolver(net, optimizer, "subp", **{"total_steps": 10, "every": 2, **arguments})
    plain = hrbp.sparsify(Net(), 0.5, structure="1xn", n=4, uniform=True)
    with pytest.raises(ValueError, match=r"method is 'subp' and the model was made by sparsify\(\) without a method"):
        Evolver(plain, sgd(plain), "subp", total_steps=10, every=1)
    with pytest.raises(TypeError, match="method 'set' has no option tau; it takes: every, drop, until, seed"):
        Evolver(plain, sgd(plain), "set", total_steps=10, tau=1.0)
    with torch.no_grad():
        net.one.weight[0, 0] = math.nan
    evolver = Evolver(net, optimizer, "subp", total_steps=10, every=1)
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        evolver.step()
