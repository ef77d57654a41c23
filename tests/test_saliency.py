"""saliency: each method against a derivation of its own, and the model exactly as it was."""

from __future__ import annotations

import copy
import hashlib
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hrbp.density import densities
from hrbp.saliencies import SALIENCIES, saliency

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20)
GRADIENT_METHODS = ("snip", "grasp", "synflow", "magnitude+gradient")
NAMES = ["0", "2", "5"]


def small_net(seed, dtype=torch.float64):
    """conv - tanh - conv - ReLU - linear: 2 x 5 x 5 images, 3 classes, 140 weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(18, 3)
        ).to(dtype)


def small_batch(seed, size=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 2, 5, 5, generator=generator, dtype=dtype)
    return inputs, torch.randint(3, (size,), generator=generator)


def loss_at(model, batch, changed, temperature=1.0):
    return cross_entropy(functional_call(model, changed, (batch[0],)) / temperature, batch[1])


def slopes(model, batch, name, step=1e-6):
    """dL/dw by central differences, one weight at a time."""
    weight = model.get_submodule(name).weight.detach()
    slope = torch.zeros_like(weight)
    for i in range(weight.numel()):
        ends = []
        for sign in (1, -1):
            moved = weight.clone()
            moved.view(-1)[i] += sign * step
            ends.append(loss_at(model, batch, {f"{name}.weight": moved}))
        slope.view(-1)[i] = (ends[0] - ends[1]).item() / (2 * step)
    return slope


# ------------------------------------------------------------------ what the methods compute


def test_random_is_uniform_and_follows_the_seed():
    model = nn.Sequential(nn.Linear(100, 50), nn.Conv2d(20, 30, 3))
    first = saliency(model, ["0", "1"], seed=7)
    again = saliency(model, ["0", "1"], "random", seed=7)
    other = saliency(model, ["0", "1"], seed=8)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert first[name].shape == model.get_submodule(name).weight.shape
        deciles = torch.histc(first[name], 10, 0, 1) / first[name].numel()
        assert (deciles - 0.1).abs().max() < 0.02
    assert not torch.equal(first["0"].flatten()[:900], first["1"].flatten()[:900])


@few
@given(seeds)
def test_magnitude(seed):
    model = small_net(seed)
    scores = saliency(model, NAMES, "magnitude")
    assert list(scores) == NAMES
    for name, score in scores.items():
        assert torch.equal(score, model.get_submodule(name).weight.abs())
        assert not score.requires_grad


@settings(max_examples=8)
@given(seeds)
def test_gradient_scores_by_finite_differences(seed):
    model, batch = small_net(seed), small_batch(seed + 1)
    snip = saliency(model, NAMES, "snip", batch=batch)
    both = saliency(model, NAMES, "magnitude+gradient", batch=batch)
    for name in NAMES:
        size, slope = model.get_submodule(name).weight.detach().abs(), slopes(model, batch, name).abs()
        torch.testing.assert_close(snip[name], size * slope, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(both[name], size / size.mean() + slope / slope.mean(), rtol=1e-5, atol=1e-6)


@few
@given(seeds)
def test_snip_of_a_linear_network_by_hand(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    x, t = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (4, 2))
    scores = saliency(model, ["0", "1"], "snip", batch=(x, t), loss=nn.MSELoss())
    w1, w2 = model[0].weight.detach(), model[1].weight.detach()
    r = (x @ w1.T @ w2.T - t) * 2 / t.numel()
    torch.testing.assert_close(scores["0"], (w1 * ((r @ w2).T @ x)).abs())
    torch.testing.assert_close(scores["1"], (w2 * (r.T @ (x @ w1.T))).abs())


def explicit_hessian(model, batch, names, temperature):
    """H and g over the weights of `names`, flattened one after the other, and the weights."""
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in names}
    model = copy.deepcopy(model).requires_grad_(False)
    flat = torch.cat([w.flatten() for w in weights.values()])
    sizes = [w.numel() for w in weights.values()]

    def loss(flat):
        parts = zip(weights, flat.split(sizes), strict=True)
        return loss_at(model, batch, {key: part.view_as(weights[key]) for key, part in parts}, temperature)

    return hessian(loss, flat), torch.autograd.functional.jacobian(loss, flat), flat, sizes


@settings(max_examples=8)
@given(seeds, st.sampled_from([["0"], ["5", "0"], NAMES]))
def test_grasp_is_the_hessian_gradient_product(seed, names):
    model, batch = small_net(seed), small_batch(seed + 1)
    h, g, w, sizes = explicit_hessian(model, batch, names, 200.0)
    s = -w * (h @ g)
    scores = saliency(model, names, "grasp", batch=batch)
    assert list(scores) == names
    scale = s.abs().max()
    for name, expected in zip(names, (s.max() - s).split(sizes), strict=True):
        assert scores[name].min() >= 0
        torch.testing.assert_close(scores[name].flatten() / scale, expected / scale, rtol=1e-9, atol=1e-9)
    plain = saliency(model, names, "grasp", batch=batch, loss=cross_entropy)
    h, g, w, sizes = explicit_hessian(model, batch, names, 1.0)
    s = -w * (h @ g)
    for name, expected in zip(names, (s.max() - s).split(sizes), strict=True):
        torch.testing.assert_close(plain[name].flatten(), expected, rtol=1e-9, atol=1e-9 * float(s.abs().max()))


def test_grasp_is_what_removing_a_weight_does_to_the_gradient():
    """S is half the rate at which |g|^2 grows as a weight shrinks to zero: high S goes first."""
    model, batch = small_net(3), small_batch(4)
    scores = saliency(model, ["2"], "grasp", batch=batch, loss=cross_entropy)["2"].flatten()
    weight = model[2].weight.detach()

    def square(w):
        w = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_at(model, batch, {"2.weight": w}), w)
        return float((g * g).sum())

    change = []
    for i in range(weight.numel()):
        shrunk, grown = weight.clone(), weight.clone()
        shrunk.view(-1)[i] *= 1 - 1e-5
        grown.view(-1)[i] *= 1 + 1e-5
        change.append((square(shrunk) - square(grown)) / 4e-5)
    change = torch.tensor(change, dtype=torch.float64)
    torch.testing.assert_close(scores, change.max() - change, rtol=1e-4, atol=1e-7)


def test_grasp_of_a_loss_without_curvature():
    model = nn.Sequential(nn.Linear(4, 3))
    scores = saliency(model, ["0"], "grasp", batch=small_linear_batch(), loss=lambda y, t: y.mean())
    assert torch.equal(scores["0"], torch.zeros(3, 4))


def small_linear_batch():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


@few
@given(seeds)
def test_synflow_is_the_path_product(seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)
        )
    a, b, c = (model[i].weight.detach().double().abs() for i in (0, 2, 4))
    flow = (c @ b @ a).sum()
    expected = {
        "0": a * (c @ b).sum(0)[:, None],
        "2": b * c.sum(0)[:, None] * a.sum(1)[None],
        "4": c * (b @ a).sum(1)[None],
    }
    scores = saliency(model, ["0", "2", "4"], "synflow", batch=(torch.randn(2, 5), None))
    for name, score in scores.items():
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, (expected[name] / flow).float(), rtol=1e-5, atol=0)


def bn_net(seed=0):
    """Convolutions with BatchNorm (statistics as after training), a dropout and a linear layer, partly in eval mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
        for i in (1, 4):
            nn.init.normal_(model[i].running_mean)
            nn.init.uniform_(model[i].running_var, 0.5, 2)
            nn.init.normal_(model[i].weight)
            nn.init.normal_(model[i].bias)
    return model


