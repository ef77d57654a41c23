"""Predicted time of a kernel on a GPU, from counted instructions and bytes. Nobody has timed these kernels on a GPU.

    time = the largest of   issue           instructions of all warps
                            shared memory   wavefronts of 128 bytes
                            tensor cores    multiplications of whole tiles, zeros and padding included
                            L2              bytes read, or twice the bytes written
                            HBM             x, y, values and index, once each
                            latency         programs that follow each other in a unit, each a chain of loads
           each at the share of its rate that kernels reach, the first three in the unit that has most programs,
           + the launches

Shares are those that tuned kernels of this kind reach on an H100; they are guesses for these. What a product on stored
blocks needs (a Demand) is said in tiles.py and slots.py, from the counts of counts/*.json; here is what PyTorch's own
product needs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..geometry import ConvGeometry
from .gpus import Gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # others are not predicted

SUSTAINED = 0.885  # of the highest clock, under load: 1.75 of 1.98 GHz
MEMORY = 0.9  # of a data sheet's bandwidth: what a copy reaches
SHARED_BYTES = 128  # of a wavefront; one a clock
REGISTERS = 64 << 10  # of a unit
WARPS = 64  # that a unit holds
RESERVED = 1 << 10  # bytes of shared memory of each program

SHARED, L2, HBM, TENSOR = 0.85, 0.85, 0.9, 0.8  # of the rates that a kernel reaches
ISSUE_OF_A_WARP = 0.25  # instructions a clock that one warp issues, at best
LATENCY = 0.6e-6  # seconds from a load to its use where caches are busy
LAUNCH = 2.0e-6  # seconds from the end of a kernel to the first results of the next

DENSE_TENSOR, DENSE_HBM = 0.57, 0.85  # PyTorch's convolution: 537 of 946 TFLOP/s at 1.75 GHz on an H100
SMALL_LAUNCH = 1.5e-6  # of its kernels


class Demand(NamedTuple):
    """What one launch needs, of all programs (CTAs) together.

    Attributes:
        programs: those that have work.
        warps: of a program.
        resident: programs that a unit holds at once (`resident`).
        issue: instructions, of all warps.
        issue_share: of the rate of issue that this kind of kernel reaches.
        wavefronts: of shared memory.
        flops: on tensor cores, as computed; rate: of a unit and clock.
        l2_read, l2_written, hbm: bytes.
        chain: loads of a program that wait for each other.
    """

    programs: float
    warps: int
    resident: int
    issue: float
    issue_share: float
    wavefronts: float
    flops: float
    rate: float
    l2_read: float
    l2_written: float
    hbm: float
    chain: float


class Estimate(NamedTuple):
    """Seconds of a product, and what bounds them.

    Attributes:
        bound: "issue", "shared memory", "tensor cores", "L2", "HBM", "latency" or "launch"; "" where it was measured.
        measured: whether the seconds come from a table of measurements (measured.py) instead of this model.
    """

    seconds: float
    bound: str
    measured: bool = False


def resident(registers: int, warps: int, shared: int, gpu: Gpu) -> int:
    """Programs that a unit holds at once: by registers (given out in eights to 32 threads), shared memory, warps."""
    by_registers = REGISTERS // (-(-max(registers, 16) // 8) * 8 * 32 * warps)
    by_shared = gpu.shared // (shared + RESERVED) if gpu.shared > shared + RESERVED else 1
    return max(1, min(by_registers, by_shared, WARPS // warps))


def terms(demand: Demand, gpu: Gpu) -> dict[str, float]:
    """Seconds of each term without launches, at the rates that kernels reach."""
    d, clock = demand, gpu.clock * SUSTAINED
    if d.programs <= 0:
        return {"HBM": d.hbm / (HBM * MEMORY * gpu.memory)}
    most = math.ceil(d.programs / gpu.units)  # programs of the unit that has most
    busiest = most / d.programs  # of the whole
    warps = min(d.resident, most) * d.warps / 4  # of each of the four schedulers
    issue = gpu.issue * min(d.issue_share, ISSUE_OF_A_WARP * warps)
    waves = math.ceil(d.programs / (gpu.units * d.resident))
    return {
        "issue": busiest * d.issue / (clock * issue),
        "shared memory": busiest * d.wavefronts / (clock * SHARED),
        "tensor cores": busiest * d.flops / (clock * d.rate * TENSOR),
        "L2": max(d.l2_read, 2 * d.l2_written) / (gpu.units * clock * gpu.l2 * L2),
        "HBM": d.hbm / (HBM * MEMORY * gpu.memory),
        "latency": waves * d.chain * LATENCY,
    }


def estimate(demand: Demand, gpu: Gpu, before: float = 0.0) -> Estimate:
    """Of one launch; before: seconds of smaller kernels that it needs around it."""
    found = terms(demand, gpu)
    bound = max(found, key=lambda name: found[name])
    fixed = LAUNCH + before
    return Estimate(found[bound] + fixed, bound if found[bound] >= fixed else "launch")


def least(nbytes: float, gpu: Gpu) -> float:
    """Seconds that no kernel is predicted to be below which moves so many bytes through HBM."""
    return nbytes / (HBM * MEMORY * gpu.memory) + LAUNCH


def passes(nbytes: float, launches: int, gpu: Gpu) -> float:
    """Seconds of small kernels that read and write so many bytes together."""
    return launches * SMALL_LAUNCH + nbytes / (DENSE_HBM * MEMORY * gpu.memory)


def flops_of(dtype: torch.dtype, precision: str, gpu: Gpu) -> float:
    """FLOP of a unit and clock that PyTorch's product has: tensor cores, but for full fp32."""
    if dtype == torch.float32:
        return gpu.vector if precision == "ieee" else gpu.tensor / 2
    return gpu.tensor


