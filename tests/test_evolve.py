"""Masks that change while training, against slow references on dense tensors."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import hrbp
from hrbp.layers.record import record_of
from hrbp.layers.view import SparseLayer, sparse_layers
from hrbp.methods.evolver import Evolver, Update

CASES = [
    ("unstructured", {}),
    ("kernel", {}),
    ("filter", {}),
    ("channel", {}),
    ("block", {"blocksize": (8, 4)}),
    ("1xn", {"n": 8}),
    ("1xn", {"n": 8, "uniform": True}),
    ("1xn", {"n": 8, "rearrange": True, "saliency": "magnitude"}),
    ("hrbp", {"groups": 2}),
    ("hrbp", {"groups": 4, "balanced": True}),
    ("hrbp++", {"groups": 2, "granule": 4}),
    ("hrbp++", {"groups": 4, "row_granule": 1}),
]
IDS = [f"{name}{''.join(f' {k}={v}' for k, v in options.items())}" for name, options in CASES]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.two = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.stem(x).relu()).relu()).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())


def make(structure: str = "hrbp++", sparsity: float = 0.7, seed: int = 0, dtype=torch.float64, **options) -> Net:
    torch.manual_seed(seed)
    net = Net().to(dtype)
    return hrbp.sparsify(net, sparsity, structure=structure, seed=seed, **options)


def batch(seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 10, 10, generator=generator, dtype=dtype), torch.randint(5, (6,), generator=generator)


def backward(net: nn.Module, seed: int = 0) -> None:
    x, y = batch(seed, next(net.parameters()).dtype)
    nn.functional.cross_entropy(net(x), y).backward()


def dense_gradients(net: Net, *seeds: int) -> dict[str, Tensor]:
    """|dL/dW| of all weights, by autograd on the dense twin."""
    twin = hrbp.densify(copy.deepcopy(net))
    twin.zero_grad()
    for seed in seeds or (0,):
        backward(twin, seed)
    return {
        name: twin.get_submodule(name).weight.grad.view(layer.shape).abs() for name, layer in sparse_layers(net).items()
    }


def units(net: Net, layer: SparseLayer) -> list[list[list[tuple[int, ...]]]]:
    """Rows of units of cells that are kept or dropped together, by the definitions of the structures."""
    k, c, r, s = layer.shape
    rule = record_of(net).structure
    cells = [(a, b, i, j) for a in range(k) for b in range(c) for i in range(r) for j in range(s)]
    name = rule.name

    def split(key, row=lambda cell: 0):
        rows: dict = {}
        for cell in cells:
            rows.setdefault(row(cell), {}).setdefault(key(cell), []).append(cell)
        return [list(r.values()) for r in rows.values()]

    if name == "unstructured":
        return split(lambda x: x)
    if name == "kernel":
        return split(lambda x: x[:2])
    if name == "filter":
        return split(lambda x: x[0])
    if name == "channel":
        return split(lambda x: x[1])
    if name == "block":
        return split(lambda x: (x[0] // 8, x[1] // 4, *x[2:]))
    if name == "1xn":
        order = layer.row_order()
        row = list(range(k)) if order is None else order.argsort().tolist()
        assert (order is None) != rule.rearrange
        return split(lambda x: (row[x[0]] // 8, x[1]), (lambda x: x[0] // 8) if rule.uniform else (lambda x: 0))
    raise AssertionError(name)


def exchanged(rows, mask: Tensor, worth: Tensor, wish: Tensor, share: float) -> Tensor:
    """The slow reference: in every row of units, the cheapest go and the most wished come; the first among equals."""
    new = np.zeros(mask.shape, dtype=bool)
    mask, worth, wish = (dict(np.ndenumerate(t.detach().numpy())) for t in (mask, worth, wish))
    for row in rows:
        total = [(-sum(worth[cell] for cell in u), i) for i, u in enumerate(row) if mask[u[0]]]
        count = min(round(share * len(total)), len(row) - len(total))
        stay = {i for _, i in sorted(total)[: len(total) - count]}
        wished = sorted((-sum(wish[cell] for cell in u), i) for i, u in enumerate(row) if i not in stay)
        for i in stay | {i for _, i in wished[:count]}:
            for cell in row[i]:
                new[cell] = True
    return torch.from_numpy(new)


@pytest.mark.parametrize(("structure", "options"), CASES[:8], ids=IDS[:8])
def test_rigl_exchanges_units_as_the_slow_reference_does(structure, options):
    net = make(structure, **options)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    evolver = Evolver(net, optimizer, "rigl", total_steps=100, every=1, drop=0.4)
    for step in range(2):
        grads = dense_gradients(net)
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
        before = {name: (layer.mask(), layer.weight()) for name, layer in sparse_layers(net).items()}
        update = evolver.step()
        assert update.step == step + 1
        share = 0.2 * (1 + math.cos(math.pi * (step + 1) / 75))
        moved = 0
        for name, layer in sparse_layers(net).items():
            mask, weight = before[name]
            expected = exchanged(units(net, layer), mask, weight.abs(), grads[name], share)
            assert torch.equal(layer.mask(), expected), name
            assert torch.equal(layer.weight(), weight * expected)
            moved += int((expected & ~mask).sum())
            assert update.changed[name] == pytest.approx(float((expected & ~mask).sum() / expected.sum()))
        # A filter that is dropped has no gradient behind a ReLU: what goes comes back.
        assert moved > 0 or structure == "filter"


def after_an_update(net: Net, method: str, **options):
    """One step and one update of a net of groups; dense gradients, and name -> (groups, weight) just before it."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    evolver = Evolver(net, optimizer, method, every=1, **options)
    grads = dense_gradients(net)
    backward(net)
    optimizer.step()
    rule = record_of(net).structure
    before = {
        n: (rule.grouping(layer.mask(), layer.row_order()), layer.weight()) for n, layer in sparse_layers(net).items()
    }
    evolver.step()
    return rule, grads, before


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("tap_density", "granule"), [(1.0, 1), (4 / 9, 4)])
def test_rigl_exchanges_the_channels_of_groups(balanced, tap_density, granule):
    net = make("hrbp++", tap_density=tap_density, granule=granule, groups=4, balanced=balanced, row_granule=1)
    rule, grads, before = after_an_update(net, "rigl", total_steps=100, drop=0.5)
    for name, layer in sparse_layers(net).items():
        old, weight = before[name]
        new = rule.grouping(layer.mask(), layer.row_order())
        assert torch.equal(new.row_order, old.row_order)
        assert torch.equal(new.taps, old.taps)
        assert new.channels.shape == old.channels.shape
        counts = torch.bincount(new.channels.flatten(), minlength=layer.shape[1])
        if balanced:
            assert int(counts.max() - counts.min()) <= 1
        width = old.channels.shape[1] // granule
        for g in range(old.groups):
            rows = old.row_order[g * old.rows : (g + 1) * old.rows]

            def total(t: Tensor, run: int, rows=rows, taps=old.taps[g]) -> float:
                cells = t.flatten(2)[rows][:, run * granule : (run + 1) * granule][:, :, taps]
                return float(cells.sum())

            runs = sorted(set((old.channels[g] // granule).tolist()))
            go = min(round(0.25 * (1 + math.cos(math.pi / 75)) * width), layer.shape[1] // granule - width)
            stay = sorted(runs, key=lambda run: total(weight.abs(), run))[go:]
            assert set(stay) <= set((new.channels[g] // granule).tolist())
            if not balanced:
                others = [run for run in range(layer.shape[1] // granule) if run not in stay]
                grown = sorted(others, key=lambda run: total(grads[name], run))[len(others) - go :]
                assert set((new.channels[g] // granule).tolist()) == set(stay) | set(grown)


def test_hrbp_counts_again_in_every_group():
    net = make("hrbp++", groups=2, sparsity=0.8)
    rule, grads, before = after_an_update(net, "hrbp", total_steps=10, drop=1.0)
    moved = 0
    for name, layer in sparse_layers(net).items():
        old, weight = before[name]
        k, c, r, s = layer.shape
        mask, worth, wish = (t.reshape(k, -1) for t in (old.mask(), weight.abs(), grads[name]))
        share = 0.5 * (1 + math.cos(math.pi / 7.5))
        single = exchanged([[[(o, i)] for i in range(c * r * s)] for o in range(k)], mask, worth, wish, share)
        new = rule.grouping(layer.mask(), layer.row_order())
        for g in range(old.groups):
            rows = old.row_order[g * old.rows : (g + 1) * old.rows]
            cells = single.view(k, c, r * s)[rows]
            counts = cells.sum(2)
            size = old.channels.shape[1]
            order = sorted(range(old.rows * c), key=lambda i: (-int(counts.flatten()[i]), i))[: old.rows * size]
            kernels = torch.zeros(old.rows * c, dtype=torch.bool)
            kernels[order] = True
            kernels = kernels.view(old.rows, c)
            key = [(-int(kernels[:, i].sum()), -int(counts[:, i].sum()), i) for i in range(c)]
            channels = sorted(i for *_, i in sorted(key)[:size])
            per_tap = cells[:, channels].sum((0, 1))
            taps = sorted(sorted(range(r * s), key=lambda p: (-int(per_tap[p]), p))[: old.taps.shape[1]])
            assert new.channels[g].tolist() == channels
            assert new.taps[g].tolist() == taps
            moved += channels != old.channels[g].tolist()
    assert moved > 0


@settings(max_examples=10)
@given(
    st.integers(0, 2**31), st.sampled_from(range(len(CASES))), st.sampled_from(["set", "rigl"]),
    st.sampled_from(["sgd", "adamw"]), st.floats(0.0, 1.0),
)  # fmt: skip
def test_updates_keep_sizes_and_carry_what_stays(seed, case, method, kind, drop):
    structure, options = CASES[case]
    net = make(structure, seed=seed, **options)
    make_optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    }[kind]
    optimizer = make_optimizer(net.parameters())
    evolver = Evolver(net, optimizer, method, total_steps=100, every=2, drop=drop, seed=seed)
    layers = sparse_layers(net)
    memory = {name: layer.parameter.data_ptr() for name, layer in layers.items()}

    def spread(layer: SparseLayer, t: Tensor) -> Tensor:
        return layer.module.pattern.to_dense(t) if not layer.master else t.view(layer.shape)

    def everything(layer: SparseLayer) -> dict[str, Tensor]:
        state = optimizer.state[layer.parameter]
        named = {n: t for n, t in state.items() if isinstance(t, Tensor) and t.shape == layer.parameter.shape}
        named |= {"weight": layer.parameter.detach(), "grad": layer.parameter.grad}
        return {n: spread(layer, t).clone() for n, t in named.items()}

    for step in range(1, 5):
        optimizer.zero_grad()
        backward(net, seed + step)
        optimizer.step()
        before = {name: (layer.mask().clone(), everything(layer)) for name, layer in layers.items()}
        update = evolver.step()
        assert isinstance(update, Update) == (step % 2 == 0)
        for name, layer in layers.items():
            mask, old = before[name]
            assert layer.mask().sum() == mask.sum()
            stays, new = layer.mask() & mask, everything(layer)
            assert len(new) == {"sgd": 3, "adamw": 4}[kind]
            for n, t in new.items():
                assert torch.equal(t, old[n] * stays), n
            assert layer.parameter.data_ptr() == memory[name]
        if update:
            assert not update.reallocated


def test_dense_gradients_add_up_over_backward_passes_and_skip_evaluation():
    net = make("unstructured")
    evolver = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=10, every=1)
    expected = dense_gradients(net, 1, 2)
    backward(net, 1)
    with torch.no_grad():
        net(batch(5)[0])
    backward(net, 2)
    gathered = evolver._gathered()
    for name, grad in expected.items():
        assert torch.allclose(gathered[name], grad, rtol=1e-9, atol=1e-12)


def test_mixed_precision_gathers_dense_gradients():
    net = make("hrbp", dtype=torch.float32)
    evolver = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=10, every=1)
    expected = dense_gradients(net)
    with torch.autocast("cpu", torch.bfloat16):
        backward(net)
    for name, grad in evolver._gathered().items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() < 0.1 * expected[name].norm()


def test_gradients_are_watched_only_when_they_are_needed():
    net = make()
    evolver = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=100, every=3)

    def watched() -> int:
        return sum("forward" in m.__dict__ for m in net.modules())

    for step in range(1, 8):
        wanted = step % 3 == 0
        assert evolver.wants_dense_grad() == wanted
        assert watched() == (len(sparse_layers(net)) if wanted else 0)
        backward(net)
        assert (evolver.step() is not None) == wanted
    stale = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=100, every=1)
    with pytest.raises(
        RuntimeError, match="no dense gradient of one, two, hidden, or of any other layer; where wants_dense_"
    ):
        stale.step()


def test_an_overflow_is_made_up_for_at_the_next_step():
    net = make()
    evolver = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=100, every=2)
    before = {name: layer.mask().clone() for name, layer in sparse_layers(net).items()}
    backward(net)
    assert evolver.step() is None
    x, y = batch()
    (nn.functional.cross_entropy(net(x), y) * math.inf).backward()
    assert evolver.step() is None
    assert all(torch.equal(layer.mask(), before[name]) for name, layer in sparse_layers(net).items())
    assert evolver.wants_dense_grad()
    backward(net)
    assert evolver.step().step == 3
    assert not evolver.wants_dense_grad() or evolver.steps == 3


def test_updates_end_at_until():
    net = make()
    evolver = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "set", total_steps=20, every=4, until=0.5)
    updates = [update.step for _ in range(20) if (update := evolver.step())]
    assert updates == [4, 8]


@pytest.mark.parametrize(("structure", "options"), CASES, ids=IDS)
def test_gradual_pruning_follows_its_schedule(structure, options):
    net = make(structure, sparsity=0.0, **options)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    evolver = Evolver(net, optimizer, "gmp", total_steps=40, every=5, until=0.5, sparsity=0.8)
    steps = []
    rows = None
    for _ in range(40):
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
        masks = {name: layer.mask().clone() for name, layer in sparse_layers(net).items()}
        update = evolver.step()
        if update is None:
            continue
        steps.append(update.step)
        kept = sum(int(layer.mask().sum()) for layer in sparse_layers(net).values())
        cells = sum(mask.numel() for mask in masks.values())
        wanted = 0.8 - 0.8 * (1 - min(1, update.step / 20)) ** 3
        assert 1 - kept / cells == pytest.approx(wanted, abs=0.06)
        for name, layer in sparse_layers(net).items():
            if len(steps) > 1 and "hrbp" not in structure:
                assert not (layer.mask() & ~masks[name]).any()
            momentum = optimizer.state[layer.parameter]["momentum_buffer"]
            assert momentum.shape == layer.parameter.shape
        order = [layer.row_order() for layer in sparse_layers(net).values()]
        if rows is not None:
            assert all(a is b or torch.equal(a, b) for a, b in zip(order, rows, strict=True))
        rows = order
    assert steps == [5, 10, 15, 20]
    if structure != "unstructured" and structure != "kernel":
        assert any(layer.parameter.numel() < math.prod(layer.shape) for layer in sparse_layers(net).values())


def test_averaged_models_follow():
    net = make("hrbp", dtype=torch.float32)
    average = AveragedModel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    evolver = Evolver(net, optimizer, "set", total_steps=100, every=1, ema=[average])
    backward(net)
    optimizer.step()
    before = {name: layer.weight() for name, layer in sparse_layers(average).items()}
    evolver.step()
    for name, layer in sparse_layers(average).items():
        mask = sparse_layers(net)[name].mask()
        assert torch.equal(layer.mask(), mask)
        assert torch.equal(layer.weight(), before[name] * mask)
    average.update_parameters(net)


def test_resuming_repeats_the_same_masks():
    def run(steps: int, resume_at: int | None) -> dict[str, Tensor]:
        net = make("hrbp++", groups=4)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        evolver = Evolver(net, optimizer, "set", total_steps=steps, every=2, seed=7)
        for step in range(steps):
            if step == resume_at:
                saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), evolver.state_dict()))
                net = make("hrbp++", groups=4, seed=3)
                optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
                net.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                evolver = Evolver(net, optimizer, "set", total_steps=steps, every=2, seed=7)
                evolver.load_state_dict(saved[2])
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()
            evolver.step()
        return {name: layer.weight() for name, layer in sparse_layers(net).items()}

    whole = run(12, None)
    for at in (4, 7):
        resumed = run(12, at)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    net = make()
    other = Evolver(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", total_steps=5, every=1)
    with pytest.raises(ValueError, match="the state is of method 'set'; this is 'rigl'"):
        other.load_state_dict({"method": "set"})


def test_frozen_layers_stay():
    net = make("hrbp")
    optimizer = torch.optim.SGD([p for n, p in net.named_parameters() if not n.startswith("one.")], 0.1)
    evolver = Evolver(net, optimizer, "set", total_steps=100, every=1, drop=0.9)
    before = sparse_layers(net)["one"].mask().clone()
    update = evolver.step()
    assert set(update.changed) == {"two", "hidden"}
    assert torch.equal(sparse_layers(net)["one"].mask(), before)


@pytest.mark.parametrize(
    ("method", "structure", "sparsity", "options"),
    [
        ("set", "hrbp", 0.7, {"drop": 0.9}),
        ("set", "unstructured", 0.7, {}),
        ("rigl", "hrbp++", 0.7, {"drop": 0.9}),
        ("rigl", "unstructured", 0.7, {}),
        ("hrbp", "hrbp", 0.8, {"drop": 1.0}),
        ("gmp", "hrbp", 0.0, {"sparsity": 0.8}),
        ("gmp", "block", 0.0, {"sparsity": 0.8}),
        ("subp", "1xn", 0.8, {}),
    ],
)
def test_layers_frozen_and_thawed_between_updates(method, structure, sparsity, options):
    structural = {"1xn": {"n": 8}, "block": {"blocksize": (8, 4)}}.get(structure, {"groups": 2})
    structural = {} if structure == "unstructured" else structural
    master = "subp" if method == "subp" else None
    net = make(structure, sparsity, method=master, distribution="uniform", **structural)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    evolver = Evolver(net, optimizer, method, total_steps=10, every=1, until=0.8, **options)
    layers, moved = sparse_layers(net), dict.fromkeys(("one", "two", "hidden"), 0)
    for step in range(8 if method in ("gmp", "subp") else 7):
        for name in layers:
            layers[name].parameter.requires_grad_((name, step < 4) not in {("one", True), ("hidden", False)})
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
        before = {name: (layer.mask(), layer.parameter.detach().clone()) for name, layer in layers.items()}
        update = evolver.step()
        for name, layer in layers.items():
            moved[name] += update.sad[name]
            if not layer.parameter.requires_grad:
                assert update.sad[name] == update.changed[name] == 0
                assert torch.equal(layer.mask(), before[name][0])
                assert torch.equal(layer.parameter, before[name][1])
    assert method == "hrbp" or min(moved.values()) > 0
    if method == "gmp":
        cells = {name: layer.mask().numel() for name, layer in layers.items()}
        kept = {name: int(layer.mask().sum()) for name, layer in layers.items()}
        live = ("one", "two")  # at the last update
        assert 1 - sum(kept[n] for n in live) / sum(cells[n] for n in live) == pytest.approx(0.8, abs=0.02)
    for layer in layers.values():
        layer.parameter.requires_grad_(False)
    last = Evolver(net, optimizer, method, total_steps=10, every=1, until=0.8, **options)
    assert set(last.step().sad.values()) == {0}


def test_gradual_pruning_makes_the_groups_that_cover_in_the_end():
    """At the first update, when fewer would still read every channel: rows stay in their groups from then on."""
    net = make("hrbp", 0.0, row_granule=1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    evolver = Evolver(net, optimizer, "gmp", total_steps=5, every=1, until=1.0, sparsity=0.9)
    orders = []
    for step in range(5):
        backward(net, step)
        optimizer.step()
        evolver.step()
        orders.append([layer.row_order() for layer in sparse_layers(net).values()])
    assert all(torch.equal(a, b) for later in orders[1:] for a, b in zip(later, orders[0], strict=True))
    rule = record_of(net).structure
    for layer in sparse_layers(net).values():
        groups = rule.grouping(layer.mask(), layer.row_order())
        assert groups.groups == rule.count(layer.shape, groups.channels.shape[1])
        assert groups.coverage >= 1


def test_frozen_weights_do_not_decay():
    net = make("2:4", 0.5, method="sr-ste", exclude=["stem"])
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    evolver = Evolver(net, optimizer, "sr-ste", total_steps=10, every=1, decay=0.5)
    backward(net)
    net.one.weight.requires_grad_(False)  # its gradient is still there
    gradient, weight = net.one.weight.grad.clone(), net.one.weight.clone()
    optimizer.step()
    assert torch.equal(net.one.weight, weight - gradient)
    assert evolver.step() is not None


def test_refusals():
    net = make("hrbp")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for arguments, message in [
        ({"method": "magic"}, "method is 'magic'; it needs one of static, set, rigl, hrbp, gmp"),
        ({"method": None}, "method is None; it needs one of"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 10.5}, r"total_steps is 10\.5; it needs an integer >= 1"),
        ({"every": 0}, "every is 0"),
        ({"drop": "much"}, "drop is 'much'"),
        ({"drop": 1.5}, r"drop is 1\.5"),
        ({"until": -0.1}, r"until is -0\.1"),
        ({"method": "gmp"}, "sparsity is None with method 'gmp'"),
        ({"method": "gmp", "sparsity": 1.0}, r"sparsity is 1\.0 with method 'gmp'"),
        ({"method": "gmp", "sparsity": 0.2}, r"sparse already; 'gmp' to 0\.2 cannot grow it"),
    ]:
        with pytest.raises(ValueError, match=message):
            Evolver(net, optimizer, **{"total_steps": 10, "every": 1, **arguments})
    with pytest.raises(ValueError, match=r"the model is not sparse; call hrbp\.sparsify"):
        Evolver(Net(), optimizer, total_steps=10, every=1)
    with pytest.raises(ValueError, match="the optimizer updates no sparse layer"):
        Evolver(net, torch.optim.SGD(Net().parameters(), 0.1), total_steps=10, every=1)
    fixed = make("2:4", sparsity=0.5, exclude=["stem"])
    with pytest.raises(ValueError, match="masks of structure '2:4' do not change"):
        Evolver(fixed, torch.optim.SGD(fixed.parameters(), 0.1), total_steps=10, every=1)
    Evolver(fixed, torch.optim.SGD(fixed.parameters(), 0.1), "static", total_steps=10)
    single = make("unstructured")
    with pytest.raises(ValueError, match="method 'hrbp' updates groups; the structure is 'unstructured'"):
        Evolver(single, torch.optim.SGD(single.parameters(), 0.1), "hrbp", total_steps=10, every=1)
