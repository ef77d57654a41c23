"""What a mask costs and keeps: density, score, storage, memory references, balance, dense rectangles in dgrad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blocksparse import BSRConv2d, BSRLinear, BSRPattern

from ..layers.master import MasterConv2d, MasterLinear
from ..structures.registry import Choice
from ..structures.regrouping import Grouping
from ..structures.selection import check_score, top
from ..surgery.conversion import MaskedConv2d, MaskedLinear
from .stream import References, Stream, stream

RANDOM_DRAWS = 5  # random groupings that stand for chance
INDEX_BYTES = 4  # int32
CHANCE = 0.01  # share of zeros that a trained weight may have without a structure
LANES = 8  # filters, or input channels, that one processor works on


class Score(NamedTuple):
    """Sums of a layer's score."""

    total: float
    kept: float
    unstructured: float  # of as many single weights as are kept, the best ones
    random: float | None  # of groups of random rows; None: the mask has no groups

    @property
    def retained(self) -> float:
        """Share of the total; 1 where that is 0."""
        return self.kept / self.total if self.total else 1.0

    @property
    def of_unstructured(self) -> float:
        """Share of what single weights keep; 1 where that is 0."""
        return self.kept / self.unstructured if self.unstructured else 1.0

    @property
    def efficacy(self) -> float | None:
        """(kept - random) / (unstructured - random): 0 is chance, 1 what no structure passes; None: without groups."""
        if self.random is None or self.unstructured <= self.random:
            return None
        return (self.kept - self.random) / (self.unstructured - self.random)


class Storage(NamedTuple):
    """Bytes. `model` are those of Mao et al., the others those of this library."""

    model: float  # records of value_bits for a weight and index_bits for an index, with fillers: see `Stream`
    model_dense: float  # all weights of value_bits, no index
    dense: int  # all weights in the dtype
    values: int  # stored blocks in the dtype; of a masked layer what it keeps
    memory_index: int  # of the tables in memory; of a masked layer its mask and its zeros
    file_index: int  # of indptr, indices and row_order, which `hrbp.save` writes; of a masked layer a bit a weight


