"""Training on 2:4 kernels: exactly W~ and its transpose are used, both 2:4, and gradients are those of a dense layer.

A stand-in in the place of torch's kernels notes what it is given; another one is torch's own compressed tensors, made
on the CPU and multiplied as what they stand for.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cutlass
import hrbp
from hrbp.layers import semi_training
from hrbp.layers.view import sparse_layers
from hrbp.surgery import semi_training as surgery


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 32, 1, stride=(2, 1))
        self.bare = nn.Conv2d(32, 32, 1, bias=False)
        self.wide = nn.Conv2d(32, 32, 3, padding=1)
        self.odd = nn.Conv2d(32, 20, 1)
        self.hidden = nn.Linear(20, 32)
        self.deep = nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bare(self.point(self.stem(x).relu()).relu()).relu()
        x = self.odd(self.wide(x).relu()).relu().mean((2, 3))
        return self.head(self.deep(self.hidden(x).relu()).relu())


SEMI = ("point", "bare", "deep")


def net(method="sr-ste", structure="transposable") -> Net:
    torch.manual_seed(0)
    return hrbp.sparsify(Net(), 0.5, structure=structure, method=method, distribution="uniform")


@pytest.fixture
def given(monkeypatch) -> list[Tensor]:
    """What is compressed, in order; products are those of these matrices, in any dtype."""
    matrices = []

    def compress(matrix: Tensor) -> Tensor:
        assert matrix.dim() == 2
        assert matrix.is_contiguous()
        assert ((matrix != 0).view(len(matrix), -1, 4).sum(2) <= 2).all()
        matrices.append(matrix.clone())
        return matrices[-1]

    monkeypatch.setattr(semi_training, "to_sparse_semi_structured", compress)
    monkeypatch.setattr(semi_training, "DTYPES", (torch.float64,))
    monkeypatch.setattr(surgery, "device_refuses", lambda device: None)
    return matrices


def masked(layer: nn.Module) -> Tensor:
    view = sparse_layers(nn.ModuleDict({"x": layer}))["x"]
    return view.weight().flatten(1)


def test_which_layers_train_on_2_4_kernels(given):
    model = net()
    told = hrbp.train_semi_structured(model)
    kernel = "a 3x3 kernel: matrix products alone, linear layers and 1x1 convolutions"
    plain = "no mask that follows its weight: sparsify(structure='transposable', method='sr-ste')"
    assert told == {
        "stem": plain, "point": None, "bare": None, "wide": kernel, "deep": None, "head": plain,
        "odd": "20x32 is no multiple of 16x16 in both directions",
        "hidden": "32x20 is no multiple of 16x16 in both directions",
    }  # fmt: skip
    assert "on 2:4 kernels" in repr(model.deep)
    assert "on 2:4 kernels" not in repr(model.hidden)
    shown = {row.name: (row.structure, row.backend) for row in hrbp.summary(model.double(), (1, 3, 6, 6)).rows}
    assert shown["deep"] == ("transposable n:m on sparse tensor cores, master", "2:4")
    assert shown["hidden"] == ("transposable n:m, masked, master", "masked")
    rows = hrbp.train_semi_structured(net(structure="2:4"))
    assert rows["deep"] == "masks 2:4: 2:4 in both directions are those of structure 'transposable' at sparsity 0.5"
    quarter = hrbp.sparsify(Net(), 0.75, structure="transposable", method="ste", distribution="uniform")
    assert hrbp.train_semi_structured(quarter)["deep"].startswith("masks transposable n:m: 2:4 in both")
    stored = hrbp.sparsify(Net(), 0.5, structure="transposable")
    assert set(hrbp.train_semi_structured(stored).values()) == {plain}


@pytest.mark.parametrize("shape", [(6, 16, 5, 4), (16, 5, 4)])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_against_dense_float64(given, shape, form):
    model = net().double()
    hrbp.train_semi_structured(model)
    layer = model.point
    x = torch.randn(shape, dtype=torch.float64)
    x = (x.contiguous(memory_format=form) if x.dim() == 4 else x).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = masked(layer).requires_grad_()
    theirs, bias = x.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    expected = F.conv2d(theirs, weight[:, :, None, None], bias, stride=(2, 1))
    expected.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad.flatten(1), weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-12, atol=1e-12)
    back, ahead = given
    assert torch.equal(ahead, masked(layer))
    assert torch.equal(back, masked(layer).t())
    assert (layer.weight.grad.flatten(1)[ahead == 0] != 0).all()  # straight through: what is dropped learns, too
    assert y.is_contiguous(memory_format=torch.channels_last) or y.dim() == 3


def test_a_linear_layer_of_many_axes_and_no_gradient_of_the_input(given):
    model = net().double()
    hrbp.train_semi_structured(model)
    layer, x = model.deep, torch.randn(3, 2, 32, dtype=torch.float64)
    y = layer(x)
    assert len(given) == 1  # nothing is transposed for an input that needs no gradient
    torch.testing.assert_close(y, F.linear(x, masked(layer), layer.bias), rtol=1e-12, atol=1e-12)
    y.sum().backward()
    expected = torch.ones(16, 6, dtype=torch.float64) @ x.view(6, 32)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-12)
    layer.bias.requires_grad_(False)
    layer.weight.requires_grad_(False)
    assert not layer(x).requires_grad


def test_every_forward_compresses_what_the_weight_is_then(given):
    """After a step, after a change of which autograd knows nothing, and with another mask by that."""
    model = net().double()
    hrbp.train_semi_structured(model)
    layer, x = model.bare, torch.randn(2, 32, 3, 3, dtype=torch.float64, requires_grad=True)
    layer(x)
    before = [matrix.clone() for matrix in given]
    layer.weight.data[:4, :4] = torch.rand(4, 4, 1, 1, dtype=torch.float64) + torch.eye(4)[:, :, None, None].flip(0)
    y = layer(x)
    assert [torch.equal(a, b) for a, b in zip(given[2:], before, strict=True)] == [False, False]
    assert torch.equal(given[3], masked(layer))
    assert not torch.equal(given[3] != 0, before[1] != 0)
    old = given[2].clone()
    with torch.no_grad():
        layer.weight.mul_(-3)  # after the forward: its gradient is that of the forward
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = old.sum(1).view(1, 32, 1, 1).expand(2, 32, 3, 3)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_a_training_is_that_of_masked_dense_layers(given):
    """SR-STE, masks that move: the same weights after every step."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5))
    hrbp.sparsify(ours, 0.5, structure="transposable", method="sr-ste", include=["2"]).double()
    theirs = copy.deepcopy(ours)
    assert hrbp.train_semi_structured(ours)["2"] is None
    first, trained = sparse_layers(ours)["2"].mask(), []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
        trained.append((model, optimizer, hrbp.Evolver(model, optimizer, "sr-ste", total_steps=5, every=1, decay=0.1)))
    for _ in range(5):
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(5, (8,))
        for model, optimizer, evolver in trained:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            evolver.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert not torch.equal(first, sparse_layers(ours)["2"].mask())


