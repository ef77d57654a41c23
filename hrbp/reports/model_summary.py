"""The summary of a model: density, bytes, FLOPs, backend and time of every layer."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blocksparse import BSRLinear, BSRModule, explain, image_conv

from ..columns import columns
from ..layers import semi_structured
from ..layers.master import MasterLinear
from ..layers.record import SparsityRecord, record_of
from ..layers.stored import PLAIN
from ..layers.view import SparseLayer, sparse_layers
from ..methods.registry import METHODS
from ..methods.subp import counts
from ..structures.groups import Groups
from ..structures.n_m import NM
from ..surgery.conversion import densify, semi_refuses
from ..wrappers import copied, unwrapped

INDEX_BYTES = 16  # of a stored block, in memory


@dataclass
class Row:
    """One layer in a summary. Fields that depend on an input are None where the summary was given none.

    flops      of the weights that are kept, in the forward pass
    run_flops  that are run: those of the stored blocks; all of them under a mask, or where the dense product is taken
    backend    of the forward product; "masked": a dense product of a master weight under its mask; "2:4": on the
               compressed forms of it, see `train_semi_structured`
    coverage   of groups: see `Grouping.coverage`; None for other structures
    unread     input channels that no filter reads, of so many `channels`
    seconds    of forward + backward of a sparse layer and of its dense twin, where they were measured
    """

    name: str
    shape: tuple[int, ...]
    structure: str
    density: float
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    flops: int | None = None
    run_flops: int | None = None
    dense_flops: int | None = None
    backend: str = ""
    seconds: float | None = None
    dense_seconds: float | None = None
    coverage: float | None = None
    unread: int = 0
    channels: int = 0


@dataclass
class Summary:
    """What a model holds: one row a layer; `print(summary(model))`.

    sparsity of the layers made sparse, and of the whole model (all parameters, those of dense layers included).
    """

    rows: list[Row]
    sparsity: float
    model_sparsity: float
    parameters: int
    dense_parameters: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = ["layer", "shape", "structure", "density", "params", "MB", "GFLOP", "run", "backend"]
        if any(row.coverage is not None for row in self.rows):
            head.insert(4, "cover")
        timed = [(row.seconds, row.dense_seconds) for row in self.rows if row.seconds and row.dense_seconds]
        head += ["ms", "dense ms", "speed"] if timed else []
        table = [head, *([self._cells(row)[name] for name in head] for row in self.rows)]
        first, *rest = columns(table, left=(0, 1, 2, head.index("backend"))).split("\n")
        lines = [first, "-" * len(first), *rest, ""]
        lines.append(
            f"sparse layers {self.sparsity:.2%} sparse, whole model {self.model_sparsity:.2%}: "
            f"{self.parameters:,} of {self.dense_parameters:,} parameters"
        )
        flops = [(row.flops or 0, row.run_flops or 0, row.dense_flops or 0) for row in self.rows]
        kept, run, dense = map(sum, zip(*flops, strict=True)) if flops else (0, 0, 0)
        if dense:
            lines.append(
                f"forward: weights kept need {kept / 1e9:.3g} of {dense / 1e9:.3g} GFLOP, {run / 1e9:.3g} are run"
                f" ({run / dense:.0%})" + ("" if timed else "; that is work, not time: measure=True times the layers")
            )
        if timed:
            ours_s, dense_s = sum(s for s, _ in timed), sum(d for _, d in timed)
            lines.append(
                f"measured forward + backward of the sparse layers: {ours_s * 1e3:.3g} ms, dense {dense_s * 1e3:.3g} "
                f"ms: {dense_s / ours_s:.2f}x"
            )
        return "\n".join([*lines, *self.notes])

    @staticmethod
    def _cells(row: Row) -> dict[str, str]:
        share = "" if row.run_flops is None or not row.dense_flops else f"{row.run_flops / row.dense_flops:.0%}"
        timed = row.seconds is not None and row.dense_seconds is not None
        return {
            "layer": row.name,
            "shape": "x".join(map(str, row.shape)),
            "structure": row.structure,
            "density": f"{row.density:.4f}",
            "cover": "" if row.coverage is None else f"{row.coverage:.2f}",
            "params": f"{row.parameters:,}",
            "MB": f"{row.bytes / 1e6:.3f}",
            "GFLOP": "" if row.flops is None else f"{row.flops / 1e9:.3g}",
            "run": share,
            "backend": row.backend,
            "ms": f"{row.seconds * 1e3:.3g}" if timed and row.seconds else "",
            "dense ms": f"{row.dense_seconds * 1e3:.3g}" if timed and row.dense_seconds else "",
            "speed": f"{row.dense_seconds / row.seconds:.2f}x" if timed and row.dense_seconds and row.seconds else "",
        }


def summary(model: nn.Module, x: Tensor | Sequence[int] | None = None, *, measure: bool = False) -> Summary:
    """What every layer of a model holds and costs, sparse or dense.

    Args:
        model: any module; wrappers are looked through.
        x: an input, or its shape: with it, FLOPs and backends are reported. A forward pass is run in eval mode, without
            gradients.
        measure: also time forward + backward of each sparse layer and of its dense twin, interleaved, on its input.

    Returns:
        A Summary; print it. MB are those of weights, biases and index; GFLOP those of the weights kept, in the forward
        pass, and `run` the share of the dense layer's that is run: 100% under a mask, and where the dense product is
        taken as the faster one. It bounds the time that can be saved; ms and speed (dense time / time)
        are measured.
    """
    model = unwrapped(model)
    if lazy := next((name for name, p in model.named_parameters() if is_lazy(p)), None):
        raise ValueError(
            f"summary(): {lazy} has no shape before the model has seen its input; run the model once first"
        )
    if measure and x is None:
        raise ValueError("summary(): measure needs x, an input or the shape of one")
    record = record_of(model, required=False)
    sparse = sparse_layers(model)
    calls = {} if x is None else _calls_of(model, x)
    rows, cells, kept = [], 0, 0
    for name, module in model.named_modules():
        layer = sparse.get(name)
        if layer is None and not isinstance(module, PLAIN):
            continue
        row = _dense_row(name, module, record) if layer is None else _sparse_row(layer, record)
        if name in calls:
            at = calls[name][-1][0]
            per_weight = sum(2 * out.numel() // row.shape[0] for _, out in calls[name])
            dense_weights = math.prod(row.shape)
            row.dense_flops = row.run_flops = per_weight * dense_weights
            row.flops = per_weight * round(row.density * dense_weights)
            if semi_structured.is_converted(module):
                row.run_flops = row.flops
            if layer is not None:
                row.backend = "2:4" if _on_2_4(layer) else "masked"
                if layer.blocksize is not None:
                    row.backend = _backend_of(layer.module, at)
                    row.run_flops = row.dense_flops if row.backend == "torch" else row.flops
                if measure:
                    row.seconds, row.dense_seconds = _timed(layer.module, at)
        if layer is not None or semi_structured.is_converted(module):
            cells += math.prod(row.shape)
            kept += round(row.density * math.prod(row.shape))
        rows.append(row)
    shown = {row.name for row in rows}
    everything = sum(p.numel() for p in model.parameters())
    masked_away = sum(layer.parameter.numel() - layer.kept() for layer in sparse.values())
    converted: list[Any] = [module for module in model.modules() if semi_structured.is_converted(module)]
    masked_away += sum(module.weight.numel() // 2 for module in converted)
    dense_total = everything + sum(math.prod(layer.shape) - layer.parameter.numel() for layer in sparse.values())
    total = everything - masked_away
    notes = []
    if any(row.coverage is not None for row in rows):
        notes.append("cover: groups x channels of each / input channels; below 1 some channels are read by no filter")
    if unread := {row.name: row for row in rows if row.unread}:
        worst = max(unread.values(), key=lambda row: row.unread / row.channels)
        notes.append(
            f"unread: input channels that no filter reads, in {len(unread)} layers; most in {worst.name},"
            f" {worst.unread} of {worst.channels}"
        )
    if any(layer.blocksize is None and not _on_2_4(layer) for layer in sparse.values()):
        notes.append("masked: computed as a dense weight under a mask, in the time of a dense layer at any density")
    if any(_block_bytes(layer) < INDEX_BYTES for layer in sparse.values() if layer.blocksize is not None):
        notes.append(
            f"small blocks: the index takes {INDEX_BYTES} bytes a block, more than its weights; MB count both, and"
            " gradients and optimizer state need none"
        )
    if any(layer.master for layer in sparse.values()):
        assert record is not None
        notes.append(
            f"master: {record.method!r} trains a dense weight, with the memory of a dense layer (of its gradient and"
            " optimizer state, too) and the time of its weight gradient; hrbp.release(model) drops what takes no part"
        )
        if record.target:
            shapes = {name: sparse[name].shape for name in record.target}
            gone = sum(
                math.prod(shape) * counts(shape[1], record.target[name], record.target[name])[0] / shape[1]
                for name, shape in shapes.items()
            )
            notes.append(f"{record.method}: the sparse layers end {gone / cells:.2%} sparse, whatever they are now")
    if record is not None and record.saliency and not (record.method and METHODS[record.method].follows_weight):
        why = f" ('auto', as {record.saliency_why})" if record.saliency_why else ""
        notes.append(f"masks first chosen by {record.saliency}{why}")
    others = [] if record is None else [f"{name} ({why})" for name, why in record.dense.items() if name not in shown]
    if others:
        notes.append(f"left as they were: {', '.join(others)}")
    if record is not None and isinstance(record.structure, NM) and record.structure.m == 4:
        notes.append(_semi_note({name: semi_refuses(model, layer.module, layer) for name, layer in sparse.items()}))
    return Summary(rows, 1 - kept / cells if cells else 0.0, 1 - total / max(1, dense_total), total, dense_total, notes)


def _block_bytes(layer: SparseLayer) -> int:
    """Of the weights of a stored block."""
    assert layer.blocksize is not None
    return math.prod(layer.blocksize) * layer.parameter.element_size()


def _semi_note(told: dict[str, str | None]) -> str:
    """Which layers `to_semi_structured` would convert, and why not the others."""
    why: dict[str, list[str]] = {}
    for name, reason in told.items():
        if reason is not None:
            why.setdefault(reason, []).append(name)
    able = len(told) - sum(map(len, why.values()))
    stay = [f"not {', '.join(n) if len(n) < 4 else f'{len(n)} as {n[0]}'} ({reason})" for reason, n in why.items()]
    return "; ".join([f"sparse tensor cores, by hrbp.to_semi_structured(model): {able} of {len(told)} layers", *stay])


def _dense_row(name: str, module: Any, record: SparsityRecord | None) -> Row:
    if semi_structured.is_converted(module):
        item, cells = module.weight.element_size(), module.weight.numel()
        bias = 0 if module.bias is None else module.bias.numel()
        size, shape = semi_structured.stored_bytes(module.weight) + bias * item, tuple(module.weight.shape)
        return Row(
            name, shape, "2:4 on sparse tensor cores", 0.5, cells // 2 + bias, cells + bias, size, (cells + bias) * item
        )
    count = sum(p.numel() for p in module.parameters())
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    why = f"dense ({record.dense[name]})" if record is not None and name in record.dense else "dense"
    return Row(name, tuple(module.weight.shape), why, 1.0, count, count, size, size)


def _on_2_4(layer: SparseLayer) -> bool:
    """Whether it trains on a GPU's sparse tensor cores."""
    return getattr(layer.module, "semi", False)


