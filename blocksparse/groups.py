"""A convolution in groups as one block-diagonal matrix: where its blocks lie in that, and what a weight of it must be.

The weight of nn.Conv2d(C, K, ..., groups=G) is [K, C/G, R, S]: filters of group j read the j-th C/G channels of x. Over
all channels it is a filter bank [K, C, R, S] with zeros outside G squares on the diagonal. Patterns, values and masks
are those of the weight, so that a block off the diagonal cannot be said; kernels read the index of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .index import pack


def whole_shape(shape: Sequence[int], groups: int) -> tuple[int, int, int, int]:
    """(K, C, R, S) over all channels; shape: (K, C/groups, R, S)."""
    k, c, r, s = shape
    return k, c * groups, r, s


def to_diagonal(indptr: Tensor, indices: Tensor, shape: Sequence[int], blocksize: Sequence[int], groups: int) -> Tensor:
    """Block-cols tap*(C/bc) + c_block of the whole matrix from those of a weight, tap*(C/groups/bc) + c_block."""
    c_blocks, of_group = shape[1] // blocksize[1], shape[0] // blocksize[0] // groups
    at, counts = torch.arange(indptr.numel() - 1, device=indptr.device), indptr[1:] - indptr[:-1]
    group = torch.repeat_interleave(at // of_group, counts, output_size=indices.numel())
    return indices + (indices // c_blocks * (groups - 1) + group) * c_blocks


def pack_groups(
    shape: Sequence[int], blocksize: Sequence[int], indptr: Tensor, indices: Tensor, order: Tensor | None, groups: int
) -> Tensor:
    """The packed index of the whole matrix, from the blocks of a weight."""
    if groups > 1:
        indices = to_diagonal(indptr, indices, shape, blocksize, groups)
    return pack(whole_shape(shape, groups), blocksize, indptr, indices, order)


def of_diagonal(indices: Tensor, shape: Sequence[int], blocksize: Sequence[int], groups: int) -> Tensor:
    """The inverse of `to_diagonal`."""
    c_blocks = shape[1] // blocksize[1]
    return indices // (groups * c_blocks) * c_blocks + indices % c_blocks


def check_groups(
    groups: int, shape: Sequence[int], blocksize: Sequence[int], row_order: Tensor | None, who: str
) -> None:
    """ValueError unless this many groups can have such blocks: none has filters of two groups."""
    k, bk = shape[0], blocksize[0]
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or k % groups:
        raise ValueError(f"{who}: groups is {groups!r}; it needs an int >= 1 that divides K = {k}")
    if groups == 1:
        return
    filters = k // groups
    if filters % bk:
        raise ValueError(
            f"{who}: blocks of {bk} filters do not divide the {filters} filters of each of {groups} groups; it needs a"
            " blocksize (bk, bc) that does"
        )
    if row_order is not None:
        at = torch.arange(k, device=row_order.device)
        if not torch.equal(row_order.long() // filters, at // filters):
            raise ValueError(
                f"{who}: row_order moves filters from one of {groups} groups to another, which reads other channels; it"
                " needs an order of the filters of each group"
            )
