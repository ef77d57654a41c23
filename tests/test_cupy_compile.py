"""What NVRTC makes of the CUDA C++ kernels, without a driver: registers, spills and shared memory of each target.

The sources are the very text that the emulator compiles (cupy_conv.source), the options those that CuPy adds to ours.
`specialisations` are all there are of single channels: a test holds them against what tiles ask for. A slow run
compiles a set of them that shows every pair of values on every target; CUPY_COMPILE=all compiles them all.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from cupy_backends.cuda.libs import nvrtc
from hypothesis import given

from blocksparse.kernels import cupy_conv, slot_cost, slots
from test_slots import work

ALL = os.environ.get("CUPY_COMPILE") == "all"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90") if ALL else ("sm_80", "sm_90")
KINDS = ("fprop", "dgrad", "wgrad")
MATHS = ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))

REGISTERS = 128  # of a thread: 512 threads to a multiprocessor at least
OF_CUPY = ("-ftz=true", "--device-as-default-execution-space")  # what it adds to a RawModule's options


class Special(NamedTuple):
    """One compilation: what cupy_conv.options turns into -D."""

    kind: str
    dtype: torch.dtype
    precision: str
    cut: tuple[int, int, int, int]
    aligned: bool

    @property
    def flags(self) -> tuple[str, ...]:
        tile = slots.SlotTile(*self.cut, *[0] * 7)
        return cupy_conv.options(self.kind, self.dtype, 1, tile, self.precision, self.aligned)

    def __str__(self) -> str:
        names = (flag.removeprefix("-D").split("=") for flag in self.flags[2:])
        return f"{self.kind:5}  " + "  ".join(f"{name} {value:>4}" for name, value in names)


def specialisations() -> Iterator[Special]:
    for kind, (dtype, precision), aligned in itertools.product(KINDS, MATHS, (True, False)):
        for cut in dict.fromkeys(cut for bk in (8, 16, 32, 64) for cut in slots.cuts(kind, bk, dtype)):
            yield Special(kind, dtype, precision, cut, aligned)


def shown(special: Special) -> set[tuple]:
    """(kind, a value, another one)."""
    math = special.dtype, special.precision
    named = enumerate((math, *special.cut, special.aligned))
    return {(special.kind, *values) for values in itertools.combinations(named, 2)}


def covering(specials: list[Special]) -> list[Special]:
    """Few of them with every pair of values that any has: again and again the one with the most new ones."""
    of = {special: shown(special) for special in specials}
    missing = set().union(*of.values())
    chosen = []
    while missing:
        chosen.append(max(specials, key=lambda s: len(of[s] & missing)))
        missing -= of[chosen[-1]]
    return sorted(chosen, key=specials.index)


class Facts(NamedTuple):
    registers: int
    stack: int
    spilled: int
    static_shared: int


def compiled(source: str, flags: tuple[str, ...], arch: str) -> dict[str, Facts]:
    """Facts of every kernel of the source."""
    program = nvrtc.createProgram(source, "", (), ())
    try:
        nvrtc.compileProgram(program, (*flags, *OF_CUPY, f"-arch={arch}", "--ptxas-options=-v"))
        assert nvrtc.getCUBIN(program)
    finally:
        log = nvrtc.getProgramLog(program)
        nvrtc.destroyProgram(program)
    found = {}
    for entry in re.finditer(r"Function properties for (\w+)\n.*?Used \d+ registers[^\n]*", log, re.DOTALL):
        patterns = r"Used (\d+)", r"(\d+) bytes stack", r"(\d+) bytes spill st", r"(\d+) bytes smem"
        numbers = (re.search(pattern, entry[0]) for pattern in patterns)
        found[entry[1]] = Facts(*(int(number[1]) if number else 0 for number in numbers))
    return found


@pytest.mark.slow
def test_every_kernel_fits(capsys):
    """No spills, no stack, enough threads to a multiprocessor, and no shared memory but what the launch asks for."""
    specials = list(specialisations()) if ALL else covering(list(specialisations()))
    work = [(special, arch) for special in specials for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:  # NVRTC lets go of the interpreter
        found = pool.map(lambda item: compiled(cupy_conv.source(item[0].kind), item[0].flags, item[1]), work)
        facts = dict(zip(work, found, strict=True))
    lines = [f"{'registers':58}{'  '.join(ARCHS)}"]
    for special in specials:
        registers = (f"{facts[special, arch][special.kind].registers:5}" for arch in ARCHS)
        lines.append(f"{special!s:58}{'  '.join(registers)}")
    with capsys.disabled():
        print("", *lines, sep="\n")
    wrong = []
    for (special, arch), kernels in facts.items():
        others = {"wgrad": {"add_splits"}, "dgrad": {"add_shares"}}
        assert set(kernels) == {special.kind} | others.get(special.kind, set())
        for name, found in kernels.items():
            fits = 8 <= found.registers <= REGISTERS
            if not fits or found.stack or found.spilled or found.static_shared:
                wrong.append(f"{name} of {special} on {arch}: {found}")
    assert not wrong, "\n".join(wrong)


@given(work())
def test_every_tile_is_one_of_the_specialisations(case):
    geometry, blocksize, nnzb, dtype = case
    if slots.refusal(geometry, blocksize, dtype, "cuda") is not None:
        return
    asked = set()
    for kind in KINDS:
        tile = slot_cost.pick(kind, geometry, blocksize, nnzb, dtype)
        asked.add(cupy_conv.options(kind, dtype, 1, tile, "ieee", True))
    assert asked <= {special.flags for special in specialisations()}


def test_the_covering_ones_show_every_pair_of_values():
    specials = list(specialisations())
    few = covering(specials)
    assert {v for s in few for v in shown(s)} == {v for s in specials for v in shown(s)}
    assert len(few) < len(specials) / 4


def test_the_argument_struct_is_as_large_as_the_host_makes_it():
    """Field by field the emulator's runs compare them."""
    source, flags = cupy_conv.source("fprop"), next(specialisations()).flags
    size = cupy_conv.CONV.itemsize
    assert compiled(f"{source}\nstatic_assert(sizeof(Conv) == {size});", flags, "sm_80")
    with pytest.raises(nvrtc.NVRTCError):
        compiled(f"{source}\nstatic_assert(sizeof(Conv) == {size + 8});", flags, "sm_80")


def test_errors_name_the_file_and_line():
    broken = cupy_conv.source("fprop").replace("float acc[MT][NT][4];", "float acc[MT][NT][4] = nonsense;")
    program = nvrtc.createProgram(broken, "fprop.cu", (), ())
    with pytest.raises(nvrtc.NVRTCError):
        nvrtc.compileProgram(program, (*next(specialisations()).flags, "-arch=sm_80"))
    assert re.search(r'fprop\.cu\(\d+\): error: identifier "nonsense" is undefined', nvrtc.getProgramLog(program))
