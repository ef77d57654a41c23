"""Layers that compute with a dense weight under a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .dense_conv import masked_conv


class MaskedConv2d(nn.Conv2d):
    """nn.Conv2d under a mask: y = conv2d(x, weight * mask). The weight is zero outside the mask, and stays so."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return masked_conv(self, input, self.weight * self.mask)


class MaskedLinear(nn.Linear):
    """nn.Linear under a mask: y = x @ (weight * mask)^T. The weight is zero outside the mask, and stays so."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.mask, self.bias)


MASKED = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}


def put_mask(layer: Any, mask: Tensor) -> None:
    """Make a plain layer a masked one, in place; its weight stays the same Parameter."""
    with torch.inference_mode(False):  # a mask of its own, and one that can be trained under
        mask = mask.view(layer.weight.shape).to(layer.weight.device, copy=True)
    with torch.no_grad():
        layer.weight.mul_(mask)
    layer.__class__ = MASKED[type(layer)]
    layer.register_buffer("mask", mask)


def take_mask_off(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(layer.mask)  # optimizers that are not element-wise (Muon) move the others, too
    del layer.mask
    layer.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
