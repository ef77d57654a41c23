"""python bench/gpu.py: every check that needs a GPU, in one command of ten minutes. --help explains all of it."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the checkout that it stands in is measured
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.shared import machine
from bench.shared.options import make_parser
from bench.shared.results import FORMAT
from bench.stages.jobs import stages
from bench.stages.running import run_stage, summary_of
from hrbp.files import write_json
from hrbp.progress import duration

DESCRIPTION = """\
Runs every check that needs a GPU, stage by stage, each a process of its own with a share of the time:

  tests      pytest -m "device or gpu": all that uses a GPU, in parallel where pytest-xdist is installed
  tiles      every shipped tile on real layers against float64 (tests/test_gpu_tiles.py, in parallel likewise)
  sanitizer  compute-sanitizer over small layers: memcheck, racecheck
  launch     host time of a module call (bench/launch.py)
  compile    the kernels of the layers, side by side: each layer once, checked
  layers     every layer, structure and backend against the best dense convolution (bench/run.py)
  step       whole training steps (bench/step.py)

  python bench/gpu.py --out gpu
  python bench/gpu.py --out gpu --stages layers step --seconds 300
  python bench/gpu.py --out toy --quick                            # without a GPU, at toy sizes: two minutes

All stages take under ten minutes together. What a stage finds is written to OUT/results.json when it ends, its output
goes to OUT/log.txt as it comes, and the files of a stage that was killed stay beside them: nothing that was measured is
lost. Exit status: 0; 1 if a stage found something wrong or was stopped at its limit; 2 for wrong options; 130 if
interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit status."""
    args = parse_arguments(argv)
    begin, on_gpu = time.monotonic(), torch.cuda.is_available()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if on_gpu else "cpu")
    scale = args.seconds / 600
    chosen = [s for s in stages(args.out, on_gpu, args.quick, scale) if not args.stages or s.name in args.stages]
    results: dict[str, Any] = {
        "kind": "gpu",
        "format": FORMAT,
        "complete": False,
        "machine": machine.describe(device) | {"gpu": gpu_facts(on_gpu)},
        "seconds": 0.0,
        "stages": {},
    }

    def keep() -> None:
        results["seconds"] = time.monotonic() - begin
        write_json(args.out / "results.json", results)

    keep()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped like an interrupt
    planned = sum(stage.seconds for stage in chosen)
    interrupted = False
    with (args.out / "log.txt").open("a") as log:
        for at, stage in enumerate(chosen):
            left = sum(s.seconds for s in chosen[at:])
            # What earlier stages did not use is shared out over those to come.
            spare = max(0.0, planned - (time.monotonic() - begin) - left)
            seconds = stage.seconds * (1 + spare / left)
            about = f"at most {duration(seconds)}, about {duration(left + spare)} left"
            print(f"[{at + 1}/{len(chosen)}] {stage.name}: {about}", flush=True)
            found: dict[str, Any] = {}
            results["stages"][stage.name] = found
            try:
                run_stage(stage, seconds, args.out, log, found)
            except KeyboardInterrupt:
                interrupted = True
            print("  " + summary_of(stage.name, found), flush=True)
            keep()
            if interrupted:
                break
    signal.signal(signal.SIGTERM, previous)
    results["complete"] = not interrupted
    keep()
    print(
        f"{args.out / 'results.json'}; python bench/page.py {args.out / 'results.json'} --out page makes tables of it"
    )
    if interrupted:
        return 130
    return 1 if any(found["status"] in ("failed", "late") for found in results["stages"].values()) else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("gpu", DESCRIPTION)
    names = [stage.name for stage in stages(Path(), on_gpu=False, quick=True)]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results and logs go")
    parser.add_argument("--stages", nargs="+", choices=names, help="only these")
    parser.add_argument("--seconds", type=float, default=570.0, help="the whole run, if every stage takes its share")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that every stage runs")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()  # processes run in the root of the repository
    if not torch.cuda.is_available() and not args.quick:
        parser.error("PyTorch sees no CUDA device here; --quick runs the stages at toy sizes on the CPU")
    if args.seconds <= 0:
        parser.error(f"--seconds {args.seconds}: it needs a positive number")
    return args


def gpu_facts(on_gpu: bool) -> dict[str, str] | str:
    """What nvidia-smi says of driver, clocks, power and memory."""
    if not on_gpu:
        return "no CUDA device"
    names = ["name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "memory.total"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi did not answer: {error}"
    return dict(zip(names, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=True))


if __name__ == "__main__":
    sys.exit(main())
