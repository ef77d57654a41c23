"""Compiles the kernels that a launch would run on a device that is not there: meta tensors, and a driver with a name.

So what is counted is what runs, specialisations included. Compiling needs a process without TRITON_INTERPRET, and
another version of Triton a process of its own: this file, run as a module, compiles the cases that it reads from stdin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.counts import norms
from bench.counts.cases import TARGETS, Case
from bench.counts.norms import NormCase
from blocksparse import index

ROOT = Path(__file__).resolve().parents[2]


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


def call(case: Case, device: str, misaligned: bool = False) -> None:
    """The launches of a case, on tensors of `device`."""
    from blocksparse.kernels import triton_conv

    def empty(shape: Any, dtype: torch.dtype = case.dtype, memory_format: Any = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)

    last = case.format == "channels_last"
    g, layout = case.geometry, torch.channels_last if last else torch.contiguous_format
    size = index.packed_size(case.weight_shape, case.blocksize, case.nnzb, case.row_order)
    tables = index.unpack(empty(size, torch.int32), case.weight_shape, case.blocksize, case.nnzb)
    x, dy = (empty(shape, memory_format=layout) for shape in (g.x_shape, g.y_shape))
    values = empty((case.nnzb, *case.blocksize))
    if misaligned:
        values = empty(values.numel() + 1)[1:].view(values.shape)
    if case.kind == "fprop":
        triton_conv.fprop(x, values, tables, None, g, case.tile, precision=case.precision)
    elif case.kind == "dgrad":
        triton_conv.dgrad(dy, values, tables, g, last, case.tile, precision=case.precision)
    else:
        shape = case.nnzb, *case.blocksize
        triton_conv.wgrad(x, dy, tables, g, shape, case.tile, precision=case.precision)


def kernels(cases: Sequence[Case | NormCase]) -> list[Any]:
    """The compiled kernel of each case."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    compile_and_launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs))

    target = NamesATarget()
    driver.set_active(target)
    JITFunction.run = compile_only
    found = []
    for case in cases:
        target.arch = case.arch
        compiled.clear()
        if isinstance(case, NormCase):
            norms.call(case, "meta")
            found.append(compiled[norms.launch_of(case)])
        else:
            call(case, "meta")
            found.append(compiled[0])
    return found


def environment(triton: Path | None) -> dict[str, str]:
    """For a process that compiles: no interpreter, and Triton from this folder where one is given."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join([*([str(triton)] if triton else []), str(ROOT), *filter(None, sys.path)])
    return kept


COMMAND = [sys.executable, "-W", "ignore", "-m", "bench.counts.compiling"]


def counted(cases: Sequence[Case | NormCase], triton: Path | None, source: Path | None = None) -> list[dict[str, Any]]:
    """The counts of each case under one Triton, by a process of their own; `source`: a folder for their assembly."""
    command = [*COMMAND, *([str(source)] if source else [])]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, env=environment(triton), cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"compiling {len(cases)} kernels failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def main() -> None:
    """Counts of the cases on stdin, as JSON."""
    import triton

    from bench.counts import machine

    version = triton.__version__
    cases = [NormCase.of(f) if f[0] in norms.KINDS else Case.of(f) for f in json.load(sys.stdin)]
    rows: list[dict[str, Any]] = []
    for case, kernel in zip(cases, kernels(cases), strict=True):
        if len(sys.argv) > 1:
            what = case.format if isinstance(case, NormCase) else "{}x{}".format(*case.blocksize)
            stem = Path(sys.argv[1]) / f"{case.kind}_{what}_{case.math}_{case.arch}_{version}_{kernel.hash[:6]}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            program = machine.sass(kernel.asm["cubin"]) if "cubin" in kernel.asm else machine.gcn(kernel.asm["amdgcn"])
            at = {i: label for label, i in program[0].labels.items()}
            lines = [(f"{at[i]}:\n" if i in at else "") + text for i, text in enumerate(program[0].instructions)]
            stem.with_suffix(".asm").write_text("\n".join(lines))
            stem.with_suffix(".ttgir").write_text(kernel.asm["ttgir"])
        count = norms.counts if isinstance(case, NormCase) else machine.counts
        rows.append({**case.row(version), **count(kernel), "hash": kernel.hash})
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
