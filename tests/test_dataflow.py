"""First and last layers are those that read the input and give the output, whatever the order of registration."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.surgery.dataflow import FLOW, ORDER, ends


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


class Backwards(nn.Module):
    """Registered from the last layer to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.middle, self.other, self.stem = linear(), linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        x = x + self.other(self.middle(x).relu())
        return self.head(x)


class TwoBranchesThreeHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.trunk = linear(), linear(), nn.Linear(16, 8)
        self.heads = nn.ModuleList([linear() for _ in range(3)])
        self.extra = linear()

    def forward(self, x: Tensor) -> dict[str, object]:
        x = self.trunk(torch.cat([self.a(x), self.b(x * 2)], 1)).relu()
        x = self.extra(x)
        return {"all": [head(x) for head in self.heads[:2]], "one": (self.heads[2](x.flatten(1)), x)}


class Residual(nn.Module):
    """The input and every sum reach the output past the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(linear(), nn.ReLU(), linear()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Shared(nn.Module):
    """A stem for two inputs, and a head that is used on three scales."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.stem, self.deep = linear(), linear(), linear(), linear()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body(self.stem(x) - self.stem(x + 1)).relu()
        return [self.head(self.deep(x)), self.head(self.deep(x * 2)), self.head(self.deep(self.deep(x)))]


class ByValue(nn.Module):
    """A path that depends on values: symbols cannot follow it, a batch can."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.middle, self.stem = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.middle(x) if float(x.sum()) > -1e9 else x
        y = torch.zeros_like(x)
        y[:, :4] = x[:, :4]
        return self.head(y)


class NotFollowed(nn.Module):
    """No forward at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()


@pytest.mark.parametrize("with_batch", [False, True])
@pytest.mark.parametrize(
    ("make", "first", "last"),
    [
        (Backwards, {"stem"}, {"head"}),
        (TwoBranchesThreeHeads, {"a", "b"}, {"heads.0", "heads.1", "heads.2"}),
        (Residual, {"blocks.0.0"}, {"blocks.2.2"}),
        (Shared, {"stem"}, {"head"}),
        (lambda: nn.Sequential(linear(), nn.Sequential(linear(), nn.ReLU(), linear())), {"0"}, {"1.2"}),
    ],
)
def test_ends_are_found_by_data_flow(make, first, last, with_batch):
    model = make()
    found = ends(model, layers_of(model), torch.randn(4, 8) if with_batch else None)
    assert found == (dict.fromkeys(sorted(first), FLOW), dict.fromkeys(sorted(last), FLOW))


def test_what_depends_on_values_is_followed_with_a_batch():
    model = ByValue()
    names = list(layers_of(model))
    assert ends(model, layers_of(model)) == ({names[0]: ORDER}, {names[-1]: ORDER})
    assert ends(model, layers_of(model), torch.randn(4, 8)) == ({"stem": FLOW}, {"head": FLOW})
    assert ends(NotFollowed(), layers_of(NotFollowed()), torch.randn(4, 8)) == ({"a": ORDER}, {"c": ORDER})


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "vgg19", "mobilenetv1", "mobilenetv2"])
def test_the_networks_of_the_papers_keep_their_stem_and_classifier(name):
    model = hrbp.models.build(name, classes=5, width=0.25)
    layers = layers_of(model)
    names = list(layers)
    for found in (ends(model, layers), ends(model, layers, torch.randn(2, 3, 32, 32))):
        assert found == ({names[0]: FLOW}, {names[-1]: FLOW})


def test_modules_of_pytorch_with_layers_inside_are_passed():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = linear(), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 1, 8), 2, None, False)
            self.norm, self.head = nn.LSTM(8, 8), linear()

        def forward(self, x: Tensor) -> Tensor:
            x, (_, _) = self.norm(self.body(self.embed(x)))
            return self.head(x)

    model = Model()
    for x in (None, torch.randn(2, 3, 8)):
        assert ends(model, layers_of(model), x) == ({"embed": FLOW}, {"head": FLOW})


