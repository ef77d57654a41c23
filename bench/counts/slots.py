"""Counts of the CUDA C++ kernels: NVRTC compiles them without a driver; line numbers tell what an instruction is for.

Line numbers change no instruction. Each has the chain of calls that it was inlined from: `Counted` asks for functions
of the sources, and for the loops of the machine code, which of them an instruction lies in.
"""

from __future__ import annotations

import functools
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
LISTING = ("find_channels", "list_items", "count_chunks", "list_chunks")  # once for all tiles, as a rule


class Special(NamedTuple):
    """One compilation: what cupy_conv.options turns into -D, of single channels. bf16 is counted as fp16."""

    kind: str
    math: str
    mt: int
    nt: int
    warps: int
    filters: int

    @property
    def dtype(self) -> torch.dtype:
        return NUMBERS[self.math][0]

    @property
    def flags(self) -> tuple[str, ...]:
        tile = slots.SlotTile(self.mt, self.nt, self.warps, self.filters, *[0] * 7)
        return cupy_conv.options(self.kind, self.dtype, 1, tile, NUMBERS[self.math][1], True)


def counted() -> list[Special]:
    """Every cut of eight warps in fp16 (of four the code is the same); of tf32 and fp32 one for each kind."""
    found = []
    for kind in KINDS:
        cuts = dict.fromkeys(cut for bk in (8, 16, 32, 64) for cut in slots.cuts(kind, bk, torch.float16))
        found += [Special(kind, "FP16", *cut) for cut in cuts if cut[2] == 8]
        largest = max(slots.cuts(kind, 32, torch.float32), key=lambda cut: (cut[0] * cut[1], *cut[2:], cut[0] == 2))
        found += [Special(kind, math, *largest) for math in ("TF32", "FP32")]
    return found


def compiled(special: Special) -> tuple[bytes, str]:
    """(cubin, log)."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(cupy_conv.source(special.kind), "", (), ())
    try:
        options = (*special.flags, *OF_CUPY, f"-arch={ARCH}", "-lineinfo", "--ptxas-options=-v")
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)  # CuPy leaves the last byte out
    finally:
        nvrtc.destroyProgram(program)


def nvrtc_version() -> str:
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


Chain = frozenset[tuple[str, int]]  # (file, line) of an instruction and of the calls around it


def disassembled(cubin: bytes, kernel: str) -> tuple[Program, list[Chain]]:
    """One kernel of a cubin, without what lies behind its last exit: rare ways of warps that have parted."""
    from triton import knobs

    from bench.counts.machine import _output

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(knobs.nvidia.nvdisasm.path, "-c", "-gi", file.name)
    instructions: list[str] = []
    labels: dict[str, int] = {}
    chains: list[Chain] = []
    chain: set[tuple[str, int]] = set()
    fresh = True  # whether the next line number begins a new chain
    for line in text[text.index(f".text.{kernel}:") :].splitlines()[1:]:
        if line.startswith(".text.") or line.lstrip().startswith(".section"):
            break
        if label := re.match(r"\s*(\.L_?x?_?\w+):", line):
            labels[label[1]] = len(instructions)
        elif "//## File" in line:
            chain = set() if fresh else chain
            chain |= {(file.rsplit("/", 1)[-1], int(at)) for file, at in re.findall(r'"([^"]+)", line (\d+)', line)}
            fresh = False
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1].strip())
            chains.append(frozenset(chain))
            fresh = True
    last = max(i for i, text in enumerate(instructions) if name(text) == "EXIT")
    return Program(instructions[: last + 1], labels), chains[: last + 1]


@functools.cache
def functions(kind: str) -> dict[str, list[tuple[str, range]]]:
    """Where the sources define each function: (file, lines)."""
    found: dict[str, list[tuple[str, range]]] = {}
    for text in cupy_conv.source(kind).split("#line 1 ")[1:]:
        head, _, body = text.partition("\n")
        lines = body.splitlines()
        for start, line in enumerate(lines, 1):
            if match := re.match(r"(?:__device__[^(]*?|extern .*|)\b(\w+)\($", line) or re.match(
                r"__device__[^(]*?\b(\w+)\(.*", line
            ):
                end = next(i for i, other in enumerate(lines[start - 1 :], start) if other == "}")
                found.setdefault(match[1], []).append((head.strip('"'), range(start, end + 1)))
    return found


class Counted:
    """The instructions of one kernel, and which function and loop each belongs to."""

    def __init__(self, special: Special, program: Program, chains: Sequence[Chain]) -> None:
        self.special, self.program, self.chains = special, program, chains
        self.loops = sorted(set(program.loops()), key=len)
        text = cupy_conv.source(special.kind).split(f'#line 1 "{special.kind}.cu"\n')[1]
        self.lines = text.splitlines()

    def of(self, function: str) -> set[int]:
        places = functions(self.special.kind).get(function, [])
        return {
            i for i, chain in enumerate(self.chains)
            if any(file == where and line in lines for file, line in chain for where, lines in places)
        }  # fmt: skip

    def called(self, call: str) -> set[int]:
        """What calls with this text, in the kernel's own file, became."""
        at = {i for i, line in enumerate(self.lines, 1) if call in line}
        return {
            i for i, chain in enumerate(self.chains)
            if any(file == f"{self.special.kind}.cu" and line in at for file, line in chain)
        }  # fmt: skip

    def inside(self, within: set[int] | range, *starts: str) -> int:
        return sum(name(self.program.instructions[i]).startswith(starts) for i in within)

    def innermost(self, *starts: str) -> list[range]:
        """Loops with such an instruction that hold no other loop."""
        having = [loop for loop in self.loops if self.inside(loop, *starts)]
        return [a for a in having if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in self.loops)]


