"""RigL: what grows is what the gradient asks for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..layers.view import SparseLayer
from .base import Moment
from .exchanging import Exchanging


@dataclass(frozen=True)
class RigL(Exchanging):
    """the units of least |weight| go, those of largest |gradient| come (Evci et al., 2020)

    Units are those of the structure: grains, or channels of groups. It draws nothing, and takes a seed as "set" does.

    Source: Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020.
    """

    name = "rigl"
    place = 20
    needs_gradient = True

    def growth(self, now: Moment, i: int, name: str, layer: SparseLayer) -> Tensor:
        assert now.gradients is not None
        return now.gradients[name]
