"""The modules that `fuse` makes: convolutions that add a residual, and the network's graph."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from blocksparse import BSRConv1d, BSRConv2d, ConvGeometry, image_conv


class Fused:
    """A convolution on stored blocks with the sum that followed it in a network: y = conv(x) + bias + residual.

    Or the ReLU of that. A residual of y's shape and dtype is added before y leaves the cache. Others (one that is
    broadcast or of another dtype, a number) are added afterwards, by PyTorch's rules for sums.
    """

    @staticmethod
    def of(conv: Any) -> Any:
        """A module with the parameters and the pattern of `conv`."""
        kind = FusedConv2d if isinstance(conv, BSRConv2d) else FusedConv1d
        made = kind(
            conv.pattern, conv.stride, conv.padding, conv.dilation, conv.bias is not None,
            relu=conv.relu, backend=conv.backend, device=conv.values.device, dtype=conv.values.dtype,
        )  # fmt: skip
        made._parameters.update(conv._parameters)
        return made.train(conv.training)

    def forward(self: Any, input: Tensor, residual: Any = None) -> Tensor:
        if residual is None or self._fits(input, residual):
            return self.convolved(input, residual, self.relu)
        y = self.convolved(input, None, False) + residual
        return y.relu() if self.relu else y

    def _fits(self: Any, x: Tensor, residual: Any) -> bool:
        """Whether a residual is a tensor of the shape and dtype of the convolution's result."""
        axes = len(self.stride)
        if not isinstance(residual, Tensor) or x.dim() != 2 + axes:
            return False
        x_shape = (*x.shape[:2], *(1,) * (2 - axes), *x.shape[2:])  # of a line: an image of height 1
        y_shape = ConvGeometry.of(x_shape, self.bank, *image_conv(self), f"conv{axes}d()").y_shape
        if tuple(residual.shape) != (*y_shape[:2], *y_shape[-axes:]):
            return False
        device = x.device.type
        dtype = x.dtype
        if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return residual.dtype == dtype and residual.device == x.device


class FusedConv2d(Fused, BSRConv2d):
    """BSRConv2d with the sum that followed it."""


class FusedConv1d(Fused, BSRConv1d):
    """BSRConv1d with the sum that followed it."""


class FusedModel(GraphModule):
    """A network for inference, made by `hrbp.fuse`; print(model.fusion) says what was fused and what was not."""

    fusion: Any  # surgery.fusion.Fusion

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedModel:
        made: Any = super().__deepcopy__(memo)
        made.fusion = copy.deepcopy(self.fusion, memo)
        for name, value in vars(self).items():  # GraphModule gives up hooks
            if name.startswith("_forward") and isinstance(value, dict):
                made.__dict__[name] = copy.deepcopy(value, memo)
        return made
