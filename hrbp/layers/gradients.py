"""Gradients of weights outside the mask: straight through, and the dense gradient of a layer on stored blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_weight, conv2d_weight

from .dense_conv import contiguous

Conv = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation; groups


class _StraightThrough(torch.autograd.Function):
    """weight * mask, whose gradient is passed on to the whole weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _StraightThroughForward(_StraightThrough):
    """The same with a forward-mode derivative, which torch.compile does not take: the weight's, unmasked."""

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, mask: None) -> Tensor:  # type: ignore[override]
        return weight.clone()


class _DenseGradient(torch.autograd.Function):
    """Returns y. In the backward pass the weight gets its dense gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, weight: Tensor, conv: Conv | None) -> Tensor:  # type: ignore[override]
        return y.detach()  # not a view for autograd, so that it may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        _, x, weight, ctx.conv = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None, Tensor | None, None]:  # type: ignore[override]
        if dy is None:
            return None, None, None, None
        (x,) = ctx.saved_tensors
        return dy, None, dense_gradient(x, dy, ctx.shape, ctx.conv).to(ctx.dtype), None


class _DenseGradientForward(_DenseGradient):
    """The same with a forward-mode derivative, which torch.compile does not take: what a dense layer would add."""

    @staticmethod
    def jvp(ctx: Any, y: Tensor | None, x: None, weight: Tensor | None, conv: None) -> Tensor | None:  # type: ignore[override]
        if weight is None:
            return None if y is None else y.clone()
        (x_,) = ctx.saved_tensors
        if ctx.conv is None:
            dense = nn.functional.linear(x_, weight.to(x_.dtype))
        else:
            convolve: Any = nn.functional.conv2d if weight.dim() == 4 else nn.functional.conv1d
            dense = convolve(x_, weight.to(x_.dtype), None, *ctx.conv)
        return dense if y is None else y + dense


def with_dense_gradient(y: Tensor, x: Tensor, weight: Tensor, conv: Conv | None) -> Tensor:
    """Return y. In the backward pass `weight` gets the dense gradient of a layer; see `dense_gradient`."""
    if not weight.requires_grad and forward_ad._current_level < 0:
        return y
    function = _DenseGradient if torch.compiler.is_compiling() else _DenseGradientForward
    return function.apply(y, x.detach().to(y.dtype), weight, conv)


def dense_gradient(x: Tensor, dy: Tensor, shape: torch.Size | tuple[int, ...], conv: Conv | None) -> Tensor:
    """dL/dW of all weights of a layer from its input and the gradient of its output; float32 at least.

    Args:
        x: [N, C, H, W] or [C, H, W]; [N, C, L] or [C, L] along a line; [..., C] of a linear layer.
        dy: [N, K, P, Q] or [K, P, Q]; [N, K, Q] or [K, Q]; [..., K].
        shape: of W: [K, C/groups, R, S]; [K, C/groups, S]; [K, C].
        conv: stride, padding, dilation, with a number for each axis, and groups; None: a linear layer.
    """
    x = x.to(dy.dtype)
    if conv is None:
        grad = dy.flatten(0, -2).t() @ x.flatten(0, -2) if dy.dim() > 1 else torch.outer(dy, x)
    else:
        if x.dim() < len(shape):  # without a batch
            x, dy = x[None], dy[None]
        # In channels_last PyTorch refuses float64. On a CPU it gets strided 1x1 convolutions wrong there, if of few
        # channels, and in bfloat16 it reads beyond x.
        if x.dtype == torch.float64 or x.device.type == "cpu":
            wide = torch.promote_types(x.dtype, torch.float32)
            x, dy = contiguous(x.to(wide)), contiguous(dy.to(wide))
        of_weight: Any = conv2d_weight if len(shape) == 4 else conv1d_weight
        grad = of_weight(x, shape, dy, *conv)
    return grad.to(torch.promote_types(grad.dtype, torch.float32)).view(shape)
