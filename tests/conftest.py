"""Where the suites run: on a GPU where there is one, else Triton in its interpreter and CUDA C++ under g++."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bench/, behind whatever is installed

# Of this process and of those that it starts: the tests' tensors are too small for more, and threads that wait for each
# other take many times as long where something else runs. test_threads.py is about several. Before PyTorch is imported.
os.environ.update(processes.ONE_THREAD | processes.COMPILED)

import torch

# Triton reads this when a kernel is decorated: before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, register_random, settings

import interpreter
from blocksparse.kernels import cupy_conv
from emulator import Emulator

torch.set_num_threads(1)
sys.setrecursionlimit(max(sys.getrecursionlimit(), 2000))  # as PyTorch's compiler does when it first runs
if not torch.cuda.is_available():
    cupy_conv.runtime = Emulator()
    if importlib.util.find_spec("triton"):
        interpreter.lighten()

# The default keeps the whole run short on two cores, and draws the same cases in every run: what passes passes again.
# HYPOTHESIS_PROFILE=random draws others, deep twenty times as many of them; device shows a failure as it was drawn, for
# a GPU that is lent by the minute.
_common = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=100, derandomize=True, **_common)
settings.register_profile("random", max_examples=100, **_common)
settings.register_profile("deep", max_examples=2000, **_common)
settings.register_profile("device", max_examples=100, phases=(Phase.explicit, Phase.generate), **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are left out where there is none: they say nothing there."""
    left_out = [] if torch.cuda.is_available() else [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """What is imported and collected lives to the end: Python's garbage collector need not look through it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests marked gpu are left out: PyTorch sees no CUDA device")


class TorchRandom:
    """PyTorch's generator, for Hypothesis: each case starts it anew, so that a case that failed fails again."""

    seed = torch.default_generator.manual_seed
    getstate = torch.default_generator.get_state
    setstate = torch.default_generator.set_state


torch_random = TorchRandom()  # Hypothesis keeps a weak reference
register_random(torch_random)
SIGNALS = [
    number for name in ("INT", "TERM", "ALRM", "XFSZ", "HUP", "PIPE", "USR1", "USR2", "QUIT", "ABRT")
    if (number := getattr(signal, f"SIG{name}", None)) is not None
]  # fmt: skip
NOT_OURS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR", "_TORCHINDUCTOR")  # what pytest, and PyTorch's compiler, set
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


def process_state() -> dict[str, object]:
    """What all tests of a process share: settings of PyTorch, NumPy, the system and Python."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cuDNN": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "autocast": torch.is_autocast_enabled("cpu"),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "NumPy's errors": np.geterr(),
        "runtime": cupy_conv.runtime,
        **{name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)},
        "directory": os.getcwd(),
        "sys.path": [path for path in sys.path if "site-packages" not in path],  # setuptools adds its own
        "switch interval": sys.getswitchinterval(),
        "recursion limit": sys.getrecursionlimit(),
        "signals": {number: signal.getsignal(number) for number in SIGNALS},
        "alarm": signal.getitimer(signal.ITIMER_REAL),
        "limits": {number: resource.getrlimit(number) for number in LIMITS},
    }


@pytest.fixture(autouse=True)
def alone():
    """No test sees what ran before it: its random numbers start anew, and what it sets it puts back."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed remembers each call for a GPU that may never be used
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
        # In float32 as such; test_gpu_tiles.py is about tf32, too.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # it counts what it has compiled, over all tests, and stops at a limit
    before = process_state()
    yield
    _end_after_a_sticky_error()
    after = process_state()
    changed = sorted(str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"the test has left behind: {', '.join(f'{n} = {after.get(n)}' for n in changed)}"


def _end_after_a_sticky_error() -> None:
    """A kernel that has crashed makes every later call of the process fail: pytest-xdist goes on in a new process."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"\n{os.environ.get('PYTEST_CURRENT_TEST')}: {error}", file=sys.__stderr__, flush=True)
        os._exit(70)


@pytest.fixture
def limited():
    """A test whose workers hang fails."""
    with processes.limited():
        yield


@pytest.fixture
def no_figures(monkeypatch):
    """A figure of a training takes longer than a training of the tests: an empty file stands for it."""
    from hrbp.training import log

    def draw(path: Path, history: Any, name: str = "") -> None:
        log.check_plot(path)
        path.touch()

    monkeypatch.setattr(log, "draw_training", draw)


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN: an element that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
