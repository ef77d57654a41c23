"""What torch.vmap makes of an op of torch.ops.bsrconv: samples folded into one batch, or one call for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .product_checks import Facts

# `in_dims` says for each argument of the op, in order, which axis of it are the samples; None: it has none. For a list
# that is a list of None. Rules return the samples' results and the axis these are along.


def sample(t: Any, dim: Any) -> Any:
    """What the checks read of one sample of `t`."""
    if not isinstance(dim, int):
        return t
    shape = list(t.shape)
    del shape[dim]
    return Facts(shape, t.dtype, t.device)


def fold(t: Tensor, dim: int) -> Tensor:
    """Samples of [N, ...] along `dim` as one batch, [samples * N, ...]."""
    return t.movedim(dim, 0).flatten(0, 1)


def one_by_one(
    info: Any, in_dims: Sequence[Any], op: Any, args: Sequence[Any], shape: Sequence[int]
) -> tuple[Tensor, int]:  # fmt: skip
    """`op` on each sample, with results of `shape`."""
    if not info.batch_size:
        return args[0].new_empty((0, *shape)), 0
    columns = [
        arg.unbind(dim) if isinstance(dim, int) else [arg] * info.batch_size
        for arg, dim in zip(args, in_dims, strict=False)
    ]
    # A backend that the dispatcher has dropped has no entry in in_dims.
    return torch.stack([op(*sample, *args[len(columns) :]) for sample in zip(*columns, strict=True)]), 0
