"""A dense model becomes a sparse one, and back.

Sparse layers hold their stored blocks and nothing else (blocksparse.BSRConv2d, BSRConv1d, BSRLinear), single weights as
blocks of (1, 1). Training methods that let dropped weights learn, to bring them back (`method`), keep a dense weight
(layers/master.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from blocksparse import BSRModule

from ..layers import semi_structured
from ..layers.fused import Fused
from ..layers.master import with_master
from ..layers.record import forget, record_of, remember
from ..layers.stored import PLAIN, block_module
from ..layers.view import SparseLayer, as_sparse, shape4, sparse_layers
from ..structures.base import sparsity_of
from ..wrappers import unwrapped
from .candidates import Selector
from .carry import carry, replace_module
from .decision import Decision, decide, dense_model, uncovered


def sparsify(
    model: nn.Module,
    sparsity: float,
    *,
    structure: str = "hrbp++",
    method: str | None = None,
    distribution: str | None = None,
    min_density: float = 0.0,
    per_layer: Mapping[str, float] | None = None,
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
    attributes and biases go with their layer. The first and last layers and depthwise convolutions stay dense; so do
    layers that a structure does not fit, and those that code other than their own forward may read or change
    (subclasses, shared or parametrized weights, weight_norm, pruning: for that see `from_prune`): `summary` says which,
    and why. A convolution in groups keeps them: masks, densities and gradients are of its weight [K, C/groups, R, S]
    alone, and no block has filters of two groups (layers/in_groups.py).

    First is a layer that reads the model's input through no other one, last one whose output reaches the model's and
    feeds no other; there may be several. They are found by data flow: in a forward pass of the first of `batch`, or of
    symbols, both on a stand-in for the model; where neither can be had, by order of registration.

    Args:
        model: any module with nn.Conv2d, nn.Conv1d and nn.Linear in it. Wrap it in DistributedDataParallel afterwards.
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
        min_density: no layer is asked to keep a smaller share of its weights; the others keep less then.
        per_layer: {name or pattern: sparsity} of layers that get a sparsity of their own, with * and ? as wildcards; of
            several that fit the last holds. `sparsity`, distribution and min_density are for the others then.
        saliency: what chooses the weights: "random", "magnitude", "snip", "grasp", "synflow", "magnitude+gradient", or
            "auto": "random" where the weights are freshly drawn, "magnitude" where they look trained or in doubt (see
            fresh.py); `summary` says which it took, and why. With "random", groups (hrbp, hrbp++) are of neighbouring
            filters, which costs nothing when running. "magnitude" of trained weights, structure "2:4", then fine-tuning
            under the mask that this gives, is ASP (Mishra et al., 2021).
        include: only these: names of layers (with * and ? as wildcards) or types. The first and last layers too, if
            they are named. Default: all layers. A layer whose shape the structure refuses stays dense, and the summary
            says why, unless its full name is given here: then that is an error.
        exclude: not these.
        batch, loss: for saliencies that need gradients, see `hrbp.saliency`; the batch finds first and last layers.
        backend: of the sparse layers, as in blocksparse.conv2d.
        seed: of random scores and searches.
        **options: of the structure; see `make_mask`, whose `method` ("assign", "paper") is `rule` here. Groups (hrbp,
            hrbp++) are as many as it takes to read every input channel (groups=None: 8 of 8 filters or more, else
            more), of at least 2 filters (min_rows; 8 where the model or the machine has a GPU, whose kernels take no
            less), and balanced: every channel is read by equally many groups, give or take one. The paper's:
            rule="paper", groups=8, min_rows=8, row_granule=1, balanced=False.

    Returns:
        The model.

    Warns:
        UserWarning: once for the model, with the names of layers whose groups cannot read every input channel.

    Raises:
        ValueError: no layer is left to make sparse, or an argument is out of range; the model is untouched then.
    """
    whole, model = model, dense_model(model, "sparsify()")
    decided = decide(
        model, sparsity, structure=structure, method=method, distribution=distribution, min_density=min_density,
        per_layer=per_layer, saliency=saliency, include=include, exclude=exclude, batch=batch, loss=loss, seed=seed,
        options=options,
    )  # fmt: skip
    steps = [_step(model, decided, name, backend) for name in decided.layers]
    for step in steps:  # nothing can fail from here on
        step()
    remember(model, decided.record)
    if text := uncovered(decided):
        warnings.warn(f"sparsify(): {text}", stacklevel=2)
    return whole


