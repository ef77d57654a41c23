"""The model as a training calls it: BatchNorm, residual sum and ReLU in one operation where that is faster."""

from __future__ import annotations

import torch
from torch import nn

import blocksparse as bs

from ..progress import Progress
from ..surgery.training_fusion import fuse_training
from .settings import Settings


def as_called(model: nn.Module, settings: Settings, device: torch.device, progress: Progress) -> nn.Module:
    """`hrbp.fuse_training` of the model, on a CPU that has kernels for it; elsewhere the model itself.

    The result has no parameters of its own: everything but the call goes on with `model`.

    Args:
        model: not wrapped.
        settings: of the training; `fuse`, and not `compile`, which fuses by itself.
        device: of the model.
        progress: is told why a model is not fused.
    """
    if not settings.fuse or settings.compile or device.type != "cpu" or bs.available_backends()["cpu"] is not None:
        return model
    try:
        fused = fuse_training(model)
    except ValueError as error:
        progress.say(f"BatchNorm and ReLU run one after the other: {error}")
        return model
    return fused if fused.fusion.norms else model
