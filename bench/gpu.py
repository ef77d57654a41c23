"""python bench/gpu.py: every check that needs a GPU, in one command of ten minutes. --help explains all of it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import machine
import report
from layers import parse_layer

DESCRIPTION = """\
Runs every check that needs a GPU, stage by stage, each a process of its own with a share of the time:

  tests      pytest over the files that use a GPU, in parallel where pytest-xdist is installed
  tiles      every shipped tile on real layers against float64 (bench/tiles_check.py)
  sanitizer  compute-sanitizer over small layers: memcheck, racecheck
  launch     host time of a module call (bench/launch.py)
  compile    the kernels of the layers, side by side: each layer once, checked
  layers     every layer, structure and backend against the best dense convolution (bench/run.py)
  step       whole training steps (bench/step.py)

  PYTHONPATH=. python bench/gpu.py --out gpu
  PYTHONPATH=. python bench/gpu.py --out gpu --stages layers step --seconds 300

What a stage finds is written to OUT/results.json when it ends, its output goes to OUT/log.txt as it comes, and the
files of a stage that was killed stay beside them: nothing that was measured is lost. Exit status: 0; 1 if a stage
found something wrong or was stopped at its limit; 2 for wrong options; 130 if interrupted. Without a GPU, --quick runs
all of it at toy sizes.
"""

HERE = Path(__file__).resolve().parent
PYTHON = (sys.executable, "-u")
PARTS = 8  # processes of tests and tiles, on a GPU
PATIENCE = 8.0  # seconds between an interrupt and the end


class Job(NamedTuple):
    """One process. Its result is OUT/name.json, and a share of its stage's time is its limit."""

    name: str
    command: tuple[str, ...]
    share: float = 1.0
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Stage:
    """Jobs, one after the other or all at once, and the seconds that they may take of a whole run of ten minutes."""

    name: str
    seconds: float
    jobs: list[Job]
    parallel: bool = False
    missing: str = ""  # why it cannot run here


def stages(out: Path, on_gpu: bool, quick: bool, scale: float = 1.0) -> list[Stage]:
    """All stages, in the order in which they are worth having."""
    tests = ["tests/test_geometry.py"] if quick else device_tests()  # the slow ones, too
    workers = ("-n", str(PARTS)) if not quick and importlib.util.find_spec("xdist") else ()
    # addopts= : the project's own options ask for pytest-xdist, and leave the slow tests out.
    options = ("-o", "addopts=", "-q", "--strict-markers", *workers, "-p", "no:cacheprovider")
    pytest = (*PYTHON, "-m", "pytest", *options, f"--junitxml={out / 'tests.xml'}", *tests)
    interpreter = () if on_gpu else (("TRITON_INTERPRET", "1"),)
    small = ("--small",) if quick else ()
    parts = [f"{i}/{PARTS}" for i in range(PARTS)] if not quick else ["0/64"]
    tiles = [
        Job(f"tiles-{i}", script("tiles_check", out / f"tiles-{i}.json", "--part", part, *small), 1, interpreter)
        for i, part in enumerate(parts)
    ]
    sanitizer = shutil.which("compute-sanitizer")
    missing = "" if on_gpu else "no CUDA device"
    if on_gpu and not sanitizer:
        missing = "compute-sanitizer is not on the PATH"
    memory = [
        Job(
            tool,
            (
                sanitizer or "", "--tool", tool, "--error-exitcode", "9",
                *script("tiles_check", out / f"{tool}.json", "--small", "--part", part),
            ),
        )
        for tool, part in (("memcheck", "0/12"), ("racecheck", "1/24"))
    ]  # fmt: skip
    quickly = ("--quick",) if quick else ()
    return [
        Stage("tests", 130 * scale, [Job("tests", pytest)]),
        Stage("tiles", 70 * scale, tiles, parallel=True),
        Stage("sanitizer", 40 * scale, memory, missing=missing),
        Stage("launch", 15 * scale, [Job("launch", script("launch", out / "launch.json", *quickly))]),
        Stage("compile", 70 * scale, compile_jobs(out), parallel=True, missing="" if on_gpu else "no CUDA device"),
        Stage("layers", 165 * scale, layer_jobs(out, quick, 165 * scale)),
        Stage("step", 110 * scale, [step_job(out, quick, 110 * scale)]),
    ]


