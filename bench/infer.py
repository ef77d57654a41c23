"""python bench/infer.py: images a second of a whole network, sparse against dense. --help explains all of it."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the checkout that it stands in is measured
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import hrbp
from bench.layers.patterns import parse_blocksize
from bench.shared import machine, options
from bench.shared.clocks import Rounds, interleave, make_step_clock
from bench.shared.equal import NETWORK_ALLOWED, network_error
from bench.shared.results import Writer
from bench.shared.rows import ABSENT, ERROR, FAIL, Row, Times, ratio
from bench.shared.tables import number, percentiles, table
from blocksparse import keep_freed_memory
from hrbp.progress import Progress

DESCRIPTION = """\
Times inference with a whole network: a sparse one, as it is and fused (hrbp.fuse: BatchNorms folded, ReLUs and residual
sums in the convolutions), against a dense one of the same sizes, in every way that PyTorch offers, in one interleaved
run. The output of every way is first compared with that of the plain network of the same weights.

  python bench/infer.py                                            # ResNet-50, 90% sparse, one image
  python bench/infer.py --threads 1 --batch 8 --structure block --blocksize 8x8
  python bench/infer.py --network mobilenetv1 --json infer.json
  python bench/infer.py --network resnet8 --no-compile --quick     # a first look: ten seconds

With its defaults it takes about 4 minutes: one to compile, the rest is --seconds.
"""

EPILOG = """\
ways
  eager     the network as it is, in eval mode, without gradients
  folded    dense, BatchNorms folded into the convolutions (hrbp.fuse)
  fused     sparse, what hrbp.fuse makes of it
  compiled  the same through torch.compile (inductor)
  onnx      dense and folded, in ONNX Runtime: pip install 'blocksparse-conv[bench]'

columns
  ms        20th, 50th and 80th percentile of a batch
  images/s  batch / p50
  x dense   p50 of PyTorch's fastest dense way / p50 of this one: above 1, this way is faster

words in place of numbers
  FAIL      the output differs from the plain network's by more than rounding; no time is given
  error     the way could not be made or run
  n/a       what it needs is not installed, or it does not run on this device

