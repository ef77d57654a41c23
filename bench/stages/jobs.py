"""The commands of bench/gpu.py, their stages, and the processes of each stage."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.layers.networks import parse_layer
from bench.layers.rows import KINDS

BENCH = Path(__file__).resolve().parents[1]
PYTHON = (sys.executable, "-u")
PARTS = 8  # processes side by side, on a GPU
TILES, NORMS = "tests/test_gpu_tiles.py", "tests/test_triton_norm.py"
SWEPT = "resnet50.layer3.3x3"  # the layer whose tiles are all timed
# The kernels that a sanitizer watches; PyTorch's own would take hours.
OURS = "^(fprop|dgrad|wgrad|add_splits|scatter_kernel|gather_kernel|norm_)"


class Job(NamedTuple):
    """One process, which writes FOLDER/name.json, or of pytest FOLDER/name.xml. `share`: of its stage's time."""

    name: str
    command: tuple[str, ...]
    share: float = 1.0
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Stage:
    """Jobs, one after the other or all at once, and the share of the command's time that they may take."""

    name: str
    share: float
    jobs: list[Job]
    parallel: bool = False
    missing: str = ""  # why it cannot run here


COMMANDS = ("check", "layers", "steps")


def stages(command: str, folder: Path, on_gpu: bool, quick: bool, seconds: float) -> list[Stage]:
    """The stages of a command, the most important first. `folder` is where jobs write; `seconds` are for all."""
    of = {"check": _check_stages, "layers": _layer_stages, "steps": _step_stages}[command]
    return of(folder, on_gpu, quick, seconds)


def _check_stages(folder: Path, on_gpu: bool, quick: bool, seconds: float) -> list[Stage]:
    tests = pytest(folder, "tests", "tests", "-m", "device or gpu", f"--ignore={TILES}", workers=PARTS)
    if quick:
        tests = pytest(folder, "tests", "tests/test_geometry.py")
    tiles = pytest(folder, "tiles", TILES, "-k", "real_layer", workers=PARTS)
    # A failure is shown as it was drawn: making it smaller takes minutes.
    drawn = (("HYPOTHESIS_PROFILE", "device"),)
    return [
        Stage("tests", 5, [Job("tests", tests, environment=drawn)]),
        Stage("tiles", 3, [Job("tiles", tiles)], missing="" if on_gpu else "no CUDA device"),
        Stage("launch", 1, [Job("launch", script("launch", folder, "launch", *(["--quick"] * quick)))]),
    ]


def _layer_stages(folder: Path, on_gpu: bool, quick: bool, seconds: float) -> list[Stage]:
    missing = "" if on_gpu else "no CUDA device"
    return [
        Stage("compile", 2, compile_jobs(folder), parallel=True, missing=missing),
        Stage("layers", 5, layer_jobs(folder, quick, 5 / 9 * seconds)),
        Stage("sweep", 2, sweep_jobs(folder, 2 / 9 * seconds), missing=missing),
    ]


def _step_stages(folder: Path, on_gpu: bool, quick: bool, seconds: float) -> list[Stage]:
    sanitizer = find_sanitizer()
    missing = "" if sanitizer else "compute-sanitizer is neither on the PATH nor in /usr/local/cuda*/bin"
    if not on_gpu:
        missing = "no CUDA device"
    return [
        Stage("step", 4, step_jobs(folder, quick, 4 / 5 * seconds)),
        Stage("sanitizer", 1, sanitizer_jobs(folder, sanitizer or ""), parallel=True, missing=missing),
    ]


# ---------------------------------------------------------------- processes


def pytest(folder: Path, name: str, *what: str, workers: int = 0) -> tuple[str, ...]:
    """pytest over some tests, in so many processes where pytest-xdist is installed; it writes FOLDER/name.xml.

    addopts= : the project's own options ask for pytest-xdist, and leave the slow tests out.
    """
    parallel = ("-n", str(workers)) if workers and importlib.util.find_spec("xdist") else ()
    options = ("-o", "addopts=", "-q", "--strict-markers", *parallel, "-p", "no:cacheprovider")
    return (*PYTHON, "-m", "pytest", *options, f"--junitxml={folder / f'{name}.xml'}", *what)


def script(script: str, folder: Path, name: str, *options: str) -> tuple[str, ...]:
    """A script of this folder that writes FOLDER/name.json."""
    return (*PYTHON, str(BENCH / f"{script}.py"), "--json", str(folder / f"{name}.json"), *options)


class Run(NamedTuple):
    """A run of bench/run.py, and its share of the time of all."""

    name: str
    share: float
    layers: list[str]
    options: list[str]