@dataclass(frozen=True)
class MaskReport:
    """What `report_mask` found.

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

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        return self.kept / math.prod(self.shape)


def report_mask(
    mask: Tensor | Choice,
    score: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    value_bits: int = 8,
    index_bits: int = 4,
    seed: int = 0,
) -> MaskReport:
    """What a mask keeps, what it costs to store and to read, and how evenly it is spread.

    Storage is counted twice. The model of Mao et al. is a stream of records, each with an index and the weights of one
    grain; references are those of a machine that reads it, for one output pixel of all filters: see `Stream`. The bytes
    of this library are those of the BSR form: values in `dtype`, int32 tables. A mask whose structure has no BSR form
    is counted in blocks of its grain, single weights in (1, 1); a dense one as a plain tensor, without an index.

    Efficacy compares with groups of random rows of the same shape, the mean of 5 draws, each with its best channels and
    taps.

    Args:
        mask: bool [K, C, R, S] or [K, C], whose structure is recognised; or a Choice, which tells it.
        score: of the mask's shape, finite and >= 0, floating point or bool. Default: nothing is said of scores.
        dtype: of the stored values.
        value_bits, index_bits: of the model; the defaults are those of its source.
        seed: of the random groups.

    Raises:
        ValueError, TypeError: a mask or a score that is none; the message says why.

    Source: Mao et al., Exploring the Regularity of Sparse Structure in Convolutional Neural Networks (2017), for the
    storage and for references that coarse grains merge.
    """
    choice = recognise(mask) if isinstance(mask, Tensor) else mask
    mask, (k, c, r, s) = choice.mask, choice.mask.shape
    box = grain(mask if choice.row_order is None else mask[choice.row_order.long()])
    kept, cells = int(mask.sum()), mask.numel()
    dense = kept == cells and choice.blocksize is None
    pattern = None if dense else BSRPattern.from_mask(mask, choice.blocksize or box[:2], choice.row_order)
    stored = cells if pattern is None else pattern.nnzb * math.prod(pattern.blocksize)
    index = pattern.index.numel() if pattern else 0
    file_index = pattern.indptr.numel() + pattern.nnzb if pattern else 0
    moved = k if pattern is not None and pattern.row_order is not None else 0
    read = _dense_stream(choice) if dense else stream(choice, box, None if moved else _run(choice, box), index_bits)
    in_rows = mask if pattern is None or pattern.row_order is None else mask[pattern.row_order.long()]
    item, words = dtype.itemsize, describe(choice)
    ratio = _ratio(mask)
    return MaskReport(
        shape=(k, c, r, s),
        structure=words,
        grain=box,
        kept=kept,
        stored=stored,
        score=None if score is None else _score(choice, score, seed),
        storage=Storage(
            model=read.bits(value_bits) / 8,
            model_dense=cells * value_bits / 8,
            dense=cells * item,
            values=stored * item,
            memory_index=index * INDEX_BYTES,
            file_index=(file_index + moved) * INDEX_BYTES,
        ),
        references=read.references(),
        row_balance=_balance(mask.sum((1, 2, 3))),
        column_balance=_balance(mask.sum((0, 2, 3))),
        fprop_balance=_balance(_by_lanes(in_rows.sum((1, 2, 3)))),
        dgrad_balance=_balance(_by_lanes(mask.sum((0, 2, 3)))),
        dgrad_fill=dgrad_fill(choice),
        dgrad_ratio=dgrad_ratio(mask, *ratio) if ratio is not None and words == f"{ratio[0]}:{ratio[1]}" else None,
    )


def report_model(
    model: nn.Module | Mapping[str, Tensor | Choice],
    scores: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, MaskReport]:
    """`report_mask` of every layer, by name.

    Args:
        model: a module, whose BSRConv2d and BSRLinear keep their stored blocks, whose masked layers their mask and
            whose other Conv2d and Linear what is not zero in their weight (see `kept_of`); those with a dense master
            weight are told of as `release` would leave them; or layer name -> mask (bool), weight (likewise) or Choice.
        scores: layer name -> score, for some layers or all.
        dtype: of the stored values; default: that of each weight, float32 for masks.
        seed: of the random groups that efficacy compares with.

    Raises:
        ValueError: a score whose layer there is not, and as in `report_mask`.
    """
    layers = _layers_of(model) if isinstance(model, nn.Module) else {name: (t, None) for name, t in model.items()}
    scores = scores or {}
    if unknown := sorted(set(scores) - set(layers)):
        raise ValueError(f"report_model(): scores has {', '.join(unknown)}; the layers are {', '.join(layers)}")
    reports = {}
    for name, (layer, own) in layers.items():
        if isinstance(layer, Tensor) and layer.dtype != torch.bool:
            layer, own = kept_of(layer), layer.dtype
        reports[name] = report_mask(layer, scores.get(name), dtype=dtype or own or torch.float32, seed=seed)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        master = isinstance(module, MasterConv2d | MasterLinear) and module.blocksize is None
        if isinstance(module, MaskedConv2d | MaskedLinear) or master:
            reports[name] = under_a_mask(reports[name])
    return reports


def under_a_mask(report: MaskReport) -> MaskReport:
    """The same, stored as a mask over a dense weight, in the file as what it keeps and a bit a weight."""
    cells, dense = math.prod(report.shape), report.storage.dense
    values = report.kept * (dense // cells)
    index = {"memory_index": dense - values + cells, "file_index": -(-cells // 8)}
    return replace(report, storage=report.storage._replace(values=values, **index))


def _layers_of(model: nn.Module) -> dict[str, tuple[Tensor | Choice, torch.dtype | None]]:
    """Mask or weight of each layer, and the dtype of its stored values."""
    found: dict[str, tuple[Tensor | Choice, torch.dtype | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BSRConv2d | BSRLinear):
            found[name] = stored_blocks(module.pattern), module.values.dtype
        elif isinstance(module, MasterConv2d | MasterLinear):
            own = module.live() if module.blocksize is None else stored_blocks(module.pattern)
            found[name] = own, module.weight.dtype
        elif isinstance(module, nn.Conv2d | nn.Linear):
            mask = getattr(module, "mask", None)
            found[name] = (module.weight.detach() if mask is None else mask, module.weight.dtype)
    return found


# ---------------------------------------------------------------------- which structure a mask has


def kept_of(weight: Tensor) -> Tensor:
    """bool, of the weight's shape: the cells that it keeps, those that are not zero.

    A few zeros in a dense weight are chance: training meets zero exactly now and then, in half precision more often. Up
    to 1% of them (or a single one) are, where their structure would not pay: stored with an index the weight would be
    larger than without. All cells are kept then. Nobody prunes by so little: an index pays from a third of zeros on.

    Args:
        weight: [K, C, R, S] or [K, C], of any dtype but bool.
    """
    mask = weight != 0
    zeros = mask.numel() - int(mask.sum())
    if 0 < zeros <= max(1, CHANCE * mask.numel()):
        storage = report_mask(mask).storage
        if storage.model > storage.model_dense:
            return torch.ones_like(mask)
    return mask


def stored_blocks(pattern: BSRPattern) -> Choice:
    """The cells of a pattern's blocks, in that pattern's form."""
    mask = pattern.to_mask()
    order = pattern.row_order
    return Choice(mask, pattern.blocksize, order, recognise(mask).grouping)


def recognise(mask: Tensor) -> Choice:
    """The structure of a mask, as it can be seen from the mask alone.

    In this order: dense or empty; groups of two filters or more that keep channels x taps; aligned boxes of more than
    one weight; groups of two filters or more that keep the same cells; single weights.

    Args:
        mask: bool [K, C, R, S] or [K, C].
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"report_mask(): mask has dtype {mask.dtype}; it needs torch.bool (for weights: weight != 0)")
    if mask.dim() not in (2, 4) or mask.numel() == 0:
        raise ValueError(f"report_mask(): mask has shape {tuple(mask.shape)}; it needs [K, C, R, S] or [K, C]")
    mask = mask[:, :, None, None] if mask.dim() == 2 else mask
    if mask.all() or not mask.any():
        return Choice(mask, None)
    order, rows = _equal_filters(mask)
    if rows > 1:
        try:
            grouping = Grouping.from_mask(mask)
        except ValueError:
            pass
        else:
            if grouping.groups > 1 or grouping.taps.shape[1] < mask[0, 0].numel():  # else: a mask of whole channels
                return Choice(mask, grouping.blocksize, grouping.row_order, grouping)
    box = grain(mask)
    if box != (1, 1, 1, 1):
        return Choice(mask, box[:2])
    if rows > 1:
        return Choice(mask, (rows, 1), order)
    return Choice(mask, None)