def device_tests() -> list[str]:
    """The test files that run on a GPU where there is one."""
    files = sorted((HERE.parent / "tests").glob("test_*.py"))
    return [f"tests/{f.name}" for f in files if re.search("cuda|RUNNERS", f.read_text()) and "compile" not in f.name]


def script(name: str, json_file: Path, *options: str) -> tuple[str, ...]:
    return (*PYTHON, str(HERE / f"{name}.py"), "--json", str(json_file), *options)


class Run(NamedTuple):
    """A run of bench/run.py, and its share of the time of all."""

    name: str
    share: float
    layers: list[str]
    options: list[str]


def runs(quick: bool) -> list[Run]:
    """The whole network, then what the goals ask of the 3x3 layers."""
    if quick:
        return [Run("toy", 1, ["16,16,3,1,6"], ["--blocksize", "8x8", "group", "--batch", "8", "--quick"])]
    three = [f"resnet50.layer{stage}.3x3" for stage in (1, 2, 3, 4)]
    return [
        Run("net", 5, ["resnet50"], ["--blocksize", "32x32", "groupx8", "group"]),
        Run("hrbp", 2, three, ["--structure", "hrbp", "--tap-density", "4/9"]),
        Run("backends", 2, three, ["--blocksize", "32x32", "group", "--backend", "torch", "triton", "cupy"]),
        Run(
            "sparsity",
            2,
            three[2:3],
            ["--backend", "triton", "torch", "--sparsity", "0", "0.5", "0.7", "0.8", "0.95", "0.98"],
        ),
        Run("bf16", 1, three, ["--dtype", "bf16"]),
        Run("batch256", 2, three, ["--batch", "256"]),
    ]


def layer_jobs(out: Path, quick: bool, seconds: float) -> list[Job]:
    found = runs(quick)
    whole = sum(run.share for run in found)
    jobs = []
    for run in found:
        # Checks and warm-up come before a run's own clock; the rest is repetitions.
        clock = f"{0.6 * seconds * run.share / whole:.0f}"
        options = ("--layer", *run.layers, *run.options, "--seconds", clock)
        jobs.append(Job(f"layers-{run.name}", script("run", out / f"layers-{run.name}.json", *options), run.share))
    return jobs


def compile_jobs(out: Path) -> list[Job]:
    """The runs again, one repetition each, in pieces that run side by side: their compilers fill the caches."""
    jobs = []
    for run in runs(quick=False):
        layers = [layer.full_name for spec in run.layers for layer in parse_layer(spec)]
        pieces = [layers[i::PARTS] for i in range(PARTS)] if len(layers) > PARTS else [layers]
        for i, piece in enumerate(pieces):
            name = f"compile-{run.name}-{i}"
            options = ("--layer", *piece, *run.options, "--repeats", "1")
            jobs.append(Job(name, script("run", out / f"{name}.json", *options)))
    return jobs


def step_job(out: Path, quick: bool, seconds: float) -> Job:
    options = ["--seconds", f"{0.5 * seconds:.0f}"]
    if quick:
        options = ["--network", "resnet8", "--structure", "block", "--quick"]
    return Job("step", script("step", out / "step.json", *options))


