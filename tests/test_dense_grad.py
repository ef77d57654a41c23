"""Dense gradients are those of the dense network, whatever runs the layers; RigL trains networks that skip layers."""

from __future__ import annotations

import copy
import inspect
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import hrbp
from hrbp.layers.view import sparse_layers
from hrbp.methods.evolver import Evolver

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")

STRUCTURES = [("hrbp", {"groups": 2}), ("unstructured", {})]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.wide = nn.Linear(16, 32)
        self.deep = nn.Linear(32, 16, bias=False)
        self.act, self.swish = nn.ReLU(inplace=True), nn.Hardswish(inplace=True)


class Inplace(Net):
    """As vgg16's and mobilenet_v3's ends: activations in place, right after layers; and on a sequence of vectors."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)).flatten(2).transpose(1, 2)
        return self.swish(self.deep(self.act(self.wide(x)).mean(1)))


class Keyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        name = list(inspect.signature(type(self.conv).forward).parameters)[1]
        x = self.conv(**{name: x}).relu().mean((2, 3))
        return self.deep(self.wide(x).relu())


class Twice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        x = self.deep(self.deep(x).relu()).relu()
        return self.wide(x)


class Checkpointed(Net):
    reentrant = False

    def part(self, x: Tensor) -> Tensor:
        return self.act(self.wide(self.act(self.conv(x)).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.part, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        return self.deep(x)


class Reentrant(Checkpointed):
    reentrant = True


class Unbatched(Net):
    def forward(self, x: Tensor) -> Tensor:
        maps = [self.conv(image) for image in x] if not hasattr(self.conv, "values") else self.conv(x).unbind()
        return self.deep(torch.stack([self.wide(m.relu().mean((1, 2))) for m in maps]).relu())


NETWORKS = [Inplace, Keyword, Twice, Checkpointed, Reentrant, Unbatched]


def made(kind: type[nn.Module], structure: str = "hrbp", dtype=torch.float64, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    names = [name for name, m in kind().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    torch.manual_seed(seed)
    return hrbp.sparsify(kind().to(dtype), 0.5, structure=structure, include=names, **options)


def images(seed: int = 0) -> Tensor:
    return torch.randn(5, 8, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(y: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return ((y * weight).sin()).sum()


def expected(net: nn.Module, *seeds: int) -> dict[str, Tensor]:
    """|dL/dW| of all weights by autograd on the dense twin."""
    twin = hrbp.densify(copy.deepcopy(net))
    twin.zero_grad()
    for seed in seeds or (0,):
        loss(twin(images(seed))).backward()
    return {
        name: twin.get_submodule(name).weight.grad.view(layer.shape).abs() for name, layer in sparse_layers(net).items()
    }


def due(net: nn.Module, method: str = "rigl", **options) -> Evolver:
    return Evolver(net, torch.optim.SGD(net.parameters(), 0.1), method, total_steps=100, every=1, **options)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert float(grad.max()) > 0
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=rtol * float(grad.max()))


@pytest.mark.parametrize(("structure", "options"), STRUCTURES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_dense_gradients_are_those_of_the_dense_network(kind, structure, options):
    net = made(kind, structure, **options)
    evolver = due(net)
    wanted = expected(net, 1, 2)
    for seed in (1, 2):
        loss(net(images(seed))).backward()
    close(evolver._gathered(), wanted)
    plain = copy.deepcopy(net)  # parameters get what they would without anybody looking
    plain.zero_grad()
    for seed in (1, 2):
        loss(plain(images(seed))).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert evolver.step().step == 1


def test_autograd_grad_gathers_them_too():
    net = made(Inplace, groups=2)
    evolver, wanted = due(net), expected(net)
    torch.autograd.grad(loss(net(images())), list(net.parameters()))
    close(evolver._gathered(), wanted)


def test_a_scaled_loss_in_mixed_precision():
    net = made(Inplace, dtype=torch.float32, groups=2)
    wanted = {n: g.float() for n, g in expected(copy.deepcopy(net).double()).items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    evolver = Evolver(net, optimizer, "rigl", total_steps=100, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.autocast("cpu", torch.float16):
        y = net(images().float())
    scaler.scale(loss(y.float())).backward()
    for name, grad in evolver._gathered().items():
        assert grad.dtype == torch.float32
        assert (grad / 8 - wanted[name]).norm() < 0.05 * wanted[name].norm()
    scaler.step(optimizer)
    scaler.update()
    assert evolver.step() is not None


# ---------------------------------------------------------------------- compiled


def compiled(net: nn.Module, backend: str):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(net, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize(("structure", "options"), STRUCTURES)
@pytest.mark.parametrize("kind", [Inplace, Twice])
def test_a_compiled_model_is_compiled_once_more_and_computes_the_same(kind, structure, options):
    steps, runs = 8, []
    for compile_it in (True, False):
        net = made(kind, structure, **options)
        run, counter = compiled(net, "aot_eager") if compile_it else (net, None)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        evolver = Evolver(net, optimizer, "rigl", total_steps=steps, every=2, until=1.0)
        graphs, changed = [], 0.0
        for step in range(steps):
            for part in (0, 1):
                loss(run(images(2 * step + part))).backward()
            optimizer.step()
            update = evolver.step()
            optimizer.zero_grad()
            changed += sum(update.changed.values()) if update else 0.0
            graphs.append(counter.frame_count if compile_it else 0)
        assert changed > 0
        assert graphs == ([1, *[2] * (steps - 1)] if compile_it else [0] * steps)
        runs.append(net.state_dict())
    for name, t in runs[0].items():
        torch.testing.assert_close(t, runs[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_model_compiled_by_parts_and_before_its_evolver():
    net = made(Inplace, groups=2)
    torch._dynamo.reset()
    net.wide.compile(backend="aot_eager")
    net.conv = torch.compile(net.conv, backend="aot_eager")
    loss(net(images())).backward()
    net.zero_grad()
    plain = copy.deepcopy(made(Inplace, groups=2))
    evolver = due(net)
    loss(net(images())).backward()
    found = {name.replace("._orig_mod", ""): grad for name, grad in evolver._gathered().items()}
    close(found, expected(plain))


# ---------------------------------------------------------------------- what is watched, and for how long


def test_copies_and_files_of_a_watched_model_are_not_watched():
    net = made(Inplace, groups=2)
    evolver = due(net)
    copied, buffer = copy.deepcopy(net), io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(other(images()), net(images()))
        loss(other(images())).backward()
    with pytest.raises(RuntimeError, match="no dense gradient"):
        evolver._gathered()
    before = copied.conv.bias.detach().clone()
    with torch.no_grad():
        net.conv.bias.add_(1.0)  # a copy computes with its own parameters
    assert torch.equal(copied.conv.bias, before)
    assert not torch.equal(copied(images()), net(images()))


def test_a_forward_of_the_modules_own_is_run_and_put_back():
    net = made(Inplace, groups=2)
    called, plain = [], net.conv.forward

    def own(x: Tensor) -> Tensor:
        called.append(1)
        return plain(x)

    net.conv.forward = own
    evolver = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=100, every=2)
    for _ in range(2):
        loss(net(images())).backward()
        last = evolver.step()
    assert last.step == 2
    assert len(called) == 2
    assert net.conv.forward is own
    assert not any("forward" in m.__dict__ for m in (net.wide, net.deep))


def test_a_watcher_ends_with_its_evolver_and_when_there_is_a_new_one():
    net = made(Inplace, groups=2)
    first = due(net)
    second = due(net)
    loss(net(images())).backward()
    with pytest.raises(RuntimeError, match="no dense gradient"):
        first._gathered()
    assert second.step() is not None
    del first
    assert "forward" in net.conv.__dict__
    del second
    assert not any("forward" in m.__dict__ for m in net.modules())


# ---------------------------------------------------------------------- layers without a gradient


class Skipping(nn.Module):
    """Stochastic depth: a step runs some of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16, 4)
        self.runs = (0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for i in self.runs:
            x = x + F.relu(self.blocks[i](x), inplace=True)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["rigl", "hrbp"])
