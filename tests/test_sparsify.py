"""A dense model made sparse computes what its kept weights say, and turns back into a dense one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import blocksparse as bs
import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers

OPTIONS = {
    "n:m": {"m": 4},
    "block": {"blocksize": (8, 8)},
    "1xn": {"n": 8},
}
SPARSITY = {"n:m": 0.5}


class Net(nn.Module):
    """Stem, a shared block, a strided 1x1, a depthwise and a mirrored convolution, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.point = nn.Conv2d(32, 32, 1, stride=2)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.mirror = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.hidden = nn.Linear(32, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.wide(self.stem(x).relu())).relu()
        x = self.mirror(self.depth(self.point(x)).relu()).mean((2, 3))
        return self.head(self.hidden(x).relu())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("structure", hrbp.STRUCTURES)
def test_every_structure_keeps_its_weights_and_drops_the_others(net, x, structure):
    dense = copy.deepcopy(net)
    sparsity = SPARSITY.get(structure, 0.75)
    made = hrbp.sparsify(net, sparsity, structure=structure, saliency="magnitude", **OPTIONS.get(structure, {}))
    assert made is net
    layers = sparse_layers(net)
    assert list(layers) == ["wide", "point", "hidden"]
    for name, layer in layers.items():
        weight = dict(dense.named_modules())[name].weight.detach()
        expected = weight.reshape(layer.shape) * layer.mask()
        assert torch.equal(layer.weight(), expected)
        with torch.no_grad():
            dict(dense.named_modules())[name].weight.copy_(expected.view(weight.shape))
    kept = sum(int(layer.mask().sum()) for layer in layers.values())
    cells = sum(layer.mask().numel() for layer in layers.values())
    assert kept / cells == pytest.approx(1 - sparsity, abs=0.02)
    assert torch.allclose(net(x), dense(x), atol=1e-6)

    plain = hrbp.densify(copy.deepcopy(net))
    assert not sparse_layers(plain)
    assert {type(m) for m in plain.modules() if hasattr(m, "weight")} == {nn.Conv2d, nn.Linear, nn.BatchNorm2d}
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert torch.allclose(plain(x), net(x), atol=1e-6)


@pytest.mark.parametrize("structure", ["hrbp++", "block", "unstructured", "n:m"])
def test_gradients_are_those_of_the_masked_dense_layer(net, x, structure):
    net.double()
    sparsity = SPARSITY.get(structure, 0.75)
    hrbp.sparsify(net, sparsity, structure=structure, saliency="magnitude", **OPTIONS.get(structure, {}))
    twin = hrbp.densify(copy.deepcopy(net))
    for model in (net, twin):
        model(x.double()).square().sum().backward()
    for name, layer in sparse_layers(net).items():
        mask = layer.mask()
        dense = dict(twin.named_modules())[name].weight.grad.view(layer.shape) * mask
        grad = layer.parameter.grad
        ours = layer.module.pattern.to_dense(grad) if not layer.master else grad.view(layer.shape)
        assert torch.allclose(ours, dense, rtol=1e-9, atol=1e-12)
        assert ours.abs().sum() > 0


