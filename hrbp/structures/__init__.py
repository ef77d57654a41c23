"""Which weights may be kept or dropped together, and which ones are best?

A family of structures is a file here with a `Structure` and a function `named` that makes one of its options (base.py);
registry.py finds it. `Grouping` is a result of HRBP and HRBP++; `regroup` searches for it.
"""

from .base import Selection, Structure
from .grouping import Grouping
from .registry import STRUCTURES, choose, make_mask, structure
from .regrouping import regroup

__all__ = ["STRUCTURES", "Grouping", "Selection", "Structure", "choose", "make_mask", "regroup", "structure"]