BN_NAMES = ["0", "3", "8"]


def by_definition_synflow(model, shape, names, keep=1.0, rounds=1):
    """Scores of a copy with |.| written into it, pruned by masks; BatchNorm's mean set to zero."""
    model = copy.deepcopy(model).double().eval()
    for parameter in model.parameters():
        parameter.data.abs_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    weights = [model.get_submodule(name).weight for name in names]
    for i in range(rounds):
        model.zero_grad()
        flow = model(torch.ones(1, *shape, dtype=torch.float64)).sum()
        flow.backward()
        scores = [w.grad * w.data / flow.item() for w in weights]
        every = torch.cat([s.flatten() for s in scores])
        best = every.argsort(descending=True)[: round(every.numel() * keep ** ((i + 1) / rounds))]
        mask = torch.zeros(every.numel()).index_fill(0, best, 1.0).split([w.numel() for w in weights])
        for w, m in zip(weights, mask, strict=True):
            w.data.mul_(m.view_as(w))
    return scores


@few
@given(seeds, st.booleans())
def test_synflow_with_batch_norm_and_biases(seed, training):
    model = bn_net(seed).train(training)
    scores = saliency(model, BN_NAMES, "synflow", batch=(torch.randn(7, 2, 5, 5), None))
    for name, expected in zip(BN_NAMES, by_definition_synflow(model, (2, 5, 5), BN_NAMES), strict=True):
        torch.testing.assert_close(scores[name], expected.float(), rtol=1e-5, atol=0)


