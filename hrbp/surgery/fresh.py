"""Tell trained weights from freshly initialised ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Those of torch.nn.init: of nn.Conv2d and nn.Linear themselves (leaky ReLU of slope sqrt(5)), linear, ReLU, tanh, leaky
# ReLU of slope 0.1 and 0.2.
GAINS = (math.sqrt(1 / 3), 1.0, math.sqrt(2), 5 / 3, math.sqrt(2 / 1.01), math.sqrt(2 / 1.04))
FIXED = (0.01, 0.02, 0.1)  # standard deviations that networks are drawn with whatever their size
LIMIT = 6.0  # standard errors; a fresh layer passes this once in 10^8 tests or so
TINY = 1e-5  # biases drawn below this are as good as zero
STEPS = 8  # of the power iteration
CELLS, FILTERS = 200_000, 32  # of a layer, evenly spaced filters with about this many weights are looked at, or so many


def trained(model: nn.Module, layers: Mapping[str, Any]) -> str | None:
    """Why these layers look trained, in words; None where they look freshly initialised.

    A model counts as trained where a normalisation has counted batches, or its statistics, weights or biases differ
    between channels; or where a layer's weights are not such as torch.nn.init draws them, with the gains and fans that
    are in use: independent, uniform (then the largest lies at the bound, within 16/n of n weights) or normal (then
    moments, the norm of each filter and each input channel, and the spectral norm are those of a normal matrix), biases
    0 or uniform as PyTorch's. In doubt (another initialiser, a pass in train mode before), a model is called trained.
    """
    for name, module in model.named_modules():
        counted = module._buffers.get("num_batches_tracked")
        if counted is not None and int(counted) > 0:
            return f"{name} has counted {int(counted)} batches"
        own = module._buffers.get("running_mean"), module._buffers.get("running_var")
        if isinstance(module, NORMALISATIONS):
            own += tuple(module._parameters.values())
        if any(t is not None and not _constant(t) for t in own):
            return f"{name} differs between channels"
    for name, layer in layers.items():
        if not _drawn(layer.weight.detach(), layer.bias):
            return f"no initialiser known here draws weights as those of {name}"
    return None


def _constant(t: Tensor) -> bool:
    return bool((t == t.flatten()[:1]).all())


def _drawn(weight: Tensor, bias: Tensor | None) -> bool:
    fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
    slack = max(1e-6, 4 * torch.finfo(weight.dtype).eps)  # of weights that were rounded to another dtype
    if bias is not None and not _bias_drawn(bias.detach().float(), 1 / math.sqrt(fan_in), slack):
        return False
    low, high = map(float, weight.aminmax())
    if not math.isfinite(high - low):
        return False
    stds = [gain / math.sqrt(fan) for gain in GAINS for fan in (fan_in, fan_out, (fan_in + fan_out) / 2)]
    largest, room = max(-low, high), 16 / weight.numel() + slack
    if low == high or any(-room <= largest / (std * math.sqrt(3)) - 1 <= slack for std in stds):
        return True
    some = weight[:: max(1, len(weight) // max(FILTERS, CELLS // fan_in))]
    return _normal(some.float().flatten(1), [*stds, *FIXED], weight.shape[1])


def _normal(w: Tensor, stds: Iterable[float], channels: int) -> bool:
    """Whether w [K, C*R*S] looks drawn from a normal distribution with one of these standard deviations."""
    n, found = w.numel(), float(w.square().mean().sqrt())
    std = min(stds, key=lambda s: abs(math.log(found / s)))
    z = w / std
    squares = z.square()
    moments = [  # (found, expected, its standard error)
        (z.mean(), 0.0, math.sqrt(1 / n)),
        (squares.mean(), 1.0, math.sqrt(2 / n)),
        (squares.square().mean(), 3.0, 1.5 * math.sqrt(96 / n)),  # more, as its tail is long
    ]
    if any(abs(float(value) - mean) > LIMIT * error for value, mean, error in moments):
        return False
    by_channel = squares.view(len(w), channels, -1).mean((0, 2))
    if not (_chi_square(squares.mean(1), w.shape[1]) and _chi_square(by_channel, n // channels)):
        return False
    return _largest_eigenvalue(z) <= _likely_eigenvalue(*z.shape)


def _chi_square(means: Tensor, count: int) -> bool:
    """Whether means of `count` squares each are those of normal numbers (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * count)
    return float(((means.pow(1 / 3) - (1 - spread)) / math.sqrt(spread)).abs().max()) <= LIMIT


def _largest_eigenvalue(z: Tensor) -> float:
    """Of z z^T, from below."""
    v = torch.randn(z.shape[1], generator=torch.Generator().manual_seed(0)).to(z.device)
    for _ in range(STEPS):
        v = z.t() @ (z @ (v / v.norm()))
    return float(v.norm())


def _likely_eigenvalue(k: int, m: int) -> float:
    """What the largest eigenvalue of z z^T does not pass for normal z [k, m] (Johnstone, 2001: law of Tracy and Widom).

    Its law at 9 has about the chance of LIMIT standard errors.
    """
    centre = math.sqrt(k) + math.sqrt(m)
    return centre**2 + 9 * centre * (1 / math.sqrt(k) + 1 / math.sqrt(m)) ** (1 / 3)


def _bias_drawn(bias: Tensor, bound: float, slack: float) -> bool:
    """Whether a bias is constant, or uniform in +-bound by the test of Kolmogorov and Smirnov."""
    if _constant(bias) or float(bias.abs().max()) <= TINY:
        return True
    if not float(bias.abs().max()) <= bound * (1 + slack):
        return False
    count = bias.numel()
    places = torch.arange(1, count + 1, device=bias.device) / count
    at = (bias.sort().values / bound + 1) / 2
    return float((at - places).abs().max()) <= 2.9 / math.sqrt(count) + 1 / count
