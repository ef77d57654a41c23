"""The optimizer of a training: parameter groups, learning rate, checks of a loaded state, memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .settings import Settings

STATE = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}  # what they keep of a weight


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a model's weights and buffers (index tables are such), of its gradients, and of optimizer state."""
    weights = list(model.parameters())
    gradients = [p for p in weights if p.requires_grad]
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in (*weights, *gradients, *model.buffers(), *state))


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer; weight decay applies to weights with more than one dimension, not to biases and batch norm."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    assert settings.lr is not None
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, settings.lr)
    return torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=settings.nesterov)


def check_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], name: str) -> None:
    """ValueError unless an optimizer that was loaded has the settings of `groups`, and state that fits its weights."""
    for group, like in zip(optimizer.param_groups, groups, strict=True):
        for key in like.keys() - {"params", "lr"}:
            if key not in group or type(group[key]) is not type(like[key]) or group[key] != like[key]:
                raise ValueError(f"{key} of the optimizer is {str(group.get(key))[:60]} and was {like[key]}")
    for parameter, state in optimizer.state.items():
        if not isinstance(state, dict) or state.keys() - STATE[name] or (state and STATE[name] - state.keys()):
            raise ValueError(f"the state of a weight is {str(state)[:60]}; {name} has {', '.join(STATE[name])}")
        for key, value in state.items():
            fits = isinstance(value, Tensor) and value.shape in (
                parameter.shape,
                torch.Size() if key == "step" else None,
            )
            if not fits and not (value is None and name == "sgd"):
                raise ValueError(f"{key} of a weight {tuple(parameter.shape)} is {checkpoint.kind_of(value)}")


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Linear from 0 in the warm-up; then lr/2 * (1 + cos(pi * t)), or lr * gamma^(milestones passed).

    Args:
        settings: of the training.
        step: of the whole training, from 0 on.
        steps: of an epoch.
    """
    warmup, total = settings.warmup * steps, settings.epochs * steps
    assert settings.lr is not None
    if step < warmup:
        return settings.lr * min(1.0, (step + 1) / warmup)
    if settings.schedule == "cosine":
        return settings.lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return settings.lr * settings.gamma ** sum(step >= m * total for m in settings.milestones)