@settings(max_examples=5)
@given(seeds, st.sampled_from([0.5, 0.9, 0.98]))
def test_synflow_prunes_in_rounds(seed, sparsity):
    model = bn_net(seed)
    batch = (torch.randn(1, 2, 5, 5), None)
    scores = saliency(model, BN_NAMES, "synflow", batch=batch, sparsity=sparsity)
    expected = by_definition_synflow(model, (2, 5, 5), BN_NAMES, 1 - sparsity, 100)
    for name, score in zip(BN_NAMES, expected, strict=True):
        torch.testing.assert_close(scores[name], score.float(), rtol=1e-5, atol=0)
    left = sum(int((s > 0).sum()) for s in scores.values())
    total = sum(s.numel() for s in scores.values())
    assert left == round(total * (1 - sparsity) ** 0.99)


def test_synflow_in_rounds_empties_no_layer():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        wide = [nn.Linear(20, 200, bias=False), nn.Linear(200, 200, bias=False), nn.Linear(200, 20, bias=False)]
    model, names, batch = nn.Sequential(*wide), ["0", "1", "2"], (torch.ones(1, 20), None)
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    once = saliency(model, names, "synflow", batch=batch)
    rounds = saliency(model, names, "synflow", batch=batch, sparsity=0.998)
    for name in names:  # no biases: the flow through every layer is the same
        assert float(once[name].sum()) == pytest.approx(1, rel=1e-5)
        assert float(rounds[name].sum()) == pytest.approx(1, rel=1e-5)
    assert densities(shapes, 0.998, "global", scores=once)["1"] == 0
    assert min(densities(shapes, 0.998, "global", scores=rounds).values()) > 1e-4


def test_synflow_does_not_overflow():
    layers = [nn.Linear(64, 64, bias=False) for _ in range(40)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1.0)  # R = 64**41 = 1e74
    model = nn.Sequential(*layers)
    scores = saliency(model, ["0", "39"], "synflow", batch=(torch.ones(1, 64), None))
    for score in scores.values():
        torch.testing.assert_close(score, torch.full((64, 64), 1 / 4096))


def test_a_layer_without_gradient_keeps_its_magnitude():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    nn.init.constant_(model[0].bias, -1e3)  # every unit is dead
    scores = saliency(model, ["0"], "magnitude+gradient", batch=small_linear_batch())
    torch.testing.assert_close(scores["0"], model[0].weight.detach().abs() / model[0].weight.detach().abs().mean())


# ------------------------------------------------------------------ batches


@few
@given(seeds, st.sampled_from(["snip", "grasp", "magnitude+gradient"]))
def test_batches_count_by_their_size(seed, method):
    model, (x, t) = small_net(seed), small_batch(seed, 7)
    whole = saliency(model, NAMES, method, batch=(x, t))
    parts = [(x[:1], t[:1]), [x[1:3], t[1:3]], (x[3:], t[3:])]
    for batch in (parts, iter(parts), (pair for pair in parts), [[x, t]], [x, t]):
        for name, score in saliency(model, NAMES, method, batch=batch).items():
            torch.testing.assert_close(score, whole[name], rtol=1e-9, atol=1e-12)


def test_two_pairs_are_not_one():
    model, first, second = small_net(0), small_batch(1), small_batch(2)
    both = saliency(model, NAMES, "snip", batch=[first, second])
    joined = saliency(model, NAMES, "snip", batch=tuple(map(torch.cat, zip(first, second, strict=True))))
    for name in NAMES:
        torch.testing.assert_close(both[name], joined[name])


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_shuffled_loader_follows_the_seed(method):
    model = bn_net()
    loader = DataLoader(TensorDataset(*small_batch(0, 12, torch.float32)), 4, shuffle=True)
    torch.manual_seed(1)
    first = saliency(model, BN_NAMES, method, batch=loader, seed=3)
    torch.manual_seed(2)
    again = saliency(model, BN_NAMES, method, batch=loader, seed=3)
    other = saliency(model, BN_NAMES, method, batch=loader, seed=4)
    for name in BN_NAMES:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (method == "synflow")


