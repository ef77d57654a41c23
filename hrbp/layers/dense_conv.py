"""What nn.Conv2d computes, where PyTorch's own convolution goes wrong or reads its padding in words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blocksparse import ConvGeometry


def masked_conv(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """What nn.Conv2d computes with this weight.

    It is computed contiguous where an axis of y meets only padding: on a CPU PyTorch's channels_last convolution
    crashes there.
    """
    if x.device.type != "cpu" or isinstance(layer.padding, str):
        return layer._conv_forward(x, weight, layer.bias)
    (h, w), (r, s), conv = x.shape[-2:], weight.shape[-2:], (layer.stride, layer.padding, layer.dilation)
    if not ConvGeometry(1, 1, h, w, 1, r, s, *conv).only_padding:  # type: ignore[arg-type]
        return layer._conv_forward(x, weight, layer.bias)
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    y = layer._conv_forward(contiguous(x), contiguous(weight), layer.bias)
    return y.contiguous(memory_format=torch.channels_last) if last else y


def contiguous(t: Tensor) -> Tensor:
    """t, contiguous in its strides too: where sizes of one fit both formats, PyTorch goes by these."""
    return t.contiguous().flatten().view(t.shape)


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    """conv.padding in numbers, of a layer whose padding is symmetric."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return tuple(int(p) for p in conv.padding)
