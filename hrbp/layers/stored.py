"""Make modules of stored blocks, and convert states in which such a layer has a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import BSRConv1d, BSRConv2d, BSRLinear, BSRModule, BSRPattern, bank_shape

# The kinds of layers that may become sparse, and what stores blocks in their place. master.py has a class for each that
# keeps a dense weight, surgery/folding.py the norms that may follow it.
STORED: dict[type[nn.Module], type[BSRConv2d] | type[BSRConv1d] | type[BSRLinear]] = {
    nn.Conv2d: BSRConv2d,
    nn.Conv1d: BSRConv1d,
    nn.Linear: BSRLinear,
}
PLAIN: tuple[Any, ...] = tuple(STORED)
NAMES = "Conv2d, Conv1d or Linear"  # in messages


def block_module(layer: Any, pattern: BSRPattern, backend: str | None) -> Any:
    """A module with the blocks of a plain layer; random generators stay as they are."""
    device = layer.weight.device
    made: Any = next(stored for plain, stored in STORED.items() if isinstance(layer, plain))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a module draws weights when it is made
        return made.from_dense(layer, pattern, backend=backend)


def was_masked(state: Mapping[str, Any], prefix: str, shape: tuple[int, ...]) -> bool:
    """Whether a state_dict holds this layer as a dense weight and a mask of single weights.

    So `hrbp.save` packs single weights, and so layers of single weights, n:m, vectors and kernels were saved before
    they were stored as blocks of (1, 1).
    """
    weight, mask = state.get(f"{prefix}weight"), state.get(f"{prefix}mask")
    if not isinstance(weight, Tensor) or not isinstance(mask, Tensor) or f"{prefix}row_order" in state:
        return False
    if weight.dim() not in (2, 3, 4):
        return False
    return bank_shape(weight.shape) == shape and mask.dtype == torch.bool and mask.shape == weight.shape


def pattern_of_mask(mask: Tensor) -> BSRPattern:
    """Of bool [K, C, R, S], [K, C, S] or [K, C]: single weights."""
    return BSRPattern.from_mask(mask.view(bank_shape(mask.shape)), (1, 1))


def take_masks(state: dict[str, Any], prefix: str, model: nn.Module) -> None:
    """Convert a state_dict before it is loaded: masked layers of single weights become stored ones."""
    for name, module in model.named_modules():
        if not isinstance(module, BSRModule) or tuple(module.values.shape[1:]) != (1, 1):
            continue
        own = f"{prefix}{name}." if name else prefix
        if was_masked(state, own, module.weight_shape):
            weight, pattern = state.pop(f"{own}weight"), pattern_of_mask(state.pop(f"{own}mask"))
            state[f"{own}values"] = pattern.values_from_dense(weight.detach().view(module.weight_shape))
            state[f"{own}indptr"], state[f"{own}indices"] = pattern.indptr, pattern.indices
