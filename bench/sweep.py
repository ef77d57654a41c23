"""python bench/sweep.py: every tile that a kernel could have, timed beside the chosen one. --help explains it."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the checkout that it stands in is measured
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import blocksparse as bs
from bench.layers.contenders import Problem
from bench.layers.networks import Layer, parse_layer
from bench.layers.patterns import Blocksize, Structure, build, parse_blocksize
from bench.layers.rows import KINDS
from bench.shared import machine, options
from bench.shared.clocks import Lap, Rounds, interleave, make_clock
from bench.shared.parts import measure_parts
from bench.shared.results import Writer
from bench.shared.rows import ERROR, FAIL, REFUSED, Row, Times
from bench.shared.tables import number, table
from blocksparse.backends import Work, named
from blocksparse.index import layout_of, unpack
from blocksparse.kernels import gpus, slot_cost, slots, tiles
from blocksparse.plan import setting_of

DESCRIPTION = """\
Times every tile that a Triton or CUDA C++ kernel could have on a layer, in one interleaved run, beside the tile that
the cost model chooses, with the time that it predicted. What comes out says which rows blocksparse/kernels/tiles.py
needs, and by how much the predictions miss.

  python bench/sweep.py --layer resnet50.layer3.3x3 --blocksize 32x32 64x8 --json sweep.json
  python bench/sweep.py --layer resnet50.layer3.3x3 --blocksize group --kind dgrad

Each tile is compiled first, which takes a second or two; its result is held against that of the chosen tile.
"""

EPILOG = """\
columns
  tile      Triton: BLOCK_M x BLOCK_N x BLOCK_K, warps, stages, splits of wgrad; CUDA C++: warps x mt x nt, pixels, ...
  us        p50 of the device's time, caches cold
  x chosen  p50 of the chosen tile / p50 of this one: above 1, this one is faster
  predicted what the cost model says

