"""Convolutions in groups: patterns of [K, C/groups, R, S], one block-diagonal index for kernels, no block outside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import blocksparse as bs
import hrbp
from hrbp.formats.weights import sparse_layer
from hrbp.layers.in_groups import in_groups
from hrbp.layers.view import sparse_layers
from hrbp.reports.model_report import report_model
from hrbp.structures.base import Selection
from hrbp.structures.registry import structure
from oracle import assert_close
from runners import RUNNERS

STRUCTURES = {
    "n:m": {"m": 4}, "block": {"blocksize": (4, 4)}, "1xn": {"n": 4}, "elementwise": {"min_rows": 4},
    "hrbp": {"min_rows": 4, "groups": 2},
}  # fmt: skip


@st.composite
def grouped(draw: st.DrawFn) -> tuple[bs.BSRPattern, int]:
    """A pattern in groups, with or without an order of the filters of each, and its number of groups."""
    groups, (bk, bc) = draw(st.sampled_from([2, 3, 8])), draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (4, 2)]))
    k, c = bk * draw(st.integers(1, 2)), bc * draw(st.integers(1, 2))
    r, s = draw(st.sampled_from([(1, 1), (3, 3), (1, 5)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    plain = bs.BSRPattern.random((groups * k, c, r, s), (bk, bc), draw(st.sampled_from([0.0, 0.4, 1.0])), generator)
    order = None
    if draw(st.booleans()):
        order = torch.cat([i * k + torch.randperm(k, generator=generator) for i in range(groups)])
    made = bs.BSRPattern(plain.shape, plain.blocksize, plain.indptr, plain.indices, order)
    return made.grouped(groups), groups


# ---------------------------------------------------------------------- the pattern


@given(grouped())
@settings(max_examples=30)
def test_a_pattern_in_groups_is_that_of_its_weight(case):
    pattern, groups = case
    plain = pattern.grouped(1)
    assert (pattern.groups, pattern.shape, pattern.nnzb) == (groups, plain.shape, plain.nnzb)
    assert pattern != plain
    assert plain.grouped(groups) == pattern == pickle.loads(pickle.dumps(pattern))
    assert torch.equal(pattern.indices, plain.indices)
    assert torch.equal(pattern.to_mask(), plain.to_mask())
    weight = torch.randn(pattern.shape)
    assert torch.equal(pattern.values_from_dense(weight), plain.values_from_dense(weight))
    # What kernels read is the pattern of the block-diagonal filter bank over all channels.
    whole = bs.BSRPattern.from_mask(
        Selection(pattern.to_mask(), pattern.blocksize, groups=groups).whole(), pattern.blocksize, pattern.row_order
    )
    assert torch.equal(pattern.index, whole.index)


def test_a_block_across_groups_is_refused():
    pattern = bs.BSRPattern.full((8, 4, 3, 3), (4, 2))
    with pytest.raises(ValueError, match=r"blocks of 4 filters do not divide the 2 filters of each of 4 groups"):
        pattern.grouped(4)
    with pytest.raises(ValueError, match=r"groups is 3; it needs an int >= 1 that divides K = 8"):
        pattern.grouped(3)
    moved = bs.BSRPattern.from_mask(torch.ones(8, 4, 1, 1, dtype=torch.bool), (2, 2), [7, 1, 2, 3, 4, 5, 6, 0])
    with pytest.raises(ValueError, match=r"row_order moves filters from one of 2 groups to another"):
        moved.grouped(2)
    with pytest.raises(ValueError, match=r"BSRLinear\(\): the pattern has shape .* and 2 groups"):
        bs.BSRLinear(bs.BSRPattern.full((8, 4, 1, 1), (4, 2)).grouped(2))


# ---------------------------------------------------------------------- the products


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@given(case=grouped(), data=st.data())
@settings(max_examples=40)
def test_products_are_those_of_the_reference(backend, case, data):
    pattern, groups = case
    n, (h, w) = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([(5, 7), (8, 8)]))
    conv = data.draw(st.sampled_from([(1, 1, 1), (2, 2, 1), ((1, 2), (2, 4), 2)]))
    x = torch.randn(n, groups * pattern.shape[1], h, w, dtype=torch.float64)
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    values = torch.randn((pattern.nnzb, *pattern.blocksize), dtype=torch.float64)
    bias = torch.randn(pattern.shape[0], dtype=torch.float64)
    y = bs.conv2d(x, values, pattern, bias, *conv, backend=backend)
    dy = torch.randn_like(y)
    weight = pattern.to_dense(values)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, *conv, groups))
    torch.testing.assert_close(y, bs.reference.fprop(x, values, pattern, bias, *conv))
    dx = bs.conv2d_dgrad(dy, values, pattern, x.shape, *conv, backend=backend)
    torch.testing.assert_close(dx, bs.reference.dgrad(dy, values, pattern, x.shape, *conv))
    torch.testing.assert_close(dx, torch.nn.grad.conv2d_input(x.shape, weight, dy, *conv, groups))
    dv = bs.conv2d_wgrad(x, dy, pattern, *conv, backend=backend)
    torch.testing.assert_close(dv, bs.reference.wgrad(x, dy, pattern, *conv))
    dense = torch.nn.grad.conv2d_weight(x, weight.shape, dy, *conv, groups)
    torch.testing.assert_close(dv, pattern.values_from_dense(dense))


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_every_backend_reads_the_index_of_groups(backend, device):
    torch.manual_seed(0)
    pattern = bs.BSRPattern.random((32, 8, 3, 3), (8, 8), 0.5).grouped(2)
    values, x = torch.randn((pattern.nnzb, 8, 8)), torch.randn(1, 16, 3, 4).to(memory_format=torch.channels_last)
    conv = (1, 1, 1)
    there, v, given = pattern.to(device), values.to(device), x.to(device)
    y = bs.conv2d(given, v, there, None, *conv, backend=backend)
    dy = torch.randn(y.shape).to(memory_format=torch.channels_last)
    weight, turned = there.to_dense(v), dy.to(device)
    found = {
        "y": (y, bs.reference.fprop, (x, values), F.conv2d(given, weight, None, *conv, 2)),
        "dx": (
            bs.conv2d_dgrad(turned, v, there, x.shape, *conv, backend=backend), bs.reference.dgrad, (dy, values),
            torch.nn.grad.conv2d_input(x.shape, weight, turned, *conv, 2),
        ),
        "dv": (
            bs.conv2d_wgrad(given, turned, there, *conv, backend=backend), bs.reference.wgrad, (x, dy),
            there.values_from_dense(torch.nn.grad.conv2d_weight(given, weight.shape, turned, *conv, 2)),
        ),
    }  # fmt: skip
    for what, (ours, reference, pair, own) in found.items():
        extra = {"y": (None,), "dx": (x.shape,), "dv": ()}[what]
        exact, largest = (
            reference(*(p.abs() if positive else p for p in pair), pattern, *extra, *conv) for positive in (False, True)
        )
        assert_close(ours.cpu(), exact, own.cpu(), largest, f"{what} of {backend}")


def test_the_dense_product_is_that_of_groups_in_plan_cost_and_memory(monkeypatch):
    x = torch.empty(8, 64, 56, 56)
    pattern = bs.BSRPattern.random((64, 8, 3, 3), (8, 8), 0.5).grouped(8)
    values = torch.randn((pattern.nnzb, 8, 8))
    plan = bs.explain(x, values, pattern, 1, 1)
    assert plan.dense_flops == 2 * 8 * 56 * 56 * 64 * 8 * 9
    assert plan.flops == round(pattern.density * plan.dense_flops)
    assert "64x8x3x3" in str(plan)
    assert "8 groups" in str(plan)
    assert f"density {pattern.density:.4g}" in str(plan)
    whole = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.5)
    dense = bs.explain(x, torch.randn((whole.nnzb, 8, 8)), whole, 1, 1).products["fprop"].dense
    mine = plan.products["fprop"].dense
    assert mine.seconds < dense.seconds / 2  # what stored blocks have to beat
    seen = []
    conv = torch.ops.aten.convolution
    monkeypatch.setattr(
        "blocksparse.kernels.aten_conv.aten.convolution",
        lambda x, w, *a: seen.append((w.shape, a[-1])) or conv(x, w, *a),
    )
    bs.conv2d(torch.randn(1, 64, 4, 4), values, pattern, None, 1, 1, backend="torch")
    assert seen == [((64, 8, 3, 3), 8)]


def test_wrong_channels_are_refused_by_every_way_in():
    pattern = bs.BSRPattern.full((8, 4, 1, 3), (4, 4)).grouped(2)
    values = torch.ones((pattern.nnzb, 4, 4))
    with pytest.raises(ValueError, match=r"x has 4 channels .* \(8, 4, 1, 3\) = \(K, C, R, S\) in 2 groups needs 8"):
        bs.conv2d(torch.ones(1, 4, 1, 9), values, pattern)
    with pytest.raises(ValueError, match=r"x has 8 channels .* needs 4"):
        bs.conv2d(torch.ones(1, 8, 1, 9), values, pattern.grouped(1))
    with pytest.raises(ValueError, match="with C = 8"):
        bs.conv1d(torch.ones(1, 4, 9), values, pattern)


def test_transforms_take_groups():
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 8, 3, groups=2, dtype=torch.float64)
    layer = bs.BSRConv2d.from_dense(dense, bs.BSRPattern.random((8, 4, 3, 3), (2, 2), 0.6))
    plain, x = layer.to_dense(), torch.randn(3, 8, 6, 6, dtype=torch.float64)

    def loss(parameters, module, x):
        return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

    grads = [
        torch.func.vmap(torch.func.grad(loss), (None, None, 0))({k: p.detach() for k, p in m.named_parameters()}, m, x)
        for m in (layer, plain)
    ]
    torch.testing.assert_close(grads[0]["bias"], grads[1]["bias"])
    for ours, theirs in zip(grads[0]["values"], grads[1]["weight"], strict=True):
        torch.testing.assert_close(ours, layer.pattern.values_from_dense(theirs))
    out = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(out, torch.func.jvp(plain, (x,), (torch.ones_like(x),)))


# ---------------------------------------------------------------------- the layer


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_layer_has_the_sizes_and_the_weight_of_the_dense_one(kind):
    dense = kind(8, 12, 3, 2, 1, groups=4)
    layer_of = {nn.Conv1d: bs.BSRConv1d, nn.Conv2d: bs.BSRConv2d}[kind]
    pattern = bs.BSRPattern.random(bs.bank_shape(dense.weight.shape), (3, 2), 0.5)
    layer = layer_of.from_dense(dense, pattern)
    assert (layer.groups, layer.in_channels, layer.out_channels) == (4, 8, 12)
    assert torch.equal(layer.weight, dense.weight * pattern.to_mask().view(dense.weight.shape))
    assert "groups=4" in repr(layer)
    back = layer.to_dense()
    assert (type(back), back.groups, back.weight.shape) == (kind, 4, dense.weight.shape)
    x = torch.randn(2, 8, *(9,) * (dense.weight.dim() - 2))
    torch.testing.assert_close(layer(x), back(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), back(x))
    assert layer.pattern == pattern.grouped(4)


def test_a_state_says_its_groups_and_another_number_is_refused():
    pattern = bs.BSRPattern.random((8, 4, 3, 3), (2, 2), 0.5)
    two, four, one = bs.BSRConv2d(pattern.grouped(2)), bs.BSRConv2d(pattern.grouped(4)), bs.BSRConv2d(pattern)
    assert two.state_dict()["groups"].tolist() == [2]
    assert "groups" not in one.state_dict()
    for module, state, message in (
        (four, two.state_dict(), "saved layer has groups=2, and this BSRConv2d groups=4"),
        (one, two.state_dict(), "saved layer has groups=2, and this BSRConv2d groups=1"),
        (two, one.state_dict(), "saved layer has groups=1, and this BSRConv2d groups=2"),
    ):
        before = module.values.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(state)
        assert torch.equal(module.values, before)
    other = bs.BSRConv2d(bs.BSRPattern.random((8, 4, 3, 3), (2, 2), 0.2).grouped(2))
    other.load_state_dict(two.state_dict())
    assert other.pattern == two.pattern
    assert sparse_layer(two.state_dict(), "") == two.pattern


def test_a_new_pattern_stays_in_the_groups_and_carries_the_optimizer():
    torch.manual_seed(0)
    old, new = (bs.BSRPattern.random((8, 4, 3, 3), (2, 2), 0.4) for _ in range(2))
    layer = bs.BSRConv2d(old.grouped(2))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.randn(2, 8, 6, 6)).square().sum().backward()
    optimizer.step()
    momentum = old.to_dense(optimizer.state[layer.values]["momentum_buffer"])
    weight = layer.weight.clone()
    assert layer.set_pattern(new, optimizer)
    assert layer.pattern == new.grouped(2)
    both = old.to_mask() & new.to_mask()
    assert torch.equal(layer.weight, weight * both)
    assert torch.equal(new.to_dense(optimizer.state[layer.values]["momentum_buffer"]), momentum * both)
    with pytest.raises(ValueError, match=r"set_pattern\(\): the pattern has 4 groups; this module needs 2"):
        layer.set_pattern(old.grouped(4))
    with pytest.raises(ValueError, match=r"set_pattern\(\): .* blocks of 8 filters do not divide the 4 filters"):
        layer.set_pattern(bs.BSRPattern.full((8, 4, 3, 3), (8, 4)))
    with pytest.raises(ValueError, match="conv has groups=2 and the pattern 4"):
        bs.BSRConv2d.from_dense(nn.Conv2d(8, 8, 3, groups=2), old.grouped(4))


# ---------------------------------------------------------------------- in a model


class Net(nn.Module):
    """Convolutions in 2 and 4 groups, one depthwise, one along a line."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 32, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.four = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=4)
        self.depth = nn.Conv2d(32, 32, 3, groups=32)
        self.line = nn.Conv1d(32, 32, 3, padding=1, groups=2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.two(self.stem(x).relu())).relu()
        x = self.line(self.depth(self.four(x).relu()).flatten(2)).relu()
        return self.head(x.mean(2))


