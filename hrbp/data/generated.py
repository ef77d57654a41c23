"""Generated images of ten classes, that need no download."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from .sets import MemorySet, check_room

_DRAWING = 100  # bytes a pixel while images are drawn
_CHUNK = 500  # images drawn from one random generator: `count` cuts the sequence of images, and changes none
_TEXTURES = ("striped", "checked")


def shapes(split: str, *, count: int | None = None, image_size: int = 16, seed: int = 0) -> MemorySet:
    """Generated images of ten classes: a triangle, square, disc, cross or ring, each striped or checked.

    A class is a shape and a texture, so a network needs both the outline and what fills it. What does not matter is
    drawn anew for every image: place, size, rotation and stretch of the shape; width, angle and phase of its texture;
    all colours; a background of stripes or checks and a gradient; a small second shape without texture behind the first
    one, a bar across both, and noise. A linear classifier gets under a third right. Classes survive a flip.

    Image i of a split is the same for every `count`, and on any number of threads.

    Args:
        split: "train" or "test".
        count: how many images; default: 5000 to train, 2000 to test.
        image_size: height and width; 16 is about the least that shows the textures.
        seed: the images of two splits or seeds have nothing to do with each other.

    Raises:
        ValueError: another split, or a number that is no such number.
    """
    counts = {"train": 5000, "test": 2000}
    if split not in counts:
        raise ValueError(f"shapes(): split is {split!r}; it needs 'train' or 'test'")
    count = counts[split] if count is None else count
    if count < 1 or image_size < 8 or seed < 0:
        raise ValueError(
            f"shapes(): count is {count}, image_size {image_size} and seed {seed}; they need at least 1, 8 and 0"
        )
    room = image_size**2 * (3 * count + _DRAWING * _CHUNK)
    check_room(room, f"shapes(): {count} images of {image_size}x{image_size}")
    drawn = [
        _draw_shapes(np.random.default_rng([seed, list(counts).index(split), chunk]), _CHUNK, image_size)
        for chunk in range(math.ceil(count / _CHUNK))
    ]
    images, labels = (torch.from_numpy(np.concatenate(arrays)[:count]) for arrays in zip(*drawn, strict=True))
    classes = [f"{texture} {shape}" for shape in _OUTLINES for texture in _TEXTURES]
    return MemorySet(images, labels, classes, name="shapes")


def _triangle(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.maximum(q, np.abs(p) * np.float32(0.75**0.5) - q / 2) - np.float32(0.5)


def _square(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(p), np.abs(q)) - np.float32(0.75)


def _disc(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.sqrt(p * p + q * q) - np.float32(0.85)


def _cross(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = np.abs(p), np.abs(q)
    return np.maximum(np.maximum(p, q) - np.float32(0.95), np.minimum(p, q) - np.float32(0.32))


def _ring(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(p * p + q * q) - np.float32(0.68)) - np.float32(0.24)


# How far outside a shape of about unit radius the point (p, q) lies; negative inside.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "triangle": _triangle, "square": _square, "disc": _disc, "cross": _cross, "ring": _ring,
}  # fmt: skip


def _draw_shapes(random: np.random.Generator, n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """n images uint8 [n, 3, size, size] and their labels. numpy's arithmetic: one thread, so that bits never differ."""
    axis = (np.arange(size, dtype=np.float32) * 2 + 1 - size) / size
    x, y = axis[None, None, :], axis[None, :, None]  # the image is [-1, 1] x [-1, 1]

    def uniform(low: float, high: float, *channels: int) -> np.ndarray:
        return np.float32(low) + np.float32(high - low) * random.random((n, *channels, 1, 1), dtype=np.float32)

    def turned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        angle = uniform(0, 2 * math.pi)
        c, s = np.cos(angle), np.sin(angle)
        return c * x + s * y, c * y - s * x

    def tint() -> np.ndarray:
        """A direction in RGB that brightens, mostly."""
        v = random.standard_normal((n, 3, 1, 1), dtype=np.float32) + np.float32(3)
        return v / np.sqrt((v * v).sum(1, keepdims=True))

    def texture(kind: np.ndarray) -> np.ndarray:
        (p, q), frequency = turned(x, y), 2 * math.pi / uniform(0.5, 0.8)
        p, q = (np.sin(t * frequency + uniform(0, 2 * math.pi)) for t in (p, q))
        return np.where(kind[:, None, None] == 0, p, np.clip(2 * p * q, -1, 1))[:, None]

    def cover(outside: np.ndarray) -> np.ndarray:
        """How much of each pixel lies inside, given how far outside its middle lies."""
        return np.clip(np.float32(0.5) - outside * np.float32(size / 2), 0, 1)[:, None]

    def outline(kind: np.ndarray, smallest: float, largest: float, shift: float) -> np.ndarray:
        p, q = turned(x - uniform(-shift, shift), y - uniform(-shift, shift))
        radius, stretch = uniform(smallest, largest), uniform(0.85, 1.15)
        p, q, outside = p / (radius * stretch), q / radius * stretch, np.empty((n, size, size), np.float32)
        for k, of_kind in enumerate(_OUTLINES.values()):
            outside[kind == k] = of_kind(p[kind == k], q[kind == k])
        return cover(outside * radius)

    def sometimes(probability: float) -> np.ndarray:
        return uniform(0, 1, 1) < probability

    def painted(image: np.ndarray, where: np.ndarray, colour: np.ndarray) -> np.ndarray:
        return image + where * (colour - image)

    shape, kind = random.integers(0, len(_OUTLINES), n), random.integers(0, len(_TEXTURES), n)
    ground = uniform(0.25, 0.75, 3)
    image = ground + uniform(0, 0.1, 1) * tint() * texture(random.integers(0, len(_TEXTURES), n))
    image = image + uniform(0, 0.25, 1) * tint() * turned(x, y)[0][:, None]
    second = outline(random.integers(0, len(_OUTLINES), n), 0.2, 0.35, 0.9) * sometimes(0.5)
    image = painted(image, second, uniform(0, 1, 3))
    body = ground + uniform(0.25, 0.5, 1) * tint() + uniform(0.2, 0.4, 1) * tint() * texture(kind)
    image = painted(image, outline(shape, 0.65, 0.95, 0.15), body)
    bar = np.abs(turned(x, y)[0] - uniform(-0.8, 0.8)) - uniform(0.04, 0.12)
    image = painted(image, cover(bar) * sometimes(0.5), uniform(0, 1, 3))
    image = image + uniform(0.02, 0.06, 1) * random.standard_normal(image.shape, dtype=np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), shape * len(_TEXTURES) + kind
