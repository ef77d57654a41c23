"""Copy a layer into another class, with the same parameters, configuration and attributes."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def twin(layer: nn.Module, kind: type[Layer]) -> Layer:
    """A module of class `kind` that shares the parameters and buffers of `layer`. No random number is drawn.

    For classes that add a forward and attributes to nn.Conv2d, nn.Conv1d or nn.Linear, or lack what `layer` adds.
    """
    made = kind.__new__(kind)
    for name, value in vars(layer).items():
        made.__dict__[name] = value.copy() if name.startswith("_") and isinstance(value, dict | set) else value
    return made
