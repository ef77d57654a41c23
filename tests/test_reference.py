"""The oracle itself, against PyTorch's float64 convolution and its autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given

import blocksparse as bs
from strategies import Case, cases


@given(cases(dtypes=(torch.float64, torch.float32, torch.float16)))
def test_reference_is_torchs_float64_convolution(case: Case):
    x, values, bias, dy, pattern = case.tensors("cpu")
    # Contiguous: PyTorch's float64 gradients refuse some channels_last inputs ("grad_weight must be contiguous").
    x64, v64 = x.double().contiguous().requires_grad_(), values.double().requires_grad_()
    y = F.conv2d(x64, pattern.to_dense(v64), None if bias is None else bias.double(), *case.conv)
    dx, dv = torch.autograd.grad(y, (x64, v64), dy.double().contiguous())
    for actual, needed in [
        (bs.reference.fprop(x, values, pattern, bias, *case.conv), y),
        (bs.reference.dgrad(dy, values, pattern, x.shape, *case.conv), dx),
        (bs.reference.wgrad(x, dy, pattern, *case.conv), dv),
    ]:
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, needed.detach(), rtol=1e-10, atol=1e-10)
