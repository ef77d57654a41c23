"""SR-STE: as STE, and what is left out decays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Moment
from .decay import Decay
from .following import Following
from .options import NUMBER, Decaying, option


@dataclass(frozen=True)
class SRSTE(Decaying, Following):
    """as "ste", and what is left out decays: masks settle (Zhou et al., 2021)

        W <- W - lr * (g + decay * (1 - E) * W),   E the mask; see decay.py

    0 is "ste". Below 0 what is left out grows, and comes back the sooner: a control.

    Source: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021.
    """

    name = "sr-ste"
    place = 60
    decay: float = option(2e-4, "of weights that take no part; below 0 they grow", NUMBER)

    def attach(self, model: nn.Module, now: Moment, optimizer: torch.optim.Optimizer) -> object:
        return Decay(model, now.layers.values(), optimizer, self.decay)
