"""n:m: n weights of every m neighbouring input channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Selection, Structure, named
from .selection import check_score, top, top_of_few

FEW = 16  # items of which each pair is compared sooner than they are sorted


@dataclass(frozen=True)
class NM(Structure):
    """n weights of every m neighbouring input channels."""

    m: int
    n: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None and not 1 <= self.n <= self.m:
            turned = f"; {self.m}:{self.n} keeps {self.m} of {self.n}" if 1 <= self.m < self.n else ""
            raise ValueError(
                f"structure(): {self.n}:{self.m} would keep {self.n} of every {self.m} weights; n:m needs"
                f" 1 <= n <= m{turned}"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return "n:m" if self.n is None else f"{self.n}:{self.m}"

    @property
    def keeps_filters(self) -> bool:
        return True

    def kept(self, sparsity: float) -> int:
        exact = self.m * (1 - sparsity)
        n = round(exact) if self.n is None else self.n
        if abs(n - exact) > 1e-6 * self.m or not 1 <= n <= self.m:
            raise ValueError(
                f"make_mask({self.name!r}): sparsity is {sparsity}; {'n' if self.n is None else self.n}:{self.m} has "
                f"{f'1 - n/{self.m}' if self.n is None else 1 - self.n / self.m}"
            )
        return n

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Selection:
        cells = check_score(score, sparsity, f"make_mask({self.name!r})")
        self._check(score.shape)
        return Selection(self.mask(cells, sparsity), self.blocksize(score.shape))

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        k, c, r, s = score.shape
        runs, n = score.reshape(k, c // self.m, self.m, r * s), self.kept(sparsity)
        if self.m <= FEW:
            return top_of_few(runs, n, 2).view(score.shape)
        return top(runs.transpose(2, 3), n).transpose(2, 3).reshape(score.shape)

    def has(self, mask: Tensor) -> bool:
        if self.refuses(mask.shape) is not None:
            return False
        kept = mask.view(len(mask), -1, self.m, *mask.shape[2:]).sum(2)
        return bool((kept == (kept.flatten()[0] if self.n is None else self.n)).all())

    def density(self, shape: Sequence[int], density: float) -> float:
        self._check(shape)
        n = max(1, round(self.m * density)) if self.n is None else self.n
        return n / self.m

    def refuses(self, shape: Sequence[int]) -> str | None:
        return f"m = {self.m} does not divide C = {shape[1]}" if self.m < 1 or shape[1] % self.m else None


@named("n:m", 10)
def make_n_m(*, m: int = 4, n: int | None = None) -> Structure:
    """single weights, n in every m neighbouring input channels (Zhou et al., ICLR 2021); "2:4" names one"""
    return NM(m, n)
