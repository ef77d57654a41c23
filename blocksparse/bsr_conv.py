"""What BSRConv2d and BSRConv1d share: sizes as tools read them, and the dense layer that computes the same."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .bsr_module import BSRModule
from .carry import ordinary_tensors
from .geometry import Pair, bank_shape, named_padding
from .pattern import BSRPattern, check_is_pattern

Layer = TypeVar("Layer", bound="BSRConv")


class BSRConv(BSRModule):
    """A convolution on stored blocks; `stride`, `padding` and `dilation` have a number for each axis.

    Attributes:
        plain: the class of the dense layer that computes the same.
        relu: negative results become zero.
    """

    plain: ClassVar[Any]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    relu: bool

    # What tools read of a dense layer.
    transposed, padding_mode = False, "zeros"

    def __init__(
        self,
        pattern: BSRPattern,
        conv: tuple[Pair, Pair, Pair],
        bias: bool,
        relu: bool,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(pattern, bias, backend, device, dtype)
        axes = len(self.kernel_size)
        self.stride, self.padding, self.dilation = (both[-axes:] for both in conv)
        self.relu = relu

    @property
    def groups(self) -> int:
        return self._groups

    @property
    def bank(self) -> tuple[int, ...]:
        """What the ops take as weight_shape."""
        return self.weight_shape if self._groups == 1 else (*self.weight_shape, self._groups)

    @property
    def in_channels(self) -> int:
        return self.weight_shape[1] * self._groups

    @property
    def out_channels(self) -> int:
        return self.weight_shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.dense_shape[2:]

    @property
    def output_padding(self) -> tuple[int, ...]:
        return (0,) * len(self.kernel_size)

    @classmethod
    def from_dense(cls: type[Layer], conv: Any, pattern: BSRPattern, *, backend: str | None = None) -> Layer:
        """The stored blocks of `conv` (weights outside the pattern are dropped), on its device and in its dtype.

        The pattern is that of its weight, [K, C/groups, ...]; the groups come from `conv`.

        Raises ValueError where a block would have filters of two groups, for padding modes other than zeros, and for
        'same' padding that is not symmetric.
        """
        who, name = f"{cls.__name__}.from_dense()", cls.plain.__name__
        if not isinstance(conv, cls.plain):
            raise TypeError(f"{who}: conv is {type(conv).__name__}; it needs an nn.{name}")
        check_is_pattern(pattern, who)
        if pattern.groups not in (1, conv.groups):
            raise ValueError(
                f"{who}: conv has groups={conv.groups} and the pattern {pattern.groups}; they need the same"
            )
        if pattern.shape != bank_shape(conv.weight.shape):
            needed = f"{bank_shape(conv.weight.shape)}, that of its weight"
            raise ValueError(f"{who}: the pattern has shape {pattern.shape}; conv needs {needed}")
        pattern = pattern.grouped(conv.groups)
        if conv.padding_mode != "zeros":
            raise ValueError(f"{who}: conv has padding_mode={conv.padding_mode!r}; only 'zeros' is supported")
        made: Any = cls
        module = made(
            pattern, conv.stride, symmetric_padding(conv, who), conv.dilation, conv.bias is not None,
            backend=backend, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        module._take(conv, pattern)
        return module

    def to_dense(self) -> Any:
        """A dense layer that computes the same, with zeros outside the pattern; ValueError with relu=True."""
        if self.relu:
            raise ValueError(
                f"{type(self).__name__}.to_dense(): relu is True; an nn.{self.plain.__name__} has none. Set"
                " module.relu to False"
            )
        with ordinary_tensors(self.values):
            conv = self.plain(
                self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
                self.groups, bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype,
            )  # fmt: skip
        return self._give(conv)

    def convolved(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        """relu(conv(input) + residual), either left out: `forward` with a ReLU of the caller's choice."""
        raise NotImplementedError

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.convolved(input, residual, self.relu)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding}, dilation={self.dilation},{f' groups={self.groups},' if self.groups > 1 else ''}"
            f" {self._describe()}{', relu' if self.relu else ''}"
        )


def image_conv(conv: Any) -> tuple[Pair, Pair, Pair]:
    """(stride, padding, dilation) of a convolution as it is on images: of one along a line their height is 1.

    conv: nn.Conv2d, nn.Conv1d, or a layer of this library that takes their place.
    """
    fill, given = 2 - len(conv.stride), (conv.stride, symmetric_padding(conv), conv.dilation)
    stride, padding, dilation = ((*(one,) * fill, *own) for one, own in zip((1, 0, 1), given, strict=True))
    return stride, padding, dilation


def symmetric_padding(conv: nn.Conv1d | nn.Conv2d, who: str = "symmetric_padding()") -> tuple[int, ...]:
    """conv.padding in numbers; ValueError where 'same' pads one cell more at the end."""
    if isinstance(conv.padding, str):
        return named_padding(conv.padding, conv.kernel_size, conv.dilation, who)
    return tuple(int(p) for p in conv.padding)
