"""python bench/run.py: block-sparse convolutions timed against the best dense ones. --help explains all of it."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import machine
import report
from arguments import make_options, parse_arguments
from layers import CHOSEN, NETS, Layer
from measure import LayerBench
from rows import OK, Row, Total, totals
from timing import Ceilings, make_clock, make_memory, measure_ceilings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments(argv)
    if args.list:
        print(
            "\n".join(f"{layer.full_name:<28}{layer!s:<36}{layer.count} x" for net in NETS.values() for layer in net())
        )
        return 0
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
    begin = time.perf_counter()
    if args.device.type == "cuda":
        machine.set_up_gpu(args.device, args.dtype == "tf32")
    options, clock, facts = make_options(args), make_clock(args.device), machine.describe(args.device)
    ceilings = measure_ceilings(clock, args.device, options.dtype)
    print("\n".join(report.head_lines(facts, args.dtype, args.batch, ceilings)), flush=True)
    bench = LayerBench(options, clock, make_memory(args.device), ceilings)

    def keep(rows: list[Row], finished: bool = False, after: Ceilings | None = None) -> None:
        """What there is goes to the file after each layer: a run that is killed loses nothing."""
        if args.json:
            content = {
                "complete": finished,
                "seconds": time.perf_counter() - begin,
                "options": plain_options(args),
                "machine": facts,
                "ceilings": {"at_start": vars(ceilings), "at_end": vars(after) if after else None},
                "rows": [row.as_json() for row in rows],
                "totals": [total.as_json() for total in totals(rows)],
            }
            report.write_json(args.json, content)

    rows, finished = run_layers(bench, args.layers, begin + args.seconds, keep)
    after = measure_ceilings(clock, args.device, options.dtype)
    print_end(rows, totals(rows), args, ceilings, after, time.perf_counter() - begin)
    keep(rows, finished, after)
    if args.plot and rows:
        report.plot(args.plot, rows, f"{facts['device']}, {args.dtype}, batch {args.batch}")
    if not finished:
        return 130
    return 1 if report.failed(rows) or not any(row.sparse.status == OK for row in rows) else 0


def run_layers(
    bench: LayerBench, layers: list[Layer], end: float, keep: Callable[[list[Row]], None]
) -> tuple[list[Row], bool]:
    """(rows, finished): measures, prints and keeps one layer after another; an interrupt keeps what there is."""
    rows: list[Row] = []
    rounds, on_gpu = bench.options.rounds, bench.options.device.type == "cuda"
    progress = Progress([work_of(layer) for layer in layers], end, rounds.least == rounds.most)
    try:
        for at, layer in enumerate(layers):
            progress.start(at, layer.full_name)
            new = bench.run(layer, progress.deadline(at))
            rows += new
            progress.clear()
            print("\n".join(report.layer_lines(new, on_gpu)), flush=True)
            keep(rows)
    except KeyboardInterrupt:
        progress.clear()
        print("\ninterrupted: what follows covers the layers above only", flush=True)
        return rows, False
    return rows, True


def print_end(
    rows: list[Row], sums: list[Total], args: argparse.Namespace, before: Ceilings, after: Ceilings, seconds: float
) -> None:
    """Sums of every network, the conclusions, and whether the machine was steady."""
    for net in dict.fromkeys(total.net for total in sums):
        if net != CHOSEN or len({row.layer for row in rows if row.net == net}) > 1:
            print("\n".join(report.total_lines([t for t in sums if t.net == net], args.device.type == "cuda")))
    print()
    print("\n".join(report.conclusions(sums, args.batch)))
    print(f"{report.drift(before, after)} The run took {seconds:.0f} s.")


def plain_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options as they can stand in a JSON file."""
    kept = {name: value for name, value in vars(args).items() if name not in ("layers", "blocks", "list")}
    plain = (bool, int, float, str, list, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in kept.items()}


# ---------------------------------------------------------------- time


def work_of(layer: Layer) -> float:
    """A guess at how long a round takes, in any unit: FLOPs, 50 for each activation, and an overhead."""
    activations = math.prod(layer.x_shape(1)) + math.prod(layer.y_shape(1))
    return layer.flops(1) + 50.0 * activations + 5e6


class Progress:
    """Which layer is next, when it must be done, and about how long all the rest takes (lines on stderr).

    Args:
        work: how much each layer is, in any unit.
        end: when all should be done (time.perf_counter()).
        fixed: rounds do not depend on time; the pace so far says how long the rest takes.
    """

    def __init__(self, work: list[float], end: float, fixed: bool) -> None:
        self._work, self._end, self._fixed = work, end, fixed
        self._begin = time.perf_counter()
        self._moves, self._width = sys.stderr.isatty(), 0

    def deadline(self, at: int) -> float:
        """The share of layer `at` in the time that is left, as a time."""
        now = time.perf_counter()
        return now + max(0.0, self._end - now) * self._work[at] / sum(self._work[at:])

    def seconds_left(self, at: int) -> float | None:
        """None: not known yet."""
        now, done = time.perf_counter(), sum(self._work[:at])
        at_this_pace = (now - self._begin) / done * sum(self._work[at:]) if at else None
        if self._fixed:
            return at_this_pace
        return max(self._end - now, at_this_pace or 0.0)

    def start(self, at: int, name: str) -> None:
        left = self.seconds_left(at)
        about = (
            "" if left is None else f", about {left / 60:.1f} min left" if left > 90 else f", about {left:.0f} s left"
        )
        text = f"[{at + 1}/{len(self._work)}] {name}{about}"
        if self._moves:
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._moves and self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
