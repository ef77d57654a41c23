"""What the Triton kernels become, without a GPU: tensor-core instructions, spills, shared memory, copies.

The host functions run on meta tensors over a driver that only names a target, so that what is inspected is what a
launch on that device would compile, specialisations included. Compiling needs a process in which TRITON_INTERPRET is
not set: this file, run as a script, compiles the cases it reads from stdin, or launches them on a driver that does
nothing. Each run compiles half of what sm_90 is most likely to run and a kernel of each kind for the others, a slow
run all of that for every target and a kernel for every row of sm_90's table; TRITON_COMPILE=wide compiles every
blocksize class, load and stride for all targets: about 700 kernels, half an hour on two cores.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any, NamedTuple

import pytest
import torch

from blocksparse import ConvGeometry, index
from blocksparse.geometry import KINDS
from blocksparse.kernels import gpus, tiles
from processes import LIMIT, Process, run

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Shared memory of one program, in bytes; for sm_80's column that of sm_86 and sm_89, which use it too.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
PTX = {
    "mma": r"\bmma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "copies16": r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10",
    "loads2": r"ld\.global[\w.:]*\.[bu]16",
}
GCN = {"mfma": r"v_mfma", "copies16": r"(?:global|buffer)_load_dwordx4", "loads2": r"(?:global|buffer)_load_ushort"}


# Triton 3.6 has no wgmma or tcgen05 form of a tf32 product with an operand that is not K-major, and scatters one of
# gfx942's loads; both are right, and slower.
OLD_TRITON = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)


class Case(NamedTuple):
    """One kernel to compile, for channels_last tensors with C = K = about 256."""

    kind: str
    arch: str
    blocksize: tuple[int, int]
    math: str = "half"  # "half" (fp16), "bf16", "tf32" or "ieee"
    stride: int = 1
    batch: int = 64
    density: float = 0.1
    height: int = 28
    kernel: int = 3
    row_order: bool = False
    asked: tiles.Tile | None = None  # None: what tiles.pick says

    @property
    def dtype(self) -> torch.dtype:
        return {"half": torch.float16, "bf16": torch.bfloat16}.get(self.math, torch.float32)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        bk, bc = self.blocksize
        return 256 // bk * bk, 256 // bc * bc, self.kernel, self.kernel

    @property
    def geometry(self) -> ConvGeometry:
        x_shape = (self.batch, self.weight_shape[1], self.height, self.height + 1)
        return ConvGeometry.of(x_shape, self.weight_shape, self.stride, self.kernel // 2)

    @property
    def nnzb(self) -> int:
        (k, c, r, s), (bk, bc) = self.weight_shape, self.blocksize
        return max(1, round(self.density * (k // bk) * (c // bc) * r * s))

    @property
    def precision(self) -> str:
        return "tf32" if self.math == "tf32" else "ieee"

    @property
    def tile(self) -> tiles.Tile:
        if self.asked is not None:
            return tiles.Tile(*self.asked)
        return tiles.pick(self.kind, self.geometry, self.blocksize, self.nnzb, self.dtype, self.arch, self.precision)


def representative(arch: str) -> list[Case]:
    return [
        Case("fprop", arch, (32, 32)),
        Case("fprop", arch, (64, 8)),
        Case("fprop", arch, (24, 48), "bf16", row_order=True),
        Case("fprop", arch, (128, 128), "tf32"),
        Case("fprop", arch, (32, 32), "ieee"),
        Case("fprop", arch, (64, 64), kernel=1, density=0.5),
        Case("dgrad", arch, (32, 32)),
        Case("dgrad", arch, (8, 64), "bf16", stride=2),
        Case("dgrad", arch, (64, 8), "tf32"),
        Case("wgrad", arch, (32, 32)),
        Case("wgrad", arch, (64, 8), "bf16"),
        Case("wgrad", arch, (128, 64), "tf32"),
    ]


def wide(arch: str) -> list[Case]:
    sides = ((8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (64, 8), (8, 64), (24, 48), (128, 8), (8, 128))
    cases = {}
    for kind in KINDS:
        for math in ("half", "tf32", "ieee"):
            for blocksize in sides:
                for stride in (1, 2) if kind == "dgrad" else (1,):
                    for batch, density in ((1, 0.1), (64, 0.01), (64, 0.3)):
                        case = Case(kind, arch, blocksize, math, stride, batch, density)
                        cases[kind, math, blocksize, stride, case.tile._replace(splits=1)] = case
    return list(cases.values())


def row_of(case: Case) -> tuple[str, tiles.Entry]:
    """The row of the table that a case gets its tile from."""
    math, sizes = case.math if case.dtype == torch.float32 else "half", case.tile
    for row in tiles.find(case.kind, sizes.block_n, math, gpus.column_of(case.arch)):
        if (row.block_m, row.block_k, row.num_warps, row.num_stages) == (sizes.block_m, *sizes[2:5]):
            return case.kind, row
    raise LookupError(case)


def rows_for(arch: str) -> set[tuple[str, tiles.Entry]]:
    return {(kind, row) for row in tiles.TABLE if arch in row.archs.split() for kind in row.kinds.split()}


def every_row(arch: str) -> list[Case]:
    """The representative cases, and one more for each row of the table that none of them uses."""
    cases = representative(arch)
    for kind, row in sorted(rows_for(arch) - {row_of(case) for case in cases}, key=str):
        tile = tiles.Tile(row.block_m, row.widest, row.block_k, row.num_warps, row.num_stages)
        cases.append(Case(kind, arch, (row.widest, row.widest), row.math, asked=tile))
    return cases


WIDE = os.environ.get("TRITON_COMPILE") == "wide"
# The rows of sm_90 are the ones that a benchmark will rank first.
LISTS = dict.fromkeys(TARGETS, representative) | {"sm_90": every_row}
CASES = [case for arch in TARGETS for case in (wide if WIDE else LISTS[arch])(arch)]
QUICK = [*representative("sm_90")[::2], *(case for arch in TARGETS for case in representative(arch)[1::5])]
# Other sizes of the first case: they must not need another kernel.
RESIZED = [CASES[0]._replace(batch=65, height=30), CASES[0]._replace(batch=63, height=27)]


# ---------------------------------------------------------------------- the compiling process


class NamesATarget:
    """A driver for Triton, without a device."""

    def __init__(self, arch: str = "") -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.arch])

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Facts about the kernel of each case."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    compile_and_launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs))

    target = NamesATarget()
    driver.set_active(target)
    JITFunction.run = compile_only
    facts = []
    for case in cases:
        target.arch = case.arch
        compiled.clear()
        call(case, "meta")
        facts.append(facts_of(compiled[0]))
    return facts


def launch_cases(cases: list[Case]) -> list[list[dict[str, Any]]]:
    """What reaches the driver, and by which way, when each case is launched twice, then with unaligned pointers."""
    import contextlib

    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from blocksparse.kernels import triton_conv

    launches, found_by_triton = [], JITFunction.run

    def note(grid_0: int, grid_1: int, grid_2: int, *args: Any) -> None:
        plain = [list(a.shape) if isinstance(a, torch.Tensor) else str(a) for a in args[6:]]
        launches.append({"grid": [grid_0, grid_1, grid_2], "kernel": args[1], "args": plain, "by": "us"})

    def init_handles(self: CompiledKernel) -> None:
        self.module = self.function = self.name
        self._run = note

    def by_triton(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        before = len(launches)
        kernel = found_by_triton(self, *args, **kwargs)
        launches[before]["by"] = "triton"
        return kernel

    driver.set_active(NamesATarget("sm_90"))
    CompiledKernel._init_handles, JITFunction.run = init_handles, by_triton
    triton_conv._on = lambda t: contextlib.nullcontext()
    found = []
    for case in cases:
        for misaligned in (False, False, True):
            launches.clear()
            call(case, "cpu", misaligned)
            found.append(list(launches))
    return found


def call(case: Case, device: str, misaligned: bool = False) -> None:
    from blocksparse.kernels import triton_conv

    def empty(shape: Any, dtype: torch.dtype = case.dtype, **kwargs: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device, **kwargs)

    g, last = case.geometry, {"memory_format": torch.channels_last}
    size = index.packed_size(case.weight_shape, case.blocksize, case.nnzb, case.row_order)
    tables = index.unpack(empty(size, torch.int32), case.weight_shape, case.blocksize, case.nnzb)
    x, dy, values = empty(g.x_shape, **last), empty(g.y_shape, **last), empty((case.nnzb, *case.blocksize))
    if misaligned:
        values = empty(values.numel() + 1)[1:].view(values.shape)
    if case.kind == "fprop":
        triton_conv.fprop(x, values, tables, None, g, case.tile, precision=case.precision)
    elif case.kind == "dgrad":
        triton_conv.dgrad(dy, values, tables, g, True, case.tile, precision=case.precision)
    else:
        triton_conv.wgrad(x, dy, tables, g, tuple(values.shape), case.tile, precision=case.precision)


def facts_of(kernel: Any) -> dict[str, Any]:
    facts = {"shared": kernel.metadata.shared, "hash": kernel.hash}
    if "ptx" in kernel.asm:
        from triton import knobs

        text, patterns = kernel.asm["ptx"], PTX
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = run(command).stdout
        facts |= {
            name: int(re.search(rf"{key}:(\d+)", usage)[1]) for name, key in (("registers", "REG"), ("stack", "STACK"))
        }
    else:
        text, patterns = kernel.asm["amdgcn"], GCN
        keys = (("registers", "vgpr_count"), ("stack", "private_segment_fixed_size"))
        facts |= {name: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for name, key in keys}
    return facts | {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}


# ---------------------------------------------------------------------- the tests


def start(what: str, cases: list[Case]) -> Process:
    """This file as a script in a process of its own: "compile" or "launch"."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-W", "ignore", __file__, what]
    return Process(command, given=json.dumps(cases), env=environment, limit=3600.0 if WIDE else LIMIT)


