"""The calls of a network as a graph (torch.fx), as far as symbols in the place of tensors can follow its forward.

A module that symbols cannot follow is one step of the graph, as PyTorch's own modules are: the rest is followed. So
is a module with hooks, and one whose forward does something besides what it returns, which a graph would do once and
never again: it changes an attribute or a buffer, or draws a random number.
"""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer

from ..layers.batch_last import FORMS, BatchLastPointwise
from ..layers.view import KINDS
from .carry import HOOKS, STATE_HOOKS
from .dataflow import _stand_in, quiet
from .folding import expect_vectors

CALL_HOOKS = [name for name in HOOKS if name not in STATE_HOOKS]
RANDOM = "a random number"
CONSTANT = "_tensor_constant"  # what fx calls tensors that a forward makes of no symbol; it puts them on the model
PINNED = (bool, int, float, str, type(None))  # values of optional arguments that a graph can be made for


def follow(model: nn.Module, who: str) -> tuple[Graph, dict[str, str]]:
    """The graph of a model, and why some of its modules are single steps: name -> reason.

    Optional arguments of the model's forward have their default: the graph refuses other values.

    Raises:
        ValueError: the model's own forward cannot be followed.
    """
    if "forward" in vars(model):
        raise ValueError(
            f"{who}: the model's forward was replaced on this one object; symbols follow that of its class"
        )
    arguments = inspect.signature(model.forward).parameters
    defaults = {
        name: parameter.default
        for name, parameter in arguments.items()
        if parameter.default is not parameter.empty and isinstance(parameter.default, PINNED)
    }
    stand_in = _stand_in(model)  # what a forward does to its module stays in there
    tracer, before = _Follower(model), _state(stand_in)
    try:
        with quiet():
            graph = tracer.trace(stand_in, defaults)
            if effect := _effect(stand_in, before):
                raise _Effect(effect)
    except Exception as error:
        raise ValueError(
            f"{who}: torch.fx cannot follow {type(model).__name__}.forward: {_where(error)}. Move what it cannot follow"
            " into the forward of a module inside, which then stays as it is"
        ) from error
    for name, value in vars(stand_in).items():
        if name.startswith(CONSTANT):
            setattr(model, name, value)
    for node in graph.nodes:  # an argument with a default lost its name: x became x_1
        if node.op == "placeholder" and node.target not in arguments:
            node.target = str(node.target).rpartition("_")[0]
        node.type = None  # annotations may be text, which a file of the graph cannot have
    return graph, tracer.whole


class _Effect(Exception):
    """A forward has a side effect."""


class _Symbol(Proxy):
    """fx's Proxy, for which x += y is a change of x: with the original's it would be a new tensor."""


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Symbol, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
):
    setattr(_Symbol, f"__i{_name}__", _augmented(getattr(operator, f"__i{_name}__")))


class _Follower(Tracer):
    """fx's Tracer, for which every module that it cannot follow is a leaf."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__(autowrap_functions=(expect_vectors,))
        self.model = model  # that the stand-in is of, with its hooks; none where a graph is read from a file
        self.whole: dict[str, str] = {}

    def proxy(self, node: Node) -> Proxy:
        return _Symbol(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.whole
            or isinstance(m, (*KINDS, *FORMS.values(), BatchLastPointwise, torch.jit.ScriptModule))
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        assert self.model is not None
        if any(vars(self.model.get_submodule(name))[kind] for kind in CALL_HOOKS):
            self.whole[name] = "has a hook"
            return super().call_module(m, forward, args, kwargs)
        last, stack, before = next(iter(reversed(self.graph.nodes)), None), self.module_stack.copy(), _state(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if effect := _effect(m, before):
                raise _Effect(effect)
            return result
        except Exception as error:
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack = stack
            torch.set_rng_state(before[RANDOM])
            self.whole[name] = f"torch.fx cannot follow it: {_where(error)}"
            return super().call_module(m, forward, args, kwargs)


def _state(m: nn.Module) -> dict[str, Any]:
    """What a forward may change: attributes and their contents, buffers, the random generator."""
    state: dict[str, Any] = {}
    for name, value in vars(m).items():
        state[name] = value
        if type(value) in (list, dict, set):
            state[f"{name}: items"] = list(value.values() if isinstance(value, dict) else value)
    for name, buffer in m._buffers.items():
        if buffer is not None and not buffer.is_inference():
            state[f"{name}: version"] = buffer._version
    state[RANDOM] = torch.get_rng_state()
    return state


def _effect(m: nn.Module, before: dict[str, Any]) -> str:
    """What has changed since, in words, or nothing."""
    after = _state(m)
    for name in before.keys() | after.keys():
        if name.startswith(CONSTANT):
            continue
        if not _same(before.get(name), after.get(name)):
            what = "draws" if name == RANDOM else "changes"
            return f"its forward {what} {name.partition(':')[0]}"
    return ""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == torch.uint8 and torch.equal(a, b))  # generators' states are made anew
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, int) and a == b)


def _where(error: Exception) -> str:
    """The error, and the line of the model's own code that raised it."""
    said = " ".join(str(error).split()) or type(error).__name__
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and f"{torch.__path__[0]}/" not in frame.filename
    ]  # fmt: skip
    if isinstance(error, _Effect) or not frames:
        return said
    return f"{frames[-1].filename}:{frames[-1].lineno}, {frames[-1].line!r}: {said}"
