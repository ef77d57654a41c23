"""BSRConv2d and BSRLinear: dense and back, changing masks, checkpoints, moves, what they own."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune

import blocksparse as bs
import processes
from strategies import patterns

SHAPE, BLOCK = (8, 12, 3, 3), (4, 3)


def random_pattern(density=0.4, shape=SHAPE, blocksize=BLOCK):
    return bs.BSRPattern.random(shape, blocksize, density)


def trained(module, optimizer_class=torch.optim.SGD, steps=2, **options):
    optimizer = optimizer_class(module.parameters(), lr=0.1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(2, SHAPE[1], 6, 5)).square().mean().backward()
        optimizer.step()
    return optimizer


def padded(pattern):
    return bs.BSRConv2d(pattern, padding=1)


# ---------------------------------------------------------------- dense and back


@given(patterns(), st.booleans(), st.booleans())
@settings(max_examples=40)
def test_from_dense_and_to_dense(pattern, bias, train):
    k, c, r, s = pattern.shape
    dense = nn.Conv2d(c, k, (r, s), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=bias).train(train)
    module = bs.BSRConv2d.from_dense(dense, pattern)
    assert module.pattern == pattern
    assert module.training == train
    back = module.to_dense()
    assert torch.equal(back.weight, dense.weight * pattern.to_mask())
    x = torch.randn(2, c, 9, 9)
    torch.testing.assert_close(module(x), back(x), rtol=1e-4, atol=1e-4)
    assert (back.stride, back.padding, back.dilation) == (dense.stride, dense.padding, dense.dilation)
    assert (back.bias is None) == (not bias)


def test_from_dense_keeps_dtype_and_frozen_parameters():
    dense = nn.Conv2d(12, 8, 3, dtype=torch.bfloat16)
    dense.weight.requires_grad_(False)
    module = bs.BSRConv2d.from_dense(dense, random_pattern())
    assert module.values.dtype == module.bias.dtype == torch.bfloat16
    assert not module.values.requires_grad
    assert module.bias.requires_grad
    assert not module.to_dense().weight.requires_grad


def test_linear_from_dense_and_back():
    dense = nn.Linear(12, 8)
    pattern = random_pattern(shape=(8, 12, 1, 1))
    module = bs.BSRLinear.from_dense(dense, pattern)
    x = torch.randn(4, 5, 12)
    needed = F.linear(x, dense.weight * pattern.to_mask()[:, :, 0, 0], dense.bias)
    torch.testing.assert_close(module(x), needed)
    torch.testing.assert_close(module.to_dense()(x), needed)


def test_same_padding_where_it_is_symmetric():
    pattern = bs.BSRPattern.full((4, 4, 3, 5), (2, 2))
    dense = nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(2, 1))
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(bs.BSRConv2d.from_dense(dense, pattern)(x), dense(x))
    assert bs.BSRConv2d.from_dense(nn.Conv2d(4, 4, (3, 5), padding="valid"), pattern).padding == (0, 0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: nn.Conv2d(4, 4, 2, padding="same"),
            ValueError,
            "padding 'same' of kernel .* is not symmetric",
        ),
        (lambda: nn.Conv2d(4, 4, 2, groups=2), ValueError, r"shape \(4, 4, 2, 2\); conv needs \(4, 2, 2, 2\), that of"),
        (lambda: nn.Conv2d(4, 4, 2, padding_mode="reflect"), ValueError, "padding_mode='reflect'"),
        (lambda: nn.ConvTranspose2d(4, 4, 2), TypeError, "conv is ConvTranspose2d; it needs an nn.Conv2d"),
        (lambda: nn.Conv2d(8, 4, 2), ValueError, r"pattern has shape \(4, 4, 2, 2\); conv needs \(4, 8, 2, 2\)"),
    ],
)
def test_from_dense_refuses(build, error, message):
    with pytest.raises(error, match=message):
        bs.BSRConv2d.from_dense(build(), bs.BSRPattern.full((4, 4, 2, 2), (2, 2)))


def test_memory_is_the_stored_blocks():
    pattern = bs.BSRPattern.random((256, 256, 3, 3), (32, 32), 0.1)
    module = bs.BSRConv2d(pattern, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(1, 256, 4, 4)).sum().backward()
    optimizer.step()
    stored = pattern.nnzb * 32 * 32
    assert sum(p.numel() for p in module.parameters()) == stored
    assert module.values.grad.numel() == stored
    moments = [t for t in optimizer.state[module.values].values() if t.dim()]
    assert sum(t.numel() for t in moments) == 2 * stored


def test_initial_variance_is_that_of_the_dense_layer():
    torch.manual_seed(0)
    pattern = bs.BSRPattern.random((256, 256, 3, 3), (8, 8), 0.1)
    x = torch.randn(2, 256, 8, 8)
    sparse = bs.BSRConv2d(pattern, bias=False)(x).std()
    dense = nn.Conv2d(256, 256, 3, bias=False)(x).std()
    assert 0.8 < float(sparse.detach() / dense.detach()) < 1.25


# ---------------------------------------------------------------- a new pattern


@given(patterns(), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40)
def test_set_pattern_carries_values_gradient_and_momentum(old, seed, same_nnzb):
    generator = torch.Generator().manual_seed(seed)
    density = old.density if same_nnzb else float(torch.rand((), generator=generator))
    new = bs.BSRPattern.random(old.shape, old.blocksize, density, generator)
    module = bs.BSRConv2d(old, padding=4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(2, old.shape[1], 5, 5)).square().sum().backward()
    optimizer.step()

    def snapshot():
        state = optimizer.state[module.values]
        tensors = (module.values.detach(), module.values.grad, state["exp_avg"], state["exp_avg_sq"])
        return [module.pattern.to_dense(t) for t in tensors]

    before, parameter = snapshot(), module.values
    pointers = (module.values.data_ptr(), module.index.data_ptr(), module.values.grad.data_ptr())
    in_place = module.set_pattern(new, optimizer)
    assert module.pattern == new
    assert module.values is parameter
    for was, now in zip(before, snapshot(), strict=True):
        assert torch.equal(now, was * new.to_mask())
    assert in_place == (old.nnzb == new.nnzb and old.row_order is None)
    if in_place and new.nnzb:
        assert pointers == (module.values.data_ptr(), module.index.data_ptr(), module.values.grad.data_ptr())
    module(torch.randn(2, old.shape[1], 5, 5)).square().sum().backward()
    optimizer.step()
    assert torch.isfinite(module.values).all()


def test_a_mask_that_changes_every_step_trains_like_masked_dense():
    """SGD with momentum over a moving mask: block for block what a masked dense layer computes."""
    torch.manual_seed(1)
    module = padded(random_pattern())
    dense = module.to_dense()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    reference = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        x = torch.randn(2, SHAPE[1], 6, 6)
        mask = module.pattern.to_mask()
        optimizer.zero_grad()
        reference.zero_grad()
        module(x).square().mean().backward()
        dense(x).square().mean().backward()
        dense.weight.grad *= mask
        optimizer.step()
        reference.step()
        torch.testing.assert_close(module.to_dense().weight, dense.weight, rtol=1e-4, atol=1e-5)
        module.set_pattern(random_pattern(), optimizer)
        mask = module.pattern.to_mask()
        with torch.no_grad():
            dense.weight *= mask
            reference.state[dense.weight]["momentum_buffer"] *= mask


def test_set_pattern_survives_a_graph_that_is_still_alive():
    module = padded(random_pattern(0.3))
    x = torch.randn(1, 12, 5, 5)
    loss = module(x).sum()
    loss.backward()
    assert module.set_pattern(random_pattern(0.6)) is False
    module(x).sum().backward()
    assert module.values.grad.shape == module.values.shape
    assert loss is not None


def test_set_pattern_refuses_before_anything_changes():
    module = padded(random_pattern())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"set_pattern\(\): the pattern has shape .* this module needs"):
        module.set_pattern(bs.BSRPattern.full((8, 12, 1, 1), BLOCK))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="the optimizer does not update this parameter"):
        module.set_pattern(random_pattern(), other)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_set_pattern_may_change_blocksize_and_row_order():
    module = padded(random_pattern())
    before = module.to_dense().weight
    mask = module.pattern.to_mask()
    order = torch.randperm(8)
    module.set_pattern(bs.BSRPattern.from_mask(mask, (2, 1), order))
    assert module.values.shape[1:] == (2, 1)
    assert torch.equal(module.to_dense().weight, before)


def test_a_module_owns_its_index():
    pattern = random_pattern()
    twin = copy.deepcopy(random_pattern())
    first, second = padded(pattern), padded(pattern)
    first.set_pattern(twin)
    assert second.pattern == pattern
    first.pattern.indices.zero_()
    assert first.pattern == twin
    clone = copy.deepcopy(first)
    clone.set_pattern(pattern)
    assert first.pattern == twin
    assert not torch.equal(clone.index, first.index)


def test_set_pattern_in_inference_mode_leaves_modules_that_train():
    x = torch.randn(2, 12, 5, 5)
    for density in (0.4, 0.7):  # in place, and with other tensors
        module = padded(random_pattern())
        optimizer = trained(module, momentum=0.9)
        with torch.inference_mode():
            module.set_pattern(random_pattern(density), optimizer)
            assert torch.is_inference_mode_enabled()
        state = optimizer.state[module.values]["momentum_buffer"]
        assert not any(t.is_inference() for t in (module.values, module.values.grad, module.index, state))
        module(x).square().mean().backward()
        optimizer.step()


def test_modules_made_or_loaded_in_inference_mode_train():
    pattern, dense, fine = random_pattern(), nn.Conv2d(12, 8, 3), random_pattern(0.8)
    flat = bs.BSRPattern.random((8, 12, 1, 1), BLOCK, 0.5)
    loaded = padded(pattern)
    with torch.inference_mode():
        loaded.load_state_dict(padded(fine).state_dict())
        conv = bs.BSRConv2d.from_dense(dense, bs.BSRPattern.from_mask(fine.to_mask(), BLOCK))
        modules = [loaded, padded(random_pattern()), conv, conv.to_dense()]
        linear = bs.BSRLinear(flat)
        modules += [linear, linear.to_dense()]
    for module in modules:
        wide = isinstance(module, bs.BSRLinear | nn.Linear)
        module(torch.randn(2, 12) if wide else torch.randn(2, 12, 5, 5)).sum().backward()
        assert all(p.grad is not None and not p.is_inference() for p in module.parameters())


def test_a_module_that_was_moved_in_inference_mode_still_takes_a_pattern_there():
    module = padded(random_pattern())
    with torch.inference_mode():
        module.double()
        assert module.values.is_inference()
        new = random_pattern(0.8)
        module.set_pattern(new)
    assert module.pattern == new
    copy.deepcopy(module)(torch.randn(1, 12, 5, 5, dtype=torch.float64)).sum().backward()


def test_set_pattern_on_the_meta_device():
    module = bs.BSRConv2d(random_pattern(), padding=1, device="meta")
    for new in (random_pattern(), random_pattern(0.8)):
        module.set_pattern(new)
        assert module.pattern == new
        assert module.values.is_meta
        assert module.values.shape[0] == new.nnzb


@pytest.mark.parametrize("tie", ["parameter", "memory"])
def test_values_of_two_modules_do_not_move(tie):
    """One index would follow, the other would not."""
    pattern, new = random_pattern(), random_pattern()
    first, second = padded(pattern), padded(pattern)
    second.values = first.values if tie == "parameter" else nn.Parameter(first.values.detach())
    pair = copy.deepcopy(nn.Sequential(first, second))
    for module in (first, second, *(pair if tie == "parameter" else ())):
        before = {name: t.clone() for name, t in module.state_dict().items()}
        for other in (new, random_pattern(0.7)):
            with pytest.raises(ValueError, match=r"set_pattern\(\): another BSRConv2d has the same values, and would"):
                module.set_pattern(other)
            with pytest.raises(RuntimeError, match="another BSRConv2d has the same values"):
                module.load_state_dict(padded(other).state_dict())
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        assert module.set_pattern(pattern)  # nothing moves
    pair.load_state_dict(nn.Sequential(first, second).state_dict())
    first.values = nn.Parameter(first.values.detach().clone())
    assert first.set_pattern(new)
    assert second.pattern == pattern


def test_modules_that_are_one_change_together():
    module = padded(random_pattern())
    model = nn.ModuleDict({"here": module, "there": module, "shallow": copy.copy(module)})
    new = random_pattern(0.7)
    module.set_pattern(new)
    assert all(part.pattern == new and part.values is module.values for part in model.values())


def test_values_that_are_computed_do_not_move():
    module = padded(random_pattern())
    prune.l1_unstructured(module, "values", 0.5)
    with pytest.raises(ValueError, match="values is not a parameter of this module but computed from others"):
        module.set_pattern(random_pattern())


# ---------------------------------------------------------------- memory that processes share

CHILD = """if True:
    import sys

    import torch
    import torch.multiprocessing as mp
    from torch import nn

    import blocksparse as bs

    def pattern(seed, density=0.4):
        return bs.BSRPattern.random((8, 12, 3, 3), (4, 3), density, torch.Generator().manual_seed(seed))

    def child(model, ready, moved, done, x):
        before = model(x)
        ready.set()
        assert moved.wait(60)
        assert model[0].pattern == pattern(1)
        y = model[0].to_dense()(x)
        assert not torch.equal(before, y)
        torch.testing.assert_close(model(x), y)
        done.set()

    if __name__ == "__main__":
        torch.set_num_threads(1)
        context = mp.get_context(sys.argv[1])
        model = nn.Sequential(bs.BSRConv2d(pattern(0)))
        model.share_memory()
        assert model[0].index.is_shared()
        ready, moved, done = context.Event(), context.Event(), context.Event()
        arguments = model, ready, moved, done, torch.randn(1, 12, 5, 5)
        process = context.Process(target=child, args=arguments, daemon=True)
        process.start()
        assert ready.wait(60)
        assert model[0].set_pattern(pattern(1))
        moved.set()
        process.join(100)
        assert process.exitcode == 0 and done.is_set()
