"""native/*.cpp as shared libraries, one for each type of numbers: compiled on first use by the system's compiler, for
this processor, kept in the user's cache.

A file's name is a hash of the sources, the flags, the compiler and the processor, so that a change of any of them
compiles anew. Processes that start at once each compile into a file of their own and put it in place whole.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .machine import cache, processor

SOURCES = Path(__file__).with_name("native")
COMPILERS = ("c++", "g++", "clang++")  # tried in this order, after $CXX
SECONDS = 300  # that a compiler may take: 7 on two quiet cores
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-unknown-pragmas", "-Wno-ignored-optimization-argument",
    # g++ 12.2 turns a choice of one and two filters into a comparison, an addition that overwrites its flags, and a
    # conditional move: of one filter the tile of two ran, and wrote behind y (on skylake-avx512 and icelake-server).
    "-fno-if-conversion", "-fno-if-conversion2",
)  # fmt: skip
OPENMP = "-fopenmp"
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


@functools.cache
def library(number: str) -> ctypes.CDLL | str:
    """The library for numbers of this C++ type, or why there is none."""
    compiler = _compiler()
    if compiler is None:
        return (
            f"no C++ compiler was found ({', '.join(COMPILERS)}); install one, g++ for instance, or name it in the"
            " environment variable CXX"
        )
    failed = ""
    for more in ((NATIVE, OPENMP), (NATIVE,), (OPENMP,), ()):
        try:
            found = ctypes.CDLL(str(_built(compiler, (*FLAGS, f"-DNUMBER={number}", *more))))
        except (OSError, subprocess.SubprocessError) as error:
            failed = failed or _said(error)
            continue
        if failed:
            lacks = ["one thread (for more install OpenMP: libomp-dev for clang)"] * (OPENMP not in more)
            lacks += ["the least of this processor's instructions"] * (NATIVE not in more)
            warnings.warn(
                f"blocksparse: backend 'cpu' runs on {' and '.join(lacks)}: {compiler} refused"
                f" {' and '.join(flag for flag in (NATIVE, OPENMP) if flag not in more)}: {failed}",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        return found
    return f"{compiler} does not compile it: {failed}"


def _compiler() -> str | None:
    """The first compiler there is: $CXX, then COMPILERS."""
    asked = os.environ.get("CXX")
    return next((found for name in (asked, *COMPILERS) if name and (found := shutil.which(name))), None)


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    """The library, compiled unless it is in the cache."""
    made_by = _run([compiler, "--version"]) + _run([compiler, "-dumpmachine"])
    files = sorted(file for file in SOURCES.iterdir() if file.suffix in (".h", ".cpp"))
    text = "\0".join(f"{file.name}\0{file.read_text()}" for file in files)
    key = "\0".join((text, *flags, compiler, made_by, processor()))
    path = cache() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".cpu-") as made, ThreadPoolExecutor() as pool:
            units = {str(file): f"{made}/{file.stem}.o" for file in files if file.suffix == ".cpp"}
            compiled = [[compiler, *flags, "-c", unit, "-o", to] for unit, to in units.items()]
            list(pool.map(_run, compiled))
            _run([compiler, *flags, "-shared", *units.values(), "-o", f"{made}/cpu.so"])
            os.replace(f"{made}/cpu.so", path)
    return path


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=SECONDS, stdin=subprocess.DEVNULL
    ).stdout  # fmt: skip


def _said(error: Exception) -> str:
    """The first line of what a compiler complains of."""
    text = getattr(error, "stderr", None) or str(error)
    errors = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    return (errors or text.splitlines() or [repr(error)])[0][:300]
