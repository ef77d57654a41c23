"""When a layer holds stored blocks and nothing else, and which module does."""

from __future__ import annotations

import math

from torch import nn

from blocksparse import BSRConv2d, BSRLinear, BSRPattern

from ..structures.base import Choice

LEAST_BLOCK = 2  # weights of a block: for single ones the index (16 bytes a block) is four times what they take


def has_blocks(choice: Choice) -> bool:
    """Whether a choice is stored as blocks, rather than as a mask over a dense weight."""
    return choice.blocksize is not None and math.prod(choice.blocksize) >= LEAST_BLOCK


def block_module(layer: nn.Conv2d | nn.Linear, pattern: BSRPattern, backend: str | None) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return BSRConv2d.from_dense(layer, pattern, backend=backend)
    return BSRLinear.from_dense(layer, pattern, backend=backend)
