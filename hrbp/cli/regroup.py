"""python -m hrbp regroup: groups of filters for trained weights, and the score that they keep."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from blocksparse import bank_shape

from ..columns import columns
from ..density import densities
from ..formats.weights import layers, read_weights, write_groupings
from ..progress import Progress, duration
from ..reports.mask_report import report_mask
from ..reports.picture import check_plot, draw_grouping
from ..reports.score import Score, total_score
from ..structures.grouping import RULES, Grouping, GroupOptions
from ..structures.groups import Groups
from ..structures.registry import structure
from . import parsing

FEWEST_CHANNELS = 4  # layers with no more input channels are stems and depthwise convolutions

REGROUP = """\
Chooses groups of filters that share input channels (hrbp) and kernel offsets (hrbp++) by the magnitudes of trained
weights, and reports the score that each layer keeps.

  python -m hrbp regroup model.pt
  python -m hrbp regroup model.safetensors --sparsity 0.95 --distribution uniform --structure hrbp
  python -m hrbp regroup model.npz --granule 8 --layers 'layer[34]' --save groups.npz
  python -m hrbp regroup model.pt --layer layer3.0.conv2 --picture mask.png
"""

REGROUP_END = """\
columns
  groups, channels, taps   groups x filters in each; input channels and kernel offsets that each group keeps
  cover      groups x channels / input channels: below 1 some channels are read by no filter
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


def add_regroup(commands: parsing.Commands) -> None:
    """The command `regroup` and its options."""
    parser = commands.add_parser(
        "regroup", help="what groups keep of trained weights", description=REGROUP, epilog=REGROUP_END,
        formatter_class=parsing.AS_WRITTEN,
    )  # fmt: skip
    add = parser.add_argument
    add("file", type=parsing.path, metavar="FILE", help="a state_dict (.pt, .pth, ...), .npz or .safetensors")
    add("--sparsity", type=parsing.number(0, 1, "[0, 1)"), default=0.9, help="share that is dropped, default 0.9")
    add("--distribution", choices=("erk", "uniform"), default="erk", help="of the layers' densities, default erk")
    add("--structure", choices=("hrbp++", "hrbp"), default="hrbp++", help="default hrbp++")
    kinds: dict[str, dict[str, Any]] = {
        "tap_density": {"type": parsing.share, "default": None},
        "row_granule": {"type": parsing.rows},
        "balanced": {"action": "store_true"},
        "method": {"choices": RULES},
    }
    more = {"tap_density": ", default 4/9 (hrbp: 1)", "row_granule": ", default 1; 'stay': not at all", "balanced": ""}
    for field in fields(GroupOptions):
        text = field.metadata["help"] + more.get(field.name, f", default {field.default}")
        kind = {"default": field.default, **kinds.get(field.name, {"type": parsing.positive})}
        add(f"--{field.name.replace('_', '-')}", help=text, **kind)
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
            "coverage": g.coverage,
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
    asked = {field.name: getattr(args, field.name) for field in fields(GroupOptions)}
    if asked["tap_density"] is None:
        del asked["tap_density"]  # that of the structure
    made = structure(args.structure, **asked)
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
        shape = bank_shape(weight.shape)
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
        shapes, args.sparsity, args.distribution, realise=lambda name, asked: made.density(shapes[name], asked)
    )
    rows = {}
    for name in _announced(scores, [score.numel() for score in scores.values()]):
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
    lines = [["layer", "K x C x R x S", "groups", "channels", "taps", "cover", "kept%", "retained: paper", "ours",
              "of unstr.", "efficacy", "seconds"]]  # fmt: skip

    def end(score: Score, paper: float, seconds: float) -> list[str]:
        ours = "-" if method == "paper" else f"{score.retained:.4f}"
        efficacy = "-" if score.efficacy is None else f"{score.efficacy:.3f}"
        return [f"{paper:.4f}", ours, f"{score.of_unstructured:.4f}", efficacy, f"{seconds:.2f}"]

    for name, row in rows.items():
        g = row.grouping
        k, c, r, s = g.shape
        sizes = [f"{k}x{c}x{r}x{s}", f"{g.groups} x {g.rows}", f"{g.channels.shape[1]}", f"{g.taps.shape[1]}"]
        shares = [f"{g.coverage:.2f}", f"{100 * g.density:.2f}"]
        lines.append([name, *sizes, *shares, *end(row.score, row.paper, row.seconds)])
    if len(rows) > 1:
        score, paper, density, seconds = _totals(rows)
        cells = sum(math.prod(row.grouping.shape) for row in rows.values())
        lines.append(["all", f"{cells:,}", "", "", "", "", f"{100 * density:.2f}", *end(score, paper, seconds)])
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


def _check_writable(path: str | None) -> None:
    """ValueError for a file that cannot be written: before the work starts."""
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


def _announced(names: Iterable[str], work: Sequence[int]) -> Iterator[str]:
    """Each name, shown on stderr as a running line with the time that is left."""
    begin, progress = time.perf_counter(), Progress(False, sys.stderr)
    for at, name in enumerate(names):
        done = sum(work[:at])
        left = (time.perf_counter() - begin) / done * sum(work[at:]) if done else None
        progress.show(f"[{at + 1}/{len(work)}] {name}" + ("" if left is None else f", about {duration(left)} left"))
        yield name
    progress.clear()
