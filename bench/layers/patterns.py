"""Which weights are stored: random blocks, or equal groups of filters that share channels and taps (HRBP)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

import blocksparse as bs

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Structure:
    """How blocks are laid out. name: "block" (random) or "hrbp" (equal groups), which the other fields describe."""

    name: str = "block"
    groups: int = 8
    tap_density: Fraction = Fraction(1)
    min_rows: int = 8


@dataclass(frozen=True)
class Blocksize:
    """bk x bc; bk None stands for 'group': all filters of a group are one block-row."""

    bk: int | None
    bc: int

    def __str__(self) -> str:
        if self.bk is None:
            return "group" if self.bc == 1 else f"groupx{self.bc}"
        return f"{self.bk}x{self.bc}"


def parse_blocksize(text: str) -> Blocksize:
    """'32x32', '32,32', 'group' (K/8 x 1) or 'groupx8'; ValueError for anything else."""
    match = re.fullmatch(r"(\d+)[x,](\d+)|group(?:[x,](\d+))?", text.replace(" ", ""))
    if match is None:
        raise ValueError(f"blocksize {text!r}: it needs BKxBC (32x32, 16x8), group or groupxBC (groupx8)")
    bk, bc, group_bc = match.groups()
    block = Blocksize(int(bk), int(bc)) if bk else Blocksize(None, int(group_bc or 1))
    if block.bc < 1 or (block.bk is not None and block.bk < 1):
        raise ValueError(f"blocksize {text!r}: both sizes need to be at least 1")
    return block


def build(
    shape: Shape, block: Blocksize, structure: Structure, sparsity: float, generator: torch.Generator
) -> bs.BSRPattern:
    """The pattern of one filter bank; it stores one block at least.

    Raises:
        ValueError: the blocksize does not divide (K, C), or the filters of a group.
    """
    if block.bk is not None and structure.name == "block":
        blocks = math.prod(shape) / (block.bk * block.bc)
        return bs.BSRPattern.random(shape, (block.bk, block.bc), max(1 - sparsity, 1 / blocks), generator)
    taps = structure.tap_density if structure.name == "hrbp" else Fraction(1)
    groups = groups_used(shape[0], structure.groups, structure.min_rows)
    bk = block.bk or shape[0] // groups
    if (shape[0] // groups) % bk:
        raise ValueError(f"{bk} filters of a block do not divide the {shape[0] // groups} filters of a group")
    mask = equal_groups(shape, sparsity, groups, taps, block.bc, generator)
    return bs.BSRPattern.from_mask(mask, (bk, block.bc))


def groups_used(filters: int, groups: int, min_rows: int = 8) -> int:
    """The largest number of groups, at most `groups`, that divides `filters` into `min_rows` or more (else 1)."""
    fits = (t for t in range(min(groups, filters), 0, -1) if filters % t == 0 and filters // t >= min_rows)
    return next(fits, 1)


def equal_groups(
    shape: Shape,
    sparsity: float,
    groups: int,
    tap_density: Fraction,
    granule: int,
    generator: torch.Generator,
) -> Tensor:
    """bool [K, C, R, S]: each group of consecutive filters keeps equally many random channels and taps.

    Channels are chosen in aligned runs of `granule`. Their share makes up for the share of taps, so that density
    is as near 1 - sparsity as whole runs allow.
    """
    k, c, r, s = shape
    if k % groups or c % granule:
        raise ValueError(f"{groups} groups and runs of {granule} channels do not divide (K, C) = {(k, c)}")
    taps = max(1, round(r * s * tap_density))
    wanted = c * (1 - sparsity) / (granule * taps / (r * s))
    runs = min(c // granule, max(1, round(wanted)))
    mask = torch.zeros((groups, c // granule, r * s), dtype=torch.bool)
    for group in mask:
        kept_runs = torch.randperm(c // granule, generator=generator)[:runs]
        kept_taps = torch.randperm(r * s, generator=generator)[:taps]
        group[kept_runs[:, None], kept_taps] = True
    mask = mask.repeat_interleave(granule, dim=1).repeat_interleave(k // groups, dim=0)
    return mask.view(k, c, r, s)
