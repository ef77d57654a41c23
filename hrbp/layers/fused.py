"""The modules that `fuse` makes: convolutions that add a residual, and the network's graph."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from blocksparse import BSRConv2d, ConvGeometry, conv2d


class FusedConv2d(BSRConv2d):
    """BSRConv2d with the sum that followed it in a network: y = conv(x) + bias + residual, or the ReLU of that.

    A residual of y's shape and dtype is added before y leaves the cache. Others (one that is broadcast or of another
    dtype, a number) are added afterwards, by PyTorch's rules for sums.
    """

    @classmethod
    def of(cls, conv: BSRConv2d) -> FusedConv2d:
        """A module with the parameters and the pattern of `conv`."""
        made = cls(
            conv.pattern, conv.stride, conv.padding, conv.dilation, conv.bias is not None,
            relu=conv.relu, backend=conv.backend, device=conv.values.device, dtype=conv.values.dtype,
        )  # fmt: skip
        made._parameters.update(conv._parameters)
        return made.train(conv.training)

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        if residual is None or self._fits(input, residual):
            return super().forward(input, residual)
        conv = self.stride, self.padding, self.dilation
        y = conv2d(input, self.values, self.pattern, self.bias, *conv, backend=self.backend) + residual
        return y.relu() if self.relu else y

    def _fits(self, x: Tensor, residual: Any) -> bool:
        """Whether a residual is a tensor of the shape and dtype of the convolution's result."""
        if not isinstance(residual, Tensor) or x.dim() != 4:
            return False
        conv = self.stride, self.padding, self.dilation
        if tuple(residual.shape) != ConvGeometry.of(x.shape, self.weight_shape, *conv, "conv2d()").y_shape:
            return False
        device = x.device.type
        dtype = x.dtype
        if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return residual.dtype == dtype and residual.device == x.device


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