def activations(g: ConvGeometry) -> tuple[int, int]:
    """Elements of x and y."""
    return g.n * g.c * g.h * g.w, g.n * g.k * g.p * g.q


def dense(
    kind: str, g: ConvGeometry, dtype: torch.dtype, precision: str, channels_last: bool, gpu: Gpu
) -> Estimate:  # fmt: skip
    """PyTorch's convolution of a dense filter bank, alone; fprop, dgrad and wgrad alike but for what is turned.

    cuDNN computes two-byte types in channels_last: contiguous tensors are turned before and after, unless aten_conv.py
    multiplies matrices. In groups each is taken to be computed alone, filters and channels filled up to 8, the least
    that a tensor core multiplies: less than it takes, so that stored blocks are not preferred by a guess.
    """
    size, (x, y), weights = dtype.itemsize, activations(g), g.weights
    fill = math.prod(-(-side // g.groups // 8) * 8 * g.groups / side for side in (g.k, g.c)) if g.groups > 1 else 1.0
    flops = 2.0 * g.n * g.p * g.q * weights * fill
    rate = DENSE_TENSOR * flops_of(dtype, precision, gpu) * gpu.units * gpu.clock * SUSTAINED
    found = {"tensor cores": flops / rate, "HBM": (x + y + weights) * size / (DENSE_HBM * MEMORY * gpu.memory)}
    bound = max(found, key=lambda name: found[name])
    as_it_lies = channels_last or size != 2 or g.p * g.q == 1 or (g.of_matrices and kind != "wgrad")
    turned = 0.0 if as_it_lies else passes(2 * (x + y) * size, 2, gpu)
    fixed = SMALL_LAUNCH + turned
    return Estimate(found[bound] + fixed, bound if found[bound] >= fixed else "launch")


def scattered(
    kind: str, g: ConvGeometry, weights: int, dtype: torch.dtype, ordered: bool, channels_last: bool, gpu: Gpu
) -> float:
    """Seconds from stored values to a filter bank, or for wgrad back: what torch_conv.py launches around dense()."""
    size, cells = dtype.itemsize, g.weights
    nbytes = (cells if kind != "wgrad" else 0) + 2 * weights
    if (channels_last or g.taps == 1) and g.groups == 1:
        return passes(nbytes * size, 1, gpu)  # triton_bank.py
    # Zeros, indices as int64, where they point, and the copy; with a row order the bank once more.
    return passes((nbytes + (2 * cells if ordered else 0)) * size, 9 if ordered else 7, gpu)


def roofline(g: ConvGeometry, weights: int, index: int, dtype: torch.dtype, precision: str, gpu: Gpu) -> float:
    """Seconds that the device needs at least: bytes through HBM at a copy's speed, or useful FLOPs at the full rate."""
    x, y = activations(g)
    nbytes = (x + y + weights) * dtype.itemsize + index
    flops = 2.0 * g.n * g.p * g.q * weights
    rate = flops_of(dtype, precision, gpu) * gpu.units * gpu.clock * SUSTAINED
    return max(nbytes / (MEMORY * gpu.memory), flops / rate)
