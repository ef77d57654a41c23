"""2:4 layers on sparse tensor cores, for inference, as far as torch.sparse.to_sparse_semi_structured reaches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from blocksparse import BSRConv1d, BSRConv2d

from .twin import twin

DTYPES = (torch.float16, torch.bfloat16)


class SemiConv2d(nn.Conv2d):
    """A 1x1 convolution whose weight is a semi-structured matrix [K, C]: a matrix product over pixels."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.stride
        pixels = input[:, :, ::rows, ::columns].permute(0, 2, 3, 1).contiguous()  # no copy in channels_last
        return nn.functional.linear(pixels, self.weight, self.bias).permute(0, 3, 1, 2)


def refuses(layer: nn.Module, weight: Tensor) -> str | None:
    """Why a plain or stored layer cannot run on sparse tensor cores with this weight [K, C, R, S], or None.

    The device is checked last: on a CPU this says what a GPU would refuse.
    """
    k, c, r, s = weight.shape
    if reason := refuses_product(layer, (r, s)):
        return reason
    if isinstance(layer, BSRConv2d) and layer.relu:
        return "its negative results become zero, which no plain layer does"
    if c % 4 or bool(((weight != 0).view(k, c // 4, 4).sum(2) > 2).any()):
        return "not 2:4"
    if weight.dtype not in DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')}: model.half() or model.bfloat16() first"
    rows, columns = multiples(weight.dtype)
    if k % rows or c % columns:
        return f"{k}x{c} is no multiple of {rows}x{columns}"
    return device_refuses(weight.device)


def refuses_product(layer: nn.Module, taps: tuple[int, int]) -> str | None:
    """Why a layer with so many taps is no matrix product [pixels, C] x [C, K], or None."""
    if isinstance(layer, nn.Conv1d | BSRConv1d):
        return "a Conv1d: linear layers and 1x1 convolutions alone"
    if taps != (1, 1):
        return f"a {taps[0]}x{taps[1]} kernel: matrix products alone, linear layers and 1x1 convolutions"
    if getattr(layer, "groups", 1) != 1:
        return "grouped"
    if isinstance(layer, nn.Conv2d | BSRConv2d) and (layer.padding not in ((0, 0), "valid", "same")):
        return f"padding {layer.padding}"
    return None


def multiples(dtype: torch.dtype) -> tuple[int, int]:
    """Least multiples of rows and columns for the library that PyTorch compresses with."""
    cutlass = SparseSemiStructuredTensor._FORCE_CUTLASS
    kinds = torch.sparse.SparseSemiStructuredTensorCUTLASS, torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    sizes = kinds[0 if cutlass else 1]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return sizes.sparse_min_rows, sizes.sparse_min_cols


def device_refuses(device: torch.device) -> str | None:
    """Why a device has no sparse tensor cores that PyTorch uses, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"on {'an AMD GPU' if device.type == 'cuda' else device.type}: NVIDIA GPUs alone"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor}, below 8.0"
    if not SparseSemiStructuredTensor._FORCE_CUTLASS and not torch.backends.cusparselt.is_available():
        return "this PyTorch has no cuSPARSELt"
    return None


def converted(layer: nn.Conv2d | nn.Linear) -> Any:
    """A plain layer that is not refused as one that runs on sparse tensor cores."""
    made: Any = twin(layer, SemiConv2d if isinstance(layer, nn.Conv2d) else nn.Linear)
    weight = to_sparse_semi_structured(layer.weight.detach().flatten(1))
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def is_converted(layer: Any) -> bool:
    """Whether `converted` made it."""
    return isinstance(layer, nn.Module) and isinstance(layer._parameters.get("weight"), SparseSemiStructuredTensor)


def plain_layer(layer: Any) -> Any:
    """A plain layer that computes what a converted one does."""
    weight = layer.weight.detach().to_dense()
    convolves = isinstance(layer, nn.Conv2d)
    plain: Any = twin(layer, nn.Conv2d if convolves else nn.Linear)
    plain.weight = nn.Parameter(weight[:, :, None, None] if convolves else weight)
    return plain


def stored_bytes(weight: Any) -> int:
    """Bytes of a semi-structured matrix: half of the values, and their positions."""
    names, _ = weight.__tensor_flatten__()
    return sum(t.numel() * t.element_size() for t in (getattr(weight, name) for name in names) if isinstance(t, Tensor))