@pytest.mark.parametrize(
    ("structure", "options", "blocksize"),
    [
        ("unstructured", {}, (1, 1)),
        ("vector", {}, (1, 1)),
        ("kernel", {}, (1, 1)),
        ("n:m", {"m": 4}, (1, 1)),
        ("1xn", {"n": 1}, (1, 1)),
        ("1xn", {"n": 4}, (4, 1)),
        ("elementwise", {"groups": 4, "min_rows": 8}, (8, 1)),
        ("block", {"blocksize": (1, 4)}, (1, 4)),
        ("filter", {}, (1, None)),
        ("channel", {}, (None, 1)),
        ("hrbp", {"groups": 4, "min_rows": 8, "granule": 2}, (8, 2)),
    ],
)
def test_every_structure_stores_its_own_blocks_and_nothing_else(net, structure, options, blocksize):
    dense = sum(p.numel() for p in net.parameters())
    hrbp.sparsify(net, 0.5, structure=structure, saliency="magnitude", **options)
    layers = sparse_layers(net)
    assert {type(layer.module) for layer in layers.values()} == {bs.BSRConv2d, bs.BSRLinear}
    for layer in layers.values():
        rows = layer.shape[0] // 4 if structure in ("elementwise", "hrbp") else blocksize[0]
        expected = rows or layer.shape[0], blocksize[1] or layer.shape[1]
        assert layer.module.pattern.blocksize == expected
        assert layer.parameter.numel() == int(layer.mask().sum())
    dropped = sum(int((~layer.mask()).sum()) for layer in layers.values())
    assert dropped > 0
    assert sum(p.numel() for p in net.parameters()) == dense - dropped
    text = str(hrbp.summary(net))
    assert "mask" not in text.replace("masks first chosen", "")
    assert ("the index takes 16 bytes a block, more than its weights" in text) == (blocksize == (1, 1))


def test_what_stays_dense_and_why(net):
    hrbp.sparsify(net, 0.8)
    assert record_of(net).dense == {
        "stem": "the first layer, by data flow",
        "depth": "depthwise",
        "mirror": "padding_mode 'reflect'",
        "head": "the last layer, by data flow",
    }
    table = str(hrbp.summary(net))
    assert "dense (the first layer, by data flow)" in table
    assert "dense (depthwise)" in table


def test_random_groups_keep_the_filters_where_they_are(net):
    hrbp.sparsify(net, 0.8, structure="hrbp++")
    assert all(layer.row_order() is None for layer in sparse_layers(net).values())
    twin = hrbp.sparsify(hrbp.densify(copy.deepcopy(net)), 0.8, structure="hrbp++", row_granule=1)
    assert any(layer.row_order() is not None for layer in sparse_layers(twin).values())


def test_include_and_exclude(net):
    hrbp.sparsify(net, 0.8, include=["h*", nn.Conv2d], exclude=["wide"])
    assert list(sparse_layers(net)) == ["stem", "point", "hidden", "head"] or record_of(net).dense["stem"].startswith(
        "hrbp"
    )
    assert record_of(net).dense["wide"] == "excluded"
    with pytest.raises(
        ValueError, match=r"sparsify\(\): 'nothing\*' matches no Conv2d, Conv1d or Linear; the model has stem"
    ):
        hrbp.sparsify(Net(), 0.8, include=["nothing*"])


def test_layers_that_other_code_reads_stay_dense():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2)
            self.tied = nn.Linear(16, 16)
            self.twin = nn.Linear(16, 16)
            self.twin.weight = self.tied.weight
            self.normed = parametrize_weight(nn.Linear(16, 16))
            self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
            self.same = nn.Conv2d(16, 16, 2, padding="same")
            self.good = nn.Linear(16, 16)
            self.last = nn.Linear(16, 16)

    model = Reader()
    hrbp.sparsify(model, 0.5, structure="hrbp")
    assert list(sparse_layers(model)) == ["good"]
    why = record_of(model).dense
    assert why["attention.out_proj"].startswith("a NonDynamicallyQuantizableLinear")
    assert why["tied"] == why["twin"] == "its weight is shared"
    assert why["normed"] == "its weight is parametrized"
    assert why["reflect"] == "padding_mode 'reflect'"
    assert why["same"] == "padding 'same' that is not symmetric"


def parametrize_weight(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def test_a_module_used_twice_is_replaced_in_both_places():
    block = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), block, nn.ReLU(), block, nn.Conv2d(16, 16, 1))
    hrbp.sparsify(model, 0.5, structure="hrbp")
    assert model[1] is model[3]
    assert isinstance(model[1], bs.BSRConv2d)