Weights are drawn at random and statistics of the norms too: time does not depend on them, and the comparison of outputs
sees all of them. Caches are cold: a buffer larger than the last-level cache is read before every repetition, untimed.
Freed memory is kept for the next results (blocksparse.keep_freed_memory).
Exit status: 0; 1 if a way failed or nothing was timed; 2 for wrong options; 130 if interrupted.
"""

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGE_SIZES = {"resnet18": 224, "resnet50": 224, "mobilenetv1": 224, "mobilenetv2": 224}  # others: 32
DENSE, SPARSE = "dense", "sparse"
MODES = {DENSE: ("eager", "folded", "compiled"), SPARSE: ("eager", "fused", "compiled")}


@dataclass(kw_only=True)
class InferRow(Row):
    """A network and a way to run it; its memory format is the row's variant."""

    network: str
    weights: str  # dense or sparse
    mode: str
    images_per_second: float | None = None
    speedup: float | None = None  # over PyTorch's fastest dense way


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments(argv)
    if argv is None:  # the process is this program's
        keep_freed_memory()
    begin = time.perf_counter()
    threads = torch.get_num_threads()
    rows: list[InferRow] = []
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.device.type == "cuda":
            machine.set_up_gpu(args.device, tf32=True)
        facts = machine.describe(args.device)
        writer = Writer("infer", args, facts)
        print(f"{facts['device']}, {facts['threads']} threads; torch {facts['torch']}; fp32", flush=True)
        fusion = measure(args, rows, begin + args.seconds)
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
        return 130
    finally:
        torch.set_num_threads(threads)
    print("\n".join(lines(rows, args)), flush=True)
    print(f"sparse, {fusion}")
    writer.write(rows, complete=True)
    return 1 if any(row.status in (FAIL, ERROR) for row in rows) or not any(row.times for row in rows) else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.make_parser("infer", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--network", choices=tuple(hrbp.models.NETWORKS), default="resnet50", help="default: resnet50")
    add("--image-size", type=options.positive, help="default: 224 for ImageNet's networks, 32 for CIFAR's")
    add("--batch", type=options.positive, default=1, help="images; default: 1")
    add("--sparsity", type=options.share, default=0.9, help="of the layers made sparse; default: 0.9")
    add("--structure", choices=tuple(hrbp.STRUCTURES), default="hrbp", help="of the stored weights; default: hrbp")
    add("--blocksize", metavar="BKxBC", help="of --structure block: 32x32 (its default), 8x8, 4x4 ...")
    add("--distribution", choices=("erk", "uniform"), default="uniform", help="how densities differ between layers")
    add("--threads", type=options.positive, help="of PyTorch and ONNX Runtime; default: PyTorch's own number")
    add("--no-compile", action="store_true", help="leave torch.compile out: a first look without a minute of compiling")
    options.add_device(parser)
    options.add_time(parser, 180.0, "3 of each; compiling counts")
    options.add_json(parser)
    args = options.parsed(parser, argv)
    args.image_size = args.image_size or IMAGE_SIZES.get(args.network, 32)
    args.structure_options = {}
    if args.blocksize is not None:
        if args.structure != "block":
            parser.error(f"--blocksize {args.blocksize}: of --structure block alone, not of {args.structure}")
        try:
            block = parse_blocksize(args.blocksize)
        except ValueError as error:
            parser.error(str(error))
        if block.bk is None:
            parser.error(f"--blocksize {args.blocksize}: it needs BKxBC, such as 8x8")
        args.structure_options = {"blocksize": (block.bk, block.bc)}
    return args


# ---------------------------------------------------------------- one network


def measure(args: argparse.Namespace, rows: list[InferRow], deadline: float) -> Any:
    """Fills `rows`, one a way; what was fused in the sparse network."""
    torch.manual_seed(0)
    dense = settled(hrbp.models.build(args.network, classes=1000, image_size=args.image_size)).to(args.device)
    sparse = copy.deepcopy(dense)
    hrbp.sparsify(
        sparse,
        args.sparsity,
        structure=args.structure,
        distribution=args.distribution,
        saliency="random",
        **args.structure_options,
    )
    x = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    plain = {DENSE: dense, SPARSE: hrbp.densify(copy.deepcopy(sparse))}
    models = {(DENSE, "eager"): dense, (SPARSE, "eager"): sparse}
    models[DENSE, "folded"] = models[DENSE, "compiled"] = hrbp.fuse(dense)
    fused = models[SPARSE, "fused"] = models[SPARSE, "compiled"] = hrbp.fuse(sparse)
    calls: dict[int, Callable[[], Any]] = {}
    with torch.inference_mode():
        needed = {weights: model(x) for weights, model in plain.items()}
        for weights, modes in MODES.items():
            for mode in modes:
                for layout in FORMATS:
                    if mode != "compiled" or not args.no_compile:
                        make = call_of(models[weights, mode], x, layout, mode == "compiled")
                        row = InferRow(network=args.network, weights=weights, mode=mode, variant=layout)
                        _add(rows, calls, row, make, needed[weights])
        row = InferRow(network=args.network, weights=DENSE, mode="onnx", variant="contiguous")
        if why := onnx_absent(args.device):
            row.fail(ABSENT, why)
            rows.append(row)
        else:
            _add(rows, calls, row, lambda: onnx_call(models[DENSE, "folded"], x), needed[DENSE])
        rounds = Rounds(3, 3 if args.quick else 500)
        for at, laps in interleave(calls, make_step_clock(args.device), rounds, deadline).items():
            rows[at].times = Times.of(laps)
    compare(rows, args.batch)
    return fused.fusion


def _add(
    rows: list[InferRow],
    calls: dict[int, Callable[[], Any]],
    row: InferRow,
    make: Callable[[], Callable[[], Any]],
    needed: Tensor,
) -> None:
    rows.append(row)
    progress = Progress(quiet=False, stream=sys.stderr)
    progress.show(f"checking {row.weights} {row.mode} {row.variant}")
    try:
        call = make()
        call()
        got = torch.as_tensor(call(), device=needed.device)
    except Exception as error:  # one way that cannot run ends nothing
        row.fail(ERROR, error)
        return
    finally:
        progress.clear()
    off = network_error(got, needed)
    if not off <= NETWORK_ALLOWED:  # NaN too
        row.fail(FAIL, f"the output is off by {off:.3g} (allowed {NETWORK_ALLOWED})")
        return
    calls[len(rows) - 1] = call


def settled(model: nn.Module) -> nn.Module:
    """The network in eval mode, with statistics that change what it computes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.25)
    return model.eval()


def call_of(model: nn.Module, x: Tensor, layout: str, compiled: bool) -> Callable[[], Callable[[], Tensor]]:
    """What makes a call without arguments that returns the output."""

    def make() -> Callable[[], Tensor]:
        kept = copy.deepcopy(model).to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
        run = torch.compile(kept) if compiled else kept
        image = x.contiguous(memory_format=FORMATS[layout])
        return lambda: run(image)

    return make


def onnx_absent(device: torch.device) -> str | None:
    """Why ONNX Runtime is not timed, or None."""
    if device.type != "cpu":
        return "timed on a CPU alone"
    lacking = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    return f"no {' and '.join(lacking)}: pip install 'blocksparse-conv[bench]'" if lacking else None


def onnx_call(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A call of the network in ONNX Runtime, on as many threads as PyTorch has."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"])
        content = file.read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    image = x.numpy()
    return lambda: session.run(None, {"x": image})[0]


# ---------------------------------------------------------------- the table


def compare(rows: list[InferRow], batch: int) -> None:
    """Images a second, and speed-ups over PyTorch's fastest dense way."""
    dense = [row.p50 for row in rows if row.weights == DENSE and row.mode != "onnx" and row.p50 is not None]
    for row in rows:
        if row.p50 is not None:
            row.images_per_second = 1e3 * batch / row.p50
            row.speedup = ratio(min(dense, default=None), row.p50)


def lines(rows: list[InferRow], args: argparse.Namespace) -> list[str]:
    """The table."""
    blocks = f" {args.blocksize}" if args.blocksize else ""
    title = (
        f"{args.network}: batch {args.batch}, {args.image_size}x{args.image_size}, sparse:"
        f" {100 * args.sparsity:g}% {args.structure}{blocks} ({args.distribution})"
    )
    head = ["weights", "mode", "format", "ms p20", "p50", "p80", "images/s", "x dense"]
    return ["", title, *table(head, [(row, [row.weights, row.mode, row.variant], _numbers(row)) for row in rows], 3)]


def _numbers(row: InferRow) -> list[str]:
    if row.times is None:
        return []
    return [*percentiles(row.times), number(row.images_per_second), number(row.speedup)]


if __name__ == "__main__":
    sys.exit(main())
