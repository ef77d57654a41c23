"""python bench/count.py: what the GPU kernels cost, counted in compiled code without a GPU. --help explains it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the checkout that it stands in is counted
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.counts import norms, slots
from bench.counts.cases import SHIPPED, TARGETS, Case
from bench.counts.compiling import counted
from blocksparse.geometry import KINDS
from blocksparse.kernels.tiles import Tile
from hrbp.columns import columns
from hrbp.files import whole_file

TABLE = Path(__file__).resolve().parents[1] / "blocksparse" / "kernels" / "counts" / "triton.json"
CUPY, NORM = TABLE.with_name("cupy.json"), TABLE.with_name("norm.json")
FACTS = ("loop", "mma", "outside", "registers", "spills", "shared", "swizzled", "copy_bytes")

DESCRIPTION = """\
Compiles Triton kernels for targets that need not be here and reads the machine code. One kernel takes two seconds.

  python bench/count.py --kind fprop --blocksize 32x32 --target sm_90     one kernel
  python bench/count.py --kind wgrad --tile 256,32,64,4,3                 with other sizes than the shipped tile
  python bench/count.py --triton /tmp/triton36 --source /tmp/asm          under another Triton; keep the assembly
  python bench/count.py --write --triton /tmp/triton36                    the table of every shipped row, anew

Another Triton is a folder: python -m pip install --no-deps --target /tmp/triton36 triton==3.6.0. With --write the table
gets the rows of both, the other one's for sm_90; this takes some minutes.
  python bench/count.py --cupy                                            the CUDA C++ kernels: a minute
  python bench/count.py --cupy --write                                    their table, anew
  python bench/count.py --norm                                            BatchNorm's kernels: half a minute
  python bench/count.py --norm --write --triton /tmp/triton36             their table of both versions, anew

What it prints, a kernel a line:
  loop        instructions in the main loop, a warp: one K-tile
  mma         tensor-core instructions among them (HGMMA, HMMA, UTCHMMA, v_mfma)
  each        instructions of the loop per tensor-core instruction
  outside     instructions outside the main loop, as they stand: what runs only in rare cases is counted, too
  registers   a thread, and bytes it spills
  shared      bytes of shared memory a program
  swizzled    whether the shared layouts of all operands are: otherwise reads meet on the same banks
  copy_bytes  the narrowest copy into shared memory in the main loop: 16 is best, 0: there is none
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench/count.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--blocksize", nargs="+", type=_pair, default=[(32, 32), (64, 8)], metavar="32x32")
    parser.add_argument("--math", choices=("half", "bf16", "tf32", "ieee"), default="half", help="half is fp16")
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=["sm_90"])
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--kernel", type=int, default=3, help="taps of a side (default 3)")
    parser.add_argument("--height", type=int, default=28, help="of the images, whose width is one more (default 28)")
    parser.add_argument("--contiguous", action="store_true", help="memory format; default channels_last")
    parser.add_argument(
        "--tile", type=_tile, metavar="M,N,K,WARPS,STAGES", help="its sizes; default: as shipped for this layer"
    )
    parser.add_argument("--triton", type=Path, metavar="DIR", help="folder of another Triton; default: this Python's")
    parser.add_argument("--source", type=Path, metavar="DIR", help="write assembly and TTGIR there")
    parser.add_argument(
        "--cupy", action="store_true", help="the CUDA C++ kernels: counted.py says what their columns are"
    )
    parser.add_argument("--norm", action="store_true", help="BatchNorm's kernels: counted.py says what the columns are")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}: all other choices are left out")
    args = parser.parse_args(argv)
    if args.triton and not (args.triton / "triton" / "__init__.py").exists():
        parser.error(f"--triton {args.triton}: there is no triton/__init__.py in it")
    if args.write and not (args.triton or args.cupy):
        parser.error("--write needs --triton with Triton 3.6.0, so that the table has the rows of both versions")
    return args


def _pair(text: str) -> tuple[int, int]:
    bk, bc = map(int, text.split("x"))
    return bk, bc


def _tile(text: str) -> Tile:
    return Tile(*map(int, text.split(",")))


def tabled(triton: Path) -> list[dict[str, Any]]:
    """The rows of the table of counts, in its order."""
    rows = counted([case for arch in TARGETS for case in SHIPPED[arch]], None) + counted(SHIPPED["sm_90"], triton)
    return [{key: value for key, value in row.items() if key != "hash"} for row in rows]


def norm_rows(triton: Path | None) -> list[dict[str, Any]]:
    """The rows of BatchNorm's kernels under this Python's Triton, and under another one."""
    rows = counted(norms.SHIPPED, None) + (counted(norms.SHIPPED, triton) if triton else [])
    return [{key: value for key, value in row.items() if key != "hash"} for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Counts and prints; returns the exit status."""
    args = parse_arguments(argv)
    if args.cupy or args.norm or args.write:
        if args.cupy:
            rows, table = list(slots.rows()), CUPY
        elif args.norm:
            rows, table = norm_rows(args.triton), NORM
        else:
            rows, table = tabled(args.triton), TABLE
        if not args.write:
            print(columns([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
            return 0
        with whole_file(table) as file:  # a row a line
            file.write(("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())
        print(f"{len(rows)} rows in {table}")
        return 0
    layout = "contiguous" if args.contiguous else "channels_last"
    cases = [
        Case(
            kind, arch, blocksize, args.math, args.stride, height=args.height, kernel=args.kernel, format=layout,
            asked=args.tile,
        )
        for arch in args.target for kind in args.kind for blocksize in args.blocksize
    ]  # fmt: skip
    lines = [["target", "kind", "blocks", "tile", *FACTS[:2], "each", *FACTS[2:]]]
    for row in counted(cases, args.triton, args.source):
        blocks, tile = "x".join(map(str, row["blocksize"])), ",".join(str(v) for v in row["tile"].values())
        each = f"{row['loop'] / row['mma']:.1f}" if row["mma"] else "-"
        facts = [str(row[name]) for name in FACTS]
        lines.append([row["target"], row["kind"], blocks, tile, *facts[:2], each, *facts[2:]])
    print(f"Triton {row['triton']}, {layout}, {args.math}, kernel {args.kernel}, stride {args.stride}")
    print(columns(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
