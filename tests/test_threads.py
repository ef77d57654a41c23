"""Results on as many of PyTorch's threads as a user has: the other tests run on one."""

from __future__ import annotations

import pytest
import torch

import blocksparse as bs
from oracle import assert_products
from strategies import Case


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last"), (torch.float32, "batch_last")],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "blocksize", "size", "conv"),
    [
        pytest.param((64, 64, 3, 3), (8, 1), 14, ((1, 1), (1, 1), (1, 1)), id="3x3-single-channels"),
        pytest.param((128, 64, 3, 3), (32, 32), 14, ((2, 2), (1, 1), (1, 1)), id="strided-3x3"),
        pytest.param((256, 128, 1, 1), (32, 32), 14, ((1, 1), (0, 0), (1, 1)), id="1x1"),
        pytest.param((128, 64, 1, 1), (16, 16), 28, ((2, 2), (0, 0), (1, 1)), id="strided-1x1"),
    ],
)
def test_products_on_several_threads(backend, dtype, memory_format, shape, blocksize, size, conv):
    """Tensors large enough for PyTorch to share out."""
    pattern = bs.BSRPattern.random(shape, blocksize, 0.3, torch.Generator().manual_seed(0))
    case = Case(pattern, 4, size, size + 1, *conv, True, memory_format, dtype, 0)
    x, values, bias, dy, pattern = case.tensors("cpu")
    assert_products(x, values, pattern, bias, dy, *conv, backend)


def test_gradients_of_a_module_on_several_threads():
    pattern = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.3, torch.Generator().manual_seed(0))
    module = bs.BSRConv2d(pattern, padding=1, dtype=torch.float64)
    x = torch.randn(4, 64, 20, 20, dtype=torch.float64, requires_grad=True)
    module(x).square().sum().backward()
    several = [x.grad, *(p.grad for p in module.parameters())]
    torch.set_num_threads(1)
    x.grad = None
    module.zero_grad()
    module(x).square().sum().backward()
    torch.testing.assert_close(several, [x.grad, *(p.grad for p in module.parameters())])
