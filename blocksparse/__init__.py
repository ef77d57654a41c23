"""Block-sparse convolution with gradients: BSR weights, no im2col, forward, dgrad and wgrad on the stored blocks only.

import torch, blocksparse as bs

conv = torch.nn.Conv2d(256, 256, 3, padding=1)
pattern = bs.BSRPattern.random((256, 256, 3, 3), blocksize=(32, 32), density=0.1)
sparse = bs.BSRConv2d.from_dense(conv, pattern)   # a tenth of the weights, gradients and optimizer state
y = sparse(torch.randn(8, 256, 14, 14))
"""

from . import reference
from .carry import OptimizerTensor, optimizer_tensors
from .functional import conv2d, conv2d_dgrad, conv2d_wgrad, linear
from .geometry import ConvGeometry
from .indexed import IndexedModule
from .modules import BSRConv2d, BSRLinear, symmetric_padding
from .pattern import BSRPattern
from .plan import ConvPlan, available_backends, explain
from .version import __version__

__all__ = [
    "BSRConv2d",
    "BSRLinear",
    "BSRPattern",
    "ConvGeometry",
    "ConvPlan",
    "IndexedModule",
    "OptimizerTensor",
    "__version__",
    "available_backends",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "explain",
    "linear",
    "optimizer_tensors",
    "reference",
    "symmetric_padding",
]
