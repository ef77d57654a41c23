"""nn.Conv1d on stored blocks: the layer alone, and as a part of models that become sparse, train, and go on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import blocksparse as bs
import hrbp
from hrbp.formats.weights import layers, sparse_layer
from hrbp.layers.view import sparse_layers
from hrbp.reports.model_report import report_model

# stride, padding, dilation
CONVS = [(1, 0, 1), (1, "same", 2), (2, 3, 1), (3, 2, 2), ((1,), (1,), (4,)), (1, "valid", 1)]
STRUCTURES = {"block": {"blocksize": (4, 4)}, "n:m": {"m": 4}, "1xn": {"n": 4}, "hrbp": {"groups": 2, "min_rows": 4}}


def twin_of(layer: nn.Conv1d, pattern: bs.BSRPattern) -> nn.Conv1d:
    """The same dense layer under the mask."""
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.mul_(pattern.to_mask()[:, :, 0])
    return dense


class Waves(nn.Module):
    """A residual network along a line: dilated layers with padding "same", a strided one, BatchNorms, a 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 16, 5, padding=2)
        self.one = nn.Conv1d(16, 16, 3, padding="same", dilation=4, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.two = nn.Conv1d(16, 32, 3, stride=2, padding=1)
        self.point = nn.Conv1d(32, 32, 1)
        self.hidden = nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.norm(self.one(x)) + x).relu()
        return self.head(self.hidden(self.point(self.two(x)).relu().mean(2)).relu())


def waves() -> Waves:
    torch.manual_seed(0)
    return Waves().double()


def lines(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


SPARSE = ["one", "two", "point", "hidden"]


# ---------------------------------------------------------------------- the layer alone


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("backend", [None, "cpu", "torch"])
def test_result_and_gradients_are_those_of_the_dense_layer(conv, backend):
    torch.manual_seed(0)
    stride, padding, dilation = conv
    dense = nn.Conv1d(12, 8, 5, stride, padding, dilation, dtype=torch.float64)
    pattern = bs.BSRPattern.random((8, 12, 1, 5), (4, 3), 0.4)
    module, plain = bs.BSRConv1d.from_dense(dense, pattern, backend=backend), twin_of(dense, pattern)
    batch, turned = torch.randn(3, 12, 31, dtype=torch.float64), torch.randn(3, 31, 12, dtype=torch.float64)
    for x in (batch, batch[0], turned.transpose(1, 2)):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, needed = module(ours), plain(theirs)
        torch.testing.assert_close(y, needed)
        dy = torch.randn_like(needed)
        dx, dv, db = torch.autograd.grad(y, [ours, module.values, module.bias], dy)
        needed_dx, dw, needed_db = torch.autograd.grad(needed, [theirs, plain.weight, plain.bias], dy)
        torch.testing.assert_close((dx, db), (needed_dx, needed_db))
        torch.testing.assert_close(dv, pattern.values_from_dense(dw[:, :, None]))
    y = bs.conv1d(batch, module.values, pattern, module.bias, *conv, backend=backend)
    torch.testing.assert_close(y, plain(batch))


def test_tools_read_the_sizes_of_the_dense_layer():
    dense = nn.Conv1d(12, 8, 5, 2, 4, 3)
    module = bs.BSRConv1d.from_dense(dense, bs.BSRPattern.full((8, 12, 1, 5), (4, 3)))
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode transposed output_padding"
    for name in names.split():
        assert getattr(module, name) == getattr(dense, name), name
    assert torch.equal(module.weight, dense.weight)
    back = module.to_dense()
    assert type(back) is nn.Conv1d
    assert torch.equal(back.weight, dense.weight)
    assert (back.stride, back.padding, back.dilation) == (dense.stride, dense.padding, dense.dilation)
    again = bs.BSRConv1d(bs.BSRPattern.random((8, 12, 1, 5), (4, 3), 0.2), 2, 4, 3)
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, 12, 40)
    torch.testing.assert_close(again(x), dense(x))
    assert again.state_dict()["weight_shape"].tolist() == [8, 12, 1, 5]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: bs.BSRConv1d(p, padding="reflect"), ValueError, r"BSRConv1d\(\): padding is 'reflect'; it needs"),
        (
            lambda p: bs.BSRConv1d(p, stride=(1, 2)),
            ValueError,
            r"BSRConv1d\(\): stride is \(1, 2\); it needs an int >=",
        ),
        (lambda p: bs.BSRConv1d(p, padding=-1), ValueError, r"padding is -1; it needs an int >= 0, 'same' or 'valid'"),
        (lambda p: bs.BSRConv1d(bs.BSRPattern.full((4, 4, 3, 3), (2, 2))), ValueError, r"it needs \(K, C, 1, S\)"),
        (lambda p: bs.BSRConv1d(p)(torch.ones(2, 5, 9)), ValueError, r"conv1d\(\): x has shape \(2, 5, 9\); .* C = 4"),
        (lambda p: bs.BSRConv1d(p)(torch.ones(1, 4, 1, 9)), ValueError, r"conv1d\(\): .* \[N, C, L\] or \[C, L\]"),
        (lambda p: bs.BSRConv1d.from_dense(nn.Conv1d(4, 4, 3, padding_mode="circular"), p), ValueError, "'circular'"),
        (lambda p: bs.BSRConv1d.from_dense(nn.Conv2d(4, 4, 3), p), TypeError, "conv is Conv2d; it needs an nn.Conv1d"),
        (lambda p: bs.BSRConv1d.from_dense(nn.Conv1d(4, 4, 5), p), ValueError, r"conv needs \(4, 4, 1, 5\), that of"),
        (
            lambda p: bs.conv1d(torch.ones(2, 4, 9), torch.ones(6, 2, 2), p, residual=torch.ones(2, 4)),
            ValueError,
            r"residual has shape \(2, 4\); it needs \[N, K, Q\]",
        ),
    ],
)
def test_refusals_name_what_came_and_what_was_needed(call, error, message):
    with pytest.raises(error, match=message):
        call(bs.BSRPattern.random((4, 4, 1, 3), (2, 2), 0.5))


