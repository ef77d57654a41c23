"""Every optimizer beside masks that move: what belongs to an element goes with it, the rest is refused."""

from __future__ import annotations

import copy
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import blocksparse as bs
import hrbp
import processes
from blocksparse import carry
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers

SHAPE = (8, 12, 3, 3)

# Optimizers that treat every element alone: an element that stays must not notice that others come and go.
ELEMENTWISE = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": False}),
    "sgd-fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "adam-plain": (torch.optim.Adam, {"foreach": False, "weight_decay": 0.1}),
    "adam-fused": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"foreach": True}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adamax": (torch.optim.Adamax, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.2, "lr_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {"t0": 2, "lambd": 0.1}),
}
OTHERS = {"Adafactor", "LBFGS", "Muon", "SparseAdam"}


def test_every_optimizer_of_torch_has_a_test():
    known = {kind.__name__ for kind, _ in ELEMENTWISE.values()} | OTHERS | {"Optimizer"}
    assert {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)} <= known


def fresh_state(kind, options):
    """name -> what this optimizer starts a tensor of one number an element with."""
    parameter = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = kind([parameter], lr=0.05, **options)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    return {n: float(t[0, 0]) for n, t in state.items() if isinstance(t, torch.Tensor) and t.shape == parameter.shape}


def pattern(density, blocksize=(4, 3), order=None, seed=0):
    drawn = bs.BSRPattern.random(SHAPE, blocksize, density, torch.Generator().manual_seed(seed))
    return drawn if order is None else bs.BSRPattern.from_mask(drawn.to_mask(), blocksize, order)


def blocks(first, dtype=torch.float64):
    """A BSRConv2d, and how to give it a gradient and another mask."""
    module = bs.BSRConv2d(first, dtype=dtype)

    def give(grad):
        module.values.grad = module.pattern.values_from_dense(grad)

    def dense(t):
        return module.pattern.to_dense(t)

    return module.values, give, dense, lambda new, optimizer: module.set_pattern(new, optimizer), module


def single():
    """A layer of single weights in a model, and how to give it a gradient and another mask by score."""
    model = nn.Sequential(nn.Conv2d(SHAPE[1], SHAPE[0], 3, dtype=torch.float64))
    hrbp.sparsify(model, 0.6, structure="unstructured", include=["0"])
    layer = sparse_layers(model)["0"]
    structure = record_of(model).structure

    def give(grad):
        layer.parameter.grad = layer.module.pattern.values_from_dense(grad)

    def change(new, optimizer):
        generator = torch.Generator().manual_seed(new[1])
        layer.set(structure.choose(torch.rand(SHAPE, generator=generator), new[0]), optimizer)

    return layer, give, change


