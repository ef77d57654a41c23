"""The gradient of every weight of a layer, of those that are not stored, too: what RigL grows by.

A layer that is watched runs as ever, and its output gets one more node of the autograd graph, which on the way back
makes the dense gradient of the layer's input and the gradient of its output. Being a part of the graph, it holds where
the output is changed in place, a layer runs twice or under activation checkpointing, and for any loop. A watched layer
has another `forward`: torch.compile looks at that, compiles the model once more, and keeps both.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blocksparse import symmetric_padding

from ..layers.gradients import dense_gradient, with_dense_gradient
from ..layers.view import SparseLayer


class DenseGradients:
    """Adds up dL/dW [K, C, R, S] of layers over all backward passes, from now on until `close`.

    A layer has one watcher: a new one takes over. It ends with this object at the latest. Copies of the model that are
    made meanwhile are not watched.
    """

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        self._layers = dict(layers)
        self._sums = {name: _Sum(layer) for name, layer in layers.items()}
        modules = [layer.module for layer in layers.values()]
        for module, total in zip(modules, self._sums.values(), strict=True):
            _watch(module, total)
        self._end = weakref.finalize(self, _unwatch, modules, list(self._sums.values()))
        self._end.atexit = False

    def close(self) -> None:
        """Let the layers run as before."""
        self._end()

    def sums(self) -> dict[str, Tensor]:
        """layer -> dL/dW [K, C, R, S], float32 at least, of the layers that took part in a backward pass."""
        found = {name: total.value() for name, total in self._sums.items()}
        return {name: t.view(self._layers[name].shape) for name, t in found.items() if t is not None}


class _Sum:
    """What becomes of the dense gradients of one layer. A copy of the layer gets None instead."""

    def __init__(self, layer: SparseLayer) -> None:
        module, self.shape, self.conv = layer.module, layer.dense_shape, None
        if hasattr(module, "stride"):
            self.conv = module.stride, symmetric_padding(module), module.dilation, module.groups
        dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
        zero = torch.zeros((), dtype=dtype, device=layer.parameter.device)
        self.leaf = zero.expand(self.shape).requires_grad_()  # whose gradient compiled code adds to; it has no memory
        self.total: Tensor | None = None

    def add(self, grad: Tensor) -> None:
        grad = grad.to(self.leaf.dtype)
        self.total = grad if self.total is None else self.total.add_(grad)

    def value(self) -> Tensor | None:
        parts = [part for part in (self.total, self.leaf.grad) if part is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class _Summed(torch.autograd.Function):
    """y as it is; on the way back the dense gradient is added up, by torch.autograd.grad, too, as it needs no leaf."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, total: _Sum) -> Tensor:
        ctx.save_for_backward(x)
        ctx.total = total
        return y.detach()  # not a view for autograd, so that it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.total.add(dense_gradient(x, dy, ctx.total.shape, ctx.total.conv))
        return dy, None, None


def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a watched layer."""
    inner, total = self._unwatched_forward, self._dense_sum
    y = type(self).forward(self, *args, **kwargs) if inner is None else inner(*args, **kwargs)
    if total is None or not torch.is_grad_enabled():
        return y
    x = (*args, *kwargs.values())[0]
    if torch.compiler.is_compiling():
        return with_dense_gradient(y, x, total.leaf, total.conv)
    return _Summed.apply(y, x.detach(), total)


def _watch(module: nn.Module, total: _Sum) -> None:
    own = module.__dict__.get("forward")  # one that somebody gave this module alone
    if getattr(own, "__func__", None) is not forward:
        module.__dict__["_unwatched_forward"] = own
        module.__dict__["forward"] = types.MethodType(forward, module)
    module.__dict__["_dense_sum"] = total


def _unwatch(modules: list[nn.Module], totals: list[_Sum]) -> None:
    for module, total in zip(modules, totals, strict=True):
        if module.__dict__.get("_dense_sum") is total:
            del module.__dict__["_dense_sum"]
            own = module.__dict__.pop("_unwatched_forward")
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
