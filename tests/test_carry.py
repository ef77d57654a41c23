"""What users put on a layer is on the layer that takes its place: hooks, attributes, modes; or the layer stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import blocksparse as bs
import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.training.devices import process_group

STRUCTURES = {"blocks": {"structure": "1xn", "n": 4}, "mask": {"structure": "kernel"}}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16), nn.Linear(16, 4)
    )


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


class Log(list):
    """Hooks of every kind on a layer; each notes its kind and the class of its module."""

    def __init__(self, layer: nn.Module) -> None:
        def note(kind: str):
            return lambda module, *rest, **options: self.append((kind, type(module).__name__))

        self.handles = [
            layer.register_forward_pre_hook(note("pre")),
            layer.register_forward_pre_hook(note("pre with kwargs"), with_kwargs=True),
            layer.register_forward_hook(note("forward")),
            layer.register_forward_hook(note("forward with kwargs"), with_kwargs=True, always_call=True),
            layer.register_full_backward_pre_hook(note("backward pre")),
            layer.register_full_backward_hook(note("backward")),
        ]

    def kinds(self, net: nn.Module) -> set[tuple[str, str]]:
        self.clear()
        net(images()).sum().backward()
        assert len(self) == len(set(self))
        return set(self)


KINDS = {"pre", "pre with kwargs", "forward", "forward with kwargs", "backward pre", "backward"}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_hooks_run_on_and_their_handles_remove_them(kind):
    net = model()
    logs = {at: Log(net[at]) for at in (1, 4)}
    classes = {1: ("BSRConv2d", "Conv2d"), 4: ("BSRLinear", "Linear")}
    hrbp.sparsify(net, 0.5, **STRUCTURES[kind])
    for at, log in logs.items():
        assert log.kinds(net) == {(k, classes[at][0]) for k in KINDS}
    hrbp.densify(net)
    for at, log in logs.items():
        assert log.kinds(net) == {(k, classes[at][1]) for k in KINDS}
        log.handles[0].remove()
        assert log.kinds(net) == {(k, classes[at][1]) for k in KINDS - {"pre"}}
        for handle in log.handles:
            handle.remove()
        assert log.kinds(net) == set()


def test_hooks_survive_release_and_files(tmp_path):
    net = model()
    log = Log(net[1])
    hrbp.sparsify(net, 0.5, structure="1xn", n=4, method="subp")
    assert log.kinds(net) == {(k, "MasterConv2d") for k in KINDS}
    hrbp.release(net)
    assert log.kinds(net) == {(k, "BSRConv2d") for k in KINDS}
    hrbp.save(net, tmp_path / "net.pt")
    fresh = model()
    log = Log(fresh[1])
    loaded = hrbp.load(tmp_path / "net.pt", fresh)
    assert log.kinds(loaded) == {(k, "BSRConv2d") for k in KINDS}


def test_a_hook_that_changes_the_output_still_does():
    net = model().eval()
    net[1].register_forward_hook(lambda module, args, out: out * 3)
    before = net(images())
    hrbp.sparsify(net, 0.0, **STRUCTURES["blocks"])
    assert isinstance(net[1], bs.BSRConv2d)
    assert torch.allclose(net(images()), before, rtol=1e-5, atol=1e-6)
    assert torch.allclose(hrbp.densify(net)(images()), before, rtol=1e-5, atol=1e-6)


def test_the_hooks_of_an_evolver_are_not_carried():
    net = hrbp.sparsify(model(), 0.5, **STRUCTURES["blocks"])
    evolver = hrbp.Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=10, every=1)
    assert evolver.wants_dense_grad()
    hrbp.densify(net)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_a_layer_that_is_the_whole_model_stays_beside_its_dense_twin():
    layer = bs.BSRLinear(bs.BSRPattern.full((8, 8, 1, 1), (4, 1)))
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    dense = hrbp.densify(layer)
    assert dense.bias is not layer.bias
    x = torch.randn(2, 8)
    assert torch.allclose(dense(x), layer(x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    handle.remove()
    layer(x)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", STRUCTURES)
def test_modes_attributes_and_extra_tensors_go_along(kind):
    net = model()
    layer = net[1]
    net.train()
    layer.eval()
    layer.weight.requires_grad_(False)
    layer.tag, layer._private = ["mine"], 5
    layer.weight.group = "no decay"
    layer.register_buffer("counter", torch.tensor(7))
    layer.register_buffer("scratch", torch.tensor(8), persistent=False)
    layer.extra = nn.Linear(2, 2)
    net[4].bias.requires_grad_(False)
    biases = {at: net[at].bias for at in (1, 4)}
    keys = set(net.state_dict())
    expected = net(images())
    hrbp.sparsify(net, 0.0, include=["1", "4"], **STRUCTURES[kind])
    for step in range(2):
        layer = net[1]
        weight = layer.values if isinstance(layer, bs.BSRConv2d) else layer.weight
        assert not layer.training
        assert net[4].training
        assert not weight.requires_grad
        assert layer.bias.requires_grad
        assert not net[4].bias.requires_grad
        assert (layer.tag, layer._private, weight.group) == (["mine"], 5, "no decay")
        assert (int(layer.counter), int(layer.scratch)) == (7, 8)
        assert "1.scratch" not in net.state_dict()
        assert isinstance(layer.extra, nn.Linear)
        assert all(net[at].bias is bias for at, bias in biases.items())
        assert torch.allclose(net(images()), expected, rtol=1e-5, atol=1e-6)
        layer.late = 1 if step == 0 else layer.late  # densify carries what came later, too
        if step == 0:
            hrbp.densify(net)
    assert net[1].late == 1
    assert set(net.state_dict()) == keys
    assert type(net[1]) is nn.Conv2d
    assert vars(net[1]).keys() == {*vars(nn.Conv2d(8, 16, 3)), "tag", "_private", "late"}


def test_channels_last_weights_are_so_again():
    for memory_format in (torch.channels_last, torch.contiguous_format):
        net = model().to(memory_format=memory_format)
        stride = net[1].weight.stride()
        hrbp.densify(hrbp.sparsify(net, 0.5, **STRUCTURES["blocks"]))
        assert net[1].weight.stride() == stride
        copy.deepcopy(net)


def test_layers_that_blocks_cannot_replace_stay_with_their_reason():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("first", "patched", "saved", "loaded", "watched", "posted", "values", "good", "last"):
                setattr(self, name, nn.Linear(8, 8))
            self.patched.forward = lambda x: 2 * nn.functional.linear(x, self.patched.weight)
            self.saved.register_state_dict_post_hook(lambda *_: None)
            self.loaded.register_load_state_dict_pre_hook(lambda *_: None)
            self.watched.weight.register_hook(lambda grad: grad)
            self.posted.weight.register_post_accumulate_grad_hook(lambda p: None)
            self.values.register_buffer("index", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x)
            return x

    net = Model()
    x = torch.randn(2, 8)
    expected = net(x)
    hrbp.sparsify(net, 0.0, structure="1xn", n=4)
    assert record_of(net).dense == {
        "first": "the first layer, by data flow",
        "patched": "its forward was replaced",
        "saved": "a hook reads or writes its state_dict",
        "loaded": "a hook reads or writes its state_dict",
        "watched": "a hook is on its weight",
        "posted": "a hook is on its weight",
        "values": "it holds 'index' already",
        "last": "the last layer, by data flow",
    }
    assert list(sparse_layers(net)) == ["good"]
    assert torch.allclose(net(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_first", [False, True])
def test_what_pytorch_computes_with_itself_stays_dense(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    net = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8), nn.Linear(8, 8))
    hrbp.sparsify(net, 0.5, structure="1xn", n=4)
    assert list(sparse_layers(net)) == (["2"] if batch_first else ["1.linear1", "1.linear2", "2"])
    with torch.no_grad():
        net.eval()(torch.randn(2, 3, 8))


def test_layers_without_a_shape_or_values_are_refused():
    lazy = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8), nn.LazyConv2d(8, 3))
    for call in (hrbp.sparsify, lambda m, _: hrbp.saliency(m, ["1"]), lambda m, _: hrbp.summary(m)):
        with pytest.raises(ValueError, match="run the model once first"):
            call(lazy, 0.5)
    lazy = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.LazyLinear(8))
    hrbp.sparsify(lazy, 0.5, structure="1xn", n=4, exclude=["3"])
    assert list(sparse_layers(lazy)) == ["1", "2"]
    with pytest.raises(ValueError, match="0 is on the meta device, where weights have no values"):
        hrbp.sparsify(nn.Sequential(*(nn.Linear(8, 8, device="meta") for _ in range(3))), 0.5)
    odd = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    odd[1].weight = nn.Parameter(odd[1].weight.detach().to(torch.complex64))
    hrbp.sparsify(odd, 0.5, structure="1xn", n=4)
    assert record_of(odd).dense["1"] == "its weight is a Parameter of complex64"


def test_wrappers():
    net = model()
    with process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1):
        wrapped = DistributedDataParallel(net)
        with pytest.raises(ValueError, match=r"sparsify\(\): the model is in DistributedDataParallel.*before it is"):
            hrbp.sparsify(wrapped, 0.5)
        assert not sparse_layers(net)
        hrbp.sparsify(net, 0.5, **STRUCTURES["blocks"])
        hrbp.densify(DistributedDataParallel(net))
    assert record_of(net, required=False) is None
    compiled = torch.compile(net, backend="eager")
    assert hrbp.sparsify(compiled, 0.5, include=["1"], **STRUCTURES["blocks"]) is compiled
    assert list(sparse_layers(compiled)) == ["1"]
    assert record_of(compiled) is record_of(net)
