"""Modules of a network whose activations are in batch_last, the images innermost in memory (blocksparse.layout).

Each computes what its parent does, in any format; in batch_last it works on a view that PyTorch has fast code for, and
returns batch_last. `hrbp.to_batch_last` changes the class of a module: its parameters, buffers and hooks stay.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import blocksparse as bs


def innermost(x: Any) -> bool:
    """Whether x [N, C, H, W] is dense in batch_last, and in no other format."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.is_contiguous():
        return False
    return x.permute(1, 2, 3, 0).is_contiguous()


class BatchLastNorm2d(nn.BatchNorm2d):
    """On the view [1, C, H, W*N]: the same numbers of each channel."""

    def forward(self, input: Tensor) -> Tensor:
        if not innermost(input):
            return super().forward(input)
        n, c, h, w = input.shape
        y = super().forward(input.permute(1, 2, 3, 0).reshape(1, c, h, w * n))
        return y.reshape(c, h, w, n).permute(3, 0, 1, 2)


def _turned(x: Tensor) -> Tensor:
    """[C, N, H, W] of [N, C, H, W], and back: what is batch_last on one side is channels_last on the other."""
    return x.permute(1, 0, 2, 3)


class BatchLastMaxPool2d(nn.MaxPool2d):
    """On the view [C, N, H, W], which is channels_last."""

    def forward(self, input: Tensor) -> Any:
        if not innermost(input):
            return super().forward(input)
        y = super().forward(_turned(input))
        return tuple(map(_turned, y)) if isinstance(y, tuple) else _turned(y)


class BatchLastAvgPool2d(nn.AvgPool2d):
    """On the view [C, N, H, W], which is channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        return _turned(super().forward(_turned(input))) if innermost(input) else super().forward(input)


class BatchLastAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """On the view [C, N, H, W], which is channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        return _turned(super().forward(_turned(input))) if innermost(input) else super().forward(input)


class BatchLastPointwise(nn.Conv2d):
    """A dense 1x1 convolution without padding: the matrix product of the weight [K, C] and [C, P*Q*N], no copies."""

    def forward(self, input: Tensor) -> Tensor:
        if not innermost(input):
            return super().forward(input)
        rows, columns = self.stride
        pixels = input[:, :, ::rows, ::columns].permute(1, 2, 3, 0)  # [C, P, Q, N]
        y = self.weight.flatten(1) @ pixels.flatten(1)
        y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None]
        return y.unflatten(1, tuple(pixels.shape[1:])).permute(3, 0, 1, 2)


# Modules of these very types change their class.
FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: BatchLastNorm2d,
    nn.MaxPool2d: BatchLastMaxPool2d,
    nn.AvgPool2d: BatchLastAvgPool2d,
    nn.AdaptiveAvgPool2d: BatchLastAdaptiveAvgPool2d,
}


def pointwise(layer: nn.Module) -> bool:
    """Whether a plain dense convolution is a matrix product over pixels."""
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.groups) == ((1, 1), 1)
        and layer.padding in ((0, 0), "valid", "same")
    )


def results_in_batch_last(module: nn.Module, args: Any, result: Any) -> Any:
    """A forward hook: of a dense convolution, which PyTorch computes in a format of its own."""
    return bs.to_batch_last(result) if isinstance(result, Tensor) and result.dim() == 4 else result


def inputs_in_batch_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward hook before a sparse convolution, for what comes in another format; most comes in batch_last."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 4 or innermost(args[0]):
        return None
    return bs.to_batch_last(args[0]), *args[1:]