def test_refusals_leave_the_model_untouched(net, x):
    before = snapshot(net)
    for arguments, message in [
        ({"sparsity": 1.0}, r"sparsity is 1\.0"),
        ({"sparsity": 0.5, "structure": "what"}, r"structure\(\): no structure 'what'"),
        ({"sparsity": 0.5, "saliency": "snip"}, r"saliency\(\): method 'snip' needs batch"),
        ({"sparsity": 0.5, "distribution": "even"}, "distribution is 'even'"),
        ({"sparsity": 0.5, "structure": "block", "blocksize": (7, 7)}, "no layer to make sparse.*grains of 7"),
        ({"sparsity": 0.5, "exclude": [nn.Conv2d, nn.Linear]}, "no layer to make sparse"),
    ]:
        with pytest.raises(ValueError, match=message):
            hrbp.sparsify(net, **arguments)
        assert unchanged(net, before)
        assert record_of(net, required=False) is None
    with pytest.raises(TypeError, match="no option bananas"):
        hrbp.sparsify(net, 0.5, bananas=3)
    hrbp.sparsify(net, 0.5)
    after = snapshot(net)
    with pytest.raises(ValueError, match="sparse already"):
        hrbp.sparsify(net, 0.5)
    assert unchanged(net, after)


def test_a_structure_that_does_not_fit_leaves_that_layer_dense(net):
    hrbp.sparsify(net, 0.5, structure="block", blocksize=(32, 16))
    assert list(sparse_layers(net)) == ["wide", "point"]
    assert record_of(net).dense["hidden"] == "block: grains of 32 do not divide K = 48"


@pytest.mark.parametrize("saliency", ["snip", "grasp", "synflow", "magnitude+gradient"])
@pytest.mark.parametrize("distribution", ["erk", "global"])
def test_saliencies_that_look_at_data(net, x, saliency, distribution):
    batch = (x, torch.arange(4))
    hrbp.sparsify(net, 0.7, structure="hrbp++", saliency=saliency, distribution=distribution, batch=batch)
    assert hrbp.summary(net).sparsity == pytest.approx(0.7, abs=0.05)


def test_the_seed_decides(net):
    masks = []
    for seed in (0, 0, 1):
        model = hrbp.sparsify(copy.deepcopy(net), 0.8, seed=seed)
        masks.append([layer.mask() for layer in sparse_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(masks[0], masks[2], strict=True))


def test_checkpoints_carry_the_masks(net, x):
    for structure in ("hrbp++", "unstructured"):
        source, target = copy.deepcopy(net), copy.deepcopy(net)
        hrbp.sparsify(source, 0.8, structure=structure, seed=0)
        hrbp.sparsify(target, 0.8, structure=structure, seed=1)
        assert not torch.equal(source(x), target(x))
        target.load_state_dict(source.state_dict())
        assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("structure", ["hrbp", "hrbp++"])
def test_random_groups_leave_filters_in_place_and_read_every_channel_equally(structure):
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 8, 3))

    def readers(**options) -> torch.Tensor:
        """[C]: how many of the groups read each input channel."""
        made = hrbp.sparsify(copy.deepcopy(net), 0.9, structure=structure, distribution="uniform", **options)
        (layer,) = sparse_layers(made).values()
        assert (layer.row_order() is None) is ("row_granule" not in options)
        grouping = record_of(made).structure.grouping(layer.mask(), layer.row_order())
        assert grouping.groups == (16 if structure == "hrbp" else 8)  # of 6 and of 14 channels out of 64
        return torch.bincount(grouping.channels.flatten(), minlength=64)

    groups = readers()
    assert int(groups.max()) - int(groups.min()) <= 1
    drawn = readers(balanced=False)
    assert int(drawn.max()) - int(drawn.min()) > 1
    readers(row_granule=1)


