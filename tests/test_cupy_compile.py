"""What NVRTC makes of the CUDA C++ kernels, without a driver: registers, spills and shared memory of each target.

The sources are the very text that the emulator compiles (cupy_conv.source), the options those that CuPy adds to ours.
`specialisations` are all there are: a test holds them against what tiles ask for. A slow run compiles a set of them
that shows every pair of values on every target; CUPY_COMPILE=all compiles them all, some two thousand kernels.
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

from blocksparse import ConvGeometry
from blocksparse.kernels import cupy_conv, slots
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
    unit: int
    nt: int
    cut: tuple[int, int]
    bands: int

    @property
    def flags(self) -> tuple[str, ...]:
        warps, mt = self.cut
        tile = slots.SlotTile(self.nt, mt, warps, slots.ITEMS[self.kind], self.bands, *[0] * 6)
        return cupy_conv.options(self.dtype, self.unit, tile, self.precision)

    def __str__(self) -> str:
        names = (flag.removeprefix("-D").split("=") for flag in self.flags[1:])
        return f"{self.kind:5}  " + "  ".join(f"{name} {value:>4}" for name, value in names if name != "ITEMS")


def specialisations() -> Iterator[Special]:
    for kind, (dtype, precision) in itertools.product(KINDS, MATHS):
        slot = slots.slot_of(dtype)
        for unit, bands, cut in itertools.product((1, 2, 4, 8), (1, slot), slots.CUTS[kind]):
            if unit > slot:
                continue
            for nt in (1, 2, 4) if kind != "dgrad" else (2, 4) if unit == slot else (2,):
                if nt * cut[1] <= 8:
                    yield Special(kind, dtype, precision, unit, nt, cut, bands)


def shown(special: Special) -> set[tuple]:
    """(kind, a value, another one)."""
    math = special.dtype, special.precision
    named = enumerate((math, special.unit, special.nt, special.cut, special.bands > 1))
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
        assert set(kernels) == {special.kind} | ({"add_splits"} if special.kind == "wgrad" else set())
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
    asked = {
        cupy_conv.options(dtype, blocksize[1], slots.pick(kind, geometry, blocksize, nnzb, dtype), "ieee")
        for kind in KINDS
    }
    assert asked <= {special.flags for special in specialisations()}


def test_the_covering_ones_show_every_pair_of_values():
    specials = list(specialisations())
    few = covering(specials)
    assert {v for s in few for v in shown(s)} == {v for s in specials for v in shown(s)}
    assert len(few) < len(specials) / 8


LAYERS = {64: 56, 128: 28, 256: 14, 512: 7}  # the 3x3 layers of ResNet-50: channels and pixels


def test_two_ctas_overlap_on_hopper(capsys):
    """While one loads, another multiplies: the kernels have no pipeline of their own. ResNet-50 at batch 64, 90%."""
    lines = [
        f"{'kernel':6} {'layer':6} {'blocks':>8} {'bytes':5} {'nt x mt x warps':>15} {'pixels':>6} {'shared':>6}  CTAs"
    ]
    for (c, size), dtype, kind in itertools.product(LAYERS.items(), (torch.float16, torch.float32), KINDS):
        g = ConvGeometry(64, c, size, size, c, 3, 3, (1, 1), (1, 1))
        for blocksize in ((c // 8, 1), (16, 1), (32, 32)):
            tile = slots.pick(kind, g, blocksize, g.k * g.c * 9 // (10 * blocksize[0] * blocksize[1]), dtype)
            shape, pixels = f"{tile.nt} x {tile.mt} x {tile.warps}", f"{tile.tile_h}x{tile.tile_w}"
            ctas = slots.grid(kind, g, blocksize, dtype, tile)
            work = f"{kind:6} {f'{c}@{size}':6} {blocksize!s:>8} {dtype.itemsize:5}"
            lines.append(f"{work} {shape:>15} {pixels:>6} {tile.shared:6} {ctas:5}")
            assert tile.shared <= slots.SHARED_BYTES, lines[-1]
            assert 2 * (tile.shared + 1024) <= slots.SM_BYTES, lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_the_argument_struct_is_as_large_as_the_host_makes_it():
    """Field by field the emulator's runs compare them."""
    source, flags = cupy_conv.source("fprop"), next(specialisations()).flags
    size = cupy_conv.CONV.itemsize
    assert compiled(f"{source}\nstatic_assert(sizeof(Conv) == {size});", flags, "sm_80")
    with pytest.raises(nvrtc.NVRTCError):
        compiled(f"{source}\nstatic_assert(sizeof(Conv) == {size + 8});", flags, "sm_80")


def test_errors_name_the_file_and_line():
    broken = cupy_conv.source("fprop").replace("float acc[MT][NT][4] = {};", "float acc[MT][NT][4] = nonsense;")
    program = nvrtc.createProgram(broken, "fprop.cu", (), ())
    with pytest.raises(nvrtc.NVRTCError):
        nvrtc.compileProgram(program, (*next(specialisations()).flags, "-arch=sm_80"))
    assert re.search(r'fprop\.cu\(\d+\): error: identifier "nonsense" is undefined', nvrtc.getProgramLog(program))
