"""hrbp.fuse: the same function with norms, ReLUs and sums in the convolutions, and nothing fused that others see."""

from __future__ import annotations

import copy
import functools
import io
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blocksparse as bs
import hrbp
from blocksparse.kernels import cpu
from hrbp.layers import FusedConv2d

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# name -> norms, ReLUs and sums that are fused behind sparse layers; the first layer and depthwise ones stay dense
NETWORKS = {
    "resnet8": (9, 6, 3),
    "resnet20": (21, 18, 9),
    "resnet18": (20, 16, 8),
    "resnet50": (53, 48, 16),
    "vgg19": (16, 15, 0),
    "mobilenetv1": (27, 13, 0),
    "mobilenetv2": (52, 0, 10),
}


def settle(model: nn.Module) -> nn.Module:
    """The model in eval mode and float64, with norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for t, low, high in (
                    (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0),
                    (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                ):  # fmt: skip
                    if t is not None:
                        t.uniform_(low, high)
    return model.double().eval()


def network(name: str, structure: str = "hrbp", width: float = 0.25, sparsity: float = 0.7) -> nn.Module:
    model = hrbp.models.build(name, classes=5, width=width)
    return settle(hrbp.sparsify(model, sparsity, structure=structure))


def sparse(c: int = 4, k: int = 4, kernel: int = 3, bias: bool = False, row_order: Tensor | None = None, **options):
    """A sparse convolution that keeps the size of an image."""
    mask = torch.rand(k // 2, c, kernel, kernel).gt(0.4).repeat_interleave(2, 0)
    mask = mask if row_order is None else mask[row_order.argsort()]
    pattern = bs.BSRPattern.from_mask(mask, (2, 1), row_order)
    return bs.BSRConv2d(pattern, padding=kernel // 2, bias=bias, **options)


def counts(fused: nn.Module) -> tuple[int, int, int]:
    return fused.fusion.norms, fused.fusion.relus, fused.fusion.sums


def assert_same(model: nn.Module, fused: nn.Module, *inputs: Tensor) -> None:
    """The same results in float64, and the same content of the inputs afterwards: both may write to them."""
    model, fused = copy.deepcopy(model), copy.deepcopy(fused)
    one, other = ([x.clone() for x in inputs] for _ in range(2))
    with torch.no_grad():
        needed, got = model(*one), fused(*other)
    torch.testing.assert_close(got, needed, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def image(n: int = 2, c: int = 4, size: int = 6) -> Tensor:
    return torch.randn(n, c, size, size, dtype=torch.float64)


# ---------------------------------------------------------------- networks


made_once = functools.cache(network)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same(name, layout):
    model = copy.deepcopy(made_once(name)).to(memory_format=FORMATS[layout])
    fused = hrbp.fuse(model)
    assert counts(fused) == NETWORKS[name]
    for batch in (1, 3):
        x = image(batch, 3, 16).contiguous(memory_format=FORMATS[layout])
        assert_same(model, fused, x)
        with torch.no_grad():
            assert fused(x).stride() == model(x).stride()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())


@pytest.mark.parametrize("structure", ["block", "hrbp++", "1xn", "filter", "kernel", "unstructured", "2:4"])
def test_every_structure_computes_the_same(structure):
    model = network("resnet8", structure, width=1, sparsity=0.5)
    fused = hrbp.fuse(model)
    assert fused.fusion.norms == 9
    assert_same(model, fused, image(2, 3, 16))


@pytest.mark.parametrize("name", ["resnet8", "vgg19", "mobilenetv1"])
def test_a_dense_network_has_its_norms_folded(name):
    model = settle(hrbp.models.build(name, classes=5, width=0.25))
    fused = hrbp.fuse(model)
    assert counts(fused) == (NETWORKS[name][0], 0, 0)
    told = {why for _, why in fused.fusion.stayed}
    assert told == {"follows a dense layer", *(["follows no convolution"] if name == "resnet8" else [])}
    assert_same(model, fused, image(2, 3, 32))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_network_itself(dtype, layout):
    model = network("resnet20", width=1).float().to(memory_format=FORMATS[layout])
    exact = copy.deepcopy(model).double()
    fused = hrbp.fuse(model.to(dtype))
    assert {p.dtype for p in fused.parameters()} == {dtype}
    x = image(4, 3, 16).contiguous(memory_format=FORMATS[layout])
    with torch.no_grad():
        needed = exact(x)
        own, got = ((m(x.to(dtype)).double() - needed).square().mean().sqrt() for m in (model, fused))
    assert 0 < got <= 2 * own


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_norms_scale_filters_whatever_row_they_are_stored_in(affine, bias, relu):
    order = torch.tensor([5, 0, 3, 2, 7, 1, 4, 6])
    norm = nn.BatchNorm2d(8, eps=0.1, affine=affine)
    model = settle(nn.Sequential(sparse(4, 8, bias=bias, row_order=order), norm, *[nn.ReLU()] * relu))
    fused = hrbp.fuse(model)
    assert counts(fused) == (1, int(relu), 0)
    assert_same(model, fused, image())


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")]
)
def test_a_dense_convolution_of_any_kind_takes_its_norm(layer):
    model = settle(nn.Sequential(layer, nn.BatchNorm2d(8)))
    fused = hrbp.fuse(model)
    assert counts(fused) == (1, 0, 0)
    assert_same(model, fused, image())


def test_a_synchronized_norm_is_a_norm():
    model = settle(nn.Sequential(sparse(), nn.SyncBatchNorm(4)))
    fused = hrbp.fuse(model)
    assert counts(fused) == (1, 0, 0)
    plain = nn.Sequential(model[0], nn.BatchNorm2d(4)).double().eval()
    plain[1].load_state_dict(model[1].state_dict())
    assert_same(plain, fused, image())


@pytest.mark.parametrize("stored", [False, True])
def test_a_linear_layer_takes_its_norm(stored):
    layer: nn.Module = nn.Linear(6, 8)
    if stored:
        layer = bs.BSRLinear.from_dense(layer, bs.BSRPattern.random((8, 6, 1, 1), (2, 1), 0.5))
    model = settle(nn.Sequential(layer, nn.BatchNorm1d(8)))
    fused = hrbp.fuse(model)
    assert counts(fused) == (1, 0, 0)
    assert_same(model, fused, torch.randn(5, 6, dtype=torch.float64))
    assert model(torch.randn(2, 8, 6).double()).shape == (2, 8, 8)  # normalizes the axis in the middle
    with pytest.raises(ValueError, match=r"got x of shape \(2, 8, 6\); it needs \[N, C\]"):
        fused(torch.randn(2, 8, 6).double())


@pytest.mark.parametrize("layout", FORMATS)
def test_one_call_of_the_kernel_computes_it_all(layout, monkeypatch):
    calls = []
    right = cpu.fprop

    def fprop(x, values, tables, bias, geometry, residual=None, relu=False):
        calls.append((bias is not None, residual is not None, relu))
        return right(x, values, tables, bias, geometry, residual, relu)

    monkeypatch.setattr(cpu, "fprop", fprop)
    model = hrbp.models.build("resnet8", classes=5)
    fused = hrbp.fuse(settle(hrbp.sparsify(model, 0.7, structure="hrbp", backend="cpu")))
    fused(image(1, 3, 16).contiguous(memory_format=FORMATS[layout]))  # and outside of torch.no_grad()
    assert sorted(calls) == sorted([(True, False, True)] * 3 + [(True, True, True)] * 3 + [(True, False, False)] * 2)


# ---------------------------------------------------------------- the order of things, and who reads what


class Net(nn.Module):
    """Convolutions a, b with norms m, n, and d, which is dense; a forward of its own."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.d = sparse(bias=True), sparse(), nn.Conv2d(4, 4, 3, padding=1)
        self.m, self.n = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def changed_after(net, x):
    y = net.a(x)
    x.relu_()
    return y + x


