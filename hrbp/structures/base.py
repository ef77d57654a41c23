"""The base class of sparsity structures, and the selection that one makes in a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from blocksparse import BSRPattern

from .grouping import Grouping

Make = TypeVar("Make", bound="Callable[..., Structure]")


@dataclass(frozen=True, eq=False)
class Selection:
    """What a structure keeps of one layer.

    mask       bool [K, C, R, S], in filter order
    blocksize  (bk, bc) that stores the mask and no zero; single weights in (1, 1)
    row_order  which filter each row of the BSR matrix is; None: filter i
    grouping   the groups of "hrbp" and "hrbp++"
    groups     of a convolution in groups: the mask is [K, C/groups, R, S]
    """

    mask: Tensor
    blocksize: tuple[int, int]
    row_order: Tensor | None = None
    grouping: Grouping | None = None
    groups: int = 1

    def pattern(self) -> BSRPattern:
        """The mask as a BSR index without a stored zero."""
        return BSRPattern.from_mask(self.mask, self.blocksize, self.row_order).grouped(self.groups)

    def whole(self) -> Tensor:
        """The mask over all channels, bool [K, C, R, S]; False where a filter reads none of them."""
        if self.groups == 1:
            return self.mask
        k, c, r, s = self.mask.shape
        wide = self.mask.new_zeros((self.groups, k // self.groups, self.groups, c, r, s))
        at = torch.arange(self.groups, device=wide.device)
        wide[at, :, at] = self.mask.view(self.groups, -1, c, r, s)
        return wide.view(k, self.groups * c, r, s)


class Structure(ABC):
    """A sparsity structure. `choose` makes a mask from a score; `density` predicts its density from the shape alone.

    A subclass is a frozen dataclass of plain values, in a file of this folder, with a function `named` that makes it:
    files of models hold the name of the class and its fields. `choose` and `density` are all that it needs. What else
    it defines says what may be done with its masks: `mask` that they may follow a weight ("ste", "sr-ste"), `exchange`
    and `shrink` that they may change in training ("set", "rigl"; "gmp"), `has` that they may be taken over.
    """

    name: str

    @abstractmethod
    def choose(self, score: Tensor, sparsity: float, seed: int = 0) -> Selection:
        """Select weights of a layer by their score [K, C, R, S] >= 0; a share `sparsity` of them is dropped."""

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        """The mask of `choose`, without checks: the score is finite and >= 0, and nothing waits for the GPU.

        Define it where that is cheap enough for every forward of a layer whose mask follows its weight.
        """
        return self.choose(score, sparsity).mask

    @abstractmethod
    def density(self, shape: Sequence[int], density: float) -> float:
        """The density that a layer [K, C, R, S] gets when `density` is asked for: whole grains, at least one."""

    def blocksize(self, shape: Sequence[int]) -> tuple[int, int]:
        """(bk, bc) that stores any mask of this structure in a layer [K, C, R, S] without a zero."""
        return 1, 1

    def order(self, score: Tensor) -> Tensor | None:
        """int [K]: which filter each row of the mask of this score is; None: row i is filter i."""
        return None

    def ranked(self, score: Tensor, order: Tensor | None = None) -> Tensor:
        """The score that a ranking over all layers uses, for every weight: its own, or that of its grain."""
        return score

    def settled(self, shape: Sequence[int], sparsity: float) -> Structure:
        """This structure with all that depends on the sparsity of a layer [K, C, R, S] fixed as it is at this one.

        Gradual pruning asks for it with its final sparsity, before the first update.
        """
        return self

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Why a layer [K, C, R, S] cannot have this structure, or None."""
        return None

    @property
    def keeps_filters(self) -> bool:
        """Whether its units are of single filters, or of neighbours that never move.

        Its masks of a convolution in groups are then those of any layer of that shape, if it does not refuse the shape
        of one group: no unit has filters of two. Otherwise each group has this structure by itself: see
        layers/in_groups.py.
        """
        return False

    def can(self, ability: str) -> bool:
        """Whether this structure defines an optional method.

        Args:
            ability: "mask", "exchange", "shrink", "recount" or "has".
        """
        return getattr(type(self), ability) is not getattr(Structure, ability)

    # ------------------------------------------------------------------ how masks change in training

    def exchange(self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float) -> Selection:
        """Drop `share` of the units of a mask, those of least weight, and add as many, those of most growth.

        It keeps exactly as many weights as before, in as many blocks.

        Args:
            mask: bool [K, C, R, S].
            order: int [K], the filter that each row of it is; None: row i is filter i.
            weight, growth: [K, C, R, S], >= 0.
            share: of the units kept, in [0, 1].
        """
        raise self._unable("exchanges nothing")

    def recount(
        self, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float, unit: str = "weight"
    ) -> Selection:
        """As `exchange`, by HRBP's own rule: every filter exchanges units, then each group counts what it keeps.

        unit: "weight", or "kernel": of one filter and one input channel.
        """
        raise self._unable("has no groups")

    def shrink(
        self, mask: Tensor, order: Tensor | None, score: Tensor, sparsity: float, reorder: bool = False
    ) -> Selection:
        """Prune a mask to a higher sparsity.

        Args:
            mask, order: see `exchange`.
            score: [K, C, R, S], >= 0.
            sparsity: of the new mask.
            reorder: filters may be put into another order; otherwise they keep theirs.
        """
        raise self._unable("shrinks nothing")

    @property
    def uniform_rows(self) -> int | None:
        """n where every n filters keep equally many channels, all taps: what SUBP trains; else None."""
        return None

    def of_rows(self, kept: Tensor, shape: Sequence[int], order: Tensor | None) -> Selection:
        """Keep these channels, bool [K/n, C], of every n filters; see `uniform_rows`."""
        raise self._unable("has no uniform rows")

    def has(self, mask: Tensor) -> bool:
        """Whether a mask [K, C, R, S] is one that this structure might have made, at some sparsity."""
        raise self._unable("regroups filters")

    def _unable(self, what: str) -> TypeError:
        return TypeError(f"structure {self.name!r} {what}")

    def _check(self, shape: Sequence[int]) -> None:
        if reason := self.refuses(shape):
            raise ValueError(
                f"make_mask({self.name!r}): layer {tuple(shape)}: {reason}; choose one that does, or keep it dense"
            )


