"""What a structure is, and what one keeps of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blocksparse import BSRPattern

from .grouping import Grouping


@dataclass(frozen=True, eq=False)
class Choice:
    """What a structure keeps of one layer.

    mask       bool [K, C, R, S], in filter order
    blocksize  (bk, bc) that stores the mask and no zero; single weights in (1, 1)
    row_order  which filter each row of the BSR matrix is; None: filter i
    grouping   the groups of "hrbp" and "hrbp++"
    """

    mask: Tensor
    blocksize: tuple[int, int]
    row_order: Tensor | None = None
    grouping: Grouping | None = None

    def pattern(self) -> BSRPattern:
        """The mask as a BSR index without a stored zero."""
        return BSRPattern.from_mask(self.mask, self.blocksize, self.row_order)


class Structure(ABC):
    """One kind of mask. `choose` selects by score; `density` says what it makes of a wish, from the shape alone."""

    name: str

    @abstractmethod
    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Choice:
        """What is kept of a layer with this score [K, C, R, S] >= 0 when a share `sparsity` of it is dropped."""

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        """The mask of `choose`, for a score that is known to be finite and >= 0: it is not looked at on the host."""
        return self.choose(score, sparsity).mask

    @abstractmethod
    def density(self, shape: Sequence[int], density: float) -> float:
        """The share of a layer [K, C, R, S] that is kept when `density` is asked for: whole grains, at least one."""

    def blocksize(self, shape: Sequence[int]) -> tuple[int, int]:
        """(bk, bc) that stores any mask of this structure in a layer [K, C, R, S], and no zero."""
        return 1, 1

    def ranked(self, score: Tensor, order: Tensor | None = None) -> Tensor:
        """What a ranking over layers compares, for every weight: its own score, or that of its grain."""
        return score

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Why a layer [K, C, R, S] cannot have this structure, or None."""
        return None

    def _check(self, shape: Sequence[int]) -> None:
        if reason := self.refuses(shape):
            raise ValueError(
                f"make_mask({self.name!r}): layer {tuple(shape)}: {reason}; choose one that does, or keep it dense"
            )


def sparsity_of(density: float) -> float:
    """1 - density, below 1: every structure keeps at least one grain, or one run of channels."""
    return min(1 - density, 1 - 1e-9)
