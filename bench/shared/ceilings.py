"""The ceilings of this machine: bytes per second of a copy, FLOP/s of a matmul and of multiply-adds alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.shared.clocks import Clock, last_level_cache
from blocksparse.kernels import cpu


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