class Named(NamedTuple):
    """The attribute `structure` that `named` sets on a function."""

    name: str
    place: int
    drawn: Mapping[str, object]
    in_models: Callable[[bool], Mapping[str, object]]


def _nothing(gpu: bool) -> Mapping[str, object]:
    return {}


def named(
    name: str,
    place: int = 1000,
    drawn: Mapping[str, object] | None = None,
    in_models: Callable[[bool], Mapping[str, object]] = _nothing,
) -> Callable[[Make], Make]:
    """Register the structure that a function makes; the keyword arguments of the function are its options.

        @named("stripes")
        def make_stripes(*, width: int = 2) -> Structure:
            \"\"\"stripes of `width` input channels\"\"\"
            return Stripes(width)

    Lists and help texts show the docstring. Annotations are checked: int, float, bool, `int | None`, ...;
    `Annotated[float, "a number in (0, 1]"]` says what an option needs. Whatever else is wrong the structure refuses.

    Args:
        name: in small letters.
        place: where lists have it, lowest first; those of one place by name.
        drawn: options that `sparsify` gives it where the first masks are random, unless the caller gives others.
        in_models: likewise, always; called with whether the model is for a GPU.
    """

    def mark(make: Make) -> Make:
        make.structure = Named(name, place, dict(drawn or {}), in_models)  # type: ignore[attr-defined]
        return make

    return mark


def sparsity_of(density: float) -> float:
    """1 - density, below 1: every structure keeps at least one grain, or one run of channels."""
    return min(1 - density, 1 - 1e-9)