def test_dropout_is_the_same_in_both_passes_of_grasp():
    """Else H and g belong to two networks: with them equal, S is a derivative of |g|^2 of one."""
    model = nn.Sequential(small_net(0)[:4], nn.Dropout(0.5), nn.Flatten(), nn.Linear(18, 3)).double()
    batch, names = small_batch(1), ["0.2", "3"]
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        mask = nn.Dropout(0.5)(torch.ones(4, 2, 3, 3, dtype=torch.float64))
    frozen = copy.deepcopy(model)
    frozen[1] = Multiply(mask)
    dropped = saliency(model, names, "grasp", batch=batch, seed=5)
    for name, expected in saliency(frozen, names, "grasp", batch=batch).items():
        torch.testing.assert_close(dropped[name], expected, rtol=1e-9, atol=1e-18)


class Multiply(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


# ------------------------------------------------------------------ the model as it was


def fingerprint(model):
    """Everything that a call might change, storage and the global generator included."""
    state = [(k, v.detach().clone(), v.data_ptr(), v.requires_grad, v.stride()) for k, v in model.named_parameters()]
    state += [(k, v.clone(), v.data_ptr()) for k, v in model.named_buffers()]
    state += [(k, None if v.grad is None else v.grad.clone(), id(v.grad)) for k, v in model.named_parameters()]
    state += [(k, m.training, sorted(m.__dict__)) for k, m in model.named_modules()]
    state += [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    file = io.BytesIO()
    torch.save(state, file)
    return hashlib.sha256(file.getvalue()).hexdigest()


def used_net():
    """bn_net in the middle of training: gradients, a frozen layer, mixed modes."""
    model = bn_net().train()
    model[4].eval()
    cross_entropy(model(torch.randn(4, 2, 5, 5)), torch.arange(4) % 3).backward()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = None
    return model


def failing(kind):
    def loss(outputs, targets):
        if kind == "raises":
            torch.rand(3)
            raise RuntimeError("the loss is not ready")
        return outputs.sum() * torch.nan

    return loss


@pytest.mark.parametrize("method", SALIENCIES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_the_model_is_untouched(method, context):
    model = used_net()
    batch = small_batch(0, 6, torch.float32)
    before = fingerprint(model)
    with context():
        saliency(model, BN_NAMES, method, batch=[batch, batch])
    assert fingerprint(model) == before


@pytest.mark.parametrize("method", ["snip", "grasp", "magnitude+gradient"])
@pytest.mark.parametrize(
    ("kind", "error", "message"), [("raises", RuntimeError, "not ready"), ("nan", ValueError, "the loss is nan")]
)
def test_the_model_is_untouched_by_an_error(method, kind, error, message):
    model = used_net()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        saliency(model, BN_NAMES, method, batch=small_batch(0, 6, torch.float32), loss=failing(kind))
    assert fingerprint(model) == before


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_the_model_is_untouched_by_an_error_in_its_forward(method):
    model = nn.Sequential(used_net(), nn.Linear(4, 3))  # 3 outputs, 4 inputs
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        saliency(model, ["0.0"], method, batch=small_batch(0, 6, torch.float32))
    assert fingerprint(model) == before


def test_scores_share_no_memory_with_the_model():
    model = used_net()
    for method in SALIENCIES:
        for name, score in saliency(model, BN_NAMES, method, batch=small_batch(0, 6, torch.float32)).items():
            assert score.data_ptr() != model.get_submodule(name).weight.data_ptr()
            assert not score.requires_grad


# ------------------------------------------------------------------ kinds of models


@pytest.mark.parametrize("method", SALIENCIES)
def test_frozen_weights_and_autocast_change_nothing(method):
    model, batch = small_net(0, torch.float32), small_batch(1, dtype=torch.float32)
    free = saliency(model, NAMES, method, batch=batch)
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        frozen = saliency(model, NAMES, method, batch=batch)
    for name in NAMES:
        assert torch.equal(free[name], frozen[name])


@pytest.mark.parametrize("method", SALIENCIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(method, dtype):
    model, batch = bn_net().to(dtype), small_batch(1, dtype=torch.float32)
    same = copy.deepcopy(model).to(torch.float64 if dtype == torch.float64 else torch.float32)
    scores = saliency(model, BN_NAMES, method, batch=(batch[0].to(torch.bfloat16), batch[1]))
    expected = saliency(same, BN_NAMES, method, batch=(batch[0].to(torch.bfloat16), batch[1]))
    for name in BN_NAMES:
        assert scores[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(scores[name], expected[name])


@pytest.mark.parametrize("method", SALIENCIES)
def test_channels_last(method):
    model, batch = small_net(0), small_batch(1)
    plain = saliency(model, NAMES, method, batch=batch)
    model = model.to(memory_format=torch.channels_last)
    inputs = batch[0].contiguous(memory_format=torch.channels_last)
    for name, score in saliency(model, NAMES, method, batch=(inputs, batch[1])).items():
        torch.testing.assert_close(score, plain[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", ["magnitude", *GRADIENT_METHODS])
def test_shared_weights_have_one_score(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].weight = model[0].weight
    inputs, targets = small_linear_batch()
    scores = saliency(model, ["2", "0", "4"], method, batch=(inputs, targets))
    assert list(scores) == ["2", "0", "4"]
    assert torch.equal(scores["0"], scores["2"])
    if method == "snip":
        slope = slopes(model, (inputs.double(), targets), "0")  # functional_call moves both uses
        torch.testing.assert_close(scores["0"], (model[0].weight * slope).abs().detach(), rtol=1e-5, atol=1e-9)


def test_one_module_under_two_names_and_the_model_itself():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    assert list(saliency(model, ["0", "1"], "magnitude")) == ["0", "1"]
    assert torch.equal(saliency(layer, [""], "magnitude")[""], layer.weight.abs())


@pytest.mark.gpu
@pytest.mark.parametrize("method", SALIENCIES)
def test_cuda(method):
    model, batch = used_net().double().eval(), small_batch(1)
    expected = saliency(model, BN_NAMES, method, batch=batch)
    model = model.cuda()
    before = fingerprint(model)
    scores = saliency(model, BN_NAMES, method, batch=batch)
    assert fingerprint(model) == before
    for name, score in scores.items():
        assert score.is_cuda
        torch.testing.assert_close(score.cpu(), expected[name], rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------ refused

BATCH = small_batch(0)


class Aside(nn.Module):
    """A network with a layer that its forward does not use."""

    def __init__(self):
        super().__init__()
        self.main, self.unused = small_net(0), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.main(x)


def score(method="snip", names=NAMES, model=None, batch=BATCH, **options):
    return saliency(small_net(0) if model is None else model, names, method, batch=batch, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score("taylor"), r"saliency\(\): method is 'taylor'; it needs one of 'random', 'magnitude', 'snip'"),
        (lambda: score(names=[]), r"names is \[\]; it needs a list of at least one"),
        (lambda: score(names="0"), "names is '0'; it needs a list"),
        (lambda: score(names=["main.7"], model=Aside()), "the model has no module 'main.7'; near it: 'main"),
        (lambda: score(names=["1"]), "module '1' is a Tanh without a floating-point parameter 'weight'"),
        (lambda: score(batch=None), "method 'snip' needs batch"),
        (lambda: score("synflow", batch=None), "method 'synflow' needs batch"),
        (lambda: score(batch=[]), "batch is empty"),
        (lambda: score(batch=BATCH[0]), r"batch gives a Tensor; it needs pairs \(inputs, targets\)"),
        (lambda: score("synflow", sparsity=1.0), r"sparsity is 1.0; it needs a number in \[0, 1\)"),
        (lambda: score(loss=lambda y, t: y), r"the loss has shape \(4, 3\); it needs one number"),
        (lambda: score(loss=lambda y, t: 1.0), "the loss has type float"),
        (lambda: score(loss=lambda y, t: y.sum() / 0), "the loss is (-?inf|nan)"),
        (lambda: score(loss=lambda y, t: y.detach().sum()), "the outputs do not depend on the weight of '0'"),
        (lambda: score(model=Aside(), names=["main.0", "unused"]), "do not depend on the weight of 'unused'"),
        (lambda: score("grasp", model=Aside(), names=["unused"]), "do not depend on the weight of 'unused'"),
        (lambda: score("synflow", model=Aside(), names=["unused"]), "do not depend on the weight of 'unused'"),
        (lambda: score("synflow", batch=(None, None)), "inputs is a NoneType; 'synflow' needs a tensor"),
        (lambda: score("synflow", model=zeroed()), "the outputs sum to 0.0; 'synflow' needs a positive"),
        (lambda: score("magnitude", model=zeroed(torch.nan)), "the score of '5' holds NaN or infinity"),
        (lambda: score(model=nn.Sequential(small_net(0), Twice()), names=["0.0"]), "the model returns a tuple; cross"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Twice(nn.Module):
    def forward(self, x):
        return x, x


def zeroed(value=0.0):
    model = small_net(0)
    nn.init.constant_(model[5].weight, value)
    nn.init.zeros_(model[5].bias)
    return model
