"""A network begins with weights that were trained before: those of a file, or of torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .weights import read_weights, sparse_names

TORCHVISION = {"resnet18": "resnet18", "resnet50": "resnet50", "mobilenet_v2": "mobilenetv2"}  # name there -> here
PREFIX = "torchvision:"


def network_of(source: str) -> str | None:
    """The network of this library that `torchvision:NAME` is; None of a file.

    Raises:
        ValueError: torchvision's network of that name is none of this library's.
    """
    if not source.startswith(PREFIX):
        return None
    name = source.removeprefix(PREFIX).lower()
    if name not in TORCHVISION:
        raise ValueError(
            f"weights are {source!r}; here are {', '.join(PREFIX + known for known in TORCHVISION)}. Any other network"
            " of torchvision can be made sparse in Python: hrbp.sparsify(torchvision.models.get_model(...), 0.9)"
        )
    return TORCHVISION[name]


def pretrained(source: str) -> dict[str, Tensor]:
    """The weights of a file, or of `torchvision:NAME`, which torchvision downloads once and keeps.

    Raises:
        ValueError: a file that is damaged or holds no dense weights, or a name that is not known.
        ImportError: torchvision is not installed.
    """
    if network_of(source) is None:
        tensors = read_weights(source)
        if stored := sparse_names(tensors):
            raise ValueError(
                f"{source} holds stored blocks ({', '.join(stored[:3])}); training begins with dense weights:"
                " torch.save(hrbp.dense_state_dict(model), path) writes those of a sparse model"
            )
        return tensors
    try:
        from torchvision.models import get_model_weights
    except (ImportError, RuntimeError) as error:  # the second from one that was built for another PyTorch
        raise ImportError(
            f"weights are {source!r}, and torchvision cannot be imported ({error}): pip install torchvision, or"
            " give a file that torch.save(model.state_dict(), path) wrote"
        ) from None
    name = source.removeprefix(PREFIX).lower()
    return get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)


def start_from(model: nn.Module, tensors: dict[str, Tensor], source: str) -> str | None:
    """Give a dense network these weights; its classifier stays as drawn where it has another number of classes.

    The classifier is the last nn.Linear.

    Returns:
        What stays as it was drawn, in a sentence, or None.

    Raises:
        ValueError: names or shapes that do not fit; the model is untouched then.
    """
    here = model.state_dict()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    last = {f"{linear[-1]}.weight", f"{linear[-1]}.bias"} if linear else set()
    counters = {name for name in here if name.endswith("num_batches_tracked")}
    missing = [name for name in here if name not in tensors and name not in counters]
    foreign = [name for name in tensors if name not in here]
    if missing or foreign:
        said = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(foreign)} besides"] * bool(foreign)
        raise ValueError(
            f"{source} is of another network: it {' and '.join(said)}. --model says which network it is of"
        )
    other = {name: t for name, t in tensors.items() if t.shape != here[name].shape}
    if wrong := [name for name in other if name not in last]:
        name = wrong[0]
        raise ValueError(
            f"{source}: {name} has shape {tuple(other[name].shape)} there and {tuple(here[name].shape)} here; --width,"
            " --model and --image-size (over 64 for the first layer of ImageNet networks) decide it"
        )
    model.load_state_dict({name: tensors.get(name, t) if name not in other else t for name, t in here.items()})
    if not other:
        return None
    name = linear[-1]
    there = next(iter(other.values())).shape[0]
    return f"{name} stays as drawn: {there} classes in the weights, {here[f'{name}.weight'].shape[0]} here"


def _few(names: list[Any]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plain_bytes(t: Tensor) -> bytes:
    """The content of a tensor, whatever its dtype."""
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
