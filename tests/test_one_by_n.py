"""1xN blocks of a pretrained model: stored and run as BSR (n, 1), filters rearranged, ranked over all layers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import blocksparse as bs
import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers

SIZES = [2, 4, 8, 16, 32]
SEEDS = st.integers(0, 2**32 - 1)


class Net(nn.Module):
    """Kernels of 3x3 and 1x1, narrow and wide, a linear layer; filters of very different size."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Conv2d(3, a, 3)
        self.three = nn.Conv2d(a, b, 3, padding=1)
        self.one = nn.Conv2d(b, c, 1, bias=False)
        self.hidden = nn.Linear(c, b)
        self.head = nn.Linear(b, 5)
        generator = torch.Generator().manual_seed(sum(widths))
        with torch.no_grad():
            for layer in (self.three, self.one, self.hidden):
                size = torch.rand(len(layer.weight), generator=generator) * 3 + 0.1
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
                layer.weight.mul_(size.view(-1, *[1] * (layer.weight.dim() - 1)) / layer.weight[0, 0].numel())

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.three(self.stem(x).relu()).relu()).mean((2, 3))
        return self.head(self.hidden(x).relu())


@settings(max_examples=60)
@given(
    st.sampled_from(SIZES), st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 2, 3]), st.integers(1, 2),
    st.integers(0, 2), st.integers(1, 2), st.floats(0, 0.95), st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_blocks_compute_what_the_masked_dense_layer_does(
    n, rows, channels, kernel, stride, padding, dilation, sparsity, uniform, rearrange, seed
):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, n * rows, kernel, stride, padding, dilation).double()
    choice = hrbp.choose(conv.weight.detach().abs(), sparsity, "1xn", n=n, uniform=uniform, rearrange=rearrange)
    sparse = bs.BSRConv2d.from_dense(conv, choice.pattern())
    assert sparse.pattern.blocksize == (n, 1)
    side = dilation * (kernel - 1) + 1 + int(torch.randint(5, (), generator=generator))
    x = torch.randn(3, channels, side, side + 1, generator=generator, dtype=torch.float64)
    # The twin: dense, its weight times the mask.
    weight, mine, theirs = conv.weight.detach().requires_grad_(), *(x.clone().requires_grad_() for _ in range(2))
    y = nn.functional.conv2d(theirs, weight * choice.mask, conv.bias, stride, padding, dilation)
    out = sparse(mine)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(dy)
    out.backward(dy)
    assert torch.allclose(out, y, rtol=1e-10, atol=1e-12)
    assert torch.allclose(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    grad = sparse.pattern.to_dense(sparse.values.grad)
    assert torch.allclose(grad, weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_the_best_blocks_of_all_layers_stay(n):
    net = Net(32, 64, 32)
    blocks = []
    for name in ("three", "one", "hidden"):
        weight = net.get_submodule(name).weight.detach().flatten(1)
        filters = sorted(range(len(weight)), key=lambda i: -float(weight[i].abs().sum()))
        area = 9 if name == "three" else 1
        for first in range(0, len(weight), n):
            for channel in range(weight.shape[1] // area):
                cells = weight[filters[first : first + n], channel * area : (channel + 1) * area]
                blocks.append((float(cells.abs().sum()), name, tuple(filters[first : first + n]), channel, n * area))
    blocks.sort(reverse=True)
    kept = blocks[: len(blocks) // 3]
    # A layer may not be left with nothing: this budget leaves none so.
    assert {name for _, name, *_ in kept} == {"three", "one", "hidden"}
    cells = sum(size for *_, size in kept)
    hrbp.sparsify(
        net, 1 - cells / sum(size for *_, size in blocks), structure="1xn", n=n, rearrange=True, saliency="magnitude",
        distribution="global",
    )  # fmt: skip
    layers = sparse_layers(net)
    for name, layer in layers.items():
        expected = torch.zeros(layer.shape, dtype=torch.bool)
        for _, owner, filters, channel, _ in kept:
            if owner == name:
                expected[list(filters), channel] = True
        assert torch.equal(layer.mask(), expected), name


def test_rearranged_filters_keep_more():
    """Large and small filters in turns: neighbours are alike only when sorted."""
    for n in (2, 4, 8):
        weight = torch.ones(32, 8, 3, 3)
        weight[1::2] = 0.01
        stay, moved = (hrbp.make_mask(weight, 0.5, "1xn", n=n, rearrange=flag) for flag in (False, True))
        assert torch.equal(moved, weight == 1)
        assert float((weight * stay).sum()) < 0.51 * float((weight * moved).sum())


def test_layers_that_blocks_do_not_divide_stay_dense_and_say_why():
    net = Net(16, 24, 32)
    x = torch.randn(2, 3, 9, 9)
    hrbp.sparsify(net, 0.5, structure="1xn", n=16, saliency="magnitude", rearrange=True)
    assert list(sparse_layers(net)) == ["one"]
    reason = "1xn: grains of 16 do not divide K = 24"
    assert record_of(net).dense["three"] == record_of(net).dense["hidden"] == reason
    assert f"dense ({reason})" in str(hrbp.summary(net))
    assert net(x).shape == (2, 5)


@pytest.mark.parametrize("n", SIZES)
def test_the_summary_tells_the_bytes_of_small_blocks(n):
    net = hrbp.sparsify(Net(32, 64, 32), 0.9, structure="1xn", n=n)
    told = hrbp.summary(net)
    for row in told.rows:
        if row.name in sparse_layers(net):
            module = net.get_submodule(row.name)
            assert row.structure == f"1xn ({n}, 1)"
            held = [module.values, module.index] + ([] if module.bias is None else [module.bias])
            assert row.bytes == sum(t.numel() * t.element_size() for t in held)
    assert ("the index takes 16 bytes a block, more than its weights" in str(told)) == (4 * n < 16)


def test_rearranged_models_are_saved_densified_and_loaded(tmp_path):
    net = hrbp.sparsify(
        Net(16, 32, 16), 0.6, structure="1xn", n=4, rearrange=True, saliency="magnitude", distribution="global"
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    assert any(layer.row_order() is not None for layer in sparse_layers(net).values())
    hrbp.save(net, tmp_path / "model.pt")
    loaded = hrbp.load(tmp_path / "model.pt", Net(16, 32, 16))
    assert torch.equal(loaded(x), net(x))
    assert record_of(loaded).structure == record_of(net).structure
    assert torch.allclose(hrbp.densify(copy.deepcopy(net))(x), net(x), atol=1e-5)
