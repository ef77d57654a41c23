"""What can be asked for on the command line, and what --help teaches."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch

import blocksparse as bs
import machine
from layers import NETS, parse_layer
from measure import Options
from patterns import Structure, parse_blocksize
from rows import KINDS, TOTAL
from timing import Rounds

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

DESCRIPTION = """\
Times block-sparse convolutions (forward, input gradient, weight gradient) against the best dense convolution
of the same layer, in one interleaved run, each case first checked against float64.

  python bench/run.py --layer resnet50
  python bench/run.py --layer resnet50.layer2.3x3 256,256,3,1,14 --sparsity 0.8 0.95 --blocksize 16x16 32x32
  python bench/run.py --layer resnet32 --structure hrbp --tap-density 4/9 --kind total
  python bench/run.py --layer vgg19 --device cuda --dtype bf16 --backend triton --json vgg19.json
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

words in place of numbers
  FAIL      the result differs from the dense float64 convolution by more than twice PyTorch's own error in the
            same dtype plus a floor for rounding (largest and RMS error); no time is given
  refused   no such pattern or backend for this layer, with the reason
  error     the call raised
  n/a       does not apply, or could not be measured honestly

Caches are cold: a buffer larger than the last-level cache is read before every repetition, untimed. A memory
layout that took 1.5 times as long as the other after the least number of rounds gets no further ones.
Exit status: 0; 1 if a check failed or nothing was timed; 2 for wrong options; 130 if interrupted.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, device-dependent defaults filled in, `layers` and `blocks` parsed; wrong ones end the program."""
    parser = _parser()
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench/run.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--layer",
        nargs="+",
        action="extend",
        metavar="LAYER",
        help="a network (all its convolutions but the stem): resnet50 at 224x224, resnet32 (the HRBP paper's"
        " WideResNet-32-2) or vgg19 at 32x32; one layer of those, such as resnet50.layer2.3x3; or C,K,R,stride,H"
        " with padding R//2 (R may be RxS, H may be HxW); several allowed",
    )
    add("--list", action="store_true", help="print the layers of all networks and end")
    add(
        "--backend",
        nargs="+",
        default=["auto"],
        choices=("auto", *bs.available_backends()),
        help="auto lets the library choose (default); one named here runs or is refused; several allowed",
    )
    add("--sparsity", nargs="+", type=_sparsity, default=[0.9], help="1 - density, default 0.9; several allowed")
    add(
        "--blocksize",
        nargs="+",
        metavar="BKxBC",
        help="32x32, 16x8 ...; group: equal groups with all taps, K/groups x 1; groupx8: the same with channels in"
        " runs of 8; several allowed (default: group 32x32 on a CPU, 32x32 groupx8 on a GPU)",
    )
    add(
        "--structure",
        choices=("block", "hrbp"),
        default="block",
        help="block: random blocks (default); hrbp: equal groups, each with random channels and random taps of its"
        " own; BKxBC then says how a group is cut into blocks (default: group)",
    )
    add("--groups", type=_positive, default=8, help="of hrbp and group: how many at most, 8 filters or more each")
    add("--tap-density", type=_fraction, default=Fraction(1), help="of hrbp: share of the taps kept, 1 or 4/9")
    add("--dtype", choices=tuple(DTYPES), help="default: fp32 on a CPU, fp16 on a GPU")
    add("--batch", type=_positive, help="images; default: 8 on a CPU, 64 on a GPU")
    add(
        "--kind",
        choices=(*KINDS, "all", TOTAL),
        default="all",
        help="all: the three kinds and their total (default); total: runs all three, prints one row a pattern",
    )
    add("--device", type=machine.device, help="cpu, cuda or cuda:1; default: cuda if there is one")
    add(
        "--seconds",
        type=machine.seconds,
        default=140.0,
        help="spread repetitions over about so long (default 140), but no fewer than 3 rounds (GPU: 10)",
    )
    add("--repeats", type=_positive, help="exactly so many rounds of every layer instead")
    add("--quick", action="store_true", help="3 rounds of every layer, however long that takes: a first look")
    add("--seed", type=int, default=0, help="of patterns and tensors")
    add("--json", type=Path, metavar="FILE", help="write every row, every repetition and the machine to FILE")
    add("--plot", type=Path, metavar="FILE", help="draw the speed-ups to FILE (.png, .svg, .pdf); needs matplotlib")
    return parser


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _fraction(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction in (0, 1], such as 4/9")
    return value


def _complete(args: argparse.Namespace) -> None:
    """Defaults that depend on the device; ValueError for what this machine cannot do."""
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = args.device.type == "cuda"
    if on_gpu and args.device.index is None:
        args.device = torch.device("cuda", torch.cuda.current_device())
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
    for option, path in (("json", args.json), ("plot", args.plot)):
        if path is not None and path.is_dir():
            raise ValueError(f"--{option} {path}: it is a folder; it needs a file name")
        if path is not None and not os.access(next(p for p in path.resolve().parents if p.exists()), os.W_OK):
            raise ValueError(f"--{option} {path}: its folder cannot be written to")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'blocksparse-conv[plot]'")


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
        tf32=args.dtype == "tf32",
        kinds=KINDS if args.kind in ("all", TOTAL) else (args.kind,),
        report=(*KINDS, TOTAL) if args.kind == "all" else (args.kind,),
        blocksizes=tuple(dict.fromkeys(args.blocks)),
        sparsities=tuple(dict.fromkeys(args.sparsity)),
        backends=tuple(None if name == "auto" else name for name in dict.fromkeys(args.backend)),
        structure=Structure(args.structure, args.groups, args.tap_density),
        rounds=rounds,
        seed=args.seed,
    )
