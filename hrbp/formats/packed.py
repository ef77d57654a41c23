"""Layers of single weights in a file: the weights that are kept, and a bit for each that might be.

Blocks of (1, 1) have an int32 of index each, 32 bits, where a bit for every weight of the layer tells the same. Before
single weights were stored as blocks, masked layers were written so, too: both are one format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocksparse import BSRPattern

PACKED = "masked"  # beside such a state_dict: the shapes of layers that are packed as kept weights and bits


def packs(pattern: BSRPattern) -> bool:
    """Whether a layer is written as kept weights and bits: single weights in order, of which indices take more."""
    single = pattern.blocksize == (1, 1) and pattern.row_order is None
    return single and _bit_bytes(pattern) < _table_bytes(pattern)


def file_index_bytes(pattern: BSRPattern) -> int:
    """Bytes that tell in a file which weights are stored."""
    return _bit_bytes(pattern) if packs(pattern) else _table_bytes(pattern)


def _bit_bytes(pattern: BSRPattern) -> int:
    return -(-math.prod(pattern.shape) // 8)


def _table_bytes(pattern: BSRPattern) -> int:
    """Of indptr, indices, row_order and weight_shape, int32."""
    k, moved = pattern.shape[0], pattern.row_order is not None
    return 4 * (k // pattern.blocksize[0] + 1 + pattern.nnzb + k * moved + 4)


def pack(state: Mapping[str, Tensor], layers: Mapping[str, tuple[BSRPattern, list[int]]]) -> dict[str, Tensor]:
    """A state_dict with some layers packed, names in their order.

    Args:
        state: of the model.
        layers: name -> (pattern, shape of the dense layer's weight), of those that `packs` says.
    """
    packed: dict[str, Tensor] = {}
    for key, t in state.items():
        name, _, part = key.rpartition(".")
        if name in layers and part == "values":
            pattern = layers[name][0]
            mask = pattern.to_mask()
            packed[f"{name}.weight"] = pattern.to_dense(t.detach())[mask]  # in the order of [K, C, R, S]
            packed[f"{name}.mask"] = torch.from_numpy(np.packbits(mask.cpu().numpy().ravel()))
        elif name not in layers or part not in ("indptr", "indices", "weight_shape"):
            packed[key] = t
    return packed


def unpack_masked(state: Mapping[str, Tensor], shapes: Any) -> dict[str, Tensor]:
    """The tensors with packed layers whole again: NAME.weight, zero outside the mask, and NAME.mask bool, of `shapes`.

    A layer of single weights loads these as it loads its blocks, see layers/stored.py.

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
