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


def scipy_with(**arrays):
    """A 4 x 4 matrix with all four 2 x 2 blocks, and some of its arrays replaced: scipy checks no assignment."""
    matrix = BSRPattern.full((4, 4, 1, 1), (2, 2)).to_scipy(torch.randn(4, 2, 2))
    for name, array in arrays.items():
        setattr(matrix, name, array)
    return matrix


ONE_NUMBER = (
    r"the matrix has %d blocks of data and %d indices, and indptr ends at %d; it needs one number for all three"
)


@pytest.mark.parametrize("blocks", [0, 3, 5, 8])
@pytest.mark.parametrize("indices", [3, 4, 8])
@pytest.mark.parametrize("last", [3, 4])
def test_blocks_indices_and_indptr_are_one_number(blocks, indices, last):
    """Blocks too few or too many, which nothing but their number shows; scipy's own prune() drops what is too many."""
    if blocks == indices == last:
        return
    data, cols = torch.randn(blocks, 2, 2), torch.tensor([0, 1] * 4)[:indices]
    indptr = torch.tensor([0, 2, last])
    matrix = scipy_with(data=data.numpy(), indices=cols.numpy(), indptr=indptr.numpy())
    message = ONE_NUMBER % (blocks, indices, last)
    too_many = min(blocks, indices) >= last
    with pytest.raises(ValueError, match=message + (r"; m.prune\(\) drops" if too_many else "$")):
        BSRPattern.from_scipy(matrix, (4, 4, 1, 1))
    t = torch.sparse_bsr_tensor(indptr, cols, data, size=(4, 4), check_invariants=False)
    with pytest.raises(ValueError, match=message + "$"):
        BSRPattern.from_torch(t, (4, 4, 1, 1))
    if too_many:
        matrix.prune()
        pattern, values = BSRPattern.from_scipy(matrix, (4, 4, 1, 1))
        assert pattern == BSRPattern((4, 4, 1, 1), (2, 2), indptr, cols[:last])
        assert torch.equal(values, data[:last])


def test_blocks_that_are_no_weights_are_refused():
    for dtype in ("int64", "bool", "complex64", "longdouble"):
        with pytest.raises(TypeError, match=r"m has dtype .*; it needs float32 or float64 \(m.astype\('float32'\)\)"):
            BSRPattern.from_scipy(scipy_with().astype(dtype), (4, 4, 1, 1))
    with pytest.raises(TypeError, match="m has dtype object"):
        BSRPattern.from_scipy(scipy_with(data=np.ones((4, 2, 2), dtype=object)), (4, 4, 1, 1))
    for data in (np.ones(4), np.ones((4, 2)), np.ones((1, 4, 2, 2))):
        with pytest.raises(
            ValueError, match=r"the blocks are torch.float64 .*; they need to be floating \[nnzb, bk, bc\]"
        ):
            BSRPattern.from_scipy(scipy_with(data=data), (4, 4, 1, 1))
    pattern = BSRPattern.full((4, 4, 1, 1), (2, 2))
    whole = torch.sparse_bsr_tensor(
        pattern.indptr, pattern.indices, torch.ones(4, 2, 2, dtype=torch.int32), size=(4, 4)
    )
    with pytest.raises(ValueError, match=r"the blocks are torch.int32 \(4, 2, 2\)"):
        BSRPattern.from_torch(whole, (4, 4, 1, 1))
    hybrid = torch.sparse_bsr_tensor(pattern.indptr, pattern.indices, torch.ones(4, 2, 2, 3), size=(4, 4, 3))
    with pytest.raises(TypeError, match=r"it needs a plain 2-d torch\.sparse_bsr tensor"):
        BSRPattern.from_torch(hybrid, (4, 4, 1, 1))


def test_matrices_of_other_machines_come_over():
    """Another byte order, half precision and views: the numbers count."""
    data = np.random.default_rng(0).normal(size=(4, 2, 2))
    for other in (data.astype(">f8"), data.astype(">f4"), data.astype("f2"), data.transpose(0, 2, 1)):
        _, values = BSRPattern.from_scipy(scipy_with(data=other), (4, 4, 1, 1))
        assert np.array_equal(values.numpy(), other)


def test_sizes_may_be_numpys():
    shape = tuple(np.array([4, 4, 3, 3]))
    pattern = BSRPattern.full(shape, np.array([2, 4]).tolist())
    assert pattern == BSRPattern.full((4, 4, 3, 3), (2, 4))
    assert all(type(v) is int for v in pattern.shape)
    mask = np.random.default_rng(0).random((4, 4, 3, 3)) < 0.5
    assert BSRPattern.from_mask(mask, (np.int64(2), 2)) == BSRPattern.from_mask(torch.from_numpy(mask), (2, 2))


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


