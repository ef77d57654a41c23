"""A dense model becomes a sparse one, and back.

Layers whose structure has a BSR form hold their stored blocks and nothing else (blocksparse.BSRConv2d, BSRLinear);
single weights (unstructured, n:m, ...) stay dense tensors under a mask, which saves nothing but shows what they reach.
Training methods that let dropped weights learn, to bring them back (`method`), keep a dense weight (master.py).
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from blocksparse import BSRConv2d, BSRLinear, BSRPattern, optimizer_tensors

from ..arguments import any_case, check_sparsity
from ..density import DISTRIBUTIONS, densities
from ..layers import semi_structured
from ..layers.master import MasterConv2d, MasterLinear, masked_conv, put_master, take_master_off
from ..saliencies import METHODS as SALIENCIES
from ..saliencies import saliency as score_weights
from ..structures.registry import NM, STRUCTURES, Choice, Grains, Structure, sparsity_of
from ..structures.registry import structure as make_structure
from .candidates import Selector, candidates
from .carry import carry
from .fresh import trained

LEAST_BLOCK = 2  # weights of a block: for single ones the index (16 bytes a block) is four times what they take


class MaskedConv2d(nn.Conv2d):
    """nn.Conv2d under a mask: y = conv2d(x, weight * mask). The weight is zero outside the mask, and stays so."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return masked_conv(self, input, self.weight * self.mask)


