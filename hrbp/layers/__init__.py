"""The sparse layers.

A layer holds stored blocks (blocksparse.BSRConv2d, BSRLinear), or a dense master weight and computes with a part of it
(master.py). All other code uses the view `SparseLayer` (view.py): another kind of layer is a file here and a subclass
there. record.py holds what a model remembers of how it was made sparse.
"""

from .fused import FusedConv2d, FusedModel
from .master import MasterConv2d, MasterLinear
from .record import SparsityRecord, record_of
from .view import SparseLayer, sparse_layers

__all__ = [
    "FusedConv2d",
    "FusedModel",
    "MasterConv2d",
    "MasterLinear",
    "SparseLayer",
    "SparsityRecord",
    "record_of",
    "sparse_layers",
]
