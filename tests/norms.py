"""What tests of batch_norm share: tensors in every memory format, and a comparison with PyTorch's own in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import blocksparse as bs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FORMATS = ["contiguous", "channels_last", "batch_last"]


def laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "batch_last":
        return bs.to_batch_last(t)
    return t.contiguous(memory_format=getattr(torch, layout if layout == "channels_last" else "contiguous_format"))


def plain(x: Tensor, mean, var, weight, bias, training, momentum, eps, residual, relu) -> Tensor:
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(
    shape, dtype, layout, training, residual, relu, affine, seed=0, tracked=True, offset=0.0, device="cpu", frozen=False
):
    """Results, statistics and gradients against float64; frozen: weight and bias are not trained."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    c = shape[1]
    tensors = {"x": draw(*shape) + offset}
    if residual:
        tensors["residual"] = draw(*shape)
    if affine:
        tensors |= {"weight": draw(c) + 1, "bias": draw(c)}
    dy = draw(*shape)
    running = {"mean": draw(c), "var": draw(c).square() + 0.5} if tracked else {}
    found = []
    for exact in (True, False):
        to = torch.float64 if exact else dtype
        given_now = {}
        for name, t in tensors.items():
            t = t.to(dtype if t.dim() > 1 else sums_dtype(dtype)).to(torch.float64 if exact else t.dtype)
            t = t.to(to) if t.dim() > 1 else t.to(sums_dtype(to))
            t = t if exact else t.to(device)
            t = laid_out(t, layout) if t.dim() == 4 else t
            given_now[name] = t.clone().detach().requires_grad_(t.dim() > 1 or not frozen)
        kept = {name: t.to("cpu" if exact else device, sums_dtype(to), copy=True) for name, t in running.items()}
        args = [given_now["x"], kept.get("mean"), kept.get("var"), given_now.get("weight"), given_now.get("bias")]
        args += [training, 0.3, 1e-3]
        wanted = [t for t in given_now.values() if t.requires_grad]
        if exact:
            z = plain(*args, given_now.get("residual"), False)
            y = F.relu(z) if relu else z
            if relu:  # a number that one cuts and the other passes, for rounding, says nothing about the gradients
                dy = torch.where(z.abs() < 1e-3, 0, dy)
        else:
            y = bs.batch_norm(*args, residual=given_now.get("residual"), relu=relu)
            assert (y.dtype, y.shape) == (dtype, shape)
            assert y.stride() == given_now["x"].stride()
        gradients = torch.autograd.grad(y, wanted, dy.to(dtype).to(y))
        found.append([y.detach(), *kept.values(), *gradients])
    for wanted, got in zip(*found, strict=True):
        size = wanted.norm() / max(wanted.numel(), 1) ** 0.5
        error = (got.cpu().double() - wanted).norm() / max(wanted.numel(), 1) ** 0.5
        assert error <= TOLERANCE[dtype] * (size + 1), (got, wanted)
