"""The ops of torch.ops.bsrconv under torch.vmap: one call on a larger batch where the weights are one, else a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .geometry import ConvGeometry
from .product_checks import Facts, check_dgrad, check_dy, check_fprop, check_wgrad

# `in_dims` says for each argument of the op, in order, which axis of it are the samples; None: it has none. For a list
# that is a list of None. The rules return the samples' results and the axis these are along.
Dims = Sequence[Any]


def fprop(
    info: Any, in_dims: Dims, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None,
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    backend: str | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Samples of x become images of one batch. Samples of values, or of the index, are products of their own."""
    op, rest = torch.ops.bsrconv.fprop.default, (weight_shape, stride, padding, dilation, backend)
    one = [_sample(t, dim) for t, dim in zip((x, values, index, bias), in_dims, strict=False)]
    check_fprop(one[0], one[1], one[2], one[3], weight_shape)
    g = ConvGeometry.of(one[0].shape, weight_shape, stride, padding, dilation, "conv2d()")
    if in_dims[1] is not None or in_dims[2] is not None:
        return _one_by_one(info, in_dims, op, (x, values, index, bias, *rest), g.y_shape)
    own_bias = bias is not None and in_dims[3] is not None
    y = op(x if in_dims[0] is None else _fold(x, in_dims[0]), values, index, None if own_bias else bias, *rest)
    y = y if in_dims[0] is None else y.unflatten(0, (info.batch_size, g.n))
    if bias is not None and own_bias:
        y = y + bias.movedim(in_dims[3], 0)[:, None, :, None, None]
    return y, 0


def dgrad(
    info: Any, in_dims: Dims, dy: Tensor, values: Tensor, index: Tensor, x_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    channels_last: bool, backend: str | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """As fprop, with dy for x."""
    op, rest = torch.ops.bsrconv.dgrad.default, (weight_shape, stride, padding, dilation, channels_last, backend)
    one = [_sample(t, dim) for t, dim in zip((dy, values, index), in_dims, strict=False)]
    check_dgrad(one[0], one[1], one[2], weight_shape)
    g = ConvGeometry.of(x_shape, weight_shape, stride, padding, dilation, "conv2d_dgrad()")
    check_dy("conv2d_dgrad()", one[0], g)
    if in_dims[1] is not None or in_dims[2] is not None:
        return _one_by_one(info, in_dims, op, (dy, values, index, x_shape, *rest), g.x_shape)
    dx = op(_fold(dy, in_dims[0]), values, index, (info.batch_size * g.n, *g.x_shape[1:]), *rest)
    return dx.unflatten(0, (info.batch_size, g.n)), 0


def wgrad(
    info: Any, in_dims: Dims, x: Tensor, dy: Tensor, index: Tensor, values_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    backend: str | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Every sample has weight gradients of its own: a product each."""
    op, rest = torch.ops.bsrconv.wgrad.default, (weight_shape, stride, padding, dilation, backend)
    one = [_sample(t, dim) for t, dim in zip((x, dy, index), in_dims, strict=False)]
    check_wgrad(one[0], one[1], one[2], values_shape, weight_shape)
    g = ConvGeometry.of(one[0].shape, weight_shape, stride, padding, dilation, "conv2d_wgrad()")
    check_dy("conv2d_wgrad()", one[1], g)
    return _one_by_one(info, in_dims, op, (x, dy, index, values_shape, *rest), values_shape)


def _sample(t: Any, dim: int | None) -> Any:
    """What the checks read of one sample of `t`."""
    if dim is None:
        return t
    shape = list(t.shape)
    del shape[dim]
    return Facts(shape, t.dtype, t.device)


def _fold(t: Tensor, dim: int) -> Tensor:
    """Samples of [N, ...] along `dim` as one batch, [samples * N, ...]."""
    return t.movedim(dim, 0).flatten(0, 1)


def _one_by_one(
    info: Any, in_dims: Dims, op: Any, args: Sequence[Any], shape: Sequence[int]
) -> tuple[Tensor, int]:  # fmt: skip
    """`op` on each sample, with results of `shape`."""
    if not info.batch_size:
        return args[0].new_empty((0, *shape)), 0
    columns = [
        arg.unbind(dim) if isinstance(dim, int) else [arg] * info.batch_size
        for arg, dim in zip(args, in_dims, strict=False)
    ]
    # A backend that the dispatcher has dropped has no entry in in_dims.
    return torch.stack([op(*sample, *args[len(columns) :]) for sample in zip(*columns, strict=True)]), 0
