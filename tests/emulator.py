"""The CUDA C++ kernels on a CPU: g++ compiles the very source that CuPy gets, behind emulator.h, and runs it.

`Emulator` takes the place of cupy_conv.runtime in the tests: the host code above it, grids, arguments and
specialisation included, is what runs on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import processes
from blocksparse.index import Piece
from blocksparse.kernels import cupy_conv
from processes import ONE_THREAD

HEADER = Path(__file__).parent / "emulator.h"
BUILDS = Path(tempfile.gettempdir()) / f"blocksparse-emulator-{os.getuid()}"
COMMON = ("-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")
FAST = ("-O1", "-fno-trapping-math", "-march=native")
CHECKED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


UNFENCED = 1 << 30  # buffers of this many bytes are not copied between pages that fault


class EmulatorError(AssertionError):
    """A launch did what no launch may do: the message says what."""


def _compile(source: str, target: Path, flags: tuple[str, ...]) -> Path:
    """`target`, compiled unless it is there; processes that do so at once do not meet."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        file, part = (target.with_name(f"{target.stem}.{os.getpid()}{suffix}") for suffix in (".cc", ".part"))
        file.write_text(source)
        result = processes.run(["g++", *COMMON, *flags, str(file), "-o", str(part)])
        assert result.returncode == 0, result.stderr[-6000:]
        os.replace(part, target)
        file.unlink()
    return target


@functools.cache
def _header(flags: tuple[str, ...]) -> Path:
    """The path that includes emulator.h as precompiled for these flags."""
    key = hashlib.sha256("\0".join((HEADER.read_text(), *flags)).encode()).hexdigest()[:24]
    return _compile(HEADER.read_text(), BUILDS / key / "emulator.h.gch", ("-x", "c++-header", *flags)).with_suffix("")


@functools.cache
def build(text: str, flags: tuple[str, ...] = FAST) -> dict[str, Any]:
    """Every kernel of the source `text` as a function that launches it; compiled once for each text and flags."""
    header = _header(flags)
    kernels = re.findall(r"__global__[^{]*?(\w+)\s*\(\s*(?:const|\w+\s*\*)", text)
    for name in kernels:
        text += f"""
extern "C" const char* run_{name}(unsigned grid, unsigned cta, size_t shared_size, uint64_t seed, int count,
                                  void** args, const size_t* bytes) {{
    return emulator::launch({name}, grid, cta, shared_size, seed, count, args, bytes);
}}
"""
    library = header.with_name(hashlib.sha256(text.encode()).hexdigest()[:24] + ".so")
    loaded = ctypes.CDLL(str(_compile(text, library, ("-x", "c++", "-shared", "-include", str(header), *flags))))
    runs = {name: getattr(loaded, f"run_{name}") for name in kernels}
    for run in runs.values():
        run.restype = ctypes.c_char_p
    return runs


def specialised(kind: str, flags: tuple[str, ...]) -> str:
    """A kind's source with its -D in front, as lines: a precompiled header takes no -D."""
    defines = (flag[2:].replace("=", " ") for flag in flags if flag.startswith("-D"))
    return "".join(f"#define {define}\n" for define in defines) + cupy_conv.source(kind)


def sanitized(cases: list[str], prelude: str) -> list[str]:
    """What the sanitizers of CHECKED say about each piece of Python, "" where it runs to its end.

    They end a process that breaks a rule: each piece has its own, forked from one that they are loaded into. That one
    has no second thread, whatever a user's variables ask for: processes.fork makes sure.
    """
    text = f"""
import faulthandler, os, sys
del os.environ["LD_PRELOAD"]  # g++ needs none
sys.path[:0] = [{str(HEADER.parent)!r}, {str(HEADER.parent.parent)!r}]
import processes, torch
torch.set_num_threads(1)
{prelude}
for i, case in enumerate({cases!r}):
    pid = processes.fork()
    if not pid:
        os.dup2(os.open(sys.argv[1] + "/" + str(i), os.O_WRONLY | os.O_CREAT), 2)
        faulthandler.dump_traceback_later(processes.LIMIT / 2, exit=True)
        exec(case)
        os.write(2, b"the end")
        os._exit(0)
    os.waitpid(pid, 0)
"""
    library = processes.run(["g++", "-print-file-name=libasan.so"]).stdout.strip()
    # The sanitizers, not Python's faulthandler, say what a signal was about.
    settings = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONFAULTHANDLER": "", **ONE_THREAD}
    with tempfile.TemporaryDirectory() as folder:
        result = processes.run([sys.executable, "-c", text, folder], env=os.environ | settings)
        assert result.returncode == 0, result.stderr[-6000:]
        said = [(Path(folder) / str(i)).read_text() for i in range(len(cases))]
    return ["" if text.endswith("the end") else text or "it ended without a word" for text in said]


def _reach(arg: Tensor | Piece) -> int:
    """Elements from the first to the last, both included."""
    if isinstance(arg, Piece) or not arg.numel():
        return arg.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True))


def launch(run: Any, name: str, ctas: int, threads: int, shared: int, args: tuple[Any, ...], seed: int) -> None:
    """Run every CTA of a build, in an order drawn from `seed`; EmulatorError where it breaks a rule."""
    cells, sizes = [], []
    for arg in args:
        if arg is None or isinstance(arg, Tensor | Piece):
            cells.append(np.array(0 if arg is None else arg.data_ptr(), np.uint64))
            size = 0 if arg is None else _reach(arg) * arg.element_size()
            sizes.append(size if size < UNFENCED else 0)
        else:
            cells.append(np.array(arg))
            sizes.append(0)
    pointers = (ctypes.c_void_p * len(args))(*(cell.ctypes.data for cell in cells))
    lengths = (ctypes.c_size_t * len(args))(*sizes)
    wrong = run(
        ctypes.c_uint(ctas), ctypes.c_uint(threads), ctypes.c_size_t(shared), ctypes.c_uint64(seed),
        ctypes.c_int(len(args)), pointers, lengths,
    )  # fmt: skip
    if wrong is not None:
        raise EmulatorError(f"{name}: {wrong.decode()}")


class Emulator:
    """What cupy_conv.runtime is on a GPU, on a CPU: another thread order at every launch."""

    device_type = "cpu"

    def __init__(self, build_flags: tuple[str, ...] = FAST, seed: int = 0) -> None:
        self.build_flags = build_flags
        self.draws = random.Random(seed)

    def absent(self) -> str | None:
        return None

    def launch(
        self, name: str, kind: str, flags: tuple[str, ...], ctas: int, threads: int, shared: int, args: tuple[Any, ...]
    ) -> None:
        run = build(specialised(kind, flags), self.build_flags)[name]
        launch(run, name, ctas, threads, shared, args, self.draws.getrandbits(32))
