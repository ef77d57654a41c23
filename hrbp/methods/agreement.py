"""Data-parallel ranks that have to do the same: what differs between them is told on all of them, before it matters."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..layers.record import SparsityRecord
from ..layers.view import SparseLayer


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def require_same(facts: Callable[[], Mapping[str, str]], who: str, remedy: str) -> None:
    """Refuse facts, by their name, that are not the same on every rank. Every rank has to call it.

    Args:
        facts: makes them, where there is more than one rank.
        who, remedy: what the message begins and ends with.

    Raises:
        ValueError: on every rank alike.
    """
    if ranks() == 1:
        return
    every: list[Any] = [None] * ranks()
    dist.all_gather_object(every, dict(facts()))
    names = list(dict.fromkeys(name for theirs in every for name in theirs))
    differing = [name for name in names if any(theirs.get(name) != every[0].get(name) for theirs in every)]
    if not differing:
        return
    where: dict[Any, list[str]] = {}
    for rank, theirs in enumerate(every):
        where.setdefault(theirs.get(differing[0]), []).append(str(rank))
    values = " and ".join(f"{value} on rank{'s' if len(on) > 1 else ''} {', '.join(on)}" for value, on in where.items())
    more = f" (and other things differ: {', '.join(differing[1:4])})" if len(differing) > 1 else ""
    raise ValueError(f"{who}: {differing[0]} is {values}{more}; every rank needs the same{remedy}")


def checksum(mask: Tensor, row_order: Tensor | None = None) -> str:
    """Of a mask, and of the order in which its rows are stored."""
    crc = zlib.crc32(mask.cpu().numpy().tobytes())
    if row_order is not None:
        crc = zlib.crc32(row_order.cpu().long().numpy().tobytes(), crc)
    return f"{crc:08x}"


def facts(record: SparsityRecord, layers: Mapping[str, SparseLayer]) -> dict[str, str]:
    """What has to be the same on every rank for masks to stay so."""
    found = {"the structure": repr(record.structure), "the distribution": record.distribution}
    found |= {f"the density asked of {name!r}": repr(density) for name, density in record.asked.items()}
    found |= {f"the target of {name!r}": repr(sparsity) for name, sparsity in record.target.items()}
    masks = {name: checksum(layer.mask(), layer.row_order()) for name, layer in layers.items()}
    return found | {f"the mask of {name!r}": mask for name, mask in masks.items()}
