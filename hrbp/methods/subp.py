"""Soft uniform block pruning: which 1xN blocks of a dense weight take part in an epoch.

A block is n filters and one input channel, all taps: a weight [K, C, R, S] is K/n rows of C blocks. Every update ranks
the blocks of each row, drops the int(P * C) worst, and draws int((P - p) * C) of these back, good ones more likely.
While p rises from 0 to P, ever fewer come back, and at p = P the ranking alone decides. Rows keep equally many.

Source: Xiang et al., SUBP: Soft Uniform Block Pruning for 1xN Sparse CNNs Multithreading Acceleration, NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..structures.base import Selection, Structure
from ..structures.selection import top
from .arriving import Arriving
from .base import Moment
from .decay import Decay
from .options import NOT_NEGATIVE, POSITIVE, SHARE, WHO, Decaying, Seeded, one_of, option

SCORES = ("bpar", "l1", "l2")
RANKS = ("all", "live")  # the paper's text; its released code, which scores weight * mask
CHUNK_CELLS = 16_000_000  # of the matrices of cosines made at a time
EXPONENTIAL = 0.05  # rate of the exponential pace, an epoch

# How far the pruning is at a share of its time, both in [0, 1]; epochs: the whole time.
PACES: dict[str, Callable[[float, float], float]] = {
    "cubic": lambda share, epochs: share**3,
    "linear": lambda share, epochs: share,
    "cosine": lambda share, epochs: 1 - math.cos(math.pi / 2 * share),
    "exponential": lambda share, epochs: math.expm1(-EXPONENTIAL * epochs * share) / math.expm1(-EXPONENTIAL * epochs),
}


@dataclass(frozen=True)
class SUBP(Seeded, Decaying, Arriving):
    """soft uniform block pruning of 1xn blocks (Xiang et al., NeurIPS 2023)

    Every n filters drop their worst blocks, equally many, and draw some of them back, ever fewer, as the sparsity rises
    from 0 at `begin` to that of `sparsify` at `until`. What is left out learns on and decays, as with "sr-ste". In its
    paper an update comes every epoch, and densities are uniform; an epoch is here what lies between two updates.

    Source: Xiang et al., SUBP: Soft Uniform Block Pruning for 1xN Sparse CNNs Multithreading Acceleration, NeurIPS
    2023.
    """

    name = "subp"
    place = 70
    dense_weights = True
    begins_dense = True
    distribution = "uniform"
    by_epoch = True

    score: str = option("bpar", f"what a block is worth ({', '.join(SCORES)})", one_of(SCORES))  # see `block_scores`
    alpha: float = option(1.0, "of bpar: what angular redundancy counts for", NOT_NEGATIVE)
    tau: float = option(1.0, "temperature of the draw", POSITIVE)  # see `regrown`
    pace: str = option("cubic", f"how the pruned share rises ({', '.join(PACES)})", one_of(PACES))  # see `pruned_share`
    ranks: str = option(
        "all", f"which weights the score is of: all, or the live ones, so that what is out returns by the draw alone"
        f" ({', '.join(RANKS)})", one_of(RANKS),
    )  # fmt: skip
    begin: float = option(0.0, "share of the training before which every block takes part", SHARE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin > self.until:
            raise ValueError(f"{WHO}: begin is {self.begin} and until {self.until}; it needs begin <= until")

    @classmethod
    def refuses(cls, rule: Structure) -> str | None:
        if rule.uniform_rows is not None:
            return None
        return f"method {cls.name!r} trains uniform 1xn blocks; it needs structure '1xn' with uniform=True"

    @classmethod
    def structure_options(cls, structure: str) -> dict[str, Any]:
        return {"uniform": True} if structure == "1xn" else {}

    def attach(self, model: nn.Module, now: Moment, optimizer: torch.optim.Optimizer) -> object:
        return Decay(model, now.layers.values(), optimizer, self.decay)

    def selections(self, now: Moment) -> dict[str, Selection]:
        selections = {}
        n, epoch, epochs = now.record.structure.uniform_rows, now.step / self.every, now.total_steps / self.every
        assert n is not None
        begin, end = self.begin * epochs, self.until * epochs
        arrived = now.step >= self.arrives(now.total_steps)
        for i, name, layer in now.indexed():
            sparsity, order = now.record.target[name], layer.row_order()
            pruned = sparsity if arrived else pruned_share(epoch, begin, end, sparsity, self.pace)
            weight = layer.parameter.detach().view(layer.shape)
            if self.ranks == "live":
                weight = weight * layer.mask()
            scores = block_scores(weight, n, self.score, self.alpha, order)
            kept = kept_blocks(scores, sparsity, pruned, now.generator(self.seed, i), self.tau)
            selections[name] = now.rule(layer).of_rows(kept, layer.shape, order)
        return selections


def block_scores(
    weight: Tensor, n: int, score: str = "bpar", alpha: float = 1.0, row_order: Tensor | None = None
) -> Tensor:
    """What each 1xN block is worth among those of its row.

        l1    |b|_1
        l2    |b|_2
        bpar  |b|_1 / sum |b|_1 - alpha * a / sum a,   a_i = sum over j of |cos(b_i, b_j)|, j = i included

    The sums are over the blocks of a row. A block of zeros has no angle: it counts as wholly redundant, a / sum a = 1,
    which ranks it last.

    Args:
        weight: [K, C, R, S], finite, of any floating dtype; computed in float32 at least, on its device.
        n: filters of a block, a divisor of K.
        score: "bpar", "l1" or "l2".
        alpha: what angular redundancy counts for.
        row_order: int [K], the filters in the order in which n neighbours make a block; default: as they are.

    Returns:
        [K/n, C].

    Raises:
        ValueError: an argument out of range, or a weight that is not finite.
    """
    if score not in SCORES:
        raise ValueError(f"block_scores(): score is {score!r}; it needs one of {', '.join(SCORES)}")
    blocks = _blocks(weight, n, row_order)
    l1 = blocks.abs().sum(2)
    if not bool(torch.isfinite(l1).all()):
        raise ValueError("block_scores(): weight holds NaN or infinity, or sums overflow; it needs finite numbers")
    if score == "l1":
        return l1
    if score == "l2":
        return torch.linalg.vector_norm(blocks, dim=2)
    return _shares(l1) - alpha * torch.where(l1 > 0, _shares(_redundancy(blocks)), 1.0)


def pruned_share(epoch: float, begin: float, end: float, sparsity: float, pace: str = "cubic") -> float:
    """The share p of blocks that stays away in an epoch.

        p = P * f(clip((epoch - begin) / (end - begin), 0, 1))
        f(x): cubic x^3, linear x, cosine 1 - cos(pi/2 * x), exponential (1 - e^(-0.05 T x)) / (1 - e^(-0.05 T))

    Args:
        epoch: from 0 on.
        begin, end: epochs in which pruning begins and is complete; T = end - begin. Where they are equal, p jumps to P.
        sparsity: P, in [0, 1).
        pace: "cubic", "linear", "cosine" or "exponential".
    """
    if pace not in PACES:
        raise ValueError(f"pruned_share(): pace is {pace!r}; it needs one of {', '.join(PACES)}")
    if not 0 <= begin <= end:
        raise ValueError(f"pruned_share(): begin is {begin} and end {end}; it needs 0 <= begin <= end")
    if epoch >= end:
        return sparsity
    if epoch <= begin:
        return 0.0
    return sparsity * PACES[pace]((epoch - begin) / (end - begin), end - begin)


def counts(channels: int, sparsity: float, pruned: float) -> tuple[int, int]:
    """(int(P * C), int((P - p) * C)): of each row, the blocks that are dropped, and those of them that come back."""
    if not 0 <= pruned <= sparsity < 1:
        raise ValueError(f"counts(): pruned is {pruned} and sparsity {sparsity}; it needs 0 <= pruned <= sparsity < 1")
    dropped = min(int(sparsity * channels), channels - 1)  # rounding might take the last one
    return dropped, min(int((sparsity - pruned) * channels), dropped)


def regrown(scores: Tensor, dropped: Tensor, count: int, generator: torch.Generator, tau: float = 1.0) -> Tensor:
    """`count` of the dropped blocks of every row, drawn without replacement.

        first draw ~ softmax(s / |s|_2 / tau) over the dropped blocks of a row, s their scores; the next ones likewise
        among those that are left

    Drawn by keys log p - log E with E ~ Exp(1), whose largest are such a draw (Efraimidis and Spirakis, Weighted random
    sampling with a reservoir, 2006).

    Args:
        scores: [rows, C], on any device.
        dropped: bool [rows, C], at least `count` in every row.
        count: of each row.
        generator: on the CPU, so that all devices and ranks draw alike.
        tau: temperature; higher is more even.

    Returns:
        bool [rows, C].
    """
    if tau <= 0:
        raise ValueError(f"regrown(): tau is {tau}; it needs a number > 0")
    mine = scores.double().masked_fill(~dropped, 0.0)
    logits = torch.nn.functional.normalize(mine, dim=1, eps=torch.finfo(mine.dtype).tiny) / tau
    waits = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=generator)
    return top((logits - waits.to(scores.device).log()).masked_fill(~dropped, -math.inf), count)


def kept_blocks(scores: Tensor, sparsity: float, pruned: float, generator: torch.Generator, tau: float = 1.0) -> Tensor:
    """The blocks that take part: bool [rows, C], equally many in every row.

    Args:
        scores: [rows, C], see `block_scores`; among equals the first ones are kept.
        sparsity, pruned: P and p, see `counts`.
        generator, tau: see `regrown`.
    """
    channels = scores.shape[1]
    drop, regrow = counts(channels, sparsity, pruned)
    kept = top(scores, channels - drop)
    return kept | regrown(scores, ~kept, regrow, generator, tau)


# ---------------------------------------------------------------------- parts of the scores


def _blocks(weight: Tensor, n: int, row_order: Tensor | None) -> Tensor:
    """[K/n, C, n*R*S]: the weights of each block, in float32 at least."""
    if weight.dim() != 4 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"block_scores(): weight is {tuple(weight.shape)} {weight.dtype}; it needs floats [K, C, R, S], none 0"
        )
    k, c = weight.shape[:2]
    if n < 1 or k % n:
        raise ValueError(f"block_scores(): n is {n}; it needs a divisor of K = {k}")
    cells = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if row_order is not None:
        cells = cells[row_order.long()]
    return cells.reshape(k // n, n, c, -1).transpose(1, 2).flatten(2)


def _shares(value: Tensor) -> Tensor:
    """Of the sum of each row; zeros where that is 0."""
    total = value.sum(1, keepdim=True)
    return value / torch.where(total > 0, total, 1.0)


def _redundancy(blocks: Tensor) -> Tensor:
    """a [rows, C] of blocks [rows, C, cells]; 0 for blocks of zeros."""
    largest = blocks.abs().amax(2, keepdim=True)
    unit = blocks / torch.where(largest > 0, largest, 1.0)  # squares of small weights would vanish
    unit = unit / torch.where(largest > 0, unit.norm(dim=2, keepdim=True), 1.0)
    rows = max(1, CHUNK_CELLS // blocks.shape[1] ** 2)
    return torch.cat([(part @ part.transpose(1, 2)).abs_().sum(2) for part in unit.split(rows)])
