"""Options of methods: what their values may be, and those that several methods share, each said once."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

WHO = "Evolver()"  # where options are given


@dataclass(frozen=True)
class Values:
    """What the values of an option may be.

    taken  value -> as it is used; TypeError or ValueError for what it may not be
    needs  what it has to be, in words
    """

    taken: Callable[[Any], Any]
    needs: str


def whole(least: int) -> Values:
    """Integers from `least` on."""

    def taken(value: Any) -> int:
        if isinstance(value, bool) or (found := operator.index(value)) < least:
            raise ValueError
        return found

    return Values(taken, f"an integer >= {least}")


def between(low: float, high: float, needs: str, *, open_ends: str = "") -> Values:
    """Numbers in [low, high]; open_ends: "<" where `low` itself is none of them, ">" where `high` is none."""

    def taken(value: Any) -> Any:
        found = math.nan if isinstance(value, str | bool) else float(value)
        if not low <= found <= high or ("<" in open_ends and found == low) or (">" in open_ends and found == high):
            raise ValueError
        return value

    return Values(taken, needs)


def one_of(names: Iterable[str]) -> Values:
    """Some words."""
    known = tuple(names)

    def taken(value: Any) -> str:
        if value not in known:
            raise ValueError
        return value

    return Values(taken, f"one of {', '.join(known)}")


ANYTHING = Values(lambda value: value, "anything")
WHOLE = Values(operator.index, "an integer")
STEPS = whole(1)
SHARE = between(0, 1, "a number in [0, 1]")
NUMBER = between(-math.inf, math.inf, "a finite number", open_ends="<>")
NOT_NEGATIVE = between(0, math.inf, "a number >= 0", open_ends=">")
POSITIVE = between(0, math.inf, "a number > 0", open_ends="<")
SPARSITY = between(0, 1, "a number in [0, 1)", open_ends=">")


def option(default: Any, text: str, values: Values = ANYTHING) -> Any:
    """A field of a method that is one of its options.

    Args:
        default: where it is not given.
        text: what help texts say of it, without the default.
        values: that it may have.
    """
    return dataclasses.field(default=default, metadata={"help": text, "values": values})


@dataclass(frozen=True)
class Every:
    """Updates come every so many steps."""

    every: int = option(100, "steps between updates of the masks", STEPS)


@dataclass(frozen=True)
class Drop:
    """A share of what is kept is exchanged in an update."""

    drop: float = option(0.3, "share exchanged at first; falls as a cosine to zero at `until`", SHARE)


@dataclass(frozen=True)
class Until:
    """Masks change in the first part of a training."""

    until: float = option(0.75, "share of the training after which masks stay", SHARE)


@dataclass(frozen=True)
class Decaying:
    """Weights that take no part shrink. 2e-4 is the lambda of Zhou et al., ICLR 2021; see decay.py."""

    decay: float = option(2e-4, "of weights that take no part", NOT_NEGATIVE)


@dataclass(frozen=True)
class Seeded:
    """Something is drawn."""

    seed: int = option(0, "of what is drawn", WHOLE)


SHARED: tuple[type, ...] = (Every, Drop, Until, Decaying)  # which commands have options of their own for
