"""Resumes trainings that older versions began.

Layers of single weights were masked; now they are stored: loading converts the model's state by itself
(layers/record.py), this file the rest of a checkpoint. Models had other groups by default: they keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.record import record_of, remember
from ..layers.stored import pattern_of_mask, was_masked
from ..layers.view import sparse_layers
from ..structures.groups import Groups
from ..wrappers import unwrapped

WERE_DEFAULTS = {"groups": 8, "min_rows": 8}  # of a model's groups; balanced where they were random


def config_as_now(config: Any) -> Any:
    """The configuration of a checkpoint without fields that structures no longer have."""
    plan = config.get("plan") if isinstance(config, dict) else None
    if isinstance(plan, dict) and isinstance(plan.get("structure"), dict):
        plan["structure"].pop("stored", None)
    return config


def groups_as_begun(model: nn.Module, config: Any) -> None:
    """Give a model whose groups are today's by default those that an older training was begun with, by default, too.

    Loading its state then gives the masks. Groups that differ otherwise stay: the training is refused as another one.

    Args:
        model: about to continue it.
        config: of that training, or anything else.
    """
    record = record_of(model, required=False)
    plan = config.get("plan") if isinstance(config, dict) else None
    begun = dict(plan["structure"]) if isinstance(plan, dict) and isinstance(plan.get("structure"), dict) else {}
    if record is None or not isinstance(record.structure, Groups) or begun.pop("kind", None) != "Groups":
        return
    now = asdict(record.structure)
    were: dict[str, Any] = WERE_DEFAULTS | {"balanced": record.saliency == "random"}
    if now["groups"] is None and begun == now | were:
        remember(unwrapped(model), replace(record, structure=replace(record.structure, **were)))


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