def phases(special: Special, program: Program, chains: Sequence[Chain]) -> dict[str, Any]:
    """The counts of kernels/counted.py: Phases."""
    c = Counted(special, program, chains)
    one = 1 if special.math != "FP32" else 4  # instructions of a multiplication of 16 x 8 x STEP: FFMA of 16 x 8 x 1
    what = "HMMA" if special.math != "FP32" else "FFMA"
    main = max(c.innermost(what), key=lambda loop: c.inside(loop, what))
    copies = [loop for loop in c.innermost("LDGSTS") if set(loop) & c.of("load_patch")]
    load = max(len(loop) / c.inside(loop, "LDGSTS") for loop in copies if c.inside(loop, "LDGSTS") > 1)
    rest = max(len(loop) for loop in copies if c.inside(loop, "LDGSTS") == 1)
    step = next(loop for loop in c.loops if loop != main and set(main) < set(loop) and c.inside(loop, "LDGSTS"))
    # dgrad: the loop over the chunks of a tile, whose results are stored behind their steps.
    around = next(loop for loop in c.loops if set(step) <= set(loop) and (
        special.kind != "dgrad" or set(loop) & c.called("store<true>(acc, to")
    ))  # fmt: skip
    patch = c.of("load_patch") & set(step)
    within = {i for loop in c.loops if len(loop) < len(step) and c.inside(loop, "LDGSTS") for i in loop}
    members = c.of("copy_members")
    slow = {i for loop in c.loops if set(loop) & members and not c.inside(loop, "LDGSTS") for i in loop} | members
    copied = {i for loop in copies for i in loop}
    alone = max(len(a) for a in c.loops if set(a) & members and not any(b != a and set(b) < set(a) for b in c.loops))
    patches = 2 if special.kind == "wgrad" else 1
    values = c.of("load_values") & set(step)
    value = len(values & within)
    partial = c.called("store<false>(") & set(around)
    met = (c.called("store<true>(acc, met") & set(around)) - partial
    whole = (c.called("store<true>(acc, to") & set(around)) - partial - met
    begun = c.of("begin") & set(step)  # fprop: sums become the bias
    slot = slots.slot_of(special.dtype)
    result = 0.0
    if special.kind != "wgrad":
        result = len(whole) * 32 / (special.mt * 16 * special.nt / 2 * (slots.IMAGES // slot))
    passed = c.of("pass_on") & set(around)
    lists = {i for function in LISTING for i in c.of(function)}
    once = [loop for loop in c.loops if set(loop) & lists and c.inside(loop, "LDG") and not set(loop) & set(main)]
    entry = sum(len(loop) for loop in once if not any(set(other) < set(loop) for other in once))
    task = len((patch & within) - copied - slow) / patches
    tile = len(begun) + len(set(around) - set(step) - whole - partial - met - passed)
    own = set(step) - set(main) - whole - begun - (patch & within) - (values & within) - partial - slow
    outside = (
        len(program.instructions)
        - len(set(around) | slow)
        - entry
        - sum(len(loop) for loop in c.innermost("LDG") if not set(loop) & lists)
    )
    return {
        "load": round(load, 1), "rest": rest, "members": alone, "task": round(task), "value": value,
        "mma": round(len(main) * one / c.inside(main, what), 1), "result": round(result), "add": len(passed),
        "partial": len(met), "step": len(own),
        "tile": tile, "entry": entry, "outside": outside,
    }  # fmt: skip


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
    facts = phases(special, *disassembled(cubin, special.kind))
    return {
        **special._asdict(), "target": ARCH, "nvrtc": nvrtc_version(), **facts, "registers": registers, "spills": spills
    }  # fmt: skip


def rows(specials: Sequence[Special] | None = None) -> Iterator[dict[str, Any]]:
    """Of these specialisations, or of all that are counted."""
    yield from map(row, counted() if specials is None else specials)
