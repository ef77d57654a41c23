"""Counts of the CUDA C++ kernels: NVRTC compiles them without a driver; loops are told apart by what is in them."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench.counts.machine import Program, name
from blocksparse.geometry import KINDS
from blocksparse.kernels import cupy_conv, slots

ARCH = "sm_90"
# What CuPy adds to a RawModule's options.
OF_CUPY = ("-ftz=true", "--device-as-default-execution-space")
NUMBERS = {"FP16": (torch.float16, "ieee"), "TF32": (torch.float32, "tf32"), "FP32": (torch.float32, "ieee")}


class Special(NamedTuple):
    """One compilation: what cupy_conv.options turns into -D. bf16 is counted as fp16."""

    kind: str
    math: str
    unit: int
    nt: int
    mt: int
    warps: int
    bands: int

    @property
    def dtype(self) -> torch.dtype:
        return NUMBERS[self.math][0]

    @property
    def flags(self) -> tuple[str, ...]:
        tile = slots.SlotTile(self.nt, self.mt, self.warps, slots.ITEMS[self.kind], self.bands, *[0] * 6)
        return cupy_conv.options(self.dtype, self.unit, tile, NUMBERS[self.math][1])


def counted() -> list[Special]:
    """Single channels of fp16 in every tile, and of the rest (wider units, bands, fp32) one tile each."""
    found = []
    for kind in KINDS:
        cuts = slots.CUTS[kind]
        widths = (2,) if kind == "dgrad" else (1, 2, 4)
        found += [
            Special(kind, "FP16", 1, nt, mt, w, 1) for nt, (w, mt) in itertools.product(widths, cuts) if nt * mt < 9
        ]
        (warps, mt), wide = cuts[0], 4 if kind == "dgrad" else 2
        found += [Special(kind, "FP16", 8, wide, mt, warps, 1), Special(kind, "FP16", 1, 2, mt, warps, 8)]
        found += [Special(kind, math, 1, 2, mt, warps, 1) for math in ("TF32", "FP32")]
    return found


def compiled(special: Special) -> tuple[bytes, str]:
    """(cubin, log)."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(cupy_conv.source(special.kind), "", (), ())
    try:
        options = (*special.flags, *OF_CUPY, f"-arch={ARCH}", "--ptxas-options=-v")
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)  # CuPy leaves the last byte out
    finally:
        nvrtc.destroyProgram(program)


def nvrtc_version() -> str:
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def disassembled(cubin: bytes, kernel: str) -> Program:
    """One kernel of a cubin, without what lies behind its last exit: rare ways of warps that have parted."""
    from triton import knobs

    from bench.counts.machine import _output

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text[text.index(f".text.{kernel}:") :].splitlines()[1:]:
        if line.startswith(".text.") or line.lstrip().startswith(".section"):
            break
        if label := re.match(r"\s*(\.L_?x?_?\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1].strip())
    last = max(i for i, text in enumerate(instructions) if name(text) == "EXIT")
    return Program(instructions[: last + 1], labels)


def _has(texts: Sequence[str], *starts: str) -> int:
    return sum(name(text).startswith(starts) for text in texts)


def phases(program: Program, special: Special) -> dict[str, Any]:
    """The counts of kernels/counted.py: Phases."""
    texts, slot = program.instructions, slots.slot_of(special.dtype)
    one_mma = 1 if special.math != "FP32" else 16  # FFMAs of 16 x 8 x STEP
    mma = "HMMA" if special.math != "FP32" else "FFMA"
    loops = sorted(set(program.loops()), key=len)
    inside = {loop: texts[loop.start : loop.stop] for loop in loops}
    innermost = [a for a in loops if not any(b != a and b.start >= a.start and b.stop <= a.stop for b in loops)]
    main = max(innermost, key=lambda loop: _has(inside[loop], mma))
    each_mma = len(main) * one_mma / _has(inside[main], mma)
    fills = [loop for loop in innermost if _has(inside[loop], "STS.128") and _has(inside[loop], "LDG")]
    load = max(len(loop) / _has(inside[loop], "STS.128") for loop in fills)
    stores = [loop for loop in innermost if _has(inside[loop], "STG")] if special.kind != "wgrad" else []
    result = max((len(loop) * slot / _has(inside[loop], "STG") for loop in stores), default=0.0)
    products = [loop for loop in innermost if _has(inside[loop], mma) >= one_mma]
    nest, within = [], 0.0
    for loop in (loop for loop in loops if loop.start <= main.start and loop.stop >= main.stop and loop != main):
        left_out = [other for other in (*fills, *products) if loop.start <= other.start and other.stop <= loop.stop]
        straight = _has(inside[loop], mma) - sum(_has(inside[other], mma) for other in left_out)
        own = len(loop) - sum(map(len, left_out)) - straight / one_mma * each_mma
        nest.append(round(own - within))
        within = own
    outermost = max((loop for loop in loops if loop.start <= main.start and loop.stop >= main.stop), key=len)
    rest = [loop for loop in stores if not (outermost.start <= loop.start and loop.stop <= outermost.stop)]
    outside = len(texts) - len(outermost) - sum(map(len, rest))
    return {
        "load": round(load, 1),
        "mma": round(each_mma, 1),
        "result": round(result),
        "nest": nest,
        "outside": outside,
    }


def _of_log(log: str, kernel: str) -> tuple[int, int]:
    """(registers, bytes spilled) that ptxas reports."""
    found = re.search(rf"Function properties for {kernel}\n.*?Used \d+ registers[^\n]*", log, re.DOTALL)
    assert found, log
    registers, spilled = re.search(r"Used (\d+)", found[0]), re.search(r"(\d+) bytes spill st", found[0])
    assert registers, log
    return int(registers[1]), int(spilled[1]) if spilled else 0


def row(special: Special) -> dict[str, Any]:
    """A row of counts/cupy.json."""
    cubin, log = compiled(special)
    registers, spills = _of_log(log, special.kind)
    facts = phases(disassembled(cubin, special.kind), special)
    return {
        **special._asdict(), "target": ARCH, "nvrtc": nvrtc_version(), **facts, "registers": registers, "spills": spills
    }  # fmt: skip


def rows(specials: Sequence[Special] | None = None) -> Iterator[dict[str, Any]]:
    """Of these specialisations, or of all that are counted."""
    yield from map(row, counted() if specials is None else specials)