SPARSE = {"two": 2, "four": 4, "line": 2}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, STRUCTURES.get(name, {})) for name in hrbp.STRUCTURES),
        ("1xn", {"n": 4, "rearrange": True}),
        ("hrbp", {"min_rows": 4, "groups": 2, "row_granule": 1, "balanced": False}),
    ],
)
def test_every_structure_fits_and_computes_what_its_mask_says(name, options):
    model, x = net(), images()
    dense = copy.deepcopy(model)
    hrbp.sparsify(model, 0.5, structure=name, saliency="magnitude", **options)
    layers = sparse_layers(model)
    assert {name: layer.groups for name, layer in layers.items()} == SPARSE
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight
        assert torch.equal(layer.module.weight, weight * layer.mask().view(weight.shape))
        with torch.no_grad():
            weight.mul_(layer.mask().view(weight.shape))
    kept = sum(layer.kept() for layer in layers.values())
    assert kept / sum(layer.mask().numel() for layer in layers.values()) == pytest.approx(0.5, abs=0.06)
    y, needed = model(x), dense(x)
    torch.testing.assert_close(y, needed)
    for out in (y, needed):
        out.square().sum().backward()
    for name, layer in layers.items():
        grad = dense.get_submodule(name).weight.grad.view(layer.shape) * layer.mask()
        torch.testing.assert_close(layer.module.pattern.to_dense(layer.module.values.grad), grad)
    plain = hrbp.densify(copy.deepcopy(model))
    assert plain.four.groups == 4
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("set", "block", {}),
        ("rigl", "unstructured", {}),
        ("rigl", "hrbp", {}),
        ("rigl", "channel", {}),
        ("hrbp", "hrbp", {}),
        ("gmp", "hrbp++", {"sparsity": 0.7}),
        ("gmp", "block", {"sparsity": 0.7}),
        ("ste", "channel", {}),
        ("sr-ste", "n:m", {}),
        ("subp", "1xn", {}),
    ],
)
def test_methods_change_masks_within_groups(method, name, options, tmp_path):
    model, x = net(), images(8)
    keeps = method if method in ("ste", "sr-ste", "subp") else None
    hrbp.sparsify(model, 0.5, structure=name, method=keeps, distribution="uniform", **STRUCTURES.get(name, {}))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    evolver = hrbp.Evolver(model, optimizer, method, total_steps=8, every=2, **options)
    masks = {name: layer.mask() for name, layer in sparse_layers(model).items()}
    target, losses = torch.arange(8) % 4, []
    for _ in range(8):
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        evolver.step()
        optimizer.zero_grad()
    assert min(losses) < losses[0]
    changed = {name for name, layer in sparse_layers(model).items() if not torch.equal(masks[name], layer.mask())}
    assert changed, method
    for layer in sparse_layers(model).values():
        pattern = layer.pattern().grouped(layer.groups)  # no block, and no order of filters, crosses groups
        if method in ("set", "rigl", "hrbp"):
            assert layer.mask().sum() == masks[layer.name].sum()
        assert pattern.shape == layer.shape
    torch.testing.assert_close(hrbp.densify(copy.deepcopy(model))(x), model(x))
    model.eval()
    hrbp.save(model, tmp_path / "model.pt")
    torch.testing.assert_close(hrbp.load(tmp_path / "model.pt", net())(x), model(x))