def small():
    return BSRPattern.full((4, 4, 1, 1), (2, 2))


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
            r"blocksize is 2; it needs two positive ints",
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
        # What is no tensor, no array, no number: from_mask and the constructor take arrays, values are tensors.
        (
            lambda: BSRPattern.from_mask(small(), (2, 2)),
            TypeError,
            r"mask is BSRPattern; it needs .*pattern.to_mask\(\)",
        ),
        (lambda: BSRPattern.from_mask(None, (2, 2)), TypeError, "mask is NoneType; it needs a bool tensor"),
        (lambda: BSRPattern.from_mask("mask", (2, 2)), TypeError, "mask is str; it needs a bool tensor"),
        (lambda: BSRPattern.from_mask(torch.nn.Conv2d(4, 4, 1), (2, 2)), TypeError, "mask is Conv2d; it needs"),
        (
            lambda: BSRPattern.from_mask(small().to_mask().to_sparse(), (2, 2)),
            TypeError,
            r"dense tensor \(mask.to_dense",
        ),
        (lambda: BSRPattern.from_mask(small().to_mask().to("meta"), (2, 2)), ValueError, "mask is on the meta device"),
        (
            lambda: BSRPattern.from_mask(small().to_mask(), (2, 2), "abcd"),
            TypeError,
            "row_order is str; it needs integers",
        ),
        (
            lambda: BSRPattern.from_mask(small().to_mask(), (True, 2)),
            ValueError,
            r"blocksize is \(True, 2\); it needs two",
        ),
        (lambda: BSRPattern.from_mask(small().to_mask(), None), ValueError, "blocksize is NoneType; it needs two"),
        (
            lambda: BSRPattern.full(torch.ones(4, 4, 1, 1), (2, 2)),
            ValueError,
            "shape is Tensor; it needs four positive",
        ),
        (lambda: BSRPattern((4, 4, 1, 1), (2, 2), None, [0]), TypeError, "indptr is NoneType; it needs integers"),
        (
            lambda: BSRPattern((4, 4, 1, 1), (2, 2), [0, 1, 1], [2**70]),
            TypeError,
            "indices is list; it needs integers that",
        ),
        (lambda: BSRPattern((4, 4, 1, 1), (2, 2), [0, 1, 1], [[0], [0, 1]]), TypeError, "indices is list; it needs"),
        (lambda: BSRPattern.random((4, 4, 1, 1), (2, 2), "0.5"), ValueError, "density is '0.5'; it needs a number in"),
        (lambda: BSRPattern.random((4, 4, 1, 1), (2, 2), None), ValueError, "density is None; it needs a number in"),
        (
            lambda: BSRPattern.random((4, 4, 1, 1), (2, 2), 0.5, 0),
            TypeError,
            "generator is 0; it needs a torch.Generator",
        ),
        (lambda: small().values_from_dense(np.ones((4, 4, 1, 1))), TypeError, "weight is ndarray; it needs a tensor"),
        (lambda: small().values_from_dense(torch.nn.Conv2d(4, 4, 1)), TypeError, r"weight is Conv2d; .*conv.weight"),
        (lambda: small().values_from_dense(torch.ones(4, 4, 1, 1).to_sparse()), TypeError, r"\(weight.to_dense\(\)\)"),
        (
            lambda: small().to_dense(np.ones((4, 2, 2))),
            TypeError,
            r"to_dense\(\): values is ndarray; it needs a tensor",
        ),
        (lambda: small().to_torch(None), TypeError, "values is NoneType; it needs a tensor"),
        (lambda: small().to_scipy(np.ones((4, 2, 2))), TypeError, "values is ndarray; it needs a tensor"),
        (lambda: small().to_scipy(torch.ones(4, 2, 2).bfloat16()), TypeError, r"scipy needs .* \(values.float\(\)\)"),
        (lambda: BSRPattern.from_torch(np.ones((4, 4)), (4, 4, 1, 1)), TypeError, "t is ndarray; it needs a plain 2-d"),
        (lambda: small().to(torch.float16), TypeError, "device is torch.float16; it needs a device"),
        (lambda: small().to(torch.ones(1)), TypeError, "device is Tensor; it needs a device"),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()
