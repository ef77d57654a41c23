"""fuse_training: the same training as without it, on a model that stays as it is."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blocksparse as bs
import hrbp
from hrbp.layers.fused_norm import FusedNorm
from hrbp.models import build

NETWORKS = {"resnet8": 8, "resnet50": 32, "vgg19": 32, "mobilenetv2": 32}


def network(name: str = "resnet8", size: int = 8, **options) -> nn.Module:
    torch.manual_seed(0)
    net = build(name, classes=4, image_size=size, width=0.5 if name == "resnet8" else 0.125)
    return hrbp.sparsify(net, 0.7, structure="unstructured", **options).double()


def step(net: nn.Module, x: Tensor, optimizer=None, evolver=None) -> Tensor:
    loss = F.cross_entropy(net(x), torch.arange(len(x)) % 4)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        if evolver is not None:
            evolver.step()
        optimizer.zero_grad()
    return loss.detach()


def same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_as_before(name):
    net = network(name, NETWORKS[name])
    twin = copy.deepcopy(net)
    fused = hrbp.fuse_training(twin)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert (fused.fusion.norms, fused.fusion.stayed) == (norms, [])
    assert (fused.fusion.relus > 0) == (name != "mobilenetv2")  # which has ReLU6
    assert (fused.fusion.sums > 0) == (name != "vgg19")
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (net, twin)]
    for i in range(3):
        x = torch.randn(4, 3, NETWORKS[name], NETWORKS[name], dtype=torch.float64)
        x = x.contiguous(memory_format=torch.channels_last) if i == 1 else x
        losses = []
        for m, o in zip((net, fused), optimizers, strict=True):
            torch.manual_seed(i)  # dropout
            losses.append(step(m, x, o))
        torch.testing.assert_close(*losses)
    same(net, twin)
    torch.testing.assert_close(fused.eval()(x), net.eval()(x))
    assert not twin.training


class Shortcut(nn.Module):
    """A block as torchvision has it: the projection runs last, and is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.project, self.relu = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16)), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.project(x)
        return self.relu(y)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "batch_last"])
