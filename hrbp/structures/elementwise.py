"""Groups of filters that keep the same single cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Selection, Structure, named, sparsity_of
from .grouping import GroupOptions
from .regrouping import regroup
from .selection import check_score


@dataclass(frozen=True)
class Elementwise(Structure):
    """Groups of filters that keep the same cells of C x R x S, any of them."""

    groups: int = 8
    min_rows: int = 8
    method: str = "assign"
    name: str = "elementwise"

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Selection:
        check_score(score, sparsity, f"make_mask({self.name!r})")
        k, c, r, s = score.shape
        flat = regroup(
            score.reshape(k, c * r * s, 1, 1),
            sparsity,
            groups=self.groups,
            min_rows=self.min_rows,
            method=self.method,
            seed=seed,
        )
        return Selection(flat.mask().view(k, c, r, s), flat.blocksize, flat.row_order)

    def density(self, shape: Sequence[int], density: float) -> float:
        cells = shape[1] * shape[2] * shape[3]
        options = GroupOptions(groups=self.groups, min_rows=self.min_rows)
        size = options.size((shape[0], cells, 1, 1), sparsity_of(density))
        return size.channels / cells


@named("elementwise", 80)
def make_elementwise(*, groups: int = 8, min_rows: int = 8, method: str = "assign") -> Structure:
    """groups of similar filters that keep the same cells of C x R x S

    Dense blocks in the output, not in the input gradient; the baseline of the HRBP paper.
    """
    return Elementwise(groups, min_rows, method)
