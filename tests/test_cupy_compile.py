"""What NVRTC makes of the CUDA C++ kernels, without a driver: registers, spills and shared memory of each target.

The sources are the very text that the emulator compiles (cupy_conv.source). CUPY_COMPILE=wide compiles every
specialisation that the tiles of any layer can ask for, over all blocksize classes: some thousand kernels.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from cupy_backends.cuda.libs import nvrtc

from blocksparse import ConvGeometry
from blocksparse.kernels import cupy_conv, slots

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90")
KINDS = ("fprop", "dgrad", "wgrad")
MATHS = ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
WIDE = os.environ.get("CUPY_COMPILE") == "wide"

REGISTERS = 128  # of a thread: 512 threads to a multiprocessor at least
# The 3x3 layers of ResNet-50 at batch 64: channels and pixels.
LAYERS = {64: 56, 128: 28, 256: 14, 512: 7}


class Case(NamedTuple):
    kind: str
    blocksize: tuple[int, int]
    dtype: torch.dtype
    precision: str
    tile: slots.SlotTile

    @property
    def flags(self) -> tuple[str, ...]:
        return cupy_conv.options(self.kind, self.blocksize, self.dtype, self.tile, self.precision)


def layer(channels: int) -> ConvGeometry:
    pixels = LAYERS[channels]
    return ConvGeometry(64, channels, pixels, pixels, channels, 3, 3, (1, 1), (1, 1))


def nnzb(channels: int, blocksize: tuple[int, int]) -> int:
    return channels * channels * 9 // (10 * blocksize[0] * blocksize[1])


def representative() -> list[Case]:
    """Groups of an eighth of the filters and wide blocks, in every precision."""
    half, bf16, tf32, full = MATHS
    work = [((8, 1), 64, half), ((64, 1), 512, bf16), ((16, 1), 128, tf32), ((64, 1), 512, full)]
    work += [((16, 1), 128, half), ((32, 32), 256, bf16)]
    return [
        Case(kind, b, *math, slots.pick(kind, layer(c), b, nnzb(c, b), math[0]))
        for b, c, math in work
        for kind in KINDS
    ]


def wide() -> list[Case]:
    cases = {}
    for kind in KINDS:
        for b in [(bk, bc) for bk in (8, 16, 24, 32, 64, 72, 128, 256) for bc in (1, 2, 4, 8, 16, 32, 64)]:
            for c in (64, 512):
                for dtype, precision in MATHS:
                    g = ConvGeometry(64, c, LAYERS[c], LAYERS[c], 2 * b[0], 3, 3, (1, 1), (1, 1))
                    for tile in slots._candidates(kind, g, b, 1000, dtype):
                        case = Case(kind, b, dtype, precision, tile)
                        cases[kind, case.flags] = case
    return list(cases.values())


class Facts(NamedTuple):
    registers: int
    stack: int
    spilled: int


def compiled(case: Case, arch: str) -> Facts:
    program = nvrtc.createProgram(cupy_conv.source(case.kind), f"{case.kind}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*case.flags, f"-arch={arch}", "--ptxas-options=-v"))
        assert nvrtc.getCUBIN(program)
    finally:
        log = nvrtc.getProgramLog(program)
        nvrtc.destroyProgram(program)
    (entry,) = re.findall(rf"Function properties for {case.kind}\n.*?Used \d+ registers", log, re.DOTALL)
    return Facts(*(int(re.search(p, entry)[1]) for p in (r"Used (\d+)", r"(\d+) bytes stack", r"(\d+) bytes spill st")))


@pytest.fixture(scope="module")
def facts() -> dict[tuple[Case, str], Facts]:
    """Two threads compile: NVRTC lets go of the interpreter."""
    # sm_86 and sm_89 differ from sm_80 in a few registers: the first kernels show it.
    cases = (wide if WIDE else representative)()
    work = [(c, a) for i, c in enumerate(cases) for a in ARCHS if WIDE or i < 6 or a in ("sm_80", "sm_90")]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(work, pool.map(lambda item: compiled(*item), work), strict=True))


def test_every_kernel_fits(facts, capsys):
    """No spills, no stack, 512 threads to a multiprocessor, shared memory that every target has."""
    lines = [
        f"{'kernel':6} {'blocks':>9} {'math':5} {'nt x mt x warps':>15} {'shared':>7}  registers: {' '.join(ARCHS)}"
    ]
    for case in dict.fromkeys(case for case, _ in facts):
        tile, math = case.tile, case.flags[1].removeprefix("-DMATH=")
        registers = "  ".join(f"{facts[case, arch].registers if (case, arch) in facts else '':4}" for arch in ARCHS)
        shape = f"{tile.nt} x {tile.mt} x {tile.warps}"
        lines.append(
            f"{case.kind:6} {case.blocksize!s:>9} {math:5} {shape:>15} {tile.shared:7}             {registers}"
        )
    with capsys.disabled():
        print("", *lines, sep="\n")
    for (case, arch), found in facts.items():
        assert found.stack == found.spilled == 0, (case, arch, found)
        assert found.registers <= REGISTERS, (case, arch, found)
        assert case.tile.shared <= slots.SHARED_BYTES, case


def test_two_ctas_overlap_on_hopper(facts):
    """While one loads, another multiplies: the kernels have no pipeline of their own."""
    for case, arch in facts:
        if arch == "sm_90" and not WIDE:
            assert 2 * (case.tile.shared + 1024) <= slots.SM_BYTES, case


def test_errors_name_the_file_and_line():
    broken = cupy_conv.source("fprop").replace("float acc[MT][NT][4] = {};", "float acc[MT][NT][4] = nonsense;")
    program = nvrtc.createProgram(broken, "fprop.cu", (), ())
    with pytest.raises(nvrtc.NVRTCError):
        nvrtc.compileProgram(program, (*representative()[0].flags, "-arch=sm_80"))
    assert re.search(r'fprop\.cu\(\d+\): error: identifier "nonsense" is undefined', nvrtc.getProgramLog(program))
