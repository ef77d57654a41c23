"""python bench/launch.py: what a module call costs the host, beside PyTorch's own convolution. --help explains it."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the checkout that it stands in is measured
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import blocksparse as bs
from bench.shared import machine, options
from bench.shared.clocks import Clock, HostClock, Lap, Rounds, interleave, make_step_clock
from bench.shared.results import Writer
from bench.shared.rows import ABSENT, ERROR, OK, Row, Times
from bench.shared.tables import number, table

DESCRIPTION = """\
Times the host: how long a call of BSRConv2d takes to return, beside nn.Conv2d, on images so small that the device has
nothing to do. forward is module(x) recording gradients; step is forward and backward. On a GPU it waits for the device
only between repetitions; on a CPU the small product itself is counted, too. Then the time of a mask update.

  python bench/launch.py
  python bench/launch.py --quick --json launch.json

It takes half a minute, with --quick a few seconds. Exit status: 0; 1 if a backend could not run; 2 for wrong options.
"""

SIZES = {"cuda": (8, 32, 4), "cpu": (1, 8, 2)}  # images, channels, pixels a side: a CPU counts the product, too
CALLS = 20  # of a repetition
UPDATED, BLOCKS = (512, 512, 3, 3), ((32, 32), (8, 1))  # the layer whose mask is updated
KINDS = ("forward", "step")


@dataclass(kw_only=True)
class HostRow(Row):
    """A module: microseconds of one call, and what lies beyond nn.Conv2d; `times` are those of forward."""

    module: str
    backend: str
    forward_us: float | None = None  # 20th percentile of the repetitions: others run on the same host
    step_us: float | None = None
    beyond: dict[str, float | None] = field(default_factory=dict)
    step_times: Times | None = None
    update_ms: float | None = None  # of set_pattern, the device's part included


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments(argv)
    device = args.device
    if device.type == "cuda":
        machine.set_up_gpu(device, tf32=True)
    facts = machine.describe(device)
    writer = Writer("launch", args, facts)
    rows: list[HostRow] = []
    finished = False
    try:
        measure(device, HostClock(device, CALLS), 20 if args.quick else 400, rows)
        rows += [update(device, make_step_clock(device), block, 3 if args.quick else 20) for block in BLOCKS]
        finished = True
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(f"{facts['device']}; torch {facts['torch']}")
    head = ["module", "backend", "forward us", "beyond", "step us", "beyond"]
    calls = [row for row in rows if row.update_ms is None]
    print("\n".join(table(head, [(row, [row.module, row.backend], _numbers(row)) for row in calls], 2)))
    for row in rows:
        if row.update_ms is not None:
            print(f"set_pattern of {'x'.join(map(str, UPDATED))}, blocks of {row.variant}: {row.update_ms:.2f} ms")
    writer.write(rows, finished)
    if not finished:
        return 130
    return 1 if any(row.status != OK for row in rows) else 0


def _numbers(row: HostRow) -> list[str]:
    found = row.forward_us, row.beyond.get("forward"), row.step_us, row.beyond.get("step")
    return [number(us, ".1f") for us in found]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.make_parser("launch", DESCRIPTION)
    options.add_device(parser)
    parser.add_argument("--quick", action="store_true", help="20 repetitions instead of 400")
    options.add_json(parser)
    return options.parsed(parser, argv)


def measure(device: torch.device, clock: Clock, repetitions: int, rows: list[HostRow]) -> None:
    """nn.Conv2d first, then BSRConv2d on every backend that runs here; repetitions of all interleaved.

    `rows` gets their times also where an interrupt ends the measurement.
    """
    n, c, size = SIZES[device.type]
    x = torch.randn(n, c, size, size, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    dense = nn.Conv2d(c, c, 3, padding=1, device=device)
    rows.append(HostRow(module="nn.Conv2d", backend=""))
    calls = {(0, kind): call for kind, call in kinds(dense, x).items()}
    for backend, absent in bs.available_backends().items():
        if absent is not None or (device.type == "cpu" and backend in ("triton", "cupy")):
            continue
        row = HostRow(module="BSRConv2d", backend=backend)
        rows.append(row)
        pattern = bs.BSRPattern.full((c, c, 3, 3), (c, 1 if backend == "cupy" else c))
        try:
            mine = kinds(bs.BSRConv2d.from_dense(dense, pattern.to(device), backend=backend), x)
            for call in mine.values():
                call()
        except Exception as error:  # one backend that cannot run ends nothing
            row.fail(ERROR, error)
            continue
        calls |= {(len(rows) - 1, kind): call for kind, call in mine.items()}
    laps: dict[tuple[int, str], list[Lap]] = {}
    try:
        interleave(calls, clock, Rounds(repetitions, repetitions), deadline=0.0, into=laps)
    finally:
        for at, row in enumerate(rows):
            if row.status == OK and not all(laps.get((at, kind)) for kind in KINDS):
                row.fail(ABSENT, "interrupted before it was timed")
            if row.status == OK:
                row.times, row.step_times = (Times.of(laps[at, kind]) for kind in KINDS)
                row.forward_us, row.step_us = 1e3 * row.times.p20, 1e3 * row.step_times.p20
        compare(rows)


def compare(rows: list[HostRow]) -> None:
    """What lies beyond the first row."""
    first = rows[0]
    for row in rows[1:]:
        for kind, own, base in (("forward", row.forward_us, first.forward_us), ("step", row.step_us, first.step_us)):
            row.beyond[kind] = None if own is None or base is None else own - base


def update(device: torch.device, clock: Clock, blocksize: tuple[int, int], repetitions: int) -> HostRow:
    """The time until a layer has another mask of equal size, values carried, and the device is idle."""
    generator = torch.Generator().manual_seed(0)
    masks = [bs.BSRPattern.random(UPDATED, blocksize, 0.1, generator).to(device) for _ in range(2)]
    module = bs.BSRConv2d(masks[0], device=device)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    turns = itertools.cycle(reversed(masks))
    laps = [clock.lap(lambda: module.set_pattern(next(turns), optimizer), cold=False) for _ in range(repetitions)]
    times = Times.of(laps)
    return HostRow(
        module="set_pattern", backend="", variant="x".join(map(str, blocksize)), times=times, update_ms=times.p50
    )


def kinds(module: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The calls that are timed."""
    dy = torch.randn_like(module(x))

    def step() -> None:
        module(x).backward(dy)

    return {"forward": lambda: module(x), "step": step}


if __name__ == "__main__":
    sys.exit(main())
