"""Gpu: the numbers of a GPU that the time of a product depends on, read from the device or known by name.

A leaf. What a driver tells (units, clock, memory, shared memory) is read; what it does not tell (tensor cores, L2) goes
by the architecture. Rates are the data sheets' own: gpu_cost.py knows which share of them a kernel gets.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch


class Gpu(NamedTuple):
    """Numbers of one device.

    Attributes:
        name: as the driver has it, or a key of NAMED.
        arch: "sm_90", "gfx942", ...
        units: multiprocessors (AMD: compute units).
        clock: Hz, the highest.
        memory: bytes a second of HBM.
        shared: bytes of shared memory that the programs of a unit can have together.
        tensor: FLOP of a unit and clock in fp16 and bf16 on tensor cores, without sparsity; tf32 is half of it.
        vector: FLOP of a unit and clock in fp32 without tensor cores.
        l2: bytes of a unit and clock that the last cache before HBM delivers to all units together.
        issue: instructions of a unit and clock.
    """

    name: str
    arch: str
    units: int
    clock: float
    memory: float
    shared: int
    tensor: int
    vector: int
    l2: float
    issue: float = 4.0

    @property
    def column(self) -> str:
        return column_of(self.arch)


def column_of(arch: str) -> str:
    """The target whose kernels a device runs: "sm_80" (mma.sync, 99 KB of shared memory) for every other NVIDIA GPU."""
    if arch.startswith("gfx"):
        return "gfx"
    number = arch.removeprefix("sm_").rstrip("af")
    return {"90": "sm_90", "100": "sm_100", "103": "sm_100"}.get(number, "sm_80")


# Units, clocks, memory, tensor and vector rates: NVIDIA's data sheets and white papers of A100 80GB SXM, H100 SXM,
# H200 SXM and B200; AMD's data sheet and CDNA 3 white paper of the MI300X (its last cache: Infinity Cache, 17.2 TB/s).
# L2 of NVIDIA: 5.5 TB/s read on an H100, as published microbenchmarks have it, 24 bytes of a unit and clock; the others
# are taken to be alike. A wavefront of 64 threads takes four clocks of a SIMD of AMD's four.
NAMED = {
    "a100": Gpu("a100", "sm_80", 108, 1.410e9, 2.04e12, 164 << 10, 2048, 128, 24.0),
    "h100": Gpu("h100", "sm_90", 132, 1.980e9, 3.35e12, 227 << 10, 4096, 256, 24.0),
    "h200": Gpu("h200", "sm_90", 132, 1.980e9, 4.80e12, 227 << 10, 4096, 256, 24.0),
    "b200": Gpu("b200", "sm_100", 148, 1.965e9, 8.00e12, 227 << 10, 8192, 256, 24.0),
    "mi300x": Gpu("mi300x", "gfx942", 304, 2.100e9, 5.30e12, 64 << 10, 2048, 256, 27.0, 1.0),
}
TYPICAL = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200", "gfx": "mi300x"}
# FLOP of a unit and clock on tensor cores and without, of other architectures: data sheets of A40, L40S, RTX PRO 6000.
OTHERS = {"sm_86": (1024, 256), "sm_89": (1024, 256), "sm_120": (1024, 256)}


def typical(arch: str) -> Gpu:
    """A device of this architecture, for work that is planned without one."""
    like = NAMED[TYPICAL[column_of(arch)]]
    tensor, vector = OTHERS.get(arch, (like.tensor, like.vector))
    return like._replace(tensor=tensor, vector=vector)


def named(name: str, who: str) -> Gpu:
    """The device of this name; ValueError with all names otherwise."""
    if name not in NAMED:
        raise ValueError(f"{who}: GPU is {name!r}; it needs one of {', '.join(map(repr, NAMED))}")
    return NAMED[name]


@functools.cache
def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "" where there is no GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def of(device: torch.device) -> Gpu | None:
    """The numbers of a CUDA or ROCm device; None for others. Nothing is computed and nothing synchronised."""
    if device.type != "cuda":
        return None
    return read(torch.cuda.get_device_properties(device), arch_of(device))


def read(facts: Any, arch: str) -> Gpu:
    """The numbers of torch.cuda.get_device_properties; what it does not tell, as of a typical device."""
    like = typical(arch)
    hertz, memory_hertz = 1e3 * getattr(facts, "clock_rate", 0), 1e3 * getattr(facts, "memory_clock_rate", 0)
    width = getattr(facts, "memory_bus_width", 0) / 8
    return like._replace(
        name=facts.name,
        arch=arch,
        units=facts.multi_processor_count,
        clock=hertz or like.clock,
        memory=2 * memory_hertz * width or like.memory,  # two transfers a clock
        shared=min(getattr(facts, "shared_memory_per_multiprocessor", 0) or like.shared, like.shared),
    )
