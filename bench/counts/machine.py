"""Reads what a Triton kernel became: SASS of NVIDIA GPUs, GCN assembly of AMD's.

nvdisasm and cuobjdump lie in the triton package.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, NamedTuple

# Instructions that multiply tiles; FFMA where full fp32 has no tensor cores.
TENSOR = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "v_mfma")
SKIPPED = ("NOP", "s_nop")


class Program(NamedTuple):
    """Instructions in order, and where each label points."""

    instructions: list[str]
    labels: dict[str, int]

    def loops(self) -> list[range]:
        """Every backward branch, from its label to itself."""
        found = []
        for at, text in enumerate(self.instructions):
            if name(text).startswith(("BRA", "s_cbranch", "s_branch")):
                to = re.search(r"(\.L\w+)\)?`?\s*$", text)
                if to and self.labels.get(to[1], at + 1) <= at:
                    found.append(range(self.labels[to[1]], at + 1))
        return found


def name(text: str) -> str:
    """Opcode without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def sass(cubin: bytes) -> tuple[Program, dict[str, int]]:
    """The one kernel of a cubin, its registers and the bytes of stack that it spills to."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text[text.index(".text.") :].splitlines():
        if label := re.match(r"\s*(\.L_?x?_?\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1].strip())
    # Behind the last instruction stand a jump to itself and NOPs, which nothing runs.
    while instructions and (name(instructions[-1]) == "NOP" or name(instructions[-1]).startswith("BRA")):
        instructions.pop()
    numbers = {"registers": _number(r"REG:(\d+)", usage), "stack": _number(r"STACK:(\d+)", usage)}
    return Program(instructions, labels), numbers


def gcn(text: str) -> tuple[Program, dict[str, int]]:
    """The one kernel of an AMD assembly file, its vector registers (accumulators counted) and the bytes it spills."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    start = re.search(r"^\w+:\s*; @", text, re.M)
    body = text[start.end() if start else 0 : text.index(".Lfunc_end0:")]
    for line in body.splitlines():
        line = line.split(";")[0].strip()
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]\w+", line):
            instructions.append(line)
    numbers = {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
    }
    return Program(instructions, labels), numbers


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"machine: {pattern} is not in this output of Triton's tools: {text[:200]!r}")
    return int(found[1])


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def swizzled(ttgir: str) -> bool:
    """Whether the shared layout of every operand of a product spreads its rows over the banks.

    A row of the tile that is 16 bytes wide needs no swizzle, and one in registers has none.
    """
    layouts = dict(
        re.findall(r"^(#\w+) = (#\w+\.(?:nvmma_shared|swizzled_shared|padded_shared|shared)\w*<.*)$", ttgir, re.M)
    )
    used = set()
    for line in ttgir.splitlines():
        if re.search(r"local_load|warp_group_dot\b|tc_gen5_mma\b", line):
            for shape, layout in re.findall(r"memdesc<((?:\d+x)+)\w+, (#\w+)", line):
                if shape.count("x") > 1:
                    used.add(layout)
    for layout in used:
        text = layouts.get(layout, "")
        if "nvmma_shared" in text:
            if "swizzlingByteWidth = 0" in text:
                return False
        elif "swizzled_shared" in text and "maxPhase = 1," in text:
            return False
    return True


WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def copy_bytes(loop: list[str]) -> int:
    """The narrowest copy that fills shared memory in the loop: asynchronous, or by registers where 2 bytes or less."""
    widths = []
    for text in loop:
        op = name(text)
        parts = op.split(".")
        if parts[0] == "LDGSTS" or (parts[0] in ("LDG", "STS", "LDS") and {"U16", "S16", "U8", "S8"} & set(parts)):
            widths.append(min([WIDTH[part] for part in parts if part in WIDTH], default=4))
        elif op.startswith(("global_load", "buffer_load")):
            end = op.rsplit("_", 1)[1]
            widths.append({"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "lds": 4}.get(end, 2))
    if loop and any(name(text).startswith("s_") for text in loop):  # AMD's: single 4-byte loads are those of tables
        widths = [width for width in widths if width != 4] or widths
    return min(widths, default=0)


def counts(kernel: Any) -> dict[str, Any]:
    """What one compiled kernel costs: see bench/count.py --help."""
    program, numbers = sass(kernel.asm["cubin"]) if "cubin" in kernel.asm else gcn(kernel.asm["amdgcn"])
    all_ = [text for text in program.instructions if name(text) not in SKIPPED]

    def inside(loop: range) -> list[str]:
        return [program.instructions[i] for i in loop if name(program.instructions[i]) not in SKIPPED]

    def products(texts: list[str]) -> int:
        return sum(name(text).startswith(TENSOR) for text in texts)

    whole = products(all_)
    unit = TENSOR if whole else ("FFMA", "v_fma", "v_fmac", "v_pk_fma")
    loops = [loop for loop in program.loops() if any(name(text).startswith(unit) for text in inside(loop))]
    # Of nested ones the inner, which runs most often; then the one that multiplies most.
    inner = [loop for loop in loops if not any(other != loop and set(other) < set(loop) for other in loops)]
    main = max(map(inside, inner), key=lambda loop: sum(name(text).startswith(unit) for text in loop), default=[])
    return {
        "loop": len(main),
        "mma": products(main),
        "unit": max(groups([text for text in main if name(text).startswith(unit)]).items(), key=lambda item: item[1])[
            0
        ],
        "outside": len(all_) - len(main),
        "registers": numbers["registers"],
        "spills": numbers["stack"],
        "shared": kernel.metadata.shared,
        "swizzled": swizzled(kernel.asm["ttgir"]),
        "copy_bytes": copy_bytes(main),
    }


def groups(texts: list[str]) -> Counter[str]:
    """Opcodes by how often they occur."""
    return Counter(name(text).split(".")[0] for text in texts)
