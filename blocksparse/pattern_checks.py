"""What a pattern is made from, checked: sizes, raw index arrays, tensors. `who` was called: it leads the message."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


def grid(shape: tuple[int, int, int, int], blocksize: tuple[int, int]) -> tuple[int, int]:
    """(block-rows, block-cols)."""
    k, c, r, s = shape
    return k // blocksize[0], r * s * (c // blocksize[1])


def check_sizes(
    shape: Sequence[int], blocksize: Sequence[int], who: str
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    sizes, block = _positive(shape, 4), _positive(blocksize, 2)
    if sizes is None:
        raise ValueError(f"{who}: shape is {_shown(shape)}; it needs four positive ints (K, C, R, S)")
    if block is None:
        raise ValueError(f"{who}: blocksize is {_shown(blocksize)}; it needs two positive ints (bk, bc)")
    (k, c, r, s), (bk, bc) = sizes, block
    if k % bk or c % bc:
        raise ValueError(
            f"{who}: blocksize {block} does not divide (K, C) = {(k, c)}; bk must divide {k} and bc must divide {c}"
        )
    if r * s * (c // bc) > INT32_MAX or r * s * (k // bk) > INT32_MAX or r * s * (c // bc) * (k // bk) > 2**62:
        raise ValueError(f"{who}: {sizes} in blocks of {block} has more block-cols than int32 can count")
    return (k, c, r, s), (bk, bc)


def _shown(sizes: Any) -> str:
    if isinstance(sizes, Sequence):
        return str(tuple(sizes))
    return str(sizes) if isinstance(sizes, int) else type(sizes).__name__


def _positive(sizes: Any, count: int) -> tuple[int, ...] | None:
    """`sizes` as ints (numpy's too), or None if it is not so many positive ones."""
    if not isinstance(sizes, Sequence) or len(sizes) != count:
        return None
    plain = tuple(int(v) for v in sizes if not isinstance(v, bool) and isinstance(v, Integral))
    return plain if len(plain) == count and min(plain) > 0 else None


def to_tensor(array: Any, name: str, needs: str, who: str) -> Tensor:
    """`array` as a tensor with content; TypeError for what cannot be one."""
    try:
        t = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{who}: {name} is {type(array).__name__}; it needs {needs}: {error}") from error
    check_strided(t, name, who)
    if t.is_meta:
        raise ValueError(f"{who}: {name} is on the meta device, without content; it needs {needs}")
    return t


def check_strided(t: Any, name: str, who: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{who}: {name} is {type(t).__name__}; it needs a tensor (torch.as_tensor(array), conv.weight)")
    if t.layout != torch.strided:
        raise TypeError(f"{who}: {name} is {t.layout}; it needs a dense tensor ({name}.to_dense())")


def integers(array: Any, name: str, who: str) -> Tensor:
    """A 1-d int64 copy of `array`; TypeError for anything that does not hold integers."""
    t = to_tensor(array, name, "integers that fit int64", who)
    if t.numel() == 0 and not isinstance(array, Tensor):
        t = t.to(torch.int64)  # an empty list has no dtype of its own
    if t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
        raise TypeError(f"{who}: {name} has dtype {t.dtype}; it needs integers")
    if t.dim() != 1:
        raise ValueError(f"{who}: {name} has shape {tuple(t.shape)}; it needs one dimension")
    return t.detach().to(torch.int64, copy=True)


def check_device(t: Tensor, name: str, device: torch.device, who: str) -> None:
    if t.device != device:
        raise ValueError(
            f"{who}: {name} is on {t.device} and the pattern on {device};"
            f" move one of them (pattern.to({str(t.device)!r}))"
        )


def check_drawing(density: Any, generator: Any, who: str) -> None:
    if not isinstance(density, Real) or not 0 <= float(density) <= 1:
        raise ValueError(f"{who}: density is {density!r}; it needs a number in [0, 1]")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{who}: generator is {generator!r}; it needs a torch.Generator (torch.Generator().manual_seed(0))"
        )


def check_is_device(device: Any, who: str) -> None:
    if device is not None and not isinstance(device, torch.device | str | int):
        kind = type(device).__name__ if isinstance(device, Tensor) else repr(device)
        raise TypeError(
            f"{who}: device is {kind}; it needs a device ('cuda:0'). A pattern has no dtype: values have one"
        )


def check_is_bsr(t: Any, who: str) -> None:
    if not isinstance(t, Tensor) or t.layout != torch.sparse_bsr or t.dim() != 2:
        kind = f"{t.layout} with {t.dim()} dimensions" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(
            f"{who}: t is {kind}; it needs a plain 2-d torch.sparse_bsr tensor (dense.to_sparse_bsr(blocksize))"
        )


def check_counts(blocks: int, indices: int, indptr: Tensor, remedy: str | None, who: str) -> None:
    """ValueError unless there is one block for each index, and indptr counts them all."""
    last = int(indptr[-1]) if indptr.numel() else 0
    if not blocks == indices == last:
        drop = f"; {remedy} drops what indptr does not count" if remedy and 0 <= last <= min(blocks, indices) else ""
        raise ValueError(
            f"{who}: the matrix has {blocks} blocks of data and {indices} indices, and indptr ends at {last};"
            f" it needs one number for all three{drop}"
        )


def check_indptr(indptr: Tensor, block_rows: int, nnzb: int, who: str) -> None:
    if indptr.numel() != block_rows + 1:
        raise ValueError(f"{who}: indptr has {indptr.numel()} entries; it needs K/bk + 1 = {block_rows + 1}")
    if nnzb > INT32_MAX:
        raise ValueError(f"{who}: {nnzb} blocks are more than int32 can count")
    first, last = int(indptr[0]), int(indptr[-1])
    if first != 0 or last != nnzb:
        raise ValueError(f"{who}: indptr runs from {first} to {last}; it needs 0 to len(indices) = {nnzb}")
    falls = (indptr[1:] < indptr[:-1]).nonzero()
    if falls.numel():
        raise ValueError(f"{who}: indptr falls after block-row {int(falls[0])}; it must never decrease")


def check_range(indices: Tensor, block_cols: int, who: str) -> None:
    bad = ((indices < 0) | (indices >= block_cols)).nonzero()
    if bad.numel():
        at = int(bad[0])
        raise ValueError(f"{who}: indices[{at}] is {int(indices[at])}; it needs 0 <= index < R*S*C/bc = {block_cols}")


def check_arrays(
    shape: tuple[int, int, int, int], blocksize: tuple[int, int], indptr: Tensor, indices: Tensor, who: str
) -> None:
    block_rows, block_cols = grid(shape, blocksize)
    check_indptr(indptr, block_rows, indices.numel(), who)
    check_range(indices, block_cols, who)
    rows = torch.repeat_interleave(torch.arange(block_rows, device=indices.device), indptr[1:] - indptr[:-1])
    bad = ((rows[1:] == rows[:-1]) & (indices[1:] <= indices[:-1])).nonzero()
    if bad.numel():
        at = int(bad[0])
        what = "repeats" if int(indices[at]) == int(indices[at + 1]) else "falls"
        raise ValueError(
            f"{who}: indices {what} at {at + 1} within block-row {int(rows[at])}"
            f" ({int(indices[at])}, {int(indices[at + 1])}); block-cols must ascend without duplicates"
        )


def check_row_order(row_order: Any, k: int, device: torch.device, who: str) -> Tensor | None:
    """int64 permutation on `device`, or None for the identity."""
    if row_order is None:
        return None
    order = integers(row_order, "row_order", who).to(device)
    identity = torch.arange(k, device=device)
    if order.numel() != k or not torch.equal(order.sort().values, identity):
        raise ValueError(f"{who}: row_order ({order.numel()} entries) is not a permutation of range(K) = range({k})")
    return None if torch.equal(order, identity) else order
