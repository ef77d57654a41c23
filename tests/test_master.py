"""Dense master weights: what is computed with a part of them, and the gradient that all of them get."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel

import hrbp
from hrbp.layers.master import MasterConv2d, MasterLinear, with_master
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.structures.base import Selection
from hrbp.structures.registry import structure

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


def draw(generator: torch.Generator, *shape: int, dtype=torch.float64) -> Tensor:
    """Fresh numbers, none of them near zero."""
    t = torch.randn(*shape, generator=generator, dtype=dtype)
    return t + 0.1 * t.sign()


def block_selection(shape, blocksize, share: float, generator: torch.Generator, shuffled: bool = False) -> Selection:
    (k, c, r, s), (bk, bc) = shape, blocksize
    kept = torch.rand(k // bk, c // bc, r, s, generator=generator) < share
    mask = kept.repeat_interleave(bk, 0).repeat_interleave(bc, 1)
    if not shuffled:
        return Selection(mask, blocksize)
    order = torch.randperm(k, generator=generator)
    return Selection(mask[torch.argsort(order)], blocksize, order)


def conv(k=16, c=12, kernel=3, generator=None, **options) -> nn.Conv2d:
    layer = nn.Conv2d(c, k, kernel, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(draw(generator or torch.Generator().manual_seed(0), *p.shape))
    return layer


def products(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = layer(x)
    named = {"x": x, **dict(layer.named_parameters())}
    return {"y": y.detach(), **dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))}


def reference(layer: nn.Module, selection: Selection, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The dense layer with the weight E * W; the gradient of W is that of E * W, whole."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(selection.mask.view(twin.weight.shape))
    return products(twin, x, dy)


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, t in expected.items():
        assert ours[name].shape == t.shape
        torch.testing.assert_close(ours[name], t, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([(8, 1), (4, 2), (2, 4), (1, 1)]), st.sampled_from([0, 0.2, 0.6, 1]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_blocks_compute_what_the_dense_layer_does(
    seed, blocksize, share, kernel, stride, padding, dilation, bias, shuffled, channels_last
):
    generator = torch.Generator().manual_seed(seed)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "bias": bias}
    dense = conv(16, 8, kernel, generator, **options)
    selection = block_selection((16, 8, *kernel), blocksize, share, generator, shuffled)
    x = draw(generator, 2, 8, 7, 8)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    dy = draw(generator, *dense(x).shape)
    expected = reference(dense, selection, x, dy)
    layer = with_master(copy.deepcopy(dense), selection)
    assert torch.equal(layer.live(), selection.mask)
    assert_same(products(layer, x, dy), expected)
    assert torch.equal(layer.weight, dense.weight)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,)])
@pytest.mark.parametrize("blocksize", [(8, 1), (1, 1)])
def test_linear_layers(shape, blocksize):
    generator = torch.Generator().manual_seed(3)
    dense = nn.Linear(12, 16).double()
    selection = block_selection((16, 12, 1, 1), blocksize, 0.4, generator)
    x, dy = draw(generator, *shape), draw(generator, *shape[:-1], 16)
    layer, mask = copy.deepcopy(dense), selection.mask.clone()
    layer = with_master(layer, selection)
    assert type(layer) is MasterLinear
    assert_same(products(layer, x, dy), reference(dense, selection, x, dy))
    layer.set_selection(Selection(~mask, blocksize))
    assert torch.equal(selection.mask, mask)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    generator = torch.Generator().manual_seed(4)
    dense = conv(16, 12, 3, generator, padding=padding, dilation=2)
    selection = block_selection((16, 12, 3, 3), (8, 1), 0.4, generator)
    x = draw(generator, 2, 12, 7, 7)
    dy = draw(generator, *dense(x).shape)
    layer = with_master(copy.deepcopy(dense), selection)
    assert_same(products(layer, x, dy), reference(dense, selection, x, dy))


@pytest.mark.parametrize(("name", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("unstructured", 0.7), ("kernel", 0.6)])
def test_a_mask_that_follows_the_weight(name, sparsity):
    generator = torch.Generator().manual_seed(5)
    layer, rule = conv(generator=generator, padding=1), structure(name)
    layer = with_master(layer, rule=rule, sparsity=sparsity)
    x, dy = draw(generator, 2, 12, 5, 5), draw(generator, 2, 16, 5, 5)
    masks = []
    for _ in range(3):
        selection = rule.choose(layer.weight.detach().abs(), sparsity)
        masks.append(layer.live())
        assert torch.equal(masks[-1], selection.mask)
        plain = layer.to_dense()
        assert type(plain) is nn.Conv2d
        assert torch.equal(plain.weight, layer.weight * selection.mask)
        assert_same(products(layer, x, dy), products(plain, x, dy))
        with torch.no_grad():
            layer.weight.add_(draw(generator, *layer.weight.shape))
    assert not torch.equal(masks[0], masks[2])
    assert "mask" not in layer.state_dict()


def made(blocksize=(8, 1), seed: int = 0, share: float = 0.4) -> MasterConv2d:
    generator = torch.Generator().manual_seed(seed)
    layer = conv(generator=torch.Generator().manual_seed(0), padding=1)
    return with_master(layer, block_selection((16, 12, 3, 3), blocksize, share, generator))


def following() -> MasterConv2d:
    layer = conv(generator=torch.Generator().manual_seed(0), padding=1)
    return with_master(layer, rule=structure("unstructured"), sparsity=0.6)


@pytest.mark.parametrize("make", [made, following])
def test_autocast_computes_in_half_precision_and_hands_whole_gradients_back(make):
    layer = make().float()
    x, dy = torch.randn(2, 12, 6, 6, requires_grad=True), torch.randn(2, 16, 6, 6)
    plain = layer.to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = plain(x)
    assert y.dtype == torch.bfloat16
    if make is made:
        assert y.grad_fn.saved_tensors[0].dtype == torch.bfloat16  # as a dense layer does
    ours = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy.bfloat16())
    theirs = torch.autograd.grad(expected, [x, plain.weight, plain.bias], dy.bfloat16())
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < 0.02 * b.norm()


def test_compiled_without_breaks_and_without_recompiling_for_an_equally_large_selection():
    layer, counter = made(), CompileCounter()
    selections = [
        block_selection((16, 12, 3, 3), (8, 1), 0.4, torch.Generator().manual_seed(seed)) for seed in range(40)
    ]
    first = int(layer.live().sum())
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x, dy = (draw(torch.Generator().manual_seed(i), *shape) for i, shape in enumerate([(2, 12, 6, 6), (2, 16, 6, 6)]))
    same = [selection for selection in selections if int(selection.mask.sum()) == first]
    assert len(same) >= 2
    for selection in same:
        layer.set_selection(selection)
        xs = x.clone().requires_grad_()
        y = compiled(xs)
        ours = torch.autograd.grad(y, [xs, layer.weight], dy)
        expected = products(layer, x, dy)
        for a, b in zip((y, *ours), (expected["y"], expected["x"], expected["weight"]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "sparsity"), [("2:4", 0.5), ("8:32", 0.75), ("unstructured", 0.7)])
def test_compiled_with_a_mask_that_follows_the_weight(name, sparsity):
    layer, counter = conv(c=32, padding=1), CompileCounter()
    layer = with_master(layer, rule=structure(name), sparsity=sparsity)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(2)
    x, dy = draw(generator, 2, 32, 5, 5), draw(generator, 2, 16, 5, 5)
    for _ in range(3):
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(torch.autograd.grad(y, layer.weight, dy)[0], products(layer, x, dy)["weight"])
        with torch.no_grad():
            layer.weight.copy_(draw(generator, *layer.weight.shape))
    assert counter.frame_count == 1


def test_differentiable_once():
    layer = made()
    x = draw(torch.Generator().manual_seed(1), 1, 12, 5, 5).requires_grad_()
    y = layer(x).square().sum()
    (grad,) = torch.autograd.grad(y, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"conv2d\(\) is differentiable once"):
        dx.square().sum().backward()


def test_a_layer_used_twice_and_a_frozen_one():
    layer, generator = made(), torch.Generator().manual_seed(2)
    xs = [draw(generator, 1, 12, 5, 5) for _ in range(2)]
    sum(layer(x).square().sum() for x in xs).backward()
    both = layer.weight.grad.clone()
    layer.weight.grad = None
    for x in xs:
        layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, both)
    layer.requires_grad_(False)
    x = xs[0].requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_new_selection_writes_in_place_where_it_is_as_large():
    layer = made()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    x = draw(torch.Generator().manual_seed(1), 2, 12, 5, 5)
    layer(x).square().mean().backward()
    optimizer.step()
    before = copy.deepcopy((layer.weight, layer.weight.grad, optimizer.state[layer.weight]["momentum_buffer"]))
    index, weight = layer.index.data_ptr(), layer.weight.data_ptr()
    old = layer.pattern
    flipped = Selection(layer.live().flip(0), (8, 1))
    shared = flipped.mask.clone()
    assert layer.set_selection(flipped) is True
    assert layer.index.data_ptr() == index
    assert old != layer.pattern
    fewer = block_selection((16, 12, 3, 3), (8, 1), 0.1, torch.Generator().manual_seed(7))
    assert layer.set_selection(fewer) is False
    assert torch.equal(flipped.mask, shared)
    assert layer.pattern == fewer.pattern()
    assert layer.weight.data_ptr() == weight
    after = layer.weight, layer.weight.grad, optimizer.state[layer.weight]["momentum_buffer"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    dy = torch.ones(2, 16, 5, 5, dtype=torch.float64)
    plain = layer.to_dense()
    assert_same(products(layer, x, dy), products(plain, x, dy))

    kept = copy.deepcopy(layer.state_dict())
    for selection, message in [
        (Selection(torch.ones(16, 12, 1, 1, dtype=torch.bool), (8, 1)), r"mask has shape \(16, 12, 1, 1\); it needs"),
        (Selection(fewer.mask, (4, 1)), r"blocksize \(4, 1\); it needs \(8, 1\)"),
    ]:
        with pytest.raises(ValueError, match=rf"MasterConv2d\.set_selection\(\): .*{message}"):
            layer.set_selection(selection)
    assert all(torch.equal(t, kept[name]) for name, t in layer.state_dict().items())
    follows = conv()
    follows = with_master(follows, rule=structure("2:4"), sparsity=0.5)
    with pytest.raises(ValueError, match="the mask follows the weight"):
        follows.set_selection(fewer)


@pytest.mark.parametrize("blocksize", [(8, 1), (1, 1)])
def test_states_load_into_layers_with_another_mask(blocksize):
    source, target = made(blocksize, seed=1), made(blocksize, seed=2, share=0.7)
    x = draw(torch.Generator().manual_seed(1), 2, 12, 5, 5)
    twin = copy.deepcopy(target)
    twin.load_state_dict(source.state_dict())
    assert torch.equal(twin(x), source(x))
    assert not torch.equal(target(x), source(x))
    untouched = source(x)
    twin.set_selection(Selection(~twin.live(), blocksize))
    assert torch.equal(source(x), untouched)
    assert not torch.equal(twin(x), untouched)
    assert torch.equal(twin.to(torch.float32).to(torch.float64)(x), twin(x))


def test_a_row_order_travels_with_the_state():
    shape, generator = (16, 12, 3, 3), torch.Generator().manual_seed(6)
    source, target = made(), made()
    source.set_selection(block_selection(shape, (8, 1), 0.4, generator, shuffled=True))
    target.load_state_dict(source.state_dict())
    x = draw(generator, 2, 12, 5, 5)
    assert torch.equal(target(x), source(x))
    assert target.pattern == source.pattern
    target.load_state_dict(made().state_dict() | {"weight": source.weight})
    assert target.row_order is None


def test_damaged_states_are_refused():
    layer = made()
    good = layer.state_dict()
    one_cell = good["mask"].clone()
    one_cell[0, 0, 0, 0] ^= True
    for mask, message in [
        (one_cell, r"not made of blocks \(8, 1\)"),
        (good["mask"].float(), r"torch\.float32"),
        (good["mask"][:8], r"mask is torch\.bool \(8, 12, 3, 3\)"),
        (good["mask"].numpy(), r"mask is a ndarray; it needs a torch\.Tensor"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**good, "mask": mask})
    for order, message in [
        (torch.arange(8), r"row_order has shape \(8,\); it needs \(16,\)"),
        (list(range(16)), r"row_order is a list; it needs a torch\.Tensor"),
    ]:
        for damaged in (layer, made((1, 1))):
            with pytest.raises(RuntimeError, match=message):
                damaged.load_state_dict({**good, "row_order": order})
            assert damaged.row_order is None
    with pytest.raises(RuntimeError, match=r"Missing key.*mask"):
        layer.load_state_dict({name: t for name, t in good.items() if name != "mask"})


def test_moves_keep_the_index_whole():
    layer = made()
    x = draw(torch.Generator().manual_seed(1), 2, 12, 5, 5)
    expected, state = layer(x), layer.state_dict()
    hollow = copy.deepcopy(layer).to("meta")
    assert hollow.index.device.type == "cpu"
    hollow.to_empty(device="cpu")
    assert torch.equal(hollow.index, layer.index)
    hollow.load_state_dict(state)
    assert torch.equal(hollow(x), expected)
    assigned = copy.deepcopy(layer).to("meta")
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(x), expected)


def test_shared_memory_holds_the_index_too():
    """Another process that has the layer's memory computes with the same blocks, whatever this one chooses."""
    layer = made()
    nn.Sequential(layer).share_memory()
    assert layer.index.is_shared()
    index, before = layer.index, copy.deepcopy(layer.state_dict())
    same = Selection(layer.live().flip(1), layer.blocksize)
    other = block_selection(layer.weight_shape, layer.blocksize, 0.8, torch.Generator().manual_seed(5))
    with pytest.raises(ValueError, match=r"set_selection\(\): the layer is in shared memory"):
        layer.set_selection(other)
    larger = copy.deepcopy(layer)
    assert not larger.set_selection(other)
    with pytest.raises(RuntimeError, match="the layer is in shared memory"):
        layer.load_state_dict(larger.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert layer.set_selection(same)
    assert layer.index is index
    kept = index.clone()
    layer.load_state_dict(larger.state_dict(), assign=True)
    layer.double()
    layer.set_selection(same)
    assert torch.equal(index, kept)


@pytest.mark.parametrize("blocksize", [(8, 1), (1, 1)])
def test_a_selection_or_state_of_inference_mode_leaves_a_layer_that_trains(blocksize):
    layer, generator = made(blocksize), torch.Generator().manual_seed(5)
    shape = layer.weight_shape
    with torch.inference_mode():
        for share in (0.4, 0.8):
            layer.set_selection(block_selection(shape, blocksize, share, generator, shuffled=True))
            layer(torch.randn(2, shape[1], 6, 6, dtype=layer.weight.dtype))
        source = made(blocksize, share=0.2)
        layer.load_state_dict(source.state_dict())
    layer(torch.randn(2, shape[1], 6, 6, dtype=layer.weight.dtype)).sum().backward()
    assert layer.weight.grad is not None


def test_averaged_copies_follow():
    layer = made()
    average = AveragedModel(layer)
    fewer = block_selection((16, 12, 3, 3), (8, 1), 0.1, torch.Generator().manual_seed(7))
    for model in (layer, average.module):
        model.set_selection(fewer)
    average.update_parameters(layer)
    x = draw(torch.Generator().manual_seed(1), 2, 12, 5, 5)
    assert torch.equal(average(x), layer(x))


# ---------------------------------------------------------------------- whole models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.odd = nn.Conv2d(32, 30, 1)
        self.two = nn.Conv2d(30, 32, 3, padding=1)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.odd(self.depth(self.one(self.stem(x).relu())).relu())).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())


