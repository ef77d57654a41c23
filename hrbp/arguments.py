"""Checks of arguments that many functions take: names in any case, sparsities."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor


def any_case(name: Any, known: Iterable[str]) -> Any:
    """`name` as one of `known` spells it, whatever its case ("RigL": "rigl"); anything else as it is."""
    if not isinstance(name, str):
        return name
    return {spelling.lower(): spelling for spelling in known}.get(name.strip().lower(), name)


def check_sparsity(value: Any, who: str) -> None:
    """ValueError unless it is a number in [0, 1)."""
    number = isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)
    if number and 0 <= value < 1:
        return
    hint = ""
    if isinstance(value, str):
        hint = ", not a string"
    elif number and 1 < value < 100:
        hint = f"; {float(value):g}% is {float(value) / 100:g}"
    raise ValueError(f"{who}: sparsity is {value!r}; it needs a number in [0, 1){hint}")
