"""How a study on the command line ends: its table and answer, what is in its folder, its page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..study.folder import RESULTS, TABLE
from ..study.page import Parts, write_study
from ..study.runner import Runner
from . import parsing


def tell(args: argparse.Namespace, made: Runner, results: Mapping[str, Any], shown: Parts | None, *more: str) -> None:
    """Print what a study has come to; of one that was not stopped the files, too, and with --html write the page.

    Args:
        args: of the command.
        made: the study.
        results: what its run() returned.
        shown: None where no training is finished.
        more: names of further files in its folder.
    """
    print(f"\n{'no training is finished yet' if shown is None else shown.text()}\n")
    if results["stopped"] is None:
        tell_files(args, made, results, shown, *more)


def tell_files(
    args: argparse.Namespace, made: Runner, results: Mapping[str, Any], shown: Parts | None, *more: str
) -> None:
    """The second half of `tell`."""
    print(f"in {made.out}: {', '.join((RESULTS, TABLE, *more, made.figure))}, and a folder for each training")
    if args.html and shown is not None:
        words = [*parsing.program().split(), *args.words]
        print(f"page: {write_study(made.out, shown, [results], made.figure, words)}")
