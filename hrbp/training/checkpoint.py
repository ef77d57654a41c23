"""Files that hold a trained model or a training under way: written whole, and refused when damaged or foreign."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import BSRConv2d, BSRLinear, BSRPattern

from .. import models
from ..files import is_whole, seal_of, whole_file, with_seal
from ..formats.weights import MASKED as PACKED
from ..formats.weights import pack_masked, unpack_masked
from ..layers.master import put_master
from ..layers.semi_structured import is_converted
from ..structures.registry import NM, Choice, Elementwise, Grains, Groups, Mixed, sparsity_of
from ..surgery.conversion import (
    FOLLOWING,
    MASKED,
    Sparsity,
    _replace,
    copied,
    densify,
    has_blocks,
    plan_of,
    put_mask,
    sparse_layers,
    unwrapped,
)

VERSION = 1
MODEL, TRAINING = "model", "training"
STRUCTURES = {kind.__name__: kind for kind in (Grains, NM, Groups, Elementwise, Mixed)}
LAST, PREVIOUS, DIVERGED = "last.pt", "previous.pt", "diverged.pt"


# ---------------------------------------------------------------------- models


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model, sparse or dense, to be loaded by `load`: the stored blocks, their pattern, and what it is made of.

    Masked layers are written as the weights that they keep and a bit for each that they might. Dense master weights are
    written whole; `release` the model first where only what takes part is wanted.

    The file appears whole or not at all; torch.load(path, weights_only=True) reads it, too.

    Args:
        model: any module; wrappers (DistributedDataParallel, torch.compile, AveragedModel) are looked through.
        path: of the file.
    """
    model = unwrapped(model)
    if converted := [name for name, module in model.named_modules() if is_converted(module)]:
        raise ValueError(f"save(): {converted[0]} is on sparse tensor cores; save before to_semi_structured()")
    state = dict(model.state_dict())
    masked = [name for name, layer in sparse_layers(model).items() if not (layer.blocks or layer.master)]
    shapes = {name: pack_masked(state, name) for name in masked}
    content = {
        "network": getattr(model, "_hrbp_network", None),
        "plan": plain_plan(model),
        "state_dict": state,
        PACKED: shapes,
    }
    with whole_file(path) as file:
        file.write(_sealed(MODEL, content))


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
        plan = _plan(content["plan"])
        state = unpack_masked(content["state_dict"], content.get(PACKED, {}))
        _make_sparse(model, state, plan)
        model.load_state_dict(state)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__} "
        raise ValueError(f"{who}: {path} does not fit the model: {kind}{error}") from error
    if plan is not None:
        model._hrbp_sparsity = plan  # type: ignore[assignment]
    return model.to(device).eval()


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the dense model that computes the same, zeros where nothing is stored; the model stays."""
    return densify(copied(unwrapped(model))).state_dict()


def plain_plan(model: nn.Module) -> dict[str, Any] | None:
    """What `sparsify` did to a model, as plain values."""
    plan = plan_of(model, required=False)
    if plan is None:
        return None
    rule = {"kind": type(plan.structure).__name__, **dataclasses.asdict(plan.structure)}  # type: ignore[call-overload]
    return {
        "structure": rule, "distribution": plan.distribution, "asked": plan.asked, "dense": plan.dense,
        "method": plan.method, "target": plan.target, "saliency": plan.saliency, "saliency_why": plan.saliency_why,
    }  # fmt: skip


def _plan(plain: dict[str, Any] | None) -> Sparsity | None:
    if plain is None:
        return None
    rule = dict(plain["structure"])
    structure = STRUCTURES[rule.pop("kind")](**rule)
    # What older files do not have.
    later = plain.get("method"), plain.get("target", {}), plain.get("saliency", ""), plain.get("saliency_why", "")
    return Sparsity(structure, plain["distribution"], plain["asked"], plain["dense"], *later)


def _make_sparse(model: nn.Module, state: Mapping[str, Tensor], plan: Sparsity | None) -> None:
    """Replace the layers of a dense model that are sparse in `state`; their values are loaded later."""
    method = None if plan is None else plan.method
    if plan is not None and method in FOLLOWING:
        for name, density in plan.asked.items():
            if type(dense := model.get_submodule(name)) in MASKED:
                put_master(dense, rule=plan.structure, sparsity=sparsity_of(density))
    for key in state:
        name, _, part = key.rpartition(".")
        if part not in ("indptr", "mask"):
            continue
        layer: Any = model.get_submodule(name)
        if type(layer) not in MASKED:  # sparse already, or a buffer of the same name
            continue
        if part == "mask" and plan is not None and method is not None:
            _put_master(layer, plan, state[key], state.get(f"{name}.row_order"))
            continue
        if part == "mask":
            put_mask(layer, state[key].clone())
            continue
        values, indices, order = (state.get(f"{name}.{part}") for part in ("values", "indices", "row_order"))
        if values is None or values.dim() != 3 or indices is None:
            raise ValueError(f"{name} has no values [nnzb, bk, bc] or no indices")
        shape = (*layer.weight.shape, 1, 1)[:4]
        pattern = BSRPattern(shape, values.shape[1:], state[key], indices, order)
        made = BSRConv2d if isinstance(layer, nn.Conv2d) else BSRLinear
        _replace(model, layer, made.from_dense(layer, pattern))


def _put_master(layer: Any, plan: Sparsity, mask: Tensor, row_order: Tensor | None) -> None:
    """As `sparsify` with a method made this layer, which has a mask of its own."""
    assert isinstance(plan.structure, Grains)
    shape = (*mask.shape, 1, 1)[:4]
    choice = Choice(mask.view(shape), plan.structure.blocksize(shape), row_order)
    put_master(layer, choice, blocks=has_blocks(choice))


# ---------------------------------------------------------------------- trainings


def write_training(folder: Path, state: dict[str, Any], name: str = LAST) -> None:
    """Write last.pt; what was last.pt becomes previous.pt. At every moment one of the two is whole."""
    content, last = _sealed(TRAINING, state), folder / LAST
    with whole_file(folder / name) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if name == LAST and last.exists():
            os.replace(last, folder / PREVIOUS)


def read_training(folder: Path, refuses: Callable[[Any], str | None], say: Callable[[str], None]) -> Any:
    """The state in last.pt, or in previous.pt where that cannot be used; None where there is neither.

    Args:
        folder: of the two files.
        refuses: why a state is not of this training, or None.
        say: told which file is not used, and why. It is set aside under another name.

    Raises:
        ValueError: there are checkpoints, and none can be used. They stay as they are.
    """
    bad: dict[Path, str] = {}
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = read(path, TRAINING, "resume")
        except ValueError as error:
            bad[path] = str(error)
            continue
        if reason := refuses(state):
            bad[path] = f"resume: {path} is of another training: {reason}"
            continue
        for refused, why in bad.items():
            os.replace(refused, refused.with_suffix(".refused"))  # or it would displace the good one
            say(f"{why}; set aside as {refused.with_suffix('.refused').name}, continuing from {path}")
        return state
    if bad:
        raise ValueError("; ".join(bad.values()) + "; nothing was changed: use the settings it had, or another folder")
    return None


def has_training(folder: Path) -> bool:
    """Whether there are checkpoints."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def stamp(folder: Path) -> tuple[int, int] | None:
    """Which file last.pt is; None: there is none. Another one that is written has another stamp."""
    try:
        found = (folder / LAST).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while writing left behind."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- bytes


