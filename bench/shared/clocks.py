"""The one timer: single calls with cold or warm caches, and interleaved rounds of many calls."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


# ---------------------------------------------------------------- one repetition


@dataclass(frozen=True)
class Lap:
    """Seconds that the device was busy with a call, and (GPU) seconds that the host took to enqueue it."""

    seconds: float
    host_seconds: float | None = None


class Clock(Protocol):
    """Times single calls on one device. cold: the caches are emptied before, untimed."""

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
        # A decaying maximum: the next wait is long enough for calls whose enqueueing takes as long as recent ones.
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


class HostClock:
    """Wall-clock time of the host alone: the mean of `calls` calls in a row, which start on an idle device."""

    def __init__(self, device: torch.device, calls: int) -> None:
        self._device, self._calls = device, calls

    def lap(self, call: Call, cold: bool = True) -> Lap:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(self._calls):
            call()
        return Lap((time.perf_counter() - start) / self._calls)


def make_clock(device: torch.device) -> Clock:
    """Times kernels."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def make_step_clock(device: torch.device) -> Clock:
    """Times whole steps, which a user waits for."""
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
    """How many rounds: at least `least`, and up to `most` while time allows."""

    least: int = 5
    most: int = 50


def interleave(
    calls: Mapping[Key, Call],
    clock: Clock,
    rounds: Rounds,
    deadline: float,
    drop: Callable[[Mapping[Key, list[Lap]]], set[Key]] = lambda laps: set(),
    cold: bool = True,
    into: dict[Key, list[Lap]] | None = None,
) -> dict[Key, list[Lap]]:
    """Laps of every call, one lap each per round, in an order that is shuffled every round.

    Rounds go on until `deadline` (time.perf_counter()) or `rounds.most`. After `rounds.least` rounds `drop` may
    name calls that get no further laps. cold: caches are emptied before every lap, where the clock does that.
    into: where laps are put as they come, so that an interrupt loses none.
    """
    shuffle = random.Random(0).shuffle
    laps = {} if into is None else into
    laps |= {key: [] for key in calls}
    alive = list(calls)
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds.most):
            begin = time.perf_counter()
            shuffle(alive)
            for key in alive:
                laps[key].append(clock.lap(calls[key], cold))
            if done + 1 >= rounds.least:
                dropped = drop(laps)
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
