"""python bench/run.py: block-sparse convolutions timed against the best dense ones. --help explains all of it."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the checkout that it stands in is measured
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import blocksparse as bs
from bench.layers import plot, report
from bench.layers.measure import LayerBench, Options
from bench.layers.networks import CHOSEN, NETS, Layer, parse_layer
from bench.layers.patterns import Structure, parse_blocksize
from bench.layers.rows import KINDS, TOTAL, LayerRow, Total, spread, totals
from bench.shared import machine, options
from bench.shared.ceilings import Ceilings, measure_ceilings
from bench.shared.clocks import Rounds, make_clock
from bench.shared.memory import make_memory
from bench.shared.results import Writer
from bench.shared.rows import ERROR, FAIL, OK
from bench.shared.schedule import Schedule
from blocksparse.kernels import measured
from hrbp.columns import columns
from hrbp.files import write_json
from hrbp.reports.picture import check_plot

UNSTEADY = 1.6  # a layer whose laps spread so much is measured again; a quiet machine shows 1.1 to 1.3

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

DESCRIPTION = """\
Times block-sparse convolutions (forward, input gradient, weight gradient) against the best dense convolution
of the same layer, in one interleaved run, each case first checked against float64.

  python bench/run.py --layer resnet50
  python bench/run.py --layer resnet50.layer2.3x3 256,256,3,1,14 --sparsity 0.8 0.95 --blocksize 16x16 32x32
  python bench/run.py --layer resnet32 --structure hrbp --tap-density 4/9 --kind total
  python bench/run.py --layer vgg19 --device cuda --dtype bf16 --backend triton --json vgg19.json

The first takes about 3 minutes on two cores: one for the checks, and --seconds for the repetitions.
"""

EPILOG = """\
columns
  blocks    the blocksize asked for: 32x32 is 32 filters by 32 channels; group is all filters of a group by one
            channel, groups keep equally many channels
  kept%     share of the weights that is stored (whole blocks, one at least, cannot always meet --sparsity)
  backend   what ran; layout is the memory format of x and dy, the faster one over all kinds
  kind      fprop; dgrad, the gradient of x; wgrad, the gradient of the stored values; total, the three of each
            round added up
  ms        20th, 50th and 80th percentile of the repetitions; on a GPU the time of the device, not of Python
  FLOP/s    useful ones, multiplications with stored weights, per p50 (GFLOP/s on a CPU, TFLOP/s on a GPU)
  roof%     the time that this machine needs at least, as a share of p50: the larger of useful FLOPs / matmul
            ceiling and bytes / copy ceiling, both measured at the start of the run; bytes are x, y, values and
            index once each (a CPU without fast fp16 or bf16 is held to its fp32 matmul)
  peak%     useful FLOP/s as a share of what this machine's multiply-adds reach alone, measured at the start
  x dense   p50 of PyTorch's dense convolution / sparse p50: above 1, sparse is faster. Dense is the faster of
            contiguous and channels_last for each kind, its total the sum of those (sparse keeps one layout);
            with cuDNN's benchmark mode; gradients are timed alone (convolution_backward)
  x group   likewise over gather + grouped convolution, where all groups of filters keep equally many channels;
            its dgrad scatter-adds, its wgrad reads the gathered input that the forward pass saved
  x bsr     likewise over torch.sparse_bsr @ x: fprop of 1x1 with stride 1, blocks that PyTorch supports
  x narrow  likewise over a dense layer of equal FLOPs, with fewer channels in and out
  extra MB  peak memory during the call beyond inputs and outputs (GPU: PyTorch's allocator; CPU: resident
            memory, Linux only); total is the largest of the three
  pred ms   on a GPU: what `explain` predicted; err%: predicted / measured - 1, below 0 where it was slower

words in place of numbers
  FAIL      the result differs from the dense float64 convolution by more than twice PyTorch's own error in the
            same dtype plus a floor for rounding (largest and RMS error); no time is given
  refused   no such pattern or backend for this layer, with the reason
  error     the call raised
  n/a       does not apply, or could not be measured

