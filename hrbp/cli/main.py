"""python -m hrbp, or hrbp: training sparse networks, and masks of trained weights. Every command has --help."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import torch

from blocksparse import __version__, keep_freed_memory

from ..training.result import Diverged
from . import parsing
from .info import add_info
from .regroup import add_regroup
from .study import add_study
from .train import add_train

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

DESCRIPTION = """\
Sparse CNN training and its masks.

  python -m hrbp train --sparsity 0.9 --out run        a sparse network, on images that need no download
  python -m hrbp study                                 structures side by side: accuracy, memory, time
  python -m hrbp regroup model.pt --sparsity 0.9       what HRBP and HRBP++ keep of trained weights, layer by layer
  python -m hrbp info sparse.pt                        which masks a file's weights have, what they cost
  python -m hrbp info resnet50                         the layers of a network that this library builds
"""


def make_parser() -> parsing.Parser:
    """The parser of all commands."""
    parser = parsing.Parser(parsing.program(), description=DESCRIPTION, formatter_class=parsing.AS_WRITTEN)
    parser.add_argument("--version", action="version", version=f"hrbp {__version__}, PyTorch {torch.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_train, add_study, add_regroup, add_info):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    if not words:  # help for a person, exit status 2 for a script
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(words)
    args.words = list(words)  # as they were given
    if argv is None:  # the process is this command's
        keep_freed_memory()
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Diverged as error:
        return _fail(error, 1)
    except (ValueError, OSError, ImportError) as error:  # wrong input: the message says why
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:  # no file: standard output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would flush it once more
            error = OSError(error.errno, error.strerror, "standard output")
        return _fail(error, 2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        what = (str(error).splitlines() or ["no more is to be had"])[0]
        return _fail(f"out of memory: {what}; lower --batch-size, --width or --image-size, or raise --accumulate", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(error: Exception | str, status: int) -> int:
    """Print one line on stderr; returns the exit status."""
    print(f"{parsing.program()}: {_one_line(error)}", file=sys.stderr)
    return status


def _one_line(error: Exception | str) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
