"""What is a sparse layer, and what does it compute?

Stored blocks (blocksparse.BSRConv2d, BSRLinear), a dense weight under a mask, or a dense master weight of which a part
takes part. Another kind of layer is a file here and a case of `SparseLayer` in view.py, which the rest goes by.
record.py is what a whole model remembers of how it was made sparse.
"""

from .fused import FusedConv2d, FusedModel
from .master import MasterConv2d, MasterLinear
from .record import Sparsity, plan_of
from .view import SparseLayer, sparse_layers

__all__ = [
    "FusedConv2d",
    "FusedModel",
    "MasterConv2d",
    "MasterLinear",
    "SparseLayer",
    "Sparsity",
    "plan_of",
    "sparse_layers",
]