def changed_by_a_function(net, x):
    y = net.a(x)
    h = F.relu(x, inplace=True)
    return y + h


def changed_by_a_module(net, x):
    y = net.a(x)
    h = net.relu_(x)
    return y + h


def changed_through_a_view(net, x):
    y = net.a(x)
    x[:, 0].zero_()
    return y + x


def augmented(net, x):
    h = net.d(x)
    shortcut = h
    h += x
    return h * shortcut


def written_into_the_input(net, x):
    x += net.a(x)
    return x


def written_into_what_is_read_again(net, x):
    h = net.d(x)
    z = h.add_(net.a(x))
    return z * h


def in_place_and_read_again(net, x):
    y = net.a(x)
    z = net.relu_(y)
    return y + 2 * z


def in_place_add_read_again(net, x):
    y = net.a(x)
    y += x
    z = y.relu_()
    return y * z


def first_part_is_read_again(net, x):
    y = net.a(x)
    return torch.relu(y + x) * y


def input_of_the_norm_is_read(net, x):
    y = net.a(x)
    return net.m(y) + y


def downsampled(net, x):
    y = net.m(net.a(net.relu_(net.d(x))))
    return net.relu(y + net.n(net.b(x)))


def dense_shortcut(net, x):
    y = net.m(net.a(x))
    return net.relu_(y + net.n(net.d(x)))