def _sparse_row(layer: SparseLayer, record: SparsityRecord | None) -> Row:
    bias = 0 if layer.module.bias is None else layer.module.bias.numel()
    item, cells, kept = layer.parameter.element_size(), math.prod(layer.shape), layer.kept()
    named = record.structure.name if record is not None and layer.name in record.asked else "blocks"
    named += f" {layer.blocksize}" if layer.blocksize else " on sparse tensor cores" if _on_2_4(layer) else ", masked"
    named += f", {layer.groups} groups" if layer.groups > 1 else ""
    named += ", master" if layer.master else ""
    dense, mask = cells + bias, layer.mask()
    coverage, each = None, len(mask) // layer.groups  # filters of each group of a convolution in groups: all are alike
    if record is not None and layer.name in record.asked and isinstance(record.structure, Groups):
        order = layer.row_order()
        with contextlib.suppress(ValueError):  # a pattern that was set by hand, not of groups
            coverage = record.structure.grouping(mask[:each], None if order is None else order[:each]).coverage
    read = mask.view(layer.groups, each, *layer.shape[1:]).any(4).any(3).any(1)  # [groups, C of each]
    return Row(
        layer.name, layer.shape, named, kept / cells, kept + bias, dense, layer.bytes() + bias * item, dense * item,
        coverage=coverage, unread=int((~read).sum()), channels=read.numel(),
    )  # fmt: skip


