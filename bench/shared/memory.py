"""Peak memory of a call, beyond what was allocated before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


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
    Buffers that a library keeps from one call to the next are not seen. If a trial allocation is not measured
    to within 5 %, extra_bytes returns None.
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
