"""BSRPattern: which blocks of a filter bank are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bsr import of_scipy, of_torch, scipy_bsr, sorted_bsr
from .cells import Places, bank_of, blocks_of, marked_blocks
from .groups import check_groups, of_diagonal, pack_groups, whole_shape
from .index import IndexTables, unpack
from .pattern_checks import (
    check_arrays,
    check_device,
    check_drawing,
    check_is_device,
    check_row_order,
    check_sizes,
    check_strided,
    grid,
    integers,
    to_tensor,
)

if TYPE_CHECKING:
    import numpy as np


class BSRPattern:
    """Which blocks of a filter bank [K, C, R, S] are stored: an immutable BSR index.

    The filter bank is read as the matrix K x (R*S*C) with tap-major columns, column = (r*S + s)*C + c, and cut into
    blocks of (bk, bc). `indptr`, `indices` and `blocksize` mean what they mean in scipy.sparse.bsr_array: the blocks
    of block-row b are indptr[b] .. indptr[b+1], each at block-col indices[i] = tap*(C/bc) + c_block, ascending and
    without duplicates. A block never straddles two taps, so the input gradient uses the same blocks, transposed,
    under a permuted index. Row i of the matrix is filter row_order[i] (None: filter i).

    The values are one tensor [nnzb, bk, bc] kept outside the pattern (`values_from_dense`, `to_dense`).

    Args:
        shape: (K, C, R, S) of the filter bank.
        blocksize: (bk, bc); bk divides K, bc divides C.
        indptr, indices: [K/bk + 1] and [nnzb] integers (tensor, numpy array or list).
        row_order: a permutation of range(K), or None. The identity is stored as None.
        groups: of a convolution in groups, whose weight is [K, C, R, S] with the C channels of one; see `grouped`.

    Raises:
        ValueError: the arrays are not such an index. They are always checked fully; the message says what is wrong.
        TypeError: an array does not hold integers.
    """

    __slots__ = ("_blocksize", "_groups", "_index", "_nnzb", "_shape")
    _groups: int
    _shape: tuple[int, int, int, int]
    _blocksize: tuple[int, int]
    _nnzb: int
    _index: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        blocksize: Sequence[int],
        indptr: Tensor | np.ndarray | Sequence[int],
        indices: Tensor | np.ndarray | Sequence[int],
        row_order: Tensor | np.ndarray | Sequence[int] | None = None,
        groups: int = 1,
    ) -> None:
        who = "BSRPattern()"
        shape, blocksize = check_sizes(shape, blocksize, who)
        indices = integers(indices, "indices", who)
        indptr = integers(indptr, "indptr", who).to(indices.device)
        order = check_row_order(row_order, shape[0], indices.device, who)
        check_arrays(shape, blocksize, indptr, indices, who)
        check_groups(groups, shape, blocksize, order, who)
        packed = pack_groups(shape, blocksize, indptr, indices, order, groups)
        self._set(shape, blocksize, indices.numel(), packed, groups)

    def _set(
        self, shape: tuple[int, int, int, int], blocksize: tuple[int, int], nnzb: int, packed: Tensor, groups: int
    ) -> None:
        object.__setattr__(self, "_shape", shape)
        object.__setattr__(self, "_blocksize", blocksize)
        object.__setattr__(self, "_nnzb", nnzb)
        object.__setattr__(self, "_index", packed)
        object.__setattr__(self, "_groups", groups)

    @classmethod
    def _trusted(
        cls,
        shape: tuple[int, int, int, int],
        blocksize: tuple[int, int],
        indptr: Tensor,
        indices: Tensor,
        row_order: Tensor | None,
        groups: int = 1,
    ) -> BSRPattern:
        """A pattern from arrays that are valid by construction: not checked again."""
        packed = pack_groups(shape, blocksize, indptr, indices, row_order, groups)
        return cls.from_index(shape, blocksize, indices.numel(), packed, groups)

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_mask(
        cls,
        mask: Tensor | np.ndarray,
        blocksize: Sequence[int],
        row_order: Tensor | np.ndarray | Sequence[int] | None = None,
    ) -> BSRPattern:
        """The pattern that stores every block with at least one True cell.

        Args:
            mask: bool [K, C, R, S], a tensor or an array, in filter order; the pattern lives on its device.
            blocksize: (bk, bc); bk divides K, bc divides C.
            row_order: which filter each BSR row is: blocks are cut after filters are put in this order.
        """
        who = "BSRPattern.from_mask()"
        mask = to_tensor(mask, "mask", "a bool tensor [K, C, R, S] (pattern.to_mask(), weight != 0)", who)
        if mask.dtype != torch.bool:
            raise TypeError(f"{who}: mask has dtype {mask.dtype}; it needs torch.bool (for weights: weight != 0)")
        shape, blocksize = check_sizes(mask.shape, blocksize, who)
        order = check_row_order(row_order, shape[0], mask.device, who)
        stored = marked_blocks(mask if order is None else mask[order], blocksize)
        return cls._from_stored(shape, blocksize, stored, order)

    @classmethod
    def random(
        cls,
        shape: Sequence[int],
        blocksize: Sequence[int],
        density: float,
        generator: torch.Generator | None = None,
    ) -> BSRPattern:
        """Exactly round(density * blocks) blocks, uniformly at random, on the generator's device (default: CPU)."""
        who = "BSRPattern.random()"
        shape, blocksize = check_sizes(shape, blocksize, who)
        check_drawing(density, generator, who)
        rows, cols = grid(shape, blocksize)
        device = generator.device if generator is not None else torch.device("cpu")
        chosen = torch.randperm(rows * cols, generator=generator, device=device)[: round(density * rows * cols)]
        stored = torch.zeros(rows * cols, dtype=torch.bool, device=device)
        stored[chosen] = True
        return cls._from_stored(shape, blocksize, stored.view(rows, cols), None)

    @classmethod
    def full(cls, shape: Sequence[int], blocksize: Sequence[int]) -> BSRPattern:
        """Every block stored: a dense filter bank in BSR form."""
        shape, blocksize = check_sizes(shape, blocksize, "BSRPattern.full()")
        return cls._from_stored(shape, blocksize, torch.ones(grid(shape, blocksize), dtype=torch.bool), None)

    @classmethod
    def _from_stored(
        cls,
        shape: tuple[int, int, int, int],
        blocksize: tuple[int, int],
        stored: Tensor,
        row_order: Tensor | None,
    ) -> BSRPattern:
        """From a bool matrix [K/bk, R*S*C/bc] of stored blocks: sorted and free of duplicates by construction."""
        indptr = torch.zeros(stored.shape[0] + 1, dtype=torch.int64, device=stored.device)
        torch.cumsum(stored.sum(1), 0, out=indptr[1:])
        indices = stored.flatten().nonzero().flatten() % stored.shape[1]
        return cls._trusted(shape, blocksize, indptr, indices, row_order)

    # ------------------------------------------------------------------ what it is

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(K, C, R, S) of the filter bank."""
        return self._shape

    @property
    def groups(self) -> int:
        """1, or the number of groups of a convolution: each has shape[1] channels of its own."""
        return self._groups

    @property
    def bank(self) -> tuple[int, ...]:
        """What the torch ops take as weight_shape: `shape`, and behind it `groups` where there are several."""
        return self._shape if self._groups == 1 else (*self._shape, self._groups)

    def grouped(self, groups: int) -> BSRPattern:
        """The same blocks for a convolution in groups: filters of group j read the j-th shape[1] channels of x alone.

        Shape, indices and values stay those of the weight [K, C/groups, R, S], as nn.Conv2d has it. ValueError where a
        block would have filters of two groups.
        """
        if groups == self._groups:
            return self
        check_groups(groups, self._shape, self._blocksize, order := self.row_order, "BSRPattern.grouped()")
        arrays = self.indptr.long(), self.indices.long(), order
        return BSRPattern._trusted(self._shape, self._blocksize, *arrays, groups)

    @property
    def blocksize(self) -> tuple[int, int]:
        """(bk, bc): filters and input channels of one block."""
        return self._blocksize

    @property
    def nnzb(self) -> int:
        """Number of stored blocks."""
        return self._nnzb

    @property
    def density(self) -> float:
        """Stored blocks / all blocks."""
        rows, cols = grid(self._shape, self._blocksize)
        return self._nnzb / (rows * cols)

    @property
    def device(self) -> torch.device:
        return self._index.device

    @property
    def index(self) -> Tensor:
        """The packed int32 buffer of all index tables (see blocksparse.index). Not a copy: never write to it."""
        return self._index

    @property
    def _tables(self) -> IndexTables:
        return unpack(self._index, whole_shape(self._shape, self._groups), self._blocksize, self._nnzb)

    @property
    def indptr(self) -> Tensor:
        """int32 [K/bk + 1]; a copy, so that the pattern stays what it is."""
        return self._tables.indptr.clone()

    @property
    def indices(self) -> Tensor:
        """int32 [nnzb], tap*(C/bc) + c_block; a copy."""
        indices = self._tables.indices
        return (
            indices.clone() if self._groups == 1 else of_diagonal(indices, self._shape, self._blocksize, self._groups)
        )

    @property
    def row_order(self) -> Tensor | None:
        """int32 [K], the filter that each BSR row is; a copy. None: row i is filter i."""
        order = self._tables.row_order
        return None if order is None else order.clone()

    def to(self, device: torch.device | str | int | None) -> BSRPattern:
        """The same pattern with its index on `device` (itself when it is there already)."""
        check_is_device(device, "BSRPattern.to()")
        packed = self._index.to(device)
        if packed is self._index:
            return self
        return BSRPattern.from_index(self._shape, self._blocksize, self._nnzb, packed, self._groups)

    @classmethod
    def from_index(
        cls, shape: tuple[int, int, int, int], blocksize: tuple[int, int], nnzb: int, packed: Tensor, groups: int = 1
    ) -> BSRPattern:
        """The pattern around a packed buffer, which is neither copied nor checked.

        Args:
            shape, blocksize, nnzb, groups: of the pattern that the buffer is from.
            packed: a copy of that pattern's `index`. Whoever writes to it changes this pattern: for modules that own
                their index and build a pattern around it for the length of a forward.
        """
        pattern = cls.__new__(cls)
        pattern._set(shape, blocksize, nnzb, packed, groups)
        return pattern

    # ------------------------------------------------------------------ values

    def _places(self) -> Places:
        cols, c_blocks = self.indices.long(), self._shape[1] // self._blocksize[1]
        return self._tables.rows.long(), cols % c_blocks, cols // c_blocks

    def values_from_dense(self, weight: Tensor) -> Tensor:
        """The stored blocks [nnzb, bk, bc] of a dense filter bank [K, C, R, S]; what lies outside is left behind.

        Differentiable; dtype and device follow `weight`, whose device must be the pattern's.
        """
        who = "BSRPattern.values_from_dense()"
        check_strided(weight, "weight", who)
        if tuple(weight.shape) != self._shape:
            raise ValueError(f"{who}: weight has shape {tuple(weight.shape)}; the pattern needs {self._shape}")
        check_device(weight, "weight", self.device, who)
        order = self._tables.row_order
        return blocks_of(weight if order is None else weight[order.long()], self._blocksize, self._places())

    def to_dense(self, values: Tensor) -> Tensor:
        """The dense filter bank [K, C, R, S] with `values` [nnzb, bk, bc] in their places and zeros elsewhere.

        Differentiable; the inverse of `values_from_dense` on the stored blocks.
        """
        self.check_values(values, "BSRPattern.to_dense()")
        weight, order = bank_of(values, self._shape, self._places()), self._tables.row_order
        return weight if order is None else weight[torch.argsort(order)]

    def to_mask(self) -> Tensor:
        """bool [K, C, R, S]: True in every cell of a stored block."""
        return self.to_dense(torch.ones((self._nnzb, *self._blocksize), dtype=torch.bool, device=self.device))

    def check_values(self, values: Tensor, who: str) -> None:
        """TypeError unless `values` is a tensor; ValueError unless it is [nnzb, bk, bc] on the pattern's device."""
        check_strided(values, "values", who)
        needed = (self._nnzb, *self._blocksize)
        if tuple(values.shape) != needed:
            raise ValueError(f"{who}: values has shape {tuple(values.shape)}; pattern needs {needed} = (nnzb, bk, bc)")
        check_device(values, "values", self.device, who)

    # ------------------------------------------------------------------ other libraries' BSR

    def to_scipy(self, values: Tensor) -> Any:
        """scipy.sparse.bsr_array of the K x (R*S*C) matrix, in BSR row order (row_order is not applied).

        `values` are in a dtype that scipy has: float32 or float64.
        """
        who = "BSRPattern.to_scipy()"
        self.check_values(values, who)
        k, c, r, s = self._shape
        tables = self._tables
        return scipy_bsr(values, self.indices, tables.indptr, (k, r * s * c), who)

    @classmethod
    def from_scipy(
        cls, m: Any, shape: Sequence[int], row_order: Tensor | np.ndarray | Sequence[int] | None = None
    ) -> tuple[BSRPattern, Tensor]:
        """(pattern, values) of a scipy BSR matrix K x (R*S*C) with tap-major columns, rows in BSR row order.

        Blocks out of order are sorted in a copy; duplicates and corrupted indices are refused (ValueError), and so are
        matrices with more data than indptr counts: m.prune() drops it.
        """
        who = "BSRPattern.from_scipy()"
        index, data = sorted_bsr(shape, *of_scipy(m, who), row_order, who, "m.prune()")
        return cls._trusted(*index), data

    def to_torch(self, values: Tensor) -> Tensor:
        """torch.sparse_bsr tensor of the K x (R*S*C) matrix, in BSR row order, sharing `values`."""
        self.check_values(values, "BSRPattern.to_torch()")
        k, c, r, s = self._shape
        return torch.sparse_bsr_tensor(self.indptr, self.indices, values, size=(k, r * s * c), check_invariants=False)

    @classmethod
    def from_torch(
        cls, t: Tensor, shape: Sequence[int], row_order: Tensor | np.ndarray | Sequence[int] | None = None
    ) -> tuple[BSRPattern, Tensor]:
        """(pattern, values) of a torch.sparse_bsr tensor K x (R*S*C); sorted in a copy, duplicates refused."""
        who = "BSRPattern.from_torch()"
        index, data = sorted_bsr(shape, *of_torch(t, who), row_order, who, None)
        return cls._trusted(*index), data

    # ------------------------------------------------------------------ being a value

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"BSRPattern is immutable; build a new one instead of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"BSRPattern is immutable; {name!r} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        """Same shape, groups, blocksize, blocks and row order; the device does not matter."""
        if not isinstance(other, BSRPattern):
            return NotImplemented
        if (self.bank, self._blocksize, self._nnzb) != (other.bank, other._blocksize, other._nnzb):
            return False
        return torch.equal(self._index, other._index.to(self.device))

    def __hash__(self) -> int:
        return hash((self.bank, self._blocksize, self._nnzb))

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the constructor: a damaged pickle is refused like any other damaged index.
        return BSRPattern, (self._shape, self._blocksize, self.indptr, self.indices, self.row_order, self._groups)

    def __copy__(self) -> BSRPattern:
        return self

    def __deepcopy__(self, memo: object) -> BSRPattern:
        return self

    def __repr__(self) -> str:
        k, c, r, s = self._shape
        order = ", rows permuted" * (self._tables.row_order is not None)
        order += f", groups={self._groups}" * (self._groups > 1)
        device = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
        return (
            f"BSRPattern(shape=({k}, {c}, {r}, {s}), blocksize={self._blocksize}, nnzb={self._nnzb},"
            f" density={self.density:.4g}{order}{device})"
        )


def check_is_pattern(pattern: Any, who: str) -> None:
    """TypeError for anything but a BSRPattern, with what makes one of it."""
    if isinstance(pattern, BSRPattern):
        return
    if isinstance(pattern, Tensor):
        what, remedy = f"a tensor of {pattern.dtype}", "BSRPattern.from_mask(mask, (bk, bc)) makes one of a mask"
    else:
        what = f"{type(pattern).__name__} {str(pattern)[:40]}"
        remedy = "it has the sizes of the layer, as in BSRPattern.random((K, C, R, S), (bk, bc), density)"
        if who in ("BSRConv2d()", "BSRLinear()"):
            remedy += f". {who[:-2]}.from_dense(layer, pattern) takes them from a dense layer"
    raise TypeError(f"{who}: pattern is {what}; it needs a BSRPattern: {remedy}")
