"""python bench/page.py FILES --out FOLDER: tables and figures from result files, and from nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the checkout that it stands in is used
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.pages.devices import read
from bench.pages.figure import draw, draw_speed
from bench.pages.tables import page
from bench.shared.options import make_parser
from hrbp.reports.html_page import write_page

DESCRIPTION = """\
Makes FOLDER/index.md, the same as FOLDER/index.html (one file, whose tables sort) and, with matplotlib,
FOLDER/speed-DEVICE.png and FOLDER/roofline-DEVICE.png, from result files (--json) of bench/run.py, bench/step.py,
bench/infer.py and bench/launch.py, and the files of bench/gpu.py: for each device its layers against the best dense
convolution, whole steps, inference, host time, what was checked, and on a GPU the goals (bench/goals.json).

  python bench/page.py bench/results/*.json --out page
  python bench/page.py gpu/*.json --out page

It takes a few seconds and measures nothing. Exit status: 0; 2 for a file that is no result of this benchmark.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit status."""
    parser = make_parser("page", DESCRIPTION)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        devices = read(args.files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"not a result file of this benchmark: {type(error).__name__}: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    text = []
    for device in devices:
        text += page(device)
        name = "".join(c if c.isalnum() else "-" for c in device.name)
        for kind, drawn in (("speed", draw_speed), ("roofline", draw)):
            if drawn(device, args.out / f"{kind}-{name}.png"):
                text += [f"![{kind}]({kind}-{name}.png)", ""]
    (args.out / "index.md").write_text("\n".join(text).rstrip() + "\n")
    write_page(args.out / "index.html", "blocksparse: measured speed", ["# Measured speed", "", *text])
    print(args.out / "index.md")
    print(args.out / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
