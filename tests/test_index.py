"""The packed tables: each against its definition, aligned, and of a size that no mask can change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import blocksparse as bs
from blocksparse import BSRPattern, index
from runners import RUNNERS
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
    for place in tables.layout:
        assert place is None or place[0] % 4 == 0


@given(patterns("triton", max_blocks=12))
def test_stacks_are_their_definition(pattern):
    tables = index.unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    (k, c, r, s), (bk, bc) = pattern.shape, pattern.blocksize
    k_blocks, c_blocks, taps = k // bk, c // bc, r * s
    stack = index.stacked(pattern.shape, pattern.blocksize)
    if stack == 1:
        assert all(getattr(tables, f"s_{name}").numel() == 0 for name in ("indptr", "indices", "first", "ranks"))
        assert bc == 32 or (bc, c_blocks) == (16, 1)
        return
    assert 16 <= stack * bc <= 64
    found = {}
    for block, (row, col) in enumerate(zip(tables.rows.tolist(), tables.indices.tolist(), strict=True)):
        tap, c_block = divmod(col, c_blocks)
        found.setdefault((c_block // stack, tap, row), {})[c_block % stack] = block
    ordered = sorted(found)
    assert tables.s_indptr.tolist() == [
        sum(at * taps + tap < cell for at, tap, _ in ordered) for cell in range(-(-c_blocks // stack) * taps + 1)
    ]
    used = len(ordered)
    assert tables.s_indices[:used].tolist() == [tap * k_blocks + row for _, tap, row in ordered]
    for at, key in enumerate(ordered):
        first, ranks = int(tables.s_first[at]), int(tables.s_ranks[at])
        nibbles = {j: ranks >> 4 * j & 15 for j in range(stack)}
        assert {j: first + rank - 1 for j, rank in nibbles.items() if rank} == found[key]
    for table in (tables.s_indices, tables.s_first, tables.s_ranks):
        assert not table[used:].any()


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


def test_tables_are_views_that_follow_what_is_written():
    pattern, other = (BSRPattern.random((8, 12, 3, 3), (4, 3), 0.3) for _ in range(2))
    packed = pattern.index.clone()
    tables = index.unpack(packed, pattern.shape, pattern.blocksize, pattern.nnzb)
    packed.copy_(other.index)
    for name in index.Layout._fields:
        a, b = getattr(tables, name), getattr(other._tables, name)
        assert (a is None and b is None) or torch.equal(a, b)
        assert a is None or a.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
def test_an_index_may_lie_anywhere(runner):
    """Not at the start of its memory, and with steps between its numbers."""
    backend, device = runner
    pattern = BSRPattern.random((16, 16, 3, 3), (8, 8), 0.3).to(device)
    x, values = torch.randn(2, 16, 6, 6, device=device), torch.randn(pattern.nnzb, 8, 8, device=device)
    needed = bs.conv2d(x, values, pattern, backend=backend)
    for step in (1, 2):
        wide = torch.full((step * pattern.index.numel() + 8,), 1 << 30, dtype=torch.int32, device=device)
        packed = wide[4:-4:step]
        packed.copy_(pattern.index)
        moved = BSRPattern.from_index(pattern.shape, pattern.blocksize, pattern.nnzb, packed)
        assert torch.equal(bs.conv2d(x, values, moved, backend=backend), needed)