def _equal_filters(mask: Tensor) -> tuple[Tensor, int]:
    """Filters ordered so that equal masks are neighbours, and the largest size that divides all such runs."""
    member = _kinds(mask)
    return torch.argsort(member, stable=True), math.gcd(*torch.bincount(member).tolist())


def _kinds(mask: Tensor) -> Tensor:
    """[K] the same number for filters with equal masks; numbers without gaps."""
    return torch.unique(mask.flatten(1), dim=0, return_inverse=True)[1]


def grain(mask: Tensor) -> tuple[int, int, int, int]:
    """The largest aligned box (k, c, r, s) that bool [K, C, R, S] keeps or drops whole, wherever such a box lies.

    Boxes of (k, 1, 1, 1) and of (1, c, 1, 1) make one of (k, c, 1, 1), so each axis is looked at for itself.
    """
    sizes = []
    for axis, size in enumerate(mask.shape):
        slices = mask.movedim(axis, 0).flatten(1)
        changes = (slices[1:] != slices[:-1]).any(1).nonzero()[:, 0] + 1
        sizes.append(math.gcd(size, *changes.tolist()))
    k, c, r, s = sizes
    return k, c, r, s


def describe(choice: Choice) -> str:
    """A mask's structure in a few words."""
    mask = choice.mask
    k, c, r, s = mask.shape
    if mask.all():
        return "dense"
    if not mask.any():
        return "empty"
    if (g := choice.grouping) is not None:
        taps = "" if r * s == 1 else f", {g.taps.shape[1]} of {r * s} taps"
        return f"{_times(g.groups, 'group')} of {g.rows}: {g.channels.shape[1]} of {c} channels{taps}"
    if choice.row_order is not None and choice.blocksize is not None:
        return f"element-wise groups of {choice.blocksize[0]}"
    bk, bc, br, bs = grain(mask)
    names = {(1, c, r, s): "filters", (k, 1, r, s): "channels", (1, 1, r, s): "kernels", (1, 1, 1, s): "vectors"}
    if (bk, bc, br, bs) != (1, 1, 1, 1) and (bk, bc, br, bs) in names:
        return names[bk, bc, br, bs]
    if (bk, bc, br, bs) == (1, 1, 1, 1):
        return "single weights" if (ratio := _ratio(mask)) is None else f"{ratio[0]}:{ratio[1]}"
    all_taps = " of all taps" if (br, bs) == (r, s) and r * s > 1 else ""
    return f"blocks {bk}x{bc}{all_taps}" if all_taps or (br, bs) == (1, 1) else f"boxes {bk}x{bc}x{br}x{bs}"


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _ratio(mask: Tensor) -> tuple[int, int] | None:
    """(n, m) where every m neighbouring channels keep n weights at each tap, for the smallest such m."""
    k, c, r, s = mask.shape
    for m in (2, 4, 8, 16, 32):
        if c % m == 0:
            counts = mask.view(k, c // m, m, r, s).sum(2)
            n = int(counts.flatten()[0])
            if bool((counts == n).all()):
                return n, m
    return None


# ---------------------------------------------------------------------- score


def _score(choice: Choice, score: Tensor, seed: int) -> Score:
    mask = choice.mask
    score = score[:, :, None, None] if score.dim() == 2 else score
    if score.shape != mask.shape:
        raise ValueError(f"report_mask(): score has shape {tuple(score.shape)}; it needs {tuple(mask.shape)}")
    check_score(score, 0.0, "report_mask()")
    cells = score.detach().double().to(mask.device)
    kept = int(mask.sum())
    best = cells.flatten().topk(kept, sorted=False).values
    random = None if choice.grouping is None else random_groups(cells, choice.grouping, seed)
    return Score(float(cells.sum()), float(cells[mask].sum()), float(best.sum()), random)


def random_groups(score: Tensor, like: Grouping, seed: int = 0, draws: int = RANDOM_DRAWS) -> float:
    """What groups of random rows keep of a score [K, C, R, S], in the mean over `draws`; shapes and granule of `like`.

    A group has the best channels for its taps and the best taps for its channels, found by turns: from all taps, from
    each single one, the best result.
    """
    k, c, r, s = like.shape
    runs = score.view(k, c // like.granule, like.granule, r * s).sum(2)
    channels, taps = like.channels.shape[1] // like.granule, like.taps.shape[1]
    starts = torch.cat([torch.ones(1, r * s), torch.eye(r * s)]).to(runs)
    generator = torch.Generator().manual_seed(seed)
    kept = 0.0
    for _ in range(draws):
        order = torch.randperm(k, generator=generator).to(score.device)
        sums = runs[order].view(like.groups, like.rows, *runs.shape[1:]).sum(1)
        chosen = starts.expand(like.groups, -1, -1)  # [groups, starts, taps], zeros and ones
        before, now = -1.0, 0.0
        while now > before:
            own = top(chosen @ sums.transpose(1, 2), channels).to(runs)
            per_tap = own @ sums
            chosen = top(per_tap, taps).to(runs)
            each = (per_tap * chosen).sum(2)  # [groups, starts]
            before, now = now, float(each.sum())
        kept += float(each.amax(1).sum())
    return kept / draws


# ---------------------------------------------------------------------- cost


def _dense_stream(choice: Choice) -> Stream:
    """One record that needs no index."""
    k, c, r, s = choice.mask.shape
    return Stream(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool), k * c * r * s, c * r * s, k, 0)


def _run(choice: Choice, box: tuple[int, int, int, int]) -> int | None:
    """The m of an n:m mask."""
    ratio = _ratio(choice.mask) if choice.grouping is None and box == (1, 1, 1, 1) else None
    return None if ratio is None else ratio[1]


def _by_lanes(counts: Tensor) -> Tensor:
    """Sums of LANES neighbours, the last ones of the rest."""
    return nn.functional.pad(counts, (0, -len(counts) % LANES)).view(-1, LANES).sum(1)


def _balance(counts: Tensor) -> float:
    """Largest / mean."""
    return float(counts.max() / counts.double().mean()) if counts.any() else 1.0


def dgrad_fill(choice: Choice) -> float:
    """How much of their bounding rectangles a mask's blocks fill in the input gradient; 1: they stay dense.

    The output is W [K, C*R*S] times im2col(x), the input gradient W' [C, K*R*S] times im2col(dy), where W' has each
    kernel rotated by 180 degrees and K and C exchanged. Filters with equal masks are a dense rectangle of W; its cells
    are marked in W' and compared with the rectangle of all their rows and columns there. Where blocks of several
    filters by several channels at a tap are what is stored, those are the rectangles instead. A mask that keeps
    nothing has 1.

    Source: HRBP (CPAL 2024), section 3.
    """
    mask = choice.mask
    k, c, r, s = mask.shape
    bk, bc = choice.blocksize or (1, 1)
    if choice.grouping is None and bk > 1 and bc > 1:
        order = torch.arange(k, device=mask.device) if choice.row_order is None else choice.row_order.long()
        block_row = (torch.argsort(order) // bk).view(k, 1, 1, 1)
        block_col = (torch.arange(c, device=mask.device) // bc).view(1, c, 1, 1)
        tap = torch.arange(r * s, device=mask.device).view(1, 1, r, s)
        number = (block_row * (c // bc) + block_col) * (r * s) + tap
    else:
        number = _kinds(mask).view(k, 1, 1, 1)
    marked = torch.where(mask, number, -1)  # which rectangle of W each weight belongs to
    transposed = marked.flip(2, 3).permute(1, 2, 3, 0).reshape(c, r * s * k)  # W', columns tap-major as those of W
    rows, cols = (transposed >= 0).nonzero().unbind(1)
    if not len(rows):
        return 1.0
    owner = transposed[rows, cols]
    size = int(number.max()) + 1
    height, width = (_distinct(owner, place, size) for place in (rows, cols))
    return len(owner) / int((height * width).sum())


def dgrad_ratio(mask: Tensor, n: int, m: int) -> str:
    """Whether an n:m mask is n:m in the input gradient, too: "n:m", or the share of runs that keep more, or K.

    Its operand W' [C, K*R*S] (see `dgrad_fill`) is n:m if every m neighbours in a row keep n at most. In NHWC these are
    m neighbouring filters at one tap, given that m divides K. In NCHW they are taps of one kernel, as they are in W
    itself: only 1x1 kernels are n:m there.

    Args:
        mask: bool [K, C, R, S].
        n, m: weights kept of neighbours.

    Source: HRBP (CPAL 2024), appendix H.
    """
    k, c = mask.shape[:2]
    if k % m:
        return f"no, K = {k}"
    kept = mask.flip(2, 3).permute(1, 2, 3, 0).reshape(c, -1, m).sum(2)
    over = float((kept > n).double().mean())
    return f"{n}:{m}" if over == 0 else f"no, {100 * over:.3g}% over"


def _distinct(owner: Tensor, place: Tensor, owners: int) -> Tensor:
    """[owners] how many different places each owner has."""
    pairs = torch.unique(owner * (int(place.max()) + 1) + place)
    return torch.bincount(pairs // (int(place.max()) + 1), minlength=owners)


# ---------------------------------------------------------------------- as text


def table(reports: Mapping[str, MaskReport]) -> str:
    """A line a layer, and one for all of them.

    kept%       share of the weights
    retained%, of unstr.%, efficacy   see Score
    model%      storage as a stream of 8-bit weights and 4-bit relative indices, relative to dense; where that is over
                100 a line below says so
    dense, memory, file kB   the dense weight; stored blocks and index in memory; in a checkpoint
    refs        memory references of an output pixel, per weight of the dense layer
    rows, cols  largest / mean of the weights of 8 filters, of 8 input channels
    dgrad%      share that blocks fill of their rectangles in the input gradient
    dgrad n:m   of n:m masks: see `dgrad_ratio`
    """
    scored = any(report.score for report in reports.values())
    head = ["layer", "K x C x R x S", "kept%", "structure"]
    head += ["retained%", "of unstr.%", "efficacy"] if scored else []
    head += ["model%", "dense kB", "memory kB", "file kB", "refs", "rows", "cols", "dgrad%"]
    lines = [head]
    for name, report in reports.items():
        shape = "x".join(map(str, report.shape if report.shape[2:] != (1, 1) else report.shape[:2]))
        shares = _shares(report.score) if scored else []
        refs = sum(report.references) / math.prod(report.shape)
        spread = [f"{v:.2f}" for v in (refs, report.fprop_balance, report.dgrad_balance)]
        kept = f"{100 * report.density:.2f}"
        costs = [*_costs(report.storage), *spread, f"{100 * report.dgrad_fill:.0f}"]
        lines.append([name, shape, kept, report.structure, *shares, *costs])
    if len(reports) > 1:
        every = reports.values()
        share = sum(report.kept for report in every) / sum(math.prod(report.shape) for report in every)
        storage = Storage(*(sum(column) for column in zip(*(report.storage for report in every), strict=True)))
        shares = _shares(total_score([report.score for report in every])) if scored else []
        total = ["all", "", f"{100 * share:.2f}", "", *shares]
        lines.append([*total, *_costs(storage), "", "", "", ""])
    if any(report.dgrad_ratio for report in reports.values()):
        ratios = [report.dgrad_ratio or "" for report in reports.values()]
        for line, cell in zip(lines, ["dgrad n:m", *ratios, ""], strict=False):
            line.append(cell)
    larger = [name for name, report in reports.items() if report.storage.model > report.storage.model_dense]
    note = ""
    if larger:
        few = ", ".join(larger[:3]) + (f" and {len(larger) - 3} more" if len(larger) > 3 else "")
        note = f"\n\nover 100 model%: {few}: the index takes more than the zeros save; stored dense it would be 100"
    return columns(lines, left=(0, 3)) + note


def total_score(scores: list[Score | None]) -> Score | None:
    """Sums over the layers that have a score; random groups only where all of them have groups."""
    known = [score for score in scores if score is not None]
    if not known:
        return None
    random = [score.random for score in known if score.random is not None]
    total, kept, single = (sum(column) for column in zip(*(score[:3] for score in known), strict=True))
    return Score(total, kept, single, sum(random) if len(random) == len(known) else None)


def _shares(score: Score | None) -> list[str]:
    if score is None:
        return ["-", "-", "-"]
    efficacy = "-" if score.efficacy is None else f"{score.efficacy:.2f}"
    return [f"{100 * score.retained:.1f}", f"{100 * score.of_unstructured:.1f}", efficacy]


def _costs(storage: Storage) -> list[str]:
    sizes = storage.dense, storage.values + storage.memory_index, storage.values + storage.file_index
    return [f"{100 * storage.model / storage.model_dense:.1f}", *(f"{size / 1e3:.1f}" for size in sizes)]


def columns(lines: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Text in columns as wide as they need; those in `left` start at the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, lines))
