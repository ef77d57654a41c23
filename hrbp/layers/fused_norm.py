"""BatchNorm with the sum and the ReLU that follow it, on the module that a network has."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from blocksparse import batch_norm

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedNorm(nn.Module):
    """relu(norm(x) + residual), with either left out: the call of an nn.BatchNorm2d and of what followed it.

    It has nothing of its own: parameters, statistics and mode are those of `norm`, which a network goes on to own. A
    norm that has hooks or another forward is called as it is, and a residual that is broadcast or of another dtype is
    added by PyTorch's rules.
    """

    def __init__(self, norm: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        norm, fits = self.norm, residual is None
        if isinstance(residual, Tensor):
            fits = (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
        if not fits or "forward" in vars(norm) or any(vars(norm)[name] for name in HOOKS) or x.dim() != 4:
            y = norm(x)
            y = y if residual is None else y + residual
            return F.relu(y) if self.relu else y
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        kept = not norm.training or norm.track_running_stats
        return batch_norm(
            x, norm.running_mean if kept else None, norm.running_var if kept else None, norm.weight, norm.bias,
            norm.training or (norm.running_mean is None and norm.running_var is None), momentum, norm.eps,
            residual=residual, relu=self.relu,
        )  # fmt: skip