class MaskedLinear(nn.Linear):
    """nn.Linear under a mask: y = x @ (weight * mask)^T. The weight is zero outside the mask, and stays so."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.mask, self.bias)


MASKED = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}
SPARSE = (BSRConv2d, BSRLinear, MaskedConv2d, MaskedLinear, MasterConv2d, MasterLinear)
FOLLOWING = ("ste", "sr-ste")  # training methods of which the mask follows a dense master weight
METHODS = (*FOLLOWING, "subp")  # all that train one


class Lineage:
    """Which model a model is a deep copy of, and which copies it has: averages of its weights are found by that."""

    def __init__(self, parent: Lineage | None = None) -> None:
        self.parent = parent
        self.copies: weakref.WeakSet[Lineage] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lineage:
        child = Lineage(self)
        self.copies.add(child)
        return child

    def __reduce__(self) -> Any:  # in a file nothing is a copy of anything
        return Lineage, ()


@dataclass(frozen=True)
class Sparsity:
    """How a model was made sparse.

    asked: layer -> the density that its structure was asked for. dense: layer -> why it was left dense. method: that
    layers keep a dense master weight for, or None. target: layer -> the sparsity to which "subp" will prune it.
    saliency: what chose the first masks; saliency_why: what made "auto" take it, or empty.
    """

    structure: Structure
    distribution: str
    asked: dict[str, float]
    dense: dict[str, str]
    method: str | None = None
    target: dict[str, float] = field(default_factory=dict)
    saliency: str = ""
    saliency_why: str = ""
    lineage: Lineage = field(default_factory=Lineage, compare=False, repr=False)


# ---------------------------------------------------------------------- making a model sparse


def sparsify(
    model: nn.Module,
    sparsity: float,
    *,
    structure: str = "hrbp++",
    method: str | None = None,
    distribution: str | None = None,
    saliency: str = "auto",
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] | None = None,
    batch: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    backend: str | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Make the convolutions and linear layers of a model sparse, in place.

    Call it before the optimizer is made: layers are replaced. Weights that are kept keep their values; hooks,
    attributes and biases go with their layer. The first and the last layers and grouped convolutions stay dense; so do
    layers that a structure does not fit, and those that code other than their own forward may read or change
    (subclasses, shared or parametrized weights, weight_norm, pruning: for that see `from_prune`): `summary` says which,
    and why.

    First is a layer that reads the model's input through no other one, last one whose output reaches the model's and
    feeds no other; there may be several. They are found by data flow: in a forward pass of the first of `batch`, or of
    symbols, both on a stand-in for the model; where neither can be had, by order of registration.

    Args:
        model: any module with nn.Conv2d and nn.Linear in it. Wrap it in DistributedDataParallel afterwards.
        sparsity: share of the weights of the layers made sparse that is dropped, in [0, 1). `summary` tells the share
            of the whole model.
        structure: as in `make_mask`. Names, here and below, are taken in any case.
        method: None: layers hold what they keep, and nothing else. "ste", "sr-ste" or "subp": layers keep a dense
            weight, of which they compute with a part, for the `Evolver` method of that name. With the first two (n:m
            and the grains) the mask is at any time that of the largest |weight|, whatever the saliency; with "subp"
            (uniform 1xn) all blocks take part until the Evolver drops them, int(sparsity * C) of every n filters in
            the end.
        distribution: how densities differ between layers: "uniform", "erk", "global" (by score: the best grains of all
            layers). Default: "erk", with "subp" "uniform", as its paper has it.
        saliency: what chooses the weights: "random", "magnitude", "snip", "grasp", "synflow", "magnitude+gradient", or
            "auto": "random" where the weights are freshly drawn, "magnitude" where they look trained or in doubt (see
            fresh.py); `summary` says which it took, and why. With "random", groups (hrbp, hrbp++) are of neighbouring
            filters, which costs nothing when running, and balanced: every channel is read by equally many groups, give
            or take one, rather than some by none. The paper's are drawn independently: row_granule=1, balanced=False.
            "magnitude" of trained weights, structure "2:4", then fine-tuning under the mask that this gives, is ASP
            (Mishra et al., 2021).
        include: only these: names of layers (with * and ? as wildcards) or types. The first and last layers too, if
            they are named. Default: all layers. A layer whose shape the structure refuses stays dense, and the summary
            says why, unless its full name is given here: then that is an error.
        exclude: not these.
        batch, loss: for saliencies that need gradients, see `hrbp.saliency`; the batch finds first and last layers.
        backend: of the sparse layers, as in blocksparse.conv2d.
        seed: of random scores and searches.
        **options: of the structure; see `make_mask`.

    Returns:
        The model.

    Raises:
        ValueError: no layer is left to make sparse, or an argument is out of range; the model is untouched then.
    """
    who = "sparsify()"
    whole, model = model, dense_model(model, who)
    check_sparsity(sparsity, who)
    method, saliency = any_case(method, METHODS), any_case(saliency, ("auto", *SALIENCIES))
    structure = any_case(structure, STRUCTURES)
    distribution = any_case(distribution, DISTRIBUTIONS) or ("uniform" if method == "subp" else "erk")
    if method not in (None, *METHODS):
        raise ValueError(f"{who}: method is {method!r}; it needs one of {', '.join(METHODS)}, or None")
    if saliency not in ("auto", *SALIENCIES):
        raise ValueError(f"{who}: saliency is {saliency!r}; it needs one of auto, {', '.join(SALIENCIES)}")
    structure_for(method, structure, options)  # or its error would come after a look at all weights
    include = None if include is None else list(include)
    if isinstance(batch, Iterator):
        batch, seen = itertools.tee(batch)
    else:
        seen = batch
    chosen, dense = candidates(model, include, exclude, seen, who)
    why = ""
    if saliency == "auto":
        told = trained(model, chosen)
        saliency, why = ("random", "the weights look freshly drawn") if told is None else ("magnitude", told)
    if saliency == "random" and structure in ("hrbp", "hrbp++"):
        options = {"row_granule": None, "balanced": True, **options}
    shape_rule = structure_for(method, structure, options)
    if reason := method_refuses(method, shape_rule):
        raise ValueError(f"{who}: method {method!r} {reason}")
    for name in list(chosen):
        if reason := shape_rule.refuses(_shape4(chosen[name])):
            dense[name] = f"{shape_rule.name}: {reason}"
            del chosen[name]
    for selector in include or ():
        if isinstance(selector, str) and (reason := dense.get(selector)) not in (None, "excluded"):
            raise ValueError(f"{who}: include names {selector!r}, which has to stay dense: {reason}; leave it out")
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[-3:])
        raise ValueError(
            f"{who}: no layer to make sparse ({reasons or 'the model has no Conv2d or Linear'}); `include` names layers"
            " that are to be sparse though they are first or last"
        )

    scores = score_weights(model, list(chosen), saliency, batch=batch, loss=loss, sparsity=sparsity, seed=seed)
    asked = densities(
        {name: tuple(layer.weight.shape) for name, layer in chosen.items()},
        sparsity,
        distribution,
        scores={
            name: shape_rule.ranked(score.view(_shape4(chosen[name]))).view(score.shape)
            for name, score in scores.items()
        },
        realise=None if method == "subp" else lambda name, at: shape_rule.density(_shape4(chosen[name]), at),
    )
    target = {}
    if method == "subp":  # the very number where it is one for all, as counts round it down
        target = {name: sparsity if distribution == "uniform" else sparsity_of(at) for name, at in asked.items()}
    makes: list[Callable[[], None]] = []
    for i, (name, layer) in enumerate(chosen.items()):
        share = sparsity_of(asked[name])
        if method in FOLLOWING:
            shape_rule.choose(layer.weight.detach().view(_shape4(layer)).abs(), share)  # refuses what it cannot keep
            makes.append(partial(put_master, layer, rule=shape_rule, sparsity=share))
            continue
        choice = shape_rule.choose(scores[name].view(_shape4(layer)), 0.0 if target else share, seed + i)
        if method is not None:
            makes.append(partial(put_master, layer, choice, blocks=has_blocks(choice), backend=backend))
        elif has_blocks(choice):
            makes.append(partial(_replace, model, layer, _block_module(layer, choice.pattern(), backend)))
        else:
            makes.append(partial(put_mask, layer, choice.mask))
    for make in makes:  # nothing can fail from here on
        make()
    plan = Sparsity(shape_rule, distribution, asked, dense, method, target, saliency, why)
    model._hrbp_sparsity = plan  # type: ignore[assignment]
    return whole


