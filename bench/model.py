"""python bench/model.py: how long layers would take on a GPU, as predicted; no GPU is needed. --help explains it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # started as a file: the checkout that it stands in is asked
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import blocksparse as bs
from bench.layers import norms, prediction
from bench.layers.networks import parse_layer
from bench.layers.patterns import Structure, parse_blocksize
from bench.layers.prediction import PredictedRow, Question, predict, totals
from bench.shared import machine, options
from bench.shared.results import Writer
from bench.shared.rows import OK
from blocksparse.kernels import counted, gpus
from blocksparse.layout import CHANNELS_LAST, FORMATS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}

DESCRIPTION = """\
Predicts, without a GPU, how long block-sparse convolutions (forward, input gradient, weight gradient) would take on
one: what `explain` says there, from instructions counted in compiled code, bytes, and the device's data sheet. These
are predictions, not measurements: no GPU has timed these kernels.

  python bench/model.py --layer resnet50 --gpu h200
  python bench/model.py --layer resnet50 --gpu h100 --blocksize 64x8 --density 0.05 0.1 0.2
  python bench/model.py --layer resnet50.layer3.3x3 --gpu h200 --structure hrbp --backend auto triton cupy torch
  python bench/model.py --layer resnet50 --gpu h100 --norms

It takes a few seconds.
"""

EPILOG = """\
columns
  blocks        the blocksize asked for: 32x32 is 32 filters by 32 channels; group is all filters of a group by one
                channel, groups keep equally many channels
  kept%         share of the weights that is stored
  backend       what would run: the one of least predicted time, or the one asked for
  predicted us  microseconds of the product, with every kernel that it launches
  bound by      the largest term: issue (of instructions), shared memory, tensor cores, L2, HBM, latency or launch
  dense us      PyTorch's own product of a dense weight in channels_last, predicted alike. The torch backend computes
                the same, and first makes that weight from the stored blocks: it is a few launches slower
  roofline us   what the device needs at least: x, y, values and index once through HBM, or useful FLOPs
  x dense       dense / predicted; allowed: dense / roofline
  least product the smallest of these for a single product

--norms: one BatchNorm in training behind each layer, with the sum and the ReLU that follow it in the network
  MB            that forward and backward read and write: of bs.batch_norm, and of PyTorch's operators one by one
  predicted us  of bs.batch_norm, from counted instructions and bytes; PyTorch us: from bytes alone

Exit status: 0; 1 if no pattern fits any layer; 2 for wrong options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts and prints; returns the exit status."""
    args = parse_arguments(argv)
    about = Question(
        args.gpu, args.batch, DTYPES[args.dtype], "tf32" if args.dtype == "tf32" else "ieee",
        Structure(args.structure, args.groups, args.tap_density), args.format,
    )  # fmt: skip
    version = ".".join(map(str, counted.triton_version()))
    print(
        f"PREDICTED for {args.gpu}, not measured: {args.dtype}, batch {args.batch}, {args.format}; Triton {version}\n"
    )
    print(prediction.head())
    facts = machine.describe(torch.device("cpu")) | {"predicted_for": args.gpu}
    writer = Writer("model", args, facts, "layers", "blocks")
    rows: list[PredictedRow] = []
    for layer in args.layers:
        new = [
            row
            for block in args.blocks
            for density in args.density
            for backend in args.backend
            for row in predict(layer, block, 1 - density, None if backend == "auto" else backend, about)
        ]
        print("\n".join(prediction.layer_lines(new)), flush=True)
        rows += new
    sums = totals(rows)
    if sums:
        print("\npredicted, the three products together, each layer as often as it occurs:")
        print("\n".join(prediction.total_lines(sums)))
    behind = norms.predict(args.layers, args.batch, DTYPES[args.dtype], args.gpu) if args.norms else []
    if behind:
        print("\npredicted, BatchNorm in training behind each layer, forward and backward:")
        print("\n".join(norms.lines(behind)))
    writer.write(rows, True, totals=[asdict(total) for total in sums], norms=[asdict(row) for row in behind])
    return 0 if any(row.status == OK for row in rows) else 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, `layers` and `blocks` parsed; wrong ones end the program."""
    parser = options.make_parser("model", DESCRIPTION, EPILOG)
    add = parser.add_argument
    options.add_layer(parser, required=True)
    add("--gpu", required=True, choices=tuple(gpus.NAMED), help="whose data sheet")
    add(
        "--backend", nargs="+", default=["auto"], choices=("auto", *bs.available_backends()),
        help="auto lets the library choose (default); several allowed",
    )  # fmt: skip
    add(
        "--density", nargs="+", type=options.density, default=[0.1],
        help="share of the weights that is kept, default 0.1; several allowed",
    )  # fmt: skip
    options.add_pattern(parser, "default: 32x32 64x8; of hrbp: group")
    add("--dtype", choices=tuple(DTYPES), default="fp16")
    add("--batch", type=options.positive, default=64, help="images, default 64")
    add("--norms", action="store_true", help="also BatchNorm, sum and ReLU behind the layers")
    add("--format", choices=FORMATS, default=CHANNELS_LAST, help="memory format of x and dy (default channels_last)")
    options.add_json(parser)
    args = parser.parse_args(argv)
    try:
        options.check_file("--json", args.json)
        args.layers = list(dict.fromkeys(layer for spec in args.layer for layer in parse_layer(spec)))
        blocks = args.blocksize or (["group"] if args.structure == "hrbp" else ["32x32", "64x8"])
        args.blocks = [parse_blocksize(text) for text in blocks]
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