@pytest.mark.parametrize("saliency", ["random", "magnitude"])
def test_groups_of_a_model_read_every_channel_equally(net, saliency, recwarn):
    hrbp.sparsify(net, 0.85, structure="hrbp", saliency=saliency, distribution="uniform")
    rows = {row.name: row for row in hrbp.summary(net).rows if row.coverage is not None}
    assert list(rows) == list(sparse_layers(net))
    for name, layer in sparse_layers(net).items():
        readers = layer.mask().any(3).any(2)[:: 1 if saliency == "magnitude" else layer.blocksize[0]].sum(0)
        assert int(readers.min()) >= 1
        assert rows[name].coverage >= 1
        assert rows[name].unread == 0
    assert "cover" in str(hrbp.summary(net)).splitlines()[0]
    assert not [w for w in recwarn if "too few groups" in str(w.message)]


def test_too_few_groups_are_named_once(net):
    options = {"structure": "hrbp", "distribution": "uniform", "groups": 4, "min_rows": 8}
    with pytest.warns(UserWarning, match="too few groups") as told:
        hrbp.sparsify(net, 0.9, **options)
    (text,) = (str(w.message) for w in told)
    assert text.startswith("sparsify(): wide, point, hidden: too few groups to read every input channel; in point")
    assert "in point 4 groups x 3 channels are 38% of 32, and the others are read by no filter" in text
    rows = {row.name: row for row in hrbp.summary(net).rows}
    assert (rows["wide"].coverage, rows["wide"].unread) == (0.5, 8)
    assert "unread: input channels that no filter reads, in 3 layers; most in point, 20 of 32" in str(hrbp.summary(net))


def test_the_summary_counts_right(net, x):
    hrbp.sparsify(net, 0.8, structure="hrbp++", saliency="magnitude")
    result = hrbp.summary(net, x, measure=True)
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["stem", "wide", "point", "depth", "mirror", "hidden", "head"]
    layers = sparse_layers(net)
    for name, layer in layers.items():
        stored = int(layer.mask().sum())
        bias = 0 if layer.module.bias is None else layer.module.bias.numel()
        assert rows[name].parameters == stored + bias
        assert rows[name].density == stored / layer.mask().numel()
        assert rows[name].bytes == 4 * (stored + bias) + layer.module.index.numel() * 4
        assert rows[name].seconds > 0
        assert rows[name].dense_seconds > 0
        assert rows[name].backend in bs.available_backends()
        assert rows[name].run_flops == (rows[name].dense_flops if rows[name].backend == "torch" else rows[name].flops)
    assert rows["wide"].flops == 2 * 4 * 6 * 6 * layers["wide"].parameter.numel()
    assert rows["wide"].dense_flops == 2 * 4 * 6 * 6 * 32 * 16 * 9
    assert rows["hidden"].flops == 2 * 4 * layers["hidden"].parameter.numel()
    assert rows["depth"].flops == rows["depth"].dense_flops == 2 * 4 * 3 * 3 * 32 * 9
    kept = sum(int(layer.mask().sum()) for layer in layers.values())
    cells = sum(layer.mask().numel() for layer in layers.values())
    assert result.sparsity == pytest.approx(1 - kept / cells)
    everything = sum(p.numel() for p in Net().parameters())
    assert (result.parameters, result.dense_parameters) == (everything - cells + kept, everything)
    assert str(result).splitlines()[0].split()[-6:] == ["GFLOP", "run", "backend", "ms", "dense", "ms", "speed"][-6:]
    assert not any(m.training for m in net.modules())
    with pytest.raises(ValueError, match="measure needs x"):
        hrbp.summary(net, measure=True)