def _step(model: nn.Module, decided: Decision, name: str, backend: str | None) -> Callable[[], None]:
    """Prepare the replacement of one layer: all that can fail happens here."""
    layer, selection, record = decided.layers[name], decided.selections[name], decided.record
    if selection is None:
        made = with_master(layer, rule=record.structure, sparsity=sparsity_of(record.asked[name]))
    elif record.method is not None:
        made = with_master(layer, selection, backend=backend)
    else:
        made = block_module(layer, selection.pattern(), backend)
    return partial(replace_module, model, layer, made)


def densify(model: nn.Module) -> nn.Module:
    """Turn every sparse layer into a plain layer that computes the same, in place; returns the model.

    Works on any model with BSR layers, also ones not made by `sparsify`. ValueError, with the model untouched, where
    one of them adds a residual or has a ReLU (`fuse`): plain layers do not.
    """
    for name, module in model.named_modules():
        if isinstance(module, Fused) or (isinstance(module, BSRModule) and getattr(module, "relu", False)):
            raise ValueError(
                f"densify(): {name or 'the model'} computes a ReLU or a sum, too, which a plain layer does not; densify"
                " the model as it was before fuse()"
            )
    for module in list(model.modules()):
        if (layer := as_sparse(module)) is not None:
            dense = layer.module.to_dense()
        elif semi_structured.is_converted(module):
            dense = semi_structured.plain_layer(module)
        else:
            continue
        if module is model:
            carry(module, dense, replaces=False)
            return dense
        replace_module(model, module, dense)
    forget(unwrapped(model))
    return model


def release(model: nn.Module) -> nn.Module:
    """Give up the dense master weights of `sparsify(method=...)`, in place: what takes no part is dropped.

    Layers then hold the blocks that they compute with, as `sparsify` without a method leaves them. Other layers stay as
    they are. Returns the model, which computes the same; an optimizer has to be made anew.
    """
    record = record_of(model, required=False)
    for layer in sparse_layers(model).values():
        if layer.master:
            module = layer.module
            made = block_module(module.to_dense(), module.selection().pattern(), module.backend)
            replace_module(unwrapped(model), module, made)
    if record is not None:
        remember(unwrapped(model), replace(record, method=None, target={}))
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
    model, refusals = unwrapped(model), {}
    sparse, kinds = sparse_layers(model), (*PLAIN, BSRModule)
    for name, module in list(model.named_modules()):
        if isinstance(module, kinds) and not semi_structured.is_converted(module):
            layer = sparse.get(name)
            refusals[name] = semi_refuses(model, module, layer)
            if refusals[name] is None:
                plain: Any = module
                if layer is not None:
                    plain = layer.module.to_dense()
                    replace_module(model, module, plain)
                replace_module(model, plain, semi_structured.converted(plain))
    return refusals


def semi_refuses(model: nn.Module, module: Any, layer: SparseLayer | None) -> str | None:
    """Why `to_semi_structured` leaves a layer as it is, or None."""
    if layer is None and type(module) not in PLAIN:
        return f"a {type(module).__name__}, whose forward may differ"
    if module is model:
        return "it is the model itself: put it into an nn.Sequential"
    return semi_structured.refuses(
        module, module.weight.detach().view(shape4(module)) if layer is None else layer.weight()
    )
