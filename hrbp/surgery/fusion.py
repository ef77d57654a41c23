"""Fuse BatchNorm, ReLU and residual sums into the convolutions before them, for inference."""

from __future__ import annotations

import copy
import operator
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm

from blocksparse import BSRConv1d, BSRConv2d, BSRLinear, BSRModule

from ..layers.fused import Fused, FusedModel
from ..wrappers import copied, unwrapped
from .carry import HOOKS, _ours
from .conversion import release
from .folding import NORMS, expect_vectors, folded_weights
from .network_graph import SUMS_IN_PLACE, NetworkGraph, name_of
from .symbols import follow

CONVS = (BSRConv2d, BSRConv1d)  # that add a residual and have a ReLU


@dataclass
class Fusion:
    """What `fuse` did to a network.

    norms, relus, sums: how many were folded or taken over. stayed: (name, why) of those that were not: BatchNorms by
    the name of the module, ReLUs and sums by that of the module or of the call in the graph and the module it is in.
    """

    norms: int = 0
    relus: int = 0
    sums: int = 0
    stayed: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = [_count(self.norms, "BatchNorm"), _count(self.relus, "ReLU"), _count(self.sums, "sum")]
        lines = [f"fused: {', '.join(counts)}"]
        reasons: dict[str, list[str]] = {}
        for name, why in self.stayed:
            reasons.setdefault(why, []).append(name)
        if reasons:
            lines.append(f"{len(self.stayed)} stayed:")
        lines += [f"  {', '.join(names)}: {why}" for why, names in reasons.items()]
        return "\n".join(lines)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def fuse(model: nn.Module) -> FusedModel:
    """A copy of a network for inference, in which what follows a convolution is a part of it.

        fused = hrbp.fuse(model.eval())
        print(fused.fusion)                     # what was fused, and what stayed, and why

    A BatchNorm that follows a convolution or linear layer is folded into its weights and bias:

        (conv(x) - mean) / sqrt(var + eps) * weight + bias = conv'(x), with weights * weight / sqrt(var + eps)

    and a convolution on stored blocks takes over the sum with a residual and the ReLU that follow it:
    y = max(conv(x) + bias + residual, 0), one pass through memory on the CPU's native backend.

    What is followed is the model's graph (torch.fx). Only what nothing else reads is fused, and a tensor that is
    changed in place and read by others has the same content as before. These stay as they are: modules that are called
    more than once or have two names, that have hooks or another forward; norms without running statistics or in
    training mode; ReLUs and sums after dense layers. A module whose forward torch.fx cannot follow stays as a whole.

    Args:
        model: any module in eval mode, on stored blocks or dense; it stays as it is. Wrappers
            (DistributedDataParallel, torch.compile, AveragedModel) are looked through. Dense master weights are
            released in the copy.

    Returns:
        A torch.fx.GraphModule that computes the same to rounding, without gradients of its parameters. `fusion` tells
        what was done. Modules keep their names. Optional arguments of the model's forward keep their default: other
        values are refused. It can be copied, compiled (torch.compile) and saved (torch.save); `hrbp.save` takes the
        model itself, to be fused when it was loaded. Its weights are not meant for training.

    Raises:
        ValueError: the model is in training mode or on the meta device, or torch.fx cannot follow its own forward: the
            message says where. The model is untouched.

    Equivalent to: torch.nn.utils.fusion.fuse_conv_bn_eval for dense pairs.
    """
    who = "fuse()"
    model = unwrapped(model)
    if model.training:
        raise ValueError(
            f"{who}: the model is in training mode, where BatchNorm has the statistics of each batch; it needs"
            " model.eval() first"
        )
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta:
            raise ValueError(f"{who}: {name} is on the meta device, where weights have no values")
    model = release(copied(model))
    for module in model.modules():
        _leave_training(module)
    graph, whole = follow(model, who)
    fuser = _Fuser(model, graph, whole)
    fuser.run()
    made = FusedModel(model, graph, type(model).__name__)
    made.fusion = fuser.fusion
    for name in HOOKS:  # those of users; the library's own belong to the model that was copied
        kept = {key: hook for key, hook in vars(model)[name].items() if not _ours(getattr(hook, "hook", hook))}
        made.__dict__[name] = OrderedDict(kept)
    return made.eval().requires_grad_(False)  # type: ignore[return-value]


