"""One view of the sparse layers of a model, whichever way they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import BSRConv2d, BSRLinear, optimizer_tensors

from ..structures.base import Choice
from ..wrappers import unwrapped
from .master import MasterConv2d, MasterLinear

SPARSE = (BSRConv2d, BSRLinear, MasterConv2d, MasterLinear)


def shape4(layer: Any) -> tuple[int, int, int, int]:
    shape = list(layer.weight.shape)
    k, c, r, s = shape if len(shape) == 4 else [*shape, 1, 1]
    return k, c, r, s


class SparseLayer:
    """One sparse layer, whichever way it is stored: its mask, its weights, and a new choice of them.

    blocks: it holds stored blocks and nothing else. master: it holds a dense weight and computes with a part of it.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.blocks = isinstance(module, BSRConv2d | BSRLinear)
        self.master = isinstance(module, MasterConv2d | MasterLinear)

    @property
    def runs_blocks(self) -> bool:
        """Whether it computes on stored blocks, rather than on a dense weight under a mask."""
        return self.blocks or (self.master and self.module.blocksize is not None)

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer updates: the stored blocks, or the dense master weight."""
        return self.module.values if self.blocks else self.module.weight

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.module.weight_shape if self.blocks else shape4(self.module)

    def mask(self) -> Tensor:
        """bool [K, C, R, S], a copy."""
        return self.module.pattern.to_mask() if self.blocks else self.module.live()

    def weight(self) -> Tensor:
        """[K, C, R, S], zeros outside the mask, a copy."""
        if self.blocks:
            return self.module.pattern.to_dense(self.module.values.detach())
        return self.module.weight.detach().view(self.shape) * self.mask()

    def row_order(self) -> Tensor | None:
        """int [K], the filter that each row of the stored blocks is; None: row i is filter i."""
        return self.module.pattern.row_order if self.runs_blocks else None

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer, who: str) -> None:
        """Refuse what `set` could not keep right: shared parameters, and optimizers whose state cannot move along.

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
        if not self.master:
            optimizer_tensors(optimizer, self.parameter, f"{who}: {self.name}")

    def set(self, choice: Choice, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Keep what the choice keeps; weights and optimizer state that stay are carried, new ones start afresh.

        New weights are zero, and their optimizer state is what the optimizer starts with. A master weight and its
        optimizer state stay as they are. Returns True when all tensors kept their memory: as many blocks as before.

        Raises:
            ValueError: the choice does not fit, or the optimizer's state cannot follow; nothing has changed then.
        """
        return self.module.set_pattern(choice.pattern(), optimizer) if self.blocks else self.module.set_choice(choice)


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """name -> sparse layer, in the model's order."""
    return {
        name: SparseLayer(name, module)
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, SPARSE)
    }
