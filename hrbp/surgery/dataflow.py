"""Find the first and the last layers of a model: those that read its input, and those that give its output.

A layer is first where what it reads comes from the model's input through no other layer, and last where what it gives
reaches the model's output and feeds no other layer. So a network of two branches has two first layers, one of three
heads three last ones, and a sum that passes layers by (a residual) makes no layer first or last.

The flow is seen in a forward pass: of a batch where there is one; else of symbols (torch.fx's proxies), which stand
for tensors of no shape. Either pass runs on a stand-in, modules of the same parameters and of copied buffers and
attributes, without hooks: what a forward writes to its module stays in the stand-in. Random generators are restored.
"""

from __future__ import annotations

import inspect
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.overrides import TorchFunctionMode

FLOW, ORDER = "by data flow", "by order of registration"  # how the first and the last layers were found

_INPUT = -1  # the model's input among sources; the others are numbers of calls
_Sources = frozenset[int]
_HOOKS = [name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict) and "hooks" in name]
_NONE: _Sources = frozenset()


def ends(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any = None
) -> tuple[dict[str, str], dict[str, str]]:
    """The first and the last layers of a model: name -> how it was found, `FLOW` or `ORDER`.

    Args:
        model: any module. It stays as it is, and so do its buffers and the random generators.
        layers: those that count, by their names in `model`, in the order of registration; at least one.
        inputs: what the model is called with; None: the flow is followed with symbols.

    Where a model cannot be followed (what it does depends on values, for symbols on shapes, too) the first and the last
    one registered are taken.
    """
    calls = None if inputs is None else _attempt(lambda: _flow_of_tensors(model, layers, inputs))
    if calls is None or not calls.given:
        calls = _attempt(lambda: _flow_of_symbols(model, layers)) or calls
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    if calls is not None:
        found = calls.first(), calls.last()
        first, last = (tuple(name for name in layers if name in names) for names in found)
    names = list(layers)
    return (
        dict.fromkeys(first, FLOW) or {names[0]: ORDER},
        dict.fromkeys(last, FLOW) or {names[-1]: ORDER},
    )


@dataclass
class _Calls:
    """The calls of layers in a forward pass, in order: (layer, sources of what it read); `given`: of the output.

    Sources of a tensor: the calls it comes from through no other call, and _INPUT.
    """

    calls: list[tuple[str, _Sources]]
    given: _Sources = _NONE

    def add(self, name: str, read: _Sources) -> _Sources:
        """Note a call; the sources of what it gives."""
        self.calls.append((name, read))
        return frozenset((len(self.calls) - 1,))

    def first(self) -> set[str]:
        return {name for name, read in self.calls if read == {_INPUT}}

    def last(self) -> set[str]:
        fed = {at for name, read in self.calls for at in read if at != _INPUT and self.calls[at][0] != name}
        return {self.calls[at][0] for at in self.given - fed if at != _INPUT}


def _attempt(follow: Callable[[], _Calls]) -> _Calls | None:
    """What `follow` found; None where the model cannot be followed: a forward may raise anything then."""
    with quiet():
        try:
            return follow()
        except Exception:
            return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without gradients; the global random generators are restored."""
    numpy_state, state = np.random.get_state(), random.getstate()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad():
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(state)


# ---------------------------------------------------------------------- a stand-in


class _Uncompiled(nn.Module):
    """In the place of a compiled module."""

    _orig_mod: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def _stand_in(module: nn.Module) -> nn.Module:
    """Modules of the same classes and parameters, with copies of buffers and of attributes, and without hooks."""
    made: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, torch.jit.ScriptModule):
            return value
        if isinstance(value, nn.Module):
            return copied_module(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, copied(value.__self__))
        if type(value) in (list, set, deque):
            return type(value)(map(copied, value))
        if type(value) is tuple:
            return tuple(map(copied, value))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, copied(item)) for key, item in value.items())
        return value

    def copied_module(old: nn.Module) -> nn.Module:
        if id(old) not in made and "_orig_mod" in old._modules:
            made[id(old)] = _Uncompiled()
            made[id(old)]._orig_mod = copied(old._orig_mod)
        if id(old) not in made:
            graph = isinstance(old, GraphModule)  # its __new__ makes another class, without the forward
            new = made[id(old)] = object.__new__(type(old)) if graph else old.__new__(type(old))
            for name, value in vars(old).items():
                if name in _HOOKS:
                    kept: Any = OrderedDict()
                elif name == "_parameters":
                    kept = dict(value)
                elif name == "_buffers":
                    kept = {key: None if t is None else t.detach().clone() for key, t in value.items()}
                elif name == "_compiled_call_impl":
                    continue
                else:
                    kept = copied(value)
                new.__dict__[name] = kept
        return made[id(old)]

    return copied_module(module)


# ---------------------------------------------------------------------- a pass of tensors


class _Follow(TorchFunctionMode):
    """Every function gives its results the sources of its arguments."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if sources := _sources((args, kwargs)):
            _mark(args[0] if func is Tensor.__setitem__ else out, sources)
        return out


