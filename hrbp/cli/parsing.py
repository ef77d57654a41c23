"""Parsing of the command line: names in any case, typed numbers and paths, one-line errors."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..training.devices import the_device

AS_WRITTEN = argparse.RawDescriptionHelpFormatter  # of help texts that are laid out already
MOST_SEED = 2**63 - 1  # that torch's and numpy's generators take


def program() -> str:
    """What the user typed to come here: the installed command, or the module."""
    return "hrbp" if Path(sys.argv[0]).stem == "hrbp" else "python -m hrbp"


class Parser(argparse.ArgumentParser):
    """Takes names of `choices` in any case; errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.choices is not None and not isinstance(action, argparse._SubParsersAction):
            known = {str(choice).lower(): str(choice) for choice in action.choices}
            arg_string = known.get(arg_string.strip().lower(), arg_string)
        return super()._get_value(action, arg_string)


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]


def add_device(add: Callable[..., Any]) -> None:
    """The options --device and --amp; `running` evaluates them."""
    add("--device", help="default cuda if there is a GPU, else cpu")
    add("--amp", choices=("none", "bf16", "fp16"), help="mixed precision, default bf16 on a GPU, none on a CPU")


def running(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a training that depend on the device."""
    on_gpu = the_device(args.device).type == "cuda"
    return {"amp": {"none": None, None: "bf16" if on_gpu else None}.get(args.amp, args.amp), "channels_last": on_gpu}


def number(low: float, high: float, text: str) -> Callable[[str], float]:
    """Of numbers in [low, high), which `text` names."""

    def parse(value: str) -> float:
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not low <= found < high:
            raise argparse.ArgumentTypeError(f"{_short(value)} is not in {text}")
        return found

    return parse


def positive(value: str) -> int:
    """An integer of at least 1."""
    return _integer(value, 1, "a positive number")


def count(value: str) -> int:
    """An integer of at least 0."""
    return _integer(value, 0, "a number from 0 on")


def seed(value: str) -> int:
    """What random generators are started with."""
    return _integer(value, 0, "a seed, an integer from 0 on")


def _integer(value: str, least: int, what: str) -> int:
    number = int(value) if value.isdecimal() and len(value) < 20 else -1
    if not least <= number <= MOST_SEED:
        raise argparse.ArgumentTypeError(f"{_short(value)} is not {what}")
    return number


def share(value: str) -> float:
    """A fraction in (0, 1]."""
    try:
        found = Fraction(value)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{_short(value)} is not a fraction in (0, 1], such as 4/9")
    return float(found)


def rows(value: str) -> int | None:
    """A positive number, or None for "stay"."""
    return None if value.lower() == "stay" else positive(value)


def regex(value: str) -> re.Pattern[str]:
    """A regular expression."""
    try:
        return re.compile(value)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{value} is no regular expression ({error})") from None


def path(value: str) -> str:
    """The name of a file or a folder."""
    if not value or "\0" in value:
        raise argparse.ArgumentTypeError(f"{value!r} names no file or folder")
    return value


def _short(value: str) -> str:
    return (value or "''") if len(value) <= 60 else f"{value[:57]}..."