CHANGES = {
    "same nnzb": [pattern(0.5, seed=1), pattern(0.5, seed=2)],
    "other nnzb": [pattern(0.8, seed=1), pattern(0.4, seed=2)],
    "other blocksize": [pattern(0.5, (2, 1), seed=1), pattern(0.5, (8, 6), seed=2)],
    "other row order": [pattern(0.5, order=torch.arange(8).flip(0), seed=1), pattern(0.5, seed=2)],
}


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_blocks_that_stay_train_on_as_if_alone(name, changes):
    kind, options = ELEMENTWISE[name]
    values, give, dense, change, module = blocks(pattern(0.5))
    optimizer = kind([values], lr=0.05, **options)
    alone = nn.Parameter(dense(values.detach()))
    reference = kind([alone], lr=0.05, **options)
    stayed, here = module.pattern.to_mask(), module.pattern.to_mask()
    for step in range(9):
        grad = torch.randn(SHAPE, dtype=torch.float64)
        give(grad)
        alone.grad = grad
        optimizer.step()
        reference.step()
        if step in (2, 5):
            change(CHANGES[changes][step > 2], optimizer)
            now = module.pattern.to_mask()
            came, stayed, here = now & ~here, stayed & now, now
            assert came.any()
            assert stayed.any()
            assert not dense(values.detach())[came].any()
            fresh = fresh_state(kind, options)
            found = {n: t for n, t in optimizer.state[values].items() if isinstance(t, torch.Tensor) and t.dim() == 3}
            assert found.keys() == fresh.keys()
            for n, t in found.items():
                assert t.shape == values.shape
                torch.testing.assert_close(dense(t)[came], torch.full_like(dense(t)[came], fresh[n]), atol=1e-7, rtol=0)
        torch.testing.assert_close(dense(values.detach())[stayed], alone.detach()[stayed], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sparsities", [(0.6, 0.6), (0.3, 0.7)], ids=["same", "other"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_single_weights_that_stay_train_on_as_if_alone(name, sparsities):
    kind, options = ELEMENTWISE[name]
    layer, give, change = single()
    values = layer.parameter
    optimizer = kind([values], lr=0.05, **options)
    alone = nn.Parameter(layer.weight())
    reference = kind([alone], lr=0.05, **options)
    stayed, here = layer.mask(), layer.mask()
    for step in range(9):
        grad = torch.randn(SHAPE, dtype=torch.float64)
        give(grad)
        alone.grad = grad
        optimizer.step()
        reference.step()
        assert values.shape == (int(layer.mask().sum()), 1, 1)
        if step in (2, 5):
            change((sparsities[step > 2], step), optimizer)
            now = layer.mask()
            came, stayed, here = now & ~here, stayed & now, now
            assert came.any()
            assert stayed.any()
            fresh = fresh_state(kind, options)
            for n, at_start in fresh.items():
                grown = layer.module.pattern.to_dense(optimizer.state[values][n])[came]
                torch.testing.assert_close(grown, torch.full_like(grown, at_start), atol=1e-7, rtol=0)
        torch.testing.assert_close(layer.weight()[stayed], alone.detach()[stayed], rtol=1e-10, atol=1e-12)


def test_what_is_not_a_number_does_not_outlive_its_weight():
    layer, give, change = single()
    optimizer = torch.optim.SGD([layer.parameter], lr=0.05, momentum=0.9)
    give(torch.full(SHAPE, torch.inf, dtype=torch.float64))
    optimizer.step()
    before = layer.mask()
    change((0.6, 1), optimizer)
    came = layer.mask() & ~before
    assert came.any()
    for t in (layer.parameter.detach(), layer.parameter.grad, optimizer.state[layer.parameter]["momentum_buffer"]):
        assert not layer.module.pattern.to_dense(t)[came].any()


# ---------------------------------------------------------------- Adafactor: a number a row and column of a block


def by_block(pattern, t):
    """(block-row, block-col) -> this block's part of t [nnzb, ...]."""
    rows = torch.repeat_interleave(torch.arange(pattern.indptr.numel() - 1), pattern.indptr.diff().long())
    keys = zip(rows.tolist(), pattern.indices.tolist(), strict=True)
    return dict(zip(keys, t.detach().clone(), strict=True))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("density", [0.5, 0.8, 0.2])
@pytest.mark.parametrize("blocksize", [(4, 3), (4, 1), (1, 3), (1, 1)])
def test_adafactor_takes_its_factors_along(blocksize, density, foreach):
    values, give, _, change, module = blocks(pattern(0.5, blocksize))
    optimizer = torch.optim.Adafactor([values], lr=0.05, foreach=foreach)
    for _ in range(3):
        give(torch.randn(SHAPE, dtype=torch.float64))
        optimizer.step()
    names = ("row_var", "col_var")
    state = optimizer.state[values]
    before = {n: by_block(module.pattern, state[n]) for n in names}
    weights = by_block(module.pattern, values)
    change(pattern(density, blocksize, seed=1), optimizer)
    # By hand: an optimizer made anew, whose parameter and state are put together block by block.
    keys = by_block(module.pattern, values)
    twin = nn.Parameter(torch.stack([weights.get(key, torch.zeros(blocksize).double()) for key in keys]))
    other = torch.optim.Adafactor([twin], lr=0.05, foreach=foreach)
    other.state[twin] = {"step": state["step"].clone()}
    for n in names:
        zero = torch.zeros_like(next(iter(before[n].values())))
        other.state[twin][n] = torch.stack([before[n].get(key, zero) for key in keys])
        assert torch.equal(other.state[twin][n], state[n])
    assert torch.equal(twin, values)
    for _ in range(3):
        give(torch.randn(SHAPE, dtype=torch.float64))
        twin.grad = values.grad.clone()
        optimizer.step()
        other.step()
        torch.testing.assert_close(twin, values)


@pytest.mark.parametrize(
    "sizes", [((4, 1), (2, 2)), ((1, 1), (4, 3)), ((4, 3), (1, 1)), ((2, 6), (8, 3)), ((1, 3), (4, 3))]
)
def test_adafactor_when_blocks_are_cut_anew(sizes):
    """A row of a new block has the mean of what its cells had; the estimates stay in scale and training goes on."""
    old, new = (bs.BSRPattern.full(SHAPE, size) for size in sizes)
    values, give, dense, change, module = blocks(old)
    optimizer = torch.optim.Adafactor([values], lr=0.05)
    for _ in range(3):
        give(torch.randn(SHAPE, dtype=torch.float64))
        optimizer.step()
    state = optimizer.state[values]
    cells = {n: dense(state[n].expand(values.shape).contiguous()) for n in ("row_var", "col_var")}
    change(new, optimizer)
    for n, axis in (("row_var", 2), ("col_var", 1)):
        torch.testing.assert_close(state[n], new.values_from_dense(cells[n]).mean(axis, keepdim=True))
    give(torch.randn(SHAPE, dtype=torch.float64))
    optimizer.step()
    assert torch.isfinite(values).all()
    assert module.pattern == new


@pytest.mark.parametrize("structure", ["hrbp", "unstructured", "block"])
@pytest.mark.parametrize("method", ["rigl", "set", "gmp"])
def test_the_evolver_trains_with_adafactor(method, structure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    options = (
        {"blocksize": (4, 4)} if structure == "block" else {"groups": 4, "min_rows": 4} if structure == "hrbp" else {}
    )
    hrbp.sparsify(net, 0.0 if method == "gmp" else 0.6, structure=structure, **options)
    optimizer = torch.optim.Adafactor(net.parameters(), lr=0.01)
    more = {"sparsity": 0.8} if method == "gmp" else {}
    evolver = hrbp.Evolver(net, optimizer, method, total_steps=12, every=2, **more)
    for _ in range(12):
        net(torch.randn(2, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        evolver.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in net.parameters())


# ---------------------------------------------------------------- what cannot follow


class Preconditioned(torch.optim.Optimizer):
    """Keeps what a test asks for, and updates as SGD does."""

    def __init__(self, params, keeps):
        super().__init__(params, {"lr": 0.1})
        self.keeps = keeps

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].update(self.keeps(p.detach()))
                    p.data.add_(p.grad, alpha=-0.1)


class Quantized(torch.Tensor):
    """A tensor of its own kind, as libraries of 8-bit optimizers have."""

    def __deepcopy__(self, memo):
        return self.clone()


def snapshot(module, optimizer):
    return copy.deepcopy((module.state_dict(), module.values.grad, [copy.copy(s) for s in optimizer.state.values()]))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        (lambda p: {"left": torch.eye(p.shape[0])}, r"Preconditioned keeps 'left', a Tensor of shape \(18, 18\)"),
        (lambda p: {"absmax": torch.ones(p.numel() // 12)}, r"keeps 'absmax', a Tensor of shape \(18,\)"),
        (lambda p: {"right": torch.ones(1, 1)}, r"keeps 'right', a Tensor of shape \(1, 1\)"),
        (lambda p: {"flat": torch.zeros(p.numel())}, r"keeps 'flat', a Tensor of shape \(216,\)"),
        (lambda p: {"shampoo": {"momentum": torch.zeros_like(p)}}, "keeps 'shampoo', a dict, for a parameter"),
        (lambda p: {"history": [p.clone()]}, "keeps 'history', a list, for a parameter"),
        (lambda p: {"over_blocks": p.new_ones(1, 4, 3)}, r"keeps 'over_blocks' of shape \(1, 4, 3\) for all blocks"),
        (lambda p: {"codes": torch.zeros_like(p).as_subclass(Quantized)}, "keeps 'codes', a Quantized of shape"),
    ],
)
def test_state_that_belongs_to_no_element_is_refused(keeps, message):
    values, give, _, change, module = blocks(pattern(0.25), torch.float32)
    assert values.shape == (18, 4, 3)
    optimizer = Preconditioned([values], keeps)
    give(torch.randn(SHAPE))
    optimizer.step()
    before = snapshot(module, optimizer)
    for new in (pattern(0.25, seed=1), pattern(0.5)):
        with pytest.raises(ValueError, match=rf"BSRConv2d\.set_pattern\(\): .*{message}"):
            change(new, optimizer)
        assert equal(before, snapshot(module, optimizer))


def test_numbers_of_the_whole_parameter_stay():
    values, give, _, change, _ = blocks(pattern(0.25), torch.float32)
    kept = {"step": 3, "eta": torch.tensor(0.5), "scale": torch.ones(1), "name": "x", "momentum_buffer": None}
    optimizer = Preconditioned([values], lambda p: dict(kept))
    give(torch.randn(SHAPE))
    optimizer.step()
    change(pattern(0.5, seed=1), optimizer)
    assert optimizer.state[values] == kept


def test_one_block_is_not_taken_for_one_number():
    """[nnzb, 1, 1] with nnzb = 1 goes with its block; [1] and [] are of the whole parameter."""
    one, other = pattern(1 / 72, seed=1), pattern(1 / 72, seed=2)
    assert one != other
    values, give, _, change, _ = blocks(one, torch.float32)
    optimizer = Preconditioned([values], lambda p: {"norm": p.new_ones(1, 1, 1), "step": torch.ones(1)})
    give(torch.randn(SHAPE))
    optimizer.step()
    change(other, optimizer)
    assert optimizer.state[values]["norm"].tolist() == [[[0.0]]]
    assert optimizer.state[values]["step"].tolist() == [1.0]


def test_layers_refuse_before_anything_changes():
    layer, give, change = single()
    optimizer = Preconditioned([layer.parameter], lambda p: {"left": torch.eye(p.shape[0])})
    give(torch.randn(SHAPE, dtype=torch.float64))
    optimizer.step()
    before = copy.deepcopy(layer.module.state_dict())
    with pytest.raises(ValueError, match=r"BSRConv2d\.set_pattern\(\): Preconditioned keeps 'left'"):
        change((0.6, 1), optimizer)
    assert equal(before, layer.module.state_dict())


def test_lbfgs_is_refused():
    _, _, _, change, module = blocks(pattern(0.25))
    optimizer = torch.optim.LBFGS(module.parameters())
    before = snapshot(module, optimizer)
    with pytest.raises(ValueError, match="LBFGS keeps one history of all parameters together"):
        change(pattern(0.25, seed=1), optimizer)
    assert equal(before, snapshot(module, optimizer))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    hrbp.sparsify(net, 0.5, structure="block", blocksize=(4, 4))
    with pytest.raises(ValueError, match=r"Evolver\(\): 1: LBFGS keeps one history"):
        hrbp.Evolver(net, torch.optim.LBFGS(net.parameters()), "rigl", total_steps=1000)
    hrbp.Evolver(net, torch.optim.LBFGS(net.parameters()), "static", total_steps=1000)
    with pytest.raises(ValueError, match="the optimizer does not update this parameter"):
        change(pattern(0.25), torch.optim.LBFGS(net.parameters()))


def test_sparse_adam_and_muon_refuse_blocks_themselves():
    values, give, _, change, _ = blocks(pattern(0.25))
    optimizer = torch.optim.SparseAdam([values])
    give(torch.randn(SHAPE, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        optimizer.step()
    change(pattern(0.5), optimizer)
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        torch.optim.Muon([values])


class Around(torch.optim.Optimizer):
    """An optimizer inside another one, as ZeroRedundancyOptimizer and Lookahead have it."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.optim = inner

    def step(self, closure=None):
        self.optim.step()


def test_an_optimizer_inside_another_one_is_found():
    values, give, dense, change, module = blocks(pattern(0.5))
    optimizer = Around(Around(torch.optim.Adam([values])))
    give(torch.randn(SHAPE, dtype=torch.float64))
    optimizer.step()
    state = optimizer.optim.optim.state[values]
    before = {n: dense(state[n]) for n in ("exp_avg", "exp_avg_sq")}
    change(pattern(0.8, seed=1), optimizer)
    for n, t in before.items():
        assert torch.equal(dense(state[n]), t * module.pattern.to_mask())
    with pytest.raises(ValueError, match="LBFGS keeps one history"):
        change(pattern(0.5), Around(torch.optim.LBFGS([values])))


@pytest.mark.parametrize(("structure", "method"), [("block", "rigl"), ("unstructured", "set"), ("2:4", "sr-ste")])
@pytest.mark.parametrize("with_dense", [False, True])
def test_the_evolver_refuses_layers_that_share_a_parameter(structure, method, with_dense):
    net = nn.Sequential(*[nn.Conv2d(8, 8, 3) for _ in range(5)])
    options = {"blocksize": (4, 4)} if structure == "block" else {}
    hrbp.sparsify(net, 0.5, structure=structure, method="sr-ste" if method == "sr-ste" else None, **options)
    name = "weight" if method == "sr-ste" else "values"
    if with_dense:
        net[0].register_parameter("other", getattr(net[2], name))
    else:
        setattr(net[1], name, getattr(net[2], name))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    both = "2 and 0" if with_dense else "1 and 2"
    with pytest.raises(
        ValueError, match=rf"Evolver\(\): {both} share a parameter, of which each would have another mask"
    ):
        hrbp.Evolver(net, optimizer, method, total_steps=1000)


@pytest.mark.parametrize(
    ("structure", "method"), [("unstructured", None), ("2:4", "ste"), ("1xn", "subp"), ("hrbp", None)]
)
def test_models_made_sparse_in_inference_mode_train(structure, method):
    net = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
    with torch.inference_mode():
        hrbp.sparsify(net, 0.5, structure=structure, method=method)
    net(torch.randn(2, 16, 4, 4)).sum().backward()
    with torch.inference_mode():
        hrbp.densify(net)
    net(torch.randn(2, 16, 4, 4)).sum().backward()
    with torch.inference_mode():  # a model that cannot be trained itself
        net.double()
        hrbp.sparsify(net, 0.5, structure=structure, method=method)
        layer = sparse_layers(net)["1"]
        if method not in ("ste", "sr-ste"):
            layer.set(record_of(net).structure.choose(torch.rand(layer.shape), 0.75))
        net.load_state_dict(copy.deepcopy(net).state_dict())
        hrbp.densify(net)


# ---------------------------------------------------------------- optimizers that are not told


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_optimizer_that_was_not_told_says_so(name):
    kind, options = ELEMENTWISE[name]
    values, give, _, change, module = blocks(pattern(0.5))
    optimizer = kind([values], lr=0.05, **options)
    give(torch.randn(SHAPE, dtype=torch.float64))
    optimizer.step()
    assert not module.set_pattern(pattern(0.8))
    give(torch.randn(SHAPE, dtype=torch.float64))
    if name == "sgd":  # it keeps nothing
        optimizer.step()
        return
    before = values.detach().clone()
    message = r"step\(\): '\w+' has shape \(36, 4, 3\); the parameter needs \(58, 4, 3\) .* make a new optimizer"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(values, before)
    with pytest.raises(
        ValueError, match=r"keeps '\w+', a Tensor of shape \(36, 4, 3\), for a parameter of shape \(58,"
    ):
        change(pattern(0.5), optimizer)
    fresh = kind([values], lr=0.05, **options)
    for _ in range(2):
        fresh.step()
    assert not torch.equal(values, before)
    optimizer.load_state_dict(fresh.state_dict())
    optimizer.step()


def test_state_of_one_block_is_not_taken_for_that_of_many():
    values, give, _, _, module = blocks(pattern(1 / 72))
    optimizer = torch.optim.AdamW([values], fused=True)
    give(torch.ones(SHAPE, dtype=torch.float64))
    optimizer.step()
    module.set_pattern(pattern(0.5))
    give(torch.ones(SHAPE, dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match=r"AdamW\.step\(\): 'exp_avg' has shape \(1, 4, 3\); the parameter needs \(36, 4"
    ):
        optimizer.step()


def test_other_ways_to_another_number_of_blocks():
    """A checkpoint with another pattern, Adafactor's factors, an LBFGS."""
    values, give, _, _, module = blocks(pattern(0.5))
    for kind, has in (
        (torch.optim.Adafactor, r"'row_var' has shape \(36, 4, 1\)"),
        (torch.optim.LBFGS, "'d' has shape"),
    ):
        module.set_pattern(pattern(0.5))
        optimizer = kind(module.parameters())

        def step(optimizer=optimizer):
            def closure():
                module.bias.grad = torch.ones_like(module.bias)
                give(torch.ones(SHAPE, dtype=torch.float64))
                return torch.ones(())

            closure()
            return optimizer.step(closure)

        step()
        module.load_state_dict(bs.BSRConv2d(pattern(0.8), dtype=torch.float64).state_dict())
        with pytest.raises(RuntimeError, match=rf"{kind.__name__}\.step\(\): {has}"):
            step()
        assert values.shape[0] == 58
        step(kind(module.parameters()))


def test_the_look_at_optimizers_ends_with_the_parameter():
    carry._untold.clear()  # what other tests may have left
    other = nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    optimizer = torch.optim.SGD([other], lr=0.1, momentum=0.9)
    optimizer.step()
    assert not _global_optimizer_pre_hooks
    module = bs.BSRConv2d(pattern(0.5))
    told = torch.optim.SGD(module.parameters(), lr=0.1)
    module.set_pattern(pattern(0.8), told)
    module.set_pattern(pattern(0.8, seed=1))
    assert not _global_optimizer_pre_hooks
    module.set_pattern(pattern(0.5))
    assert len(_global_optimizer_pre_hooks) == 1
    optimizer.step()
    assert len(_global_optimizer_pre_hooks) == 1
    del module, told
    gc.collect()
    optimizer.step()
    assert not _global_optimizer_pre_hooks


def test_the_look_at_optimizers_ends_with_one_that_fits():
    carry._untold.clear()
    module = bs.BSRConv2d(pattern(0.5))
    module.set_pattern(pattern(0.8))
    optimizer = torch.optim.Adam(module.parameters())
    for steps in range(1, 4):
        module(torch.randn(1, SHAPE[1], 4, 4)).sum().backward()
        optimizer.step()
        assert len(_global_optimizer_pre_hooks) == (steps == 1)


# ---------------------------------------------------------------- state that is spread over ranks

RANK = """if True:
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.optim import ZeroRedundancyOptimizer

    import blocksparse as bs

    rank, rendezvous = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)

    def pattern(density):
        return bs.BSRPattern.random((8, 12, 3, 3), (4, 3), density, generator)

    def layers(first):
        made = [bs.BSRConv2d(first, bias=False, dtype=torch.float64) for _ in range(2)]
        for layer in made:
            with torch.no_grad():
                layer.values.copy_(torch.randn(layer.values.shape, generator=generator, dtype=torch.float64))
        return made

    def train(views, densities):
        first = pattern(densities[0])
        ours = layers(first)
        twins = [bs.BSRConv2d(first, bias=False, dtype=torch.float64) for _ in range(2)]
        for a, b in zip(ours, twins):
            b.load_state_dict(a.state_dict())
        parameters = [layer.values for layer in ours]
        optimizer = ZeroRedundancyOptimizer(
            parameters, torch.optim.Adam, lr=0.1, parameters_as_bucket_view=views
        )
        plain = torch.optim.Adam([layer.values for layer in twins], lr=0.1)
        for density in densities[1:]:
            for _ in range(2):
                for a, b in zip(ours, twins):
                    a.values.grad = torch.randn(a.values.shape, generator=generator, dtype=torch.float64)
                    b.values.grad = a.values.grad.clone()
                optimizer.step()
                plain.step()
            held = [p in optimizer.optim.state for p in parameters]
            assert held == [rank == 0, rank == 1] or held == [rank == 1, rank == 0], held
            for a, b in zip(ours, twins):
                new = pattern(density)
                a.set_pattern(new, optimizer)
                b.set_pattern(new, plain)
                assert torch.equal(a.values, b.values)
        return ours, optimizer

    train(False, [0.5, 0.5, 0.5, 0.5])
    train(False, [0.5, 0.8, 0.4, 0.5])
    ours, optimizer = train(True, [0.5, 0.5, 0.5, 0.5])
    before = ours[0].state_dict()["values"].clone()
    try:
        ours[0].set_pattern(pattern(0.8), optimizer)
        raise SystemExit("another number of blocks in a bucket was taken")
    except ValueError as error:
        assert "has values (36, 4, 3) in a bucket, where (58, 4, 3) have no room" in str(error), error
    assert torch.equal(ours[0].values, before)
    overlapping = ZeroRedundancyOptimizer([ours[0].values], torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    try:
        ours[0].set_pattern(pattern(0.5), overlapping)
        raise SystemExit("an optimizer that keeps its state in DDP's buckets was taken")
    except ValueError as error:
        assert "make it without overlap_with_ddp" in str(error), error
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_state_that_is_sharded_over_ranks_moves_on_the_rank_that_holds_it(tmp_path):
    root = Path(bs.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    ranks = [
        processes.Process([*command, str(rank), str(tmp_path / "rendezvous")], env=environment) for rank in range(2)
    ]
    ended = [rank.finish() for rank in ranks]
    assert [rank.returncode for rank in ended] == [0, 0], "\n".join(rank.stderr for rank in ended)