def test_a_layer_that_was_skipped_keeps_its_mask(method):
    torch.manual_seed(0)
    net = hrbp.sparsify(Skipping().double(), 0.8, structure="hrbp", groups=2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    evolver = Evolver(net, optimizer, method, total_steps=100, every=1, drop=1.0)
    layers = sparse_layers(net)
    moved = dict.fromkeys(layers, 0.0)
    for step, runs in enumerate([(0, 2), (1,), (0, 1, 2), (2,)]):
        net.runs = runs
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        net(x).square().sum().backward()
        optimizer.step()
        before = {name: (layer.mask(), layer.weight()) for name, layer in layers.items()}
        update = evolver.step()
        optimizer.zero_grad()
        assert update.changed.keys() == layers.keys()
        for i, name in enumerate(layers):
            moved[name] += update.changed[name]
            if i not in runs:
                assert update.changed[name] == 0
                assert all(map(torch.equal, (layers[name].mask(), layers[name].weight()), before[name]))
    assert method == "hrbp" or min(moved.values()) > 0


def test_frozen_layers_are_not_watched():
    net = made(Inplace, groups=2)
    net.wide.requires_grad_(False)
    evolver = due(net)
    loss(net(images())).backward()
    assert list(evolver._gathered()) == ["conv", "deep"]
    assert not math.isnan(evolver.step().changed["wide"])