def result_of(process: Process) -> Any:
    done = process.finish()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def facts(request: pytest.FixtureRequest) -> dict[Case, dict[str, Any]]:
    """Of the cases that this run is about. Two processes share them."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    asked = [item.callspec.params["case"] for item in items if "case" in item.callspec.params]
    cases = list(dict.fromkeys([*asked, CASES[0], *RESIZED]))
    halves = [cases[::2], cases[1::2]]
    found = {}
    with ExitStack() as ends:
        processes = [ends.enter_context(start("compile", half)) for half in halves]
        for process, half in zip(processes, halves, strict=True):
            found |= dict(zip(half, result_of(process), strict=True))
    return found


def name(case: Case) -> str:
    bk, bc = case.blocksize
    return f"{case.arch}-{case.kind}-{bk}x{bc}-{case.math}-s{case.stride}-n{case.batch}-d{case.density}"


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if WIDE or case in QUICK else pytest.mark.slow, id=name(case)) for case in CASES],
)
def test_kernel(case: Case, facts):
    f = facts[case]
    tensor_cores = TENSOR_CORES[case.arch]
    if OLD_TRITON and case.math == "tf32" and case.kind == "dgrad" and case.arch != "gfx942":
        tensor_cores = "mma"
    if case.math == "ieee" and case.arch != "gfx942":  # full fp32 has no tensor cores on NVIDIA
        assert not f[tensor_cores]
    else:
        assert f[tensor_cores] > 0, f
    assert f["stack"] == 0, f"spills: {f}"
    assert f["shared"] <= SHARED[case.arch], f
    assert f["loads2"] == 0 or (OLD_TRITON and case.arch == "gfx942"), f
    if case.kind == "wgrad" and case.math == "tf32":
        return  # tf32 operands must be K-major: tiles with pixels outermost are transposed on their way, 4 bytes each
    # One K-tile of activations in 16-byte copies by all threads.
    threads = case.tile.num_warps * TARGETS[case.arch][2]
    assert f["copies16"] >= case.tile.block_m * case.tile.block_k * case.dtype.itemsize // (16 * threads), f


def test_every_row_of_sm_90_is_compiled():
    assert {row_of(case) for case in CASES if case.arch == "sm_90"} == rows_for("sm_90")


def test_sizes_do_not_need_another_kernel(facts):
    assert {facts[case]["hash"] for case in RESIZED} == {facts[CASES[0]]["hash"]}
    assert len({case.geometry for case in [CASES[0], *RESIZED]}) == 3


def test_a_kept_kernel_is_launched_as_triton_would():
    """The second launch skips Triton's search and passes the same arguments; unaligned pointers go through Triton."""
    small = {"height": 5, "batch": 1}
    fprop = Case("fprop", "sm_90", (24, 48), row_order=True, **small)
    cases = [
        fprop,
        fprop._replace(row_order=False),  # each differs from the first in one fact
        fprop._replace(batch=2),
        fprop._replace(math="bf16"),
        Case("dgrad", "sm_90", (32, 32), "bf16", stride=2, **small),
        Case("wgrad", "sm_90", (32, 32), "ieee", density=0.02, height=24),  # split: two kernels
    ]
    found = result_of(start("launch", cases))
    for at, case in enumerate(cases):
        first, second, misaligned = found[3 * at : 3 * at + 3]
        assert [launch["by"] for launch in first] == ["triton"] * len(first), case
        assert [launch["by"] for launch in second] == ["us"] * len(first), case
        assert [launch | {"by": ""} for launch in first] == [launch | {"by": ""} for launch in second], case
        assert misaligned[0]["by"] == ("us" if case.kind == "wgrad" else "triton"), case  # wgrad reads no values
        assert len(first) == (2 if case.kind == "wgrad" else 1)


def test_a_kept_kernel_gets_the_offsets_of_its_own_index():
    """Two layers that differ in their number of blocks share a kernel; their tables lie elsewhere."""
    few = [Case(kind, "sm_90", (32, 32), height=5, batch=1) for kind in ("fprop", "dgrad")]
    many = [case._replace(density=0.12) for case in few]
    assert [case.tile for case in few] == [case.tile for case in many]
    started = [start("launch", cases) for cases in (many, [*few, *many])]
    alone, both = (result_of(process) for process in started)
    for at in range(len(many)):
        (needed,), (found,), (other,) = alone[3 * at], both[3 * (len(few) + at)], both[3 * at]
        assert (needed.pop("by"), found.pop("by")) == ("triton", "us")
        assert found == needed
        assert found["args"] != other["args"]


if __name__ == "__main__":
    wanted = [Case(*fields[:2], tuple(fields[2]), *fields[3:]) for fields in json.load(sys.stdin)]
    json.dump({"compile": compile_cases, "launch": launch_cases}[sys.argv[1]](wanted), sys.stdout)