def runs(quick: bool) -> list[Run]:
    """The whole network, then what the goals ask of the 3x3 layers; each backend in a process of its own."""
    if quick:
        return [Run("toy", 1, ["16,16,3,1,6"], ["--blocksize", "8x8", "group", "--batch", "8", "--quick"])]
    three = [f"resnet50.layer{stage}.3x3" for stage in (1, 2, 3, 4)]
    sparsities = ["--sparsity", "0", "0.5", "0.7", "0.8", "0.95", "0.98"]
    return [
        Run("net", 5, ["resnet50"], ["--blocksize", "32x32", "groupx8", "group"]),
        Run("hrbp", 2, three, ["--structure", "hrbp", "--tap-density", "4/9"]),
        Run("triton", 2, three, ["--blocksize", "32x32", "64x8", "--backend", "triton"]),
        Run("cupy", 2, three, ["--blocksize", "group", "8x1", "--backend", "cupy"]),
        Run("sparsity-32x32", 1, three[2:3], ["--blocksize", "32x32", "--backend", "triton", *sparsities]),
        Run("sparsity-group", 1, three[2:3], ["--blocksize", "group", "--backend", "cupy", *sparsities]),
        Run("batch256", 2, three, ["--batch", "256"]),
        Run("bf16", 1, three, ["--dtype", "bf16"]),
    ]


def layer_jobs(folder: Path, quick: bool, seconds: float) -> list[Job]:
    found = runs(quick)
    whole = sum(run.share for run in found)
    jobs = []
    for run in found:
        # Checks and warm-up come before a run's own clock; the rest is repetitions.
        clock = f"{0.6 * seconds * run.share / whole:.0f}"
        name = f"layers-{run.name}"
        options = ("--layer", *run.layers, *run.options, "--seconds", clock, *(() if quick else ("--keep",)))
        jobs.append(Job(name, script("run", folder, name, *options), run.share))
    return jobs


def compile_jobs(folder: Path) -> list[Job]:
    """The runs again, one repetition each, in pieces that run side by side: their compilers fill the caches."""
    jobs = []
    for run in runs(quick=False):
        layers = [layer.full_name for spec in run.layers for layer in parse_layer(spec)]
        pieces = [layers[i::PARTS] for i in range(PARTS)] if len(layers) > PARTS else [layers]
        for i, piece in enumerate(pieces):
            name = f"compile-{run.name}-{i}"
            options = ("--layer", *piece, *run.options, "--repeats", "1")
            jobs.append(Job(name, script("run", folder, name, *options)))
    for kind in KINDS:
        name = f"compile-sweep-{kind}"
        options = ("--layer", SWEPT, "--kind", kind, "--repeats", "1")
        jobs.append(Job(name, script("sweep", folder, name, *options)))
    return jobs


def sweep_jobs(folder: Path, seconds: float) -> list[Job]:
    """Every tile, of Triton and of CUDA C++, each in a process of its own."""
    jobs = []
    for name, share, blocks in (("sweep-triton", 2.0, ["32x32", "64x8"]), ("sweep-cupy", 1.0, ["group"])):
        clock = f"{0.6 * seconds * share / 3:.0f}"
        options = ("--layer", SWEPT, "--blocksize", *blocks, "--seconds", clock)
        jobs.append(Job(name, script("sweep", folder, name, *options), share))
    return jobs


def step_jobs(folder: Path, quick: bool, seconds: float) -> list[Job]:
    """A process for each network, the small ones first; eager and in CUDA graphs, then through torch.compile."""
    if quick:
        options = ("--network", "resnet8", "--structure", "block", "--quick")
        return [Job("step-resnet8", script("step", folder, "step-resnet8", *options))]
    shares = {"vgg19": 1.0, "wrn32-2": 1.0, "resnet50": 2.0}
    whole = 2 * sum(shares.values())
    made = []
    for (network, share), more in [(job, more) for more in ((), ("--compile",)) for job in shares.items()]:
        name = f"step-{network}{'-compiled' if more else ''}"
        clock = f"{0.5 * seconds * share / whole:.0f}"
        words = script("step", folder, name, "--network", network, "--seconds", clock, *more)
        made.append(Job(name, words, share))
    return made


def sanitizer_jobs(folder: Path, sanitizer: str) -> list[Job]:
    """compute-sanitizer's tools over a strided 3x3 of a few pixels, every kind, and BatchNorm, on our kernels alone."""
    small, norms = "small_layer and 128_128_3_2_5 and half", (NORMS, "-k", "whole_and_partial")
    cupy = TILES, "-k", f"{small} and cupy"
    tools = [("memcheck", "", (TILES, "-k", small)), ("racecheck", "", cupy), ("synccheck", "", cupy)]
    tools += [("memcheck", "-norm", norms), ("racecheck", "-norm", norms)]
    return [
        Job(tool + name, (sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", f"regex={OURS}",
                          *pytest(folder, tool + name, *which)))
        for tool, name, which in tools
    ]  # fmt: skip


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or beside a CUDA toolkit."""
    beside = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"), reverse=True)
    return shutil.which("compute-sanitizer") or next((str(file) for file in beside), None)