FORWARDS = {  # forward -> norms, ReLUs and sums that may be fused
    lambda net, x: net.relu_(net.m(net.a(x)) + x): (1, 1, 1),
    lambda net, x: (x + net.m(net.a(x))).relu(): (1, 1, 1),
    lambda net, x: torch.relu(torch.add(net.a(x), x)): (0, 1, 1),
    lambda net, x: F.relu(net.a(x).add_(x), inplace=True): (0, 1, 1),
    lambda net, x: net.a(x).add(x).relu_(): (0, 1, 1),
    lambda net, x: torch.relu_(net.a(x)): (0, 1, 0),
    lambda net, x: F.relu(input=net.a(x)): (0, 1, 0),
    lambda net, x: net.b(net.relu(net.a(x))) + x: (0, 1, 1),
    lambda net, x: net.relu(net.a(x)) + net.b(x): (0, 1, 1),
    lambda net, x: net.m(net.relu(net.a(x))): (0, 1, 0),
    lambda net, x: net.m(net.a(x) + x): (0, 0, 1),
    lambda net, x: net.relu(net.a(x)) + x: (0, 1, 0),
    lambda net, x: net.a(x) + x + net.d(x): (0, 0, 1),
    lambda net, x: torch.add(net.a(x), x, alpha=2): (0, 0, 0),
    lambda net, x: torch.add(net.a(x), other=x): (0, 0, 0),
    lambda net, x: F.relu6(net.a(x)) + F.silu(net.b(x)): (0, 0, 0),
    lambda net, x: net.a(x) + 1.0: (0, 0, 0),
    lambda net, x: (lambda y: y + y)(net.a(x)): (0, 0, 0),
    lambda net, x: net.m(net.a(x)) + net.n(net.b(x)): (2, 0, 1),
    lambda net, x: net.m(net.a(net.a(x))): (0, 0, 0),
    lambda net, x: F.relu(F.relu(net.a(x))): (0, 2, 0),
    downsampled: (2, 1, 1),
    dense_shortcut: (2, 1, 1),
    changed_after: (0, 0, 0),
    changed_by_a_function: (0, 0, 0),
    changed_by_a_module: (0, 0, 0),
    changed_through_a_view: (0, 0, 0),
    augmented: (0, 0, 0),
    written_into_the_input: (0, 0, 0),
    written_into_what_is_read_again: (0, 0, 0),
    in_place_and_read_again: (0, 0, 0),
    in_place_add_read_again: (0, 0, 1),
    first_part_is_read_again: (0, 0, 0),
    input_of_the_norm_is_read: (0, 0, 0),
}


@pytest.mark.parametrize(("forward", "needed"), FORWARDS.items(), ids=range(len(FORWARDS)))
def test_only_what_nobody_else_reads_is_fused(forward, needed):
    model = settle(Net(forward))
    fused = hrbp.fuse(model)
    assert counts(fused) == needed, fused.fusion
    assert_same(model, fused, image())


def test_a_residual_that_is_broadcast_or_no_tensor_is_added_as_before():
    for forward in (
        lambda net, x: net.relu(net.a(x) + x.mean((2, 3), keepdim=True)),
        lambda net, x: net.relu(net.a(x.mean((2, 3), keepdim=True)) + x),
        lambda net, x: net.relu(net.a(x) + x[0]),
        lambda net, x: net.relu(net.a(x) + x.shape[0]),
    ):
        model = settle(Net(forward))
        fused = hrbp.fuse(model)
        assert counts(fused) == (0, 1, 1)
        assert_same(model, fused, image())


