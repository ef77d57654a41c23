"""One interface to the sparse layers of a model, however they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import BSRModule, BSRPattern, bank_shape, optimizer_tensors

from ..structures.base import Selection
from ..wrappers import unwrapped
from .master import Master


def shape4(layer: Any) -> tuple[int, int, int, int]:
    """(K, C, R, S) of a plain layer's weight."""
    return bank_shape(layer.weight.shape)


def groups_of(layer: Any) -> int:
    """The groups of a layer; 1 where it is no convolution."""
    return getattr(layer, "groups", 1)


class SparseLayer:
    """One sparse layer, however it is stored: its mask, its weights, and how to change them.

    Attributes:
        name, module: as in the model's named_modules().
        master: whether it holds a dense weight and computes with a part of it; else it holds stored blocks alone.
    """

    master: bool

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.module.weight_shape

    @property
    def groups(self) -> int:
        """Of a convolution in groups, whose shape is (K, C/groups, R, S)."""
        return groups_of(self.module)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the plain layer's weight: [K, C, R, S], [K, C, S] or [K, C]."""
        return self.module.dense_shape

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer updates: the stored blocks, or the dense master weight."""
        raise NotImplementedError

    @property
    def blocksize(self) -> tuple[int, int] | None:
        """(bk, bc) of the stored blocks that it computes on; None: on a dense weight under a mask."""
        raise NotImplementedError

    def mask(self) -> Tensor:
        """bool [K, C, R, S], a copy."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """[K, C, R, S], zeros outside the mask, a copy."""
        raise NotImplementedError

    def pattern(self) -> BSRPattern:
        """The weights kept, in the structure's own blocks; a copy."""
        raise NotImplementedError

    def kept(self) -> int:
        """The number of weights that take part."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Bytes of the weights and of their index or mask, without the bias."""
        raise NotImplementedError

    def row_order(self) -> Tensor | None:
        """int [K], the filter that each row of the stored blocks is; None: row i is filter i."""
        return None if self.blocksize is None else self.module.pattern.row_order

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer, who: str) -> None:
        """Raise where `set` would go wrong: shared parameters, and optimizers whose state cannot be carried.

        Args:
            model: that this layer is of.
            optimizer: the one that updates it.
            who: the caller, for messages.

        Raises:
            ValueError: what is wrong, and what to do.
        """
        for name, module in unwrapped(model).named_modules():
            if module is not self.module and any(p is self.parameter for p in module._parameters.values()):
                raise ValueError(
                    f"{who}: {self.name} and {name} share a parameter, of which each would have another mask; give one"
                    " of them a copy, or leave both dense: sparsify(exclude=...)"
                )

    def set(self, selection: Selection, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Adopt a selection. Weights that stay keep their values and optimizer state; new ones start afresh.

        New weights are zero, and their optimizer state is what the optimizer starts with. A master weight and its
        optimizer state stay as they are. Returns True when all tensors kept their memory: as many blocks as before.

        Raises:
            ValueError: the selection does not fit, or the optimizer's state cannot follow; nothing has changed then.
        """
        raise NotImplementedError


class StoredLayer(SparseLayer):
    """Stored blocks and nothing else: a blocksparse.BSRModule."""

    master = False

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.values

    @property
    def blocksize(self) -> tuple[int, int]:
        bk, bc = self.parameter.shape[1:]
        return bk, bc

    def mask(self) -> Tensor:
        return self.module.pattern.to_mask()

    def weight(self) -> Tensor:
        return self.module.pattern.to_dense(self.module.values.detach())

    def pattern(self) -> BSRPattern:
        return self.module.pattern

    def kept(self) -> int:
        return self.parameter.numel()

    def bytes(self) -> int:
        return _bytes(self.parameter) + _bytes(self.module.index)

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer, who: str) -> None:
        super().check(model, optimizer, who)
        optimizer_tensors(optimizer, self.parameter, f"{who}: {self.name}")

    def set(self, selection: Selection, optimizer: torch.optim.Optimizer | None = None) -> bool:
        return self.module.set_pattern(selection.pattern(), optimizer)


class MasterLayer(SparseLayer):
    """A dense weight of which a part takes part: MasterConv2d and its like."""

    master = True

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight

    @property
    def blocksize(self) -> tuple[int, int] | None:
        return self.module.blocksize

    def mask(self) -> Tensor:
        return self.module.live()

    def weight(self) -> Tensor:
        return self.module.weight.detach().view(self.shape) * self.mask()

    def pattern(self) -> BSRPattern:
        return self.module.selection().pattern()

    def kept(self) -> int:
        return int(self.mask().sum())

    def bytes(self) -> int:
        return _bytes(self.parameter) + sum(map(_bytes, self.module.buffers(recurse=False)))

    def set(self, selection: Selection, optimizer: torch.optim.Optimizer | None = None) -> bool:
        return self.module.set_selection(selection)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


KINDS: dict[type[nn.Module], type[SparseLayer]] = {BSRModule: StoredLayer, Master: MasterLayer}


def as_sparse(module: nn.Module, name: str = "") -> SparseLayer | None:
    """The view of a sparse layer, None of any other module."""
    kind = next((view for kind, view in KINDS.items() if isinstance(module, kind)), None)
    return None if kind is None else kind(name, module)


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """name -> sparse layer, in the model's order."""
    views = (as_sparse(module, name) for name, module in unwrapped(model).named_modules())
    return {layer.name: layer for layer in views if layer is not None}
