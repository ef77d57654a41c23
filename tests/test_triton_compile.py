"""Launches of the Triton kernels without a GPU: which kernel runs, with which arguments.

The host functions run over a driver that only names a target, on meta tensors to see what is compiled (other facts
about it: test_triton_counts.py), or on a driver that does nothing to see what is launched. Both need a process in which
TRITON_INTERPRET is not set: this file, run as a script, launches the cases that it reads from stdin.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from bench.counts import norms
from bench.counts.cases import Case
from bench.counts.compiling import COMMAND, NamesATarget, call, environment
from processes import Process


def launch_cases(cases: list[Case | norms.NormCase]) -> list[list[dict[str, Any]]]:
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
            if isinstance(case, norms.NormCase):
                norms.call(case, "cpu")
            else:
                call(case, "cpu", misaligned)
            found.append(list(launches))
    return found


# ---------------------------------------------------------------------- the tests


def start(cases: list[Case] | list[norms.NormCase], what: str = "launch") -> Process:
    """Launches them, or compiles them, in a process of its own."""
    command = COMMAND if what == "compile" else [sys.executable, "-W", "ignore", __file__]
    return Process(command, given=json.dumps(cases), env=environment(None))


def result_of(process: Process) -> Any:
    with process:
        done = process.finish()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_sizes_do_not_need_another_kernel():
    case = Case("fprop", "sm_90", (32, 32))
    cases = [case, case._replace(batch=65, height=30), case._replace(batch=63, height=27)]
    assert len({case.geometry for case in cases}) == 3
    assert len({row["hash"] for row in result_of(start(cases, "compile"))}) == 1


@pytest.mark.slow
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
        Case("wgrad", "sm_90", (32, 32), "ieee", density=0.02, height=24),  # split
    ]
    found = result_of(start(cases))
    for at, case in enumerate(cases):
        first, second, misaligned = found[3 * at : 3 * at + 3]
        assert [launch["by"] for launch in first] == ["triton"] * len(first), case
        assert [launch["by"] for launch in second] == ["us"] * len(first), case
        assert [launch | {"by": ""} for launch in first] == [launch | {"by": ""} for launch in second], case
        assert misaligned[0]["by"] == ("us" if case.kind == "wgrad" else "triton"), case  # wgrad reads no values
        assert len(first) == 1


@pytest.mark.slow
def test_kept_kernels_of_batch_norm_are_launched_as_triton_would():
    small = {"shape": (2, 16, 5, 5), "residual": True}
    cases = [norms.NormCase("norm_apply", "sm_90", **small), norms.NormCase("norm_dx", "sm_90", "batch_last", **small)]
    found = result_of(start(cases))
    for at in range(len(cases)):
        first, second, _ = found[3 * at : 3 * at + 3]
        assert [launch.pop("by") for launch in first] == ["triton"] * 2
        assert [launch.pop("by") for launch in second] == ["us"] * 2
        assert first == second
    for launch in found[0]:  # numbers that no kernel was compiled for
        assert "1e-05" in launch["args"]
    assert "0.1" in found[0][0]["args"]


@pytest.mark.slow
def test_a_kept_kernel_gets_the_offsets_of_its_own_index():
    """Two layers that differ in their number of blocks share a kernel; their tables lie elsewhere."""
    few = [Case(kind, "sm_90", (32, 32), height=5, batch=1) for kind in ("fprop", "dgrad")]
    many = [case._replace(density=0.12) for case in few]
    assert [case.tile for case in few] == [case.tile for case in many]
    started = [start(cases) for cases in (many, [*few, *many])]
    alone, both = (result_of(process) for process in started)
    for at in range(len(many)):
        (needed,), (found,), (other,) = alone[3 * at], both[3 * (len(few) + at)], both[3 * at]
        assert (needed.pop("by"), found.pop("by")) == ("triton", "us")
        assert found == needed
        assert found["args"] != other["args"]


if __name__ == "__main__":
    given = json.load(sys.stdin)
    json.dump(launch_cases([norms.NormCase.of(f) if f[0] in norms.KINDS else Case.of(f) for f in given]), sys.stdout)
