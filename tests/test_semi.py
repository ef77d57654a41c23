"""2:4 layers on sparse tensor cores: which can go there, why the others stay, and that they compute the same.

Where there is no GPU, torch's own compressed tensors are made on the CPU and multiplied as what they stand for.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

import blocksparse as bs
import cutlass
import hrbp
from hrbp.layers import semi_structured as semi
from hrbp.layers.view import sparse_layers

pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor"),
]
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.point = nn.Conv2d(64, 64, 1, stride=(2, 1))
        self.bare = nn.Conv2d(64, 64, 1, bias=False, padding="same")
        self.wide = nn.Conv2d(64, 64, 3, padding=1)
        self.padded = nn.Conv2d(64, 64, 1, padding=1)
        self.odd = nn.Conv2d(64, 40, 1)
        self.hidden = nn.Linear(40, 64)
        self.deep = nn.Linear(64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bare(self.point(self.stem(x).relu()).relu()).relu()
        x = self.odd(self.padded(self.wide(x).relu()).relu()).relu().mean((2, 3))
        return self.head(self.deep(self.hidden(x).relu()).relu())


KERNEL = "a 3x3 kernel: matrix products alone, linear layers and 1x1 convolutions"
STAY = {
    "stem": KERNEL,
    "wide": KERNEL,
    "padded": "padding (1, 1)",
    "odd": "40x64 is no multiple of 16x16",
    "hidden": "64x40 is no multiple of 16x16",
    "head": "not 2:4",
}


@pytest.fixture
def device(monkeypatch) -> str:
    if GPU:
        return "cuda"

    cutlass.on_a_cpu(monkeypatch, semi)
    monkeypatch.setattr(semi, "device_refuses", lambda device: None)
    return "cpu"


def net(device: str, **options) -> Net:
    torch.manual_seed(0)
    made = hrbp.sparsify(Net(), 0.5, structure="2:4", saliency="magnitude", **options)
    return made.to(torch.bfloat16).to(device).eval()


@pytest.mark.parametrize("method", [None, "sr-ste"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_converted_layers_compute_the_same(device, method, form):
    made = net(device, method=method)
    plain = hrbp.densify(copy.deepcopy(made))
    masks = {name: layer.mask() for name, layer in sparse_layers(made).items()}
    told = hrbp.to_semi_structured(made)
    assert told == {"point": None, "bare": None, "deep": None, **STAY}
    assert list(told) == [name for name, _ in made.named_children()]
    x = torch.randn(4, 3, 9, 8, device=device, dtype=torch.bfloat16).contiguous(memory_format=form)
    inputs = {}
    for name, module in plain.named_children():
        module.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: (args[0], out)}))
    plain(x)
    for name in ("point", "bare", "deep"):
        layer, (at, expected) = made.get_submodule(name), inputs[name]
        assert semi.is_converted(layer)
        assert torch.equal(layer.weight.to_dense() != 0, masks[name][:, :, 0, 0])
        assert layer.__dict__.keys() == plain.get_submodule(name).__dict__.keys()
        assert not layer._buffers
        with torch.no_grad():
            y = layer(at)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(made(x), plain(x), rtol=0.05, atol=0.05)
    back = hrbp.densify(made)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in back.state_dict().items())
    assert [type(m) for m in back.children()] == [type(m) for m in plain.children()]


def test_any_model_whose_weights_are_2_4(device):
    linear = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 32)).half().to(device)
    with torch.no_grad():
        for layer in linear[:2]:
            runs = layer.weight.view(-1, 4)
            runs.scatter_(1, runs.abs().topk(2, largest=False).indices, 0)
    x = torch.randn(3, 5, 64, device=device, dtype=torch.float16)
    expected = linear(x)
    assert hrbp.to_semi_structured(linear) == {"0": None, "1": None, "2": "not 2:4"}
    assert hrbp.to_semi_structured(linear) == {"2": "not 2:4"}
    torch.testing.assert_close(linear(x), expected, rtol=0.01, atol=0.01)


def test_the_summary_says_what_is_there_and_what_is_not(device, tmp_path):
    made = net(device)
    note = str(hrbp.summary(made)).splitlines()[-1]
    assert note.startswith("sparse tensor cores, by hrbp.to_semi_structured(model): 3 of 7 layers; not wide (a 3x3 ")
    assert "not odd (40x64 is no multiple of 16x16)" in note
    parameters = hrbp.summary(made).parameters
    before = hrbp.summary(made).sparsity
    hrbp.to_semi_structured(made)
    summary = hrbp.summary(made)
    rows = {row.name: row for row in summary.rows}
    assert rows["bare"].structure == "2:4 on sparse tensor cores"
    assert rows["bare"].parameters == 64 * 64 // 2
    assert rows["bare"].bytes == 2 * 64 * 64 * 9 // 16
    assert rows["bare"].dense_bytes == 2 * 64 * 64
    assert rows["point"].bytes == 2 * (64 * 64 * 9 // 16 + 64)
    assert summary.parameters == parameters
    assert summary.sparsity == before == 0.5
    with pytest.raises(ValueError, match=r"save\(\): point is on sparse tensor cores; save before"):
        hrbp.save(made, tmp_path / "model.pt")


@pytest.mark.skipif(GPU, reason="about machines without sparse tensor cores")
def test_without_sparse_tensor_cores_layers_stay():
    made = net("cpu")
    before = copy.deepcopy(made.state_dict())
    told = hrbp.to_semi_structured(made)
    assert told == {**STAY, **dict.fromkeys(("point", "bare", "deep"), "on cpu: NVIDIA GPUs alone")}
    assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())
    assert len(sparse_layers(made)) == 7


def test_why_layers_stay(device, monkeypatch):
    weight = torch.zeros(32, 64, 1, 1, dtype=torch.float16, device=device)
    weight[:, ::4] = weight[:, 1::4] = 1
    conv = nn.Conv2d(64, 32, 1).half()
    assert semi.refuses(conv, weight) is None
    assert semi.refuses(conv, weight.float()) == "float32: model.half() or model.bfloat16() first"
    dense = weight.clone()
    dense[31, 62] = dense[31, 61] = dense[31, 60] = 1
    assert semi.refuses(conv, dense) == "not 2:4"
    assert semi.refuses(conv, weight[:, :62]) == "not 2:4"
    assert semi.refuses(nn.Conv2d(128, 32, 1, groups=2), weight) == "grouped"
    assert semi.refuses(conv, weight[:24]) == "24x64 is no multiple of 16x16"
    monkeypatch.setattr(semi.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    assert semi.refuses(conv, weight[:16]) == "16x64 is no multiple of 32x64"
    pattern = bs.BSRPattern.from_mask(weight != 0, (1, 1))
    stored = bs.BSRConv2d(pattern, dtype=torch.float16)
    assert semi.refuses(stored, stored.pattern.to_dense(stored.values)) is None
    padded = bs.BSRConv2d(pattern, padding=1, dtype=torch.float16)
    assert semi.refuses(padded, weight) == "padding (1, 1)"
    stored.relu = True
    assert semi.refuses(stored, weight) == "its negative results become zero, which no plain layer does"
    root = "it is the model itself: put it into an nn.Sequential"
    assert hrbp.to_semi_structured(padded) == {"": root}
    attention = nn.MultiheadAttention(16, 2)
    why = "a NonDynamicallyQuantizableLinear, whose forward may differ"
    assert hrbp.to_semi_structured(attention) == {"out_proj": why}


def test_what_adevice_refuses(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert semi.device_refuses(gpu) == "compute capability 7.5, below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert semi.device_refuses(gpu) == "this PyTorch has no cuSPARSELt"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert semi.device_refuses(gpu) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert semi.device_refuses(gpu) == "on an AMD GPU: NVIDIA GPUs alone"
    assert SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS.keys() >= set(semi.DTYPES)
