"""Resumes trainings that were saved when layers of single weights were masked; now they are stored.

Loading converts the model's state by itself (layers/record.py); this file converts the rest of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.stored import pattern_of_mask, was_masked
from ..layers.view import sparse_layers


def config_as_now(config: Any) -> Any:
    """The configuration of a checkpoint without fields that structures no longer have."""
    plan = config.get("plan") if isinstance(config, dict) else None
    if isinstance(plan, dict) and isinstance(plan.get("structure"), dict):
        plan["structure"].pop("stored", None)
    return config


def optimizer_as_now(
    saved: Mapping[str, Any], state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> Mapping[str, Any]:
    """The state_dict of an optimizer, with state of masked dense weights laid out as their stored values.

    Args:
        saved: state_dict of the optimizer.
        state: state_dict of the model, saved with it.
        model, optimizer: those that will load the two.
    """
    groups = zip(optimizer.state_dict()["param_groups"], optimizer.param_groups, strict=True)
    number = {id(p): i for plain, group in groups for i, p in zip(plain["params"], group["params"], strict=True)}
    entries = dict(saved["state"])
    for name, layer in sparse_layers(model).items():
        mine = number.get(id(layer.parameter))
        if mine not in entries or layer.master or not was_masked(state, f"{name}.", layer.shape):
            continue
        mask = state[f"{name}.mask"]
        pattern = pattern_of_mask(mask)

        def stored(t: Any, mask: Tensor = mask, pattern: Any = pattern) -> Any:
            of_weights = isinstance(t, Tensor) and t.shape == mask.shape
            return pattern.values_from_dense(t.view(pattern.shape)) if of_weights else t

        entries[mine] = {key: stored(t) for key, t in entries[mine].items()}
    return {**saved, "state": entries}
