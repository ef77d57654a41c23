"""Step times of networks, measured interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..progress import Progress, duration
from .spread import median_interval

WARM_UP = 2  # rounds before those that count


@dataclass(frozen=True)
class Timing:
    """Median seconds of a step, and the interval of that median."""

    seconds: float
    low: float
    high: float


def interleaved(
    steps: Mapping[str, Callable[[], float]], rounds: int, first: str = "dense", *, progress: Progress, what: str
) -> dict[str, Timing]:
    """Median seconds of interleaved steps: other load on the machine affects all of them alike.

    Ratios to `first` are taken within a round: what slows a round down slows both sides. Intervals are those of the
    ratio, so that of `first` is a point: how fast the machine is as a whole drops out of every comparison.

    Args:
        steps: name -> a function that takes one step and returns its seconds.
        rounds: each takes every step once; WARM_UP rounds come before, not counted.
        first: the step that ratios are relative to.
        progress: shows how far it is, and the last ratio.
        what: is measured, for that line.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin, whole = time.monotonic(), rounds + WARM_UP
    for at in range(whole):
        for name, step in steps.items():
            times[name].append(step())
            if progress.due():
                done = at + len([t for t in times.values() if len(t) > at]) / len(steps)
                left = duration((time.monotonic() - begin) / done * (whole - done))
                speed = f"{name} takes {times[name][-1] / times[first][-1]:.2f} of the time of {first}, "
                progress.show(f"{what}: round {at + 1}/{whole}, {'' if name == first else speed}{left} left")
    progress.clear()
    counted = {name: seconds[WARM_UP:] for name, seconds in times.items()}
    pace, found = statistics.median(counted[first]), {}
    for name, seconds in counted.items():
        ratios = [t / d for t, d in zip(seconds, counted[first], strict=True)]
        found[name] = Timing(*(pace * ratio for ratio in (statistics.median(ratios), *median_interval(ratios))))
    return found


def timed(device: torch.device, step: Callable[[], Any]) -> float:
    """Seconds of a step; on a GPU until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def machine(device: torch.device) -> str:
    """The device that times are measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"
