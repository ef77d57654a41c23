"""Batch normalisation with the residual and the ReLU that follow it, in as few passes through memory as can be.

Kernels of a kind of device are a module of these functions:

    refusal(x)          why x, not empty, is left to PyTorch's operators, or None
    sums_dtype(dtype)   what they compute statistics, weight and bias in
    forward, backward   of tensors that are dense in one memory format, and vectors of that dtype
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .derivatives import is_eager
from .layout import CONTIGUOUS, images_of, is_innermost, laid_out, memory_format_of, one_image


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """F.batch_norm, then a sum and a ReLU, computed together:

        y = max((x - mean) / sqrt(var + eps) * weight + bias + residual, 0)

    In training, mean and var are those of x over all axes but the second, and the running ones follow: running =
    (1 - momentum) * running + momentum * new, with the unbiased variance. Otherwise the running ones are used.

    On a CPU each direction reads and writes a tensor once where a channel fits into a cache (contiguous, batch_last),
    and twice for channels_last; the results are the same bits for any number of threads. On a GPU (Triton; NVIDIA from
    sm_80 on, AMD) forward reads x twice and the residual once, backward x and dy twice; of float16, bfloat16 and
    float32, the same bits on every run. Elsewhere, under torch.compile and in transforms PyTorch's own operators run
    one after the other.

    Args:
        x: [N, C, H, W], contiguous, channels_last or batch_last, or [N, C]; float16, bfloat16, float32 or float64.
        running_mean, running_var: [C], or None in training.
        weight, bias: [C] or None; dtype of x, or float32.
        residual: of x's shape, dtype and device, added before the ReLU.
        relu: whether negative results become zero.

    Returns:
        y of x's shape, dtype and memory format, differentiable in x, residual, weight and bias. 16-bit numbers are
        computed in float32 and rounded once.

    Raises:
        ValueError: one number a channel in training, as F.batch_norm; a residual that does not fit.

    Equivalent to: F.relu(F.batch_norm(x, ...) + residual)
    """
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"batch_norm(): residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}; it needs"
            f" {tuple(x.shape)} {x.dtype} on {x.device}, as x"
        )
    norm = training, relu, eps, momentum
    if not _native(x, residual, running_mean, running_var, weight, bias, training):
        y = _as_images(x, lambda x: F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps))
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        return _BatchNorm.apply(x, residual, weight, bias, running_mean, running_var, norm)
    return _forward(x, residual, weight, bias, running_mean, running_var, norm)[0]


@functools.cache
def _kernels(device: str) -> Any:
    """Those of a kind of device, loaded on first use; None where there are none."""
    if device == "cpu":
        from .kernels import cpu_norm

        return cpu_norm
    if device == "cuda":
        try:
            from .kernels import triton_norm
        except ImportError:
            return None
        return triton_norm
    return None


def _native(x: Tensor, residual: Tensor | None, *others: Any) -> bool:
    """Whether the device's kernels compute it."""
    *vectors, training = others
    if not is_eager(x, residual, *vectors) or x.dim() not in (2, 4) or not x.numel():
        return False
    kernels, shape = _kernels(x.device.type), x.shape[1:2]
    if kernels is None:
        return False
    dtypes = x.dtype, kernels.sums_dtype(x.dtype)
    if any(t is not None and (t.dtype not in dtypes or t.shape != shape or t.device != x.device) for t in vectors):
        return False
    known = vectors[0] is not None and vectors[1] is not None
    either = vectors[0] is not None or vectors[1] is not None
    return (known or (training and not either)) and kernels.refusal(x) is None


def _as_images(x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """compute(x) for PyTorch, which does not know batch_last: on its view [1, C, H, W*N], the same channels."""
    return images_of(compute(one_image(x)), x.shape[0]) if is_innermost(x) else compute(x)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, norm: tuple[int | float, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, invstd)"""
    form = _format(x)
    running = _vectors(x, running_mean, running_var)
    with (
        torch.profiler.record_function("blocksparse::batch_norm")
        if torch.autograd._profiler_enabled()
        else contextlib.nullcontext()
    ):
        found = _kernels(x.device.type).forward(
            _dense(x, form), _dense(residual, form), *_vectors(x, weight, bias), *running, norm, form
        )
    if norm[0]:
        for kept, new in zip((running_mean, running_var), running, strict=True):
            if kept is not None and new is not None and new is not kept:
                kept.copy_(new)
    return found


def _format(x: Tensor) -> str:
    return memory_format_of(x) if x.dim() == 4 else CONTIGUOUS


def _dense(t: Tensor | None, memory_format: str) -> Tensor | None:
    return t if t is None else laid_out(t, memory_format)


def _vectors(x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """As the kernels read them."""
    dtype = _kernels(x.device.type).sums_dtype(x.dtype)
    return [t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in vectors]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, norm: tuple[int | float, ...],
    ) -> Tensor:  # fmt: skip
        y, mean, invstd = _forward(x, residual, weight, bias, running_mean, running_var, norm)
        # Where no residual was added the sign of y is that of x * scale + shift, computed as it was.
        ctx.save_for_backward(y if norm[1] and residual is not None else None, x, weight, bias, mean, invstd)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        y, x, weight, bias, mean, invstd = ctx.saved_tensors
        wants_x, wants_residual, *wants = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph: the gradients are to be differentiated
            return *_gradients(dy, y, x, weight, bias, mean, invstd, ctx.norm, ctx.needs_input_grad), None, None, None
        form = _format(x)
        dx, dresidual, *vectors = _kernels(x.device.type).backward(
            _dense(dy, form), _dense(x, form), y, *_vectors(x, weight, bias), mean, invstd, ctx.norm, form,
            wants_x, wants_residual,
        )  # fmt: skip
        found = [
            (t if t.dtype == like.dtype else t.to(like.dtype)) if wanted else None
            for t, wanted, like in zip(vectors, wants, (weight, bias), strict=True)
        ]
        return dx, dresidual, *found, None, None, None


def _gradients(
    dy: Tensor, y: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor,
    norm: tuple[int | float, ...], wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x, residual, weight and bias by PyTorch's operators, which can be differentiated again."""
    training, relu, eps, _ = norm
    with torch.enable_grad():
        if training:
            z = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        else:
            z = F.batch_norm(x, mean.to(x.dtype), invstd.pow(-2).to(x.dtype), weight, bias, False, 0.0, 0.0)
        g = torch.where((z if y is None else y) <= 0, 0, dy) if relu else dy
        inputs = [
            t if t is not None and want else None for t, want in zip((x, None, weight, bias), wanted, strict=False)
        ]
        found = iter(torch.autograd.grad(z, [t for t in inputs if t is not None], g, create_graph=True))
        gradients = [None if t is None else next(found) for t in inputs]
    gradients[1] = g if wanted[1] else None
    return gradients
