"""Fit the cost model that chooses between stored blocks and the dense product on a CPU to times measured here.

    python bench/calibrate.py --layers 300 --json times.json      measure, print constants for kernels/cost.py
    python bench/calibrate.py --read times.json                   fit again, and say how well the choice does
    python bench/calibrate.py --check times.json                  how the shipped constants choose on measured layers

Layers are random: 8 to 1024 channels, 4x4 to 64x64 pixels, batches of 1 to 64, kernels of 1 to 7, strides 1 and 2, 2%
to 100% of the weights, blocks from single weights to (32, 32), contiguous and channels_last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import numpy as np
import torch

import blocksparse as bs
from blocksparse.geometry import KINDS
from blocksparse.kernels import cost

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1), (1, 1), (8, 1), (4, 1), (1, 8), (0, 1), (1, 0))
MOST = 1.5e9  # multiplications of a dense product


def draw(rng: random.Random) -> dict[str, Any]:
    """A layer that a person could meet. A 0 in a block size: an eighth of the channels."""
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


def measure(layer: dict[str, Any], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of each product on either backend: the least of interleaved rounds."""
    pattern = bs.BSRPattern.random(tuple(layer["weight"]), tuple(layer["blocksize"]), layer["density"])
    layout = torch.channels_last if layer["channels_last"] else torch.contiguous_format
    conv = layer["stride"], layer["padding"], 1
    x = torch.randn(layer["x"], dtype=dtype).contiguous(memory_format=layout)
    values = torch.randn(pattern.nnzb, *pattern.blocksize, dtype=dtype)
    dy = torch.randn_like(bs.conv2d(x, values, pattern, None, *conv, backend="cpu"))
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for backend in ("cpu", "torch"):
            calls = {
                "fprop": lambda b=backend: bs.conv2d(x, values, pattern, None, *conv, backend=b),
                "dgrad": lambda b=backend: bs.conv2d_dgrad(dy, values, pattern, x.shape, *conv, backend=b),
                "wgrad": lambda b=backend: bs.conv2d_wgrad(x, dy, pattern, *conv, backend=b),
            }
            for kind, call in calls.items():
                start = time.perf_counter()
                call()
                times.setdefault(f"{backend} {kind}", []).append(time.perf_counter() - start)
    return {
        **layer,
        "dtype": str(dtype).removeprefix("torch."),
        "nnzb": pattern.nnzb,
        "seconds": {name: min(t) for name, t in times.items()},
    }


def terms(row: dict[str, Any], kind: str) -> tuple[cost.Terms, cost.Terms]:
    g = bs.ConvGeometry.of(row["x"], row["weight"], row["stride"], row["padding"])
    blocksize = tuple(row["blocksize"])
    facts = row["channels_last"], row["dtype"] in ("float16", "bfloat16")
    return cost.stored_terms(kind, g, blocksize, row["nnzb"], *facts), cost.dense_terms(g, blocksize, row["nnzb"])


def fit(rows: list[dict[str, Any]], kind: str, side: int) -> cost.Terms:
    """Constants >= 0 of the least squares of relative errors."""
    from scipy.optimize import nnls

    seconds = np.array([row["seconds"][f"{('cpu', 'torch')[side]} {kind}"] for row in rows])
    counts = np.array([terms(row, kind)[side] for row in rows])
    return cost.Terms(*nnls(counts / seconds[:, None] * 1e-9, np.ones(len(rows)))[0])


def judge(rows: list[dict[str, Any]], constants: dict[str, tuple[cost.Terms, cost.Terms]], threads: int) -> None:
    """Print how much longer the chosen product takes than the faster one, and than dense."""
    print(f"{'# kind':<8}{'blocks':>8}{'mean':>8}{'worst':>8}{'> 5% over dense':>18}   over the faster one")
    for kind in KINDS:
        ratios, over, blocks = [], [], 0
        for row in rows:
            stored, dense = (
                cost.seconds(t, c, threads) for t, c in zip(terms(row, kind), constants[kind], strict=True)
            )
            chosen = "cpu" if cost.MARGIN * stored < dense else "torch"
            blocks += chosen == "cpu"
            took = row["seconds"][f"{chosen} {kind}"]
            ratios.append(took / min(row["seconds"][f"{b} {kind}"] for b in ("cpu", "torch")))
            over.append(took / row["seconds"][f"torch {kind}"])
        late = sum(r > 1.05 for r in over)
        print(f"# {kind:<6}{blocks:>8}{statistics.mean(ratios):>8.3f}{max(ratios):>8.2f}{late:>10} of {len(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=300, help="random layers to measure (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write what was measured")
    parser.add_argument("--read", nargs="+", help="files of measurements: fit these")
    parser.add_argument("--check", nargs="+", help="files of measurements: judge the shipped constants")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.read or args.check:
        rows = []
        for name in args.read or args.check:
            with open(name) as file:
                found = json.load(file)
                rows += [{"dtype": found["dtype"], **row} for row in found["rows"]]
    else:
        rng, rows = random.Random(args.seed), []
        torch.manual_seed(args.seed)
        for i in range(args.layers):
            rows.append(measure(draw(rng), DTYPES[args.dtype], args.rounds))
            print(f"\r{i + 1} of {args.layers} layers", end="", flush=True)
        print()
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"dtype": args.dtype, "threads": args.threads, "rows": rows}, file)
    for last in (False, True):
        some = [row for row in rows if row["channels_last"] == last]
        if args.check:
            constants = cost.CPU[DTYPES[args.dtype], last]
        else:
            constants = {kind: (fit(some, kind, 0), fit(some, kind, 1)) for kind in KINDS}
            print(f"(torch.{args.dtype}, {last}): {{")
            for kind, sides in constants.items():
                print(f'    "{kind}": (')
                for side in sides:
                    print(f"        Terms({', '.join(f'{value:.3g}' for value in side)}),")
                print("    ),")
            print("},")
        print(f"# {len(some)} layers, {'channels_last' if last else 'contiguous'}")
        judge(some, constants, args.threads)


if __name__ == "__main__":
    main()
