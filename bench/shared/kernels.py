"""Which kernels a call launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def kernels_of(call: Callable[[], object], device: torch.device) -> list[str]:
    """Names of the kernels, in the order of their launches; on a CPU none."""
    if device.type != "cuda":
        return []
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize(device)
        events = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    except RuntimeError as error:  # a driver that lets nobody look: the times stand without the names
        return [f"not known: {error}"]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
