"""BSR matrices of other libraries, scipy's and torch's: taken apart, checked, sorted; and built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .pattern_checks import (
    check_arrays,
    check_counts,
    check_indptr,
    check_is_bsr,
    check_range,
    check_row_order,
    check_sizes,
    grid,
    integers,
)  # fmt: skip

if TYPE_CHECKING:
    import numpy as np

# Of a matrix: its shape, indptr, indices, and its blocks, a copy.
Parts = tuple[tuple[int, ...], Any, Any, Tensor]
# What a pattern is made of: shape, blocksize, indptr, indices, row order.
Index = tuple[tuple[int, int, int, int], tuple[int, int], Tensor, Tensor, Tensor | None]


def scipy_bsr(values: Tensor, indices: Tensor, indptr: Tensor, matrix_shape: tuple[int, int], who: str) -> Any:
    """scipy.sparse.bsr_array of copies."""
    from scipy.sparse import bsr_array  # scipy is needed here alone

    if values.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"{who}: values has dtype {values.dtype}; scipy needs float32 or float64 (values.float())")
    arrays = (t.detach().cpu().numpy().copy() for t in (values, indices, indptr))
    return bsr_array(tuple(arrays), shape=matrix_shape, blocksize=tuple(values.shape[1:]))


def of_scipy(m: Any, who: str) -> Parts:
    if getattr(m, "format", None) != "bsr":
        raise TypeError(f"{who}: m is {type(m).__name__}; it needs a scipy bsr_array (m.tobsr(blocksize))")
    if m.data.dtype.kind != "f" or m.data.dtype.itemsize > 8:
        raise TypeError(f"{who}: m has dtype {m.data.dtype}; it needs float32 or float64 (m.astype('float32'))")
    data = torch.from_numpy(m.data.astype(m.data.dtype.newbyteorder("="), order="C"))
    return m.shape, m.indptr, m.indices, data


def of_torch(t: Tensor, who: str) -> Parts:
    check_is_bsr(t, who)
    return tuple(t.shape), t.crow_indices(), t.col_indices(), t.values().detach().clone()


def sorted_bsr(
    shape: Sequence[int],
    matrix_shape: tuple[int, ...],
    indptr: Tensor | np.ndarray,
    indices: Tensor | np.ndarray,
    data: Tensor,
    row_order: Tensor | np.ndarray | Sequence[int] | None,
    who: str,
    remedy: str | None,
) -> tuple[Index, Tensor]:
    """The index of a matrix K x (R*S*C) as that of a filter bank, checked, its blocks in order, and these.

    Args:
        remedy: what drops data that indptr does not count.
    """
    if data.dim() != 3 or not data.is_floating_point():
        raise ValueError(
            f"{who}: the blocks are {data.dtype} {tuple(data.shape)}; they need to be floating [nnzb, bk, bc]"
        )
    sizes, blocksize = check_sizes(shape, data.shape[1:], who)
    k, c, r, s = sizes
    if tuple(matrix_shape) != (k, r * s * c):
        raise ValueError(
            f"{who}: the matrix is {tuple(matrix_shape)}; shape {sizes} needs {(k, r * s * c)} = (K, R*S*C)"
        )
    cols = integers(indices, "indices", who).to(data.device)
    ptr = integers(indptr, "indptr", who).to(data.device)
    check_counts(data.shape[0], cols.numel(), ptr, remedy, who)
    check_indptr(ptr, k // blocksize[0], cols.numel(), who)
    check_range(cols, grid(sizes, blocksize)[1], who)
    rows = torch.repeat_interleave(torch.arange(ptr.numel() - 1, device=ptr.device), ptr[1:] - ptr[:-1])
    sort = torch.argsort(rows * grid(sizes, blocksize)[1] + cols)
    cols = cols[sort]
    check_arrays(sizes, blocksize, ptr, cols, who)
    order = check_row_order(row_order, k, data.device, who)
    return (sizes, blocksize, ptr, cols, order), data[sort]
