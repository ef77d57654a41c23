"""PyTorch's own convolution and its gradients, kept clear of what they get wrong.

Every product of this library that PyTorch's convolution computes goes through here. On a CPU that is oneDNN, of which
tens of thousands of random geometries against float64 found these mistakes (PyTorch 2.13, oneDNN 3.12):

- fprop in channels_last dies of a segmentation fault where an axis of y meets nothing but padding (float32 with a bias;
  bfloat16 with and without). Such a y is the bias, such gradients are zeros: nothing is left to convolve.
- wgrad of a strided 1x1 convolution without padding corrupts the heap in channels_last (few channels, several threads,
  a batch that they do not divide), and in bfloat16 reads beyond x. It is a convolution of stride 1 over the pixels
  that it reads, and runs as one: it reads less, too.
- fprop of one channel, strided along its rows, reads outside x in channels_last (float32): one channel, and groups of
  one channel each, are contiguous.
- float64 gradients refuse some channels_last tensors: these are computed contiguous.

On a GPU strided 1x1 convolutions stay as they are: their detour would cost passes over x and dx. There cuDNN computes
two-byte types in channels_last and turns contiguous tensors before and after: one contiguous image under a 1x1 kernel
is multiplied as it lies, a matrix. wgrad is not: its sums over pixels are long, and cuBLAS may split them and add the
parts in two bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import ConvGeometry
from ..layout import empty, format_of, is_channels_last

aten = torch.ops.aten


def dense_steps(g: ConvGeometry, device: torch.device) -> ConvGeometry:
    """On a CPU a strided 1x1 convolution without padding as one of stride 1 over the pixels that it reads; else g."""
    strided = device.type == "cpu" and g.pointwise and g.stride != (1, 1)
    return g.of_pixels_read() if strided else g


def pixels_read(x: Tensor, g: ConvGeometry) -> Tensor:
    """The pixels of x that dense_steps is about, a view: x itself unless that is another geometry."""
    if dense_steps(g, x.device) is g:
        return x
    return x[:, :, :: g.stride[0], :: g.stride[1]]


def by_matrices(like: Tensor, g: ConvGeometry, channels_last: bool) -> bool:
    """Whether fprop and dgrad are a product of matrices, for tensors of the device and dtype of `like`."""
    return like.is_cuda and like.element_size() == 2 and not channels_last and g.of_matrices


def works_in(channels_last: bool, like: Tensor, g: ConvGeometry) -> bool:
    """Whether to convolve in channels_last, for tensors of the device and dtype of `like`.

    On a CPU a strided 1x1 convolution with padding stays contiguous for safety.
    """
    safe = like.device.type != "cpu" or g.taps > 1 or dense_steps(g, like.device).stride == (1, 1)
    return channels_last and like.dtype != torch.float64 and g.c > g.groups and safe


def _laid_out(t: Tensor, channels_last: bool) -> Tensor:
    """t in this format, in its strides too: where sizes of one fit both formats, PyTorch goes by these."""
    (n, c, h, w), t = t.shape, t.contiguous(memory_format=format_of(channels_last))
    if channels_last:
        return t.permute(0, 2, 3, 1).flatten().view(n, h, w, c).permute(0, 3, 1, 2)
    return t.flatten().view(t.shape)


def _args(g: ConvGeometry) -> tuple[object, ...]:
    return list(g.stride), list(g.padding), list(g.dilation), False, [0, 0], g.groups


def bias_alone(shape: tuple[int, ...], like: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """y of a convolution that reads nothing."""
    y = empty(shape, like, channels_last)
    return y.zero_() if bias is None else y.copy_(bias.view(-1, 1, 1))


def fprop(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    """y [N, K, P, Q] in x's memory format.

    Args:
        x: [N, C, H, W]; K and C are those of these tensors, and g tells the rest.
        weight: [K, C/groups, R, S].
        bias: [K] or None.
    """
    last = is_channels_last(x)
    if g.only_padding:
        return bias_alone((x.shape[0], weight.shape[0], g.p, g.q), x, bias, last)
    if by_matrices(x, g, last):
        y = torch.mm(weight.flatten(1), x.reshape(x.shape[1], -1)).view(1, -1, g.p, g.q)
        return y if bias is None else y.add_(bias.view(-1, 1, 1))
    inner = works_in(last, x, g)
    x, weight = _laid_out(pixels_read(x, g), inner), _laid_out(weight, inner)
    return aten.convolution(x, weight, bias, *_args(dense_steps(g, x.device))).contiguous(memory_format=format_of(last))


def dgrad(dy: Tensor, weight: Tensor, g: ConvGeometry, channels_last: bool) -> Tensor:
    """dx [N, C, H, W], channels_last or contiguous; dy [N, K, P, Q], weight [K, C/groups, R, S]."""
    shape = (dy.shape[0], weight.shape[1] * g.groups, g.h, g.w)
    if g.only_padding:
        return empty(shape, dy, channels_last).zero_()
    if by_matrices(dy, g, channels_last):
        return torch.mm(weight.flatten(1).t(), dy.reshape(dy.shape[1], -1)).view(shape)
    steps, last = dense_steps(g, dy.device), works_in(channels_last, dy, g)
    dy, weight = _laid_out(dy, last), _laid_out(weight, last)
    like = empty((*shape[:2], steps.h, steps.w), dy, last)  # only its shape is read
    dx, _, _ = aten.convolution_backward(dy, like, weight, None, *_args(steps), [True, False, False])
    if steps is g:
        return dx.contiguous(memory_format=format_of(channels_last))
    whole = empty(shape, dy, channels_last).zero_()
    pixels_read(whole, g).copy_(dx)
    return whole


def wgrad(x: Tensor, dy: Tensor, g: ConvGeometry) -> Tensor:
    """dweight [K, C/groups, R, S], in x's memory format or contiguous; x [N, C, H, W], dy [N, K, P, Q]."""
    shape = (dy.shape[1], x.shape[1] // g.groups, g.r, g.s)
    last = works_in(is_channels_last(x), x, g)
    if g.only_padding:
        return empty(shape, x, last).zero_()
    x, dy = _laid_out(pixels_read(x, g), last), _laid_out(dy, last)
    like = empty(shape, x, last)  # only its shape is read
    args = (*_args(dense_steps(g, x.device)), [False, True, False])
    _, dweight, _ = aten.convolution_backward(dy, x, like, None, *args)
    return dweight