def test_rigl_sees_the_dense_gradient_of_groups_alone():
    model, x = net(), images()
    hrbp.sparsify(model, 0.5, structure="unstructured")
    twin = hrbp.densify(copy.deepcopy(model))
    evolver = hrbp.Evolver(model, torch.optim.SGD(model.parameters(), 0.0), "rigl", total_steps=10, every=1)
    for one in (model, twin):
        one(x).square().sum().backward()
    grads = evolver._gathered()
    assert grads["four"].shape == (32, 8, 3, 3)
    for name in SPARSE:
        torch.testing.assert_close(grads[name], twin.get_submodule(name).weight.grad.abs().view(grads[name].shape))


def test_grains_are_exchanged_across_groups_and_regrouped_filters_within_one():
    assert in_groups(structure("block", blocksize=(4, 4)), 4).name == "block"
    rule = in_groups(structure("unstructured"), 2)
    score = torch.cat([torch.ones(4, 4, 1, 1), torch.full((4, 4, 1, 1), 0.1)])
    assert int(rule.choose(score, 0.5).mask[:4].sum()) == 16  # the best of the layer
    rule = in_groups(structure("hrbp", groups=2, min_rows=2), 2)
    chosen = rule.choose(torch.rand(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)), 0.5)
    assert chosen.mask[:4].sum() == chosen.mask[4:].sum()
    assert chosen.grouping.groups == 4
    assert torch.equal(chosen.grouping.mask(), chosen.mask)