@pytest.mark.slow
def test_a_compiler_leaves_it_alone(given):
    """The rest of the model is compiled; the products run as they are, and give the same."""
    model = net().double()
    hrbp.train_semi_structured(model)
    run = torch.compile(nn.Sequential(model.deep, nn.ReLU()), backend="eager")
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    run(x).sum().backward()
    theirs = x.detach().clone().requires_grad_()
    model.deep(theirs).relu().sum().backward()
    torch.testing.assert_close(x.grad, theirs.grad)
    torch.compiler.reset()


def test_it_ends_with_release_and_densify_and_no_file_has_it(given, tmp_path):
    model = net().double()
    hrbp.train_semi_structured(model)
    hrbp.save(model, tmp_path / "model.pt")
    assert not hrbp.load(tmp_path / "model.pt", Net()).deep.semi
    assert "semi" not in vars(hrbp.densify(copy.deepcopy(model)).deep)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(hrbp.release(copy.deepcopy(model))(x), expected, rtol=1e-10, atol=1e-10)
    assert "semi" not in vars(hrbp.release(model).deep)


def test_other_dtypes_are_refused_in_the_forward(monkeypatch):
    monkeypatch.setattr(surgery, "device_refuses", lambda device: None)
    model = net()
    hrbp.train_semi_structured(model)
    said = r"MasterLinear: it is set to train on 2:4 kernels .* got torch.float32; .* use autocast, or model.bfloat16"
    with pytest.raises(ValueError, match=said):
        model.deep(torch.randn(2, 32))
    with pytest.raises(ValueError, match=r"torch.float32 weight and a torch.bfloat16 input"):
        model.deep(torch.randn(2, 32, dtype=torch.bfloat16))
    assert hrbp.train_semi_structured(net())["deep"] is None


def test_a_cpu_stays_as_it_is():
    model = net()
    told = hrbp.train_semi_structured(model)
    assert {told[name] for name in SEMI} == {"on cpu: NVIDIA GPUs alone"}
    assert not model.deep.semi
    model(torch.randn(2, 3, 6, 6))


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_with_torchs_own_compressed_tensors_under_autocast(monkeypatch):
    """Packed by PyTorch for CUTLASS, float32 master weights, bfloat16 products."""

    cutlass.on_a_cpu(monkeypatch, semi_training)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64), nn.Linear(8, 8))
    hrbp.sparsify(layer, 0.5, structure="transposable", method="ste", include=["1"])
    layer[1].semi = True
    x = torch.randn(24, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer[1](x)
    assert y.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = masked(layer[1]).bfloat16().double()
    expected = F.linear(x.detach().bfloat16().double(), weight, layer[1].bias.detach().double())
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(x.grad.double(), dy.double() @ weight, rtol=0.02, atol=0.05)
    torch.testing.assert_close(
        layer[1].weight.grad.double(), dy.double().t() @ x.detach().bfloat16().double(), rtol=0.02, atol=0.05
    )
    assert layer[1].weight.grad.dtype == torch.float32
