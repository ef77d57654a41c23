"""Imported masks, each with a structure of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Selection, Structure


@dataclass(frozen=True)
class Mixed(Structure):
    """Imported masks, each with a structure of its own; they do not change."""

    name: str = "mixed"

    @property
    def keeps_filters(self) -> bool:
        return True  # they do not change

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Selection:
        raise ValueError(f"structure {self.name!r} is what masks that were taken over have; it makes none")

    def density(self, shape: Sequence[int], density: float) -> float:
        raise ValueError(f"structure {self.name!r} is what masks that were taken over have; it makes none")