# ---------------------------------------------------------------- running


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
        "complete": False,
        "machine": machine.describe(device) | {"gpu": gpu_facts(on_gpu)},
        "seconds": 0.0,
        "stages": {},
    }

    def keep() -> None:
        results["seconds"] = time.monotonic() - begin
        report.write_json(args.out / "results.json", results)

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
            print(f"[{at + 1}/{len(chosen)}] {stage.name}: at most {seconds:.0f} s, about {left + spare:.0f} s left")
            sys.stdout.flush()
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
    parser = argparse.ArgumentParser(
        "bench/gpu.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


def run_stage(stage: Stage, seconds: float, out: Path, log: Any, found: dict[str, Any]) -> None:
    """Fills `found`: status, why, seconds, and the results of the jobs, also when it is interrupted."""
    begin = time.monotonic()
    found |= {"status": "failed", "why": "", "jobs": {}}
    if stage.missing:
        found |= {"status": "not run", "why": stage.missing, "seconds": 0.0}
        return
    whole = 1.0 if stage.parallel else sum(job.share for job in stage.jobs)
    waiting: list[tuple[Job, subprocess.Popen[bytes], float]] = []
    try:
        for job in stage.jobs:
            (out / f"{job.name}.json").unlink(missing_ok=True)  # of an earlier run
            limit = seconds * job.share / whole
            log.write(f"\n$ {' '.join(job.command)}\n")
            log.flush()
            waiting.append((job, start(job, log), time.monotonic() + limit))
            if not stage.parallel:
                finish(waiting, found, out)
        finish(waiting, found, out)
    finally:
        for job, process, _ in waiting:  # interrupted: what they have written so far counts
            stop(process)
            found["jobs"][job.name] = {"exit": process.returncode, "result": result_of(job, out)}
        found["seconds"] = time.monotonic() - begin
        late = [name for name, job in found["jobs"].items() if job.get("late")]
        wrong = [name for name, job in found["jobs"].items() if job["exit"] != 0 and name not in late]
        found["status"] = "failed" if wrong else "late" if late else "ok"
        reasons = (("exit status not 0", wrong), ("stopped at its limit", late))
        found["why"] = "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons if names)


def start(job: Job, log: Any) -> subprocess.Popen[bytes]:
    root = str(HERE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path} | dict(job.environment)
    return subprocess.Popen(
        job.command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(waiting: list[tuple[Job, subprocess.Popen[bytes], float]], found: dict[str, Any], out: Path) -> None:
    """Waits for every process until its limit."""
    while waiting:
        job, process, end = waiting[0]
        late = False
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            stop(process)
        found["jobs"][job.name] = {"exit": process.returncode, "late": late, "result": result_of(job, out)}
        waiting.pop(0)


def stop(process: subprocess.Popen[bytes]) -> None:
    """An interrupt, after which it writes what it has; then the end, for all that it started."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def result_of(job: Job, out: Path) -> Any:
    """What a job wrote; times of single repetitions stay in its own file."""
    if job.name == "tests":
        return tests_of(out / "tests.xml")
    try:
        return without_laps(json.loads((out / f"{job.name}.json").read_text()))
    except (OSError, ValueError):
        return None


def without_laps(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            name: len(value) if name == "laps" and isinstance(value, list) else without_laps(value)
            for name, value in content.items()
        }
    return [without_laps(value) for value in content] if isinstance(content, list) else content


def tests_of(file: Path) -> dict[str, Any] | None:
    """Counts of pytest, and the names of what failed."""
    try:
        suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    counts = {n: sum(int(s.get(n, 0)) for s in suites) for n in ("tests", "failures", "errors", "skipped")}
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return counts | {"failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad]}


def summary_of(name: str, found: dict[str, Any]) -> str:
    """One line a stage."""
    text = f"{name}: {found.get('status')}, {found.get('seconds', 0.0):.0f} s"
    results = [job["result"] for job in found.get("jobs", {}).values() if job["result"]]
    if name == "tests" and results:
        counts = results[0]
        text += (
            f"; {counts['tests']} tests, {counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped"
        )
    elif results and name not in ("sanitizer", "compile"):
        rows = [row for result in results for row in result["rows"]]
        bad = sum(row["status"] != "ok" for row in rows if "status" in row)
        bad += sum(row["sparse"]["status"] in ("FAIL", "error") for row in rows if "sparse" in row)
        text += f"; {len(rows)} rows, {bad} wrong"
    return text + (f" ({found['why']})" if found.get("why") else "")


if __name__ == "__main__":
    sys.exit(main())