def _flow_of_tensors(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any) -> _Calls:
    calls, model = _Calls([]), _stand_in(model)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            _mark(out, calls.add(name, _sources((args, kwargs))))

        return hook

    for name in layers:
        model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
    reference = next(model.parameters())
    inputs = _moved(inputs, reference)
    _mark(inputs, frozenset((_INPUT,)))
    with _Follow():
        calls.given = _sources(model(inputs))
    return calls


def _moved(value: Any, like: Tensor) -> Any:
    """Tensors on the model's device, floating-point ones in its dtype; each one new, as it will be marked."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, Mapping):
        return {key: _moved(item, like) for key, item in value.items()}
    if isinstance(value, list | tuple):
        moved = [_moved(item, like) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def _tensors(value: Any) -> Iterator[Any]:
    """The tensors, or symbols, in a value."""
    if isinstance(value, Tensor | Proxy):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _sources(value: Any) -> _Sources:
    return _NONE.union(*(getattr(t, "_hrbp_sources", _NONE) for t in _tensors(value)))


def _mark(value: Any, sources: _Sources) -> None:
    for t in _tensors(value):
        t._hrbp_sources = sources


# ---------------------------------------------------------------------- a pass of symbols


def _flow_of_symbols(model: nn.Module, layers: Mapping[str, nn.Module]) -> _Calls:
    """Runs the forwards of modules with layers inside; those without, and PyTorch's own, are single steps."""
    model = _stand_in(model)
    tracer = GraphAppendingTracer(Graph())
    inside = {name[:at] for name in layers for at, char in enumerate(name) if char == "."}
    for name, module in model.named_modules():
        if name and (name not in inside or _opaque(module)):
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(f"{name} is a ScriptModule: symbols cannot pass it")
            module.__dict__["forward"] = _step(tracer, name)
    given = [p.node for p in _tensors(model.forward(*_arguments(model, tracer)))]

    calls, sources = _Calls([]), dict[Node, _Sources]()
    for node in tracer.graph.nodes:
        read = _NONE.union(*(sources[n] for n in node.all_input_nodes))
        if node.op == "placeholder":
            sources[node] = frozenset((_INPUT,))
        elif node.op == "call_module" and (node.target in layers or node.target in inside):
            sources[node] = calls.add(str(node.target), read)
        else:
            sources[node] = read
            if node.op == "call_method" and str(node.target).endswith("_") and isinstance(node.args[0], Node):
                sources[node.args[0]] = read  # written in place
    calls.given = _NONE.union(*(sources[node] for node in given))
    return calls


def _opaque(module: nn.Module) -> bool:
    """Whether it is PyTorch's own and more than a container: attention, a transformer, ..."""
    ours = type(module).__module__.partition(".")[0] == "torch"
    return ours and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _step(tracer: GraphAppendingTracer, name: str) -> Callable[..., Proxy]:
    def forward(*args: Any, **kwargs: Any) -> Proxy:
        return tracer.create_proxy("call_module", name, args, kwargs)

    return forward


def _arguments(model: nn.Module, tracer: GraphAppendingTracer) -> list[Proxy]:
    """A symbol for each argument that the forward needs."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in known if p.kind in kinds and p.default is p.empty]
    return [tracer.create_proxy("placeholder", name, (), {}) for name in needed or ["input"]]
