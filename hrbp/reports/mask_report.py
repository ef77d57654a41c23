"""Measures of a mask: density, score, storage, memory references, balance, dense rectangles in dgrad."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..formats.packed import file_index_bytes
from ..structures.base import Selection
from ..structures.recognise import describe, grain, n_m_ratio, recognise
from .dgrad import dgrad_fill, dgrad_ratio
from .score import Score, score_of
from .stream import References, Stream, stream

INDEX_BYTES = 4  # int32
LANES = 8  # filters, or input channels, that one processor works on


class Storage(NamedTuple):
    """Bytes. `model` are those of Mao et al., the others those of this library."""

    model: float  # records of value_bits for a weight and index_bits for an index, with fillers: see `Stream`
    model_dense: float  # all weights of value_bits, no index
    dense: int  # all weights in the dtype
    values: int  # stored blocks in the dtype
    memory_index: int  # of the tables in memory
    file_index: int  # as `hrbp.save` writes it: indptr, indices, row_order, shape; of single weights a bit a weight


@dataclass(frozen=True)
class MaskReport:
    """The measures of a mask.

    shape           (K, C, R, S)
    structure       in words
    grain           the largest aligned box (k, c, r, s), filters in BSR row order, that is kept or dropped whole
    kept, stored    weights: True cells of the mask; cells of the stored blocks
    score           None: no score was given
    references      memory references for one output pixel of all filters: see `Stream`
    row_balance     most weights of a filter / mean; 1 is even, and what a mask that keeps nothing has
    column_balance  likewise of an input channel
    fprop_balance   likewise of 8 neighbouring filters in BSR row order, which compute outputs
    dgrad_balance   likewise of 8 neighbouring input channels, whose input gradients are computed
    dgrad_fill      see `dgrad_fill`
    dgrad_ratio     of an n:m mask: what `dgrad_ratio` says; else None
    coverage        of groups: see `Grouping.coverage`; else None
    unread          input channels that no filter reads, of so many `channels`
    """

    shape: tuple[int, int, int, int]
    structure: str
    grain: tuple[int, int, int, int]
    kept: int
    stored: int
    score: Score | None
    storage: Storage
    references: References
    row_balance: float
    column_balance: float
    fprop_balance: float
    dgrad_balance: float
    dgrad_fill: float
    dgrad_ratio: str | None
    coverage: float | None
    unread: int
    channels: int

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        return self.kept / math.prod(self.shape)


def report_mask(
    mask: Tensor | Selection,
    score: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    value_bits: int = 8,
    index_bits: int = 4,
    seed: int = 0,
) -> MaskReport:
    """Measure a mask: what it keeps, storage, memory references, balance.

    Storage is counted twice. The model of Mao et al. is a stream of records, each with an index and the weights of one
    grain; references are those of a machine that reads it, for one output pixel of all filters: see `Stream`. The bytes
    of this library are those of the BSR form: values in `dtype`, int32 tables, of single weights in blocks of (1, 1). A
    mask that keeps everything is counted as a plain tensor, without an index.

    Efficacy compares with groups of random rows of the same shape, the mean of 5 draws, each with its best channels and
    taps.

    Args:
        mask: bool [K, C, R, S], [K, C, S] or [K, C], whose structure is recognised; or a Selection.
        score: of the mask's shape, finite and >= 0, floating point or bool. Default: no score is reported.
        dtype: of the stored values.
        value_bits, index_bits: of the model; the defaults are those of its source.
        seed: of the random groups.

    Raises:
        ValueError, TypeError: an invalid mask or score; the message says why.

    Source: Mao et al., Exploring the Regularity of Sparse Structure in Convolutional Neural Networks (2017), for the
    storage and for references that coarse grains merge.
    """
    dense = isinstance(mask, Tensor) and bool(mask.all())
    choice, box, read = records(mask, index_bits)
    mask, (k, c, r, s) = choice.mask, choice.mask.shape
    kept, cells = int(mask.sum()), mask.numel()
    pattern = None if dense else choice.pattern()
    stored = cells if pattern is None else pattern.nnzb * math.prod(pattern.blocksize)
    index = pattern.index.numel() if pattern else 0
    order = None if pattern is None else pattern.row_order
    in_rows = mask if order is None else mask[order.long()]
    of_channels = mask.view(choice.groups, -1, c, r, s).sum((1, 3, 4)).flatten()  # groups have channels of their own
    item, words = dtype.itemsize, describe(choice)
    ratio = n_m_ratio(mask)
    return MaskReport(
        shape=(k, c, r, s),
        structure=words,
        grain=box,
        kept=kept,
        stored=stored,
        score=None if score is None else score_of(choice, score, seed),
        storage=Storage(
            model=read.bits(value_bits) / 8,
            model_dense=cells * value_bits / 8,
            dense=cells * item,
            values=stored * item,
            memory_index=index * INDEX_BYTES,
            file_index=0 if pattern is None else file_index_bytes(pattern),
        ),
        references=read.references(),
        row_balance=_balance(mask.sum((1, 2, 3))),
        column_balance=_balance(of_channels),
        fprop_balance=_balance(_by_lanes(in_rows.sum((1, 2, 3)))),
        dgrad_balance=_balance(_by_lanes(of_channels)),
        dgrad_fill=dgrad_fill(choice),
        dgrad_ratio=dgrad_ratio(mask, *ratio, choice.groups)
        if ratio is not None and words == f"{ratio[0]}:{ratio[1]}"
        else None,
        coverage=None if choice.grouping is None else choice.grouping.coverage / choice.groups,
        unread=int((of_channels == 0).sum()),
        channels=of_channels.numel(),
    )


# ---------------------------------------------------------------------- cost


def records(mask: Tensor | Selection, index_bits: int = 4) -> tuple[Selection, tuple[int, int, int, int], Stream]:
    """A mask as it is stored and read: its structure, the grain (k, c, r, s), and the stream of its records."""
    dense = isinstance(mask, Tensor) and bool(mask.all())
    choice = recognise(mask) if isinstance(mask, Tensor) else mask
    order = choice.row_order
    bk, c, r, s = grain(choice.mask if order is None else choice.mask[order.long()])
    box = (math.gcd(bk, len(choice.mask) // choice.groups), c, r, s)
    if dense:
        return choice, box, _dense_stream(choice)
    moved = order is not None and not torch.equal(order.long().cpu(), torch.arange(len(choice.mask)))
    return choice, box, stream(choice, box, None if moved else _run(choice, box), index_bits)


def _dense_stream(choice: Selection) -> Stream:
    """One record that needs no index."""
    k, c, r, s = choice.mask.shape
    return Stream(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool), k * c * r * s, c * r * s, k, 0)


def _run(choice: Selection, box: tuple[int, int, int, int]) -> int | None:
    """The m of an n:m mask."""
    ratio = n_m_ratio(choice.mask) if choice.grouping is None and box == (1, 1, 1, 1) else None
    return None if ratio is None else ratio[1]


def _by_lanes(counts: Tensor) -> Tensor:
    """Sums of LANES neighbours, the last ones of the rest."""
    return nn.functional.pad(counts, (0, -len(counts) % LANES)).view(-1, LANES).sum(1)


def _balance(counts: Tensor) -> float:
    """Largest / mean."""
    return float(counts.max() / counts.double().mean()) if counts.any() else 1.0
