"""Let a network compute in batch_last, the images innermost in memory: hrbp.to_batch_last."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from blocksparse import BSRConv2d

from ..layers.batch_last import FORMS, BatchLastPointwise, inputs_in_batch_last, pointwise, results_in_batch_last
from ..layers.master import MasterConv2d
from ..layers.view import KINDS
from ..wrappers import copied, unwrapped
from .symbols import follow

Model = TypeVar("Model", bound=nn.Module)

# Modules that work on each number, whose results have the strides of their inputs, and those behind the last image.
ALIKE: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign,
    nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.Linear, nn.Flatten, nn.Softmax, nn.LogSoftmax,
)  # fmt: skip
# Functions of a forward that keep the strides, read sizes, or end images as vectors.
FUNCTIONS: tuple[Any, ...] = (
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, operator.neg,
    torch.add, torch.sub, torch.mul, torch.div, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.flatten,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.hardtanh, F.dropout,
    F.dropout2d, F.log_softmax, F.softmax, F.linear, operator.getitem, getattr, operator.floordiv,
)  # fmt: skip
METHODS = (
    "add", "add_", "sub", "mul", "mul_", "div", "relu", "relu_", "sigmoid", "tanh", "clamp", "clamp_", "flatten",
    "size", "dim", "float", "half", "double", "to", "mean", "sum", "softmax", "log_softmax", "detach",
)  # fmt: skip


@dataclass
class BatchLast:
    """What `to_batch_last` did to a network.

    Attributes:
        forms: how many modules have a form of their own for batch_last, by the name of their class.
        sparse: sparse convolutions, which read and write it.
        copied: names of dense convolutions, whose results are copied into it; behind others than the first their
            inputs are copied, too.
        stayed: (name, why) of what has no form for it and returns another: results are the same, and are copied before
            the next sparse convolution.
    """

    forms: Counter[str] = field(default_factory=Counter)
    sparse: int = 0
    copied: list[str] = field(default_factory=list)
    stayed: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        forms = [f"{count} {name}" for name, count in self.forms.items()]
        lines = [f"batch_last: {', '.join([f'{self.sparse} sparse convolutions', *forms])}"]
        if self.copied:
            lines.append(f"dense convolutions, copied into it: {', '.join(self.copied)}")
        return "\n".join(lines + [f"{name}: {why}" for name, why in self.stayed])


def to_batch_last(model: Model) -> Model:
    """Let activations live in batch_last, the images innermost in memory; in place, returns the model.

        hrbp.to_batch_last(model)
        print(model.batch_last)                # what has a form for it, what is copied, and what has none

    Sparse convolutions read and write batch_last (blocksparse.to_batch_last). Behind the dense stem is one copy into
    it; ReLU, sums and dropout keep it. BatchNorm works on the view [1, C, H, W*N], pooling on [C, N, H, W], dense 1x1
    convolutions are matrix products over [C, H*W*N]: none of these copies. Other dense convolutions are PyTorch's, with
    a copy before and behind. Parameters, buffers, hooks and the state_dict stay; results are the same to rounding, in
    training and in eval mode, for inputs in any format. The random numbers of dropout fall on other elements.

    Call it last: after `sparsify`, `fuse`, `hrbp.load`. A second call changes nothing but what was added since.
    `densify` and `sparsify` of such a network leave the other layers as they are.

    Args:
        model: a network with convolutions on stored blocks. Wrappers (DistributedDataParallel, torch.compile,
            AveragedModel) are looked through.

    Raises:
        TypeError: the model is no nn.Module.
        ValueError: it has no convolution on stored blocks: batch_last would only cost copies.
    """
    who = "to_batch_last()"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is {type(model).__name__}; it needs an nn.Module")
    inner: Any = unwrapped(model)
    modules = dict(inner.named_modules())
    if not any(map(_on_blocks, modules.values())):
        raise ValueError(
            f"{who}: the model has no convolution on stored blocks, so that batch_last would only cost copies; call"
            " hrbp.sparsify(model, sparsity) first"
        )
    made = BatchLast(stayed=_functions(inner, who))
    for name, module in modules.items():
        _convert(name, module, made)
    inner.batch_last = made
    return model


def _on_blocks(module: Any) -> bool:
    """Whether it is a convolution that computes on stored blocks; with a master weight these are gathered from it."""
    return isinstance(module, BSRConv2d) or (isinstance(module, MasterConv2d) and module.rule is None)


def _convert(name: str, module: Any, made: BatchLast) -> None:
    kind = type(module)
    if _on_blocks(module):
        if inputs_in_batch_last not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(inputs_in_batch_last)
        made.sparse += 1
    elif kind in (*FORMS.values(), BatchLastPointwise):
        made.forms[kind.__name__] += 1
    elif "forward" in vars(module) and kind in FORMS:
        made.stayed.append((name, "its forward was replaced on this one object"))
    elif kind in FORMS or pointwise(module):
        module.__class__ = FORMS.get(kind, BatchLastPointwise)
        made.forms[type(module).__name__] += 1
    elif isinstance(module, nn.Conv2d):  # its subclasses with masks or dense master weights, too
        if results_in_batch_last not in module._forward_hooks.values():
            module.register_forward_hook(results_in_batch_last)
        made.copied.append(name)
    elif not list(module.children()) and not isinstance(module, (*ALIKE, *KINDS)):
        if kind.__module__.startswith("torch.nn.modules"):
            made.stayed.append((name, f"{kind.__name__} has no form for batch_last"))
        elif module._parameters or module._buffers:
            made.stayed.append((name, f"nobody knows what {kind.__name__}.forward returns"))


def _functions(model: nn.Module, who: str) -> list[tuple[str, str]]:
    """The functions that forwards call besides modules and that do not keep strides, as far as torch.fx follows."""
    try:
        graph, whole = follow(copied(model), who)
    except ValueError as error:
        return [("the model's forward", f"its functions are not known: {str(error).removeprefix(f'{who}: ')}")]
    found = [(name, f"its functions are not known: {why}") for name, why in whole.items() if why != "has a hook"]
    for node in graph.nodes:
        known = {"call_function": FUNCTIONS, "call_method": METHODS}.get(node.op)
        if known is not None and node.target not in known:
            found.append((_place(node), f"{_spoken(node.target)} may return another format"))
    return found


def _spoken(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _place(node: Node) -> str:
    inside = list(node.meta.get("nn_module_stack", {}).values())
    return f"{node.name} in {inside[-1][0]}" if inside and inside[-1][0] else str(node.name)
