"""hrbp.to_batch_last: the same function, gradients and statistics, with activations whose images are innermost."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import blocksparse as bs
import hrbp
from hrbp.layers.batch_last import innermost

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


class Block(nn.Module):
    """Of a wide residual network: norms and ReLUs before the convolutions, dropout between; a sum in place."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.bn2, self.dropout, self.conv2 = nn.BatchNorm2d(k), nn.Dropout(0.0), nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c, k, 1, stride, bias=False) if c != k else nn.Identity()

    def forward(self, x):
        y = self.bn1(x).relu_()
        identity = self.shortcut(y)
        y = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(y)))))
        y += identity
        return y


class Wide(nn.Sequential):
    def __init__(self) -> None:
        blocks = [Block(8, 16, 1), Block(16, 16, 1), Block(16, 32, 2)]
        end = nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(16), nn.Flatten(), nn.Linear(32, 5)
        super().__init__(nn.Conv2d(3, 8, 3, 1, 1, bias=False), *blocks, *end)


def network(name: str, structure: str = "hrbp", width: float = 0.25) -> nn.Module:
    model = Wide() if name == "wide" else hrbp.models.build(name, classes=5, width=width)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its random numbers fall on other elements
    return hrbp.sparsify(model, 0.7, structure=structure).double()


def watched(model: nn.Module) -> list[str]:
    """Names of the modules that return images in another format than batch_last, as they are called."""
    others: list[str] = []

    def look(name):
        image = lambda y: y.dim() == 4 and y.shape[2:] != (1, 1)  # noqa: E731
        return lambda module, args, y: others.append(name) if image(y) and not innermost(y) else None

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(look(name))
    return others


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "vgg19", "mobilenetv2", "wide"])
def test_networks_compute_the_same_and_stay_in_it(name):
    model = network(name)
    last = hrbp.to_batch_last(copy.deepcopy(model))
    assert list(last.state_dict()) == list(model.state_dict())
    others = watched(last)
    size = 16 if name.startswith("resnet") else 32
    x = torch.randn(3, 3, size, size).double()
    for train in (True, False):
        model.train(train)
        last.train(train)
        a, b = (t.clone().requires_grad_() for t in (x, x))
        needed, got = model(a), last(b)
        torch.testing.assert_close(got, needed, **TOLERANCE)
        dy = torch.randn_like(needed)
        needed.backward(dy)
        got.backward(dy)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-7, atol=1e-7)
    for (key, p), q in zip(model.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-7, atol=1e-7, msg=key)
    found = last.state_dict()
    for key, t in model.state_dict().items():  # running statistics
        torch.testing.assert_close(found[key], t, **TOLERANCE)
    assert not others
    assert not last.batch_last.stayed
    assert last.batch_last.sparse == sum(isinstance(m, bs.BSRConv2d) for m in model.modules())


def test_what_it_says():
    model = hrbp.to_batch_last(network("resnet18"))
    said = str(model.batch_last)
    assert said.startswith(f"batch_last: {model.batch_last.sparse} sparse convolutions, ")
    assert "dense convolutions, copied into it: conv1" in said
    again = hrbp.to_batch_last(model)
    assert again is model
    assert str(model.batch_last) == said
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == 1 + model.batch_last.sparse


@pytest.mark.parametrize(
    ("method", "structure", "copied"), [("ste", "unstructured", 9), ("subp", "1xn", 1)], ids=["mask", "blocks"]
)
def test_layers_with_master_weights(method, structure, copied):
    """Those that compute on stored blocks read batch_last; masked ones are dense convolutions."""
    torch.manual_seed(0)
    model = hrbp.models.build("resnet8", classes=5).double()
    options = {"n": 4} if structure == "1xn" else {}
    hrbp.sparsify(model, 0.5, structure=structure, method=method, **options)
    x = torch.randn(4, 3, 16, 16).double()
    if method == "ste":
        with pytest.raises(ValueError, match="has no convolution on stored blocks"):
            hrbp.to_batch_last(model)
        return
    needed = model.eval()(x)
    others = watched(hrbp.to_batch_last(model))
    torch.testing.assert_close(model(x), needed, **TOLERANCE)
    assert len(model.batch_last.copied) == copied
    assert not others


def test_it_copies_compiles_fuses_before_and_is_saved():
    model = network("resnet8").eval()
    x = torch.randn(3, 3, 16, 16).double()
    with torch.no_grad():
        needed = model(x)
    last = hrbp.to_batch_last(copy.deepcopy(model))
    fused = hrbp.to_batch_last(hrbp.fuse(model))
    compiled = torch.compile(last, fullgraph=True, backend="aot_eager")
    file = io.BytesIO()
    torch.save(last, file)
    file.seek(0)
    for other in (copy.deepcopy(last), fused, compiled, torch.load(file, weights_only=False)):
        with torch.no_grad():
            torch.testing.assert_close(other(x), needed, **TOLERANCE)
            torch.testing.assert_close(other(x[:1]), needed[:1], **TOLERANCE)
    fresh = network("resnet8")
    fresh.load_state_dict(last.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), needed, **TOLERANCE)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.mixed = nn.Conv2d(8, 16, 1, stride=2, bias=True)
        self.norm = nn.GroupNorm(4, 16)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.average = nn.AvgPool2d(2)
        self.last = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.mixed(self.conv(x)))
        x = F.pad(x, (1, 1, 1, 1))
        y, where = self.pool(self.last(x))
        return y, where, self.average(x).mean((2, 3))


def test_what_has_no_form_is_named_and_right():
    torch.manual_seed(0)
    model = Odd().double()
    hrbp.sparsify(model, 0.5, structure="unstructured", include=["last"])
    x = torch.randn(3, 3, 12, 10).double()
    needed = model(x)
    hrbp.to_batch_last(model)
    torch.testing.assert_close(model(x), needed, **TOLERANCE)
    assert model.batch_last.stayed == [
        ("pad", "pad may return another format"),
        ("norm", "GroupNorm has no form for batch_last"),
    ]
    assert model.batch_last.copied == ["conv"]
    assert model.batch_last.forms == {"BatchLastPointwise": 1, "BatchLastMaxPool2d": 1, "BatchLastAvgPool2d": 1}


def test_refusals():
    with pytest.raises(ValueError, match=r"to_batch_last\(\): the model has no convolution on stored blocks"):
        hrbp.to_batch_last(hrbp.models.build("resnet8", classes=5))
    with pytest.raises(TypeError, match=r"model is str; it needs an nn.Module"):
        hrbp.to_batch_last("resnet8")