def dense_model(model: nn.Module, who: str) -> nn.Module:
    """The model inside its wrappers; refused where it is sparse already, or may not be changed any more."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{who}: the model is in DistributedDataParallel, which has set up its parameters; call {who} with the"
            " model before it is wrapped"
        )
    if plan_of(model, required=False) is not None:
        raise ValueError(f"{who}: the model is sparse already; call densify(model) first")
    return unwrapped(model)


def structure_for(method: str | None, name: str, options: Mapping[str, Any]) -> Structure:
    """The structure of this name and options; 1xn is uniform for "subp" unless they say otherwise."""
    soft = (any_case(method, METHODS), any_case(name, STRUCTURES)) == ("subp", "1xn")
    return make_structure(name, **({"uniform": True} if soft else {}) | dict(options))


def method_refuses(method: str | None, rule: Structure) -> str | None:
    """Why a training method with a dense master weight cannot have this structure, or None."""
    if method in FOLLOWING and not isinstance(rule, NM | Grains):
        return f"makes masks anew at every step; it needs n:m or grains (unstructured, kernel, ...), not {rule.name!r}"
    if method == "subp" and not (isinstance(rule, Grains) and rule.name == "1xn" and rule.uniform):
        return "trains uniform 1xn blocks; it needs structure '1xn' with uniform=True"
    return None


def has_blocks(choice: Choice) -> bool:
    """Whether a choice is stored as blocks, rather than as a mask over a dense weight."""
    return choice.blocksize is not None and math.prod(choice.blocksize) >= LEAST_BLOCK


def densify(model: nn.Module) -> nn.Module:
    """Turn every sparse layer into a plain nn.Conv2d or nn.Linear that computes the same, in place; returns the model.

    Works on any model with BSR layers, also ones not made by `sparsify`.
    """
    for module in list(model.modules()):
        if isinstance(module, BSRConv2d | BSRLinear):
            if module is model:
                dense = module.to_dense()
                carry(module, dense, replaces=False)
                return dense
            _replace(model, module, module.to_dense())
        elif isinstance(module, MaskedConv2d | MaskedLinear):
            _take_mask_off(module)
        elif isinstance(module, MasterConv2d | MasterLinear):
            take_master_off(module)
        elif semi_structured.is_converted(module):
            semi_structured.revert(module)
    if plan_of(model, required=False) is not None:
        del unwrapped(model)._hrbp_sparsity
    return model


def release(model: nn.Module) -> nn.Module:
    """Give up the dense master weights of `sparsify(method=...)`, in place: what takes no part is dropped.

    Layers then hold what they compute with, as `sparsify` without a method leaves them: stored blocks, or a mask. Other
    layers stay as they are. Returns the model, which computes the same; an optimizer has to be made anew.
    """
    plan = plan_of(model, required=False)
    for layer in sparse_layers(model).values():
        if layer.master:
            module = layer.module
            mask, pattern = layer.mask(), None if module.blocksize is None else module.pattern
            backend = module.backend
            take_master_off(module)
            if pattern is None:
                put_mask(module, mask)
            else:
                _replace(unwrapped(model), module, _block_module(module, pattern, backend))
    if plan is not None:
        unwrapped(model)._hrbp_sparsity = replace(plan, method=None, target={})  # type: ignore[assignment]
    return model


def to_semi_structured(model: nn.Module) -> dict[str, str | None]:
    """Put the 2:4 layers of a model on sparse tensor cores, in place, for inference.

        model = hrbp.load("2-4.pt").half().cuda()
        print(hrbp.to_semi_structured(model))

    Linear layers and 1x1 convolutions in float16 or bfloat16, on NVIDIA GPUs from compute capability 8.0 on, whose
    weight has at most 2 of 4 neighbouring input channels, whoever made it so: their weight becomes a
    torch.sparse.SparseSemiStructuredTensor, at 9/16 of the memory. Others stay as they are.

    Returns:
        layer -> why it stays, None for those that were converted.
    """
    model, told = unwrapped(model), {}
    sparse = sparse_layers(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear | BSRConv2d | BSRLinear) and not semi_structured.is_converted(
            module
        ):
            layer = sparse.get(name)
            told[name] = semi_refuses(module, layer)
            if told[name] is None:
                weight = module.weight.detach().view(_shape4(module)) if layer is None else layer.weight()
                if isinstance(module, MaskedConv2d | MaskedLinear):
                    _take_mask_off(module)
                elif isinstance(module, MasterConv2d | MasterLinear):
                    take_master_off(module)
                semi_structured.convert(module, weight)
    return told


def semi_refuses(module: Any, layer: SparseLayer | None) -> str | None:
    """Why `to_semi_structured` leaves a layer as it is, or None."""
    if layer is None and type(module) not in MASKED:
        return f"a {type(module).__name__}, whose forward may differ"
    return semi_structured.refuses(
        module, module.weight.detach().view(_shape4(module)) if layer is None else layer.weight()
    )


def plan_of(model: nn.Module, required: bool = True) -> Sparsity | None:
    """What `sparsify` did to this model (or the model inside a DistributedDataParallel or compiled one)."""
    plan = getattr(unwrapped(model), "_hrbp_sparsity", None)
    if plan is None and required:
        raise ValueError("the model is not sparse; call hrbp.sparsify(model, sparsity) first")
    return plan


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, AveragedModel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model with weights that hooks compute (weight_norm, pruning), which have gradients."""
    computed = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed if not t.is_leaf})


