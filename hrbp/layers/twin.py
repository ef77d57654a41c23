"""A layer of another class with the parameters, the configuration and the attributes of a layer."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def twin(layer: nn.Module, kind: type[Layer]) -> Layer:
    """A `kind` with the very parameters and buffers of `layer`, in registries of its own. No random number is drawn.

    For classes that add a forward and attributes to nn.Conv2d or nn.Linear, or lack what `layer` adds.
    """
    made = kind.__new__(kind)
    for name, value in vars(layer).items():
        made.__dict__[name] = value.copy() if name.startswith("_") and isinstance(value, dict | set) else value
    return made
