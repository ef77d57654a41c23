"""The sparse layers.

A layer holds stored blocks (blocksparse.BSRConv2d, BSRConv1d, BSRLinear), or a dense master weight and computes with a
part of it (master.py). All other code uses the view `SparseLayer` (view.py): another way to hold weights is a file here
and a subclass there, another kind of layer a line in stored.py and a class in master.py. record.py holds what a model
remembers of how it was made sparse.
"""

from .fused import FusedConv1d, FusedConv2d, FusedModel
from .master import MasterConv1d, MasterConv2d, MasterLinear
from .record import SparsityRecord, record_of
from .view import SparseLayer, sparse_layers

__all__ = [
    "FusedConv1d",
    "FusedConv2d",
    "FusedModel",
    "MasterConv1d",
    "MasterConv2d",
    "MasterLinear",
    "SparseLayer",
    "SparsityRecord",
    "record_of",
    "sparse_layers",
]
