"""How well the layers of a network can learn: channels read, dead weights, gradients, effective ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..columns import columns
from ..layers.stored import PLAIN
from ..layers.view import as_sparse, groups_of, shape4
from ..wrappers import unwrapped

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LayerHealth:
    """Measures of one layer on one batch.

    density       weights kept / all
    read          input channels that some kept weight reads / all
    dead          kept weights with a gradient of exactly 0 / kept: their output is read by nobody, or their input is 0
    gradient      |g| / |w|, norms over the kept weights: the share by which a step of learning rate 1 changes them
    weight_rank   effective rank of the weight [K, C*R*S] / its largest possible one, min(K, C*R*S)
    feature_rank  effective rank of the outputs of K channels over images and pixels, less their means / K, or their
                  number where that is smaller

    The effective rank of a matrix is exp(H(p)), H(p) = -sum p_i log p_i, p_i its singular values / their sum: as many
    as there are where they are all equal, 1 where one alone is not 0; 0 of a matrix of zeros.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality (2007).
    """

    density: float
    read: float
    dead: float
    gradient: float
    weight_rank: float
    feature_rank: float


def layer_health(model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = F.cross_entropy) -> dict[str, LayerHealth]:
    """Measure every convolution and linear layer of a model, dense or sparse, in one forward and backward pass.

    The pass is that of a copy in train mode, BatchNorm with the statistics of the batch. The model, its gradients,
    buffers and modes, and the global random generators stay as they are.

    Args:
        model: any module; layers that the pass does not reach are left out.
        x, y: a batch, on the model's device.
        loss: (outputs, y) -> a number.

    Returns:
        Name, as in named_modules() -> measures.

    Raises:
        ValueError: the loss is not finite, or it depends on no layer.
    """
    made = copy.deepcopy(unwrapped(model)).train()
    made.zero_grad(set_to_none=True)
    layers = {name: module for name, module in made.named_modules() if isinstance(module, PLAIN) or as_sparse(module)}
    ranks: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            axis = -1 if len(_dense_shape(module)) == 2 else 1
            ranks[name] = _feature_rank(output.detach().movedim(axis, 0).flatten(1))

        return see

    for name, module in layers.items():
        for parameter in module.parameters():
            parameter.requires_grad_()
        module.register_forward_hook(hook(name))
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.enable_grad():
        value = loss(made(x), y)
        if not bool(torch.isfinite(value)):
            raise ValueError(f"layer_health(): the loss is {value.item()}; it needs a finite one")
        if not value.requires_grad:
            raise ValueError("layer_health(): the loss depends on no weight; it needs one that layers lead to")
        value.backward()
    return {name: _measured(module, ranks[name]) for name, module in layers.items() if name in ranks}


def mean_health(found: Mapping[str, LayerHealth]) -> LayerHealth:
    """The means over layers, each with the same weight."""
    if not found:
        raise ValueError("mean_health(): there is no layer; it needs one")
    return LayerHealth(*(sum(column) / len(found) for column in zip(*map(astuple, found.values()), strict=True)))


def table(found: Mapping[str, LayerHealth]) -> str:
    """A line a layer, in per cent but for the gradient."""
    lines = [["layer", "density%", "read%", "dead%", "gradient", "weight rank%", "feature rank%"]]
    for name, one in found.items():
        shares = [f"{100 * share:.1f}" for share in astuple(one)]
        shares[3] = f"{one.gradient:.3g}"
        lines.append([name, *shares])
    return columns(lines)


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of singular values / their sum; 0 where all are 0."""
    total = singular.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp())


def _dense_shape(module: Any) -> tuple[int, ...]:
    view = as_sparse(module)
    return tuple(module.weight.shape) if view is None else view.dense_shape


def _measured(module: Any, feature_rank: float) -> LayerHealth:
    view = as_sparse(module)
    if view is None:
        parameter = module.weight
        weight = parameter.detach().reshape(shape4(module))
        mask = torch.ones_like(weight, dtype=torch.bool)
    else:
        parameter, weight, mask = view.parameter, view.weight(), view.mask()
    values = parameter.detach()
    gradient = torch.zeros_like(values) if parameter.grad is None else parameter.grad
    if view is not None and view.master:
        live = mask.view(values.shape)
        values, gradient = values[live], gradient[live]
    k, c, r, s = weight.shape
    of_channels = mask.view(groups_of(module), -1, c, r * s).any(3).any(1)
    norm, kept = float(values.double().norm()), values.numel()
    return LayerHealth(
        density=kept / mask.numel(),
        read=float(of_channels.double().mean()),
        dead=int((gradient == 0).sum()) / kept if kept else 0.0,
        gradient=float(gradient.double().norm()) / norm if norm else 0.0,
        weight_rank=effective_rank(torch.linalg.svdvals(weight.double().flatten(1))) / min(k, c * r * s),
        feature_rank=feature_rank,
    )


def _feature_rank(features: Tensor) -> float:
    """Of [K, outputs]; NaN where one is not finite."""
    if not bool(torch.isfinite(features).all()):
        return math.nan
    centered = features.double() - features.double().mean(1, keepdim=True)
    squares = torch.linalg.eigvalsh(centered @ centered.T).clamp_min(0)
    return effective_rank(squares.sqrt()) / min(features.shape)
