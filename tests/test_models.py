"""The networks have the published sizes, names and shapes, and narrow baselines the parameters asked for."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.layers.networks import NETS
from blocksparse import BSRConv2d
from hrbp import densify, sparsify, summary
from hrbp.models import NETWORKS, build, narrow, parameter_count, rebuild


def shapes_only(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return build(name, **options)


def output_sizes(model: nn.Module, size: int, channels: int = 3) -> list[tuple]:
    """(K, C, kernel, stride, padding, input size) of every dense convolution, in the order they run."""
    seen = []

    def note(conv, inputs):
        if conv.groups == 1:
            k, c = conv.out_channels, conv.in_channels
            seen.append((k, c, conv.kernel_size, conv.stride, conv.padding, tuple(inputs[0].shape[2:])))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.empty(1, channels, size, size, device=next(model.parameters()).device))
    return seen


# ---------------------------------------------------------------- the published networks


@pytest.mark.parametrize(
    ("name", "width", "classes", "size", "parameters"),
    [
        ("resnet20", 1, 10, 32, 272_474),  # He et al.: 0.27 M; with 1x1 projections
        ("resnet32", 1, 10, 32, 466_906),  # 0.46 M
        ("resnet56", 1, 10, 32, 855_770),  # 0.85 M
        ("resnet32", 2, 10, 32, 1_860_522),  # GraSP, HRBP: 1.86 M
        ("vgg19", 1, 10, 32, 20_035_018),  # GraSP: 20.04 M
        ("resnet18", 1, 1000, 224, 11_689_512),  # torchvision
        ("resnet34", 1, 1000, 224, 21_797_672),  # torchvision
        ("resnet50", 1, 1000, 224, 25_557_032),  # torchvision
        ("mobilenetv1", 1, 1000, 224, 4_231_976),  # Howard et al.: 4.2 M
        ("mobilenetv2", 1, 1000, 224, 3_504_872),  # torchvision; Sandler et al.: 3.4 M
    ],
)
def test_published_parameter_counts(name, width, classes, size, parameters):
    assert parameter_count(shapes_only(name, classes=classes, width=width, image_size=size)) == parameters


def torchvision_state(expansion: int, depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet state_dict, written out."""
    state: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name, c):
        state.update({f"{name}.{part}": (c,) for part in ("weight", "bias", "running_mean", "running_var")})
        state[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    c = 64
    for stage, depth in enumerate(depths):
        inner = 64 * 2**stage
        for i in range(depth):
            at = f"layer{stage + 1}.{i}"
            k = inner * expansion
            if expansion == 1:
                convs = [(inner, c, 3, 3), (k, inner, 3, 3)]
            else:
                convs = [(inner, c, 1, 1), (inner, inner, 3, 3), (k, inner, 1, 1)]
            for j, shape in enumerate(convs, start=1):
                state[f"{at}.conv{j}.weight"] = shape
                norm(f"{at}.bn{j}", shape[0])
            if c != k:
                state[f"{at}.downsample.0.weight"] = (k, c, 1, 1)
                norm(f"{at}.downsample.1", k)
            c = k
    return {**state, "fc.weight": (1000, c), "fc.bias": (1000,)}


@pytest.mark.parametrize(
    ("name", "expansion", "depths", "entries"),
    [("resnet18", 1, (2, 2, 2, 2), 122), ("resnet50", 4, (3, 4, 6, 3), 320)],
)
def test_pretrained_weights_of_torchvision_fit(name, expansion, depths, entries):
    model = shapes_only(name, classes=1000, image_size=224)
    state = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert state == torchvision_state(expansion, depths)
    assert len(state) == entries


def test_pretrained_weights_of_torchvisions_mobilenet_fit():
    """Names and shapes of torchvision's mobilenet_v2 state_dict, written out from table 2 of Sandler et al."""
    state: dict[str, tuple[int, ...]] = {}

    def conv_norm(conv, norm, shape):
        state[f"{conv}.weight"] = shape
        state.update({f"{norm}.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")})
        state[f"{norm}.num_batches_tracked"] = ()

    conv_norm("features.0.0", "features.0.1", (32, 3, 3, 3))
    c, at = 32, 1
    for t, k, n in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(n):
            name, inner, i = f"features.{at}.conv", t * c, 0
            if t > 1:
                conv_norm(f"{name}.0.0", f"{name}.0.1", (inner, c, 1, 1))
                i = 1
            conv_norm(f"{name}.{i}.0", f"{name}.{i}.1", (inner, 1, 3, 3))
            conv_norm(f"{name}.{i + 1}", f"{name}.{i + 2}", (k, inner, 1, 1))
            c, at = k, at + 1
    conv_norm("features.18.0", "features.18.1", (1280, 320, 1, 1))
    state.update({"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)})
    model = shapes_only("mobilenetv2", classes=1000, image_size=224)
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == state
    assert len(state) == 314


def test_mobilenetv2_halves_images_where_it_should():
    """Sandler et al., table 2: where the 3x3 convolutions halve, and which blocks add their input."""
    model = shapes_only("mobilenetv2", classes=10, image_size=224)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    assert [m.stride[0] for m in depthwise] == [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    adds = [m.shortcut for m in model.features if hasattr(m, "shortcut")]
    assert [i for i, flag in enumerate(adds) if flag] == [2, 4, 5, 7, 8, 9, 11, 12, 14, 15]


def test_inverted_residuals_add_what_relu6_let_through():
    torch.manual_seed(0)
    block = build("mobilenetv2", classes=10).eval().features[5]  # expansion 6, stride 1, 32 filters
    widen, depth, narrow = (m for m in block.modules() if isinstance(m, nn.Conv2d))
    x = 9 * torch.randn(2, 32, 8, 8)
    y = nn.functional.conv2d(x, widen.weight).clamp(0, 6)
    y = nn.functional.conv2d(y, depth.weight, padding=1, groups=192).clamp(0, 6)
    y = x + nn.functional.conv2d(y, narrow.weight)
    assert torch.allclose(block(x), y, rtol=1e-3, atol=1e-2)  # fresh batch norm divides by sqrt(1 + 1e-5)


@pytest.mark.parametrize("name", ["mobilenetv1", "mobilenetv2"])
def test_depthwise_layers_stay_dense_and_the_others_do_not(name):
    torch.manual_seed(0)
    model = sparsify(build(name, classes=10, width=0.5), 0.8, structure="hrbp++").eval()
    kinds = {"depthwise" if m.groups > 1 else "stem": type(m) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == {"stem": nn.Conv2d, "depthwise": nn.Conv2d}
    pointwise = [m for m in model.modules() if isinstance(m, BSRConv2d)]
    assert len(pointwise) == {"mobilenetv1": 13, "mobilenetv2": 34}[name]
    assert summary(model).sparsity == pytest.approx(0.8, abs=0.01)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(densify(copy.deepcopy(model))(x), model(x), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "width", "size"), [("resnet50", 1, 224), ("resnet32", 2, 32), ("vgg19", 1, 32)], ids=lambda v: str(v)
)
def test_the_benchmark_measures_these_layers(name, width, size):
    """Every convolution of the network, as often as it occurs, is in the benchmark's table of it: and no other."""
    ours = Counter(output_sizes(shapes_only(name, classes=10, width=width, image_size=size), size))
    table = Counter()
    for layer in NETS[name]():
        table[layer.k, layer.c, layer.kernel, (layer.stride,) * 2, layer.padding, layer.size] += layer.count
    assert ours == table


def test_small_images_are_not_reduced_at_once():
    first = {}
    for name in ("resnet18", "resnet50", "mobilenetv1", "mobilenetv2"):
        for size in (32, 64, 65, 224):
            sizes = output_sizes(shapes_only(name, classes=10, image_size=size), size)
            first[name, size] = sizes[0][2][0], sizes[1][5][0]  # the stem's kernel, and the size after the stem
    for name in ("resnet18", "resnet50"):
        assert [first[name, s] for s in (32, 64, 65, 224)] == [(3, 32), (3, 64), (7, 17), (7, 56)]
    for name in ("mobilenetv1", "mobilenetv2"):
        assert [first[name, s] for s in (32, 64, 65, 224)] == [(3, 32), (3, 64), (3, 33), (3, 112)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_learns(name):
    """Kaiming's variance, finite outputs for other channels and classes, and a gradient for every parameter."""
    torch.manual_seed(0)
    model = build(name, classes=7, width=0.5, image_size=32, channels=2)
    y = model(torch.randn(4, 2, 32, 32))
    assert y.shape == (4, 7)
    y.square().sum().backward()
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    holders = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    for key, p in model.named_parameters():
        assert id(p) in holders, key
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        # A bias before a batch norm would have no gradient but rounding; there is none.
        assert p.grad.abs().max() > 0, key
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            assert m.bias is None
            if m.weight.numel() > 5000:
                fan_in = m.weight[0].numel()
                assert m.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)


def test_weights_follow_the_global_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in build("resnet8", classes=10).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# ---------------------------------------------------------------- other widths


@given(st.sampled_from(list(NETWORKS)), st.floats(2**-10, 2.5), st.floats(1, 1.3))
@settings(max_examples=30)
def test_parameters_grow_with_the_width(name, width, factor):
    count, more = (parameter_count(shapes_only(name, classes=10, width=w)) for w in (width, width * factor))
    assert count <= more


@pytest.mark.parametrize("width", [0.25, 0.5, 2, 4])
def test_channel_counts_that_need_no_rounding_are_exact(width):
    one, other = (output_sizes(shapes_only("resnet20", classes=10, width=w), 32) for w in (1, width))
    assert [k for k, *_ in other] == [k * width for k, *_ in one]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(name, share, marks=[] if share == 0.1 or name == "resnet8" else pytest.mark.slow)
        for name in ("resnet8", "resnet20", "resnet18", "vgg19", "mobilenetv1", "mobilenetv2")
        for share in (2, 0.1, 0.05, 0.01)
    ],
)
def test_narrow_networks_have_the_parameters_asked_for(name, share):
    budget = int(share * parameter_count(shapes_only(name, classes=10, width=2 if name == "resnet8" else 1)))
    model = narrow(name, budget, classes=10)
    assert parameter_count(model) == pytest.approx(budget, rel=0.01 if share >= 0.05 else 0.03)
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_narrow_networks_have_round_channels_where_they_can():
    channels = {k for k, *_ in output_sizes(narrow("resnet18", 1_200_000, classes=10), 32)}
    assert all(k % 8 == 0 and k >= 16 for k in channels)


def test_narrow_draws_its_weights_and_nothing_else():
    torch.manual_seed(3)
    model, after = narrow("resnet8", 20_000, classes=10), torch.rand(1)
    torch.manual_seed(3)
    again, after_again = narrow("resnet8", 20_000, classes=10), torch.rand(1)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert torch.equal(after, after_again)


def test_networks_are_built_again_from_their_record():
    made = build("resnet50", classes=5, width=0.3, image_size=100, channels=1), narrow("vgg19", 50_000, classes=3)
    for model in made:
        again = rebuild(model._hrbp_network)
        assert {k: t.shape for k, t in again.state_dict().items()} == {
            k: t.shape for k, t in model.state_dict().items()
        }
        assert again._hrbp_network == model._hrbp_network


def test_tiny_budgets():
    for budget in (500, 1000, 3000):
        assert parameter_count(narrow("resnet20", budget, classes=10)) == pytest.approx(budget, rel=0.1)
    with pytest.raises(
        ValueError, match=r"narrow\(\): vgg19 with one channel a layer has \d+ parameters and the budget"
    ):
        narrow("vgg19", 100, classes=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, r"build\(\): name is 'resnet19'; it needs one of resnet8, .*mobilenetv2"),
        ({"width": 0}, "width is 0; it needs a positive number"),
        ({"width": math.nan}, "width is nan; it needs a positive number"),
        ({"width": math.inf}, "width is inf; it needs a positive number"),
        ({"classes": 0}, "classes is 0; it needs an int of at least 1"),
        ({"classes": 2.5}, "classes is 2.5; it needs an int of at least 1"),
        ({"channels": -1}, "channels is -1; it needs an int of at least 1"),
        ({"image_size": 0}, "image_size is 0; it needs an int of at least 1"),
        ({"name": "vgg19", "image_size": 15}, "image_size is 15; vgg19 halves images four times and needs 16 or more"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**{"name": "resnet8", "classes": 10, **options})
