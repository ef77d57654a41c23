"""Where do images come from, and which of them are in which batch?

A source of images is a file here that makes an `ImageSet` (sets.py), and a name that loading.py knows it by.
"""

from .batches import Batches
from .folders import LAYOUT, FolderSet
from .generated import shapes
from .loading import load, set_named
from .sets import ImageSet, MemorySet

__all__ = ["LAYOUT", "Batches", "FolderSet", "ImageSet", "MemorySet", "load", "set_named", "shapes"]