def test_a_residual_of_another_dtype_decides_the_dtype_of_the_sum():
    model = settle(Net(lambda net, x: net.a(x) + x.double())).float()
    fused = hrbp.fuse(model)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        needed, got = model(x), fused(x)
        assert counts(fused) == (0, 0, 1)
        assert got.dtype == needed.dtype == torch.float64
        torch.testing.assert_close(got, needed)
        with torch.autocast("cpu", torch.bfloat16):
            assert hrbp.fuse(settle(Net(lambda net, x: net.a(x) + x)).float())(x).dtype == torch.float32


# ---------------------------------------------------------------- what stays


def test_a_module_that_is_called_twice_or_has_two_names_stays():
    conv, norm = sparse(), nn.BatchNorm2d(4)
    twice = settle(nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4)))
    norms = settle(nn.Sequential(sparse(), norm, sparse(), norm))
    alias = settle(nn.Sequential(sparse(), nn.BatchNorm2d(4)))
    alias[0].other = nn.ModuleList([alias[1]])
    for model in (twice, norms, alias):
        fused = hrbp.fuse(model)
        assert counts(fused) == (0, 0, 0)
        assert all("names in the model" in why or "is called" in why for _, why in fused.fusion.stayed)
        assert_same(model, fused, image())


def test_a_parameter_that_the_model_reads_stays():
    model = settle(Net(lambda net, x: F.relu(net.m(net.d(x))) + F.conv2d(x, net.d.weight, padding=1)))
    fused = hrbp.fuse(model)
    assert ("m", "the model reads parameters of d itself") in fused.fusion.stayed
    assert_same(model, fused, image())


