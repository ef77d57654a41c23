"""SR-STE: as STE, and what is left out decays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Moment
from .decay import Decay
from .following import Following
from .options import Decaying


@dataclass(frozen=True)
class SRSTE(Decaying, Following):
    """as "ste", and what is left out decays: masks settle (Zhou et al., 2021)

        W <- W - lr * (g + decay * (1 - E) * W),   E the mask; see decay.py

    Source: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021.
    """

    name = "sr-ste"
    place = 60

    def attach(self, model: nn.Module, now: Moment, optimizer: torch.optim.Optimizer) -> object:
        return Decay(model, now.layers.values(), optimizer, self.decay)
