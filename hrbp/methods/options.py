"""The methods of the Evolver, which options each of them takes, and when their updates come."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..layers.master import FOLLOWING
from .subp import SoftPruning

_EXCHANGE = ("every", "drop", "until", "seed")
_SOFT = tuple(field.name for field in fields(SoftPruning))

# Every method, and the options it takes.
OPTIONS: dict[str, tuple[str, ...]] = {
    "static": (),
    "set": _EXCHANGE,
    "rigl": _EXCHANGE,
    "hrbp": _EXCHANGE,
    "gmp": ("every", "until", "sparsity"),
    "ste": ("every",),
    "sr-ste": ("every", "decay"),
    "subp": ("every", "until", "decay", "seed", *_SOFT),
}
METHODS = tuple(OPTIONS)
ARRIVING = ("gmp", "subp")  # whose sparsity rises until it is final
DECAYING = tuple(method for method, options in OPTIONS.items() if "decay" in options)
DEFAULTS: dict[str, Any] = {"every": 100, "drop": 0.3, "until": 0.75, "seed": 0, "decay": 2e-4}  # Zhou et al.'s lambda
LEAST_UPDATES = 20  # of `default_every`


def method_named(name: str, who: str) -> str:
    """The method of this name, in any case: "RigL" is "rigl"."""
    if not isinstance(name, str) or name.lower() not in METHODS:
        raise ValueError(f"{who}: method is {name!r}; it needs one of {', '.join(METHODS)}")
    return name.lower()


def refused_options(method: str, names: Iterable[str]) -> str | None:
    """Why a method cannot have options of these names, or None."""
    unknown = sorted(set(names) - set(OPTIONS[method]))
    takes = ", ".join(OPTIONS[method]) or "none"
    return f"method {method!r} has no option {', '.join(unknown)}; it takes: {takes}" if unknown else None


def checked_options(method: str, total_steps: int, given: Mapping[str, Any], who: str) -> dict[str, Any]:
    """All that the Evolver needs to know of a method: its options, defaults where they are not given.

    Returns:
        total_steps, every, drop, until, seed, decay, sparsity (of "gmp", else None), soft (SoftPruning).

    Raises:
        TypeError: an option that the method does not take.
        ValueError: an option out of range, or steps too few for an update, or to arrive at a sparsity.
    """
    if reason := refused_options(method, given):
        raise TypeError(f"{who}: {reason}")
    found = {"sparsity": None, **DEFAULTS, **given, "total_steps": total_steps}
    for name in ("total_steps", "every"):
        found[name] = _at_least_one(name, found[name], who)
    for name in ("drop", "until"):
        if not (0 <= _number(found[name]) <= 1):
            raise ValueError(f"{who}: {name} is {found[name]!r}; it needs a number in [0, 1]")
    if not 0 <= _number(found["decay"]) < math.inf:
        raise ValueError(f"{who}: decay is {found['decay']!r}; it needs a number >= 0")
    if method == "gmp" and not 0 <= _number(found["sparsity"]) < 1:
        raise ValueError(
            f"{who}: sparsity is {found['sparsity']!r} with method 'gmp'; it needs the final one, a number in [0, 1)"
        )
    found["soft"] = soft = SoftPruning(**{name: found[name] for name in _SOFT if name in found})
    if method == "subp" and soft.begin > found["until"]:
        raise ValueError(f"{who}: begin is {soft.begin} and until {found['until']}; it needs begin <= until")
    _check_updates(method, found["total_steps"], found["every"], found["until"], who)
    return found


def arrival(every: int, end: float) -> int:
    """The first update at or after step `end`."""
    return every * max(1, math.ceil(end / every - 1e-9))


def default_every(method: str, total_steps: int, until: Any = None, most: int = 100) -> int:
    """The steps between updates, at most `most`, that leave a training 20 updates or more where it has the steps.

    Args:
        method: of `METHODS`; at the updates of "ste" and "sr-ste", which come to the end, their masks are looked at.
        total_steps: of the whole training.
        until: share of them after which masks stay; default: the Evolver's.
    """
    share = _number(DEFAULTS["until"] if until is None else until)
    end = share * total_steps if 0 <= share <= 1 and method not in FOLLOWING else total_steps
    every = max(1, min(most, int(end) // (LEAST_UPDATES + 1)))
    while method in ARRIVING and every > 1 and arrival(every, end) > total_steps:
        every -= 1
    return every


def _check_updates(method: str, total_steps: int, every: int, until: float, who: str) -> None:
    """Refuse steps in which nothing would happen, or a sparsity would not be reached."""
    end = until * total_steps
    if method in ARRIVING and (arrives := arrival(every, end)) > total_steps:
        raise ValueError(
            f"{who}: {method!r} reaches its sparsity at step {arrives}, the first multiple of every = {every} from"
            f" until = {until} on; it needs one of the {total_steps} steps: lower until or every"
            f" (every = {default_every(method, total_steps, until)} will do)"
        )
    if "drop" in OPTIONS[method] and every >= end:
        most = math.ceil(end) - 1
        lower = f"lower every to at most {most}, or " if most >= 1 else ""
        raise ValueError(
            f"{who}: {method!r} would never change a mask: its first update comes at step every = {every}, and masks"
            f" stay from step until * total_steps = {until} * {total_steps} = {end:g} on; {lower}raise until or"
            " total_steps"
        )


def _at_least_one(name: str, value: Any, who: str) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        whole = 0
    if whole < 1:
        raise ValueError(f"{who}: {name} is {value!r}; it needs an integer >= 1")
    return whole


def _number(value: Any) -> float:
    """NaN, which is in no range, for what is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return math.nan
