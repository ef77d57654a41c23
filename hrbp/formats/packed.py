"""Masked layers in a file: the weights that are kept, and a bit for each that might be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKED = "masked"  # beside such a state_dict: the shapes of layers that are packed as kept weights and bits


def pack_masked(state: dict[str, Tensor], name: str) -> list[int]:
    """Replace a layer's weight by what its mask keeps, in order, and its mask by bits; returns the weight's shape."""
    mask, weight = state[f"{name}.mask"].bool(), state[f"{name}.weight"]
    state[f"{name}.weight"] = weight[mask]
    state[f"{name}.mask"] = torch.from_numpy(np.packbits(mask.cpu().numpy().ravel()))
    return list(weight.shape)


def unpack_masked(state: Mapping[str, Tensor], shapes: Any) -> dict[str, Tensor]:
    """The tensors with packed layers whole again: NAME.weight, zero outside the mask, and NAME.mask bool, of `shapes`.

    Raises:
        ValueError: the file does not hold such layers.
    """
    state = dict(state)
    if not isinstance(shapes, Mapping):
        raise ValueError(f"the shapes of masked layers are a {type(shapes).__name__}; they need names and sizes")
    for name, shape in shapes.items():
        weight, bits = state.get(f"{name}.weight"), state.get(f"{name}.mask")
        whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        cells = math.prod(shape) if whole else 0
        if weight is None or bits is None or bits.dtype != torch.uint8 or bits.shape != (-(-cells // 8),):
            raise ValueError(f"masked layer {name!r} of shape {shape} has no weight, or no mask of a bit for each cell")
        flags = np.unpackbits(bits.cpu().numpy())
        mask = torch.from_numpy(flags[:cells].astype(bool)).view(shape)
        if flags[cells:].any() or weight.shape != (int(mask.sum()),):
            raise ValueError(f"masked layer {name!r} has {tuple(weight.shape)} weights and a mask of {int(mask.sum())}")
        state[f"{name}.weight"] = weight.new_zeros(shape).masked_scatter(mask, weight)
        state[f"{name}.mask"] = mask
    return state
