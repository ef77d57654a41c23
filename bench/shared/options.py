"""Options of the command line that several benchmarks have, their types, and how --help is laid out."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch


def make_parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose --help shows both texts as they are written."""
    return argparse.ArgumentParser(
        f"bench/{name}.py",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_layer(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--layer",
        nargs="+",
        action="extend",
        required=required,
        metavar="LAYER",
        help="a network (all its convolutions but the stem): resnet50 at 224x224, resnet32 (the HRBP paper's"
        " WideResNet-32-2) or vgg19 at 32x32; one layer of those, such as resnet50.layer2.3x3; or C,K,R,stride,H"
        " with padding R//2 (R may be RxS, H may be HxW); several allowed",
    )


def add_pattern(parser: argparse.ArgumentParser, default: str) -> None:
    """Which blocks are stored: --blocksize, --structure, --groups and --tap-density."""
    add = parser.add_argument
    add(
        "--blocksize",
        nargs="+",
        metavar="BKxBC",
        help="32x32, 16x8 ...; group: equal groups with all taps, K/groups x 1; groupx8: the same with channels in"
        f" runs of 8; several allowed ({default})",
    )
    add(
        "--structure",
        choices=("block", "hrbp"),
        default="block",
        help="block: random blocks (default); hrbp: equal groups, each with random channels and random taps of its"
        " own; BKxBC then says how a group is cut into blocks (default: group)",
    )
    add("--groups", type=positive, default=8, help="of hrbp and group: how many at most, 8 filters or more each")
    add("--tap-density", type=fraction, default=Fraction(1), help="of hrbp: share of the taps kept, 1 or 4/9")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:1; default: cuda if there is one")


def add_time(parser: argparse.ArgumentParser, seconds_: float, least: str) -> None:
    """--seconds and --quick."""
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=seconds_,
        help=f"spread repetitions over about so long (default {seconds_:g}), but no fewer than {least}",
    )
    parser.add_argument("--quick", action="store_true", help="3 repetitions of each, however long: a first look")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row and the machine to FILE")


def complete(args: argparse.Namespace) -> None:
    """Fill in the default device; ValueError for files that cannot be written."""
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.device.type == "cuda" and args.device.index is None:
        args.device = torch.device("cuda", torch.cuda.current_device())
    for option in ("json", "plot"):
        check_file(f"--{option}", getattr(args, option, None))


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line, completed; what `complete` refuses ends the program with a message."""
    args = parser.parse_args(argv)
    try:
        complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_file(option: str, path: Path | None) -> None:
    """ValueError for a path that no file can be written to."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path}: it is a folder; it needs a file name")
    if not os.access(next(p for p in path.resolve().parents if p.exists()), os.W_OK):
        raise ValueError(f"{option} {path}: its folder cannot be written to")


def plain(args: argparse.Namespace, *leave_out: str) -> dict[str, Any]:
    """The options as they can stand in a result file."""
    kept = {name: value for name, value in vars(args).items() if name not in leave_out}
    known = (bool, int, float, str, list, type(None))
    return {name: value if isinstance(value, known) else str(value) for name, value in kept.items()}


# ---------------------------------------------------------------- types


def device(text: str) -> torch.device:
    """cpu, cuda or cuda:1, as far as this machine has it."""
    try:
        found = torch.device(text.strip().lower())
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is no device to measure on; it needs cpu, cuda or cuda:1")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text}: PyTorch sees no CUDA device here")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: PyTorch sees {torch.cuda.device_count()} CUDA device(s) here")
    return found


def seconds(text: str) -> float:
    """A time that ends."""
    value = _float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds, from 0 on")
    return value


def positive(text: str) -> int:
    """1, 2, ..."""
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def sparsity(text: str) -> float:
    """In [0, 1)."""
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def density(text: str) -> float:
    """In (0, 1]."""
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def fraction(text: str) -> Fraction:
    """In (0, 1]."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction in (0, 1], such as 4/9")
    return value


def share(text: str) -> float:
    """In (0, 1)."""
    value = _float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
