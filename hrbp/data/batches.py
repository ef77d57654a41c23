"""Which images are in which batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from .sets import ImageSet, Part


class Batches:
    """The batches of every epoch, as a function of (images, batch_size, seed, epoch) and of nothing else.

    To train: a new order every epoch, augmented, `batch_size` images each; the images that fill no whole batch wait for
    another epoch's order. To test: the set's own order, as it is, every image once. The global batches do not depend on
    how many ranks there are: each rank takes its share of every one, in rank order. Any batch of any epoch can be the
    first, and no global random state is read or written.

    Args:
        images: what to read; kept on `device` where it is held in memory.
        batch_size: of all ranks together.
        train: to train, or to test.
        seed: of order and augmentation.
        rank, world: this process, of how many.
        device: where x and y are wanted.

    Raises:
        ValueError: numbers that give no batch, or a batch that cannot be shared out evenly.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        who = "Batches()"
        if not 0 <= rank < world:
            raise ValueError(f"{who}: rank is {rank} of {world}; it needs 0 <= rank < world")
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"{who}: batch_size is {batch_size} for {world} ranks together; it needs a positive multiple of {world}"
            )
        if train and batch_size > len(images):
            raise ValueError(
                f"{who}: batch_size is {batch_size} and there are {len(images)} images; it needs to be smaller"
            )
        if seed < 0:
            raise ValueError(f"{who}: seed is {seed}; it needs an int of at least 0")
        self.images = images.to(device)
        self.batch_size, self.train, self.seed, self.rank, self.world = batch_size, train, seed, rank, world
        self.mean, self.std = (
            torch.tensor(t, dtype=torch.float32, device=device)[:, None, None] * 255 for t in (images.mean, images.std)
        )

    def __len__(self) -> int:
        """Batches of an epoch; the last one to test with may leave nothing to some ranks."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and not self.train)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """From batch `start` of an epoch on: x float32 [n, C, H, W], normalised, and y int64 [n]; this rank's share."""
        if epoch < 0 or not 0 <= start <= len(self):
            raise ValueError(f"Batches.epoch(): batch {start} of epoch {epoch}; an epoch has {len(self)} batches")
        return self._read(list(self._parts(epoch, start)))

    def _parts(self, epoch: int, start: int) -> Iterable[Part]:
        order, draws = np.arange(len(self.images)), None
        if self.train:
            random = np.random.default_rng([self.seed, epoch])
            order, draws = random.permutation(order), random.random((len(order), 5), dtype=np.float32)
        for batch in range(start, len(self)):
            first = batch * self.batch_size
            size = min(self.batch_size, len(order) - first)
            share = slice(first + size * self.rank // self.world, first + size * (self.rank + 1) // self.world)
            if share.start < share.stop:
                yield order[share], None if draws is None else draws[share]

    def _read(self, parts: list[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.images.read(parts):
            yield (x.float() - self.mean) / self.std, y
