"""Which layers of a model may become sparse, and why the others stay dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune

from ..layers.stored import NAMES, PLAIN
from ..saliencies import pairs
from . import carry
from .dataflow import ends, quiet

Selector = str | type[nn.Module]


def candidates(
    model: nn.Module, include: Iterable[Selector] | None, exclude: Iterable[Selector] | None, batch: Any, who: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Layers to make sparse, and why others stay dense."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PLAIN)}
    exclude = list(exclude or ())
    for selector in [*(include or ()), *exclude]:
        if not any(_matches(name, layer, selector) for name, layer in layers.items()):
            raise ValueError(
                f"{who}: {selector!r} matches no {NAMES}; the model has {', '.join(list(layers)[:8])}"
                + (", ..." if len(layers) > 8 else "")
            )
    dense = {}
    for name, layer in layers.items():
        if include is not None and not any(_matches(name, layer, s) for s in include):
            dense[name] = "not included"
        elif any(_matches(name, layer, s) for s in exclude):
            dense[name] = "excluded"
        elif any(p is not None and is_lazy(p) for p in layer._parameters.values()):
            raise ValueError(
                f"{who}: {name} is a {type(layer).__name__} that has not seen its input yet; run the model once first"
            )
        elif any(p is not None and p.is_meta for p in layer._parameters.values()):
            raise ValueError(
                f"{who}: {name} is on the meta device, where weights have no values; give the model some first"
                " (model.to_empty(device=...), then initialise or load)"
            )
    if include is None and len(layers) > 2:
        dense = _ends(model, layers, batch) | dense
    users, apart = users_of(model), _read_by_parents(model)
    for name in layers.keys() - dense.keys():
        if reason := apart.get(name) or unfit(name, layers[name], users):
            dense[name] = reason
    dense = {name: dense[name] for name in layers if name in dense}
    chosen = {name: layer for name, layer in layers.items() if name not in dense}
    return chosen, dense | {name: _no_kernel(m) for name, m in model.named_modules() if _other_convolution(m)}


def _other_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, PLAIN)


def _no_kernel(conv: nn.Module) -> str:
    """Why a convolution of another kind stays dense."""
    kind = type(conv).__name__
    if "Transpose" in kind:
        return f"a {kind}: stored blocks are for {NAMES}; upsampling and a convolution can take its place"
    return f"a {kind}: stored blocks are for {NAMES}"


def _ends(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> dict[str, str]:
    """Why the first and the last layers stay dense."""
    why: dict[str, str] = {}
    with quiet():  # a loader draws when it is started
        inputs = None if batch is None else next(pairs(batch))[0]
    found = ends(model, layers, inputs)
    for word, names in zip(("first", "last"), found, strict=True):
        for name, how in names.items():
            one = f"the {word} layer" if len(names) == 1 else f"one of {len(names)} {word} layers"
            why.setdefault(name, f"{one}, {how}")
    return why


def users_of(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> how many modules hold it."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    return users


def _read_by_parents(model: nn.Module) -> dict[str, str]:
    """Layers whose weight a module of PyTorch's that they are in computes with by itself."""
    return {
        f"{name}.{child}".lstrip(
            "."
        ): "nn.TransformerEncoderLayer with batch_first computes with its weight in eval mode"
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer) and module.self_attn.batch_first
        if module.activation_relu_or_gelu
        for child in ("linear1", "linear2")
    }


def _matches(name: str, layer: nn.Module, selector: Selector) -> bool:
    return fnmatch.fnmatchcase(name, selector) if isinstance(selector, str) else isinstance(layer, selector)


def unfit(name: str, layer: Any, users: Mapping[int, int]) -> str | None:
    """Why this layer cannot be replaced by a sparse one that computes the same, or None."""
    if not name:
        return "it is the model itself: put it into an nn.Sequential"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    for part in ("weight", "bias"):
        if getattr(layer, part, None) is not None and part not in layer._parameters:
            return _computed(layer, part)
    if getattr(layer, "weight", None) is None:
        return "it has no weight"
    if type(layer) not in PLAIN:
        return f"a {type(layer).__name__}, whose forward may differ"
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups == layer.in_channels > 1:
            return "depthwise"
        if layer.padding_mode != "zeros":
            return f"padding_mode {layer.padding_mode!r}"
        if layer.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ):
            return "padding 'same' that is not symmetric"
    if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
        return f"its weight is a {type(layer.weight).__name__} of {str(layer.weight.dtype).removeprefix('torch.')}"
    if users[id(layer.weight)] > 1:
        return "its weight is shared"
    if 0 in layer.weight.shape:
        return "it has no weights"
    return carry.refuses(layer)


def _computed(layer: nn.Module, part: str) -> str:
    """Why a layer whose weight or bias is no parameter stays dense: what computes it."""
    hooks = list(layer._forward_pre_hooks.values())
    if any(isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == part for hook in hooks):
        return f"torch.nn.utils.prune masks its {part}; hrbp.from_prune(model) takes masks of weights over"
    by = next((type(hook).__name__ for hook in hooks if getattr(hook, "name", None) == part), None)
    return f"its {part} is computed by {'other code' if by is None else by}"