def _shape4(layer: Any) -> tuple[int, int, int, int]:
    shape = list(layer.weight.shape)
    k, c, r, s = shape if len(shape) == 4 else [*shape, 1, 1]
    return k, c, r, s


def _block_module(layer: nn.Conv2d | nn.Linear, pattern: BSRPattern, backend: str | None) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return BSRConv2d.from_dense(layer, pattern, backend=backend)
    return BSRLinear.from_dense(layer, pattern, backend=backend)


def put_mask(layer: Any, mask: Tensor) -> None:
    """Make a plain layer a masked one, in place; its weight stays the same Parameter."""
    with torch.inference_mode(False):  # a mask of its own, and one that can be trained under
        mask = mask.view(layer.weight.shape).to(layer.weight.device, copy=True)
    with torch.no_grad():
        layer.weight.mul_(mask)
    layer.__class__ = MASKED[type(layer)]
    layer.register_buffer("mask", mask)


def _take_mask_off(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(layer.mask)  # optimizers that are not element-wise (Muon) move the others, too
    del layer.mask
    layer.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever the model holds `old`, with what users put on that."""
    carry(old, new)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


# ---------------------------------------------------------------------- the sparse layers of a model


class SparseLayer:
    """One sparse layer, whichever way it is stored: its mask, its weights, and a new choice of them.

    blocks: it holds stored blocks and nothing else. master: it holds a dense weight and computes with a part of it.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.blocks = isinstance(module, BSRConv2d | BSRLinear)
        self.master = isinstance(module, MasterConv2d | MasterLinear)

    @property
    def runs_blocks(self) -> bool:
        """Whether it computes on stored blocks, rather than on a dense weight under a mask."""
        return self.blocks or (self.master and self.module.blocksize is not None)

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer updates: the stored blocks, or the dense weight, masked or master."""
        return self.module.values if self.blocks else self.module.weight

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.module.weight_shape if self.blocks else _shape4(self.module)

    def mask(self) -> Tensor:
        """bool [K, C, R, S], a copy."""
        if self.blocks:
            return self.module.pattern.to_mask()
        if self.master:
            return self.module.live()
        return self.module.mask.view(self.shape).clone()

    def weight(self) -> Tensor:
        """[K, C, R, S], zeros outside the mask, a copy."""
        if self.blocks:
            return self.module.pattern.to_dense(self.module.values.detach())
        return self.module.weight.detach().view(self.shape) * self.mask()

    def row_order(self) -> Tensor | None:
        """int [K], the filter that each row of the stored blocks is; None: row i is filter i."""
        return self.module.pattern.row_order if self.runs_blocks else None

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer, who: str) -> None:
        """Refuse what `set` could not keep right: shared parameters, and optimizers whose state cannot move along.

        Args:
            model: that this layer is of.
            optimizer: the one that updates it.
            who: the caller, for messages.

        Raises:
            ValueError: what is wrong, and what to do.
        """
        for name, module in unwrapped(model).named_modules():
            if module is not self.module and any(p is self.parameter for p in module._parameters.values()):
                raise ValueError(
                    f"{who}: {self.name} and {name} share a parameter, of which each would have another mask; give one"
                    " of them a copy, or leave both dense: sparsify(exclude=...)"
                )
        if not self.master:
            optimizer_tensors(optimizer, self.parameter, f"{who}: {self.name}")

    def set(self, choice: Choice, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Keep what the choice keeps; weights and optimizer state that stay are carried, new ones start afresh.

        New weights are zero, and their optimizer state is what the optimizer starts with. A master weight and its
        optimizer state stay as they are. Returns True when all tensors kept their memory.

        Raises:
            ValueError: the choice does not fit, or the optimizer's state cannot follow; nothing has changed then.
        """
        if self.blocks:
            return self.module.set_pattern(choice.pattern(), optimizer)
        if self.master:
            return self.module.set_choice(choice)
        parameter = self.parameter
        stays = (self.mask() & choice.mask.to(parameter.device)).view(parameter.shape)
        state = [] if optimizer is None else optimizer_tensors(optimizer, parameter, f"{self.name}: SparseLayer.set()")
        for t in (parameter.detach(), parameter.grad):
            if t is not None:
                t.masked_fill_(~stays, 0)
        for part in state:  # a number for several weights lasts as long as one of them
            kept = stays.any(part.reduced, keepdim=True) if part.reduced else stays
            part.tensor.masked_fill_(~kept, part.fresh)
        self.module.mask.copy_(choice.mask.view(parameter.shape))
        return True


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """name -> sparse layer, in the model's order."""
    return {
        name: SparseLayer(name, module)
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, SPARSE)
    }
