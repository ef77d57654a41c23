"""Decide what `sparsify` does: which layers become sparse, with which structure and density, and which weights stay."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import any_case, check_sparsity
from ..density import DISTRIBUTIONS, check_min_density, densities
from ..layers.in_groups import in_groups, refuses_in_groups
from ..layers.record import SparsityRecord, record_of
from ..layers.stored import NAMES
from ..layers.view import groups_of, shape4
from ..methods.base import Method
from ..methods.registry import dense_weight_method
from ..saliencies import SALIENCIES
from ..saliencies import saliency as score_weights
from ..structures.base import Selection, Structure, sparsity_of
from ..structures.registry import STRUCTURES, options_in_models
from ..structures.registry import structure as make_structure
from ..wrappers import unwrapped
from .candidates import Selector, candidates
from .fresh import trained


def dense_model(model: nn.Module, who: str) -> nn.Module:
    """The model inside its wrappers; refused where it is sparse already, or may not be changed any more."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{who}: the model is in DistributedDataParallel, which has set up its parameters; call {who} with the"
            " model before it is wrapped"
        )
    if record_of(model, required=False) is not None:
        raise ValueError(f"{who}: the model is sparse already; call densify(model) first")
    return unwrapped(model)


def structure_for(method: type[Method] | None, name: str, options: Mapping[str, Any]) -> Structure:
    """The structure of this name, with the options that the method needs besides (SUBP: a uniform 1xn).

    Its option `method` is `rule` here: a method is what trains a model.
    """
    if "method" in options:
        raise ValueError(f"sparsify(): method of structure {name!r} is given as rule=; method= is that of the training")
    options = {"method" if option == "rule" else option: value for option, value in options.items()}
    needed = {} if method is None else method.structure_options(any_case(name, STRUCTURES))
    return make_structure(name, **needed | dict(options))


@dataclass(frozen=True)
class Decision:
    """What `sparsify` will do. Nothing has been changed yet.

    layers      name -> the plain layer that becomes sparse
    selections  name -> the weights it keeps; None: its mask follows its weight, by the record's structure
    record      what the model will remember of it
    """

    layers: dict[str, Any]
    selections: dict[str, Selection | None]
    record: SparsityRecord


