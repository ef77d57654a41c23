"""python bench/step.py: whole training steps, sparse against dense. --help explains all of it."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the checkout that it stands in is measured
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hrbp
from bench.shared import machine, options
from bench.shared.clocks import Lap, Rounds, interleave, make_step_clock
from bench.shared.equal import NETWORK_ALLOWED, network_error
from bench.shared.memory import make_memory
from bench.shared.parts import measure_parts
from bench.shared.results import Writer
from bench.shared.rows import ERROR, FAIL, REFUSED, Row, Times, ratio
from bench.shared.tables import number, percentiles, table
from blocksparse import BSRConv2d, BSRLinear, keep_freed_memory
from hrbp.training.optimizer import training_bytes

DESCRIPTION = """\
Times whole training steps (forward, loss, backward, SGD with momentum) of sparse networks against dense ones, in one
interleaved run. Every sparse network is first checked: its outputs and its gradients against the dense network of the
same function.

  python bench/step.py --network vgg19 --structure hrbp block
  python bench/step.py --network resnet50 --compile --json step.json
  python bench/step.py --network resnet8 --quick                       # a first look: half a minute

With its defaults it takes a few minutes: --seconds for the steps, and the checks before them.
"""

EPILOG = """\
columns
  way       memory format, and how a step runs: eager; graph (a CUDA graph of the whole step); compiled (torch.compile);
            fused: BatchNorm, sum and ReLU together (hrbp.fuse_training)
  ms        20th, 50th and 80th percentile of the steps, the host's part included
  x dense   p50 of the fastest dense way / p50 of this one; x same: of dense in the same way
  step MB   peak memory during a step beyond what was there before it
  state MB  weights, index, gradients and optimizer state

On a CPU the process keeps the memory that a step frees for the next one (blocksparse.keep_freed_memory), as every
program of this library does.

