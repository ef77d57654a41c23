"""Masks that were taken over, each with a structure of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Choice, Structure


@dataclass(frozen=True)
class Mixed(Structure):
    """Masks each of which has a structure of its own: they were taken over, and stay as they are."""

    name: str = "mixed"

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Choice:
        raise ValueError(f"structure {self.name!r} is what masks that were taken over have; it makes none")

    def density(self, shape: Sequence[int], density: float) -> float:
        raise ValueError(f"structure {self.name!r} is what masks that were taken over have; it makes none")
