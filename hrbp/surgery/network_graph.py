"""The graph of a network as those see it who change it: which module a step calls, and what a step may write."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.batch_last import FORMS, BatchLastPointwise, inputs_in_batch_last, results_in_batch_last
from ..layers.fused_norm import FusedNorm
from .folding import NORMS
from .symbols import CALL_HOOKS

RELUS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
SUMS_IN_PLACE: tuple[Any, ...] = (operator.iadd, "add_")
# Modules besides PyTorch's own that write nothing but their own statistics, and hooks that write nothing.
KNOWN = (*NORMS, *FORMS.values(), BatchLastPointwise, FusedNorm)
HARMLESS = (inputs_in_batch_last, results_in_batch_last)


class NetworkGraph:
    """A graph and the modules that it calls."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model, self.graph = model, graph
        self.modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))

    def _module(self, node: Node) -> Any:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _is_norm(self, node: Node, module: Any) -> bool:
        return isinstance(module, _BatchNorm)

    def _is_relu(self, node: Node, module: Any) -> bool:
        return type(module) is nn.ReLU or (node.op in ("call_function", "call_method") and node.target in RELUS)

    def _is_sum(self, node: Node, module: Any) -> bool:
        """Of two results, as far as can be seen: neither part is a number or belongs to the model."""
        summed = node.op in ("call_function", "call_method") and node.target in SUMS
        parts = [part for part in node.args[:2] if isinstance(part, Node) and part.op != "get_attr"]
        return summed and len(parts) == 2

    def _of_two(self, node: Node) -> bool:
        """Whether a sum is of two different results, and of nothing else."""
        return len(node.args) == 2 and not node.kwargs and node.args[0] is not node.args[1]

    def _writes_between(self, node: Node, later: Node) -> str | None:
        """The name of a step between these two that may change what the first one reads; None: it may run later."""
        at = node.next
        while at is not later:
            if writes := self._may_write(at):
                return writes
            at = at.next
        return None

    def _replace(self, node: Node, by: Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _hooked(self, node: Node) -> str | None:
        module = self._module(node)
        if any(vars(module)[kind] for kind in CALL_HOOKS):
            return f"{node.target} has a hook"
        if "forward" in vars(module):
            return f"the forward of {node.target} was replaced"
        return None

    def _may_write(self, node: Node) -> str | None:
        """The name of a step that may change a tensor that it did not make; None of those that are known not to."""
        target = node.target
        if node.op in ("get_attr", "placeholder") or target is getattr:
            return None
        if node.op == "call_module":
            module = self.modules[str(target)]
            known = type(module) in KNOWN or type(module).__module__.startswith("torch.nn.modules")
            if known and not any(getattr(m, "inplace", False) or _has_foreign_hooks(m) for m in module.modules()):
                return None
            return str(target)
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        home = "torch" if isinstance(target, str) else (getattr(target, "__module__", "") or "")
        pure = home.partition(".")[0] in ("torch", "_operator") and not (
            name.endswith("_") or name in ("setitem", "delitem") or (home == "_operator" and name.startswith("i"))
        )
        if pure and not node.kwargs.get("inplace") and "out" not in node.kwargs:
            return None
        return name_of(node)


def _has_foreign_hooks(module: nn.Module) -> bool:
    return any(hook not in HARMLESS for kind in CALL_HOOKS for hook in vars(module)[kind].values())


def name_of(node: Node) -> str:
    """The name of a graph node in messages."""
    if node.op == "call_module":
        return str(node.target)
    inside = list(node.meta.get("nn_module_stack", {}).values())
    return f"{node.name} in {inside[-1][0]}" if inside else node.name