Caches are cold: a buffer larger than the last-level cache is read before every repetition, untimed. Memory that is
freed is kept for the next results (blocksparse.keep_freed_memory), as in every program of this library. A memory
layout that took 1.5 times as long as the other after the least number of rounds gets no further ones. Layers at which
the machine was busy with something else (p80 is over 1.6 times p20) are measured once more at the end, beyond
--seconds; the steadier measurement counts, or the one in which a check failed.
Exit status: 0; 1 if a check failed or nothing was timed; 2 for wrong options; 130 if interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments(argv)
    if args.list:
        layers = [layer for net in NETS.values() for layer in net()]
        print(columns([[layer.full_name, str(layer), f"{layer.count} x"] for layer in layers], left=(0, 1)))
        return 0
    if argv is None:  # the process is this program's
        bs.keep_freed_memory()
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
    begin = time.perf_counter()
    if args.device.type == "cuda":
        machine.set_up_gpu(args.device, args.dtype == "tf32")
    asked, clock, facts = make_options(args), make_clock(args.device), machine.describe(args.device)
    ceilings = measure_ceilings(clock, args.device, asked.dtype)
    print("\n".join(report.head_lines(facts, args.dtype, args.batch, ceilings)), flush=True)
    bench = LayerBench(asked, clock, make_memory(args.device), ceilings)
    writer = Writer("run", args, facts, "layers", "blocks", "list")

    def keep(rows: list[LayerRow], finished: bool = False, after: Ceilings | None = None) -> None:
        """What there is goes to the file after each layer: a run that is killed loses nothing."""
        found = {"at_start": vars(ceilings), "at_end": vars(after) if after else None}
        sums = [total.as_json() for total in totals(rows)]
        writer.write(rows, finished, ceilings=found, totals=sums)

    rows, finished = run_layers(bench, args.layers, begin + args.seconds, keep)
    after = measure_ceilings(clock, args.device, asked.dtype)
    print_end(rows, totals(rows), args, ceilings, after, time.perf_counter() - begin)
    keep(rows, finished, after)
    if args.keep:
        name, precision = torch.cuda.get_device_name(args.device), "tf32" if args.dtype == "tf32" else "ieee"
        print(
            f"times that explain and the choice of a backend go by: {keep_products(rows, asked.dtype, precision, name)}"
        )
    if args.plot and rows:
        plot.plot(args.plot, plot.bars(rows), f"{facts['device']}, {args.dtype}, batch {args.batch}")
    if not finished:
        return 130
    return 1 if failed(rows) or not any(row.status == OK for row in rows) else 0


def run_layers(
    bench: LayerBench, layers: list[Layer], end: float, keep: Callable[[list[LayerRow]], None]
) -> tuple[list[LayerRow], bool]:
    """(rows, finished): measures, prints and keeps one layer after another; an interrupt keeps what there is."""
    found: dict[Layer, list[LayerRow]] = {}
    begin, fixed = time.perf_counter(), bench.options.rounds.least == bench.options.rounds.most

    def all_rows() -> list[LayerRow]:
        return [row for rows in found.values() for row in rows]

    def measure(some: list[Layer], end: float) -> None:
        schedule = Schedule([work_of(layer) for layer in some], end, fixed)
        try:
            for at, layer in enumerate(some):
                schedule.start(at, layer.full_name)
                rows = bench.run(layer, partial(schedule.deadline, at))
                schedule.clear()
                print("\n".join(report.layer_lines(rows, bench.options.device.type == "cuda")), flush=True)
                found[layer] = min(found.get(layer, rows), rows, key=lambda rows: (not failed(rows), spread(rows)))
                keep(all_rows())
        finally:
            schedule.clear()

    finished = True
    try:
        measure(layers, end)
        again = [layer for layer, rows in found.items() if spread(rows) > UNSTEADY and not fixed]
        if again:
            print(f"\nonce more, since the machine was not steady: {', '.join(layer.full_name for layer in again)}")
            share = sum(map(work_of, again)) / sum(map(work_of, layers))
            measure(again, time.perf_counter() + share * (end - begin))
    except KeyboardInterrupt:
        print("\ninterrupted: what follows covers the layers above only", flush=True)
        finished = False
    return all_rows(), finished


def failed(rows: list[LayerRow]) -> bool:
    """Whether a result was wrong, or could not be computed."""
    return any(row.status in (FAIL, ERROR) for row in rows)


def timed_products(rows: list[LayerRow], dtype: torch.dtype, precision: str) -> list[dict[str, Any]]:
    """What blocksparse/kernels/measured.py keeps of the rows: facts and seconds of each product that was timed."""
    found = []
    for row in rows:
        if row.kind == TOTAL or row.p50 is None or row.backend is None or row.nnzb is None or row.blocksize is None:
            continue
        g, last = bs.ConvGeometry.of(row.x_shape, row.shape, row.stride, row.padding), row.variant == "channels_last"
        facts = measured.facts(row.backend, row.kind, g, row.blocksize, row.nnzb, dtype, precision, last)
        found.append(facts | {"seconds": 1e-3 * row.p50})
    return found


def keep_products(rows: list[LayerRow], dtype: torch.dtype, precision: str, device: str) -> Path:
    """Adds them to the device's table; returns its path."""
    path = measured.path_of(device)
    path.parent.mkdir(exist_ok=True)
    write_json(path, measured.merged(device, timed_products(rows, dtype, precision)))
    return path


def work_of(layer: Layer) -> float:
    """A guess at how long a round takes, in any unit: FLOPs, 50 for each activation, and an overhead."""
    activations = math.prod(layer.x_shape(1)) + math.prod(layer.y_shape(1))
    return layer.flops(1) + 50.0 * activations + 5e6


