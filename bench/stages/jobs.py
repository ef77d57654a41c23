"""The stages of bench/gpu.py, and the processes of each."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.layers.networks import parse_layer

BENCH = Path(__file__).resolve().parents[1]
PYTHON = (sys.executable, "-u")
PARTS = 8  # processes of tests and tiles, on a GPU
TILES = "tests/test_gpu_tiles.py"


class Job(NamedTuple):
    """One process. Its result is OUT/name.json, of pytest OUT/name.xml; a share of its stage's time is its limit."""

    name: str
    command: tuple[str, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Jobs, one after the other or all at once, and the seconds that they may take of a whole run of ten minutes."""

    name: str
    seconds: float
    jobs: list[Job]
    parallel: bool = False
    missing: str = ""  # why it cannot run here


def stages(out: Path, on_gpu: bool, quick: bool, scale: float = 1.0) -> list[Stage]:
    """All stages, the most important first."""
    no_gpu = "" if on_gpu else "no CUDA device"
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = "" if sanitizer else "compute-sanitizer is not on the PATH"
    tests = pytest(out, "tests", "tests", "-m", "device or gpu", f"--ignore={TILES}", workers=PARTS)
    if quick:
        tests = pytest(out, "tests", "tests/test_geometry.py")
    tiles = pytest(out, "tiles", TILES, "-k", "real_layer", workers=PARTS)
    of_small = "small_layer and 128_128_3_2_5"  # the strided 3x3
    memory = [
        Job(tool, (sanitizer or "", "--tool", tool, "--error-exitcode", "9", *pytest(out, tool, TILES, "-k", which)))
        for tool, which in (("memcheck", f"{of_small} and half"), ("racecheck", f"{of_small} and half and cupy"))
    ]
    quickly = ("--quick",) if quick else ()
    return [
        Stage("tests", 130 * scale, [Job("tests", tests)]),
        Stage("tiles", 70 * scale, [Job("tiles", tiles)], missing=no_gpu),
        Stage("sanitizer", 40 * scale, memory, missing=no_gpu or no_sanitizer),
        Stage("launch", 15 * scale, [Job("launch", script("launch", out / "launch.json", *quickly))]),
        Stage("compile", 70 * scale, compile_jobs(out), parallel=True, missing=no_gpu),
        Stage("layers", 165 * scale, layer_jobs(out, quick, 165 * scale)),
        Stage("step", 110 * scale, [step_job(out, quick, 110 * scale)]),
    ]


def pytest(out: Path, name: str, *what: str, workers: int = 0) -> tuple[str, ...]:
    """pytest over some tests, in so many processes where pytest-xdist is installed; it writes OUT/name.xml.

    addopts= : the project's own options ask for pytest-xdist, and leave the slow tests out.
    """
    parallel = ("-n", str(workers)) if workers and importlib.util.find_spec("xdist") else ()
    options = ("-o", "addopts=", "-q", "--strict-markers", *parallel, "-p", "no:cacheprovider")
    return (*PYTHON, "-m", "pytest", *options, f"--junitxml={out / f'{name}.xml'}", *what)


def script(name: str, json_file: Path, *options: str) -> tuple[str, ...]:
    return (*PYTHON, str(BENCH / f"{name}.py"), "--json", str(json_file), *options)


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
