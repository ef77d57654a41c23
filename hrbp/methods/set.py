"""SET: what grows is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.view import SparseLayer
from .base import Moment
from .exchanging import Exchanging


@dataclass(frozen=True)
class SET(Exchanging):
    """the units of least |weight| go, random ones come (Mocanu et al., 2018)

    Units are those of the structure: grains, or channels of groups.

    Source: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science, Nature Communications 2018.
    """

    name = "set"
    place = 10

    def growth(self, now: Moment, i: int, name: str, layer: SparseLayer) -> Tensor:
        return torch.rand(layer.shape, generator=now.generator(self.seed, i)).to(layer.parameter.device)
