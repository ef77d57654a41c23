"""The images of a name: the generated set, CIFAR, or a folder."""

from __future__ import annotations

import os
from pathlib import Path

from .cifar import CIFAR, cifar_set
from .digits import digits
from .folders import LAYOUT, folder_set
from .generated import shapes
from .sets import ImageSet


def load(
    name: str,
    split: str,
    *,
    root: str | os.PathLike = "data",
    image_size: int | None = None,
    count: int | None = None,
    seed: int = 0,
    workers: int = 4,
) -> ImageSet:
    """One split of a set of labelled images.

    Args:
        name: "shapes" (generated: nothing is downloaded), "digits" (part of scikit-learn, which it needs), "cifar10",
            "cifar100", in any case, or the path of a folder with train/CLASS/*.png and val/CLASS/*.png (or .jpeg, ...;
            test/ where there is no val/).
        split: "train" or "test".
        root: where CIFAR lies: a folder that holds cifar-10-python.tar.gz or the extracted cifar-10-batches-py (for
            CIFAR-100 cifar-100-python.tar.gz or cifar-100-python), or one of these itself.
        image_size: height and width. Default: 16 for shapes, 224 for a folder; CIFAR has 32, digits 8. A folder of
            images of up to 64 pixels is held in memory, a larger one is decoded while training.
        count: how many images of "shapes": by default 5000 to train, 2000 to test.
        seed: of "shapes". The images of two splits or seeds have nothing to do with each other.
        workers: processes that decode a folder's images while training (0: the process that trains).

    Raises:
        ValueError: an unknown name or split, an option that does not fit, or files that are damaged or foreign.
        FileNotFoundError: there is nothing at `root`; the message says what to put there.
        ImportError: a folder of images without Pillow, digits without scikit-learn.
    """
    who = "load()"
    if split not in ("train", "test"):
        raise ValueError(f"{who}: split is {split!r}; it needs 'train' or 'test'")
    name = set_named(name)
    if count is not None and name != "shapes":
        raise ValueError(f"{who}: count is {count}, which only 'shapes' takes; {name} has the images that it has")
    if name == "shapes":
        return shapes(split, count=count, image_size=16 if image_size is None else image_size, seed=seed)
    if name == "digits":
        if image_size not in (None, 8):
            raise ValueError(f"{who}: image_size is {image_size}; digits has images of 8x8")
        return digits(split)
    if name in CIFAR:
        if image_size not in (None, 32):
            raise ValueError(f"{who}: image_size is {image_size}; {name} has images of 32x32")
        return cifar_set(name, split, Path(root))
    if Path(name).is_dir():
        return folder_set(Path(name), split, 224 if image_size is None else image_size, workers)
    is_file = " (a file)" if Path(name).is_file() else ""
    raise ValueError(
        f"{who}: name is {name!r}{is_file}; it needs shapes, digits, {', '.join(CIFAR)}, or the path of a folder"
        f" with {LAYOUT}"
    )


def set_named(name: str) -> str:
    """The name of a set in any case as it is written; that of a folder as it is."""
    return name.lower() if name.lower() in ("shapes", "digits", *CIFAR) and not Path(name).is_dir() else name
