"""python bench/launch.py: what a module call costs the host, beside PyTorch's own convolution. --help explains it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blocksparse as bs
import machine
import report
from rows import ERROR, OK, Times
from timing import Lap, percentile

DESCRIPTION = """\
Times the host: how long a call of BSRConv2d takes to return, beside nn.Conv2d, on images so small that the device has
nothing to do. forward is module(x) recording gradients; step is forward and backward. On a GPU it waits for the device
only between repetitions; on a CPU the small product itself is counted, too.
"""

SIZES = {"cuda": (8, 32, 4), "cpu": (1, 8, 2)}  # images, channels, pixels a side: a CPU counts the product, too
CALLS = 20  # of a repetition


@dataclass
class Row:
    """A module: microseconds of one call, and what lies beyond nn.Conv2d."""

    module: str
    backend: str
    status: str = OK
    reason: str = ""
    forward_us: float | None = None  # 20th percentile of the repetitions: others run on the same host
    step_us: float | None = None
    beyond: dict[str, float | None] = field(default_factory=dict)
    laps: dict[str, Times] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments(argv)
    device = args.device
    if device.type == "cuda":
        machine.set_up_gpu(device, tf32=True)
    begin, facts = time.perf_counter(), machine.describe(device)
    rows = measure(device, 20 if args.quick else 400)
    print(f"{facts['device']}; torch {facts['torch']}\n{'module':<12}{'backend':<10}{'forward us':>12}{'beyond':>9}"
          f"{'step us':>12}{'beyond':>9}")  # fmt: skip
    for row in rows:
        numbers = row.forward_us, row.beyond.get("forward"), row.step_us, row.beyond.get("step")
        text = "".join(
            f"{'n/a' if n is None else f'{n:.1f}':>{w}}" for n, w in zip(numbers, (12, 9, 12, 9), strict=True)
        )
        print(f"{row.module:<12}{row.backend:<10}{text if row.status == OK else f'  {row.status}: {row.reason}'}")
    if args.json:
        content = {"kind": "launch", "complete": True, "seconds": time.perf_counter() - begin}
        report.write_json(args.json, content | {"machine": facts, "rows": [asdict(row) for row in rows]})
    return 1 if any(row.status != OK for row in rows) else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/launch.py", description=DESCRIPTION)
    parser.add_argument("--device", type=machine.device, help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="20 repetitions instead of 400")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row and the machine to FILE")
    args = parser.parse_args(argv)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def measure(device: torch.device, repetitions: int) -> list[Row]:
    """nn.Conv2d first, then BSRConv2d on every backend that runs here; repetitions of all interleaved."""
    n, c, size = SIZES[device.type]
    x = torch.randn(n, c, size, size, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    dense = nn.Conv2d(c, c, 3, padding=1, device=device)
    rows, calls = [Row("nn.Conv2d", "")], [kinds(dense, x)]
    for backend, absent in bs.available_backends().items():
        row = Row("BSRConv2d", backend)
        if absent is not None or (device.type == "cpu" and backend in ("triton", "cupy")):
            continue
        rows.append(row)
        pattern = bs.BSRPattern.full((c, c, 3, 3), (c, 1 if backend == "cupy" else c))
        try:
            calls.append(kinds(bs.BSRConv2d.from_dense(dense, pattern.to(device), backend=backend), x))
            for call in calls[-1].values():
                call()
        except Exception as error:  # one backend that cannot run ends nothing
            row.status, row.reason = ERROR, f"{type(error).__name__}: {error}"
            calls[-1] = {}
    found: list[dict[str, list[Lap]]] = [{kind: [] for kind in each} for each in calls]
    for _ in range(repetitions):
        for each, laps in zip(calls, found, strict=True):
            for kind, call in each.items():
                laps[kind].append(lap_of(call, device))
    for row, laps in zip(rows, found, strict=True):
        row.laps = {kind: Times.of(each) for kind, each in laps.items()}
        low = {kind: 1e6 * percentile([lap.seconds for lap in each], 20) for kind, each in laps.items()}
        row.forward_us, row.step_us = low.get("forward"), low.get("step")
    first = rows[0]
    for row in rows[1:]:
        for kind, own, base in (("forward", row.forward_us, first.forward_us), ("step", row.step_us, first.step_us)):
            row.beyond[kind] = None if own is None or base is None else own - base
    return rows


def kinds(module: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The calls that are timed."""
    dy = torch.randn_like(module(x))

    def step() -> None:
        module(x).backward(dy)

    return {"forward": lambda: module(x), "step": step}


def lap_of(call: Callable[[], Any], device: torch.device) -> Lap:
    """The mean of some calls in a row, on a device that was idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return Lap((time.perf_counter() - begin) / CALLS)


if __name__ == "__main__":
    sys.exit(main())