Exit status: 0; 1 if a check failed or nothing was timed; 2 for wrong options; 130 if interrupted.
"""

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Network:
    """A network of the papers, its images, and how sparse it is trained."""

    name: str
    model: str  # of hrbp.models.build
    width: float
    classes: int
    image_size: int
    batch: int  # on a GPU
    cpu_batch: int
    sparsity: float

    def build(self) -> nn.Module:
        return hrbp.models.build(self.model, classes=self.classes, width=self.width, image_size=self.image_size)


NETWORKS = {
    "resnet50": Network("resnet50", "resnet50", 1, 1000, 224, 128, 2, 0.9),
    "vgg19": Network("vgg19", "vgg19", 1, 10, 32, 128, 16, 0.95),
    "wrn32-2": Network("wrn32-2", "resnet32", 2, 10, 32, 128, 16, 0.95),
    "resnet8": Network("resnet8", "resnet8", 1, 10, 16, 8, 2, 0.9),  # for a first look
}
CASES: dict[str, dict[str, Any]] = {
    "hrbp": {"structure": "hrbp"},
    "hrbp++": {"structure": "hrbp++"},
    "hrbpx8": {"structure": "hrbp", "granule": 8},
    "block": {"structure": "block"},
}
DENSE = "dense"


@dataclass(frozen=True)
class Way:
    """How a step runs."""

    layout: str
    mode: str = "eager"  # "graph": a CUDA graph of the whole step; "compiled": torch.compile
    fused: bool = False  # hrbp.fuse_training

    def __str__(self) -> str:
        return f"{self.layout}, {self.mode}" + ", fused" * self.fused


@dataclass(kw_only=True)
class StepRow(Row):
    """A step of a network in one way, which is the row's variant; extra_bytes is the peak during a step."""

    network: str
    structure: str
    sparsity: float
    distribution: str
    batch: int
    image_size: int
    dtype: str
    state_bytes: int | None = None
    parameters: int | None = None
    speedup: dict[str, float | None] = field(default_factory=dict)  # "dense": over its fastest way; "same": over this


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments(argv)
    if argv is None:  # the process is this program's
        keep_freed_memory()
    begin = time.perf_counter()
    if args.device.type == "cuda":
        machine.set_up_gpu(args.device, tf32=True)
    facts = machine.describe(args.device)
    print(f"{facts['device']}, {facts['threads']} threads; torch {facts['torch']}; {args.dtype}", flush=True)
    writer = Writer("step", args, facts)
    parts = [(name, partial(measure_network, NETWORKS[name], args)) for name in args.network]
    rows, finished = measure_parts(parts, begin + args.seconds, writer, lines)
    if not finished:
        return 130
    return 1 if any(row.status in (FAIL, ERROR) for row in rows) or not rows else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.make_parser("step", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--network", nargs="+", choices=tuple(NETWORKS), default=["resnet50", "vgg19", "wrn32-2"])
    add("--structure", nargs="+", choices=tuple(CASES), default=["hrbp", "hrbp++", "hrbpx8", "block"])
    add("--sparsity", type=options.share, help="default: 0.9 for ImageNet's networks, 0.95 for CIFAR's")
    add("--distribution", choices=("erk", "uniform"), default="erk", help="how densities differ between layers")
    add("--batch", type=options.positive, help="images; default: 128 on a GPU, 2 or 16 on a CPU")
    add("--dtype", choices=("bf16", "fp32"), help="of autocast; default: bf16 on a GPU, fp32 (none) on a CPU")
    add("--compile", action="store_true", help="also through torch.compile, in channels_last")
    options.add_device(parser)
    options.add_time(parser, 120.0, "3 of each")
    options.add_json(parser)
    args = options.parsed(parser, argv)
    args.dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    return args


# ---------------------------------------------------------------- one network


def measure_network(network: Network, args: argparse.Namespace, deadline: float, rows: list[StepRow]) -> None:
    """A row for dense and each structure, in every way; steps of all of them interleaved until `deadline`.

    `rows` gets them as they are made, and their times also where an interrupt ends the measurement.
    """
    device, on_gpu = args.device, args.device.type == "cuda"
    batch = args.batch or (network.batch if on_gpu else network.cpu_batch)
    sparsity = args.sparsity or network.sparsity
    torch.manual_seed(0)
    dense = network.build().to(device)
    x = torch.randn(batch, 3, network.image_size, network.image_size, device=device)
    target = torch.randint(network.classes, (batch,), device=device)
    ways = [Way("channels_last"), Way("contiguous"), Way("contiguous", fused=True), Way("channels_last", fused=True)]
    if on_gpu:
        graphs = Way("channels_last", "graph"), Way("channels_last", "graph", True), Way("contiguous", "graph")
        ways = [Way("channels_last"), *graphs]
    if args.compile:
        ways.append(Way("channels_last", "compiled"))
    memory, pool = make_memory(device), torch.cuda.graph_pool_handle() if on_gpu else None
    calls: dict[int, Callable[[], Tensor]] = {}
    for structure in (DENSE, *args.structure):
        model, status, why = copy.deepcopy(dense), FAIL, ""
        if structure != DENSE:
            try:
                hrbp.sparsify(model, sparsity, distribution=args.distribution, **CASES[structure])
            except ValueError as error:  # there is no such mask of this network
                status, why = REFUSED, str(error)
            try:
                why = why or differs(model, x[:8])
            except Exception as error:  # one structure that cannot run ends nothing
                why = f"{type(error).__name__}: {error}"
        for way in ways:
            row = StepRow(
                network=network.name, structure=structure, sparsity=sparsity if structure != DENSE else 0.0,
                distribution=args.distribution, batch=batch, image_size=network.image_size, dtype=args.dtype,
                variant=str(way),
            )  # fmt: skip
            rows.append(row)
            if why:
                row.fail(status, why)
                continue
            try:
                step = Step(copy.deepcopy(model), x, target, way, args.dtype, pool)
                extra = memory.extra_bytes(step.call)
                row.extra_bytes = None if way.mode == "graph" else extra  # a graph took its memory when it was captured
            except Exception as error:  # one way that cannot run ends nothing
                row.fail(ERROR, error)
                continue
            row.state_bytes = training_bytes(step.model, step.optimizer)
            row.parameters = sum(p.numel() for p in step.model.parameters())
            calls[len(rows) - 1] = step.call
    measured: dict[int, list[Lap]] = {}
    rounds = Rounds(3, 3 if args.quick else 200)
    for call in calls.values():  # once more, untimed: now memory has been freed in the order of a round
        call()
    try:
        interleave(calls, make_step_clock(device), rounds, deadline, into=measured)
    finally:
        for at, laps in measured.items():
            rows[at].times = Times.of(laps) if laps else None
        compare(rows)


class Step:
    """One training step as a call without arguments that returns the loss."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor, way: Way, dtype: str, pool: Any) -> None:
        self.model = model.to(memory_format=FORMATS[way.layout]).train()  # type: ignore[call-overload]
        self.x, self.target = x.contiguous(memory_format=FORMATS[way.layout]), target
        self.amp = dtype == "bf16"
        on_gpu = x.device.type == "cuda"
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=on_gpu)
        run = torch.compile(self.model) if way.mode == "compiled" else self.model
        run = hrbp.fuse_training(self.model) if way.fused else run
        self.call: Callable[[], Tensor] = lambda: self._step(run)
        if way.mode == "graph":
            self.call = self._captured(run, pool)
        else:
            for _ in range(2):  # compiles, makes the optimizer's state
                self.call()

    def _step(self, run: Callable[[Tensor], Tensor]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(run(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _captured(self, run: Callable[[Tensor], Tensor], pool: Any) -> Callable[[], Tensor]:
        """Graphs share one memory pool: none needs what it had there after it has run."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(run)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            loss = self._step(run)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay


def differs(model: nn.Module, x: Tensor) -> str:
    """Why the sparse model is not the dense one of the same function, in fp32; or "".

    Compared are the mean square of its outputs and the gradient of every sparse layer, without what would blow rounding
    up to a percent of a gradient: statistics of a small batch, kinks of ReLU, ties of maxima.
    """
    if x.is_cuda:
        machine.set_up_gpu(x.device, tf32=False)
    try:
        model = smooth(copy.deepcopy(model)).eval()
        models = model, hrbp.densify(copy.deepcopy(model))
        losses = [m(x).square().mean() for m in models]
        for loss in losses:
            loss.backward()
    finally:
        if x.is_cuda:
            machine.set_up_gpu(x.device, tf32=True)
    if not network_error(losses[0].detach(), losses[1].detach()) <= NETWORK_ALLOWED:  # NaN too
        return f"the mean square of its outputs is {losses[0].item():.6g}, of the dense network {losses[1].item():.6g}"
    twins = dict(models[1].named_modules())
    for name, layer in models[0].named_modules():
        if isinstance(layer, BSRConv2d | BSRLinear):
            dense: Any = twins[name]
            needed = layer.pattern.values_from_dense(dense.weight.grad.view(layer.weight_shape))
            got = layer.values.grad
            assert got is not None
            off = network_error(got, needed)
            if not off <= NETWORK_ALLOWED:
                return f"the gradient of {name} is off by {off:.3g} (allowed {NETWORK_ALLOWED})"
    return ""


def smooth(model: nn.Module) -> nn.Module:
    """The network with differentiable activations and poolings, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return model


def compare(rows: list[StepRow]) -> None:
    """Speed-ups over the fastest way of dense, and over dense in the same way."""
    dense = {row.variant: row.p50 for row in rows if row.structure == DENSE and row.p50 is not None}
    for row in rows:
        if row.p50 is not None and dense:
            row.speedup = {"dense": min(dense.values()) / row.p50, "same": ratio(dense.get(row.variant), row.p50)}


def lines(rows: list[StepRow]) -> list[str]:
    """The table of one network."""
    first = rows[0]
    sparse = next((row.sparsity for row in rows if row.sparsity), 0.0)
    title = (
        f"{first.network}: batch {first.batch}, {first.image_size}x{first.image_size}, {first.dtype},"
        f" {100 * sparse:g}% sparse ({first.distribution})"
    )
    head = ["structure", "way", "ms p20", "p50", "p80", "x dense", "x same", "step MB", "state MB"]
    return ["", title, *table(head, [(row, [row.structure, row.variant], _numbers(row)) for row in rows], 2)]


def _numbers(row: StepRow) -> list[str]:
    if row.times is None:
        return []
    speedups = (number(row.speedup.get(name)) for name in ("dense", "same"))
    return [*percentiles(row.times), *speedups, *(number(b, ".1f", 1e-6) for b in (row.extra_bytes, row.state_bytes))]


if __name__ == "__main__":
    sys.exit(main())
