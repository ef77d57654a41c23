"""What the weights of a layer are with the BatchNorm that follows it in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import BSRConv1d, BSRConv2d, BSRLinear, BSRModule

NORMS: dict[type, tuple[type, ...]] = {  # layer -> norms whose axis is that of its results
    nn.Conv2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    BSRConv2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    nn.Conv1d: (nn.BatchNorm1d, nn.SyncBatchNorm),
    BSRConv1d: (nn.BatchNorm1d, nn.SyncBatchNorm),
    nn.Linear: (nn.BatchNorm1d, nn.SyncBatchNorm),
    BSRLinear: (nn.BatchNorm1d, nn.SyncBatchNorm),
}


def folded_weights(module: Any, norm: Any) -> tuple[Tensor, Tensor] | None:
    """Weights (or stored blocks) and bias of a layer with the norm in them; None where they overflow.

    They are computed in float64 and rounded once.
    """
    scale = torch.rsqrt(_wide(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * _wide(norm.weight)
    bias = -_wide(norm.running_mean) * scale
    if module.bias is not None:
        bias = bias + _wide(module.bias) * scale
    if norm.bias is not None:
        bias = bias + _wide(norm.bias)
    if isinstance(module, BSRModule):
        old, pattern = module.values, module.pattern.to("cpu")
        rows = scale if pattern.row_order is None else scale[pattern.row_order.long()]
        of_block = torch.repeat_interleave(pattern.indptr.long().diff())
        exact = _wide(old) * rows.view(-1, pattern.blocksize[0])[of_block][:, :, None]
    else:
        old = module.weight
        exact = _wide(old) * scale.view(-1, *[1] * (old.dim() - 1))
    made = exact.to(old.dtype), bias.to(old.dtype)
    if any(bool((wide.isfinite() & ~t.isfinite()).any()) for wide, t in zip((exact, bias), made, strict=True)):
        return None
    return made[0].to(old.device), made[1].to(old.device)


def _wide(t: Tensor) -> Tensor:
    return t.detach().cpu().double()


def expect_vectors(x: Tensor) -> Tensor:
    """x [N, C]; of others, BatchNorm1d normalizes another axis than that of the linear layer it was folded into."""
    if x.dim() != 2:
        raise ValueError(
            f"fuse(): a linear layer that a BatchNorm1d is folded into got x of shape {tuple(x.shape)}; it needs"
            " [N, C]. Use the model before fuse()"
        )
    return x
