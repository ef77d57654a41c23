"""Grains: boxes of the filter bank that are kept or dropped whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .base import Selection, Structure, named
from .selection import check_score, swapped, top

# The boxes (k, c, r, s) that have a name; None stands for a whole axis.
BOXES: dict[str, tuple[int | None, int | None, int | None, int | None]] = {
    "unstructured": (1, 1, 1, 1),
    "vector": (1, 1, 1, None),
    "kernel": (1, 1, None, None),
    "filter": (1, None, None, None),
    "channel": (None, 1, None, None),
}


@dataclass(frozen=True)
class Grains(Structure):
    """Boxes (k, c, r, s) of the filter bank, kept or dropped whole; None stands for a whole axis.

    uniform: equally many in every k filters. rearrange: filters are sorted by falling score first, so that those of a
    box are alike. `order`, int [K], is that of the filters; None: as they are, or what a score says where there is one.
    """

    name: str
    box: tuple[int | None, int | None, int | None, int | None]
    uniform: bool = False
    rearrange: bool = False

    @property
    def keeps_filters(self) -> bool:
        return self.box[0] is not None and not self.rearrange

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
        """Repeat a value of each grain for each of its weights."""
        for axis, size in enumerate(self.sizes(shape)):
            grains = grains.repeat_interleave(size, axis)
        return grains if order is None else grains[order.long().argsort()]

    def ranked(self, score: Tensor, order: Tensor | None = None) -> Tensor:
        cells = score.to(torch.promote_types(score.dtype, torch.float32))
        order = self.order(cells) if order is None else order
        return self.expand(self.sums(cells, order), score.shape, order)

    def count(self, shape: Sequence[int], density: float) -> int:
        """How many grains are kept: of every k filters if uniform, else of the layer."""
        k, c, r, s = self.sizes(shape)
        each = (shape[1] // c) * (shape[2] // r) * (shape[3] // s)
        return max(1, round(density * each * (1 if self.uniform else shape[0] // k)))

    def choose(self, score: Tensor, sparsity: float, seed: int = 0, order: Tensor | None = None) -> Selection:
        cells = check_score(score, sparsity, f"make_mask({self.name!r})")
        self._check(score.shape)
        order = self.order(cells) if order is None else order
        return self.selection(self._kept(cells, sparsity, order), score.shape, order)

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        order = self.order(score)
        return self.expand(self._kept(score, sparsity, order), score.shape, order)

    def _kept(self, score: Tensor, sparsity: float, order: Tensor | None) -> Tensor:
        sums = self.sums(score, order)
        flat = sums.flatten(1) if self.uniform else sums.view(1, -1)
        return top(flat, self.count(score.shape, 1 - sparsity)).view(sums.shape)

    def exchange(self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float) -> Selection:
        kept, worth, gain = (self.sums(t, order) for t in (mask.float(), weight, growth))
        shape = kept.shape
        kept, worth, gain = (t.flatten(1) if self.uniform else t.view(1, -1) for t in (kept > 0, worth, gain))
        return self.selection(swapped(kept, worth, gain, share).view(shape), mask.shape, order)

    def shrink(
        self, mask: Tensor, order: Tensor | None, score: Tensor, sparsity: float, reorder: bool = False
    ) -> Selection:
        return self.choose(score, sparsity, order=None if reorder else order)

    @property
    def uniform_rows(self) -> int | None:
        return self.box[0] if self.uniform and self.box[1:] == (1, None, None) else None

    def of_rows(self, kept: Tensor, shape: Sequence[int], order: Tensor | None) -> Selection:
        return self.selection(kept[:, :, None, None], shape, order)

    def has(self, mask: Tensor) -> bool:
        if self.refuses(mask.shape) is not None:
            return False
        kept = self.sums(mask.double())
        whole = (kept == 0) | (kept == math.prod(self.sizes(mask.shape)))
        rows = (kept > 0).flatten(1).sum(1)
        return bool(whole.all()) and not (self.uniform and bool((rows != rows[0]).any()))

    def selection(self, kept: Tensor, shape: Sequence[int], order: Tensor | None = None) -> Selection:
        """These grains as a selection."""
        return Selection(self.expand(kept, shape, order), self.blocksize(shape), order)

    def blocksize(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.sizes(shape)[:2]

    def density(self, shape: Sequence[int], density: float) -> float:
        self._check(shape)
        k, c, r, s = self.sizes(shape)
        rows = shape[0] // k if self.uniform else 1
        return self.count(shape, density) * rows * k * c * r * s / (shape[0] * shape[1] * shape[2] * shape[3])


@named("unstructured", 0)
def make_unstructured() -> Structure:
    """single weights"""
    return Grains("unstructured", BOXES["unstructured"])


@named("vector", 20)
def make_vector() -> Structure:
    """a row of a kernel"""
    return Grains("vector", BOXES["vector"])


@named("kernel", 30)
def make_kernel() -> Structure:
    """one filter and one input channel"""
    return Grains("kernel", BOXES["kernel"])


@named("filter", 40)
def make_filter() -> Structure:
    """one filter"""
    return Grains("filter", BOXES["filter"])


@named("channel", 50)
def make_channel() -> Structure:
    """one input channel of all filters"""
    return Grains("channel", BOXES["channel"])


@named("block", 60)
def make_block(*, blocksize: tuple[int, int] = (32, 32)) -> Structure:
    """bk filters x bc input channels at one tap"""
    sizes: Any = blocksize
    pair = isinstance(sizes, tuple | list) and len(sizes) == 2
    if not pair or not all(isinstance(size, Integral) and not isinstance(size, bool) for size in sizes):
        raise ValueError(f"structure('block'): blocksize is {blocksize!r}; it needs a pair (bk, bc) of integers")
    bk, bc = blocksize
    return Grains("block", (bk, bc, 1, 1))


@named("1xn", 70)
def make_one_by_n(*, n: int = 16, uniform: bool = False, rearrange: bool = False) -> Structure:
    """n filters and one input channel, all taps

    (Lin et al., 1xN Pattern, 2022.) With `rearrange` filters are sorted by their scores first; with `uniform` equally
    many in every n filters (SUBP: Xiang et al., NeurIPS 2023).
    """
    return Grains("1xn", (n, 1, None, None), uniform, rearrange=rearrange)
