"""Memory formats: contiguous, channels_last and batch_last; which one a 4-d tensor is in is told by its strides alone.

    format           order in memory, slowest first    strides of [N, C, H, W]
    contiguous       N, C, H, W                        (C*H*W, H*W, W, 1)
    channels_last    N, H, W, C                        (C*H*W, 1, W*C, C)
    batch_last       C, H, W, N                        (1, H*W*N, W*N, N)

Sizes of one fit several. So, in this order:

1. What PyTorch calls contiguous or channels_last (torch._prims_common.suggest_memory_format) is that, except that
2. a tensor that is neither dense nor like channels_last, which PyTorch calls contiguous for want of another name, is
   batch_last where it has more than one image, another axis longer than one, and steps that grow in the order N, W, H,
   C, each beyond what lies inside it; sizes of one have no say. Slices stay batch_last.

One image, or one number an image, are the same memory in batch_last as contiguous, and called contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

CONTIGUOUS, CHANNELS_LAST, BATCH_LAST = FORMATS = "contiguous", "channels_last", "batch_last"


def memory_format_of(t: Tensor) -> str:
    """The memory format of a 4-d tensor: "contiguous", "channels_last" or "batch_last"; see above for sizes of one."""
    if not torch._C._has_storage(t):  # batched by vmap: of its memory it tells the strides alone
        dense = _grows(t.shape, t.stride(), (3, 2, 1, 0), dense=True) if t.dim() == 4 else True
    else:
        dense, last = t.is_contiguous(), t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
        if dense != last:  # without the cost of asking PyTorch
            return CONTIGUOUS if dense else CHANNELS_LAST
    if suggest_memory_format(t) == torch.channels_last:
        return CHANNELS_LAST
    if dense or t.dim() != 4 or t.shape[0] == 1 or t.numel() == t.shape[0]:
        return CONTIGUOUS
    return BATCH_LAST if _grows(t.shape, t.stride(), (0, 3, 2, 1)) else CONTIGUOUS


def _grows(shape: Sequence[int], strides: Sequence[int], order: Sequence[int], dense: bool = False) -> bool:
    """Whether steps grow in this order of axes, fastest first, each beyond (dense: by one) what lies inside it."""
    inside = 1
    for axis in order:
        if shape[axis] == 1:
            continue
        if strides[axis] < inside or (dense and strides[axis] != inside):
            return False
        inside += strides[axis] * (shape[axis] - 1)
    return True


def _steps(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of batch_last. Made with these a tensor is no view, which a custom Function must not return."""
    n, _, h, w = (size if size != 0 else 1 for size in shape)
    return 1, h * w * n, w * n, n


def laid_out(t: Tensor, memory_format: str) -> Tensor:
    """t [N, C, H, W] dense in this format: itself where it is so already, else a copy."""
    if memory_format == BATCH_LAST:
        if t.permute(1, 2, 3, 0).is_contiguous():
            return t
        return t.new_empty_strided(t.shape, _steps(t.shape)).copy_(t)
    return t.contiguous(memory_format=format_of(memory_format == CHANNELS_LAST))


def is_innermost(x: Tensor) -> bool:
    """Whether x [N, C, H, W] is dense in batch_last, and not contiguous too."""
    return x.dim() == 4 and not x.is_contiguous() and x.permute(1, 2, 3, 0).is_contiguous()


def one_image(x: Tensor) -> Tensor:
    """x [N, C, H, W], dense in batch_last, as one contiguous image [1, C, H, W*N]: a view."""
    n, c, h, w = x.shape
    return x.permute(1, 2, 3, 0).reshape(1, c, h, w * n)


def images_of(y: Tensor, n: int) -> Tensor:
    """The n images of one_image: [n, C, H, W] in batch_last, a view."""
    _, c, h, w = y.shape
    return y.reshape(c, h, w // n, n).permute(3, 0, 1, 2)


def batch_last_of(t: Tensor, shape: Sequence[int]) -> Tensor:
    """The memory of t, contiguous and used by nothing else, as a tensor of this shape in batch_last; it is no view."""
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), tuple(shape), _steps(shape))


def channels_of(t: Tensor, memory_format: str) -> tuple[int, int, int]:
    """[rows, channels, inner] in memory, of a dense [N, C, H, W] in this format, or of [N, C]; not an empty one."""
    n, c = t.shape[:2]
    inner = t.numel() // (n * c)
    if memory_format == BATCH_LAST:
        return 1, c, inner * n
    return (n * inner, c, 1) if memory_format == CHANNELS_LAST or inner == 1 else (n, c, inner)


def to_batch_last(x: Tensor) -> Tensor:
    """The same [N, C, H, W] with the images innermost in memory: strides (1, H*W*N, W*N, N). Differentiable.

    conv2d and the modules return batch_last results for it, and operators that work on each element keep it. It is x
    itself where x is so already.

    Raises:
        ValueError: x is not a strided tensor of four dimensions.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or x.layout != torch.strided:
        what = f"a {x.layout} tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"to_batch_last(): x is {what}; it needs a strided tensor [N, C, H, W]")
    return laid_out(x, BATCH_LAST)


def format_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def new(shape: Sequence[int], like: Tensor, memory_format: str, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of `like`, and of its dtype if none is given."""
    dtype = dtype or like.dtype
    if memory_format == BATCH_LAST:
        return torch.empty_strided(tuple(shape), _steps(shape), dtype=dtype, device=like.device)
    return torch.empty(
        tuple(shape), dtype=dtype, device=like.device, memory_format=format_of(memory_format == CHANNELS_LAST)
    )


def empty(shape: tuple[int, ...], like: Tensor, channels_last: bool) -> Tensor:
    """The same for a kernel that knows two formats."""
    return new(shape, like, CHANNELS_LAST if channels_last else CONTIGUOUS)


def is_channels_last(t: Tensor) -> bool:
    return memory_format_of(t) == CHANNELS_LAST
