"""Training on 2:4 kernels in both directions: forward with W~, input gradient with its transpose.

Masks of "transposable" keep 2 of every 4 input channels of a filter and 2 of every 4 filters of an input channel, so
that W~ [K, C] and W~^T [C, K] are both 2:4, and both products of a training step run on sparse tensor cores:

        y  = x W~^T         on the compressed W~         (x [rows, C])
        dx = dy W~          on the compressed W~^T       (dy [rows, K])
        dW = dy^T x         dense, straight through to every weight, as methods "ste" and "sr-ste" need it

Both forms are made anew in every forward, from the weight and the mask of that moment: in training the weight is
another one at every step, and no bookkeeping can tell a change through `.data`. They are what the backward pass
computes with, so that gradients are those of the forward, whatever has become of the weight since. dW cannot be 2:4:
neither of its operands is.

The kernels are those of torch.sparse.to_sparse_semi_structured, on CUDA alone. Not run on a GPU yet: on a CPU the tests
put a stand-in in the place of the kernels, and torch's own compressed tensors multiplied as what they stand for.
Whether it is faster than the dense layer depends on how the time of compressing, twice a step, compares with that of
the two products: it has not been measured.

Source: Hubara et al., Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable
Masks, NeurIPS 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.sparse import to_sparse_semi_structured

from .semi_structured import DTYPES


class _SemiLinear(torch.autograd.Function):
    """x [rows, C], weight [K, C] that is 2:4 in both directions, bias [K] or None -> [rows, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.back = to_sparse_semi_structured(weight.t().contiguous()) if ctx.needs_input_grad[0] else None
        return nn.functional.linear(x, to_sparse_semi_structured(weight.contiguous()), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        dy = dy.contiguous()
        return (
            nn.functional.linear(dy, ctx.back) if ctx.needs_input_grad[0] else None,
            dy.t() @ x if ctx.needs_input_grad[1] else None,
            dy.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _product(layer: Any, input: Tensor, weight: Tensor) -> Tensor:
    """What nn.Linear, or nn.Conv2d with one tap and no padding, computes of an input with this weight.

    Args:
        layer: with a bias, or None; a convolution with its stride.
        input: [..., C]; [N, C, H, W] or [C, H, W] of a convolution.
        weight: [K, C] or [K, C, 1, 1], 2:4 in both directions, with its graph.

    Raises:
        ValueError: it would be computed neither in float16 nor in bfloat16.
    """
    kind, convolves = input.device.type, weight.dim() == 4
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if dtype not in DTYPES or (not torch.is_autocast_enabled(kind) and input.dtype != dtype):
        of = f"{dtype} weight and a {input.dtype} input" if input.dtype != dtype else f"{dtype}"
        raise ValueError(
            f"{type(layer).__name__}: it is set to train on 2:4 kernels (train_semi_structured) and got {of}; these"
            " need float16 or bfloat16: use autocast, or model.bfloat16()"
        )
    x = input
    if convolves:
        rows, columns = layer.stride
        x = input[..., ::rows, ::columns].movedim(-3, -1)  # contiguous in channels_last
    flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
    bias = None if layer.bias is None else layer.bias.to(dtype)
    y = _SemiLinear.apply(flat, weight.flatten(1).to(dtype), bias).view(*x.shape[:-1], len(weight))
    return y.movedim(-1, -3) if convolves else y


_run = _product


def semi_product(layer: Any, input: Tensor, weight: Tensor) -> Tensor:
    """The result of a layer on 2:4 kernels: see `_product`."""
    return _run(layer, input, weight)


def prepare() -> None:
    """Let torch.compile leave these products to run as they are. It loads the compiler, which an import must not."""
    global _run
    if _run is _product:
        _run = torch.compiler.disable(_product)