@pytest.mark.parametrize("exclude", [None, "project"])
def test_a_projection_that_runs_between_and_batch_last(last, exclude):
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    net = nn.Sequential(*stem, Shortcut(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    net = hrbp.sparsify(net, 0.5, structure="hrbp", exclude=None if exclude is None else ["4.project.0"]).double()
    twin = copy.deepcopy(net)
    fused = hrbp.fuse_training(hrbp.to_batch_last(twin) if last else twin)
    assert (fused.fusion.norms, fused.fusion.sums, fused.fusion.relus, fused.fusion.stayed) == (4, 1, 3, [])
    formats = []
    for module in fused._graph().modules():
        if isinstance(module, FusedNorm):
            module.register_forward_hook(lambda m, args, y: formats.append(bs.memory_format_of(y)))
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (net, twin)]
    for mode in (True, True, False):
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        pair = [x.clone().requires_grad_() for _ in range(2)]
        losses = [
            step(m.train(mode), t, o) for m, t, o in zip((net, fused), pair, optimizers, strict=True)
        ]  # fmt: skip
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(pair[0].grad, pair[1].grad)
        same(net, twin)
    assert len(formats) >= 4
    assert set(formats) == {"batch_last" if last else "contiguous"}


def test_masks_change_as_before():
    nets = [network(method=None) for _ in range(2)]
    fused = hrbp.fuse_training(nets[1])
    pairs = []
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        pairs.append((optimizer, hrbp.Evolver(net, optimizer, "rigl", total_steps=8, every=2, until=1.0)))
    for _ in range(8):
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        for model, (optimizer, evolver) in zip((nets[0], fused), pairs, strict=True):
            step(model, x, optimizer, evolver)
    same(*nets)


class Odd(nn.Module):
    """Sums and ReLUs in all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm2d(4).double() for _ in range(3))
        self.relu, self.drop, self.momentumless = nn.ReLU(inplace=True), 0.0, nn.BatchNorm2d(4, momentum=None).double()
        self.bare = nn.BatchNorm2d(4, affine=False, track_running_stats=False).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.relu(self.b(x * 2) + y)  # the later of two norms takes the sum
        shared = self.c(z)
        kept = shared.relu() * shared  # read twice
        other = x * 3
        other += self.momentumless(z)  # written into another
        again = F.relu(self.c(kept) + 1)  # called twice; a number is no residual
        small = self.bare(other) + x.mean((0, 2, 3), keepdim=True)  # broadcast
        return F.dropout(small + again, self.drop, self.training)


def test_graphs_of_every_kind():
    net = Odd()
    twin = copy.deepcopy(net)
    fused = hrbp.fuse_training(twin)
    assert (fused.fusion.norms, fused.fusion.sums, fused.fusion.relus) == (6, 2, 1)
    for mode in (True, False, True):
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
        pair = [x.clone().requires_grad_() for _ in range(2)]
        ys = [m.train(mode)(t) for m, t in zip((net, fused), pair, strict=True)]
        torch.testing.assert_close(*ys)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), t)[0] for y, t in zip(ys, pair, strict=True))
        )
        same(net, twin)


def test_what_changes_later_is_noticed():
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    net = Odd()
    fused = hrbp.fuse_training(net)
    before = fused(x)
    net.drop = 0.5
    torch.manual_seed(0)
    assert (fused(x) == 0).double().mean() > 0.2
    net.drop = 0.0
    seen = []
    handle = net.a.register_forward_hook(lambda *args: seen.append(1))
    fused(x)
    assert seen
    handle.remove()
    net.b = nn.Identity()
    assert not torch.allclose(fused(x), before)
    torch.testing.assert_close(fused(x), copy.deepcopy(net)(x))
    net.a.eval()  # frozen: its statistics stay
    mean = net.a.running_mean.clone()
    fused(x)
    assert torch.equal(net.a.running_mean, mean)


def test_it_is_a_wrapper():
    net = network()
    fused = hrbp.fuse_training(net)
    assert {id(p) for p in fused.parameters()} == {id(p) for p in net.parameters()}
    assert all(name.startswith("_orig_mod.") for name in fused.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    twin = copy.deepcopy(fused)
    torch.testing.assert_close(twin(x), fused(x))
    assert twin._orig_mod is not net
    file = io.BytesIO()
    pickle.dump(fused, file)
    file.seek(0)
    torch.testing.assert_close(pickle.load(file).eval()(x), fused.eval()(x))
    assert str(hrbp.summary(fused)) == str(hrbp.summary(net))
    assert str(fused.fusion).startswith("fused: ")
    net.half()  # tensors change in place
    assert fused(x.half()).dtype == torch.float16


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    net = network()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compiled = torch.compile(hrbp.fuse_training(copy.deepcopy(net)), backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


def test_what_cannot_be_fused_is_told():
    net = network()
    with pytest.raises(ValueError, match=r"fuse_training\(\): the model is a FusedTraining; it needs the model inside"):
        hrbp.fuse_training(hrbp.fuse_training(net))
    net.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"fuse_training\(\): .* has hooks on itself"):
        hrbp.fuse_training(net)

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one = nn.BatchNorm2d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = -x
            return self.norm(x)

    with pytest.raises(ValueError, match=r"fuse_training\(\): torch.fx cannot follow Asks.forward"):
        hrbp.fuse_training(Asks())
    fused = hrbp.fuse_training(nn.Sequential(Asks(), nn.BatchNorm2d(3)))
    assert fused.fusion.norms == 1
    assert {name for name, _ in fused.fusion.stayed} == {"0.norm", "0.one"}
    assert "torch.fx cannot follow it" in fused.fusion.stayed[0][1]