def _sealed(kind: str, content: dict[str, Any]) -> bytes:
    """torch.save's bytes, and a last line that says what they are and what their checksum is."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return with_seal(kind, VERSION, buffer.getvalue())


def read(path: str | os.PathLike[str], kind: str, who: str = "read()") -> dict[str, Any]:
    """The content of a file of this kind ("model" or "training"), tensors on the CPU; nothing in it is executed.

    Raises ValueError for a file that is damaged, foreign, of the other kind or of another version.
    """
    with open(path, "rb") as file:
        seal = seal_of(file)
        if seal is None:
            raise ValueError(
                f"{who}: {path} is cut short or was not written by hrbp; it needs a whole hrbp {kind} file"
            )
        if seal.kind != kind:
            raise ValueError(f"{who}: {path} holds a {seal.kind}; it needs a {kind}")
        if seal.version != str(VERSION):
            raise ValueError(f"{who}: {path} has format {seal.version}; this hrbp reads format {VERSION}")
        if not is_whole(file, seal):
            raise ValueError(f"{who}: {path} is damaged: its checksum does not fit its content")
        file.seek(0)
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises nearly anything
            raise ValueError(f"{who}: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{who}: {path} holds a {type(found).__name__}; it needs the dict that hrbp writes")
    return found


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two plain values differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            text
            for key in dict.fromkeys([*there, *here])
            for text in differences(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if there == here else [f"{name} is {_short(there)} there and {_short(here)} here"]


def misfits(there: Any, like: Any, name: str = "") -> str | None:
    """Where a state is of another kind than one that is `like` it, in words; None: nowhere.

    Compared are kinds of values and dtypes and shapes of tensors, under keys that both have; of tensors by name all.
    """
    if isinstance(like, dict) and isinstance(there, dict):
        tensors = any(isinstance(value, Tensor) for value in like.values())
        if tensors and (missing := [str(key) for key in like if key not in there]):
            return f"{name} has no {', '.join(missing[:3])}"
        parts = (misfits(there[key], like[key], f"{name}.{key}" if name else str(key)) for key in there.keys() & like)
        return next((part for part in parts if part), None)
    if isinstance(like, Tensor) and isinstance(there, Tensor):
        fits = (there.dtype, there.shape) == (like.dtype, like.shape)
    else:
        kinds = [float if type(value) is int else type(value) for value in (there, like)]
        fits = like is None or kinds[0] is kinds[1]
    return None if fits else f"{name} is {kind_of(there)} and needs {kind_of(like)}"


def kind_of(value: Any) -> str:
    """Dtype and shape of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
