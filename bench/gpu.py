"""python bench/gpu.py: every check and measurement that needs a GPU, in three commands. --help explains all of it."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
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
from bench.stages.jobs import COMMANDS, stages
from bench.stages.running import run_stage, summary_of
from blocksparse.kernels import measured
from hrbp.files import write_json
from hrbp.progress import duration

DESCRIPTION = """\
Runs what needs a GPU, stage by stage, each stage processes of their own with a share of the time. Three commands, each
of under nine minutes:

  check   tests      pytest -m "device or gpu": all that uses a GPU, in parallel where pytest-xdist is installed
          tiles      every shipped tile on real layers against float64 (tests/test_gpu_tiles.py, in parallel likewise)
          launch     host time of a module call (bench/launch.py)
  layers  compile    the kernels of the layers, side by side: each layer once, checked
          layers     every layer, structure and backend against the best dense convolution (bench/run.py)
          sweep      every tile of one layer's kernels beside the chosen one (bench/sweep.py)
  steps   step       whole training steps: eager, as CUDA graphs, through torch.compile (bench/step.py)
          sanitizer  compute-sanitizer over small layers: memcheck, racecheck, synccheck

  python bench/gpu.py check --out gpu
  python bench/gpu.py layers --out gpu
  python bench/gpu.py steps --out gpu
  python bench/gpu.py layers --out toy --quick                     # without a GPU, at toy sizes: a minute

A command writes three files: OUT/COMMAND.json, every row as it comes; OUT/COMMAND.log, what the processes print;
OUT/COMMAND.tar.gz, when all is done, their own files and the table of measured products (bench/run.py --keep). A stage
that takes longer than its share leaves less to the others; a process at its limit is stopped, and what it has measured
is kept. bench/page.py makes tables of the files.
Exit status: 0; 1 if a stage found something wrong, was stopped at its limit or could not run; 2 for wrong options; 130
if interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages of a command; returns the exit status."""
    args = parse_arguments(argv)
    begin, on_gpu = time.monotonic(), torch.cuda.is_available()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="blocksparse-gpu-"))
    found = stages(args.command, folder, on_gpu, args.quick, args.seconds)
    chosen = [stage for stage in found if not args.stages or stage.name in args.stages]
    results: dict[str, Any] = {
        "kind": "gpu",
        "format": FORMAT,
        "command": args.command,
        "complete": False,
        "machine": machine.describe(torch.device("cuda" if on_gpu else "cpu")) | {"gpu": gpu_facts(on_gpu)},
        "seconds": 0.0,
        "stages": {},
    }
    file = args.out / f"{args.command}.json"

    def keep() -> None:
        results["seconds"] = time.monotonic() - begin
        write_json(file, results)

    keep()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped like an interrupt
    interrupted = False
    try:
        with (args.out / f"{args.command}.log").open("a") as log:
            for at, stage in enumerate(chosen):
                # What earlier stages did not use, or took too much, is shared out over those to come.
                left = begin + args.seconds - time.monotonic()
                seconds = left * stage.share / sum(each.share for each in chosen[at:])
                about = f"at most {duration(seconds)}, about {duration(max(0.0, left))} left"
                print(f"[{at + 1}/{len(chosen)}] {stage.name}: {about}", flush=True)
                of_stage: dict[str, Any] = {}
                results["stages"][stage.name] = of_stage
                try:
                    run_stage(stage, seconds, folder, log, of_stage, keep)
                except KeyboardInterrupt:
                    interrupted = True
                print("  " + summary_of(stage.name, of_stage), flush=True)
                if interrupted:
                    break
        results["complete"] = not interrupted
        results["machine"]["gpu after"] = gpu_facts(on_gpu)
        keep()
        if measured.HERE.exists():  # what --keep has written
            shutil.copytree(measured.HERE, folder / "measured", dirs_exist_ok=True)
        with tarfile.open(args.out / f"{args.command}.tar.gz", "w:gz") as archive:
            archive.add(folder, arcname=args.command)
    finally:
        signal.signal(signal.SIGTERM, previous)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{file}; python bench/page.py {file} --out page makes tables of it")
    if interrupted:
        return 130
    bad = ("failed", "late", "not run") if on_gpu else ("failed", "late")
    return 1 if any(each["status"] in bad for each in results["stages"].values()) else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("gpu", DESCRIPTION)
    names = [stage.name for command in COMMANDS for stage in stages(command, Path(), False, True, 1.0)]
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results and logs go")
    parser.add_argument("--stages", nargs="+", choices=names, help="only these of the command")
    parser.add_argument("--seconds", type=float, default=520.0, help="for the whole command (default %(default)g)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that every stage runs")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()  # processes run in the root of the repository
    if not torch.cuda.is_available() and not args.quick:
        parser.error("PyTorch sees no CUDA device here; --quick runs the stages at toy sizes on the CPU")
    if args.seconds <= 0:
        parser.error(f"--seconds {args.seconds}: it needs a positive number")
    own = [stage.name for stage in stages(args.command, Path(), False, True, 1.0)]
    if args.stages and not set(args.stages) <= set(own):
        parser.error(f"--stages {' '.join(args.stages)}: {args.command} has {', '.join(own)}")
    return args


def gpu_facts(on_gpu: bool) -> dict[str, str] | str:
    """What nvidia-smi says of driver, clocks, power, temperature and memory."""
    if not on_gpu:
        return "no CUDA device"
    names = [
        "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
        "temperature.gpu", "memory.total", "clocks_throttle_reasons.active",
    ]  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi did not answer: {error}"
    return dict(zip(names, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=True))


if __name__ == "__main__":
    sys.exit(main())