# ---------------------------------------------------------------------- in a model


@pytest.mark.parametrize("structure", ["unstructured", "vector", "kernel", "filter", "channel", "hrbp++", *STRUCTURES])
def test_every_structure_computes_what_its_mask_says(structure):
    net, x = waves(), lines()
    dense = copy.deepcopy(net)
    options = STRUCTURES.get(structure, {})
    hrbp.sparsify(net, 0.5, structure=structure, saliency="magnitude", **options)
    assert list(sparse_layers(net)) == SPARSE
    assert type(net.one) is bs.BSRConv1d
    for name, layer in sparse_layers(net).items():
        with torch.no_grad():
            dense.get_submodule(name).weight.mul_(layer.mask().view(layer.dense_shape))
    net(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(net(x), dense(x))
    for name, layer in sparse_layers(net).items():
        needed = dense.get_submodule(name).weight.grad.view(layer.shape) * layer.mask()
        torch.testing.assert_close(layer.module.pattern.to_dense(layer.module.values.grad), needed)
    plain = hrbp.densify(copy.deepcopy(net))
    assert type(plain.one) is nn.Conv1d
    assert plain.one.padding == (4,)
    torch.testing.assert_close(plain.eval()(x), net.eval()(x))


@pytest.mark.parametrize(
    ("method", "structure", "options"),
    [
        ("set", "block", {}),
        ("rigl", "block", {}),
        ("rigl", "hrbp++", {}),
        ("hrbp", "hrbp", {}),
        ("gmp", "unstructured", {"sparsity": 0.75}),
        ("ste", "unstructured", {}),
        ("sr-ste", "n:m", {}),
        ("subp", "1xn", {}),
    ],
)
def test_methods_train_along_lines(method, structure, options):
    net, x = waves(), lines(8)
    keeps = method if method in ("ste", "sr-ste", "subp") else None
    hrbp.sparsify(net, 0.5, structure=structure, method=keeps, **STRUCTURES.get(structure, {}))
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    evolver = hrbp.Evolver(net, optimizer, method, total_steps=8, every=2, **options)
    masks = {name: layer.mask() for name, layer in sparse_layers(net).items()}
    target = torch.arange(8) % 4
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        evolver.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {name for name, layer in sparse_layers(net).items() if not torch.equal(masks[name], layer.mask())}
    assert changed & {"one", "two", "point"}, (method, changed)
    plain = hrbp.densify(copy.deepcopy(net))
    torch.testing.assert_close(plain(x), net(x))


def test_rigl_grows_by_the_dense_gradient():
    net, x = waves(), lines()
    hrbp.sparsify(net, 0.75, structure="unstructured")
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    evolver = hrbp.Evolver(net, optimizer, "rigl", total_steps=10, every=1)
    twin = hrbp.densify(copy.deepcopy(net))
    for model in (net, twin):
        model(x).square().sum().backward()
    grads = evolver._gathered()
    for name in SPARSE:
        needed = twin.get_submodule(name).weight.grad.abs().view(grads[name].shape)
        torch.testing.assert_close(grads[name], needed)


def test_files_fusion_summary_report_and_masters_carry_lines(tmp_path):
    net, x = waves(), lines()
    hrbp.sparsify(net, 0.75, structure="block", blocksize=(4, 4))
    net(x)  # statistics of the norm
    net.eval()
    hrbp.save(net, tmp_path / "net.pt")
    again = hrbp.load(tmp_path / "net.pt", waves())
    torch.testing.assert_close(again(x), net(x))
    plain = waves().eval()
    plain.load_state_dict(hrbp.dense_state_dict(net))
    torch.testing.assert_close(plain(x), net(x))

    fused = hrbp.fuse(net)
    torch.testing.assert_close(fused(x), net(x))
    assert (fused.fusion.norms, fused.fusion.sums) == (1, 1)
    assert fused.fusion.relus >= 2

    rows = {row.name: row for row in hrbp.summary(net, x).rows}
    assert rows["two"].backend in ("cpu", "torch")
    assert rows["two"].dense_flops == 2 * 5 * 20 * 32 * 16 * 3
    assert rows["stem"].shape == (16, 2, 5)
    assert rows["stem"].structure.startswith("dense (the first layer")
    reports = report_model(net)
    assert reports["two"].kept == net.two.values.numel()
    assert reports["stem"].shape == (16, 2, 1, 5)
    tensors = net.state_dict()
    assert list(layers(tensors)) == ["stem", "head"]
    assert sparse_layer(tensors, "one") == net.one.pattern


def test_single_weights_are_packed_in_files(tmp_path):
    net, x = waves().eval(), lines()
    hrbp.sparsify(net, 0.5, structure="unstructured")
    hrbp.save(net, tmp_path / "net.pt")
    again = hrbp.load(tmp_path / "net.pt", waves())
    torch.testing.assert_close(again(x), net(x))
    assert type(again.one) is bs.BSRConv1d


@pytest.mark.parametrize("saliency", ["random", "snip", "grasp", "synflow", "magnitude+gradient"])
def test_saliencies_score_lines(saliency):
    net, x = waves(), lines(8)
    hrbp.sparsify(
        net, 0.5, structure="unstructured", distribution="global", saliency=saliency, batch=(x, torch.arange(8) % 4)
    )
    sums = [layer.kept() for layer in sparse_layers(net).values()]
    cells = sum(layer.mask().numel() for layer in sparse_layers(net).values())
    assert sum(sums) == pytest.approx(cells / 2, abs=2)


def test_masks_of_prune_are_taken_over():
    net, x = waves().eval(), lines()
    prune.l1_unstructured(net.two, "weight", amount=0.5)
    expected = net(x)
    hrbp.from_prune(net)
    assert type(net.two) is bs.BSRConv1d
    torch.testing.assert_close(net(x), expected)


def test_unbatched_compiled_and_exported():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 3))
    hrbp.sparsify(net, 0.5, structure="block", blocksize=(4, 4))
    assert list(sparse_layers(net)) == ["1"]
    x = torch.randn(3, 4, 20)
    torch.testing.assert_close(net(x[0]), net(x)[0])
    assert hrbp.summary(net, x[0]).rows[1].backend in ("cpu", "torch")
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


def test_a_layer_with_other_padding_stays_dense_and_says_so():
    net = nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv1d(8, 8, 4, padding="same"),
        nn.Conv1d(8, 8, 3), nn.Conv1d(8, 4, 3),
    )  # fmt: skip
    hrbp.sparsify(net, 0.5, structure="unstructured")
    assert list(sparse_layers(net)) == ["3"]
    text = str(hrbp.summary(net))
    assert "padding_mode 'circular'" in text
    assert "padding 'same' that is not symmetric" in text
    reason = hrbp.to_semi_structured(net)["3"]
    assert reason == "a Conv1d: linear layers and 1x1 convolutions alone"
