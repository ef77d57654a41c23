"""Block-sparse convolution with gradients: BSR weights, no im2col, forward, dgrad and wgrad on the stored blocks only.

import torch, blocksparse as bs

conv = torch.nn.Conv2d(256, 256, 3, padding=1)
pattern = bs.BSRPattern.random((256, 256, 3, 3), blocksize=(32, 32), density=0.1)
sparse = bs.BSRConv2d.from_dense(conv, pattern)   # a tenth of the weights, gradients and optimizer state
y = sparse(torch.randn(8, 256, 14, 14))
"""

from . import reference
from .bsr_module import BSRModule
from .carry import OptimizerTensor, optimizer_tensors
from .conv1d import BSRConv1d
from .functional import conv1d, conv2d, conv2d_dgrad, conv2d_wgrad, linear
from .geometry import ConvGeometry, bank_shape
from .indexed import IndexedModule
from .layout import memory_format_of, to_batch_last
from .memory import keep_freed_memory
from .modules import BSRConv2d, BSRLinear, image_conv, symmetric_padding
from .norm import batch_norm
from .pattern import BSRPattern
from .plan import ConvPlan, available_backends, explain
from .version import __version__

__all__ = [
    "BSRConv1d",
    "BSRConv2d",
    "BSRLinear",
    "BSRModule",
    "BSRPattern",
    "ConvGeometry",
    "ConvPlan",
    "IndexedModule",
    "OptimizerTensor",
    "__version__",
    "available_backends",
    "bank_shape",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "explain",
    "image_conv",
    "keep_freed_memory",
    "linear",
    "memory_format_of",
    "optimizer_tensors",
    "reference",
    "symmetric_padding",
    "to_batch_last",
]