METHODS = [
    ("ste", "2:4", 0.5, {}),
    ("sr-ste", "n:m", 0.75, {"m": 8}),
    ("sr-ste", "unstructured", 0.8, {}),
    ("subp", "1xn", 0.6, {"n": 16}),
    ("subp", "1xn", 0.6, {"n": 1}),
]


def sparse(method: str, name: str, sparsity: float, options: dict, seed: int = 0, **more) -> Net:
    torch.manual_seed(seed)
    net = hrbp.sparsify(Net(), sparsity, structure=name, method=method, seed=seed, **options, **more)
    if method == "subp":  # which begins with all blocks
        for layer in sparse_layers(net).values():
            layer.set(record_of(net).structure.choose(torch.rand(layer.shape), sparsity))
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_a_model_keeps_its_weights_and_computes_with_a_part(case, x):
    net = sparse(*case)
    torch.manual_seed(0)
    dense = Net()
    weights = {name: t for name, t in net.state_dict().items() if name.rpartition(".")[2] in ("weight", "bias")}
    assert all(torch.equal(t, weights[name]) for name, t in dense.state_dict().items())
    layers = sparse_layers(net)
    assert {"one", "hidden"} <= layers.keys()
    assert all(layer.master for layer in layers.values())
    assert all((layer.blocksize is not None) == (case[1] == "1xn") for layer in layers.values())
    with torch.no_grad():
        for name, layer in layers.items():
            dense.get_submodule(name).weight.mul_(layer.mask().view(dense.get_submodule(name).weight.shape))
            assert torch.equal(layer.weight().view(-1), dense.get_submodule(name).weight.view(-1))
    torch.testing.assert_close(net(x), dense(x))
    assert record_of(net).method == case[0]
    assert hrbp.summary(net).sparsity == pytest.approx(case[2], abs=0.03)


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_release_and_densify_compute_the_same(case, x):
    net = sparse(*case)
    expected = net(x)
    released = hrbp.release(copy.deepcopy(net))
    assert record_of(released).method is None
    assert not any(layer.master for layer in sparse_layers(released).values())
    for name, layer in sparse_layers(net).items():
        assert torch.equal(sparse_layers(released)[name].mask(), layer.mask())
        assert not sparse_layers(released)[name].master
    torch.testing.assert_close(released(x), expected)
    plain = hrbp.densify(copy.deepcopy(net))
    assert not sparse_layers(plain)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in Net().named_parameters()]
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(plain.state_dict(), hrbp.dense_state_dict(net))


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_files_hold_the_whole_weight(case, x, tmp_path):
    net = sparse(*case)
    hrbp.save(net, tmp_path / "model.pt")
    again = hrbp.load(tmp_path / "model.pt", Net())
    assert record_of(again) == record_of(net)
    assert torch.equal(again(x), net(x))
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in again.state_dict().items())
    for name, layer in sparse_layers(again).items():
        assert (layer.master, layer.blocksize) == (True, sparse_layers(net)[name].blocksize)
        assert torch.equal(layer.mask(), sparse_layers(net)[name].mask())


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_the_summary_counts_the_dense_weight(case, x):
    net = sparse(*case)
    summary = hrbp.summary(net, x, measure=True)
    rows = {row.name: row for row in summary.rows}
    for name, layer in sparse_layers(net).items():
        module, cells = layer.module, layer.mask().numel()
        bias = 0 if module.bias is None else module.bias.numel()
        kept = int(layer.mask().sum())
        assert rows[name].parameters == kept + bias
        stored = 0 if case[0] != "subp" else cells  # a mask: a byte a weight
        if layer.blocksize:
            stored += 4 * module.pattern.index.numel()
            assert rows[name].flops * cells == rows[name].dense_flops * kept
            assert rows[name].seconds > 0
        assert rows[name].bytes == 4 * (cells + bias) + stored
        assert rows[name].structure.endswith(", master")
    dropped = sum(int((~layer.mask()).sum()) for layer in sparse_layers(net).values())
    assert (summary.parameters, summary.dense_parameters) == (
        sum(p.numel() for p in Net().parameters()) - dropped,
        sum(p.numel() for p in Net().parameters()),
    )
    assert f"master: {case[0]!r} trains a dense weight, with the memory of a dense layer" in str(summary)


