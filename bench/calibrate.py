"""Fit the cost model that chooses between stored blocks and the dense product on a CPU to times measured here.

  python bench/calibrate.py --layers 300 --keep                 measure; from now on the choice is this processor's
  python bench/calibrate.py --layers 300 --json times.json      measure, print rows for kernels/cost_constants.json
  python bench/calibrate.py --read times.json                   fit again, and say how well the choice does
  python bench/calibrate.py --check times.json                  how the constants in use choose on measured layers

Measuring takes about a second a layer, fitting no time. Fitting needs scipy: pip install 'blocksparse-conv[test]'.

Layers are random: 8 to 1024 channels, 4x4 to 64x64 pixels, batches of 1 to 64, kernels of 1 to 7, strides 1 and 2, 2%
to 100% of the weights, blocks from single weights to (32, 32), contiguous and channels_last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the checkout that it stands in is measured
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

import blocksparse as bs
from bench.shared import options
from bench.shared.clocks import Clock, Rounds, interleave, make_clock
from bench.shared.rows import Times
from blocksparse.geometry import KINDS
from blocksparse.kernels import cost, cost_constants
from hrbp.columns import columns
from hrbp.files import write_json
from hrbp.progress import Progress

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1), (1, 1), (8, 1), (4, 1), (1, 8), (0, 1), (1, 0))
MOST = 1.5e9  # multiplications of a dense product


def draw(rng: random.Random) -> dict[str, Any]:
    """A random layer of realistic size. A 0 in a block size stands for an eighth of the channels."""
    while True:
        c, k = (rng.choice((8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)) for _ in range(2))
        kernel = rng.choice((1, 1, 3, 3, 3, 5, 7))
        size, n = rng.choice((4, 7, 8, 14, 16, 28, 32, 56, 64)), rng.choice((1, 2, 8, 16, 32, 64))
        stride = rng.choice((1, 1, 1, 2))
        bk, bc = rng.choice(BLOCKS)
        blocksize = (bk or k // 8, bc or c // 8)
        density = rng.choice((0.02, 0.05, 0.1, 0.1, 0.2, 0.3, 0.5, 1.0))
        work = n * c * k * (kernel * size // stride) ** 2
        if k % blocksize[0] == 0 == c % blocksize[1] and 1e5 < work < MOST:
            return {
                "x": (n, c, size, size), "weight": (k, c, kernel, kernel), "stride": stride, "padding": kernel // 2,
                "blocksize": blocksize, "density": density, "channels_last": rng.random() < 0.5,
            }  # fmt: skip


def measure(layer: dict[str, Any], dtype: torch.dtype, rounds: int, clock: Clock) -> dict[str, Any]:
    """Seconds of each product on either backend, caches warm: the least of interleaved rounds."""
    pattern = bs.BSRPattern.random(tuple(layer["weight"]), tuple(layer["blocksize"]), layer["density"])
    layout = torch.channels_last if layer["channels_last"] else torch.contiguous_format
    conv = layer["stride"], layer["padding"], 1
    x = torch.randn(layer["x"], dtype=dtype).contiguous(memory_format=layout)
    values = torch.randn(pattern.nnzb, *pattern.blocksize, dtype=dtype)
    dy = torch.randn_like(bs.conv2d(x, values, pattern, None, *conv, backend="cpu"))
    calls = {
        f"{backend} {kind}": call
        for backend in ("cpu", "torch")
        for kind, call in {
            "fprop": lambda b=backend: bs.conv2d(x, values, pattern, None, *conv, backend=b),
            "dgrad": lambda b=backend: bs.conv2d_dgrad(dy, values, pattern, x.shape, *conv, backend=b),
            "wgrad": lambda b=backend: bs.conv2d_wgrad(x, dy, pattern, *conv, backend=b),
        }.items()
    }
    laps = interleave(calls, clock, Rounds(rounds, rounds), deadline=0.0, cold=False)
    return {
        **layer,
        "dtype": str(dtype).removeprefix("torch."),
        "nnzb": pattern.nnzb,
        "seconds": {name: 1e-3 * Times.of(each).least for name, each in laps.items()},
    }


def geometry_of(row: dict[str, Any]) -> bs.ConvGeometry:
    return bs.ConvGeometry.of(row["x"], row["weight"], row["stride"], row["padding"])


def terms(row: dict[str, Any], kind: str) -> tuple[cost.Terms, cost.Terms]:
    g, blocksize = geometry_of(row), tuple(row["blocksize"])
    facts = row["channels_last"], DTYPES[row["dtype"]]
    return cost.stored_terms(kind, g, blocksize, row["nnzb"], *facts), cost.dense_terms(g, blocksize, row["nnzb"])


def fit(rows: list[dict[str, Any]], kind: str, side: int) -> cost.Terms:
    """Constants >= 0 of the least squares of relative errors."""
    from scipy.optimize import nnls

    seconds = np.array([row["seconds"][f"{('cpu', 'torch')[side]} {kind}"] for row in rows])
    counts = np.array([terms(row, kind)[side] for row in rows])
    return cost.Terms(*nnls(counts / seconds[:, None] * 1e-9, np.ones(len(rows)))[0])


def judge(rows: list[dict[str, Any]], constants: dict[str, tuple[cost.Terms, cost.Terms]], threads: int) -> None:
    """Print how much longer the chosen products take than the faster ones, and than dense; the last line: all three."""
    lines = [["# product", "on blocks", "mean", "worst", "> 5% over dense", "worst"]]
    taken = {kind: [_chosen(row, kind, constants[kind], threads) for row in rows] for kind in KINDS}
    for name, kinds in [*((kind, (kind,)) for kind in KINDS), ("all three", KINDS)]:
        totals = [
            [sum(row["seconds"][f"{backend or taken[kind][i]} {kind}"] for kind in kinds) for backend in ("", "torch")]
            for i, row in enumerate(rows)
        ]
        least = [sum(min(row["seconds"][f"{b} {kind}"] for b in ("cpu", "torch")) for kind in kinds) for row in rows]
        ratios = [took / best for (took, _), best in zip(totals, least, strict=True)]
        over = [took / dense for took, dense in totals]
        blocks = sum(all(taken[kind][i] == "cpu" for kind in kinds) for i in range(len(rows)))
        late = sum(ratio > 1.05 for ratio in over)
        mean, worst = f"{statistics.mean(ratios):.3f}", f"{max(ratios):.2f}"
        lines.append([f"# {name}", f"{blocks}", mean, worst, f"{late} of {len(rows)}", f"{max(over):.2f}"])
    print(f"{columns(lines)}\n# mean, worst: time of the choice / time of the faster one; at the end / time of dense")


def _chosen(row: dict[str, Any], kind: str, constants: tuple[cost.Terms, cost.Terms], threads: int) -> str:
    stored, dense = (cost.seconds(t, c, threads) for t, c in zip(terms(row, kind), constants, strict=True))
    return "cpu" if cost.MARGIN * stored < dense else "torch"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures or reads, fits, judges; returns the exit status."""
    parser = options.make_parser("calibrate", __doc__ or "")
    add = parser.add_argument
    add("--layers", type=options.positive, default=300, help="random layers to measure (default %(default)s)")
    add("--rounds", type=options.positive, default=4, help="interleaved rounds (default %(default)s)")
    add("--dtype", choices=DTYPES, default="float32")
    add("--threads", type=options.positive, default=1, help="PyTorch's threads (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="where to write what was measured")
    add("--read", nargs="+", type=Path, metavar="FILE", help="files of measurements: fit these")
    add("--check", nargs="+", type=Path, metavar="FILE", help="files of measurements: judge the constants in use")
    add("--keep", action="store_true", help="keep the constants in the user's cache, for this processor and this dtype")
    args = parser.parse_args(argv)
    if argv is None:  # the process is this program's
        bs.keep_freed_memory()
    try:
        options.check_file("--json", args.json)
        rows = read(args.read or args.check) if args.read or args.check else measure_all(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    fitted: dict[cost_constants.Key, cost_constants.Pair] = {}
    for last in (False, True):
        some = [row for row in rows if row["channels_last"] == last]
        if not some:
            continue
        if args.check:
            constants = {kind: cost.constants(kind, DTYPES[args.dtype], last) for kind in KINDS}
        else:
            constants = {kind: (fit(some, kind, 0), fit(some, kind, 1)) for kind in KINDS}
            found = {(args.dtype, last, kind): sides for kind, sides in constants.items()}
            fitted |= found
            for row in cost_constants.rows(found):  # of kernels/cost_constants.json
                shown = {side: [float(f"{ns:.3g}") for ns in row[side]] for side in ("stored", "dense")}
                print(json.dumps(row | shown))
        print(f"# {len(some)} layers, {'channels_last' if last else 'contiguous'}")
        judge(some, constants, args.threads)
    if args.keep and fitted:
        print(f"kept for this processor: {cost_constants.keep(fitted)}")
    return 0


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What earlier runs measured."""
    rows = []
    for file in files:
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or not {"dtype", "rows"} <= found.keys():
            raise ValueError(f"{file} is no file of bench/calibrate.py --json")
        rows += [{"dtype": found["dtype"], **row} for row in found["rows"]]
    return rows


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Random layers; written to --json."""
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        torch.manual_seed(args.seed)
        rng, clock, progress = random.Random(args.seed), make_clock(torch.device("cpu")), Progress(quiet=False)
        rows = []
        for i in range(args.layers):
            rows.append(measure(draw(rng), DTYPES[args.dtype], args.rounds, clock))
            if progress.due():
                progress.show(f"{i + 1} of {args.layers} layers")
        progress.clear()
    finally:
        torch.set_num_threads(before)
    if args.json:
        write_json(args.json, {"dtype": args.dtype, "threads": args.threads, "rows": rows})
    return rows


if __name__ == "__main__":
    sys.exit(main())
