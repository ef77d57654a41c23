"""SR-STE's decay: weights that take no part shrink towards zero, so that only persistent gradients bring them back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers.view import SparseLayer
from ..wrappers import unwrapped

_handles: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


class Decay:
    """Adds strength * (1 - E) * W to the gradients of master weights, right before the optimizer's update.

        W <- W - lr * (g + strength * (1 - E) * W)        with plain SGD; momentum and AdamW treat the sum as their g

    E is the mask, W the weight, as they were in the forward. The gradient is taken as the optimizer gets it: after
    torch.amp.GradScaler has unscaled it, or, for fused optimizers, which unscale it themselves, in its scale. A step
    that the scaler skips decays nothing; backward passes that add up to one step are followed by one decay.

    It lasts as long as this object, or until another one is made for the same model.

    Args:
        model: that the layers are of; may be wrapped.
        layers: those with a dense master weight.
        optimizer: the one that updates them. `step(closure)` is refused: its gradients come too late.
        strength: lambda; below 0 what takes no part grows.

    Source: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[SparseLayer], optimizer: torch.optim.Optimizer, strength: float
    ) -> None:
        self.layers, self.strength = list(layers), strength
        me = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (decay := me()) is not None:
                decay._add(optimizer, args, kwargs)

        handle = optimizer.register_step_pre_hook(before_step)
        weakref.finalize(self, handle.remove)
        if (older := _handles.get(unwrapped(model))) is not None:
            older.remove()
        _handles[unwrapped(model)] = handle

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
            raise RuntimeError(
                "optimizer.step(closure): gradients that a closure computes come after the decay of weights that take"
                " no part; call backward() first and step() without a closure"
            )
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler sets it for fused optimizers
        for layer in self.layers:
            weight = layer.parameter
            if weight.grad is not None and weight.requires_grad:
                dropped = weight * ~layer.mask().view(weight.shape)
                weight.grad.add_(dropped if scale is None else dropped * scale.to(dropped.device), alpha=self.strength)
