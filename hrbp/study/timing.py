"""Step times of networks, measured interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

WARM_UP = 2  # rounds before those that count


def interleaved(steps: Mapping[str, Callable[[], float]], rounds: int, first: str = "dense") -> dict[str, float]:
    """Median seconds of interleaved steps: other load on the machine affects all of them alike.

    Ratios to `first` are taken within a round: what slows a round down slows both sides.

    Args:
        steps: name -> a function that takes one step and returns its seconds.
        rounds: each takes every step once; WARM_UP rounds come before, not counted.
        first: the step that ratios are relative to.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + WARM_UP):
        for name, step in steps.items():
            times[name].append(step())
    counted = {name: seconds[WARM_UP:] for name, seconds in times.items()}
    pace = statistics.median(counted[first])
    return {
        name: pace * statistics.median(t / d for t, d in zip(seconds, counted[first], strict=True))
        for name, seconds in counted.items()
    }


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
