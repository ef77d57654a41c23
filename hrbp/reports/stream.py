"""A mask as a stream of records with relative indices: its size in a compressed file, its memory references."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..structures.base import Selection


class References(NamedTuple):
    """Memory references that one output pixel of all filters needs; see `Stream`."""

    values: int
    indices: int
    inputs: int
    sums: int


@dataclass(frozen=True, eq=False)
class Stream:
    """The records of one layer, in the order in which they are stored and read.

    A record has an index and the weights of one grain: a box of the filter bank, or one input channel of a group with
    the taps of that group. The index, of `index_bits`, is the number of grains skipped since the record before. Where
    more are skipped than it can hold, a filler record is inserted: a grain of zeros, with an index and weights like any
    other.

    The modelled machine has registers for one grain. For every output pixel and record it reads the index, the weights
    and the inputs that they multiply, sums up the products of each filter, and writes these partial sums: the weights
    of a grain share one index, its filters share the inputs, and its weights of one filter share a partial sum. The
    channels of a group are a dense rectangle and share the partial sums, too. Fillers are read like other records. A
    filter that was moved needs one more index, and a group without all taps the indices of its taps.

    gaps        int64 [n], the indices of the records
    fillers     bool [n]
    weights     of a record
    inputs      of a record, for one output pixel
    sums        partial sums written for one output pixel, all records together
    index_bits  of a record
    list_bits   of the lists that stand before the records: which taps a group has, which block-row or group a filter
    lists       entries of these lists

    Source: Mao et al., Exploring the Regularity of Sparse Structure in Convolutional Neural Networks (2017), for 8-bit
    weights and 4-bit relative indices, one for each grain; Han et al., Deep Compression (2016), for the filler zeros.
    """

    gaps: Tensor
    fillers: Tensor
    weights: int
    inputs: int
    sums: int
    index_bits: int
    list_bits: int = 0
    lists: int = 0

    def bits(self, value_bits: int = 8) -> int:
        """Size of records and lists."""
        return len(self.gaps) * (self.index_bits + self.weights * value_bits) + self.list_bits

    def references(self) -> References:
        """Memory references of the modelled machine for one output pixel of all filters."""
        n = len(self.gaps)
        indices = n if self.index_bits else 0
        return References(n * self.weights, indices + self.lists, n * self.inputs, self.sums)


def stream(choice: Selection, box: tuple[int, int, int, int], m: int | None = None, index_bits: int = 4) -> Stream:
    """The records of a mask.

    Args:
        choice: what is kept. With a grouping its groups are what counts, else the boxes.
        box: the grain (k, c, r, s), aligned, filters in BSR row order; the mask keeps or drops each one whole. Grains
            are numbered row by row over [K/k, C/c, R/r, S/s], the channels of groups over [groups, C].
        m: every m neighbouring channels keep equally many single weights, whose indices are places among these m.
        index_bits: of relative indices.
    """
    k, c, r, s = choice.mask.shape
    groups, order = choice.grouping, choice.row_order
    rows = groups.rows if groups is not None else box[0]
    place_bits = 0  # of the block-row or group of a filter, which is told where filters were moved
    if order is not None and not torch.equal(order.long().cpu(), torch.arange(k)):
        place_bits = _bits(k // rows)
    lists = k if place_bits else 0
    if groups is not None:
        kept = torch.zeros(groups.groups, c, dtype=torch.bool).scatter_(1, groups.channels.cpu().long(), True)
        gaps, fillers = _relative(kept.flatten(), index_bits)
        taps, some = groups.taps.shape[1], groups.taps.shape[1] < r * s
        return Stream(
            gaps, fillers, rows * taps, taps, k, index_bits,
            list_bits=k * place_bits + groups.groups * r * s * some, lists=lists + groups.groups * taps * some,
        )  # fmt: skip
    if m is not None:
        places = choice.mask.view(k, c // m, m, r * s).transpose(2, 3).nonzero()[:, -1].cpu()
        return Stream(places, torch.zeros_like(places, dtype=torch.bool), 1, 1, len(places), _bits(m))
    mask = choice.mask if order is None else choice.mask[order.long()]
    _, bc, br, bs = box
    gaps, fillers = _relative(mask[::rows, ::bc, ::br, ::bs].flatten().cpu(), index_bits)
    return Stream(
        gaps, fillers, math.prod(box), bc * br * bs, len(gaps) * rows, index_bits, list_bits=k * place_bits, lists=lists
    )


def _relative(kept: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept ones among bool [cells], and which of them are fillers."""
    reach = 1 << bits  # a record with its index of all ones stands this far behind the one before
    at = kept.nonzero()[:, 0]
    passed = torch.diff(at, prepend=at.new_tensor([-1])) - 1
    before = passed // reach  # fillers in front of each record
    first = before.cumsum(0) + torch.arange(len(at))
    gaps = torch.full((len(at) + int(before.sum()),), reach - 1)
    fillers = torch.ones_like(gaps, dtype=torch.bool)
    gaps[first], fillers[first] = passed % reach, False
    return gaps, fillers


def _bits(count: int) -> int:
    """Of a number below `count`."""
    return (count - 1).bit_length()
