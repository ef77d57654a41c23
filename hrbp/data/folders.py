"""Folders of image files, decoded at once or while they are used."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .sets import ImageSet, MemorySet, Part, check_room

SMALL_IMAGE = 64  # folders of images up to this size are held in memory
EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LAYOUT = "train/CLASS/*.png to train, and val/CLASS/*.png or test/CLASS/*.png with the same classes to test"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FolderSet(ImageSet):
    """Image files, decoded while they are used.

    Augmented by cropping 8% to 100% of the area at an aspect of 3/4 to 4/3 (cut to the image where it does not fit),
    and by flipping left and right; otherwise the central 7/8 of the shorter side: 224 of 256.

    Args:
        files: one path an image.
        labels: int64 [N], in range(len(classes)).
        classes: their names.
        image_size: height and width to which every image is resized.
        name: of the set, for reports.
        workers: processes that decode.
    """

    def __init__(
        self, files: Sequence[str], labels: Tensor, classes: Sequence[str], image_size: int, *, name: str, workers: int
    ) -> None:
        self.files, self.labels, self.classes, self.name = tuple(files), labels, tuple(classes), name
        self.shape, self.mean, self.std = (3, image_size, image_size), IMAGENET_MEAN, IMAGENET_STD
        self.workers, self.device = workers, torch.device("cpu")

    def to(self, device: torch.device | str) -> FolderSet:
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[Tensor, Tensor]]:
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            _Decoder(self.files, self.shape[1]), sampler=parts, batch_size=None, num_workers=self.workers,
            pin_memory=on_gpu, generator=torch.Generator(),  # its own: the global one stays as it is
        )  # fmt: skip
        for x, numbers in loader:
            if isinstance(x, str):
                raise ValueError(x)
            yield x.to(self.device, non_blocking=on_gpu), self.labels[numbers].to(self.device)


class _Decoder(Dataset):
    """What a decoding process holds."""

    def __init__(self, files: Sequence[str], size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, part: Part) -> tuple[Tensor | str, Tensor]:
        """Images and their numbers; in place of images what is wrong with one: an error would come with a traceback."""
        numbers, draws = part
        every = [None] * len(numbers) if draws is None else draws
        try:
            images = [_decode(self.files[i], self.size, d) for i, d in zip(numbers.tolist(), every, strict=True)]
        except ValueError as error:
            return str(error), torch.from_numpy(numbers)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(numbers)


def _decode(file: str, size: int, draws: np.ndarray | None, central: float = 7 / 8) -> np.ndarray:
    """One image file as uint8 [3, size, size]: a random crop as `draws` say, or the `central` part."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:
        raise ValueError(f"{file} cannot be decoded: {error}; remove or replace it") from error
    width, height = image.size
    if draws is None:
        w = h = central * min(width, height)
        left, top = (width - w) / 2, (height - h) / 2
    else:
        area = width * height * (0.08 + 0.92 * float(draws[0]))
        aspect = math.exp((2 * float(draws[1]) - 1) * math.log(4 / 3))
        w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
        left, top = float(draws[2]) * (width - w), float(draws[3]) * (height - h)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    pixels = np.asarray(image).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if draws is not None and draws[4] < 0.5 else pixels


def folder_set(root: Path, split: str, image_size: int, workers: int) -> ImageSet:
    """A split of a folder of images: root/train/CLASS/*, and root/val/CLASS/* or root/test/CLASS/*."""
    who = "load()"
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ImportError(f"{who}: {root} is a folder of images, which Pillow decodes; pip install pillow") from None
    if image_size < 1 or workers < 0:
        raise ValueError(f"{who}: image_size is {image_size} and workers {workers}; they need at least 1 and 0")
    place = root / "train"
    classes = _folders(root, place, "train")
    if split == "test":
        place = root / "val" if (root / "val").is_dir() else root / "test"
        tested = set(_folders(root, place, "val or test"))
        if tested != set(classes):
            differ = sorted(tested ^ set(classes))
            raise ValueError(f"{who}: {place} and {root / 'train'} need the same folders; {differ[:5]} are in one only")
    files, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(_images(place / name))
        if not images:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise ValueError(f"{who}: {place / name} has no images ({kinds}); it has {_contents(place / name)}")
        files += images
        labels += [label] * len(images)
    if image_size > SMALL_IMAGE:
        return FolderSet(files, torch.tensor(labels), classes, image_size, name=root.name, workers=workers)
    check_room(3 * image_size**2 * len(files), f"{who}: {len(files)} images of {image_size}x{image_size}")
    decoded = torch.from_numpy(np.stack([_decode(file, image_size, None, central=1) for file in files]))
    return MemorySet(decoded, torch.tensor(labels), classes, name=root.name, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _folders(root: Path, place: Path, name: str) -> list[str]:
    """The names of the folders in a place, one a class; refused where there are none, with what there is instead."""
    found = sorted(p.name for p in place.iterdir() if p.is_dir()) if place.is_dir() else []
    if not found:
        at, lacks = (place, "folder for each class") if place.is_dir() else (root, f"folder {name}")
        raise ValueError(f"load(): {at} has no {lacks}; it has {_contents(at)}; {root} needs {LAYOUT}")
    return found


def _images(folder: Path) -> list[str]:
    """The images in a folder; what has their names and is no file is refused: a pipe would be waited for."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if Path(entry.name).suffix.lower() in EXTENSIONS:
                if not entry.is_file():
                    raise ValueError(
                        f"load(): {entry.path} has the name of an image and is no file; remove or replace it"
                    )
                found.append(entry.path)
    return found


def _contents(folder: Path) -> str:
    """What lies in a folder, in a few words."""
    kinds: dict[str, list[str]] = {"folder": [], "image": [], "other file": []}
    for path in folder.iterdir():
        kind = "folder" if path.is_dir() else "image" if path.suffix.lower() in EXTENSIONS else "other file"
        kinds[kind].append(path.name)
    said = []
    for kind, names in kinds.items():
        few = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        if names:
            said.append(f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({few})")
    return ", ".join(said) or "nothing"
