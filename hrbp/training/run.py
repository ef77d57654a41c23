"""One training in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches
from ..data.loading import load
from ..data.sets import ImageSet
from .devices import ranks
from .result import Result
from .settings import Settings
from .trainer import Trainer


def train(
    model: nn.Module,
    images: tuple[ImageSet, ImageSet] | str = "shapes",
    *,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """Train a model on images, on a GPU where there is one, and on all ranks inside torchrun.

    Args:
        model: as in `Trainer`.
        images: sets to train and to test with, or a name for hrbp.data.load.
        batch_size: of all ranks together.
        seed: of the order and augmentation of the images.
        device: default: the GPU if there is one.
        out, resume, config, quiet: as in `Trainer`.
        **settings: see `Settings`; epochs is needed.
    """
    with ranks(device) as (rank, world, here):
        sets = (load(images, "train"), load(images, "test")) if isinstance(images, str) else images
        to_train, to_test = (
            Batches(s, batch_size, train=kind, seed=seed, rank=rank, world=world, device=here)
            for s, kind in zip(sets, (True, False), strict=True)
        )
        made = Settings(**settings)
        return Trainer(model, to_train, to_test, made, out=out, resume=resume, config=config, quiet=quiet).run()
