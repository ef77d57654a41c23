"""The result of nn.Conv2d and nn.Conv1d, also where PyTorch's own convolution fails."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blocksparse import ConvGeometry, bank_shape, image_conv


def masked_conv(layer: nn.Conv2d | nn.Conv1d, x: Tensor, weight: Tensor) -> Tensor:
    """The result of nn.Conv2d or nn.Conv1d with this weight.

    It is computed contiguous where an axis of y meets only padding: on a CPU PyTorch's channels_last convolution
    crashes there.
    """
    if x.device.type != "cpu" or isinstance(layer.padding, str):
        return layer._conv_forward(x, weight, layer.bias)
    (h, w), (r, s) = (1, *x.shape[1 - weight.dim() :])[-2:], bank_shape(weight.shape)[2:]
    if not ConvGeometry(1, 1, h, w, 1, r, s, *image_conv(layer)).only_padding:
        return layer._conv_forward(x, weight, layer.bias)
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    y = layer._conv_forward(contiguous(x), contiguous(weight), layer.bias)
    return y.contiguous(memory_format=torch.channels_last) if last else y


def contiguous(t: Tensor) -> Tensor:
    """t, contiguous in its strides too: where sizes of one fit both formats, PyTorch goes by these."""
    return t.contiguous().flatten().view(t.shape)