def print_end(
    rows: list[LayerRow], sums: list[Total], args: argparse.Namespace, before: Ceilings, after: Ceilings, seconds: float
) -> None:
    """Sums of every network, the conclusions, and whether the machine was steady."""
    for net in dict.fromkeys(total.net for total in sums):
        if net != CHOSEN or len({row.layer for row in rows if row.net == net}) > 1:
            print("\n".join(report.total_lines([t for t in sums if t.net == net], args.device.type == "cuda")))
    print()
    print("\n".join(report.conclusions(sums, args.batch)))
    print(f"{report.drift(before, after)} The run took {seconds:.0f} s.")


# ---------------------------------------------------------------- options


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, device-dependent defaults filled in, `layers` and `blocks` parsed; wrong ones end the program."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list:
        return args
    if not args.layer:
        parser.error(f"--layer is needed: {', '.join(NETS)}, one layer of those (--list), or C,K,R,stride,H")
    try:
        args.layers = list(dict.fromkeys(layer for spec in args.layer for layer in parse_layer(spec)))
        _complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = options.make_parser("run", DESCRIPTION, EPILOG)
    add = parser.add_argument
    options.add_layer(parser)
    add("--list", action="store_true", help="print the layers of all networks and end")
    add(
        "--backend",
        nargs="+",
        default=["auto"],
        choices=("auto", *bs.available_backends()),
        help="auto lets the library choose (default); one named here runs or is refused; several allowed",
    )
    add("--sparsity", nargs="+", type=options.sparsity, default=[0.9], help="1 - density, default 0.9; several allowed")
    options.add_pattern(parser, "default: group 32x32 on a CPU, 32x32 groupx8 on a GPU; of hrbp: group")
    add("--dtype", choices=tuple(DTYPES), help="default: fp32 on a CPU, fp16 on a GPU")
    add("--batch", type=options.positive, help="images; default: 8 on a CPU, 64 on a GPU")
    add(
        "--kind",
        choices=(*KINDS, "all", TOTAL),
        default="all",
        help="all: the three kinds and their total (default); total: runs all three, prints one row a pattern",
    )
    options.add_device(parser)
    options.add_time(parser, 140.0, "3 rounds of every layer (GPU: 10)")
    add("--repeats", type=options.positive, help="exactly so many rounds of every layer instead")
    add("--seed", type=int, default=0, help="of patterns and tensors")
    options.add_json(parser)
    add(
        "--keep",
        action="store_true",
        help="on a GPU: add the times to blocksparse/kernels/measured, where they override the predictions that choose"
        " a backend; with --backend torch triton cupy, so that all of them are known",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the speed-ups to FILE (.png, .svg, .pdf); needs matplotlib")
    return parser


def _complete(args: argparse.Namespace) -> None:
    """Defaults that depend on the device; ValueError for what this machine cannot do."""
    options.complete(args)
    on_gpu = args.device.type == "cuda"
    args.dtype = args.dtype or ("fp16" if on_gpu else "fp32")
    if args.dtype == "tf32" and not on_gpu:
        raise ValueError("--dtype tf32: it needs a CUDA device; a CPU computes fp32")
    args.batch = args.batch or (64 if on_gpu else 8)
    if args.blocksize is None:
        by_device = ["32x32", "groupx8"] if on_gpu else ["group", "32x32"]
        args.blocksize = ["group"] if args.structure == "hrbp" else by_device
    args.blocks = [parse_blocksize(text) for text in args.blocksize]
    absent = bs.available_backends()
    for name in args.backend:
        if name != "auto" and absent[name] is not None:
            raise ValueError(f"--backend {name} cannot run here: {absent[name]}")
    if args.keep and not on_gpu:
        raise ValueError("--keep: it keeps times of GPU kernels, and --device is cpu")
    if args.plot:
        check_plot(args.plot)


def make_options(args: argparse.Namespace) -> Options:
    """What LayerBench needs to know."""
    rounds = Rounds(3, 50) if args.device.type == "cpu" else Rounds(10, 200)
    if args.repeats or args.quick:
        exactly = args.repeats or 3
        rounds = Rounds(exactly, exactly)
    return Options(
        batch=args.batch,
        dtype=DTYPES[args.dtype],
        device=args.device,
        kinds=KINDS if args.kind in ("all", TOTAL) else (args.kind,),
        report=(*KINDS, TOTAL) if args.kind == "all" else (args.kind,),
        blocksizes=tuple(dict.fromkeys(args.blocks)),
        sparsities=tuple(dict.fromkeys(args.sparsity)),
        backends=tuple(None if name == "auto" else name for name in dict.fromkeys(args.backend)),
        structure=Structure(args.structure, args.groups, args.tap_density),
        rounds=rounds,
        seed=args.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
