"""BSRConv2d, BSRLinear: modules whose parameters are the stored blocks only, and whose pattern may change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bsr_conv import BSRConv, image_conv, symmetric_padding
from .bsr_module import BSRModule
from .carry import ordinary_tensors
from .functional import apply_linear, convolve
from .geometry import conv_pairs
from .pattern import BSRPattern, check_is_pattern

__all__ = ["BSRConv2d", "BSRLinear", "image_conv", "symmetric_padding"]


class BSRConv2d(BSRConv):
    """nn.Conv2d whose filter bank is stored as the blocks of a BSRPattern.

    y = conv2d(x, values, pattern, bias, stride, padding, dilation, residual=residual, relu=relu); see
    blocksparse.conv2d. The residual is the second argument of a call, if there is one. `in_channels`, `out_channels`,
    `kernel_size`, `groups` and `weight`, a dense copy for reading, are those of the nn.Conv2d that computes the same.

    Parameters: `values` [nnzb, bk, bc] and `bias` [K]. Parameters, gradients and optimizer state exist for stored
    blocks only. The module owns a copy of the pattern's index (buffer `index`); its state_dict holds the pattern
    (`indptr`, `indices`, `row_order`, and the dense weight's shape, `weight_shape`) beside the values, and loads into a
    module with any other pattern of the same filter bank: `values` then takes the saved shape.

    Args:
        pattern: which blocks are stored. Its groups (`pattern.grouped`) are those of the convolution; state_dict has
            `groups` then.
        stride, padding, dilation: int or (height, width). The padding may be "valid" (0), or "same" where that is the
            same on both sides: `padding` then is what it comes to.
        bias: add a learnable bias [K].
        relu: negative results become zero.
        backend: as in blocksparse.conv2d.
        device: default: the pattern's.
        dtype: default: torch's.
    """

    plain = nn.Conv2d

    def __init__(
        self,
        pattern: BSRPattern,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        *,
        relu: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_is_pattern(pattern, "BSRConv2d()")
        conv = conv_pairs(stride, padding, dilation, "BSRConv2d()", pattern.shape)
        super().__init__(pattern, conv, bias, relu, backend, device, dtype)

    def convolved(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        stride: tuple[int, int] = self.stride  # type: ignore[assignment]
        padding: tuple[int, int] = self.padding  # type: ignore[assignment]
        dilation: tuple[int, int] = self.dilation  # type: ignore[assignment]
        return convolve(
            input, self.values, self.index, self.bias,
            self.bank, stride, padding, dilation, self.backend, residual, relu,
        )  # fmt: skip


class BSRLinear(BSRModule):
    """nn.Linear whose weight [K, C] is stored as the blocks of a BSRPattern of shape (K, C, 1, 1).

    y = x @ W^T + bias on x [..., C]; see blocksparse.linear and BSRConv2d for what is stored, saved and loaded.
    """

    def __init__(
        self,
        pattern: BSRPattern,
        bias: bool = True,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_is_pattern(pattern, "BSRLinear()")
        if pattern.bank[2:] != (1, 1):
            in_groups = f" and {pattern.groups} groups" if pattern.groups > 1 else ""
            raise ValueError(f"BSRLinear(): the pattern has shape {pattern.shape}{in_groups}; it needs (K, C, 1, 1)")
        super().__init__(pattern, bias, backend, device, dtype)

    @property
    def in_features(self) -> int:
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[0]

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self.weight_shape[:2]

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: BSRPattern, *, backend: str | None = None) -> BSRLinear:
        """The stored blocks of `linear` (weights outside the pattern are dropped), on its device and in its dtype."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"BSRLinear.from_dense(): linear is {type(linear).__name__}; it needs an nn.Linear")
        check_is_pattern(pattern, "BSRLinear.from_dense()")
        module = cls(
            pattern, linear.bias is not None,
            backend=backend, device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        module._take(linear, pattern)
        return module

    def to_dense(self) -> nn.Linear:
        """An nn.Linear that computes the same, with zeros outside the pattern."""
        k, c = self.dense_shape
        with ordinary_tensors(self.values):
            linear = nn.Linear(c, k, bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype)
        return self._give(linear)

    def forward(self, input: Tensor) -> Tensor:
        return apply_linear(input, self.values, self.index, self.bias, self.weight_shape, self.backend)

    def extra_repr(self) -> str:
        k, c = self.dense_shape
        return f"{c}, {k}, {self._describe()}"
