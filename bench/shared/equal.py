"""The one rule for 'equal', of the tests and of the benchmarks: at most twice PyTorch's own error, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A result of exact arithmetic still rounds once to its dtype, and sums of a few products may round luckily in
# PyTorch: the floor is this many units of rounding of the largest sum of absolute products.
FLOOR_ULPS = 4.0
# What PyTorch's own result may be off by, in the same unit, or in tf32's roundings where it uses that.
OWN_ULPS, OWN_TF32 = 16.0, 4 * 2.0**-10
# tf32: tensor cores may cut the operands off, where PyTorch's kernels round them. The unit is then half a unit of tf32.
TF32_UNIT = 2.0**-11


@dataclass(frozen=True)
class Verdict:
    """Largest and RMS error against float64, what was allowed, and why the two do not decide (wrong shape, NaN)."""

    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed

    def __str__(self) -> str:
        return self.problem or (
            f"max error {self.max_error:.3g} (allowed {self.max_allowed:.3g}),"
            f" rms error {self.rms_error:.3g} (allowed {self.rms_allowed:.3g})"
        )


def judge(actual: Tensor, exact: Tensor, own: Tensor, largest: float) -> Verdict:
    """Hold a result against float64.

    The largest error may be twice PyTorch's own plus FLOOR_ULPS units of rounding, the RMS error twice PyTorch's own
    plus one unit. A result of PyTorch that is wrong would excuse any error of ours: it fails, too.

    Args:
        actual: the result.
        exact: the same in float64, of the same shape, on the device of `actual` or on the CPU.
        own: PyTorch's dense result in the dtype of `actual`.
        largest: the largest sum of absolute products of an element, which bounds what rounding may do when terms
            cancel; a unit of rounding is the dtype's eps times this, of float32 on a GPU that may use tf32 TF32_UNIT.
    """
    if actual.shape != exact.shape:
        return _no(f"shape {tuple(actual.shape)}, needed {tuple(exact.shape)}")
    if actual.dtype != own.dtype:
        return _no(f"dtype {actual.dtype}, needed {own.dtype}")
    if exact.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, 0.0)
    if wrong := int((~torch.isfinite(actual)).sum()):
        return _no(f"{wrong} elements are not finite")
    eps = torch.finfo(actual.dtype).eps
    tf32 = actual.is_cuda and actual.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    ulp = (TF32_UNIT if tf32 else eps) * largest
    own_max, own_rms = _errors(own, exact)
    if not own_max <= max(OWN_ULPS * eps, OWN_TF32) * largest:
        return _no(f"PyTorch itself is off by {own_max:.3g}: no yardstick")
    max_error, rms_error = _errors(actual, exact)
    return Verdict(max_error, 2 * own_max + FLOOR_ULPS * ulp, rms_error, 2 * own_rms + ulp)


def _no(problem: str) -> Verdict:
    return Verdict(math.nan, 0.0, math.nan, 0.0, problem)


def _errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and RMS difference; NaN if there is one."""
    error = got.to(exact.device, torch.float64, copy=True).sub_(exact)
    least, most = error.aminmax()
    return float(torch.maximum(-least, most)), float(torch.linalg.vector_norm(error)) / math.sqrt(error.numel())


# Of a whole network in float32 no float64 reference is made: it is compared with the plain dense network of the same
# weights. Rounding is far below this, a wrong layer far above.
NETWORK_ALLOWED = 1e-3


def network_error(got: Tensor, needed: Tensor) -> float:
    """|got - needed| / |needed| of what a network computes; at most NETWORK_ALLOWED is right. NaN stays NaN.

    0 for equal zeros: gradients of a branch whose layers read no channel that the one before writes.
    """
    off = (got - needed).norm()
    return float(off / needed.norm()) if off != 0 else 0.0