Exit status: 0; 1 if a tile gives another result or none could run; 2 for wrong options; 130 if interrupted.
"""

BLOCK_M, BLOCK_K, STAGES, WARPS, SPLITS = (64, 128, 256), (32, 64, 128), (2, 3, 4), (4, 8), (1, 2, 4, 8, 16)
LOST = 1.3  # a tile that takes so many times as long as the best after the least number of rounds gets no further ones


@dataclass(kw_only=True)
class TileRow(Row):
    """A kernel with one tile."""

    layer: str
    kind: str
    backend: str
    blocksize: tuple[int, int]
    tile: dict[str, Any]
    chosen: bool
    predicted_us: float | None = None
    compile_seconds: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments(argv)
    if args.device.type == "cuda":
        machine.set_up_gpu(args.device, tf32=False)
    facts = machine.describe(args.device)
    print(f"{facts['device']}; torch {facts['torch']}, triton {facts['triton']}", flush=True)
    writer = Writer("sweep", args, facts, "layers", "blocks")
    parts = [
        (f"{layer.full_name} {block} {kind}", partial(measure, layer, block, kind, args))
        for layer, block, kind in itertools.product(args.layers, args.blocks, args.kind)
    ]
    rows, finished = measure_parts(parts, time.perf_counter() + args.seconds, writer, lines)
    if not finished:
        return 130
    return 1 if any(row.status == FAIL for row in rows) or not any(row.times for row in rows) else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.make_parser("sweep", DESCRIPTION, EPILOG)
    add = parser.add_argument
    options.add_layer(parser, required=True)
    add("--blocksize", nargs="+", metavar="BKxBC", default=["32x32", "64x8"], help="32x32, 64x8, 8x1, group ...")
    add("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    add("--sparsity", type=options.share, default=0.9)
    add("--batch", type=options.positive, help="images; default: 64 on a GPU, 1 on a CPU")
    add("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16")
    add("--repeats", type=options.positive, help="exactly so many rounds instead of --seconds")
    options.add_device(parser)
    options.add_time(parser, 120.0, "3 of each; --quick also takes the first three tiles alone")
    options.add_json(parser)
    args = options.parsed(parser, argv)
    try:
        args.layers = list(dict.fromkeys(layer for spec in args.layer for layer in parse_layer(spec)))
        args.blocks = [parse_blocksize(text) for text in args.blocksize]
    except ValueError as error:
        parser.error(str(error))
    args.batch = args.batch or (64 if args.device.type == "cuda" else 1)
    return args


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# ---------------------------------------------------------------- candidates


def triton_tiles(kind: str, work: Work, chosen: tiles.Tile) -> Iterator[tiles.Tile]:
    """Every tile around the chosen one: its BLOCK_N follows from the blocksize."""
    for m, k, stages, warps in itertools.product(BLOCK_M, BLOCK_K, STAGES, WARPS):
        if m * chosen.block_n > 128 * 128 or (m + chosen.block_n) * k * work.dtype.itemsize * stages > 200 << 10:
            continue  # accumulators, shared memory
        tile = chosen._replace(block_m=m, block_k=k, num_stages=stages, num_warps=warps)
        for splits in sorted({chosen.splits, *SPLITS}) if kind == "wgrad" else (1,):
            yield tile._replace(splits=splits)


def slot_tiles(kind: str, work: Work, chosen: slots.SlotTile) -> Iterator[slots.SlotTile]:
    """Every cut that the model looks at, but of those that differ in pixels alone the few of least predicted time."""
    best: dict[Any, list[tuple[float, slots.SlotTile]]] = {}
    for tile in slots.candidates(kind, work.geometry, work.blocksize, work.nnzb, work.dtype):
        seconds = predicted("cupy", kind, work, tile) or 0.0
        best.setdefault((tile.mt, tile.nt, tile.warps, tile.filters), []).append((seconds, tile))
    for found in best.values():
        yield from (tile for _, tile in sorted(found, key=lambda pair: pair[0])[:2])


def predicted(backend: str, kind: str, work: Work, tile: Any) -> float | None:
    """Seconds by the cost model; None where no such kernel was counted, or the device is unknown."""
    if work.gpu is None:
        return None
    facts = kind, work.geometry, work.blocksize, work.nnzb, work.dtype, work.precision, tile, work.gpu
    found = (tiles if backend == "triton" else slot_cost).estimate(*facts)
    return None if found is None else found.seconds


# ---------------------------------------------------------------- one kernel


def measure(
    layer: Layer, block: Blocksize, kind: str, args: argparse.Namespace, deadline: float, rows: list[TileRow]
) -> None:
    """A row for each tile, the chosen one first; `rows` gets their times also where an interrupt ends it."""
    generator = torch.Generator().manual_seed(0)
    problem = Problem(layer, args.batch, DTYPES[args.dtype], args.device, generator)
    pattern = build(layer.shape, block, Structure(), args.sparsity, generator).to(args.device)
    name = "triton" if min(pattern.blocksize) >= 8 else "cupy"
    backend, last = named(name, "sweep"), name == "triton"
    x, dy, layout = problem.x["channels_last"], problem.dy["channels_last"], "channels_last"
    if not last:
        x, dy, layout = bs.to_batch_last(x), bs.to_batch_last(dy), "batch_last"
    values = problem.draw((pattern.nnzb, *pattern.blocksize), 0.1)
    geometry = bs.ConvGeometry.of(x.shape, pattern.shape, layer.stride, layer.padding)
    index = layout_of(pattern.index.shape, pattern.index.dtype, pattern.shape, pattern.blocksize, pattern.nnzb, "sweep")
    tables = unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    device = values.device
    work = Work(
        geometry, pattern.blocksize, pattern.nnzb, values.dtype, device, setting_of(x, layout), index, gpus.of(device)
    )
    if (reason := backend.absent() or backend.refusal(work)) is not None:
        row = TileRow(layer=layer.full_name, kind=kind, backend=name, blocksize=pattern.blocksize, tile={}, chosen=True)
        row.fail(REFUSED, reason)
        rows.append(row)
        return
    calls: dict[str, Callable[[Any], Tensor]] = {
        "fprop": lambda tile: backend.fprop(work, tile, x, values, tables, None),
        "dgrad": lambda tile: backend.dgrad(work, tile, dy, values, tables, layout),
        "wgrad": lambda tile: backend.wgrad(work, tile, x, dy, tables),
    }
    chosen = backend.tile(kind, work)
    candidates: Iterator[Any] = (triton_tiles if name == "triton" else slot_tiles)(kind, work, chosen)
    if args.quick:
        candidates = itertools.islice(candidates, 2)
    timed: dict[int, Callable[[], Tensor]] = {}
    needed = None
    for tile in dict.fromkeys([chosen, *candidates]):
        seconds = predicted(name, kind, work, tile)
        row = TileRow(
            layer=layer.full_name, kind=kind, backend=name, blocksize=pattern.blocksize, tile=tile._asdict(),
            chosen=tile == chosen, predicted_us=None if seconds is None else 1e6 * seconds, variant=layout,
        )  # fmt: skip
        rows.append(row)
        begin = time.perf_counter()
        try:
            result = calls[kind](tile).float()
            if args.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, or no such kernel: the others go on
            row.fail(ERROR, error)
            continue
        row.compile_seconds = time.perf_counter() - begin
        needed = result if needed is None else needed
        off = float((result - needed).abs().max() / needed.abs().max().clamp_min(1e-30))
        if not off <= 0.01:
            row.fail(FAIL, f"off by {off:.3g} of the largest element from the chosen tile")
            continue
        timed[len(rows) - 1] = partial(calls[kind], tile)
    laps: dict[int, list[Lap]] = {}
    rounds = Rounds(args.repeats, args.repeats) if args.repeats else Rounds(3, 3 if args.quick else 100)
    try:
        interleave(timed, make_clock(args.device), rounds, deadline, drop=lost, into=laps)
    finally:
        for at, row in enumerate(rows):
            if laps.get(at):
                row.times = Times.of(laps[at])


def lost(laps: Mapping[int, list[Lap]]) -> set[int]:
    p50 = {at: Times.of(each).p50 for at, each in laps.items()}
    return {at for at, ms in p50.items() if ms > LOST * min(p50.values())}


def lines(rows: list[TileRow]) -> list[str]:
    """The table of one kernel: the chosen tile, then the fastest ones; what could not run is counted."""
    first = rows[0]
    ran = sorted((row for row in rows if row.p50 is not None), key=lambda row: row.p50 or 0.0)
    shown = [*(row for row in rows if row.chosen), *(row for row in ran[:5] if not row.chosen)]
    wrong = [row for row in rows if row.status == FAIL]
    body = []
    for row in [*shown, *wrong]:
        ratio = None if row.p50 is None or first.p50 is None else first.p50 / row.p50
        name = "x".join(str(value) for value in row.tile.values())
        numbers = number(row.p50, ".1f", 1e3), number(ratio), number(row.predicted_us, ".1f")
        body.append((row, [("* " if row.chosen else "  ") + name], numbers))
    bk, bc = first.blocksize
    title = f"{first.layer} {first.kind}, blocks of {bk}x{bc} on {first.backend}: {len(ran)} of {len(rows)} tiles ran"
    return ["", title, *table(["tile (* chosen)", "us", "x chosen", "predicted"], body, 1)]


if __name__ == "__main__":
    sys.exit(main())