def inputs_of(model: nn.Module, x: Tensor | Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (input, output) of every convolution and linear layer for the model input x; of the last call."""
    return {name: calls[-1] for name, calls in _calls_of(model, x).items()}


def _calls_of(model: nn.Module, x: Tensor | Sequence[int]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """name -> (input, output) of every call of a convolution or linear layer, for the model input x."""
    first = next(model.parameters())
    if not isinstance(x, Tensor):
        x = torch.zeros(tuple(x), device=first.device, dtype=first.dtype)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            given = next(iter((*args, *kwargs.values())))
            found.setdefault(name, []).append((given.detach(), out.detach()))

        return hook

    kinds = (*PLAIN, BSRModule)
    hooks = [
        m.register_forward_hook(keep(name), with_kwargs=True)
        for name, m in model.named_modules()
        if isinstance(m, kinds)
    ]
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in hooks:
            handle.remove()
        for m, training in modes.items():
            m.training = training
    return found


def _backend_of(module: Any, x: Tensor) -> str:
    if isinstance(module, BSRLinear | MasterLinear):
        x = x.reshape(-1, x.shape[-1], 1, 1)
        return explain(x, module.values, module.pattern, backend=module.backend).products["fprop"].backend
    x = x.unsqueeze(-2) if len(module.stride) == 1 else x  # a line is an image of height 1
    x = x[None] if x.dim() == 3 else x
    plan = explain(x, module.values, module.pattern, *image_conv(module), backend=module.backend)
    return plan.products["fprop"].backend


def _timed(module: Any, x: Tensor, rounds: int = 5) -> tuple[float, float]:
    """Median seconds of forward + backward of a sparse layer and of its dense twin, in turns, without users' hooks."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # a layer draws weights when it is made
        dense = densify(copied(module))
    x = x.detach().clone().requires_grad_()
    dy = torch.ones_like(module.forward(x))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for m, out in zip((module, dense), times, strict=True):
            parameters = [p for p in m.parameters() if p.requires_grad]
            if x.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(m.forward(x), [x, *parameters], dy)
            if x.is_cuda:
                torch.cuda.synchronize()
            if i:
                out.append(time.perf_counter() - start)
    middle = rounds // 2
    return sorted(times[0])[middle], sorted(times[1])[middle]
