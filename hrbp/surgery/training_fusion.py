"""Fuse BatchNorm with the residual sum and the ReLU behind it, in training."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.batch_last import BatchLastNorm2d
from ..layers.fused_norm import FusedNorm
from ..wrappers import unwrapped
from .fusion import Fusion
from .network_graph import SUMS_IN_PLACE, NetworkGraph, name_of
from .symbols import CALL_HOOKS, PINNED, follow


def fuse_training(model: nn.Module) -> FusedTraining:
    """A wrapper of a model in which each BatchNorm2d runs together with the residual sum and the ReLU that follow it.

        fused = hrbp.fuse_training(model)       # the same parameters and statistics; `model` stays as it is
        loss = criterion(fused(x), target)      # everything else (Evolver, save, summary) takes `model` itself
        print(fused.fusion)                     # what was fused, and what stayed, and why

    y = max((conv - mean) / sqrt(var + eps) * weight + bias + residual, 0) is one operation, `blocksparse.batch_norm`,
    forward and backward, in training and in eval mode. Once convolutions are sparse, BatchNorm and ReLU take as long
    as they do: on a CPU, where there are kernels for it, contiguous and batch_last tensors are read and written once
    instead of up to six times; on a GPU, with Triton, forward and backward move a third fewer bytes. Under
    torch.compile PyTorch's own operators run, as without it. The norms of a network in batch_last are fused, too.

    What is followed is the model's graph (torch.fx). BatchNorms whose result others read, that have hooks or whose
    module symbols cannot follow run as they are.

    Args:
        model: any module, dense or sparse, before or during training. Wrap the result (DistributedDataParallel), not
            the argument. Optional arguments of the model's forward keep their default: other values are refused.

    Raises:
        ValueError: torch.fx cannot follow the model's own forward, or the model is wrapped or has hooks on itself.
    """
    if unwrapped(model) is not model:
        raise ValueError(
            f"fuse_training(): the model is a {type(model).__name__}; it needs the model inside, and may be wrapped"
            " afterwards"
        )
    return FusedTraining(model)


class FusedTraining(nn.Module):
    """A model with BatchNorm, residual sum and ReLU as one step; made by `fuse_training`.

    A wrapper as torch.compile's: the model is `_orig_mod`, and its attributes can be read here. The graph is that of
    the model as it is: it is made anew when a mode, a submodule, a parameter or buffer, a hook or a plain attribute of
    a module changes that the graph goes through. `fusion` tells what the last one fused.
    """

    MODES = 8  # graphs that are kept: those of training and evaluation, with some parts frozen or not

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model
        self._kept: list[tuple[Any, list[nn.Module], GraphModule, Fusion]] = []
        self._graph()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._graph()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_orig_mod":
                raise
            return getattr(self._orig_mod, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedTraining:
        return type(self)(copy.deepcopy(self._orig_mod, memo))

    def __reduce__(self) -> Any:
        return type(self), (self._orig_mod,)

    @property
    def fusion(self) -> Fusion:
        self._graph()
        return self._kept[0][3]

    def _graph(self) -> GraphModule:
        for i, (described, inner, made, _) in enumerate(self._kept):
            if described == _described(inner):
                self._kept.insert(0, self._kept.pop(i))
                return made
        model = self._orig_mod
        if any(vars(model)[kind] for kind in CALL_HOOKS):
            raise ValueError(
                f"fuse_training(): {type(model).__name__} has hooks on itself, which its graph would not call; it needs"
                " them on the fused model"
            )
        graph, whole = follow(model, "fuse_training()")
        leaves = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        inner = [m for name, m in model.named_modules() if not _within(name, leaves)]
        fuser = _Fuser(model, graph)
        fuser.run()
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and name not in leaves and (home := _within(name, leaves)):
                fuser.fusion.stayed.append((name, f"{home} stays as a whole: {whole.get(home, 'a module of its own')}"))
        made = GraphModule(fuser.parts(), graph, type(model).__name__)
        self._kept = [(_described(inner), inner, made, fuser.fusion), *self._kept[: self.MODES - 1]]
        return made


def _within(name: str, leaves: set[str]) -> str | None:
    """The leaf that a module is, or lies in."""
    parts = name.split(".")
    return next((home for i in range(len(parts)) if (home := ".".join(parts[: i + 1])) in leaves), None)


def _described(inner: list[nn.Module]) -> list[Any]:
    """All that a graph through these modules depends on."""
    found: list[Any] = []
    for module in inner:
        own = vars(module)
        found += module.training, [bool(own[kind]) for kind in CALL_HOOKS]
        found += [list(map(id, own[kind].values())) for kind in ("_modules", "_parameters", "_buffers")]
        found.append([(k, v) for k, v in own.items() if k[0] != "_" and isinstance(v, PINNED)])
    return found


class _Fuser(NetworkGraph):
    """Changes the graph: calls of FusedNorm take the place of norms and of what follows them."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__(model, graph)
        self.fusion = Fusion()

    def run(self) -> None:
        norms = [node for node in self.graph.nodes if self._is_norm(node, self._module(node))]
        for node in reversed(norms):  # of two norms that are summed the later one takes the sum: it need not move
            if (why := self._fuse(node)) is not None:
                self.fusion.stayed.append((name_of(node), why))
        self.fusion.stayed.reverse()
        self.graph.lint()

    def _fuse(self, node: Node) -> str | None:
        """Put a fused call in the place of a norm; or why it stays."""
        norm = self._module(node)
        if type(norm) not in (nn.BatchNorm2d, BatchLastNorm2d):
            return f"a {type(norm).__name__}"
        if len(node.args) != 1 or node.kwargs:
            return "it is called with other arguments than its input"
        if why := self._hooked(node):
            return why
        steps = [node]
        inputs: tuple[Any, ...] = node.args
        after = self._only_reader(node)
        if after is not None and self._is_sum(after, self._module(after)) and self._takes_sum(node, after):
            inputs = node.args[0], after.args[1] if after.args[0] is node else after.args[0]
            steps.append(after)
            after = self._only_reader(after)
        relu = after is not None and self._is_relu(after, self._module(after)) and self._plain_relu(after)
        name = f"fused_{self.fusion.norms}"
        self.modules[name] = FusedNorm(norm, relu)
        with self.graph.inserting_before(steps[-1]):
            made = self.graph.call_module(name, inputs)
        made.meta = node.meta.copy()
        self.fusion.sums += len(steps) == 2
        if relu:
            assert after is not None
            steps.append(after)
        steps[-1].replace_all_uses_with(made)
        for step in reversed(steps):
            self.graph.erase_node(step)
        self.fusion.norms += 1
        self.fusion.relus += relu
        return None

    def _only_reader(self, node: Node) -> Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _takes_sum(self, node: Node, after: Node) -> bool:
        """Whether a norm can be computed where its result is summed."""
        if after.target in SUMS_IN_PLACE and after.args[0] is not node:
            return False  # written into a tensor that others may read
        return self._of_two(after) and self._writes_between(node, after) is None

    def _plain_relu(self, node: Node) -> bool:
        return node.op != "call_module" or self._hooked(node) is None

    def parts(self) -> dict[str, Any]:
        """What the graph refers to."""
        found: dict[str, Any] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                found[str(node.target)] = self.modules[str(node.target)]
            elif node.op == "get_attr":
                found[str(node.target)] = operator.attrgetter(str(node.target))(self.model)
        return found
