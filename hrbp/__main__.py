"""python -m hrbp: training sparse networks, and masks of trained weights. Every command has --help."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cli import parsing
from .cli.study import add_study
from .cli.train import add_train
from .density import densities
from .formats.weights import layers, read_weights, sparse_layer, sparse_names, write_groupings
from .models import NETWORKS, build, parameter_count
from .reports.mask_report import (
    MaskReport,
    Score,
    columns,
    kept_of,
    report_mask,
    stored_blocks,
    table,
    total_score,
    under_a_mask,
)
from .reports.picture import check_plot, draw_grouping
from .structures.registry import Groups, structure
from .structures.regrouping import Grouping
from .training.trainer import Diverged

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[parsing.Parser]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
FEWEST_CHANNELS = 4  # layers with no more input channels are stems and depthwise convolutions

DESCRIPTION = """\
Sparse CNN training and its masks.

  python -m hrbp train --sparsity 0.9 --out run        a sparse network, on images that need no download
  python -m hrbp study                                 structures side by side: accuracy, memory, time
  python -m hrbp regroup model.pt --sparsity 0.9       what HRBP and HRBP++ keep of trained weights, layer by layer
  python -m hrbp info sparse.pt                        which masks a file's weights have, what they cost
  python -m hrbp info resnet50                         the layers of a network that this library builds
"""

REGROUP = """\
Chooses groups of filters that share input channels (hrbp) and kernel offsets (hrbp++), from the magnitudes in a
file of trained weights, and tells what they keep.

  python -m hrbp regroup model.pt
  python -m hrbp regroup model.safetensors --sparsity 0.95 --distribution uniform --structure hrbp
  python -m hrbp regroup model.npz --granule 8 --layers 'layer[34]' --save groups.npz
  python -m hrbp regroup model.pt --layer layer3.0.conv2 --picture mask.png
"""

REGROUP_END = """\
columns
  groups, channels, taps   groups x filters in each; input channels and kernel offsets that each group keeps
  kept%      share of the layer's weights
  retained   sum of |w| that is kept, as a share of the layer's: by the paper's rule (Algorithm 1 of HRBP, which
             counts weights), and by ours, which keeps the most
  of unstr.  what the chosen method keeps, as a share of what as many single weights would
  efficacy   (kept - random groups) / (single weights - random groups): 0 is chance, 1 the most there is
  seconds    that the chosen method took

--sparsity is over the layers in the table. Stems and depthwise convolutions (4 input channels or fewer) and the
last linear layer stay dense unless --layers names them. Nothing in FILE is executed.
Exit status: 0; 2 for a file or an option that cannot be used; 130 if interrupted.
"""

INFO = """\
Tells which masks the weights of a file have (their zeros), or what a network of this library looks like.

  python -m hrbp info pruned.pt
  python -m hrbp info sparse.pt --like dense.pt       a checkpoint of BSR layers; the dense one has their shapes
  python -m hrbp info sparse.pt --like resnet32 --width 2
  python -m hrbp info resnet50 --classes 1000 --image-size 224
"""

INFO_END = """\
columns
  structure        what the mask looks like: dense, groups of filters that keep the same channels and taps,
                   filters, channels, kernels, vectors, blocks, element-wise groups, n:m, single weights
  kept%            share of the weights; up to 1% of zeros without a structure that pays are chance: dense
  model%           storage by the model of Mao et al. (2017), 8 bits a weight and 4 an index, relative to dense; over
                   100 the index takes more than the zeros save
  dense, memory, file kB   the dense weight; stored blocks with their index in memory; in a checkpoint
  refs             memory references of an output pixel (weights, index, inputs, partial sums), per dense weight
  rows, cols       most weights of a filter, of an input channel / mean: 1 is even
  dgrad%           share that blocks fill of their bounding rectangles once kernels are rotated and transposed, as
                   the input gradient needs them: 100 is dense
  dgrad n:m        whether an n:m mask is one in the input gradient, too (in NHWC); else the share of m neighbouring
                   filters that keep more than n, or their number K where m does not divide it