def _leave_training(module: Any) -> None:
    """Remove from a copied module what only training needs: the forward of an Evolver."""
    own = vars(module).get("forward")
    if own is not None and _ours(own):
        del module.__dict__["forward"]
        if (inner := module.__dict__.pop("_unwatched_forward", None)) is not None:
            module.__dict__["forward"] = inner


@dataclass
class _Work:
    """What is fused into a convolution or linear layer."""

    node: Node
    module: Any
    norm: Any = None
    residual: bool = False
    relu: bool = False


class _Fuser(NetworkGraph):
    """Changes the graph, and puts changed layers into the model, which is a copy."""

    def __init__(self, model: nn.Module, graph: Graph, whole: dict[str, str]) -> None:
        super().__init__(model, graph)
        self.whole, self.fusion = whole, Fusion()
        self.names = Counter(id(module) for module in self.modules.values())
        self.calls: Counter[int] = Counter()
        self.read = set()  # parameters that the graph reads by themselves
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls.update({id(module) for module in self.modules[str(node.target)].modules()})
            elif node.op == "get_attr":
                self.read.add(id(operator.attrgetter(str(node.target))(model)))
        self.folded: set[int] = set()  # norms
        self.work: dict[Node, _Work] = {}
        for node in graph.nodes:
            if node.op == "call_module" and type(self.modules[str(node.target)]) in NORMS:
                self.work[node] = _Work(node, self.modules[str(node.target)])

    def run(self) -> None:
        """Norms first, then sums, then ReLUs: the order in which a convolution computes them."""
        for take, fits in ((self._norm, self._is_norm), (self._sum, self._is_sum), (self._relu, self._is_relu)):
            for node in list(self.graph.nodes):
                if fits(node, self._module(node)) and (why := take(node)) is not None:
                    self.fusion.stayed.append((name_of(node), why))
        self.fusion.stayed += self._hidden()
        for work in self.work.values():
            if work.norm is not None or work.residual or work.relu:
                self.model.set_submodule(str(work.node.target), _made(work))
        self.graph.lint()

    # ------------------------------------------------------------------ the three kinds; each returns why it stays

    def _norm(self, node: Node) -> str | None:
        norm, before = self._module(node), node.args[0] if node.args else None
        work = self.work.get(before) if isinstance(before, Node) else None
        if work is None:
            return "follows no convolution or linear layer of its own"
        kind = type(work.module)
        if type(norm) not in NORMS[kind]:
            return f"a {type(norm).__name__} after a {kind.__name__}"
        if why := self._apart(node) or self._apart(work.node) or self._busy(work, node):
            return why
        if norm.training:
            return "in training mode"
        if norm.running_mean is None or norm.running_var is None:
            return "it keeps no running statistics"
        if isinstance(work.module, CONVS) and work.module.relu:
            return f"{work.node.target} has a ReLU"
        folded = folded_weights(work.module, norm)
        if folded is None:
            return "its weights would pass the largest number of their dtype"
        work.norm = folded
        self.folded.add(id(norm))
        if isinstance(work.module, nn.Linear | BSRLinear):
            with self.graph.inserting_before(work.node):
                x = self.graph.call_function(expect_vectors, (work.node.args[0],))
            work.node.update_arg(0, x)
        self._replace(node, work.node)
        self.fusion.norms += 1
        return None

    def _sum(self, node: Node) -> str | None:
        if not self._of_two(node):
            return "not a sum of two tensors"
        why = "sums no result of a sparse convolution"
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        parts = [part for part in node.args if isinstance(part, Node)]
        for part in sorted(parts, key=lambda part: order[part], reverse=True):  # the later one need not move
            other = node.args[1] if part is node.args[0] else node.args[0]
            reason = self._sum_refuses(node, part)
            if reason is None:
                work = self.work.pop(part)
                with self.graph.inserting_before(node):
                    made = self.graph.call_module(str(part.target), (part.args[0], other))
                made.meta = part.meta.copy()
                self._replace(node, made)
                self.graph.erase_node(part)
                work.node, work.residual = made, True
                self.work[made] = work
                self.fusion.sums += 1
                return None
            if part in self.work:
                why = reason
        return why

    def _sum_refuses(self, node: Node, part: Node) -> str | None:
        """Why the convolution at `part` cannot take over a sum."""
        work = self.work.get(part)
        if work is None or not isinstance(work.module, CONVS):
            return "follows a dense layer"
        if node.target in SUMS_IN_PLACE and node.args[0] is not part:
            return "written into a tensor that others may read"
        if why := self._apart(part) or self._busy(work, node):
            return why
        if work.residual:
            return f"{part.target} has a sum already"
        if work.module.relu:
            return f"{part.target} has a ReLU before it"
        if writes := self._writes_between(part, node):  # the convolution must read at the sum what it read there
            return f"{part.target} would have to move behind {writes}, which may change what it reads"
        return None

    def _relu(self, node: Node) -> str | None:
        before = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        work = self.work.get(before) if isinstance(before, Node) else None
        if work is None:
            return "follows no convolution"
        if not isinstance(work.module, CONVS):
            return "follows a dense layer"
        if why := (self._hooked(node) if node.op == "call_module" else None) or self._apart(work.node):
            return why
        if len(work.node.users) > 1:
            return f"others read the result of {work.node.target}"
        if work.node.kwargs:
            return f"{work.node.target} is called with other arguments than its input"
        work.relu = True
        self._replace(node, work.node)
        self.fusion.relus += 1
        return None

    # ------------------------------------------------------------------ what stands in the way

    def _apart(self, node: Node) -> str | None:
        """Why a module must stay as it is."""
        module, name = self._module(node), str(node.target)
        if self.names[id(module)] > 1:
            return f"{name} has {self.names[id(module)]} names in the model"
        if self.calls[id(module)] > 1:
            return f"{name} is called {self.calls[id(module)]} times"
        if any(id(p) in self.read for p in (*module._parameters.values(), *module._buffers.values()) if p is not None):
            return f"the model reads parameters of {name} itself"
        main = "values" if isinstance(module, BSRModule) else "weight"
        if type(module) in NORMS and not _is_plain(module._parameters.get(main)):
            return f"{name}.{main} is no ordinary parameter"
        return self._hooked(node)

    def _busy(self, work: _Work, node: Node) -> str | None:
        """Why the call of a convolution cannot be given what `node` does."""
        if len(work.node.users) > 1:
            return f"others read the result of {work.node.target}"
        if len(work.node.args) != (2 if work.residual else 1) or work.node.kwargs:
            return f"{work.node.target} is called with other arguments than its input"
        return None

    def _hidden(self) -> Iterator[tuple[str, str]]:
        """The norms that the graph does not show, and why."""
        shown = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        for name, module in self.model.named_modules():
            if not isinstance(module, _BatchNorm) or name in shown or id(module) in self.folded:
                continue
            home = next((whole for whole in self.whole if name == whole or name.startswith(f"{whole}.")), None)
            if home is not None:
                yield name, f"{home} stays as a whole: {self.whole[home]}"
            else:
                yield name, "the graph does not call it"


# ---------------------------------------------------------------------- a layer and what it takes over


def _is_plain(parameter: Any) -> bool:
    return type(parameter) is nn.Parameter and parameter.is_floating_point()


def _made(work: _Work) -> nn.Module:
    """The fused layer, a new module: others may hold the old one."""
    made = copy.copy(work.module)
    made._parameters, made._buffers = made._parameters.copy(), made._buffers.copy()
    if work.norm is not None:
        main = "values" if isinstance(made, BSRModule) else "weight"
        for name, t in zip((main, "bias"), work.norm, strict=True):
            setattr(made, name, nn.Parameter(t, requires_grad=False))
    if work.relu:
        made.relu = True
    return Fused.of(made) if work.residual else made