def test_densify_works_on_hand_made_models(x):
    pattern = bs.BSRPattern.random((16, 3, 3, 3), (8, 1), 0.5, torch.Generator().manual_seed(0))
    layer = bs.BSRConv2d(pattern, padding=1)
    model = nn.Sequential(layer)
    expected = model(x)
    assert torch.allclose(hrbp.densify(model)(x), expected, atol=1e-6)
    assert isinstance(hrbp.densify(layer), nn.Conv2d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_channels_last(net, dtype):
    net.to(dtype).to(memory_format=torch.channels_last)
    hrbp.sparsify(net, 0.8, saliency="magnitude")
    assert all(layer.parameter.dtype == dtype for layer in sparse_layers(net).values())
    x = torch.randn(2, 3, 12, 12, dtype=dtype).contiguous(memory_format=torch.channels_last)
    twin = hrbp.densify(copy.deepcopy(net))
    assert torch.allclose(net(x), twin(x), rtol=0.05, atol=0.02)


def test_other_convolutions_are_listed_with_their_reason():
    model = nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3), "cube": nn.Conv3d(4, 4, 3), "up": nn.ConvTranspose2d(4, 4, 2)})
    hrbp.sparsify(model, 0.5, structure="unstructured", include=["conv"])
    text = str(hrbp.summary(model))
    assert "cube (a Conv3d: stored blocks are for Conv2d, Conv1d or Linear)" in text
    assert "up (a ConvTranspose2d: stored blocks are for Conv2d, Conv1d or Linear; upsampling" in text


def test_hooks_of_a_layer_run_before_sparsify_after_it_and_after_densify():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 3))
    calls = []
    handle = model[1].register_forward_hook(lambda module, args, y: calls.append(type(module).__name__))
    x = torch.randn(1, 3, 9, 9)
    for change in (lambda: None, lambda: hrbp.sparsify(model, 0.5), lambda: hrbp.densify(model)):
        change()
        model(x)
    assert calls == ["Conv2d", "BSRConv2d", "Conv2d"]
    handle.remove()
    model(x)
    assert len(calls) == 3


def four() -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(c, k, 3) for c, k in ((3, 16), (16, 32), (32, 32), (32, 64), (64, 4))))


def test_layers_with_a_sparsity_of_their_own(tmp_path):
    model = hrbp.sparsify(four(), 0.8, structure="unstructured", per_layer={"*": 0.5, "3": 0.95, "2": 0.0})
    density = {name: layer.kept() / layer.mask().numel() for name, layer in sparse_layers(model).items()}
    assert density == pytest.approx({"1": 0.5, "2": 1.0, "3": 0.05}, rel=1e-3)
    model = hrbp.sparsify(four(), 0.8, structure="unstructured", per_layer={"3": 0.95}, distribution="uniform")
    density = {name: layer.kept() / layer.mask().numel() for name, layer in sparse_layers(model).items()}
    assert density == pytest.approx({"1": 0.2, "2": 0.2, "3": 0.05}, rel=1e-2)
    hrbp.save(model, tmp_path / "model.pt")
    assert record_of(hrbp.load(tmp_path / "model.pt", four())) == record_of(model)
    with pytest.raises(ValueError, match=r"per_layer names '0', which is no layer to make sparse; these are 1, 2, 3"):
        hrbp.sparsify(four(), 0.8, per_layer={"0": 0.5})
    with pytest.raises(ValueError, match=r"per_layer\['1'\]: sparsity is 90; .*90% is 0\.9"):
        hrbp.sparsify(four(), 0.8, per_layer={"1": 90})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"gave 3 a sparsity alone; leave per_layer out"):
        hrbp.Evolver(model, optimizer, "gmp", total_steps=1000, sparsity=0.9)


def test_a_least_density_of_every_layer():
    plain = hrbp.sparsify(four(), 0.9, structure="unstructured")
    model = hrbp.sparsify(four(), 0.9, structure="unstructured", min_density=0.09)
    before, now = (
        {name: layer.kept() / layer.mask().numel() for name, layer in sparse_layers(m).items()} for m in (plain, model)
    )
    assert min(before.values()) < 0.085
    assert min(now.values()) == pytest.approx(0.09, rel=1e-2)
    assert hrbp.summary(model).sparsity == pytest.approx(0.9, abs=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"sparsity is 0\.95 and min_density of the model 0\.09"):
        hrbp.Evolver(model, optimizer, "gmp", total_steps=1000, sparsity=0.95)
