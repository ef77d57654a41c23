"""BSRConv1d: a convolution along a line on stored blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bsr_conv import BSRConv
from .functional import apply_conv1d
from .geometry import line_pairs
from .pattern import BSRPattern, check_is_pattern


class BSRConv1d(BSRConv):
    """nn.Conv1d whose weight [K, C, S] is stored as the blocks of a BSRPattern of shape (K, C, 1, S).

    y = conv1d(x, values, pattern, bias, stride, padding, dilation, residual=residual, relu=relu) on x [N, C, L] or
    [C, L]; see blocksparse.conv1d, and BSRConv2d for the arguments and for what is stored, saved and loaded. A line is
    an image of height 1, a view of x. `in_channels`, `kernel_size` and the other sizes, and `weight` [K, C, S], a dense
    copy for reading, are those of the nn.Conv1d that computes the same.
    """

    plain = nn.Conv1d

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
        check_is_pattern(pattern, "BSRConv1d()")
        if pattern.shape[2] != 1:
            raise ValueError(f"BSRConv1d(): the pattern has shape {pattern.shape}; it needs (K, C, 1, S)")
        conv = line_pairs(stride, padding, dilation, "BSRConv1d()", pattern.shape)
        super().__init__(pattern, conv, bias, relu, backend, device, dtype)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        k, c, _, s = self.weight_shape
        return k, c, s

    def convolved(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        (stride,), (padding,), (dilation,) = self.stride, self.padding, self.dilation
        return apply_conv1d(
            input, self.values, self.index, self.bias,
            self.bank, (1, stride), (0, padding), (1, dilation), self.backend, residual, relu,
        )  # fmt: skip
