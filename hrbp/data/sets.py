"""Labelled images: how many, of what shape and classes, and how to read some of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import memory_bytes

# Images by their numbers int64 [n], and for each five numbers in [0, 1) to augment it by: float32 [n, 5], or None.
Part = tuple[np.ndarray, np.ndarray | None]


class ImageSet(ABC):
    """Labelled images: how many, of what shape and classes, and how to read some of them."""

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]  # of each channel, black 0 and white 1; for normalisation
    std: tuple[float, ...]
    labels: Tensor  # int64 [N]
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def to(self, device: torch.device | str) -> ImageSet:
        """The same images, read onto `device`."""

    @abstractmethod
    def read(self, parts: Sequence[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each part its images uint8 [n, C, H, W], augmented, and labels int64 [n], on `device`."""


class MemorySet(ImageSet):
    """Images held in memory, on the device where they are used.

    Augmented by cropping after padding by an eighth (4 pixels of 32) with black, and by flipping left and right.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], in range(len(classes)).
        classes: their names.
        name: of the set, for reports.
        mean, std: of each channel, black 0 and white 1; default: 0.5 and 0.25.
        flips: whether a mirrored image is one of its class; False: they are not flipped.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        *,
        name: str = "images",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        flips: bool = True,
    ) -> None:
        who = "MemorySet()"
        if images.dtype != torch.uint8 or images.dim() != 4 or 0 in images.shape:
            raise ValueError(
                f"{who}: images is {images.dtype} {tuple(images.shape)}; it needs uint8 [N, C, H, W], none of them 0"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"{who}: labels is {labels.dtype} {tuple(labels.shape)}; it needs int64 [{len(images)}]")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise ValueError(
                f"{who}: labels run from {int(labels.min())} to {int(labels.max())}; {len(classes)} classes need 0 to"
                f" {len(classes) - 1}"
            )
        mean, std = mean or (0.5,) * images.shape[1], std or (0.25,) * images.shape[1]
        if not len(mean) == len(std) == images.shape[1] or min(std) <= 0:
            raise ValueError(f"{who}: mean is {mean} and std {std}; images of {images.shape[1]} channels need as many")
        self.images, self.labels = images, labels.to(images.device)
        self.name, self.classes, self.flips = name, tuple(classes), flips
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.mean, self.std, self.device = tuple(mean), tuple(std), images.device

    def to(self, device: torch.device | str) -> MemorySet:
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        moved.device = moved.images.device
        return moved

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers, draws in parts:
            chosen = torch.from_numpy(numbers).to(self.device)
            x = self.images[chosen]
            yield (x if draws is None else _shift_and_flip(x, draws, self.flips)), self.labels[chosen]


def _shift_and_flip(x: Tensor, draws: np.ndarray, flips: bool) -> Tensor:
    """x [n, C, H, W], each moved by up to an eighth of its size and flipped or not, as draws[:, :3] say."""
    n, c, h, w = x.shape
    pad_h, pad_w = h // 8, w // 8
    # On the CPU, in float64: every device then takes the same pixels.
    top = np.floor(draws[:, 0, None].astype(np.float64) * (2 * pad_h + 1)).astype(np.int64)
    left = np.floor(draws[:, 1, None].astype(np.float64) * (2 * pad_w + 1)).astype(np.int64)
    flip = (draws[:, 2, None] < 0.5) & flips
    rows = torch.from_numpy(top + np.arange(h)).to(x.device)
    cols = torch.from_numpy(left + np.where(flip, np.arange(w)[::-1], np.arange(w))).to(x.device)
    padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], cols[:, None, None, :]]


def check_room(size: int, what: str) -> None:
    """Refuse what this machine cannot hold before it tries to."""
    if size > memory_bytes():
        raise ValueError(f"{what} need {size / 1e9:.0f} GB; this machine has {memory_bytes() / 1e9:.0f} GB")