def test_reports_are_of_what_takes_part():
    for case in METHODS:
        net = sparse(*case)
        reports = hrbp.reports.report_model(net)
        released = hrbp.reports.report_model(hrbp.release(net))
        for name in sparse_layers(net):
            assert reports[name] == released[name]


def test_layers_that_a_structure_refuses_stay_dense_unless_they_are_named():
    net = sparse("ste", "2:4", 0.5, {})
    assert record_of(net).dense == {
        "stem": "the first layer, by data flow",
        "depth": "depthwise",
        "two": "2:4: m = 4 does not divide C = 30",
        "head": "the last layer, by data flow",
    }
    assert "dense (2:4: m = 4 does not divide C = 30)" in str(hrbp.summary(net))
    assert list(sparse_layers(hrbp.sparsify(Net(), 0.5, structure="2:4", include=["o*", "t*"]))) == ["one", "odd"]
    for name, reason in (("two", "m = 4 does not divide C = 30"), ("depth", "depthwise")):
        with pytest.raises(ValueError, match=rf"include names '{name}', which has to stay dense: .*{reason}"):
            hrbp.sparsify(Net(), 0.5, structure="2:4", include=["one", name])


@pytest.mark.parametrize("name", ["mobilenetv1", "mobilenetv2"])
def test_depthwise_and_narrow_layers_of_mobile_networks_stay_dense(name):
    """As in the papers, and without a list of exceptions: m = 32 does not divide all of their widths."""
    model = hrbp.models.build(name, classes=5, width=0.25, image_size=32)
    hrbp.sparsify(model, 0.75, structure="8:32", method="sr-ste")
    plan = record_of(model)
    modules = dict(model.named_modules())
    for layer, why in plan.dense.items():
        module = modules[layer]
        if why == "depthwise":
            assert module.groups == module.in_channels > 1
        elif "does not divide" in why:
            assert module.in_channels % 32
        else:
            assert why in ("the first layer, by data flow", "the last layer, by data flow")
    assert "depthwise" in plan.dense.values()
    assert any("does not divide" in why for why in plan.dense.values())
    masked = sparse_layers(model)
    assert masked.keys() == plan.asked.keys()
    assert all(modules[layer].in_channels % 32 == 0 and modules[layer].groups == 1 for layer in masked)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_refusals():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    for arguments, message in [
        ({"structure": "2:4", "method": "rigl"}, "method is 'rigl'; it needs one of ste, sr-ste, subp, or None"),
        ({"structure": "hrbp", "method": "ste"}, "it needs n:m or grains .*, not 'hrbp'"),
        ({"structure": "kernel", "method": "subp"}, "needs structure '1xn' with uniform=True"),
        ({"structure": "1xn", "uniform": False, "method": "subp"}, "needs structure '1xn' with uniform=True"),
        ({"structure": "2:4", "method": "ste", "sparsity": 0.7}, "sparsity"),
    ]:
        with pytest.raises(ValueError, match=message):
            hrbp.sparsify(net, **{"sparsity": 0.5, **arguments})
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
        assert not sparse_layers(net)
    with torch.no_grad():
        net.hidden.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        hrbp.sparsify(net, 0.5, structure="2:4", method="ste")
    assert not sparse_layers(net)
    net = sparse(*METHODS[3])
    with pytest.raises(ValueError, match=r"Evolver\(\): method is 'rigl' and the model was made by .* method='subp'"):
        hrbp.Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=10)


