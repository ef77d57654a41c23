"""BSRPattern: what it stores, that it cannot be changed or corrupted, and its exchange with other libraries."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from blocksparse import BSRPattern
from strategies import patterns

masks = st.builds(
    lambda k, c, r, s, bk, bc, density, seed: (
        torch.rand(k * bk, c * bc, r, s, generator=torch.Generator().manual_seed(seed)) < density,
        (bk, bc),
    ),
    *[st.integers(1, 4)] * 6,
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.integers(0, 2**32 - 1),
)


def brute_force(mask: torch.Tensor, blocksize: tuple[int, int]) -> tuple[list[int], list[int]]:
    """indptr and indices from the definition, one cell at a time."""
    k, c, _, s = mask.shape
    bk, bc = blocksize
    columns = [set() for _ in range(k // bk)]
    for row, channel, i, j in mask.nonzero().tolist():
        columns[row // bk].add((i * s + j) * (c // bc) + channel // bc)
    indices = [col for row in columns for col in sorted(row)]
    return np.cumsum([0] + [len(row) for row in columns]).tolist(), indices


@given(masks)
def test_from_mask_is_the_definition(drawn):
    mask, blocksize = drawn
    pattern = BSRPattern.from_mask(mask, blocksize)
    indptr, indices = brute_force(mask, blocksize)
    assert pattern.indptr.tolist() == indptr
    assert pattern.indices.tolist() == indices
    assert pattern.indptr.dtype == pattern.indices.dtype == torch.int32
    assert (pattern.shape, pattern.blocksize, pattern.nnzb) == (tuple(mask.shape), blocksize, len(indices))
    assert pattern.density == pytest.approx(len(indices) * blocksize[0] * blocksize[1] / mask.numel())
    assert BSRPattern(pattern.shape, blocksize, indptr, indices) == pattern


@given(masks, st.integers(0, 2**32 - 1))
def test_row_order_cuts_blocks_from_permuted_filters(drawn, seed):
    mask, blocksize = drawn
    order = torch.randperm(mask.shape[0], generator=torch.Generator().manual_seed(seed))
    pattern = BSRPattern.from_mask(mask, blocksize, order)
    plain = BSRPattern.from_mask(mask[order], blocksize)
    assert (pattern.indices.tolist(), pattern.indptr.tolist()) == (
        plain.indices.tolist(),
        plain.indptr.tolist(),
    )
    assert torch.equal(pattern.to_mask()[order], plain.to_mask())
    assert (pattern.to_mask() | ~mask).all()
    weight = torch.randn(mask.shape)
    assert torch.equal(pattern.values_from_dense(weight), plain.values_from_dense(weight[order]))


@given(patterns())
def test_mask_and_values_round_trip(pattern):
    mask = pattern.to_mask()
    assert BSRPattern.from_mask(mask, pattern.blocksize, pattern.row_order) == pattern
    assert int(mask.sum()) == pattern.nnzb * pattern.blocksize[0] * pattern.blocksize[1]
    values = torch.randn(pattern.nnzb, *pattern.blocksize)
    weight = pattern.to_dense(values)
    assert torch.equal(pattern.values_from_dense(weight), values)
    assert (weight[~mask] == 0).all()
    dense = torch.randn(pattern.shape)
    assert torch.equal(pattern.to_dense(pattern.values_from_dense(dense)), dense * mask)


@given(patterns())
def test_dense_and_back_are_adjoint_in_autograd(pattern):
    assume(pattern.nnzb)
    values = torch.randn(pattern.nnzb, *pattern.blocksize, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(pattern.shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(pattern.shape, dtype=torch.float64)
    (dv,) = torch.autograd.grad(pattern.to_dense(values), values, g)
    assert torch.equal(dv, pattern.values_from_dense(g))
    gv = torch.randn_like(values)
    (dw,) = torch.autograd.grad(pattern.values_from_dense(weight), weight, gv)
    assert torch.equal(dw, pattern.to_dense(gv))


@given(
    st.tuples(*[st.integers(1, 5)] * 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_random_stores_exactly_the_rounded_share(blocks, blocksize, density, seed):
    shape = (blocks[0] * blocksize[0], blocks[1] * blocksize[1], *blocks[2:])
    pattern = BSRPattern.random(shape, blocksize, density, torch.Generator().manual_seed(seed))
    assert pattern.nnzb == round(density * blocks[0] * blocks[1] * blocks[2] * blocks[3])
    again = BSRPattern.random(shape, blocksize, density, torch.Generator().manual_seed(seed))
    assert again == pattern
    assert BSRPattern(shape, blocksize, pattern.indptr, pattern.indices) == pattern


def test_random_reaches_every_block_evenly():
    hits = sum(
        BSRPattern.random((8, 6, 2, 1), (2, 2), 0.25, torch.Generator().manual_seed(i)).to_mask().long()
        for i in range(400)
    )
    assert 60 < int(hits.min()) <= int(hits.max()) < 145  # mean 100, deviation 8.7


def test_full_is_dense():
    pattern = BSRPattern.full((4, 6, 3, 1), (2, 3))
    assert (pattern.density, pattern.nnzb) == (1.0, 12)
    assert pattern.to_mask().all()


# ---------------------------------------------------------------- other libraries


@given(patterns())
def test_scipy_there_and_back(pattern):
    values = torch.randn(pattern.nnzb, *pattern.blocksize)
    matrix = pattern.to_scipy(values)
    matrix.check_format(full_check=True)
    k, c, r, s = pattern.shape
    weight = pattern.to_dense(values)
    weight = weight if pattern.row_order is None else weight[pattern.row_order]
    assert np.array_equal(matrix.toarray(), weight.permute(0, 2, 3, 1).reshape(k, r * s * c).numpy())
    back, back_values = BSRPattern.from_scipy(matrix, pattern.shape, pattern.row_order)
    assert back == pattern
    assert torch.equal(back_values, values)


@given(patterns(), st.integers(0, 2**32 - 1))
def test_unsorted_matrices_are_sorted_in_a_copy(pattern, seed):
    values = torch.randn(pattern.nnzb, *pattern.blocksize)
    matrix = pattern.to_scipy(values)
    rng = np.random.default_rng(seed)
    shuffle = np.concatenate(
        [rng.permutation(np.arange(a, b)) for a, b in zip(matrix.indptr, matrix.indptr[1:], strict=False)]
    ).astype(int)
    messy = scipy.sparse.bsr_array((matrix.data[shuffle], matrix.indices[shuffle], matrix.indptr), shape=matrix.shape)
    before = messy.indices.copy()
    back, back_values = BSRPattern.from_scipy(messy, pattern.shape, pattern.row_order)
    assert back == pattern
    assert torch.equal(back_values, values)
    assert np.array_equal(messy.indices, before)


@given(patterns())
def test_torch_there_and_back(pattern):
    assume(pattern.nnzb)  # torch builds no BSR tensor without blocks of known size
    values = torch.randn(pattern.nnzb, *pattern.blocksize)
    t = pattern.to_torch(values)
    back, back_values = BSRPattern.from_torch(t, pattern.shape, pattern.row_order)
    assert back == pattern
    assert torch.equal(back_values, values)
    assert np.array_equal(t.to_dense().numpy(), pattern.to_scipy(values).toarray())


def test_from_others_refuse_what_is_not_theirs():
    pattern = BSRPattern.random((4, 4, 1, 1), (2, 2), 1.0)
    values = torch.randn(4, 2, 2)
    matrix = pattern.to_scipy(values)
    with pytest.raises(TypeError, match=r"m is csr_array; it needs a scipy bsr_array"):
        BSRPattern.from_scipy(matrix.tocsr(), (4, 4, 1, 1))
    with pytest.raises(ValueError, match=r"the matrix is \(4, 4\); shape \(4, 2, 3, 1\) needs \(4, 6\)"):
        BSRPattern.from_scipy(matrix, (4, 2, 3, 1))
    with pytest.raises(TypeError, match=r"it needs a plain 2-d torch.sparse_bsr tensor"):
        BSRPattern.from_torch(torch.eye(4), (4, 4, 1, 1))
    matrix.indices[1] = matrix.indices[0]
    with pytest.raises(ValueError, match="indices repeats at 1 within block-row 0"):
        BSRPattern.from_scipy(matrix, (4, 4, 1, 1))


# ---------------------------------------------------------------- a value that cannot change


@given(patterns())
def test_pickle_copy_and_equality(pattern):
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert copy.deepcopy(pattern) == pattern
    assert hash(pickle.loads(pickle.dumps(pattern))) == hash(pattern)
    buffer = io.BytesIO()
    torch.save(pattern, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False) == pattern
    assert pattern.to("cpu") is pattern
    assert pattern != "a pattern"
    if pattern.nnzb > 0:
        mask = pattern.to_mask()
        assert BSRPattern.from_mask(torch.zeros_like(mask), pattern.blocksize) != pattern


def test_equality_sees_every_part():
    base = BSRPattern((4, 4, 1, 1), (2, 2), [0, 1, 2], [0, 1])
    assert base != BSRPattern((4, 4, 1, 1), (2, 2), [0, 1, 2], [1, 1])
    assert base != BSRPattern((4, 4, 1, 1), (2, 2), [0, 2, 2], [0, 1])
    assert base != BSRPattern((4, 4, 1, 1), (2, 2), [0, 1, 2], [0, 1], [1, 0, 2, 3])
    assert base == BSRPattern((4, 4, 1, 1), (2, 2), [0, 1, 2], [0, 1], [0, 1, 2, 3])
    assert base != BSRPattern((4, 8, 1, 1), (2, 4), [0, 1, 2], [0, 1])


def test_nothing_that_comes_out_leads_back_in():
    mask = torch.eye(8, dtype=torch.bool)[:, :, None, None]
    order = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    pattern = BSRPattern.from_mask(mask, (2, 2), order)
    twin = BSRPattern.from_mask(mask, (2, 2), order.clone())
    mask.zero_()
    order.zero_()
    for array in (pattern.indptr, pattern.indices, pattern.row_order):
        array.zero_()
    assert pattern == twin
    for name in ("shape", "nnzb", "indices", "anything"):
        with pytest.raises(AttributeError):
            setattr(pattern, name, 0)
    with pytest.raises(AttributeError):
        del pattern._index
    indices = np.array([0, 1, 0, 3], dtype=np.int64)
    raw = BSRPattern((4, 4, 2, 1), (2, 2), np.array([0, 2, 4]), indices)
    indices[:] = 99
    assert raw.indices.tolist() == [0, 1, 0, 3]


def test_repr_says_what_it_is():
    pattern = BSRPattern((4, 8, 3, 1), (2, 4), [0, 1, 3], [5, 0, 2])
    assert repr(pattern) == "BSRPattern(shape=(4, 8, 3, 1), blocksize=(2, 4), nnzb=3, density=0.25)"
    permuted = BSRPattern((4, 8, 3, 1), (2, 4), [0, 1, 3], [5, 0, 2], [3, 2, 1, 0])
    assert "rows permuted" in repr(permuted)


def test_a_large_fine_pattern():
    """2048 x 2048 x 3 x 3 in 8 x 1 blocks at 90%: every table is right at a size where nothing may be quadratic."""
    pattern = BSRPattern.random((2048, 2048, 3, 3), (8, 1), 0.1, torch.Generator().manual_seed(0))
    assert pattern.nnzb == round(0.1 * 256 * 2048 * 9)
    assert BSRPattern.from_mask(pattern.to_mask(), (8, 1)) == pattern
    assert BSRPattern(pattern.shape, (8, 1), pattern.indptr, pattern.indices) == pattern


# ---------------------------------------------------------------- raw arrays are always checked


@st.composite
def corrupted(draw):
    """Arrays of a valid pattern with one thing broken, and the words of the error that must come."""
    pattern = draw(patterns())
    indptr, indices = pattern.indptr.tolist(), pattern.indices.tolist()
    cols = pattern.shape[1] // pattern.blocksize[1] * pattern.shape[2] * pattern.shape[3]
    order = list(range(pattern.shape[0]))
    how = draw(st.sampled_from(["short", "first", "last", "fall", "negative", "beyond", "repeat", "swap", "order"]))
    at = draw(st.integers(0, max(0, len(indices) - 1)))
    if how == "short":
        return pattern, indptr[:-1], indices, order, "indptr has"
    if how == "first":
        return pattern, [draw(st.integers(1, 9)), *indptr[1:]], indices, order, "indptr runs from"
    if how == "last":
        return (
            pattern,
            [*indptr[:-1], indptr[-1] + draw(st.sampled_from([-1, 1, 7]))],
            indices,
            order,
            "indptr",
        )
    if how == "fall":
        assume(len(indptr) > 2 and len(indices) > 0)
        indptr[1] = draw(st.integers(len(indices) + 1, 2**40))
        return pattern, indptr, indices, order, "indptr falls after block-row 1"
    if how == "order":
        order[draw(st.integers(0, len(order) - 1))] = draw(st.sampled_from([-1, len(order), 2**35]))
        return pattern, indptr, indices, order, "row_order .* is not a permutation"
    assume(indices)
    if how == "negative":
        indices[at] = draw(st.integers(-(2**40), -1))
        return pattern, indptr, indices, order, r"indices\[\d+\] is -"
    if how == "beyond":
        indices[at] = draw(st.integers(cols, 2**40))
        return pattern, indptr, indices, order, r"indices\[\d+\] is \d+; it needs"
    row = max(b for b in range(len(indptr) - 1) if indptr[b] <= at)
    assume(at + 1 < indptr[row + 1])
    if how == "repeat":
        indices[at + 1] = indices[at]
        return pattern, indptr, indices, order, "indices repeats"
    indices[at], indices[at + 1] = indices[at + 1], indices[at]
    return pattern, indptr, indices, order, "indices (falls|repeats)"


@given(corrupted())
def test_corrupted_arrays_raise(broken):
    pattern, indptr, indices, order, message = broken
    with pytest.raises(ValueError, match=message):
        BSRPattern(pattern.shape, pattern.blocksize, indptr, indices, order)


@given(corrupted())
def test_corrupted_pickles_raise(broken):
    pattern, indptr, indices, order, message = broken
    rebuild, _ = pattern.__reduce__()
    with pytest.raises(ValueError, match=message):
        rebuild(
            pattern.shape,
            pattern.blocksize,
            *(torch.tensor(a, dtype=torch.int64) for a in (indptr, indices, order)),
        )


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: BSRPattern.full((6, 4, 3, 3), (4, 2)),
            ValueError,
            r"\(4, 2\) does not divide \(K, C\) = \(6, 4\)",
        ),
        (lambda: BSRPattern.full((6, 4, 3, 3), (2, 3)), ValueError, "bc must divide 4"),
        (lambda: BSRPattern.full((6, 4, 3), (2, 2)), ValueError, "four positive ints"),
        (lambda: BSRPattern.full((6, 0, 3, 3), (2, 2)), ValueError, "four positive ints"),
        (lambda: BSRPattern.full((6, 4, 3, 3), (0, 2)), ValueError, "two positive ints"),
        (
            lambda: BSRPattern.full((6, 4, 3, 3), 2),
            ValueError,
            r"blocksize is \(2,\); it needs two positive ints",
        ),
        (
            lambda: BSRPattern((2**20, 2**30, 64, 64), (1, 1), [0], []),
            ValueError,
            "more block-cols than int32",
        ),
        (lambda: BSRPattern.random((4, 4, 1, 1), (2, 2), 1.5), ValueError, r"density is 1.5; it needs"),
        (lambda: BSRPattern.random((4, 4, 1, 1), (2, 2), float("nan")), ValueError, "density is nan"),
        (lambda: BSRPattern.from_mask(torch.ones(4, 4, 1, 1), (2, 2)), TypeError, "it needs torch.bool"),
        (
            lambda: BSRPattern.from_mask(torch.ones(4, 4, dtype=torch.bool), (2, 2)),
            ValueError,
            "four positive",
        ),
        (lambda: BSRPattern((4, 4, 1, 1), (2, 2), [0.0, 1.0, 1.0], [0]), TypeError, "indptr has dtype"),
        (lambda: BSRPattern((4, 4, 1, 1), (2, 2), [0, 1, 1], [[0]]), ValueError, "indices has shape"),
        (
            lambda: BSRPattern.full((4, 4, 1, 1), (2, 2)).to_dense(torch.ones(3, 2, 2)),
            ValueError,
            r"to_dense\(\): values has shape \(3, 2, 2\); pattern needs \(4, 2, 2\) = \(nnzb, bk, bc\)",
        ),
        (
            lambda: BSRPattern.full((4, 4, 1, 1), (2, 2)).values_from_dense(torch.ones(4, 4, 3, 3)),
            ValueError,
            r"weight has shape \(4, 4, 3, 3\); the pattern needs \(4, 4, 1, 1\)",
        ),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()
