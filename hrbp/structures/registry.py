"""Which shapes a mask may take: every sparsity structure behind one call.

A structure says what may be kept together. Most are grains, boxes of the filter bank that are kept or dropped whole
(Mao et al., Exploring the Regularity of Sparse Structure in Convolutional Neural Networks, 2017): a grain is worth the
sum of the scores of its cells, and the best ones stay.

    unstructured  single weights
    n:m           single weights, n in every m neighbouring input channels (Zhou et al., ICLR 2021); "2:4" names one
    vector        a row of a kernel
    kernel        one filter and one input channel
    filter        one filter
    channel       one input channel of all filters
    block         bk filters x bc input channels at one tap
    1xn           n filters and one input channel, all taps (Lin et al., 1xN Pattern, 2022); with `rearrange`
                  filters are sorted by their scores first; with `uniform` equally many in every n filters (SUBP: Xiang
                  et al., NeurIPS 2023)
    elementwise   groups of similar filters that keep the same cells of C x R x S: dense blocks in the output, not in
                  the input gradient; the baseline of the HRBP paper
    hrbp          groups of filters that keep the same channels, all taps (see regroup.py)
    hrbp++        groups of filters that keep the same channels and the same taps, 4/9 of them
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from blocksparse import BSRPattern

from ..arguments import any_case
from .regrouping import Grouping, GroupShape, group_shape, regroup
from .selection import check_score, top, top_of_few

FEW = 16  # items of which each pair is compared sooner than they are sorted


@dataclass(frozen=True, eq=False)
class Choice:
    """What a structure keeps of one layer.

    mask       bool [K, C, R, S], in filter order
    blocksize  (bk, bc) that stores the mask and no zero; None: the structure has no such form
    row_order  which filter each row of the BSR matrix is; None: filter i
    grouping   the groups of "hrbp" and "hrbp++"
    """

    mask: Tensor
    blocksize: tuple[int, int] | None
    row_order: Tensor | None = None
    grouping: Grouping | None = None

    def pattern(self) -> BSRPattern:
        """The mask as a BSR index without a stored zero; refused where the structure has no such form."""
        if self.blocksize is None:
            raise ValueError(
                "Choice.pattern(): this structure keeps single weights, which no block of more than one weight holds "
                "without zeros; use its mask, or BSRPattern.from_mask() with a blocksize of your own"
            )
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


@dataclass(frozen=True)
class Grains(Structure):
    """Boxes (k, c, r, s) of the filter bank, kept or dropped whole; None stands for a whole axis.

    uniform: equally many in every k filters. stored: the box is a BSR block, for all taps or for one. rearrange:
    filters are sorted by falling score first, so that those of a box are alike. `order`, int [K], is that of the
    filters; None: as they are, or what a score says where there is one.
    """

    name: str
    box: tuple[int | None, int | None, int | None, int | None]
    uniform: bool = False
    stored: bool = True
    rearrange: bool = False

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The box in a layer of this shape."""
        k, c, r, s = (axis if size is None else size for axis, size in zip(shape, self.box, strict=True))
        return k, c, r, s

    def refuses(self, shape: Sequence[int]) -> str | None:
        for name, size, axis in zip("KC", self.sizes(shape), shape, strict=False):
            if size < 1 or axis % size:
                return f"grains of {size} do not divide {name} = {axis}"
        return None

    def order(self, score: Tensor) -> Tensor | None:
        """Filters by falling score, the first ones among equals."""
        return score.flatten(1).sum(1).argsort(descending=True, stable=True) if self.rearrange else None

    def sums(self, score: Tensor, order: Tensor | None = None) -> Tensor:
        """[K/k, C/c, R/r, S/s]: the score of each grain."""
        k, c, r, s = self.sizes(score.shape)
        kk, cc, rr, ss = score.shape
        score = score if order is None else score[order.long()]
        return score.reshape(kk // k, k, cc // c, c, rr // r, r, ss // s, s).sum((1, 3, 5, 7))

    def expand(self, grains: Tensor, shape: Sequence[int], order: Tensor | None = None) -> Tensor:
        """A value of each grain as one of each weight."""
        for axis, size in enumerate(self.sizes(shape)):
            grains = grains.repeat_interleave(size, axis)
        return grains if order is None else grains[order.long().argsort()]

    def ranked(self, score: Tensor, order: Tensor | None = None) -> Tensor:
        cells = score.to(torch.promote_types(score.dtype, torch.float32))
        order = self.order(cells) if order is None else order
        return self.expand(self.sums(cells, order), score.shape, order)

    def count(self, shape: Sequence[int], density: float) -> int:
        """Grains kept: of every k filters if uniform, else of the layer."""
        k, c, r, s = self.sizes(shape)
        each = (shape[1] // c) * (shape[2] // r) * (shape[3] // s)
        return max(1, round(density * each * (1 if self.uniform else shape[0] // k)))

    def choose(self, score: Tensor, sparsity: float, seed: int = 0, order: Tensor | None = None) -> Choice:
        cells = check_score(score, sparsity, f"make_mask({self.name!r})")
        self._check(score.shape)
        order = self.order(cells) if order is None else order
        return self.choice(self._kept(cells, sparsity, order), score.shape, order)

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        order = self.order(score)
        return self.expand(self._kept(score, sparsity, order), score.shape, order)

    def _kept(self, score: Tensor, sparsity: float, order: Tensor | None) -> Tensor:
        sums = self.sums(score, order)
        flat = sums.flatten(1) if self.uniform else sums.view(1, -1)
        return top(flat, self.count(score.shape, 1 - sparsity)).view(sums.shape)

    def choice(self, kept: Tensor, shape: Sequence[int], order: Tensor | None = None) -> Choice:
        """The choice of these grains."""
        return Choice(self.expand(kept, shape, order), self.blocksize(shape), order)

    def blocksize(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """(bk, bc) that stores grains of a layer of this shape, if they have a BSR form."""
        return self.sizes(shape)[:2] if self.stored else None

    def density(self, shape: Sequence[int], density: float) -> float:
        self._check(shape)
        k, c, r, s = self.sizes(shape)
        rows = shape[0] // k if self.uniform else 1
        return self.count(shape, density) * rows * k * c * r * s / (shape[0] * shape[1] * shape[2] * shape[3])


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

    def kept(self, sparsity: float) -> int:
        exact = self.m * (1 - sparsity)
        n = round(exact) if self.n is None else self.n
        if abs(n - exact) > 1e-6 * self.m or not 1 <= n <= self.m:
            raise ValueError(
                f"make_mask({self.name!r}): sparsity is {sparsity}; {'n' if self.n is None else self.n}:{self.m} has "
                f"{f'1 - n/{self.m}' if self.n is None else 1 - self.n / self.m}"
            )
        return n

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Choice:
        cells = check_score(score, sparsity, f"make_mask({self.name!r})")
        self._check(score.shape)
        return Choice(self.mask(cells, sparsity), None)

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        k, c, r, s = score.shape
        runs, n = score.reshape(k, c // self.m, self.m, r * s), self.kept(sparsity)
        if self.m <= FEW:
            return top_of_few(runs, n, 2).view(score.shape)
        return top(runs.transpose(2, 3), n).transpose(2, 3).reshape(score.shape)

    def density(self, shape: Sequence[int], density: float) -> float:
        self._check(shape)
        n = max(1, round(self.m * density)) if self.n is None else self.n
        return n / self.m

    def refuses(self, shape: Sequence[int]) -> str | None:
        return f"m = {self.m} does not divide C = {shape[1]}" if self.m < 1 or shape[1] % self.m else None


def sparsity_of(density: float) -> float:
    """1 - density, below 1: every structure keeps at least one grain, or one run of channels."""
    return min(1 - density, 1 - 1e-9)


@dataclass(frozen=True)
class Groups(Structure):
    """HRBP and HRBP++; the options are those of `regroup`. row_granule None: filters stay where they are."""

    name: str
    tap_density: float
    groups: int = 8
    granule: int = 1
    row_granule: int | None = 1
    min_rows: int = 8
    balanced: bool = False
    method: str = "assign"

    def refuses(self, shape: Sequence[int]) -> str | None:
        for name, size, axis in (("row_granule", self._rows(shape), shape[0]), ("granule", self.granule, shape[1])):
            if size < 1 or axis % size:
                return f"{name} = {size} does not divide {axis}"
        return None

    def _rows(self, shape: Sequence[int]) -> int:
        if self.row_granule is not None:
            return self.row_granule
        size = group_shape(shape, 0.0, groups=self.groups, min_rows=self.min_rows)
        return shape[0] // size.groups

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Choice:
        grouping = regroup(
            score,
            sparsity,
            groups=self.groups,
            tap_density=self.tap_density,
            granule=self.granule,
            row_granule=self._rows(score.shape),
            min_rows=self.min_rows,
            balanced=self.balanced,
            method=self.method,
            seed=seed,
        )
        return grouping_choice(grouping)

    def size(self, shape: Sequence[int], sparsity: float) -> GroupShape:
        """Groups, channels and taps of a layer of this shape."""
        return group_shape(
            shape,
            sparsity,
            groups=self.groups,
            tap_density=self.tap_density,
            granule=self.granule,
            row_granule=self._rows(shape),
            min_rows=self.min_rows,
        )

    def grouping(self, mask: Tensor, row_order: Tensor | None) -> Grouping:
        """The groups of a mask that this structure made, rows in this order."""
        k, c, r, s = mask.shape
        order = torch.arange(k, device=mask.device) if row_order is None else row_order.long()
        groups = self.size(mask.shape, 0.0).groups
        kept = mask[order[:: k // groups]].view(groups, c, r * s)
        channels, taps = (axes.nonzero()[:, 1].view(groups, -1) for axes in (kept.any(2), kept.any(1)))
        return Grouping((k, c, r, s), order, channels, taps, self.granule)

    def density(self, shape: Sequence[int], density: float) -> float:
        size = self.size(shape, sparsity_of(density))
        return size.channels * size.taps / (shape[1] * shape[2] * shape[3])


def grouping_choice(grouping: Grouping) -> Choice:
    """The choice that keeps what a grouping keeps."""
    return Choice(grouping.mask(), grouping.blocksize, grouping.row_order, grouping)


@dataclass(frozen=True)
class Elementwise(Structure):
    """Groups of filters that keep the same cells of C x R x S, which ones is free."""

    groups: int = 8
    min_rows: int = 8
    method: str = "assign"
    name: str = "elementwise"

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Choice:
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
        return Choice(flat.mask().view(k, c, r, s), flat.blocksize, flat.row_order)

    def density(self, shape: Sequence[int], density: float) -> float:
        cells = shape[1] * shape[2] * shape[3]
        size = group_shape((shape[0], cells, 1, 1), sparsity_of(density), groups=self.groups, min_rows=self.min_rows)
        return size.channels / cells


@dataclass(frozen=True)
class Mixed(Structure):
    """Masks each of which has a structure of its own: they were taken over, and stay as they are."""

    name: str = "mixed"

    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Choice:
        raise ValueError(f"structure {self.name!r} is what masks that were taken over have; it makes none")

    def density(self, shape: Sequence[int], density: float) -> float:
        raise ValueError(f"structure {self.name!r} is what masks that were taken over have; it makes none")


# ---------------------------------------------------------------------- by name


def _n_m(*, m: int = 4, n: int | None = None) -> Structure:
    return NM(m, n)


def _one_by_n(*, n: int = 16, uniform: bool = False, rearrange: bool = False) -> Structure:
    return Grains("1xn", (n, 1, None, None), uniform, rearrange=rearrange)


def _block(*, blocksize: tuple[int, int] = (32, 32)) -> Structure:
    sizes: Any = blocksize
    pair = isinstance(sizes, tuple | list) and len(sizes) == 2
    if not pair or not all(isinstance(size, Integral) and not isinstance(size, bool) for size in sizes):
        raise ValueError(f"structure('block'): blocksize is {blocksize!r}; it needs a pair (bk, bc) of integers")
    bk, bc = blocksize
    return Grains("block", (bk, bc, 1, 1))


def _groups(name: str, tap_density: float) -> Callable[..., Structure]:
    def make(
        *,
        groups: int = 8,
        tap_density: float = tap_density,
        granule: int = 1,
        row_granule: int | None = 1,
        min_rows: int = 8,
        balanced: bool = False,
        method: str = "assign",
    ) -> Structure:
        return Groups(name, tap_density, groups, granule, row_granule, min_rows, balanced, method)

    return make


def _elementwise(*, groups: int = 8, min_rows: int = 8, method: str = "assign") -> Structure:
    return Elementwise(groups, min_rows, method)


STRUCTURES: dict[str, Callable[..., Structure]] = {
    "unstructured": lambda: Grains("unstructured", (1, 1, 1, 1), stored=False),
    "n:m": _n_m,
    "vector": lambda: Grains("vector", (1, 1, 1, None), stored=False),
    "kernel": lambda: Grains("kernel", (1, 1, None, None)),
    "filter": lambda: Grains("filter", (1, None, None, None)),
    "channel": lambda: Grains("channel", (None, 1, None, None)),
    "block": _block,
    "1xn": _one_by_n,
    "elementwise": _elementwise,
    "hrbp": _groups("hrbp", 1.0),
    "hrbp++": _groups("hrbp++", 4 / 9),
}


# What options are, and where None is one of their values.
KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("n", "m", "groups", "granule", "row_granule", "min_rows"), (Integral, "an integer")),
    **dict.fromkeys(("uniform", "rearrange", "balanced"), (Integral, "True or False")),  # 0 and 1 from a command line
    "tap_density": (Real, "a number in (0, 1]"),
}
NONE = (("n", "n:m"), ("row_granule", "hrbp"), ("row_granule", "hrbp++"))


def structure(name: str, **options: object) -> Structure:
    """The structure of this name (see the list at the top of this file) in any case, or "2:4", "1:4", ... for n:m.

    Raises:
        ValueError: no such structure, or an option that is no such number.
        TypeError: an option that it does not have; the message lists those it has.
    """
    name = any_case(name, STRUCTURES)
    text = name if isinstance(name, str) else ""
    ratio = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    make = (lambda: NM(int(ratio[2]), int(ratio[1]))) if ratio else STRUCTURES.get(text)
    if make is None:
        raise ValueError(f"structure(): no structure {name!r}; choose one of {', '.join(STRUCTURES)} or a ratio as 2:4")
    known = inspect.signature(make).parameters
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"structure({name!r}): no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    for option, value in options.items():
        kind, needs = KINDS.get(option, (object, ""))
        if not isinstance(value, kind) and not (value is None and (option, name) in NONE):
            raise ValueError(f"structure({name!r}): {option} is {value!r}; it needs {needs}")
    return make(**options)


def make_mask(score: Tensor, sparsity: float, structure: str = "hrbp++", *, seed: int = 0, **options: object) -> Tensor:
    """The mask of this structure that keeps the most of the score.

    Args:
        score: [K, C, R, S] or [K, C] (read as [K, C, 1, 1]), finite and >= 0, floating point or bool, on any device.
        sparsity: share of the weights that is dropped, in [0, 1). Structures keep whole grains, and at least one:
            the share kept is as near as these allow.
        structure: see the list at the top of this file.
        seed: of the structures that search (elementwise, hrbp, hrbp++).
        **options: of the structure: n, m (n:m), n, uniform, rearrange (1xn), blocksize (block), groups, min_rows,
            method (elementwise, hrbp, hrbp++), tap_density, granule, row_granule, balanced (hrbp, hrbp++).

    Returns:
        bool, of the score's shape and device.

    Raises:
        ValueError, TypeError: a score, sparsity, structure or option that makes no mask; the message says why.
    """
    return choose(score, sparsity, structure, seed=seed, **options).mask.view(score.shape)


def choose(score: Tensor, sparsity: float, structure: str = "hrbp++", *, seed: int = 0, **options: object) -> Choice:
    """As `make_mask`, with the BSR form: Choice(mask [K, C, R, S], blocksize, row_order, grouping)."""
    made = _structure(structure, **options)
    if isinstance(score, Tensor) and score.dim() == 2:
        score = score[:, :, None, None]
    return made.choose(score, sparsity, seed)


_structure = structure  # `structure` is an argument above