def test_an_activation_in_place_may_follow_layers_that_run_blocks():
    """As in vgg16: what the layer returns is changed; the gradient is that of a dense layer still."""
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        act = torch.nn.ReLU(inplace)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(8, 16, 3), act, torch.nn.Flatten(2), torch.nn.Linear(16, 16), act, torch.nn.Linear(16, 8)
        ).double()
        hrbp.sparsify(net, 0.5, structure="1xn", n=4, method="subp", include=["0", "3", "5"])
        assert all(layer.blocksize for layer in sparse_layers(net).values())
        net(torch.linspace(-1, 1, 2 * 8 * 36, dtype=torch.float64).view(2, 8, 6, 6)).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) and bool((a != 0).any()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("structure", "method", "options"), [("2:4", "ste", {}), ("1xn", "subp", {"n": 4})])
def test_transforms_of_torch_func_agree_with_backward(structure, method, options):
    """grad, jvp and per-sample gradients of dense master weights: the straight-through gradient in every mode."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 8)
    ).double()
    hrbp.sparsify(net, 0.5, structure=structure, method=method, include=["0", "3"], **options)
    weights, x = dict(net.named_parameters()), torch.randn(3, 8, 4, 4, dtype=torch.float64)

    def loss(weights, x):
        return torch.func.functional_call(net, weights, (x,)).square().sum()

    backward = torch.autograd.grad(loss(weights, x), list(weights.values()))
    plain = {name: weight.detach() for name, weight in weights.items()}
    tangents = {name: torch.randn_like(weight) for name, weight in plain.items()}
    _, along = torch.func.jvp(lambda weights: loss(weights, x), (plain,), (tangents,))
    expected = sum((grad * tangent).sum() for grad, tangent in zip(backward, tangents.values(), strict=True))
    torch.testing.assert_close(along, expected)
    samples = torch.func.vmap(torch.func.grad(lambda w, x: loss(w, x[None])), (None, 0))(plain, x)
    for name, grad in zip(weights, backward, strict=True):
        torch.testing.assert_close(torch.func.grad(loss)(plain, x)[name], grad)
        torch.testing.assert_close(samples[name].sum(0), grad)
