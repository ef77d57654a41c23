"""ConvGeometry: output sizes are PyTorch's, and sizes that fit no convolution are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from blocksparse import ConvGeometry

small, two = st.integers(1, 12), st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(small, small, two, two, st.tuples(st.integers(0, 4), st.integers(0, 4)), two)
def test_output_size_is_torchs(h, w, kernel, stride, padding, dilation):
    x, weight = torch.empty(2, 3, h, w, device="meta"), torch.empty(5, 3, *kernel, device="meta")
    try:
        needed = F.conv2d(x, weight, None, stride, padding, dilation).shape
        if 0 in needed:  # PyTorch 2.11 takes it on the meta device, and nowhere else
            raise RuntimeError
    except RuntimeError:
        with pytest.raises(ValueError, match="smaller than the"):
            ConvGeometry.of(x.shape, weight.shape, stride, padding, dilation)
        return
    geometry = ConvGeometry.of(x.shape, weight.shape, stride, padding, dilation)
    assert geometry.y_shape == tuple(needed)
    assert (geometry.x_shape, geometry.weight_shape) == (tuple(x.shape), tuple(weight.shape))


def test_one_int_means_both_axes():
    assert ConvGeometry.of((1, 2, 9, 9), (4, 2, 3, 3), 2, 1, 1) == ConvGeometry.of(
        (1, 2, 9, 9), (4, 2, 3, 3), (2, 2), (1, 1), (1, 1)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 9, 9), (4, 2, 3, 3)), r"x has shape \(2, 9, 9\); it needs 4 dimensions"),
        (((1, 2, 9, 9), (4, 2, 3)), r"the filter bank has shape \(4, 2, 3\)"),
        (((1, 3, 9, 9), (4, 2, 3, 3)), r"x has 3 channels .* needs 2"),
        (((1, 2, 9, 9), (4, 2, 3, 3), 0), r"stride is 0; it needs an int >= 1"),
        (((1, 2, 9, 9), (4, 2, 3, 3), 1, -1), r"padding is -1; it needs an int >= 0"),
        (((1, 2, 9, 9), (4, 2, 3, 3), 1, 1, (1, 2, 3)), r"dilation is \(1, 2, 3\)"),
        (((1, 2, 9, 9), (4, 2, 3, 3), "2"), r"stride is '2'"),
        (((1, 2, 9, 9), (4, 2, 3, 3), 1.0), r"stride is 1.0"),
        (((1, 2, 2, 9), (4, 2, 3, 3)), r"2 x 9 with padding \(0, 0\) is smaller than the 3 x 3 kernel"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvGeometry.of(*arguments)
