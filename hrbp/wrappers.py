"""The model inside its wrappers, and a copy of it."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, AveragedModel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model with weights that hooks compute (weight_norm, pruning), which have gradients."""
    computed = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed if not t.is_leaf})
