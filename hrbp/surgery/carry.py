"""What users put on a layer goes with it when another module takes its place: hooks, attributes, the bias."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from blocksparse import BSRModule

from ..layers import master
from ..layers.stored import PLAIN

# Of every module: dicts of hooks by the number of their handle, which keeps a weak reference to the dict itself.
HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))
STATE_HOOKS = tuple(name for name in HOOKS if "state_dict" in name)
OWN = ("weight", "bias", "values", "index", "mask", "row_order")  # what the layers themselves hold
# Attributes of layers of stored blocks and of those with a master weight.
CONFIGURATION = ("weight_shape", "backend", "stride", "padding", "dilation", "relu", *master.CONFIGURATION)


def refuses(layer: nn.Module) -> str | None:
    """Why a plain layer cannot give up its place to one that stores blocks, or None: what would be lost or go wrong."""
    if "forward" in vars(layer):
        return "its forward was replaced"
    if any(vars(layer)[name] for name in STATE_HOOKS):
        return "a hook reads or writes its state_dict"
    weight: Any = layer._parameters.get("weight")
    if weight is not None and (weight._backward_hooks or weight._post_accumulate_grad_hooks):
        return "a hook is on its weight"
    own = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    if clash := sorted(own & {*OWN, "indptr", "indices", "weight_shape"}):
        return f"it holds {clash[0]!r} already"
    return None


def carry(old: Any, new: Any, *, replaces: bool = True) -> None:
    """Give `new`, made from `old`, what users put on `old`; `replaces`: it takes the place of `old`, which goes.

    Hooks (forward, forward pre, backward, backward pre, state_dict) move in their own dicts, so that handles that users
    hold still remove them; those of this package, which are about the old module, are dropped. Attributes, buffers,
    parameters and modules that are not a layer's own move as they are, and so does the bias, as the same Parameter.
    Attributes of the weight move to the stored blocks, or back. A weight that was in channels_last is so again when
    blocks become a plain layer. Where `old` stays, hooks other than those of its state_dict, and the bias, are copied.
    """
    for name in HOOKS if replaces else [name for name in HOOKS if name not in STATE_HOOKS]:
        hooks = vars(old)[name] if replaces else vars(old)[name].copy()
        for key in [key for key, hook in hooks.items() if _ours(hook)]:
            del hooks[key]
        for hook in hooks.values():
            if isinstance(hook, _WrappedHook) and hook.with_module and hook.module() is old:
                hook.module = weakref.ref(new)
        hooks.update(vars(new)[name])
        new.__dict__[name] = hooks
    new.__dict__["_is_full_backward_hook"] = old._is_full_backward_hook
    stored, stores = (isinstance(module, BSRModule) for module in (old, new))
    brought = old.__dict__.get("_hrbp_brought", ())
    for name, value in vars(old).items():
        internal = stored and name.startswith("_") and name not in brought
        internal = (
            internal or (type(old) not in PLAIN and name in CONFIGURATION) or (name == "forward" and _ours(value))
        )
        if name not in vars(new) and not internal and name not in (*DENSE, "_hrbp_brought", "_compiled_call_impl"):
            new.__dict__[name] = value
    for kind in ("_parameters", "_buffers", "_modules"):
        vars(new)[kind].update({name: item for name, item in vars(old)[kind].items() if name not in OWN})
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set - set(OWN)
    if old.bias is not None and replaces:
        new._parameters["bias"] = old.bias
    weight, made = (module.values if has else module.weight for module, has in ((old, stored), (new, stores)))
    made.__dict__.update(weight.__dict__)
    if stored and old.__dict__.get("_hrbp_channels_last", False):
        made.data = made.data.to(memory_format=torch.channels_last)
    if stores:
        new._hrbp_brought = {name for name in vars(new) if name.startswith("_") and name in vars(old)}
        new._hrbp_channels_last = _channels_last(weight)


# Attributes of plain layers, which a module that stores blocks has no use for.
DENSE = tuple({*vars(nn.Conv2d(1, 1, 1, device="meta")), *vars(nn.Linear(1, 1, device="meta"))})


def _ours(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == __name__.partition(".")[0]


def _channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.stride(1) == 1 and weight.shape[1] > 1 and not weight.is_contiguous()


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever the model holds `old`, with what users put on that."""
    carry(old, new)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
