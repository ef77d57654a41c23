"""Reports on the masks of a whole model, and their table."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..columns import columns
from ..layers.stored import PLAIN
from ..layers.view import as_sparse
from ..structures.base import Selection
from ..structures.recognise import stored_blocks
from .mask_report import MaskReport, Storage, report_mask
from .score import Score, total_score

CHANCE = 0.01  # share of zeros that a trained weight may have without a structure


def report_model(
    model: nn.Module | Mapping[str, Tensor | Selection],
    scores: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, MaskReport]:
    """`report_mask` of every layer, by name.

    Args:
        model: a module: the masks are the stored blocks of BSR layers, and the non-zero weights of other Conv2d,
            Conv1d and Linear (see `kept_of`); layers with a dense master weight are reported as `release` would leave
            them. Or a mapping: layer name -> mask (bool), weight (likewise) or Selection.
        scores: layer name -> score, for some layers or all.
        dtype: of the stored values; default: that of each weight, float32 for masks.
        seed: of the random groups that efficacy compares with.

    Raises:
        ValueError: a score of a layer that does not exist; and as in `report_mask`.
    """
    layers = layers_of(model) if isinstance(model, nn.Module) else {name: (t, None) for name, t in model.items()}
    scores = scores or {}
    if unknown := sorted(set(scores) - set(layers)):
        raise ValueError(f"report_model(): scores has {', '.join(unknown)}; the layers are {', '.join(layers)}")
    reports = {}
    for name, (layer, own) in layers.items():
        if isinstance(layer, Tensor) and layer.dtype != torch.bool:  # a weight of the mapping
            layer, own = kept_of(layer), layer.dtype
        reports[name] = report_mask(layer, scores.get(name), dtype=dtype or own or torch.float32, seed=seed)
    return reports


def layers_of(model: nn.Module) -> dict[str, tuple[Tensor | Selection, torch.dtype | None]]:
    """What each layer keeps, and the dtype of its stored values."""
    found: dict[str, tuple[Tensor | Selection, torch.dtype | None]] = {}
    for name, module in model.named_modules():
        if (layer := as_sparse(module)) is not None:
            found[name] = stored_blocks(layer.pattern()), layer.parameter.dtype
        elif isinstance(module, PLAIN):
            found[name] = kept_of(module.weight.detach()), module.weight.dtype
    return found


def kept_of(weight: Tensor) -> Tensor:
    """bool, of the weight's shape: the cells that it keeps, those that are not zero.

    A few zeros in a dense weight are chance: training meets zero exactly now and then, in half precision more often. Up
    to 1% of them (or a single one) are, where their structure would not pay: stored with an index the weight would be
    larger than without. All cells are kept then. Nobody prunes by so little: an index pays from a third of zeros on.

    Args:
        weight: [K, C, R, S], [K, C, S] or [K, C], of any dtype but bool.
    """
    mask = weight != 0
    zeros = mask.numel() - int(mask.sum())
    if 0 < zeros <= max(1, CHANCE * mask.numel()):
        storage = report_mask(mask).storage
        if storage.model > storage.model_dense:
            return torch.ones_like(mask)
    return mask


def table(reports: Mapping[str, MaskReport]) -> str:
    """A line a layer, and one for all of them.

    kept%       share of the weights
    cover       of groups: groups x channels of each / input channels; below 1 some channels are read by none
    unread%     share of the input channels that no filter reads; no such column where every channel is read
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
    read = {
        "cover": ["" if r.coverage is None else f"{r.coverage:.2f}" for r in reports.values()],
        "unread%": [f"{100 * r.unread / r.channels:.0f}" if r.unread else "" for r in reports.values()],
    }
    read = {name: cells for name, cells in read.items() if any(cells)}
    head += read
    head += ["retained%", "of unstr.%", "efficacy"] if scored else []
    head += ["model%", "dense kB", "memory kB", "file kB", "refs", "rows", "cols", "dgrad%"]
    lines = [head]
    for i, (name, report) in enumerate(reports.items()):
        shape = "x".join(map(str, report.shape if report.shape[2:] != (1, 1) else report.shape[:2]))
        shares = _shares(report.score) if scored else []
        refs = sum(report.references) / math.prod(report.shape)
        spread = [f"{v:.2f}" for v in (refs, report.fprop_balance, report.dgrad_balance)]
        kept = f"{100 * report.density:.2f}"
        costs = [*_costs(report.storage), *spread, f"{100 * report.dgrad_fill:.0f}"]
        lines.append([name, shape, kept, report.structure, *(cells[i] for cells in read.values()), *shares, *costs])
    if len(reports) > 1:
        every = reports.values()
        share = sum(report.kept for report in every) / sum(math.prod(report.shape) for report in every)
        storage = Storage(*(sum(column) for column in zip(*(report.storage for report in every), strict=True)))
        shares = _shares(total_score([report.score for report in every])) if scored else []
        total = ["all", "", f"{100 * share:.2f}", "", *("" for _ in read), *shares]
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


def _shares(score: Score | None) -> list[str]:
    if score is None:
        return ["-", "-", "-"]
    efficacy = "-" if score.efficacy is None else f"{score.efficacy:.2f}"
    return [f"{100 * score.retained:.1f}", f"{100 * score.of_unstructured:.1f}", efficacy]


def _costs(storage: Storage) -> list[str]:
    sizes = storage.dense, storage.values + storage.memory_index, storage.values + storage.file_index
    return [f"{100 * storage.model / storage.model_dense:.1f}", *(f"{size / 1e3:.1f}" for size in sizes)]
