"""The yardstick is PyTorch's own error, and nothing that PyTorch reads beside its inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import blocksparse as bs
import oracle
from strategies import Case, cases

# (x, filter bank, stride, padding) of which PyTorch 2.13 makes a bf16 weight gradient, on CPUs with AVX-512, from what
# lies behind x, or from memory that nobody wrote.
NARROW = [
    ((3, 3, 13, 1), (16, 3, 1, 1), (1, 3), (0, 0)),
    ((9, 1, 10, 2), (16, 1, 1, 1), (1, 3), (0, 0)),
    ((1, 38, 4, 1), (36, 38, 1, 3), (1, 2), (0, 2)),
    ((9, 35, 11, 1), (9, 35, 3, 3), (3, 3), (0, 2)),
    ((3, 24, 8, 2), (39, 24, 3, 3), (3, 3), (1, 1)),
    ((2, 34, 4, 1), (34, 34, 1, 3), (1, 2), (0, 2)),
    ((3, 30, 10, 1), (34, 30, 2, 2), (1, 2), (1, 1)),
]


@pytest.mark.parametrize(("x_shape", "shape", "stride", "padding"), NARROW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_what_lies_beside_the_inputs_does_not_count(x_shape, shape, stride, padding, dtype, memory_format):
    pattern = bs.BSRPattern.random(shape, (1, 1), 0.5, torch.Generator().manual_seed(0))
    n, _, h, w = x_shape
    case = Case(pattern, n, h, w, stride, padding, (1, 1), True, memory_format, dtype, 0)
    x, values, bias, dy, pattern = case.tensors("cpu")
    for _ in range(5):
        oracle.assert_products(x, values, pattern, bias, dy, *case.conv, "torch")
        for size in range(4, 20):  # what nobody wrote is NaN
            torch.full((2**size,), torch.nan)


@given(cases(dtypes=(torch.float64,)))
def test_the_yardstick_of_narrow_inputs_is_the_same_gradient(case):
    x, _, _, dy, pattern = case.tensors("cpu")
    arguments = oracle.as_wide_as_its_stride(x, pattern.shape, dy, *case.conv)
    assert all(size >= step for size, step in zip(arguments[0].shape[2:], arguments[3], strict=True))
    expected = torch.nn.grad.conv2d_weight(x, pattern.shape, dy, *case.conv)
    torch.testing.assert_close(torch.nn.grad.conv2d_weight(*arguments), expected)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1.01, 1e30])
def test_a_yardstick_that_is_wrong_measures_nothing(wrong):
    one = torch.ones(2)
    with pytest.raises(AssertionError, match=r"product: PyTorch itself is off by .*: no yardstick"):
        oracle.assert_close(one, one.double(), torch.tensor([1.0, wrong]), one.double(), "product")
    with pytest.raises(AssertionError, match=r"product: max error 1 \(allowed"):
        oracle.assert_close(one + 1, one.double(), one, one.double(), "product")