"""


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_another_process_runs_the_new_pattern(way, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": str(Path(bs.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), way]
    result = processes.run(command, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("density", [0.0, 0.4])
def test_shared_modules_keep_their_number_of_blocks(density):
    pattern, more = random_pattern(density), random_pattern(0.8)
    model = nn.Sequential(padded(pattern)).share_memory()
    module = model[0]
    assert module.index.is_shared()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"set_pattern\(\): the module is in shared memory"):
        module.set_pattern(more)
    with pytest.raises(ValueError, match="in shared memory"):  # as many blocks, and one more table in the index
        module.set_pattern(bs.BSRPattern.from_mask(pattern.to_mask(), BLOCK, [1, 0, 3, 2, 5, 4, 7, 6]))
    with pytest.raises(RuntimeError, match="the module is in shared memory"):
        module.load_state_dict(padded(more).state_dict())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    own = copy.deepcopy(module)
    assert not own.index.is_shared()
    assert not own.set_pattern(more)
    assert module.set_pattern(random_pattern(density))


def test_the_index_is_shared_as_long_as_the_values_are():
    pattern, new = random_pattern(), random_pattern()
    for moved in (
        lambda m: m.double(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ):
        module = padded(pattern).share_memory()
        index = module.index
        moved(module)
        assert not module.index.is_shared()
        module.set_pattern(new)
        assert torch.equal(index, pattern.index)
    for kept in (
        lambda m: m.float(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.requires_grad_(False),
    ):
        module = padded(pattern).share_memory()
        index = module.index
        assert kept(module).index is index
    module = padded(pattern).share_memory()
    index = module.index
    module.load_state_dict(padded(new).state_dict(), assign=True)
    assert module.pattern == new
    assert torch.equal(index, pattern.index)
    assert module.share_memory().index.is_shared()


def test_modules_sent_between_processes_bring_their_index():
    module = padded(random_pattern())
    received = pickle.loads(ForkingPickler.dumps(module))
    new = random_pattern()
    received.set_pattern(new)  # both indices are the same memory: none is left behind
    assert module.pattern == new
    assert torch.equal(received.values, module.values)
    with pytest.raises(ValueError, match="the module is in shared memory"):
        received.set_pattern(random_pattern(0.8))
    buffer = io.BytesIO()
    torch.save(received, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert not loaded.index.is_shared()
    loaded.set_pattern(random_pattern(0.8))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("order", [None, torch.randperm(8)], ids=["identity", "permuted"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.4, 0.9])
def test_state_dict_loads_into_any_pattern(order, assign, density):
    source = padded(bs.BSRPattern.from_mask(torch.rand(SHAPE) < 0.05, BLOCK, order))
    target, bystander = padded(random_pattern(density)), padded(random_pattern(density))
    bystander.load_state_dict(target.state_dict())
    caller, kept = target.pattern, copy.deepcopy(bystander.state_dict())
    frozen = copy.deepcopy(caller)
    loss = target(torch.randn(1, 12, 6, 6)).sum()
    loss.backward()
    assert str(target.load_state_dict(source.state_dict(), assign=assign)) == "<All keys matched successfully>"
    assert target.pattern == source.pattern
    x = torch.randn(2, 12, 6, 6)
    assert torch.equal(target(x), source(x))
    assert caller == frozen
    assert all(torch.equal(t, kept[name]) for name, t in bystander.state_dict().items())
    target(x).sum().backward()
    assert target.values.grad.shape == target.values.shape


def test_a_saved_checkpoint_holds_no_derived_table():
    module = padded(random_pattern())
    assert set(module.state_dict()) == {"values", "bias", "indptr", "indices", "weight_shape"}
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = padded(random_pattern(0.9))
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert loaded.pattern == module.pattern


def test_checkpoints_of_a_whole_model():
    def model(density):
        return nn.Sequential(padded(random_pattern(density)), nn.BatchNorm2d(8), nn.ReLU())

    source, target = model(0.2), model(0.7)
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 12, 5, 5)
    assert torch.equal(source.eval()(x), target.eval()(x))


def corrupt_indices(state):
    state["indices"][0] = 10**6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_indices, r"indices\[0\] is 1000000"),
        (lambda s: s.update(indptr=s["indptr"][:-1]), "indptr has 2 entries"),
        (lambda s: s.update(values=s["values"][1:]), "they must agree"),
        (lambda s: s.update(values=s["values"][:, :, 0]), r"it needs \(nnzb, bk, bc\)"),
        (lambda s: s.pop("indices"), "the checkpoint has no indices"),
        (lambda s: s.pop("values"), "the checkpoint has no values"),
        (lambda s: s.update(indices=s["indices"].float()), "it needs integers"),
        (
            lambda s: s.update({n: t.numpy() for n, t in s.items()}),
            r"values is a numpy\.ndarray; it needs a torch\.Tensor",
        ),
        (lambda s: s.update(values=s["values"].tolist()), r"values is a list; it needs a torch\.Tensor"),
        (lambda s: s.update(values=s["values"].char()), r"values has dtype torch\.int8; it needs floating point"),
        (lambda s: [s.pop(k) for k in ("values", "indptr", "indices")], "Missing key"),
        (lambda s: s.update(surprise=torch.zeros(1)), "Unexpected key"),
    ],
)
def test_a_damaged_checkpoint_changes_nothing(damage, message):
    module = padded(random_pattern(0.4))
    state = padded(random_pattern(0.5)).state_dict()
    state = {name: t.clone() for name, t in state.items()}
    damage(state)
    pattern, values = module.pattern, module.values.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    if "surprise" not in state:  # torch loads what it knows before it reports a key that it does not
        assert module.pattern == pattern
        assert torch.equal(module.values, values)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_shape_changes_nothing(strict):
    """Blocks of (2, 3) with these indices are in both filter banks: the index alone does not tell."""
    small, large = (bs.BSRPattern((8, c, 3, 3), (2, 3), [0, 1, 1, 1, 1], [0]) for c in (12, 24))
    module, state = bs.BSRConv2d(small), bs.BSRConv2d(large).state_dict()
    values = module.values.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"has a weight of shape \(8, 24, 3, 3\), and this BSRConv2d one of \(8, 12, 3, 3\)"
    ):
        module.load_state_dict(state, strict=strict)
    assert module.pattern == small
    assert torch.equal(module.values, values)
    state["weight_shape"] = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"weight_shape has dtype torch.float32; it needs integers"):
        module.load_state_dict(state, strict=strict)


def test_states_with_and_without_the_shape_load():
    pattern = random_pattern(shape=(8, 12, 1, 1))
    conv, linear = bs.BSRConv2d(pattern), bs.BSRLinear(pattern)
    assert conv.state_dict()["weight_shape"].tolist() == [8, 12, 1, 1]
    assert linear.state_dict()["weight_shape"].tolist() == [8, 12, 1, 1]
    conv.load_state_dict(linear.state_dict())  # the same filter bank
    assert torch.equal(conv.values, linear.values)
    old = {key: t for key, t in linear.state_dict().items() if key != "weight_shape"}
    other = bs.BSRLinear(random_pattern(0.9, shape=(8, 12, 1, 1)))
    other.load_state_dict(old)
    assert other.pattern == pattern
    assert all(t.dtype in (torch.float32, torch.int32) for t in linear.state_dict().values())  # tensors alone


def test_a_dense_checkpoint_is_told_what_to_do():
    def saved(bias):
        return nn.Conv2d(12, 8, 3, bias=bias).state_dict()

    pattern = random_pattern()
    for strict in (True, False):
        module = nn.Sequential(padded(pattern))
        before = {name: t.clone() for name, t in module.state_dict().items()}
        with pytest.raises(
            RuntimeError, match=r"0\.weight is a dense layer's, \(8, 12, 3, 3\); this BSRConv2d stores"
        ) as e:
            module.load_state_dict({f"0.{n}": t for n, t in saved(True).items()}, strict=strict)
        assert "BSRConv2d.from_dense(layer, pattern)" in str(e.value)
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    # The remedy.
    module, dense = padded(pattern), saved(True)
    values = module.pattern.values_from_dense(dense.pop("weight"))
    module.load_state_dict({**dense, "values": values, "indptr": pattern.indptr, "indices": pattern.indices})
    assert torch.equal(module.values, values)
    with pytest.raises(RuntimeError, match=r"weight is a dense layer's, \(8, 12\); this BSRLinear stores blocks"):
        bs.BSRLinear(random_pattern(shape=(8, 12, 1, 1))).load_state_dict(nn.Linear(12, 8).state_dict())


# ---------------------------------------------------------------- moves


def test_half_and_to_leave_the_index_alone():
    module = padded(random_pattern())
    pattern = module.pattern
    module.half()
    assert module.values.dtype == torch.float16
    assert module.index.dtype == torch.int32
    assert module.pattern == pattern
    assert module.to(torch.float64)(torch.randn(1, 12, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_the_meta_device_never_leaves_an_index_unset():
    pattern = random_pattern()
    for module in (bs.BSRConv2d(pattern, device="meta"), padded(pattern).to("meta")):
        assert module.values.is_meta
        assert module(torch.empty(2, 12, 5, 5, device="meta")).shape[:2] == (2, 8)
        module.to_empty(device="cpu")
        assert module.pattern == pattern
    source = padded(pattern)
    target = bs.BSRConv2d(random_pattern(0.9), padding=1, device="meta")
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, 12, 5, 5)
    assert torch.equal(target(x), source(x))


def test_pickle_and_deepcopy_of_a_module():
    module = padded(random_pattern())
    x = torch.randn(1, 12, 5, 5)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x), module(x))
        assert twin.values.data_ptr() != module.values.data_ptr()


def test_functional_call_and_compile_follow_a_new_pattern():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = padded(random_pattern())
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(2, 12, 5, 5)
    for _ in range(3):
        y = compiled(x)
        torch.testing.assert_close(y, module.to_dense()(x), rtol=1e-4, atol=1e-4)
        module.zero_grad()
        y.square().sum().backward()
        assert module.set_pattern(random_pattern())
    assert counter.frame_count == 1
    doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(module, doubled, (x,)), 2 * module(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bs.BSRConv2d(32, 64, 3), r"BSRConv2d\(\): pattern is int 32; .* BSRConv2d\.from_dense\(layer"),
        (lambda: bs.BSRLinear(32, 64), r"BSRLinear\(\): pattern is int 32; .* BSRLinear\.from_dense\(layer"),
        (lambda: bs.BSRConv2d(torch.ones(SHAPE) > 0), r"a tensor of torch\.bool; .* BSRPattern\.from_mask\(mask"),
        (lambda: bs.BSRConv2d.from_dense(nn.Conv2d(12, 8, 3), 0.1), r"from_dense\(\): pattern is float 0\.1"),
        (lambda: bs.BSRLinear.from_dense(nn.Linear(12, 8), None), r"from_dense\(\): pattern is NoneType None"),
        (lambda: padded(random_pattern()).set_pattern(torch.ones(SHAPE) > 0), r"set_pattern\(\): pattern is a ten"),
    ],
)
def test_what_is_no_pattern_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_forward_takes_input_by_name():
    conv, linear = padded(random_pattern()), bs.BSRLinear(random_pattern(shape=(8, 12, 1, 1)))
    x, flat = torch.randn(2, 12, 5, 5), torch.randn(2, 12)
    assert torch.equal(conv(input=x), conv(x))
    assert torch.equal(linear(input=flat), linear(flat))


def test_repr():
    text = repr(bs.BSRConv2d(bs.BSRPattern.full(SHAPE, BLOCK), stride=2, bias=False, backend="torch"))
    assert text == (
        "BSRConv2d(12, 8, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0), dilation=(1, 1), blocksize=(4, 3),"
        " nnzb=72, density=1, bias=False, backend='torch')"
    )


def test_ranks_exchange_stored_blocks_only(tmp_path):
    """DistributedDataParallel on one gloo rank: gradients and buffers go through its buckets and stay right."""
    from hrbp.training.devices import process_group

    meeting = f"file://{tmp_path}/rendezvous"
    with process_group("gloo", init_method=meeting, rank=0, world_size=1, timeout=timedelta(minutes=5)):
        module = padded(random_pattern())
        twin = copy.deepcopy(module)
        parallel = nn.parallel.DistributedDataParallel(module)
        x = torch.randn(2, 12, 5, 5)
        for _ in range(2):
            parallel.zero_grad()
            twin.zero_grad()
            parallel(x).square().sum().backward()
            twin(x).square().sum().backward()
            assert torch.equal(module.values.grad, twin.values.grad)
            new = random_pattern()
            assert module.set_pattern(new)
            assert twin.set_pattern(new)
