"""Memory formats: which one a 4-d tensor is in, by PyTorch's rule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def memory_format(t: Tensor) -> torch.memory_format:
    """torch._prims_common.suggest_memory_format(t), without its cost where only one format fits."""
    if not torch._C._has_storage(t):  # batched by vmap: of its memory it tells the strides alone
        return suggest_memory_format(t)
    contiguous, channels_last = t.is_contiguous(), t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    if contiguous != channels_last:
        return torch.contiguous_format if contiguous else torch.channels_last
    return suggest_memory_format(t)


def is_channels_last(t: Tensor) -> bool:
    return memory_format(t) == torch.channels_last


def format_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty(shape: tuple[int, ...], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of `like`, and of its dtype if none is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=format_of(channels_last))
