"""MEST: what goes is chosen by gradients, too; what comes is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hrbp.layers.view import SparseLayer
from hrbp.methods.base import Moment
from hrbp.methods.exchanging import Exchanging
from hrbp.methods.options import NOT_NEGATIVE, option


@dataclass(frozen=True)
class MEST(Exchanging):
    """the units of least |weight| + mix * |gradient| go, random ones come (Yuan et al., 2021)

    Source: Yuan et al., MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge, NeurIPS 2021.
    """

    name = "mest"
    needs_gradient = True

    mix: float = option(1.0, "what a gradient counts for", NOT_NEGATIVE)

    def worth(self, now: Moment, i: int, name: str, layer: SparseLayer) -> Tensor:
        assert now.gradients is not None
        return super().worth(now, i, name, layer) + self.mix * now.gradients[name]

    def growth(self, now: Moment, i: int, name: str, layer: SparseLayer) -> Tensor:
        return torch.rand(layer.shape, generator=now.generator(self.seed, i)).to(layer.parameter.device)