def test_compiled_parts_are_passed_without_compiling():
    def refused(*_):
        raise AssertionError("compiled")

    parts = (linear(), nn.Sequential(linear(), nn.ReLU()), linear(), linear())
    model = nn.Sequential(*(torch.compile(part, backend=refused) for part in parts))
    model[0].compile(backend=refused)
    names = list(layers_of(model))
    for x in (None, torch.randn(2, 8)):
        assert ends(model, layers_of(model), x) == ({names[0]: FLOW}, {names[-1]: FLOW})


class Writes(nn.Module):
    """A forward that writes to its module, draws, and calls a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.norm, self.head = linear(), linear(), nn.BatchNorm1d(8), linear()
        self.calls, self.seen, self.last = 0, [], None
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.steps += 1
        self.last = x
        x = self.stem(x) * random.random() * float(np.random.rand()) * float(torch.rand(()))  # noqa: NPY002
        return self.head(self.norm(self.middle(x)))


@pytest.mark.parametrize("with_batch", [False, True])
def test_a_model_and_the_generators_are_as_before(with_batch):
    model = Writes()
    hooked = []
    model.middle.register_forward_hook(lambda *_: hooked.append(1))
    model.register_forward_pre_hook(lambda *_: hooked.append(1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    drawn = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 8), torch.zeros(4)), 2, True)
    torch.manual_seed(0)
    hrbp.sparsify(model, 0.5, structure="kernel", batch=loader if with_batch else None)
    assert torch.equal(torch.rand(3), drawn[0])
    assert (random.random(), np.random.rand()) == drawn[1:]  # noqa: NPY002
    assert (model.calls, model.seen, model.last, hooked) == (0, [], None, [])
    assert model.training
    now = model.state_dict()
    others = [name for name in before if not name.startswith("middle")]
    assert all(torch.equal(now[name], before[name]) for name in others)
    assert list(sparse_layers(model)) == ["middle"]
    assert record_of(model).dense == {"stem": f"the first layer, {FLOW}", "head": f"the last layer, {FLOW}"}


def test_the_summary_names_every_first_and_last_layer():
    model = hrbp.sparsify(TwoBranchesThreeHeads(), 0.5, structure="kernel")
    assert list(sparse_layers(model)) == ["trunk", "extra"]
    text = str(hrbp.summary(model))
    assert text.count(f"dense (one of 2 first layers, {FLOW})") == 2
    assert text.count(f"dense (one of 3 last layers, {FLOW})") == 3
    model = hrbp.sparsify(ByValue(), 0.5, structure="kernel")
    assert list(sparse_layers(model)) == ["middle"]
    assert f"dense (the first layer, {ORDER})" in str(hrbp.summary(model))


def test_a_batch_is_read_once_and_whole():
    """A generator of pairs gives its first one to the data flow, and all of them to the saliency."""
    torch.manual_seed(0)
    pairs = [(torch.randn(4, 8), torch.randint(0, 8, (4,))) for _ in range(3)]
    masks = []
    for batch in (pairs, iter(pairs), (pair for pair in pairs)):
        torch.manual_seed(1)
        model = hrbp.sparsify(Backwards(), 0.5, structure="kernel", saliency="snip", batch=batch)
        masks.append([layer.mask() for layer in sparse_layers(model).values()])
    for other in masks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks[0], other, strict=True))
    with pytest.raises(ValueError, match=r"batch gives a Tensor; it needs pairs \(inputs, targets\)"):
        hrbp.sparsify(Backwards(), 0.5, structure="kernel", batch=torch.randn(4, 8))


def test_the_error_says_how_to_make_first_and_last_layers_sparse():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = linear(), linear(), linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.trunk(x)
            return self.a(x), self.b(x)

    with pytest.raises(ValueError, match=r"one of 2 last layers, by data flow.*`include` names layers that are to be"):
        hrbp.sparsify(Heads(), 0.5, structure="kernel")
    assert list(sparse_layers(hrbp.sparsify(Heads(), 0.5, structure="kernel", include=["a"]))) == ["a"]
