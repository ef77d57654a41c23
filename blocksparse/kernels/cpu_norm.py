"""Batch normalisation on the native CPU backend: native/norm.cpp, called on tensors as they lie."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from ..layout import channels_of
from .cpu import NUMBERS, called
from .cpu_build import library

int64 = ctypes.c_int64


class _Norm(ctypes.Structure):
    """Norm in native/norm.cpp."""

    _fields_ = [
        *((name, int64) for name in ("rows", "channels", "inner", "threads", "training", "relu")),
        ("eps", ctypes.c_double), ("momentum", ctypes.c_double),
    ]  # fmt: skip


def absent(dtype: torch.dtype) -> str | None:
    """Why it cannot run on tensors of this dtype, or None; compiles the library if that has not been done yet."""
    if dtype not in NUMBERS:
        return f"no kernel for {dtype}"
    found = library(NUMBERS[dtype])
    return found if isinstance(found, str) else None


def refusal(x: Tensor) -> str | None:
    """Why it cannot run on this tensor, or None."""
    return absent(x.dtype)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics, weight and bias are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=4096)
def _norm(*sizes: int | float) -> _Norm:
    return _Norm(*sizes)


def _call(name: str, x: Tensor, norm: tuple[int | float, ...], memory_format: str, *args: Tensor | None) -> None:
    lib = library(NUMBERS[x.dtype])
    assert not isinstance(lib, str)
    training, relu, eps, momentum = norm
    sizes = _norm(*channels_of(x, memory_format), torch.get_num_threads(), int(training), int(relu), eps, momentum)
    if called(getattr(lib, f"bsr_norm_{name}"), sizes, *args):
        raise MemoryError(f"batch_norm() of {tuple(x.shape)} on the CPU: no memory for its sums")


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, norm: tuple[int | float, ...], memory_format: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, invstd); in training the running statistics are updated in place.

    x, residual and y are dense in one memory format; the others are [C] of `sums_dtype`. norm: training, relu, eps,
    momentum.
    """
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[1], dtype=sums_dtype(x.dtype))
    invstd = torch.empty_like(mean)
    _call("forward", x, norm, memory_format, x, residual, weight, bias, running_mean, running_var, mean, invstd, y)
    return y, mean, invstd


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor,
    norm: tuple[int | float, ...], memory_format: str, wants_x: bool, wants_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dweight, dbias); y is needed where a residual was added before a ReLU."""
    dx = torch.empty_like(x) if wants_x else None
    dresidual = torch.empty_like(x) if wants_residual else None
    dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
    _call(
        "backward", x, norm, memory_format, dy, x, y, weight, bias, mean, invstd, dx, dresidual, dweight, dbias
    )  # fmt: skip
    return dx, dresidual, dweight, dbias
