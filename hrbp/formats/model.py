"""A trained model in a file, sparse or dense."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import BSRPattern, bank_shape

from .. import models
from ..files import whole_file
from ..layers.fused import FusedModel
from ..layers.in_groups import in_groups
from ..layers.master import with_master
from ..layers.record import SparsityRecord, record_of, remember
from ..layers.semi_structured import is_converted
from ..layers.stored import PLAIN, block_module, pattern_of_mask, take_masks, was_masked
from ..layers.view import groups_of, sparse_layers
from ..methods.registry import dense_weight_method
from ..structures.base import Selection, Structure, sparsity_of
from ..structures.registry import CLASSES
from ..surgery.carry import replace_module
from ..surgery.conversion import densify
from ..wrappers import copied, unwrapped
from .packed import PACKED, pack, packs, unpack_masked
from .sealed import MODEL, read, sealed_bytes
from .weights import saved_shape


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model, sparse or dense, to be loaded by `load`: the stored blocks, their pattern, and what it is made of.

    Single weights are written with a bit for each weight of the layer where that is less than their index. Dense master
    weights are written whole; `release` the model first where only what takes part is wanted.

    The file appears whole or not at all; torch.load(path, weights_only=True) reads it, too.

    Args:
        model: any module; wrappers (DistributedDataParallel, torch.compile, AveragedModel) are looked through.
        path: of the file.
    """
    model = unwrapped(model)
    if isinstance(model, FusedModel):
        raise ValueError(
            "save(): the model is fused; save it before fuse(), and fuse what load() returns (or torch.save)"
        )
    if converted := [name for name, module in model.named_modules() if is_converted(module)]:
        raise ValueError(f"save(): {converted[0]} is on sparse tensor cores; save before to_semi_structured()")
    packed = {}
    for name, layer in sparse_layers(model).items():
        if not layer.master and packs(pattern := layer.module.pattern):
            packed[name] = pattern, list(layer.dense_shape)
    content = {
        "network": getattr(model, "_hrbp_network", None),
        "plan": plain_record(model),
        "state_dict": pack(model.state_dict(), packed),
        PACKED: {name: shape for name, (_, shape) in packed.items()},
    }
    with whole_file(path) as file:
        file.write(sealed_bytes(MODEL, content))


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str = "cpu"
) -> nn.Module:
    """The model that `save` wrote, in eval mode.

        model = hrbp.load("model.pt")
        y = model(x)

    Args:
        path: of the file.
        model: a dense model as it was before `sparsify`, for networks that hrbp.models.build does not build; its layers
            are replaced and its weights overwritten.
        device: where the model goes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or foreign, or does not fit the model.
    """
    who = "load()"
    content = read(path, MODEL, who)
    if model is None and content.get("network") is None:
        raise ValueError(
            f"{who}: {path} holds a network that hrbp.models.build does not build; pass model=, as it was before"
            " sparsify()"
        )
    try:
        model = models.rebuild(content["network"]) if model is None else model
        record = _record(content["plan"])
        state = unpack_masked(content["state_dict"], content.get(PACKED, {}))
        _make_sparse(model, state, record)
        take_masks(state, "", model)
        model.load_state_dict(state)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__} "
        raise ValueError(f"{who}: {path} does not fit the model: {kind}{error}") from error
    if record is not None:
        remember(model, record)
    return model.to(device).eval()


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the dense model that computes the same, zeros where nothing is stored; the model stays.

        torch.save(hrbp.dense_state_dict(model), "dense.pt")

    The file needs neither hrbp nor blocksparse: dense_model.load_state_dict(torch.load("dense.pt")), where dense_model
    is the model as it was before `sparsify`.
    """
    return densify(copied(unwrapped(model))).state_dict()


def plain_record(model: nn.Module) -> dict[str, Any] | None:
    """What `sparsify` did to a model, as plain values."""
    record = record_of(model, required=False)
    if record is None:
        return None
    rule = {"kind": type(record.structure).__name__, **dataclasses.asdict(record.structure)}  # type: ignore[call-overload]
    return {
        "structure": rule, "distribution": record.distribution, "asked": record.asked, "dense": record.dense,
        "method": record.method, "target": record.target,
        "saliency": record.saliency, "saliency_why": record.saliency_why,
        **({"per_layer": record.per_layer} if record.per_layer else {}),
        **({"min_density": record.min_density} if record.min_density else {}),
    }  # fmt: skip


def _record(plain: dict[str, Any] | None) -> SparsityRecord | None:
    if plain is None:
        return None
    rule = dict(plain["structure"])
    rule.pop("stored", None)  # of older files: whether grains were stored, which all are
    structure = CLASSES[rule.pop("kind")](**rule)
    # What older files do not have.
    later = {
        name: plain[name]
        for name in ("method", "target", "saliency", "saliency_why", "per_layer", "min_density")
        if name in plain
    }
    return SparsityRecord(structure, plain["distribution"], plain["asked"], plain["dense"], **later)


def _make_sparse(model: nn.Module, state: Mapping[str, Tensor], record: SparsityRecord | None) -> None:
    """Replace the layers of a dense model that are sparse in `state`; their values are loaded later."""
    method = None if record is None else dense_weight_method(record.method, "its record")
    if record is not None and method is not None and (reason := method.refuses(record.structure)):
        raise ValueError(reason)
    if record is not None and method is not None and method.follows_weight:
        for name, density in record.asked.items():
            if type(dense := model.get_submodule(name)) in PLAIN:
                made = with_master(dense, rule=record.structure, sparsity=sparsity_of(density))
                replace_module(model, dense, made)
    for key in state:
        name, _, part = key.rpartition(".")
        if part not in ("indptr", "mask"):
            continue
        layer: Any = model.get_submodule(name)
        if type(layer) not in PLAIN:  # sparse already, or a buffer of the same name
            continue
        if part == "mask" and record is not None and method is not None:
            rule = in_groups(record.structure, groups_of(layer))
            selection = _selection(rule, state[key], state.get(f"{name}.row_order"))
            replace_module(model, layer, with_master(layer, selection))
            continue
        shape = bank_shape(layer.weight.shape)
        if part == "mask":  # of single weights that were packed, see packed.py
            if not was_masked(state, f"{name}.", shape):
                raise ValueError(f"{name} has a mask, and no weight of the same shape")
            pattern = pattern_of_mask(state[key])
        else:
            values, indices, order = (state.get(f"{name}.{part}") for part in ("values", "indices", "row_order"))
            if values is None or values.dim() != 3 or indices is None:
                raise ValueError(f"{name} has no values [nnzb, bk, bc] or no indices")
            saved = saved_shape(state, name)
            if saved is not None and saved != shape:
                raise ValueError(
                    f"{name} has a weight of shape {saved} in the file, and {tuple(layer.weight.shape)} here"
                )
            pattern = BSRPattern(shape, values.shape[1:], state[key], indices, order)
        replace_module(model, layer, block_module(layer, pattern, None))


def _selection(rule: Structure, mask: Tensor, row_order: Tensor | None) -> Selection:
    """As `sparsify` with a method made it, of a layer that has a mask of its own."""
    shape = bank_shape(mask.shape)
    return Selection(mask.view(shape), rule.blocksize(shape), row_order)