def test_what_does_not_fit_stays_dense_and_says_why():
    model = net()
    hrbp.sparsify(model, 0.5, structure="block", blocksize=(16, 8))
    assert list(sparse_layers(model)) == ["two", "line"]
    text = str(hrbp.summary(model))
    assert "dense (block: grains of 16 do not divide K = 8 of each of 4 groups)" in text
    assert "dense (depthwise)" in text
    assert "block (16, 8), 2 groups" in text


def test_files_fusion_summary_and_report_count_groups(tmp_path):
    model, x = net(), images()
    hrbp.sparsify(model, 0.75, structure="unstructured")
    model(x)
    model.eval()
    hrbp.save(model, tmp_path / "model.pt")  # packed: weights and bits
    torch.testing.assert_close(hrbp.load(tmp_path / "model.pt", net())(x), model(x))
    plain = net().eval()
    plain.load_state_dict(hrbp.dense_state_dict(model))
    torch.testing.assert_close(plain(x), model(x))
    fused = hrbp.fuse(model)
    torch.testing.assert_close(fused(x), model(x))
    assert fused.fusion.norms == 1
    rows = {row.name: row for row in hrbp.summary(model, x).rows}
    assert rows["four"].dense_parameters == 32 * 8 * 9 + 32
    assert rows["four"].dense_flops == 2 * 4 * 4 * 4 * 32 * 8 * 9
    reports = report_model(model)
    assert reports["four"].shape == (32, 8, 3, 3)
    assert reports["four"].storage.memory_index == 4 * model.four.index.numel()
    mask = model.four.pattern.to_mask()
    channels = mask.view(4, 8, 8, 9).sum((1, 3)).flatten().double()  # 32 of x
    assert reports["four"].column_balance == pytest.approx(float(channels.max() / channels.mean()))
    assert hrbp.to_semi_structured(model)["four"] is not None