def test_tied_weights_part():
    model = settle(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model[2].weight = model[0].weight
    fused = hrbp.fuse(model)
    assert counts(fused) == (2, 0, 0)
    assert_same(model, fused, image())


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_module_with_hooks_stays_and_they_run(kind, at):
    seen = []
    model = settle(nn.Sequential(sparse(), nn.BatchNorm2d(4), nn.ReLU()))
    getattr(model[at], kind)(lambda *args: seen.append(at))
    fused = hrbp.fuse(model)
    assert counts(fused) == [(0, 0, 0), (0, 0, 0), (1, 0, 0)][at]
    assert any(f"{at} has a hook" in why for _, why in fused.fusion.stayed)
    assert_same(model, fused, image())
    assert len(seen) == (0 if "backward" in kind else 2)


def test_hooks_of_the_model_and_of_a_part_of_it_run():
    inner = nn.Sequential(sparse(), nn.BatchNorm2d(4))
    model = settle(nn.Sequential(nn.Sequential(inner), nn.ReLU()))
    inner.register_forward_hook(lambda module, args, y: 2 * y)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    fused = hrbp.fuse(model)
    assert fused.fusion.stayed == [("1", "follows no convolution"), ("0.0.1", "0.0 stays as a whole: has a hook")]
    assert_same(model, fused, image())


def test_a_norm_without_statistics_or_in_training_mode_stays():
    model = settle(nn.Sequential(sparse(), nn.BatchNorm2d(4, track_running_stats=False), sparse(), nn.BatchNorm2d(4)))
    model[3].train()
    fused = hrbp.fuse(model)
    assert dict(fused.fusion.stayed) == {"1": "it keeps no running statistics", "3": "in training mode"}
    assert counts(fused) == (0, 0, 0)


def test_other_norms_and_layers_stay():
    model = settle(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    fused = hrbp.fuse(model)
    assert [name for name, _ in fused.fusion.stayed] == ["1", "2"]
    assert_same(model, fused, image())


def test_a_layer_that_is_no_plain_one_stays():
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    replaced = nn.Conv2d(4, 4, 1)
    replaced.forward = types.MethodType(lambda self, x: 3 * type(self).forward(self, x), replaced)
    had = sparse(relu=True)
    for layer in (Doubled(4, 4, 1), normed, replaced, had):
        model = settle(nn.Sequential(layer, nn.BatchNorm2d(4)))
        fused = hrbp.fuse(model)
        assert counts(fused) == (0, 0, 0), fused.fusion
        assert_same(model, fused, image())


def test_weights_that_would_overflow_stay():
    model = settle(nn.Sequential(sparse(), nn.BatchNorm2d(4))).half()
    with torch.no_grad():
        model[0].values.fill_(100)
        model[1].weight.fill_(1000)
    fused = hrbp.fuse(model)
    assert fused.fusion.stayed == [("1", "its weights would pass the largest number of their dtype")]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.m = sparse(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(self.a(x))
        return y if y.sum() > 0 else -y


class Counting(Branching):
    """Changes every second image: a graph of one call would always do the same."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.m(self.a(x)) * (self.calls % 2)


class Drawing(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.a(x)) + torch.rand(()).item()


class Remembering(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.m(self.a(x)) + self.steps


WHOLE = {
    Branching: "y if y.sum() > 0", Counting: "changes calls", Drawing: "draws a random number",
    Remembering: "changes steps",
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_a_module_that_no_graph_can_hold_stays_as_a_whole(kind):
    model = settle(nn.Sequential(sparse(), nn.BatchNorm2d(4), nn.Sequential(kind(), nn.BatchNorm2d(4)), nn.Identity()))
    fused = hrbp.fuse(model)
    assert counts(fused) == (1, 0, 0)
    told = dict(fused.fusion.stayed)
    assert set(told) == {"2.1", "2.0.m"}
    assert WHOLE[kind] in told["2.0.m"]
    for seed in range(3):
        torch.manual_seed(seed)
        x = image()
        with torch.no_grad():
            torch.manual_seed(seed)
            needed = model(x)
            torch.manual_seed(seed)
            torch.testing.assert_close(fused(x), needed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_model_that_no_graph_can_hold_is_refused(kind):
    model = settle(kind())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"fuse\(\): torch.fx cannot follow {kind.__name__}.forward: ") as error:
        hrbp.fuse(model)
    assert WHOLE[kind] in str(error.value)
    assert kind is not Branching or f"{__file__}:" in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_masters_are_released_and_masks_multiplied_in():
    for method, structure in (("sr-ste", "2:4"), ("subp", "1xn"), (None, "unstructured")):
        model = hrbp.models.build("resnet8", classes=5)
        options = {"n": 4} if structure == "1xn" else {}
        hrbp.sparsify(model, 0.5, structure=structure, method=method, **options)
        fused = hrbp.fuse(settle(model))
        assert fused.fusion.norms == 9
        assert structure != "1xn" or counts(fused) == NETWORKS["resnet8"]
        assert_same(model, fused, image(2, 3, 16))
        assert hrbp.summary(model)  # the model itself has kept what it had


def test_a_model_that_an_evolver_watches_is_fused():
    model = network("resnet8")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    evolver = hrbp.Evolver(model.train(), optimizer, "rigl", total_steps=10, every=1)
    evolver.wants_dense_grad()
    F.cross_entropy(model(image(2, 3, 16)), torch.tensor([0, 1])).backward()
    fused = hrbp.fuse(model.eval())
    assert counts(fused) == NETWORKS["resnet8"]
    assert_same(model, fused, image(2, 3, 16))


# ---------------------------------------------------------------- the model that was given, and the result


def test_the_model_stays_as_it_is():
    model = network("resnet8")
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    fused = hrbp.fuse(model)
    assert list(model.modules()) == modules
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in fused.parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fused.parameters())
    assert not fused.training


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"fuse\(\): the model is in training mode.*it needs model.eval\(\) first"):
        hrbp.fuse(network("resnet8").train())


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match=r"fuse\(\): 0.weight is on the meta device"):
        hrbp.fuse(model)


def test_a_forward_of_one_object_is_refused():
    model = settle(nn.Sequential(sparse(), nn.BatchNorm2d(4)))
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=r"fuse\(\): the model's forward was replaced"):
        hrbp.fuse(model)


def test_wrappers_are_looked_through():
    model = network("resnet8")
    average = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (torch.compile(model, backend="eager"), average.eval()):
        fused = hrbp.fuse(wrapped)
        assert counts(fused) == NETWORKS["resnet8"]
        assert_same(model, fused, image(2, 3, 16))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.m = sparse(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, features: bool = False):
        y = self.m(self.a(x)) * scale
        y = y if mask is None else y * mask
        return [y] if features else y


def test_optional_arguments_keep_their_default():
    model = settle(Optional())
    fused = hrbp.fuse(model)
    assert counts(fused) == (1, 0, 0)
    x = image()
    assert_same(model, fused, x)
    torch.testing.assert_close(fused(x, None, features=False, scale=2.0), model(x).detach())
    for other in ({"mask": x}, {"scale": 3.0}, {"features": True}):
        with pytest.raises(AssertionError, match="has been specialized to have value"):
            fused(x, **other)


def test_a_copy_a_file_and_a_state_dict_of_the_result():
    model = network("resnet8")
    fused = hrbp.fuse(model)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    other = hrbp.fuse(network("resnet8", "hrbp"))
    other.load_state_dict(fused.state_dict())
    for made in (copy.deepcopy(fused), torch.load(file, weights_only=False), other):
        assert counts(made) == counts(fused)
        assert sum(isinstance(m, FusedConv2d) for m in made.modules()) == 3
        assert_same(model, made, image(2, 3, 16))
    assert set(dict(fused.named_modules())) < set(dict(model.named_modules()))  # names stay


def test_a_file_of_a_result_with_steps_of_its_own():
    """Reading a file follows the graph once more."""
    linear = settle(nn.Sequential(nn.Flatten(), nn.Linear(144, 3), nn.BatchNorm1d(3)))
    for model in (linear, settle(Net(augmented))):
        file = io.BytesIO()
        torch.save(hrbp.fuse(model), file)
        file.seek(0)
        assert_same(model, torch.load(file, weights_only=False), image())


def test_a_tensor_that_the_forward_makes():
    class Shifted(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.m(self.a(x)) + torch.arange(6)

    model = settle(Shifted())
    fused = hrbp.fuse(model)
    assert counts(fused) == (1, 0, 0)
    assert_same(model, fused, image())


def test_a_copy_keeps_hooks_of_the_model():
    model = settle(nn.Sequential(sparse(), nn.BatchNorm2d(4)))
    model.register_forward_hook(lambda module, args, y: 2 * y)
    assert_same(model, copy.deepcopy(hrbp.fuse(model)), image())


def test_a_fused_model_is_fused_again():
    model = network("resnet8")
    again = hrbp.fuse(hrbp.fuse(model))
    assert counts(again) == (0, 0, 0)
    assert_same(model, again, image(2, 3, 16))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_result_compiles(backend):
    model = network("resnet8")
    fused = hrbp.fuse(model)
    run = torch.compile(fused, backend=backend, fullgraph=True)
    x = image(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-10, atol=1e-10)


def test_the_gradient_of_the_input():
    model = settle(Net(lambda net, x: net.relu(net.m(net.a(x)) + x))).double()
    grads = []
    x = image()
    for net in (model, hrbp.fuse(model)):
        leaf = x.clone().requires_grad_()
        net(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_undone_says_so(tmp_path):
    fused = hrbp.fuse(network("resnet8"))
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError, match=r"densify\(\): layer1.0.conv1 computes a ReLU or a sum"):
        hrbp.densify(fused)
    assert set(fused.state_dict()) == set(before)
    with pytest.raises(ValueError, match=r"save\(\): the model is fused; save it before fuse\(\)"):
        hrbp.save(fused, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_the_report_tells_a_person():
    model = settle(Net(lambda net, x: net.relu(net.m(net.d(x))) + F.relu(net.d(x))))
    fused = hrbp.fuse(model)
    assert str(fused.fusion).splitlines() == [
        "fused: 0 BatchNorms, 0 ReLUs, 0 sums",
        "5 stayed:",
        "  m: d is called 2 times",
        "  add: sums no result of a sparse convolution",
        "  relu: follows no convolution",
        "  relu_1: follows a dense layer",
        "  n: the graph does not call it",
    ]
    one = settle(nn.Sequential(sparse(), nn.BatchNorm2d(4), nn.ReLU()))
    assert str(hrbp.fuse(one).fusion) == "fused: 1 BatchNorm, 1 ReLU, 0 sums"
