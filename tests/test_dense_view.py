"""What tools read of a layer of stored blocks: sizes, the dense weight, named paddings, single images."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import blocksparse as bs

SHAPE, BLOCK = (8, 12, 3, 3), (4, 3)


def pairs() -> list[tuple[nn.Module, nn.Module]]:
    """A layer of stored blocks and the dense one that computes the same."""
    generator = torch.Generator().manual_seed(3)
    conv = bs.BSRConv2d(bs.BSRPattern.random(SHAPE, BLOCK, 0.4, generator), stride=2, padding=1)
    linear = bs.BSRLinear(bs.BSRPattern.random((8, 12, 1, 1), BLOCK, 0.4, generator))
    return [(layer, layer.to_dense()) for layer in (conv, linear)]


def test_sizes_are_those_of_the_dense_layer():
    for layer, dense in pairs():
        names = ["in_features", "out_features"]
        if isinstance(layer, bs.BSRConv2d):
            names = [name for name in vars(dense) if not name.startswith("_") and name != "training"]
            assert {"in_channels", "out_channels", "kernel_size", "groups", "transposed"} <= set(names)
        for name in names:
            assert getattr(layer, name) == getattr(dense, name), name


def test_the_weight_is_the_dense_one_and_is_differentiable():
    for layer, dense in pairs():
        assert torch.equal(layer.weight, dense.weight)
        assert layer.weight.shape == dense.weight.shape
        (layer.weight.square().sum() + layer.bias.sum()).backward()
        torch.testing.assert_close(layer.values.grad, 2 * layer.values.detach())
        assert type(layer.weight * 2) is torch.Tensor
        x = torch.randn(3, 12, 5, 5) if layer.weight.dim() == 4 else torch.randn(3, 12)
        mine = F.conv2d(x, layer.weight) if layer.weight.dim() == 4 else F.linear(x, layer.weight)
        assert type(mine) is torch.Tensor
        with torch.inference_mode():
            assert torch.equal(layer.weight, dense.weight)
            assert torch.count_nonzero(layer.weight.data) == torch.count_nonzero(dense.weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.fill_(1),
        lambda w: w.data.copy_(torch.zeros_like(w)),
        lambda w: w.detach().mul_(2),
        lambda w: w.data.__setitem__(0, 1.0),
        lambda w: w.data[0].zero_(),
        lambda w: w.data.view(-1).unbind()[0].add_(1),
        lambda w: nn.init.kaiming_normal_(w),
        lambda w: nn.init.zeros_(w.data),
        lambda w: torch.neg(w.detach(), out=w.data),
        lambda w: F.relu(w.data, inplace=True),
        lambda w: w.register_hook(print),
        lambda w: w.requires_grad_(False),
        lambda w: w.grad,
        lambda w: setattr(w, "data", torch.zeros(1)),
        lambda w: setattr(w, "grad", None),
        lambda w: setattr(w, "requires_grad", False),
    ],
)
def test_writing_to_the_weight_is_refused(write):
    for layer, _ in pairs():
        before = layer.values.detach().clone()
        for inference in (False, True):
            with (
                torch.inference_mode(inference),
                pytest.raises(TypeError, match=r"would not reach the layer.*layer\.va"),
            ):
                write(layer.weight)
        assert torch.equal(layer.values, before)


def test_writing_through_numpy_is_refused():
    for layer, _ in pairs():
        for array in (layer.weight.detach().numpy(), np.asarray(layer.weight.data)):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_putting_another_weight_there_is_refused():
    for layer, dense in pairs():
        for value in (dense.weight, dense.weight.data, None):
            with pytest.raises(TypeError, match=r"another (weight|parameter) would not reach the layer"):
                layer.weight = value
        with pytest.raises(ValueError, match="does not have a parameter"):
            parametrizations.weight_norm(layer)
        with pytest.raises((TypeError, KeyError)):
            prune.l1_unstructured(layer, "weight", 0.5)
        assert set(layer.state_dict()) >= {"values", "bias", "indptr"}
        assert dict(layer.named_parameters()).keys() == {"values", "bias"}


def test_the_weight_stays_out_of_files_and_copies():
    for layer, dense in pairs():
        assert not any(name.endswith("weight") for name in layer.state_dict())
        assert torch.equal(copy.deepcopy(layer).weight, dense.weight)
        file = io.BytesIO()
        torch.save({"weight": layer.weight}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["weight"]
        assert type(loaded) is torch.Tensor
        assert torch.equal(loaded, dense.weight)


def test_compiled_code_may_read_the_weight():
    layer, dense = pairs()[1]

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return F.linear(x, self.layer.weight, self.layer.bias) + self.layer(x)

    x = torch.randn(3, 12)
    compiled = torch.compile(Reads(), backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2 * dense(x))


@pytest.mark.parametrize("dilation", [1, (2, 1)])
def test_same_and_valid_padding(dilation):
    pattern = bs.BSRPattern.full((4, 4, 3, 5), (2, 2))
    x = torch.randn(2, 4, 9, 8)
    for name in ("same", "valid"):
        layer = bs.BSRConv2d(pattern, padding=name, dilation=dilation)
        dense = nn.Conv2d(4, 4, (3, 5), padding=name, dilation=dilation)
        dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        torch.testing.assert_close(layer(x), dense(x))
        y = bs.conv2d(x, layer.values, pattern, layer.bias, 1, name, dilation)
        torch.testing.assert_close(y, dense(x))
        assert bs.BSRConv2d.from_dense(dense, pattern).padding == layer.padding


def test_paddings_that_do_not_fit_are_refused():
    pattern = bs.BSRPattern.full((4, 4, 3, 4), (2, 2))
    with pytest.raises(ValueError, match=r"BSRConv2d\(\): padding 'same' of kernel \(3, 4\) .* is not symmetric"):
        bs.BSRConv2d(pattern, padding="same")
    with pytest.raises(ValueError, match=r"padding 'same' needs stride 1; stride is 2"):
        bs.BSRConv2d(pattern, stride=2, padding="same")
    with pytest.raises(ValueError, match=r"padding is 'full'; it needs 'same', 'valid'"):
        bs.BSRConv2d(pattern, padding="full")


def test_a_single_image_is_a_batch_of_one():
    layer, dense = pairs()[0]
    x, residual = torch.randn(12, 9, 7, requires_grad=True), torch.randn(8, 5, 4)
    y = layer(x)
    assert y.shape == (8, 5, 4)
    torch.testing.assert_close(y, dense(x))
    torch.testing.assert_close(layer(x, residual), y + residual)
    y.sum().backward()
    mine = x.grad
    x.grad = None
    dense(x).sum().backward()
    torch.testing.assert_close(mine, x.grad)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x[None]), dense(x[None]))
