"""What fprop, dgrad and wgrad mean: the dense float64 oracle that every backend is held to.

Written from the definition, one tap at a time, and slow on purpose: nothing here shares code with a backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .geometry import ConvGeometry
from .pattern import BSRPattern


def _taps(g: ConvGeometry) -> Iterator[tuple[int, int, slice, slice]]:
    """(r, s, rows, cols): the slices of the padded input that tap (r, s) multiplies, one entry per output pixel."""
    for r in range(g.r):
        for s in range(g.s):
            top, left = r * g.dilation[0], s * g.dilation[1]
            rows = slice(top, top + (g.p - 1) * g.stride[0] + 1, g.stride[0])
            cols = slice(left, left + (g.q - 1) * g.stride[1] + 1, g.stride[1])
            yield r, s, rows, cols


def _all_channels(weight: Tensor, groups: int) -> Tensor:
    """[K, C, R, S] of a weight [K, C/groups, R, S]: the filters of group j read the j-th C/groups channels."""
    rows, (k, c, r, s) = weight.shape[0] // groups, weight.shape
    wide = weight.new_zeros((k, c * groups, r, s))
    for j in range(groups):
        wide[j * rows : (j + 1) * rows, j * c : (j + 1) * c] = weight[j * rows : (j + 1) * rows]
    return wide


def _padded(x: Tensor, g: ConvGeometry) -> Tensor:
    wide = x.new_zeros((g.n, g.c, g.h + 2 * g.padding[0], g.w + 2 * g.padding[1]))
    wide[:, :, g.padding[0] : g.padding[0] + g.h, g.padding[1] : g.padding[1] + g.w] = x
    return wide


def fprop(
    x: Tensor,
    values: Tensor,
    pattern: BSRPattern,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """y[n,k,p,q] = bias[k] + sum over c,r,s of x[n,c,p*stride+r*dilation-padding,...] * w[k,c,r,s]; float64 [N,K,P,Q].

    Equivalent to: F.conv2d(x.double(), pattern.to_dense(values.double()), bias, stride, padding, dilation, groups)
    """
    g = ConvGeometry.of(x.shape, pattern.bank, stride, padding, dilation, "reference.fprop()")
    weight, wide = pattern.to_dense(values.detach().double()), _padded(x.detach().double(), g)
    weight = _all_channels(weight, g.groups)
    y = wide.new_zeros(g.y_shape)
    for r, s, rows, cols in _taps(g):
        y += torch.einsum("ncpq,kc->nkpq", wide[:, :, rows, cols], weight[:, :, r, s])
    return y if bias is None else y + bias.detach().double().view(1, -1, 1, 1)


def dgrad(
    dy: Tensor,
    values: Tensor,
    pattern: BSRPattern,
    x_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The gradient of <dy, fprop(x)> in x: every product of fprop, scattered back; float64 [N,C,H,W]."""
    g = ConvGeometry.of(x_shape, pattern.bank, stride, padding, dilation, "reference.dgrad()")
    weight, dy = pattern.to_dense(values.detach().double()), dy.detach().double()
    weight = _all_channels(weight, g.groups)
    wide = _padded(dy.new_zeros(g.x_shape), g)
    for r, s, rows, cols in _taps(g):
        wide[:, :, rows, cols] += torch.einsum("nkpq,kc->ncpq", dy, weight[:, :, r, s])
    return wide[:, :, g.padding[0] : g.padding[0] + g.h, g.padding[1] : g.padding[1] + g.w].clone()


def wgrad(
    x: Tensor,
    dy: Tensor,
    pattern: BSRPattern,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The gradient of <dy, fprop(x)> in values: the dense one at the stored blocks; float64 [nnzb,bk,bc]."""
    g = ConvGeometry.of(x.shape, pattern.bank, stride, padding, dilation, "reference.wgrad()")
    wide, dy = _padded(x.detach().double(), g), dy.detach().double()
    dense = wide.new_zeros(g.weight_shape)
    for r, s, rows, cols in _taps(g):
        dense[:, :, r, s] = torch.einsum("nkpq,ncpq->kc", dy, wide[:, :, rows, cols])
    k, c = g.k // g.groups, g.c // g.groups
    squares = [dense[j * k : (j + 1) * k, j * c : (j + 1) * c] for j in range(g.groups)]
    return pattern.values_from_dense(torch.cat(squares))
