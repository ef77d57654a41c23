"""How things are timed: cold caches, interleaved repetitions, peak memory, the ceilings of the machine."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from blocksparse.kernels import cpu

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


# ---------------------------------------------------------------- one repetition


@dataclass(frozen=True)
class Lap:
    """Seconds that the device was busy with a call, and (GPU) seconds that the host took to enqueue it."""

    seconds: float
    host_seconds: float | None = None


class Clock(Protocol):
    """Times single calls on one device with cold caches."""

    def lap(self, call: Call, cold: bool = True) -> Lap: ...


class CpuClock:
    """Wall-clock time, after reading a buffer of twice the last-level cache (not timed)."""

    def __init__(self) -> None:
        self._wash = torch.ones(2 * last_level_cache() // 4)

    def lap(self, call: Call, cold: bool = True) -> Lap:
        if cold:
            self._wash.sum()
        start = time.perf_counter()
        result = call()
        stop = time.perf_counter()
        del result  # given back after the clock has stopped
        return Lap(stop - start)


class CudaClock:
    """CUDA events around the call, after reading a buffer of several L2 caches (not timed).

    The GPU first waits until the host has enqueued the whole call, so that a lap is the time of the device.
    """

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._wash = torch.ones(max(4 * l2, 2**28) // 4, device=device)
        self._sink = torch.empty((), device=device)
        self._host_seconds = 1e-4
        self._cycles_per_second = self._calibrate()

    def _calibrate(self) -> float:
        cycles = 10_000_000
        torch.cuda._sleep(cycles)
        start, stop = self._events()
        start.record()
        torch.cuda._sleep(cycles)
        stop.record()
        torch.cuda.synchronize(self._device)
        return cycles / (start.elapsed_time(stop) * 1e-3)

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def lap(self, call: Call, cold: bool = True) -> Lap:
        start, stop = self._events()
        if cold:
            torch.sum(self._wash, 0, out=self._sink)
        torch.cuda._sleep(int(self._cycles_per_second * (2 * self._host_seconds + 5e-5)))
        start.record()
        begin = time.perf_counter()
        result = call()
        host = time.perf_counter() - begin
        stop.record()
        torch.cuda.synchronize(self._device)
        del result
        # A slowly forgotten maximum: the next wait covers calls that keep the host as long as recent ones.
        self._host_seconds = min(5e-3, max(host, 0.9 * self._host_seconds))
        return Lap(start.elapsed_time(stop) * 1e-3, host)


class CudaStepClock:
    """Wall-clock time from an idle device to an idle device: the host's part of a call counts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lap(self, call: Call, cold: bool = True) -> Lap:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        result = call()
        host = time.perf_counter()
        torch.cuda.synchronize(self._device)
        stop = time.perf_counter()
        del result
        return Lap(stop - start, host - start)


def make_clock(device: torch.device) -> Clock:
    """Of kernels."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def make_step_clock(device: torch.device) -> Clock:
    """Of whole steps, which a user waits for."""
    return CudaStepClock(device) if device.type == "cuda" else CpuClock()


def last_level_cache() -> int:
    """Bytes of the largest CPU cache, 64 MB where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[-1:] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=2**26)


# ---------------------------------------------------------------- many repetitions


@dataclass(frozen=True)
class Rounds:
    """How often the round robin goes round: `least`, and on to `most` while time allows."""

    least: int = 5
    most: int = 50


def interleave(
    calls: Mapping[Key, Call],
    clock: Clock,
    rounds: Rounds,
    deadline: float,
    hopeless: Callable[[Mapping[Key, list[Lap]]], set[Key]] = lambda laps: set(),
) -> dict[Key, list[Lap]]:
    """Laps of every call, one lap each per round, in an order that is shuffled every round.

    Rounds go on until `deadline` (time.perf_counter()) or `rounds.most`. After `rounds.least` rounds `hopeless`
    may name calls that need no further laps.
    """
    shuffle = random.Random(0).shuffle
    laps: dict[Key, list[Lap]] = {key: [] for key in calls}
    alive = list(calls)
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds.most):
            begin = time.perf_counter()
            shuffle(alive)
            for key in alive:
                laps[key].append(clock.lap(calls[key]))
            if done + 1 >= rounds.least:
                dropped = hopeless(laps)
                alive = [key for key in alive if key not in dropped]
                now = time.perf_counter()
                if now + (now - begin) > deadline:
                    break
    finally:
        gc.enable()
    return laps


