"""Which shapes may a mask take, and what does each keep of a score?

A family of structures is a file here with a `Structure` and a function `named` that makes one of its options (base.py);
registry.py finds it. `Grouping` is the value that HRBP and HRBP++ end in, `regroup` the search for it.
"""

from .base import Choice, Structure
from .grouping import Grouping
from .registry import STRUCTURES, choose, make_mask, structure
from .regrouping import regroup

__all__ = ["STRUCTURES", "Choice", "Grouping", "Structure", "choose", "make_mask", "regroup", "structure"]
