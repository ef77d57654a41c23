"""What every layer of a model holds and costs, sparse or dense."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import BSRConv2d, BSRLinear, explain

from . import semi
from .master import MasterLinear, symmetric_padding
from .sparsify import SparseLayer, Sparsity, densify, plan_of, semi_refuses, sparse_layers, unwrapped
from .structure import NM
from .subp import counts

SLOW_BLOCK = 8  # weights: smaller blocks save memory, not time


@dataclass
class Row:
    """One layer in a summary. flops and gains are those of the inputs that the summary was given, else None."""

    name: str
    shape: tuple[int, ...]
    structure: str
    density: float
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    flops: int | None = None
    dense_flops: int | None = None
    backend: str = ""
    seconds: float | None = None
    dense_seconds: float | None = None


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
        head = ["layer", "shape", "structure", "density", "params", "MB", "GFLOP", "backend", "gain"]
        table = [head, *([self._cells(row)[name] for name in head] for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        left = (0, 1, 2, 7)

        def text(line: list[str]) -> str:
            cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            return "  ".join(cells).rstrip()

        lines = [text(table[0]), "-" * len(text(table[0])), *map(text, table[1:]), ""]
        lines.append(
            f"sparse layers {self.sparsity:.2%} sparse, whole model {self.model_sparsity:.2%}: "
            f"{self.parameters:,} of {self.dense_parameters:,} parameters"
        )
        flops = [(row.flops, row.dense_flops) for row in self.rows if row.flops is not None and row.dense_flops]
        if flops:
            ours, dense = sum(f for f, _ in flops), sum(d for _, d in flops if d)
            lines.append(f"forward {ours / 1e9:.3g} of {dense / 1e9:.3g} GFLOP: {dense / max(1, ours):.2f}x fewer")
        timed = [(row.seconds, row.dense_seconds) for row in self.rows if row.seconds and row.dense_seconds]
        if timed:
            ours_s, dense_s = sum(s for s, _ in timed if s), sum(d for _, d in timed if d)
            lines.append(
                f"measured forward + backward of the sparse layers: {ours_s * 1e3:.3g} ms, dense {dense_s * 1e3:.3g} "
                f"ms: {dense_s / ours_s:.2f}x"
            )
        return "\n".join([*lines, *self.notes])

    @staticmethod
    def _cells(row: Row) -> dict[str, str]:
        gain = ""
        if row.seconds and row.dense_seconds:
            gain = f"{row.dense_seconds / row.seconds:.2f}x"
        elif row.backend == "dense":
            gain = "1x"
        elif row.flops and row.dense_flops and row.density < 1:
            gain = f"<={row.dense_flops / row.flops:.2f}x"
        return {
            "layer": row.name,
            "shape": "x".join(map(str, row.shape)),
            "structure": row.structure,
            "density": f"{row.density:.4f}",
            "params": f"{row.parameters:,}",
            "MB": f"{row.bytes / 1e6:.3f}",
            "GFLOP": "" if row.flops is None else f"{row.flops / 1e9:.3g}",
            "backend": row.backend,
            "gain": gain,
        }


def summary(model: nn.Module, x: Tensor | Sequence[int] | None = None, *, measure: bool = False) -> Summary:
    """What every layer of a model holds and costs, sparse or dense.

    Args:
        model: any module; wrappers are looked through.
        x: an input, or the shape of one: with it, floating-point operations and backends are told. A forward pass is
            run in eval mode, without gradients.
        measure: also time forward + backward of each sparse layer and of its dense twin on its input from x, in turns.

    Returns:
        A Summary; print it. MB are those of weights, biases and index; operations those of the weights kept. A gain is
        measured, or the ratio of operations, which bounds it, marked <=; 1x where the dense product is run as the
        faster one.
    """
    model = unwrapped(model)
    if measure and x is None:
        raise ValueError("summary(): measure needs x, an input or the shape of one")
    plan = plan_of(model, required=False)
    sparse = sparse_layers(model)
    inputs = {} if x is None else inputs_of(model, x)
    rows, cells, kept = [], 0, 0
    for name, module in model.named_modules():
        layer = sparse.get(name)
        if layer is None and not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        row = _dense_row(name, module, plan) if layer is None else _sparse_row(layer, plan)
        if name in inputs:
            at, out = inputs[name]
            per_weight = 2 * out.numel() // row.shape[0]
            dense_weights = math.prod(row.shape)
            row.dense_flops = per_weight * dense_weights
            row.flops = row.dense_flops
            if layer is not None and layer.runs_blocks:
                row.flops = per_weight * layer.module.values.numel()
                row.backend = _backend_of(layer.module, at)
                if measure:
                    row.seconds, row.dense_seconds = _timed(layer.module, at)
        if layer is not None or semi.is_converted(module):
            cells += math.prod(row.shape)
            kept += round(row.density * math.prod(row.shape))
        rows.append(row)
    everything = sum(p.numel() for p in model.parameters())
    masked_away = sum(
        layer.parameter.numel() - int(layer.mask().sum()) for layer in sparse.values() if not layer.blocks
    )
    converted: list[Any] = [module for module in model.modules() if semi.is_converted(module)]
    masked_away += sum(module.weight.numel() // 2 for module in converted)
    dense_total = everything + sum(
        math.prod(layer.shape) - layer.parameter.numel() for layer in sparse.values() if layer.blocks
    )
    total = everything - masked_away
    notes = []
    if any(not layer.runs_blocks for layer in sparse.values()):
        notes.append(
            "masked: a dense weight under a mask, with the memory and the time of a dense layer at any density"
        )
    if any(math.prod(layer.module.pattern.blocksize) < SLOW_BLOCK for layer in sparse.values() if layer.runs_blocks):
        notes.append(
            f"blocks of fewer than {SLOW_BLOCK} weights: beside an index of 16 bytes each they save memory at high"
            " sparsity only, and no time"
        )
    if any(layer.master for layer in sparse.values()):
        assert plan is not None
        notes.append(
            f"master: {plan.method!r} trains a dense weight, with the memory of a dense layer (of its gradient and"
            " optimizer state, too) and the time of its weight gradient; hrbp.release(model) drops what takes no part"
        )
        if plan.target:
            shapes = {name: sparse[name].shape for name in plan.target}
            gone = sum(
                math.prod(shape) * counts(shape[1], plan.target[name], plan.target[name])[0] / shape[1]
                for name, shape in shapes.items()
            )
            notes.append(f"{plan.method}: the sparse layers end {gone / cells:.2%} sparse, whatever they are now")
    if plan is not None and isinstance(plan.structure, NM) and plan.structure.m == 4:
        notes.append(_semi_note({name: semi_refuses(layer.module, layer) for name, layer in sparse.items()}))
    return Summary(rows, 1 - kept / cells if cells else 0.0, 1 - total / max(1, dense_total), total, dense_total, notes)


def _semi_note(told: dict[str, str | None]) -> str:
    """Which layers `to_semi_structured` would convert, and why not the others."""
    why: dict[str, list[str]] = {}
    for name, reason in told.items():
        if reason is not None:
            why.setdefault(reason, []).append(name)
    able = len(told) - sum(map(len, why.values()))
    stay = [f"not {', '.join(n) if len(n) < 4 else f'{len(n)} as {n[0]}'} ({reason})" for reason, n in why.items()]
    return "; ".join([f"sparse tensor cores, by hrbp.to_semi_structured(model): {able} of {len(told)} layers", *stay])


def _dense_row(name: str, module: Any, plan: Sparsity | None) -> Row:
    if semi.is_converted(module):
        item, cells = module.weight.element_size(), module.weight.numel()
        bias = 0 if module.bias is None else module.bias.numel()
        size, shape = semi.stored_bytes(module.weight) + bias * item, tuple(module.weight.shape)
        return Row(
            name, shape, "2:4 on sparse tensor cores", 0.5, cells // 2 + bias, cells + bias, size, (cells + bias) * item
        )
    bias = 0 if module.bias is None else module.bias.numel()
    count = module.weight.numel() + bias
    size = count * module.weight.element_size()
    why = f"dense ({plan.dense[name]})" if plan is not None and name in plan.dense else "dense"
    return Row(name, tuple(module.weight.shape), why, 1.0, count, count, size, size)


def _sparse_row(layer: SparseLayer, plan: Sparsity | None) -> Row:
    module, kept = layer.module, layer.parameter
    bias = 0 if module.bias is None else module.bias.numel()
    item = kept.element_size()
    cells = math.prod(layer.shape)
    dense = cells + bias
    named = plan.structure.name if plan is not None and layer.name in plan.asked else "blocks"
    if layer.master:
        stored, size = int(layer.mask().sum()), dense * item
        size += sum(t.numel() * t.element_size() for t in module.buffers(recurse=False))  # mask, row order, index
        named += f" {module.blocksize}, master" if layer.runs_blocks else ", masked, master"
        return Row(layer.name, layer.shape, named, stored / cells, stored + bias, dense, size, dense * item)
    if layer.blocks:
        bk, bc = kept.shape[1:]
        count = kept.numel() + bias
        size = count * item + module.index.numel() * module.index.element_size()
        density = kept.numel() / cells
        return Row(layer.name, layer.shape, f"{named} ({bk}, {bc})", density, count, dense, size, dense * item)
    stored = int(layer.mask().sum())
    size = dense * item + cells  # the mask is a byte a weight
    return Row(layer.name, layer.shape, f"{named}, masked", stored / cells, stored + bias, dense, size, dense * item)


def inputs_of(model: nn.Module, x: Tensor | Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (input, output) of every convolution and linear layer for the model input x."""
    first = next(model.parameters())
    if not isinstance(x, Tensor):
        x = torch.zeros(tuple(x), device=first.device, dtype=first.dtype)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            found[name] = (args[0].detach(), out.detach())

        return hook

    kinds = (nn.Conv2d, nn.Linear, BSRConv2d, BSRLinear)
    hooks = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
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
        return explain(x, module.values, module.pattern, backend=module.backend).backend
    conv = (module.stride, symmetric_padding(module), module.dilation)
    return explain(x, module.values, module.pattern, *conv, backend=module.backend).backend


def _timed(module: Any, x: Tensor, rounds: int = 5) -> tuple[float, float]:
    """Median seconds of forward + backward of a sparse layer and of its dense twin, in turns."""
    dense = densify(copy.deepcopy(module))
    x = x.detach().clone().requires_grad_()
    dy = torch.randn_like(module(x))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for m, out in zip((module, dense), times, strict=True):
            parameters = [p for p in m.parameters() if p.requires_grad]
            if x.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(m(x), [x, *parameters], dy)
            if x.is_cuda:
                torch.cuda.synchronize()
            if i:
                out.append(time.perf_counter() - start)
    middle = rounds // 2
    return sorted(times[0])[middle], sorted(times[1])[middle]
