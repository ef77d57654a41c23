"""What `layer.weight` is for a layer of stored blocks: the dense weight, for reading alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_T: Any = Tensor
# What only a parameter has, or what changes a tensor and is not counted in its `_version`.
REFUSED = (
    *(_T.register_hook, _T.register_post_accumulate_grad_hook, _T.requires_grad_, _T.retain_grad),
    *(_T.requires_grad.__set__, _T.data.__set__, _T.grad.__get__, _T.grad.__set__),
)
HOW = (
    "layer.weight is a dense copy of the stored blocks, for reading: {what} would not reach the layer. Its parameter is"
    " layer.values [nnzb, bk, bc], with layer.values.grad; layer.pattern.values_from_dense(weight) makes blocks of a"
    " dense weight, layer.pattern.to_dense(layer.values.grad) a dense gradient, and layer.to_dense() a dense layer"
)


class DenseWeight(Tensor):
    """The dense weight of a layer that stores blocks: a copy that cannot be written to.

    What is computed from it are ordinary tensors, differentiable with respect to the stored blocks. Views of it
    (`.data`, `.detach()`, `[...]`) cannot be written to either; a NumPy array of it is read-only. Writing would change
    the copy and not the layer: it raises a TypeError that says what to write to.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(func == refused for refused in REFUSED):
            owner = getattr(getattr(func, "__self__", None), "__name__", "")  # of an attribute
            raise TypeError(HOW.format(what=f".{owner}" if owner else f"{func.__name__}()"))
        mine = [t for t in (*args, *kwargs.values()) if isinstance(t, DenseWeight)]
        with torch._C.DisableTorchFunctionSubclass():
            before = [t._version for t in mine]
            result = func(*args, **kwargs)
            if before != [t._version for t in mine]:
                raise TypeError(HOW.format(what=f"{func.__name__}()"))
            return _guarded(result, mine)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)  # a file holds an ordinary tensor


def read_only(weight: Tensor) -> Tensor:
    """`weight` as a DenseWeight; tensors that transforms and compilers put in its place stay what they are."""
    if type(weight) is not Tensor or not torch._C._has_storage(weight) or torch.compiler.is_compiling():
        return weight
    return weight.as_subclass(DenseWeight)


def _guarded(result: Any, mine: Sequence[Tensor]) -> Any:
    """A result; what shares the memory of one of `mine` is for reading alone as well."""
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    elif type(result) in (tuple, list):
        return type(result)(_guarded(item, mine) for item in result)
    elif type(result) is Tensor and torch._C._has_storage(result):
        memory = result.untyped_storage()._cdata
        if any(t.untyped_storage()._cdata == memory for t in mine):
            return result.as_subclass(DenseWeight)
    return result
