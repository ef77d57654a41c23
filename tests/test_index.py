"""The packed tables: each against its definition, aligned, and of a size that no mask can change."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from torch.multiprocessing.reductions import StorageWeakRef

from blocksparse import BSRPattern, index
from strategies import patterns


@given(patterns())
def test_tables_are_their_definition(pattern):
    tables = index.unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    (k, c, r, s), (bk, bc) = pattern.shape, pattern.blocksize
    k_blocks, c_blocks, taps = k // bk, c // bc, r * s
    assert tables.indptr.tolist() == pattern.indptr.tolist()
    assert tables.indices.tolist() == pattern.indices.tolist()
    assert tables.rows.tolist() == [
        b for b in range(k_blocks) for _ in range(int(tables.indptr[b]), int(tables.indptr[b + 1]))
    ]
    blocks = [
        (col % c_blocks, col // c_blocks, row, i)
        for i, (row, col) in enumerate(zip(tables.rows.tolist(), tables.indices.tolist(), strict=True))
    ]
    blocks.sort()
    assert tables.t_perm.tolist() == [i for *_, i in blocks]
    assert tables.t_indices.tolist() == [tap * k_blocks + row for _, tap, row, _ in blocks]
    cells = [cb * taps + tap for cb, tap, *_ in blocks]
    assert tables.t_indptr.tolist() == [sum(x < i for x in cells) for i in range(c_blocks * taps + 1)]
    if pattern.row_order is None:
        assert tables.row_order is None
    else:
        assert tables.row_order.tolist() == pattern.row_order.tolist()
    for table in tables[1:]:
        assert table is None or table.storage_offset() % 4 == 0


@given(patterns())
def test_transposed_tables_are_the_rotated_bank(pattern):
    """dgrad's operand, kernels rotated and K and C swapped, stores the same blocks: no value moves."""
    if pattern.row_order is not None:
        return
    values = torch.randn(pattern.nnzb, *pattern.blocksize)
    (k, c, r, s), (bk, bc) = pattern.shape, pattern.blocksize
    tables = index.unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    rotated = pattern.to_dense(values).flip(2, 3).transpose(0, 1)
    twin = torch.zeros(c, k, r * s)
    k_blocks, taps = k // bk, r * s
    for cell in range(tables.t_indptr.numel() - 1):
        for i in range(int(tables.t_indptr[cell]), int(tables.t_indptr[cell + 1])):
            tap, kb = divmod(int(tables.t_indices[i]), k_blocks)
            assert tap == cell % taps
            cb = cell // taps
            twin[cb * bc : (cb + 1) * bc, kb * bk : (kb + 1) * bk, taps - 1 - tap] = values[tables.t_perm[i]].T
    assert torch.equal(twin.view(c, k, r, s), rotated)


@given(patterns())
def test_size_depends_on_static_facts_alone(pattern):
    other = BSRPattern.random(pattern.shape, pattern.blocksize, pattern.density)
    ordered = pattern.row_order is not None
    assert pattern.index.numel() == index.packed_size(pattern.shape, pattern.blocksize, pattern.nnzb, ordered)
    assert other.nnzb == pattern.nnzb
    assert other.index.numel() == index.packed_size(pattern.shape, pattern.blocksize, pattern.nnzb, False)


def test_a_buffer_of_another_layout_is_refused():
    pattern = BSRPattern.full((8, 8, 3, 3), (4, 4))
    for packed in (pattern.index[:-1], pattern.index.long(), pattern.index[None]):
        with pytest.raises(ValueError, match=r"the packed index is .* Take it from BSRPattern.index"):
            index.unpack(packed, pattern.shape, pattern.blocksize, pattern.nnzb)


# ---------------------------------------------------------------- remembered views


def once(pattern):
    return index.unpack_once(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)


def test_remembered_views_are_the_tables_and_follow_what_is_written():
    pattern, other = (BSRPattern.random((8, 12, 3, 3), (4, 3), 0.3) for _ in range(2))
    first = once(pattern)
    assert all(a is b for a, b in zip(once(pattern), first, strict=True))
    for source in (pattern, other):
        pattern.index.copy_(source.index)
        for a, b in zip(once(pattern)[1:], source._tables[1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_remembered_views_follow_new_memory():
    pattern, other = (BSRPattern.random((8, 12, 3, 3), (4, 3), 0.3) for _ in range(2))
    packed = pattern.index.clone()
    args = pattern.shape, pattern.blocksize, pattern.nnzb
    index.unpack_once(packed, *args)
    packed.data = other.index.clone()
    assert torch.equal(index.unpack_once(packed, *args).indices, other.indices)
    packed.data = packed.data[:-1]
    with pytest.raises(ValueError, match="the packed index is"):
        index.unpack_once(packed, *args)


def test_remembered_views_die_with_the_tensor():
    gc.collect()  # those of tensors that other tests have left
    pattern = BSRPattern.random((8, 12, 3, 3), (4, 3), 0.3)
    packed = pattern.index.clone()
    storage, alive = StorageWeakRef(packed.untyped_storage()), len(index._views)
    index.unpack_once(packed, pattern.shape, pattern.blocksize, pattern.nnzb)
    assert len(index._views) == alive + 1
    del packed
    gc.collect()
    assert len(index._views) == alive
    assert storage.expired()