Exit status: 0; 2 for a file or an option that cannot be used.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = parsing.Parser("python -m hrbp", description=DESCRIPTION, formatter_class=_Raw)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_train, add_study, add_regroup, add_info):
        add(commands)
    words = sys.argv[1:] if argv is None else argv
    if not words:  # a person sees what there is, a script that something is missing
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(words)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Diverged as error:
        return _said(error, 1)
    except (ValueError, OSError, ImportError) as error:  # a user's mistake: what the library refuses says why
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:  # files have names
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it is tried again at the end
            error = OSError(error.errno, error.strerror, "standard output")
        return _said(error, 2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        what = (str(error).splitlines() or ["no more is to be had"])[0]
        return _said(f"out of memory: {what}; lower --batch-size, --width or --image-size, or raise --accumulate", 2)
    except KeyboardInterrupt:
        return _said("interrupted", 130)


def _said(error: Exception | str, status: int) -> int:
    """One line on stderr."""
    print(f"python -m hrbp: {_one_line(error)}", file=sys.stderr)
    return status


_Raw = argparse.RawDescriptionHelpFormatter


def _one_line(error: Exception | str) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


# ---------------------------------------------------------------------- regroup


def add_regroup(commands: Commands) -> None:
    """The command `regroup` and its options."""
    parser = commands.add_parser(
        "regroup", help="what groups keep of trained weights", description=REGROUP, epilog=REGROUP_END,
        formatter_class=_Raw,
    )  # fmt: skip
    add = parser.add_argument
    add("file", type=parsing.path, metavar="FILE", help="a state_dict (.pt, .pth, ...), .npz or .safetensors")
    add("--sparsity", type=parsing.number(0, 1, "[0, 1)"), default=0.9, help="share that is dropped, default 0.9")
    add("--distribution", choices=("erk", "uniform"), default="erk", help="of the layers' densities, default erk")
    add("--structure", choices=("hrbp++", "hrbp"), default="hrbp++", help="default hrbp++")
    add("--groups", type=parsing.positive, default=8, help="most groups of a layer, default 8")
    add("--tap-density", type=parsing.share, help="share of the taps that a group keeps, default 4/9 (hrbp: 1)")
    add("--granule", type=parsing.positive, default=1, help="channels in aligned runs of this many, default 1")
    add(
        "--row-granule",
        type=parsing.rows,
        default=1,
        help="filters move in runs of this many, default 1; 'stay': not at all",
    )
    add("--min-rows", type=parsing.positive, default=8, help="least filters of a group, default 8")
    add("--balanced", action="store_true", help="every channel is kept by equally many groups, give or take one")
    add("--method", choices=("assign", "paper"), default="assign", help="ours (default) or Algorithm 1 alone")
    add("--seed", type=parsing.seed, default=0, help="of the search, default 0")
    add("--layers", type=parsing.regex, metavar="REGEX", help="only layers whose name has a match, stems and all")
    add("--save", type=parsing.path, metavar="OUT.npz", help="write every layer's mask, row_order, channels and taps")
    add(
        "--picture",
        type=parsing.path,
        metavar="OUT.png",
        help="draw one layer's mask before, after and in the input gradient",
    )
    add("--layer", metavar="NAME", help="the layer of the picture, default the largest")
    add("--json", action="store_true", help="print JSON in place of the table")
    parser.set_defaults(run=run_regroup)


@dataclass(frozen=True)
class Row:
    """One layer of the table."""

    grouping: Grouping
    score: Score
    paper: float  # share of the score that Algorithm 1 keeps
    seconds: float

    def as_json(self) -> dict[str, Any]:
        g = self.grouping
        return {
            "shape": list(g.shape),
            "groups": g.groups,
            "rows": g.rows,
            "channels": g.channels.shape[1],
            "taps": g.taps.shape[1],
            "density": g.density,
            "retained_by_paper": self.paper,
            "seconds": self.seconds,
            **_score_json(self.score),
        }


def run_regroup(args: argparse.Namespace) -> int:
    """Groups for every layer, then the table."""
    for path in (args.save, args.picture):
        _check_writable(path)
    if args.picture:
        check_plot(args.picture)
    if args.layer and not args.picture:
        raise ValueError("--layer is the layer of a picture; give --picture OUT.png too, or --layers to choose layers")
    options = {"tap_density": args.tap_density} if args.tap_density else {}
    made = structure(
        args.structure, groups=args.groups, granule=args.granule, row_granule=args.row_granule, min_rows=args.min_rows,
        balanced=args.balanced, method=args.method, **options,
    )  # fmt: skip
    assert isinstance(made, Groups)
    weights, dense = _chosen_layers(layers(read_weights(args.file)), made, args.layers, args.file)
    if args.layer and args.layer not in weights:
        raise ValueError(f"--layer {args.layer}: no such layer among {', '.join(weights)}")
    rows = _regrouped(weights, made, args)
    if args.json:
        print(json.dumps(_regroup_json(rows, dense), indent=1, allow_nan=False))
    else:
        print(_regroup_table(rows, args.method))
        if dense:
            print("\nleft dense: " + "; ".join(f"{name} ({why})" for name, why in dense.items()))
    if args.save:
        write_groupings(args.save, {name: row.grouping for name, row in rows.items()})
        print(f"wrote {args.save}", file=sys.stderr)
    if args.picture:
        name = args.layer or max(weights, key=lambda name: weights[name].numel())
        draw_grouping(args.picture, rows[name].grouping, weights[name], rows[name].score, name)
        print(f"wrote {args.picture}", file=sys.stderr)
    return 0


def _chosen_layers(
    found: Mapping[str, Tensor], made: Groups, wanted: re.Pattern[str] | None, file: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores [K, C, R, S] of the layers to regroup, and why the others stay dense."""
    if not found:
        raise ValueError(f"{file} has no weights of convolutions or linear layers ([K, C, R, S] or [K, C])")
    last = list(found)[-1]
    scores: dict[str, Tensor] = {}
    dense: dict[str, str] = {}
    for name, weight in found.items():
        shape = tuple(weight.shape) if weight.dim() == 4 else (*weight.shape, 1, 1)
        if wanted is not None and not wanted.search(name):
            continue
        if wanted is None and shape[1] <= FEWEST_CHANNELS:
            dense[name] = f"{shape[1]} input channel{'s' if shape[1] > 1 else ''}"
        elif wanted is None and name == last and weight.dim() == 2 and len(found) > 1:
            dense[name] = "last layer"
        elif reason := made.refuses(shape):
            dense[name] = reason
        else:
            scores[name] = weight.float().abs().view(shape)
    if not scores:
        reasons = "; ".join(f"{name}: {why}" for name, why in dense.items()) or f"layers: {', '.join(found)}"
        raise ValueError(f"no layer of {file} to regroup ({reasons})")
    return scores, dense


def _regrouped(scores: Mapping[str, Tensor], made: Groups, args: argparse.Namespace) -> dict[str, Row]:
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    density = densities(
        shapes, args.sparsity, args.distribution, realise=lambda name, wish: made.density(shapes[name], wish)
    )
    rows = {}
    for name in _progress(scores, [score.numel() for score in scores.values()]):
        score, begin = scores[name], time.perf_counter()
        choice = made.choose(score, 1 - density[name], args.seed)
        seconds = time.perf_counter() - begin
        found = report_mask(choice, score, seed=args.seed).score
        assert choice.grouping is not None
        assert found is not None
        paper = found.retained
        if args.method != "paper":
            by_counts = replace(made, method="paper").choose(score, 1 - density[name], args.seed).grouping
            assert by_counts is not None
            paper = by_counts.retained(score)
        rows[name] = Row(choice.grouping, found, paper, seconds)
    return rows


def _regroup_table(rows: Mapping[str, Row], method: str) -> str:
    lines = [["layer", "K x C x R x S", "groups", "channels", "taps", "kept%", "retained: paper", "ours", "of unstr.",
              "efficacy", "seconds"]]  # fmt: skip

    def end(score: Score, paper: float, seconds: float) -> list[str]:
        ours = "-" if method == "paper" else f"{score.retained:.4f}"
        efficacy = "-" if score.efficacy is None else f"{score.efficacy:.3f}"
        return [f"{paper:.4f}", ours, f"{score.of_unstructured:.4f}", efficacy, f"{seconds:.2f}"]

    for name, row in rows.items():
        g = row.grouping
        k, c, r, s = g.shape
        sizes = [f"{k}x{c}x{r}x{s}", f"{g.groups} x {g.rows}", f"{g.channels.shape[1]}", f"{g.taps.shape[1]}"]
        lines.append([name, *sizes, f"{100 * g.density:.2f}", *end(row.score, row.paper, row.seconds)])
    if len(rows) > 1:
        score, paper, density, seconds = _totals(rows)
        cells = sum(math.prod(row.grouping.shape) for row in rows.values())
        lines.append(["all", f"{cells:,}", "", "", "", f"{100 * density:.2f}", *end(score, paper, seconds)])
    return columns(lines)


def _totals(rows: Mapping[str, Row]) -> tuple[Score, float, float, float]:
    """Score, the paper's share of it, density, seconds."""
    score = total_score([row.score for row in rows.values()])
    assert score is not None
    paper = sum(row.paper * row.score.total for row in rows.values()) / score.total if score.total else 1.0
    cells = [math.prod(row.grouping.shape) for row in rows.values()]
    kept = sum(row.grouping.density * n for row, n in zip(rows.values(), cells, strict=True))
    return score, paper, kept / sum(cells), sum(row.seconds for row in rows.values())


def _score_json(score: Score) -> dict[str, float | None]:
    return {"retained": score.retained, "of_unstructured": score.of_unstructured, "efficacy": score.efficacy}


def _regroup_json(rows: Mapping[str, Row], dense: Mapping[str, str]) -> dict[str, Any]:
    score, paper, density, seconds = _totals(rows)
    total = {"density": density, "retained_by_paper": paper, "seconds": seconds, **_score_json(score)}
    return {"layers": {name: row.as_json() for name, row in rows.items()}, "total": total, "left_dense": dict(dense)}


# ---------------------------------------------------------------------- info


def add_info(commands: Commands) -> None:
    """The command `info` and its options."""
    parser = commands.add_parser(
        "info", help="which masks a file's weights have; what a network looks like", description=INFO,
        epilog=INFO_END, formatter_class=_Raw,
    )  # fmt: skip
    add = parser.add_argument
    add("file", type=parsing.path, metavar="FILE", help=f"a file of weights, or one of {', '.join(NETWORKS)}")
    add(
        "--like",
        type=parsing.path,
        metavar="FILE",
        help="for checkpoints of BSR layers: dense weights or a network with their shapes",
    )
    add("--width", type=float, default=1.0, help="of a network: times its published channels, default 1")
    add("--classes", type=parsing.positive, default=10, help="of a network, default 10")
    add("--image-size", type=parsing.positive, default=32, help="of a network; it decides its first layer, default 32")
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    """A file's masks, or a network's layers."""
    if (network := _network_named(args.file)) is not None:
        print(_network_table(_build(network, args)))
        return 0
    tensors = read_weights(args.file)
    sparse, plain = sparse_names(tensors), layers(tensors)
    shapes = {} if args.like is None else _shapes(args.like, args)
    reports: dict[str, MaskReport] = {}
    unknown, chance = [], {}  # zeros in dense weights
    for name in _in_order(tensors, [*sparse, *plain]):
        if name in plain:
            weight, whole = plain[name], tensors.get(f"{name}.weight")
            masked = whole is not None and weight.dtype == torch.bool
            kind = whole if whole is not None and masked else weight
            mask = weight if weight.dtype == torch.bool else kept_of(weight)
            if mask.all() and (zeros := int((weight == 0).sum())):
                chance[name] = zeros
            report = report_mask(mask, dtype=kind.dtype if kind.is_floating_point() else torch.float32)
            reports[name] = under_a_mask(report) if masked else report
        elif name in shapes:
            pattern = sparse_layer(tensors, name, shapes[name])
            values = tensors[f"{name}.values" if name else "values"]
            reports[name] = report_mask(stored_blocks(pattern), dtype=values.dtype)
        else:
            unknown.append(name)
    if not reports and not unknown:
        raise ValueError(f"{args.file} has no weights of convolutions or linear layers ([K, C, R, S] or [K, C])")
    if reports:
        print(table(reports))
    if chance:
        listed = ", ".join(f"{name} ({zeros})" for name, zeros in chance.items())
        print(f"\nzeros in dense weights, taken for chance: {listed}")
    if unknown:
        print(("\n" if reports else "") + _unknown_table(tensors, unknown))
    return 0


def _in_order(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """Layer names in the order of the file."""
    place = {name: at for at, name in enumerate(tensors)}

    def first(name: str) -> int:
        return min((at for key, at in place.items() if key == name or key.startswith(f"{name}.")), default=0)

    return sorted(names, key=first)


def _shapes(like: str, args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    if (network := _network_named(like)) is not None:
        return {name: tuple(weight.shape) for name, weight in layers(_build(network, args).state_dict()).items()}
    return {name: tuple(weight.shape) for name, weight in layers(read_weights(like)).items()}


def _unknown_table(tensors: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """What a checkpoint tells of BSR layers on its own: all but the numbers of channels and taps."""
    lines = [["BSR layer", "filters", "blocks", "blocksize", "kB"]]
    for name in names:
        prefix = f"{name}." if name else ""
        values, indptr = tensors[prefix + "values"], tensors[prefix + "indptr"]
        if values.dim() != 3 or indptr.dim() != 1:
            raise ValueError(f"{prefix}values is {tuple(values.shape)}; a BSR layer needs (nnzb, bk, bc)")
        nnzb, bk, bc = values.shape
        parts = (tensors.get(prefix + part) for part in ("values", "indptr", "indices", "row_order"))
        size = sum(t.numel() * t.itemsize for t in parts if t is not None)
        lines.append([name, f"{(len(indptr) - 1) * bk}", f"{nnzb}", f"{bk}x{bc}", f"{size / 1e3:.1f}"])
    return columns(lines) + "\nThe file has no shapes of these layers; --like DENSE_FILE or --like NETWORK tells more."


def _network_named(text: str) -> str | None:
    """The network of this name, in any case; None: it is that of a file."""
    return text.lower() if text.lower() in NETWORKS and not Path(text).exists() else None


def _build(name: str, args: argparse.Namespace) -> torch.nn.Module:
    with torch.device("meta"):  # shapes alone
        return build(name, classes=args.classes, width=args.width, image_size=args.image_size)


def _network_table(model: torch.nn.Module) -> str:
    lines = [["layer", "type", "shape", "parameters"]]
    for name, module in model.named_modules():
        if own := list(module.parameters(recurse=False)):
            shape = "x".join(map(str, own[0].shape))
            lines.append([name, type(module).__name__, shape, f"{sum(p.numel() for p in own):,}"])
    lines.append(["all", "", "", f"{parameter_count(model):,}"])
    return columns(lines, left=(0, 1))


# ---------------------------------------------------------------------- files and progress


def _check_writable(path: str | None) -> None:
    """Before the work, not after it."""
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"{path}: a folder; it needs a file name")
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist")
    try:
        with tempfile.TemporaryFile(dir=Path(path).resolve().parent):
            pass
    except OSError as error:
        raise ValueError(f"{path}: its folder cannot be written to ({error.strerror})") from error


def _progress(names: Iterable[str], work: Sequence[int]) -> Iterator[str]:
    """Each name, announced on stderr with the time that is left; a terminal shows one line."""
    begin, same_line = time.perf_counter(), sys.stderr.isatty()
    for at, name in enumerate(names):
        done = sum(work[:at])
        left = (time.perf_counter() - begin) / done * sum(work[at:]) if done else None
        text = f"[{at + 1}/{len(work)}] {name}" + ("" if left is None else f", about {left:.0f} s left")
        print(f"\r\033[K{text}" if same_line else text, end="" if same_line else "\n", file=sys.stderr, flush=True)
        yield name
    if same_line:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
