"""Every method by its name, found in the files of this folder."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ..arguments import any_case
from ..registry import Entry, Registry
from .base import Method
from .options import SHARED, Seeded


def _methods(module: ModuleType) -> Iterator[Entry[type[Method]]]:
    """The methods of a file: classes with a name of their own."""
    for value in vars(module).values():
        if not (isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__):
            continue
        if "name" not in vars(value):  # what several methods share
            continue
        if missing := sorted(getattr(value, "__abstractmethods__", ())):
            raise TypeError(f"{module.__file__}: {value.__name__} has a name and no {', '.join(missing)}; define them")
        if "__dataclass_fields__" not in vars(value):
            raise TypeError(
                f"{module.__file__}: {value.__name__} is no dataclass, so that its options would be none: it needs"
                " @dataclass(frozen=True)"
            )
        if unset := [name for name, default in value.defaults().items() if default is dataclasses.MISSING]:
            raise TypeError(
                f"{module.__file__}: {value.__name__}.{unset[0]} has no default; an option that has to be given has"
                " None, which its check refuses"
            )
        if (value.follows_weight or value.begins_dense) and not value.dense_weights:
            raise TypeError(
                f"{module.__file__}: {value.__name__} follows a dense weight, or begins with all of it, and does not"
                " ask for one: it needs dense_weights = True"
            )
        if not isinstance(value.name, str) or value.name != value.name.lower():
            raise TypeError(f"{module.__file__}: {value.__name__}.name is {value.name!r}; it needs small letters")
        yield Entry(value.name, value, value.place)


METHODS: Registry[type[Method]] = Registry("hrbp.methods", _methods)


def method_named(name: Any, who: str) -> type[Method]:
    """The method of this name, in any case: "RigL" is "rigl"."""
    if not isinstance(name, str) or name.lower() not in METHODS:
        raise ValueError(f"{who}: method is {name!r}; it needs one of {', '.join(METHODS)}")
    return METHODS[name.lower()]


def dense_weight_method(name: Any, who: str) -> type[Method] | None:
    """The method of this name, in any case, one that `sparsify` has to be told of; None for None."""
    known = [method for method in METHODS if METHODS[method].dense_weights]
    if name is None:
        return None
    if (name := any_case(name, known)) not in known:
        raise ValueError(f"{who}: method is {name!r}; it needs one of {', '.join(known)}, or None")
    return METHODS[name]


def listed() -> str:
    """Each method as help texts have it: its name, what it does, its options, and what those are that it has alone."""
    shared = {field.name for mixin in (*SHARED, Seeded) for field in dataclasses.fields(mixin)}
    lines = []
    for name, method in METHODS.items():
        lines.append(f"  {name:8} {(inspect.getdoc(method) or '').splitlines()[0]}")
        if method.options():
            lines.append(f"{'':11}options: {', '.join(method.options())}")
        for option, field in method.options().items():
            if option not in shared:
                default = "" if field.default is None else f", default {field.default}"
                lines.append(f"{'':13}{option:9} {field.metadata.get('help', '')}{default}")
    return "\n".join(lines)
