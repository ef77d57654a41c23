"""How a model was made sparse, as the model itself remembers it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..structures.base import Structure
from ..wrappers import unwrapped
from .stored import take_masks


class Lineage:
    """Which model a model is a deep copy of, and which copies it has: averages of its weights are found by that.

    made: how many copies were ever made; who has looked at them looks again when it grows.
    """

    def __init__(self, parent: Lineage | None = None) -> None:
        self.parent = parent
        self.copies: weakref.WeakSet[Lineage] = weakref.WeakSet()
        self.made = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Lineage:
        child = Lineage(self)
        self.copies.add(child)
        self.made += 1
        return child

    def __reduce__(self) -> Any:  # in a file nothing is a copy of anything
        return Lineage, ()


@dataclass(frozen=True)
class SparsityRecord:
    """How a model was made sparse.

    asked: layer -> the density that its structure was asked for. dense: layer -> why it was left dense. method: that
    layers keep a dense master weight for, or None. target: layer -> the sparsity to which a method prunes it that
    begins with all weights ("subp").
    per_layer: layer -> the sparsity that it was given alone. min_density: that no layer was to fall below.
    saliency: what chose the first masks; saliency_why: what made "auto" take it, or empty.
    """

    structure: Structure
    distribution: str
    asked: dict[str, float]
    dense: dict[str, str]
    method: str | None = None
    target: dict[str, float] = field(default_factory=dict)
    saliency: str = ""
    saliency_why: str = ""
    per_layer: dict[str, float] = field(default_factory=dict)
    min_density: float = 0.0
    lineage: Lineage = field(default_factory=Lineage, compare=False, repr=False)


def remember(model: nn.Module, record: SparsityRecord) -> None:
    """Attach the record to a model. From now on the model also loads states with masked single weights."""
    forget(model)
    model._hrbp_sparsity = record  # type: ignore[assignment]
    model.register_load_state_dict_pre_hook(_before_loading)


def forget(model: nn.Module) -> None:
    """Undo `remember`."""
    model.__dict__.pop("_hrbp_sparsity", None)
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _before_loading]:
        del hooks[key]


def _before_loading(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    take_masks(state, prefix, model)


def record_of(model: nn.Module, required: bool = True) -> SparsityRecord | None:
    """The record of a model, or of the model inside a DistributedDataParallel or compiled one."""
    record = getattr(unwrapped(model), "_hrbp_sparsity", None)
    if record is None and required:
        raise ValueError("the model is not sparse; call hrbp.sparsify(model, sparsity) first")
    return record
