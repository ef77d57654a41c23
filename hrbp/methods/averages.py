"""Averages of a model's weights whose masks change while it trains: torch.optim.swa_utils.AveragedModel.

An average takes over the buffers of its model, so the tables of stored blocks, too, and would add up blocks that lie in
different places. Before each update of an average its blocks are therefore laid out as the model's are then: those
that the model has dropped go, new ones start at zero, as in the model.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..layers.record import Lineage, record_of
from ..layers.view import SparseLayer, sparse_layers
from ..wrappers import unwrapped


def check(averages: Sequence[nn.Module], layers: Mapping[str, SparseLayer], who: str) -> None:
    """Refuse models that are no copies of the one with these sparse layers."""
    for i, average in enumerate(averages):
        theirs = sparse_layers(average)
        for name, layer in layers.items():
            if name not in theirs or theirs[name].shape != layer.shape or theirs[name].master != layer.master:
                raise ValueError(
                    f"{who}: ema[{i}] has no sparse layer {name!r} as the model has; it needs copies of the model,"
                    " made after sparsify()"
                )


def follow(model: nn.Module, known: Collection[nn.Module]) -> None:
    """Let every AveragedModel that was made from this model follow its masks; those `known` are left alone.

    Averages by hand, over copies that nobody tells from others, are not found. Every object of the process is looked
    at, which takes 0.1 s: call it when there are new copies.
    """
    record = record_of(model)
    assert record is not None
    ours = {id(unwrapped(average)) for average in known}
    kinds = {AveragedModel}
    while more := {kind for above in kinds for kind in above.__subclasses__()} - kinds:
        kinds |= more
    # The type, as `isinstance` asks proxies for their class, and some act on that.
    for found in [thing for thing in gc.get_objects() if type(thing) in kinds]:
        if id(unwrapped(found)) not in ours and any(lineage.parent is record.lineage for lineage in _lineages(found)):
            found.update_parameters = types.MethodType(update_parameters, found)


def update_parameters(self: AveragedModel, model: nn.Module) -> None:
    """AveragedModel.update_parameters, with the blocks of the average laid out as the model's are."""
    pairs = _pairs(self, model)
    for average, source in pairs:
        _lay_out(average, source)
    type(self).update_parameters(self, model)
    for average, source in pairs:
        if average.blocksize is not None:  # use_buffers=True averages integers, which rounds them
            average.module.index.copy_(source.module.index)


def _lineages(model: nn.Module) -> dict[Lineage, nn.Module]:
    """Every model that `sparsify` made in this one, by its lineage."""
    records = ((module.__dict__.get("_hrbp_sparsity"), module) for module in model.modules())
    return {record.lineage: module for record, module in records if record is not None}


def _pairs(average: nn.Module, model: nn.Module) -> list[tuple[SparseLayer, SparseLayer]]:
    """The sparse layers of the average, each with that of the model it was copied from."""
    sources, pairs = _lineages(model), []
    for lineage, module in _lineages(average).items():
        parent = lineage.parent
        while parent is not None and parent not in sources:
            parent = parent.parent
        if parent is not None:
            theirs = sparse_layers(sources[parent])
            pairs += [(layer, theirs[name]) for name, layer in sparse_layers(module).items() if name in theirs]
    return pairs


def _lay_out(average: SparseLayer, source: SparseLayer) -> None:
    """Let the average keep what its source keeps."""
    if not source.master:
        index = source.module.index.to(average.module.index.device)
        if average.module.index.shape != index.shape or not torch.equal(average.module.index, index):
            average.module.set_pattern(source.module.pattern)
    elif source.module.rule is None and not torch.equal(average.mask(), source.mask().to(average.parameter.device)):
        average.set(source.module.selection())  # masks of a rule follow the weights, of an average, too