def test_coverage_is_that_of_each_group():
    model = net()
    with pytest.warns(UserWarning, match=r"four.*: too few groups .* in (two|four) 1 groups x \d channels are \d\d%"):
        hrbp.sparsify(model, 0.8, structure="hrbp", groups=1, distribution="uniform")
    rows = {row.name: row for row in hrbp.summary(model).rows}
    reports = report_model(model)
    for name, groups in SPARSE.items():
        mask = sparse_layers(model)[name].mask()
        read = mask.view(groups, -1, mask.shape[1], mask[0, 0].numel()).any(3).any(1)
        for found in (rows[name], reports[name]):
            assert (found.unread, found.channels) == (int((~read).sum()), read.numel())
            assert found.coverage == pytest.approx(float(read.double().mean()))  # one group of filters in each


def test_masks_of_prune_in_groups_are_taken_over():
    model, x = net().eval(), images()
    prune.l1_unstructured(model.two, "weight", amount=0.5)
    mask = torch.ones(32, 8, 3, 3)
    mask[4:12] = 0  # a box of 8 filters that lies in two groups
    prune.custom_from_mask(model.four, "weight", mask)
    expected = model(x)
    hrbp.from_prune(model)
    assert {name: layer.groups for name, layer in sparse_layers(model).items()} == {"two": 2, "four": 4}
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("saliency", ["snip", "grasp", "synflow"])
def test_saliencies_score_groups(saliency):
    model, x = net(), images(8)
    hrbp.sparsify(
        model, 0.5, structure="hrbp", distribution="global", saliency=saliency, batch=(x, torch.arange(8) % 4),
        **STRUCTURES["hrbp"],
    )  # fmt: skip
    assert {name: layer.groups for name, layer in sparse_layers(model).items()} == SPARSE
