"""How far the masks of a model have come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..layers.view import SparseLayer


@dataclass(frozen=True)
class Update:
    """One change of the masks, or, where they follow the weights, what has changed since the last look.

    changed      layer -> share of the weights kept now that were not kept before
    reallocated  tensors have new memory: CUDA graphs and DistributedDataParallel made before must be made again
    sad          layer -> sum |E_now - E_before|: cells of the mask E that are not as they were at the update before, or
                 at the start (Zhou et al., ICLR 2021)
    drift        layer -> sum |E_now - E_start|
    """

    step: int
    changed: dict[str, float]
    reallocated: bool
    sad: dict[str, int]
    drift: dict[str, int]


class Drift:
    """The masks of layers as they were at first and at the last update, eight cells a byte."""

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        self.layers = layers
        self.first = self.last = self._bits()

    def update(self, step: int, reallocated: bool) -> Update:
        """What has become of the masks since the last time."""
        before, self.last = self.last, self._bits()
        changed, sad, drift = {}, {}, {}
        for name, now in self.last.items():
            changed[name] = _ones(now & ~before[name]) / max(1, _ones(now))
            sad[name], drift[name] = _ones(now ^ before[name]), _ones(now ^ self.first[name])
        return Update(step, changed, reallocated, sad, drift)

    def _bits(self) -> dict[str, Tensor]:
        return {n: torch.from_numpy(np.packbits(layer.mask().cpu().numpy())) for n, layer in self.layers.items()}


def _ones(bits: Tensor) -> int:
    return int(np.unpackbits(bits.numpy()).sum())
