"""Groups of filters that share input channels and taps, and the size of a layer's groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Annotated, Any

import torch
from torch import Tensor

from blocksparse import BSRPattern

from ..arguments import check_sparsity

RULES = ("assign", "paper")
MAX_BLOCK_ROWS = 128  # rows of a block by default
USUAL_GROUPS, USUAL_ROWS = 8, 8  # the paper's t and B1


@dataclass(frozen=True, eq=False)
class Grouping:
    """Groups of filters that share input channels and taps.

    Rows g*K/groups .. (g+1)*K/groups of `row_order` are the filters of group g.

    Args:
        shape: (K, C, R, S) of the filter bank.
        row_order: int64 [K], a permutation of the filters.
        channels: int64 [groups, k], each row ascending: the input channels that a group keeps.
        taps: int64 [groups, p], each row ascending: the kernel offsets r*S + s that a group keeps.
        granule: channels come in aligned runs of this many.

    Raises:
        ValueError: the tensors do not describe such groups; the message says which and why.
    """

    shape: tuple[int, int, int, int]
    row_order: Tensor
    channels: Tensor
    taps: Tensor
    granule: int = 1

    def __post_init__(self) -> None:
        k, c, r, s = self.shape
        for name, dims in (("row_order", 1), ("channels", 2), ("taps", 2)):
            t = getattr(self, name)
            if t.dtype != torch.int64 or t.dim() != dims:
                raise ValueError(f"Grouping(): {name} is {t.dtype} with {t.dim()} axes; it needs int64 with {dims}")
        if self.row_order.numel() != k or not torch.equal(
            self.row_order.sort().values, torch.arange(k, device=self.row_order.device)
        ):
            raise ValueError(f"Grouping(): row_order is no permutation of 0 .. {k - 1}")
        if len(self.channels) != len(self.taps) or len(self.taps) == 0 or k % len(self.taps):
            raise ValueError(
                f"Grouping(): channels has {len(self.channels)} groups, taps {len(self.taps)}; "
                f"both need the same number, a divisor of K = {k}"
            )
        for name, size in (("channels", c), ("taps", r * s)):
            t = getattr(self, name)
            if t.shape[1] == 0 or (t[:, 1:] <= t[:, :-1]).any() or t[:, 0].min() < 0 or t[:, -1].max() >= size:
                raise ValueError(f"Grouping(): {name} needs rows that ascend, within 0 .. {size - 1}")
        if self.granule < 1 or c % self.granule or self.channels.shape[1] % self.granule:
            raise ValueError(f"Grouping(): granule is {self.granule}; it needs a divisor of C and of channels' width")
        runs = self.channels.view(self.groups, -1, self.granule)
        if (runs[..., :1] % self.granule != 0).any() or (runs[..., -1] - runs[..., 0] != self.granule - 1).any():
            raise ValueError(f"Grouping(): channels are not in aligned runs of granule = {self.granule}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grouping):
            return NotImplemented
        tensors = ((getattr(self, name), getattr(other, name)) for name in ("row_order", "channels", "taps"))
        same = (self.shape, self.granule) == (other.shape, other.granule)
        return same and all(a.shape == b.shape and bool((a == b.to(a.device)).all()) for a, b in tensors)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        (_, c, r, s), moved = self.shape, "" if self._in_order() else ", rows moved"
        return (
            f"Grouping({tuple(self.shape)}, {self.groups} groups of {self.rows}, channels {self.channels.shape[1]} of "
            f"{c}, taps {self.taps.shape[1]} of {r * s}, density {self.density:.4f}, coverage {self.coverage:.2f}"
            f"{moved})"
        )

    @property
    def groups(self) -> int:
        return len(self.channels)

    @property
    def rows(self) -> int:
        """Filters of a group."""
        return self.shape[0] // self.groups

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        _, c, r, s = self.shape
        return self.channels.shape[1] * self.taps.shape[1] / (c * r * s)

    @property
    def coverage(self) -> float:
        """groups * k / C: how many groups read an input channel, on average. Below 1 some channels are read by none."""
        return self.channels.numel() / self.shape[1]

    @property
    def unread(self) -> int:
        """Input channels that no group reads: at least C - groups * k, and exactly that where groups are balanced."""
        return self.shape[1] - len(self.channels.unique())

    @property
    def blocksize(self) -> tuple[int, int]:
        """(bk, bc) of the BSR form: the rows of a group or, beyond 128, their largest divisor to 128; the granule."""
        return max(d for d in range(1, min(self.rows, MAX_BLOCK_ROWS) + 1) if self.rows % d == 0), self.granule

    def _in_order(self) -> bool:
        return torch.equal(self.row_order, torch.arange(self.shape[0], device=self.row_order.device))

    def mask(self) -> Tensor:
        """bool [K, C, R, S], in filter order: the weights that are kept."""
        _, c, r, s = self.shape
        group = torch.zeros(self.groups, c, r * s, dtype=torch.bool, device=self.channels.device)
        numbers = torch.arange(self.groups, device=group.device)[:, None, None]
        group[numbers, self.channels[:, :, None], self.taps[:, None]] = True
        mask = torch.empty(self.shape, dtype=torch.bool, device=group.device)
        mask[self.row_order] = group.repeat_interleave(self.rows, 0).view(self.shape)
        return mask

    def pattern(self, blocksize: Sequence[int] | None = None) -> BSRPattern:
        """The BSR index of these groups; no zero is stored.

        Args:
            blocksize: (bk, bc); bk divides the rows of a group, bc the granule. Default: `self.blocksize`.
        """
        bk, bc = self.blocksize if blocksize is None else blocksize
        if bk < 1 or bc < 1 or self.rows % bk or self.granule % bc:
            raise ValueError(
                f"Grouping.pattern(): blocksize is {(bk, bc)}; bk needs to divide {self.rows}, the rows of a group, "
                f"and bc {self.granule}, the granule, or blocks would hold weights that are not kept"
            )
        return BSRPattern.from_mask(self.mask(), (bk, bc), self.row_order)

    def retained(self, score: Tensor) -> float:
        """sum(score kept) / sum(score), in [0, 1]; 1 where the score is zero throughout."""
        if tuple(score.shape) != tuple(self.shape):
            raise ValueError(f"Grouping.retained(): score has shape {tuple(score.shape)}; it needs {self.shape}")
        score = score.detach()
        total = score.sum(dtype=torch.float64)
        kept = score[self.mask().to(score.device)].sum(dtype=torch.float64)
        return float(kept / total) if total > 0 else 1.0

    @classmethod
    def from_mask(cls, mask: Tensor, groups: int | None = None) -> Grouping:
        """The groups of a mask that has this structure: the inverse of `mask`.

        Args:
            mask: bool [K, C, R, S].
            groups: how many; default: as few as possible (filters with equal masks are one group where all such groups
                are of one size).

        Raises:
            ValueError: filters with equal masks do not form groups of equal size, or a group does not keep
                channels x taps, or not as many of them as the others.
        """
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.numel() == 0:
            raise ValueError(
                f"Grouping.from_mask(): mask is {mask.dtype} {tuple(mask.shape)}; "
                "it needs bool [K, C, R, S], none of them 0"
            )
        k, c, r, s = mask.shape
        if groups is not None and (groups < 1 or k % groups):
            raise ValueError(f"Grouping.from_mask(): groups is {groups}; it needs a divisor of K = {k}")
        kinds, member, sizes = torch.unique(mask.reshape(k, -1), dim=0, return_inverse=True, return_counts=True)
        rows = math.gcd(*sizes.tolist()) if groups is None else k // groups
        if (sizes % rows).any():
            raise ValueError(
                f"Grouping.from_mask(): {sorted(set(sizes.tolist()))} filters have equal masks; "
                f"groups of {rows} need multiples of that"
            )
        # Filters in the order of their groups, groups in the order of their first filter.
        order = torch.argsort(member, stable=True).view(-1, rows)
        order = order[order[:, 0].argsort()]
        kept = kinds[member[order[:, 0]]].view(-1, c, r * s)
        channels, taps = kept.any(2), kept.any(1)
        if (kept != channels[:, :, None] & taps[:, None]).any():
            raise ValueError("Grouping.from_mask(): a group does not keep channels x taps: its channels differ in taps")
        lists = []
        for name, chosen in (("channels", channels), ("taps", taps)):
            counts = set(chosen.sum(1).tolist())
            if len(counts) != 1 or counts == {0}:
                raise ValueError(f"Grouping.from_mask(): groups keep {sorted(counts)} {name}; they need equally many")
            lists.append(chosen.nonzero()[:, 1].view(len(chosen), -1))
        shared = math.gcd(c, lists[0].shape[1])
        granule = max(d for d in range(1, shared + 1) if shared % d == 0 and _in_runs(channels, d))
        return cls((k, c, r, s), order.reshape(-1), lists[0], lists[1], granule)


def _in_runs(chosen: Tensor, run: int) -> bool:
    """Whether bool [groups, C] is made of aligned runs."""
    runs = chosen.view(len(chosen), -1, run)
    return bool((runs.all(2) == runs.any(2)).all())


@dataclass(frozen=True)
class GroupShape:
    """How many groups, channels and taps a layer gets: the same for every group."""

    groups: int
    channels: int
    taps: int


def _divisors(k: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(k) + 1) if k % d == 0]
    return sorted({*small, *(k // d for d in small)})


def option(default: Any, text: str) -> Any:
    """A field that is an option of the command line, too, with this help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Options of `regroup`, of the structures "hrbp" and "hrbp++", and of `python -m hrbp regroup`.

    `regroup` says what each does. groups None: as many as it takes to read every channel, see `count`. row_granule
    None: filters stay where they are.
    """

    groups: int | None = option(USUAL_GROUPS, "most groups of a layer")
    tap_density: Annotated[float, "a number in (0, 1]"] = option(1.0, "share of the taps that a group keeps")
    granule: int = option(1, "channels are kept in aligned runs of this many")
    row_granule: int | None = option(1, "filters move in aligned runs of this many")
    min_rows: int = option(USUAL_ROWS, "least filters of a group")
    balanced: bool = option(False, "every channel is kept by equally many groups, give or take one")
    method: str = option("assign", "assign: keeps the most; paper: Algorithm 1 of HRBP alone")

    def size(self, shape: Sequence[int], sparsity: float) -> GroupShape:
        """The number and size of the groups that `regroup` makes, from the layer's shape alone.

        groups    see `count`
        taps      max(1, round(R*S * tap_density)); where more than that is kept of the layer,
                  ceil(R*S * (1 - sparsity))
        channels  granule * max(1, round(C * (1 - sparsity) / (tap_density * granule))), at most C; tap_density is that
                  of the taps where they were raised or the kernel is 1x1

        Raises:
            ValueError: a number out of its range, or a granule that does not divide.
        """
        who = "regroup()"
        if self.method not in RULES:
            raise ValueError(f"{who}: method is {self.method!r}; it needs {' or '.join(map(repr, RULES))}")
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"{who}: score has shape {tuple(shape)}; it needs [K, C, R, S], none of them 0")
        k, c, r, s = shape
        check_sparsity(sparsity, who)
        value: Any = self.tap_density
        if not isinstance(value, Real) or not 0 < self.tap_density <= 1:
            raise ValueError(f"{who}: tap_density is {value!r}; it needs a number in (0, 1]")
        for name in ("groups", "granule", "row_granule", "min_rows"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                if name in ("groups", "row_granule") and value is None:
                    continue
                raise ValueError(f"{who}: {name} is {value!r}; it needs a positive integer")
        granule, row_granule, tap_density = self.granule, self.row_granule or 1, self.tap_density
        if c % granule:
            raise ValueError(f"{who}: granule is {granule}; it needs a divisor of C = {c} (1 takes any C)")
        if k % row_granule:
            raise ValueError(f"{who}: row_granule is {row_granule}; it needs a divisor of K = {k} (1 takes any K)")
        density = 1 - sparsity
        taps = max(1, round(r * s * tap_density))
        if density > tap_density:
            taps = min(r * s, math.ceil(r * s * density - 1e-9))
        if density > tap_density or r * s == 1:
            tap_density = taps / (r * s)
        channels = min(c, granule * max(1, round(c * density / (tap_density * granule))))
        return GroupShape(self.count(shape, channels), channels, taps)

    def count(self, shape: Sequence[int], channels: int) -> int:
        """The number of groups of a layer [K, C, R, S] that keep `channels` each.

        The largest t <= groups with K % t = 0, K/t >= min_rows and K/t % row_granule = 0; else 1. With groups None as
        many as the default of 8 groups of 8 filters or more gives or, where these read fewer than all channels, the
        least t that covers them, t * channels >= C; the most there are where none does.
        """
        k, c = shape[:2]
        fits = [t for t in _divisors(k) if k // t >= self.min_rows and k // t % (self.row_granule or 1) == 0] or [1]
        most = USUAL_GROUPS if self.groups is None else self.groups
        rows = USUAL_ROWS if self.groups is None else 1
        usual = max((t for t in fits if t <= most and k // t >= rows), default=1)
        if self.groups is not None or usual * channels >= c:
            return usual
        return next((t for t in fits if t * channels >= c), fits[-1])

    def moved_rows(self, shape: Sequence[int], sparsity: float = 0.0) -> int:
        """Filters move in runs of this many: of whole groups where they stay where they are."""
        return self.row_granule or shape[0] // self.size(shape, sparsity).groups
