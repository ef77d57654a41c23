"""scikit-learn's handwritten digits: 1797 images of 8x8, part of its package, so that nothing is downloaded."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from .sets import MemorySet

TEST_EVERY = 5  # every fifth image of a class is one to test with


def has_digits() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def digits(split: str) -> MemorySet:
    """The digits of scikit-learn (the test set of UCI's Optical Recognition of Handwritten Digits), grey, 8x8.

    Every fifth image of each class is one to test with: 355 of 1797. Augmented by moving by up to a pixel, and not by
    flipping: a mirrored 2 is no 2.

    Args:
        split: "train" or "test".

    Raises:
        ValueError: another split.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"digits(): split is {split!r}; it needs 'train' or 'test'")
    if not has_digits():
        raise ImportError("digits(): needs scikit-learn, which is not installed: pip install scikit-learn")
    from sklearn.datasets import load_digits

    found = load_digits()
    labels = np.asarray(found.target, dtype=np.int64)
    number = np.zeros(len(labels), dtype=np.int64)  # of an image among those of its class
    for label in range(10):
        number[labels == label] = np.arange((labels == label).sum())
    chosen = (number % TEST_EVERY == TEST_EVERY - 1) == (split == "test")
    images = np.rint(found.images[chosen] * (255 / 16)).astype(np.uint8)[:, None]
    return MemorySet(
        torch.from_numpy(images), torch.from_numpy(labels[chosen]), [str(n) for n in range(10)], name="digits",
        mean=(0.3,), std=(0.38,), flips=False,
    )  # fmt: skip