def percentile(samples: list[float], percent: float) -> float:
    """Linear interpolation between the two nearest samples."""
    ordered = sorted(samples)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


# ---------------------------------------------------------------- memory


class CudaMemory:
    """Peak of PyTorch's CUDA allocator during a call, beyond what was there before and what is returned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def extra_bytes(self, call: Callable[[], Tensor]) -> int | None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        result = call()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        return max(0, peak - before - result.untyped_storage().nbytes())


class CpuMemory:
    """Peak of the process's resident memory during a call, beyond what was there before and what is returned.

    Everything counts, scratch space inside oneDNN or MKL too; resolution about 0.1 MB; Linux with glibc only.
    Before a call the allocator gives back all free memory, so that reused memory counts like new memory.
    Buffers that a library keeps from one call to the next are not seen. Where a trial allocation is not
    measured to within 5 %, nothing is claimed: extra_bytes returns None.
    """

    _RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self) -> None:
        self._trim: Callable[[int], int] | None = getattr(_libc(), "malloc_trim", None)
        trial = 24 * 2**20
        seen = self._measure(lambda: (torch.ones(trial // 4), torch.empty(0))[1]) if self._trim else None
        self._works = seen is not None and abs(seen - trial) < 0.05 * trial

    def extra_bytes(self, call: Callable[[], Tensor]) -> int | None:
        return self._measure(call) if self._works else None

    def _measure(self, call: Callable[[], Tensor]) -> int | None:
        assert self._trim is not None
        self._trim(0)
        try:
            self._RESET.write_text("5")  # sets the peak back to the present
            before = self._kilobytes("VmRSS")
            result = call()
            peak = self._kilobytes("VmHWM")
        except (OSError, KeyError):
            return None
        return max(0, (peak - before) * 1024 - result.untyped_storage().nbytes())

    def _kilobytes(self, field: str) -> int:
        lines = dict(line.split(":", 1) for line in self._STATUS.read_text().splitlines() if ":" in line)
        return int(lines[field].split()[0])


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def make_memory(device: torch.device) -> CudaMemory | CpuMemory:
    return CudaMemory(device) if device.type == "cuda" else CpuMemory()


# ---------------------------------------------------------------- what the machine could do


@dataclass(frozen=True)
class Ceilings:
    """Measured on this machine: bytes per second of a copy (read + written), FLOP/s of a square matmul.

    peak_flops: of fused multiply-adds that wait for no memory, on a CPU with a C++ compiler; in the precision that the
    native backend computes in, float32 for 16-bit numbers.
    """

    copy_bytes: float
    matmul_flops: float
    peak_flops: float | None = None

    def seconds(self, flops: float, nbytes: float) -> float:
        """The roofline: no program of so many FLOPs that must move so many bytes ends sooner."""
        return max(flops / self.matmul_flops, nbytes / self.copy_bytes)


def measure_ceilings(clock: Clock, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several copies far beyond the caches and of several matmuls."""
    on_gpu = device.type == "cuda"
    laps = 20 if on_gpu else 5
    nbytes = 2**30 if on_gpu else max(2**26, 4 * last_level_cache())
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    copy = min(clock.lap(lambda: target.copy_(source)).seconds for _ in range(laps))
    if on_gpu:
        matmul = _matmul_flops(clock, device, dtype, 8192, laps)
    else:  # where a CPU has no fast matmul in this dtype, computing in fp32 is what it can do
        known = {d: _matmul_flops(clock, device, d, 128, 1) for d in (dtype, torch.float32)}
        matmul = _matmul_flops(clock, device, max(known, key=lambda d: known[d]), 1280, laps)
    return Ceilings(2 * nbytes / copy, matmul, None if on_gpu else cpu.peak_flops(dtype))


def _matmul_flops(clock: Clock, device: torch.device, dtype: torch.dtype, size: int, laps: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    torch.mm(a, b, out=product)
    seconds = min(clock.lap(lambda: torch.mm(a, b, out=product), cold=False).seconds for _ in range(laps))
    return 2 * size**3 / seconds