def decide(
    model: nn.Module,
    sparsity: float,
    *,
    structure: str,
    method: str | None,
    distribution: str | None,
    min_density: float,
    per_layer: Mapping[str, float] | None,
    saliency: str,
    include: Iterable[Selector] | None,
    exclude: Iterable[Selector] | None,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None,
    seed: int,
    options: dict[str, Any],
) -> Decision:
    """Check all arguments of `sparsify`, and decide what it does. Changes nothing.

    Raises:
        ValueError: no layer is left to make sparse, or an argument is out of range.
    """
    who = "sparsify()"
    check_sparsity(sparsity, who)
    check_min_density(min_density, sparsity, who)
    kind, saliency = dense_weight_method(method, who), any_case(saliency, ("auto", *SALIENCIES))
    structure = any_case(structure, STRUCTURES)
    distribution = any_case(distribution, DISTRIBUTIONS) or (Method if kind is None else kind).distribution
    begins_dense, follows_weight = (False, False) if kind is None else (kind.begins_dense, kind.follows_weight)
    if saliency not in ("auto", *SALIENCIES):
        raise ValueError(f"{who}: saliency is {saliency!r}; it needs one of auto, {', '.join(SALIENCIES)}")
    structure_for(kind, structure, options)  # or its error would come after a look at all weights
    include = None if include is None else list(include)
    if isinstance(batch, Iterator):
        batch, seen = itertools.tee(batch)
    else:
        seen = batch
    chosen, dense = candidates(model, include, exclude, seen, who)
    why = ""
    if saliency == "auto":
        reason = trained(model, chosen)
        saliency, why = ("random", "the weights look freshly drawn") if reason is None else ("magnitude", reason)
    gpu = next(iter(chosen.values())).weight.device.type == "cuda" or torch.cuda.is_available() if chosen else False
    options = options_in_models(structure, drawn=saliency == "random", gpu=gpu) | options
    shape_rule = structure_for(kind, structure, options)
    if kind is not None and (reason := kind.refuses(shape_rule)):
        raise ValueError(f"{who}: {reason}")
    for name in list(chosen):
        if reason := refuses_in_groups(shape_rule, shape4(chosen[name]), groups_of(chosen[name])):
            dense[name] = f"{shape_rule.name}: {reason}"
            del chosen[name]
    for selector in include or ():
        if isinstance(selector, str) and (reason := dense.get(selector)) not in (None, "excluded"):
            raise ValueError(f"{who}: include names {selector!r}, which has to stay dense: {reason}; leave it out")
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[-3:])
        raise ValueError(
            f"{who}: no layer to make sparse ({reasons or f'the model has no {NAMES}'}); `include` names layers"
            " that are to be sparse though they are first or last"
        )

    rules = {name: in_groups(shape_rule, groups_of(layer)) for name, layer in chosen.items()}
    scores = score_weights(model, list(chosen), saliency, batch=batch, loss=loss, sparsity=sparsity, seed=seed)
    alone = _given_alone(per_layer or {}, list(chosen), who)
    shared = densities(
        {name: tuple(layer.weight.shape) for name, layer in chosen.items() if name not in alone},
        sparsity,
        distribution,
        scores={
            name: rules[name].ranked(score.view(shape4(chosen[name]))).view(score.shape)
            for name, score in scores.items()
        },
        realise=None if begins_dense else lambda name, at: rules[name].density(shape4(chosen[name]), at),
        min_density=min_density,
    ) if len(alone) < len(chosen) else {}  # fmt: skip
    asked = {name: 1 - alone[name] if name in alone else shared[name] for name in chosen}
    target = {}
    if begins_dense:  # exactly `sparsity` where all layers share it: counts round down from it
        target = {name: sparsity if distribution == "uniform" else sparsity_of(at) for name, at in asked.items()}
        target |= alone
    selections: dict[str, Selection | None] = {}
    for i, (name, layer) in enumerate(chosen.items()):
        share = sparsity_of(asked[name])
        if follows_weight:
            rules[name].choose(layer.weight.detach().view(shape4(layer)).abs(), share)  # raises where it cannot
            selections[name] = None
        else:
            at = 0.0 if target else share
            selections[name] = rules[name].choose(scores[name].view(shape4(layer)), at, seed + i)
    record = SparsityRecord(
        shape_rule, distribution, asked, dense, None if kind is None else kind.name, target, saliency, why, alone,
        min_density,
    )  # fmt: skip
    return Decision(chosen, selections, record)


def uncovered(decided: Decision) -> str | None:
    """Which layers have groups that cannot read every input channel, and what to do; None: there is no such layer."""
    # Of a convolution in groups each has groups of filters for channels of its own.
    made = {
        n: (s.grouping, s.groups) for n, s in decided.selections.items() if s is not None and s.grouping is not None
    }
    found = {name: g.coverage / parts for name, (g, parts) in made.items() if g.coverage < parts}
    if not found:
        return None
    names = list(found)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    worst = min(found, key=lambda name: found[name])
    g, parts = made[worst]
    return (
        f"{', '.join(names[:3])}{more}: too few groups to read every input channel; in {worst} {g.groups // parts} "
        f"groups x {g.channels.shape[1]} channels are {found[worst]:.0%} of {g.shape[1]}, and the others are read by"
        " no filter. Allow more groups (groups=, min_rows=), or keep more of these layers (min_density=, per_layer=)"
    )


def _given_alone(per_layer: Mapping[str, float], names: list[str], who: str) -> dict[str, float]:
    """layer -> the sparsity that was given for it, by its name or by a pattern; of several that fit the last."""
    alone = {}
    for selector, sparsity in per_layer.items():
        found = fnmatch.filter(names, selector)
        if not found:
            raise ValueError(
                f"{who}: per_layer names {selector!r}, which is no layer to make sparse; these are"
                f" {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
        check_sparsity(sparsity, f"{who}: per_layer[{selector!r}]")
        alone.update(dict.fromkeys(found, float(sparsity)))
    return {name: alone[name] for name in names if name in alone}
