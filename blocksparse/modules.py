"""BSRConv2d, BSRLinear: modules whose parameters are the stored blocks only, and whose pattern may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bsr_module import BSRModule
from .carry import ordinary_tensors
from .functional import apply_linear, convolve
from .geometry import conv_pairs, named_padding
from .pattern import BSRPattern, check_is_pattern


class BSRConv2d(BSRModule):
    """nn.Conv2d whose filter bank is stored as the blocks of a BSRPattern.

    y = conv2d(x, values, pattern, bias, stride, padding, dilation, residual=residual, relu=relu); see
    blocksparse.conv2d. The residual is the second argument of a call, if there is one. `in_channels`, `out_channels`,
    `kernel_size`, `groups` and `weight`, a dense copy for reading, are those of the nn.Conv2d that computes the same.

    Parameters: `values` [nnzb, bk, bc] and `bias` [K]. Parameters, gradients and optimizer state exist for stored
    blocks only. The module owns a copy of the pattern's index (buffer `index`); its state_dict holds the pattern
    (`indptr`, `indices`, `row_order`, and the dense weight's shape, `weight_shape`) beside the values, and loads into a
    module with any other pattern of the same filter bank: `values` then takes the saved shape.

    Args:
        pattern: which blocks are stored.
        stride, padding, dilation: int or (height, width). The padding may be "valid" (0), or "same" where that is the
            same on both sides: `padding` then is what it comes to.
        bias: add a learnable bias [K].
        relu: negative results become zero.
        backend: as in blocksparse.conv2d.
        device: default: the pattern's.
        dtype: default: torch's.
    """

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
        super().__init__(pattern, bias, backend, device, dtype)
        conv = conv_pairs(stride, padding, dilation, "BSRConv2d()", pattern.shape)
        self.stride, self.padding, self.dilation = conv
        self.relu = relu

    # What tools read of an nn.Conv2d.
    groups, transposed, padding_mode, output_padding = 1, False, "zeros", (0, 0)

    @property
    def in_channels(self) -> int:
        return self.weight_shape[1]

    @property
    def out_channels(self) -> int:
        return self.weight_shape[0]

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.weight_shape[2:]

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, pattern: BSRPattern, *, backend: str | None = None) -> BSRConv2d:
        """The stored blocks of `conv` (weights outside the pattern are dropped), on its device and in its dtype.

        Raises ValueError for groups > 1, padding modes other than zeros, and 'same' padding that is not symmetric.
        """
        who = "BSRConv2d.from_dense()"
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{who}: conv is {type(conv).__name__}; it needs an nn.Conv2d")
        check_is_pattern(pattern, who)
        if conv.groups != 1:
            raise ValueError(
                f"{who}: conv has groups={conv.groups}; it needs groups=1 (a grouped convolution is a block-diagonal"
                " pattern over the whole filter bank: build that filter bank first)"
            )
        if conv.padding_mode != "zeros":
            raise ValueError(f"{who}: conv has padding_mode={conv.padding_mode!r}; only 'zeros' is supported")
        module = cls(
            pattern, conv.stride, symmetric_padding(conv, who), conv.dilation, conv.bias is not None,
            backend=backend, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        _copy_dense(module, conv, pattern, conv.weight)
        return module

    def to_dense(self) -> nn.Conv2d:
        """An nn.Conv2d that computes the same, with zeros outside the pattern; ValueError with relu=True."""
        if self.relu:
            raise ValueError("BSRConv2d.to_dense(): relu is True; an nn.Conv2d has none. Set module.relu to False")
        k, c, r, s = self.weight_shape
        with ordinary_tensors(self.values):
            conv = nn.Conv2d(
                c, k, (r, s), self.stride, self.padding, self.dilation, bias=self.bias is not None,
                device=self.values.device, dtype=self.values.dtype,
            )  # fmt: skip
        return _fill_dense(conv, self, self.pattern.to_dense(self.values.detach()))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return convolve(
            input, self.values, self.index, self.bias,
            self.weight_shape, self.stride, self.padding, self.dilation, self.backend, residual, self.relu,
        )  # fmt: skip

    def extra_repr(self) -> str:
        k, c, r, s = self.weight_shape
        return (
            f"{c}, {k}, kernel_size=({r}, {s}), stride={self.stride}, padding={self.padding},"
            f" dilation={self.dilation}, {self._describe()}{', relu' if self.relu else ''}"
        )


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
        if pattern.shape[2:] != (1, 1):
            raise ValueError(f"BSRLinear(): the pattern has shape {pattern.shape}; it needs (K, C, 1, 1)")
        super().__init__(pattern, bias, backend, device, dtype)

    @property
    def in_features(self) -> int:
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[0]

    def _dense_weight(self) -> Tensor:
        return super()._dense_weight()[:, :, 0, 0]

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
        _copy_dense(module, linear, pattern, linear.weight[:, :, None, None])
        return module

    def to_dense(self) -> nn.Linear:
        """An nn.Linear that computes the same, with zeros outside the pattern."""
        k, c = self.weight_shape[:2]
        with ordinary_tensors(self.values):
            linear = nn.Linear(c, k, bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype)
        return _fill_dense(linear, self, self.pattern.to_dense(self.values.detach())[:, :, 0, 0])

    def forward(self, input: Tensor) -> Tensor:
        return apply_linear(input, self.values, self.index, self.bias, self.weight_shape, self.backend)

    def extra_repr(self) -> str:
        k, c = self.weight_shape[:2]
        return f"{c}, {k}, {self._describe()}"


def _copy_dense(module: BSRModule, dense: nn.Conv2d | nn.Linear, pattern: BSRPattern, weight: Tensor) -> None:
    with torch.no_grad():
        module.values.copy_(pattern.to(weight.device).values_from_dense(weight))
        if module.bias is not None and dense.bias is not None:
            module.bias.copy_(dense.bias)
            module.bias.requires_grad_(dense.bias.requires_grad)
    module.values.requires_grad_(dense.weight.requires_grad)
    module.train(dense.training)


def _fill_dense(dense: Any, module: BSRModule, weight: Tensor) -> Any:
    with torch.no_grad():
        dense.weight.copy_(weight)
        if module.bias is not None:
            dense.bias.copy_(module.bias)
            dense.bias.requires_grad_(module.bias.requires_grad)
    dense.weight.requires_grad_(module.values.requires_grad)
    return dense.train(module.training)


def symmetric_padding(conv: nn.Conv2d, who: str = "symmetric_padding()") -> tuple[int, ...]:
    """conv.padding in numbers; ValueError where 'same' pads one cell more at the end."""
    if isinstance(conv.padding, str):
        return named_padding(conv.padding, conv.kernel_size, conv.dilation, who)
    return tuple(int(p) for p in conv.padding)
