"""Import masks of torch.nn.utils.prune."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from blocksparse import bank_shape

from ..layers.in_groups import in_groups, refuses_in_groups
from ..layers.record import SparsityRecord, remember
from ..layers.stored import NAMES, PLAIN, block_module
from ..layers.view import groups_of
from ..structures.base import Selection, Structure
from ..structures.grains import BOXES, Grains
from ..structures.mixed import Mixed
from ..structures.n_m import NM
from ..structures.recognise import grain, n_m_ratio
from ..structures.registry import structure as make_structure
from .candidates import unfit, users_of
from .carry import replace_module
from .decision import dense_model


def from_prune(
    model: nn.Module, *, structure: str | None = None, backend: str | None = None, **options: Any
) -> nn.Module:
    """Take over the masks of torch.nn.utils.prune, in place: every layer pruned by it becomes sparse.

        prune.l1_unstructured(model.conv2, "weight", amount=0.9)
        hrbp.from_prune(model)

    A layer keeps the weights that its mask keeps, and loses weight_orig, weight_mask and the hook that multiplies them.
    It stores them as blocks (BSRConv2d, BSRConv1d, BSRLinear), single weights as (1, 1); the model is then one that
    `sparsify` might have made. What cannot be taken over stays as torch.nn.utils.prune left it: pruned biases and the
    weights beside them, other kinds of layers, all that `sparsify` would leave dense (shared weights, ...). `summary`
    says which layers, and why. The first and the last layers are taken like any others.

    Call it before the optimizer is made: parameters are replaced.

    Args:
        model: any module with pruned layers.
        structure: of all masks, as in `make_mask`, one of single weights or boxes (unstructured, n:m, kernel, filter,
            block, ...): what the `Evolver` exchanges. Default: the largest box that all masks are made of; n:m where
            they are such; where that leaves some of them single weights, each mask's own box ("mixed": masks that only
            stay as they are; structure="unstructured" makes such a model one whose masks may change).
        backend: of the sparse layers, as in blocksparse.conv2d.
        **options: of the structure.

    Returns:
        The model, which computes the same.

    Raises:
        ValueError: nothing is pruned that can be taken over, or a mask does not have the structure; the model is
            untouched then.

    Equivalent to:
        prune.remove(layer, "weight") for each pruned layer, as far as what is computed.
    """
    who = "from_prune()"
    whole, model = model, dense_model(model, who)
    users = users_of(model)
    taken: dict[str, tuple[nn.Module, Any, Tensor]] = {}  # layer, itself as it would be unpruned, mask [K, C, R, S]
    left = {}
    for name, module in model.named_modules():
        hooks = _hooks(module)
        if "weight" not in hooks or not isinstance(module, PLAIN):
            if hooks:
                kind = isinstance(module, PLAIN)
                left[name] = _left(hooks, "its weight is not pruned" if kind else f"a {type(module).__name__}")
            elif isinstance(module, PLAIN):
                left[name] = "not pruned"
            continue
        plain, mask = _unpruned(module), module.get_buffer("weight_mask")
        if len(hooks) > 1:
            reason: str | None = f"its {next(part for part in hooks if part != 'weight')} is pruned, too"
        elif not bool(((mask == 0) | (mask == 1)).all()):
            reason = "its mask has values other than 0 and 1"
        else:
            reason = unfit(name, plain, users)
        if reason is None:
            taken[name] = module, plain, mask.bool().reshape(bank_shape(mask.shape))
        else:
            left[name] = _left(hooks, reason)
    if not taken:
        reasons = "; ".join(f"{name}: {why}" for name, why in left.items() if why != "not pruned")
        raise ValueError(
            f"{who}: no {NAMES} has a mask to take over ({reasons or 'nothing is pruned'}); it needs layers"
            " pruned by torch.nn.utils.prune, before prune.remove"
        )
    masks = {name: mask for name, (_, _, mask) in taken.items()}
    groups = {name: groups_of(plain) for name, (_, plain, _) in taken.items()}
    rule, selections = _chosen(masks, groups, structure, options, who)
    makes: list[Callable[[], None]] = []
    for name, (layer, plain, _) in taken.items():
        made = block_module(plain, selections[name].pattern(), backend)
        makes.append(partial(_put_blocks, model, layer, made))
    asked = {name: float(mask.double().mean()) for name, mask in masks.items()}
    for make in makes:  # nothing can fail from here on
        make()
    remember(model, SparsityRecord(rule, "global", asked, left, saliency="torch.nn.utils.prune"))
    return whole


# ---------------------------------------------------------------------- a pruned layer


def _hooks(module: nn.Module) -> dict[str, int]:
    """What torch.nn.utils.prune masks in a module: name of the parameter -> number of its hook."""
    found = module._forward_pre_hooks.items()
    return {hook._tensor_name: key for key, hook in found if isinstance(hook, BasePruningMethod)}


def _left(hooks: dict[str, int], reason: str) -> str:
    return f"torch.nn.utils.prune still masks its {' and '.join(hooks)}: {reason}"


def _unpruned(layer: Any) -> Any:
    """A new module with the Parameters of the layer, without its mask."""
    plain = copy.copy(layer)
    for name in ("_parameters", "_buffers", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        plain.__dict__[name] = vars(layer)[name].copy()
    _unprune(plain)
    return plain


def _unprune(layer: Any) -> None:
    """Make weight_orig the weight again, and the first parameter, as it was."""
    key = _hooks(layer)["weight"]
    del layer._forward_pre_hooks[key]
    layer._forward_pre_hooks_with_kwargs.pop(key, None)
    del layer._buffers["weight_mask"]
    layer.__dict__.pop("weight", None)
    parameters = {name: layer._parameters.pop(name) for name in list(layer._parameters)}
    layer._parameters.update({"weight": parameters.pop("weight_orig")} | parameters)


def _put_blocks(model: nn.Module, layer: nn.Module, made: nn.Module) -> None:
    _unprune(layer)
    replace_module(model, layer, made)


# ---------------------------------------------------------------------- which structure masks have


def _chosen(
    masks: dict[str, Tensor], groups: dict[str, int], name: str | None, options: dict[str, Any], who: str
) -> tuple[Structure, dict[str, Selection]]:
    """The common structure of all masks, and the selection of each; groups: of each layer."""

    def selected(layer: str, rule: Structure) -> Selection:
        mask = masks[layer]
        return Selection(mask, in_groups(rule, groups[layer]).blocksize(mask.shape))

    rule: Structure
    if name is not None:
        rule = make_structure(name, **options)
        if not rule.can("has"):
            raise ValueError(
                f"{who}: structure is {rule.name!r}, whose filters are regrouped; it needs one of single weights or"
                " boxes (unstructured, n:m, kernel, block, ...), or None"
            )
        for layer, mask in masks.items():
            own = in_groups(rule, groups[layer])
            if refuses_in_groups(rule, mask.shape, groups[layer]) is not None or not own.has(mask):
                raise ValueError(
                    f"{who}: the mask of {layer} is not of structure {rule.name!r}; leave structure out to have"
                    " the one that it is of"
                )
        return rule, {layer: selected(layer, rule) for layer in masks}
    if options:
        raise TypeError(f"{who}: no option {', '.join(sorted(options))} without a structure")
    # A box of a convolution in groups lies in one of them.
    shapes = {layer: (mask.shape[0] // groups[layer], *mask.shape[1:]) for layer, mask in masks.items()}
    boxes = {layer: (math.gcd((box := grain(mask))[0], shapes[layer][0]), *box[1:]) for layer, mask in masks.items()}
    rule = _grains([(box, shapes[layer]) for layer, box in boxes.items()])
    ratios = {n_m_ratio(mask) for mask in masks.values()}
    if set(boxes.values()) == {(1, 1, 1, 1)} and len(ratios) == 1 and (ratio := ratios.pop()) is not None:
        rule = NM(ratio[1], ratio[0])
    selections = {layer: selected(layer, rule) for layer in masks}
    alone = {layer: selected(layer, _grains([(box, shapes[layer])])) for layer, box in boxes.items()}
    if any(selection.blocksize != (1, 1) == selections[layer].blocksize for layer, selection in alone.items()):
        return Mixed(), alone
    return rule, selections


def _grains(boxes: Collection[tuple[tuple[int, ...], tuple[int, ...]]]) -> Grains:
    """The largest grains that all of these are made of: (box, shape of its layer)."""
    sizes = [
        None if all(box[axis] == shape[axis] for box, shape in boxes) else math.gcd(*(box[axis] for box, _ in boxes))
        for axis in range(4)
    ]
    if None not in sizes[:2] and all(shape[2:] == (1, 1) for _, shape in boxes):
        sizes[2:] = 1, 1  # blocks or single weights, rather than those of all taps
    k, c, r, s = sizes
    for name, box in BOXES.items():
        if box == (k, c, r, s):
            return Grains(name, box)
    if c == 1 and (r, s) == (None, None):
        return Grains("1xn", (k, c, r, s))
    return Grains("block" if (r, s) == (1, 1) else "boxes", (k, c, r, s))
