"""conv2d, conv1d, linear and the two gradients: what users call, on a BSRPattern."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .geometry import conv_pairs, line_pairs
from .layout import memory_format_of
from .ops import DGRAD, WGRAD, convolve
from .pattern import BSRPattern, check_is_pattern
from .pattern_checks import check_strided

IntPair = int | Sequence[int]


def conv2d(
    x: Tensor,
    values: Tensor,
    pattern: BSRPattern,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """2-d convolution whose filter bank is stored as blocks.

    y[n,k,p,q] = bias[k] + sum over stored (k,c,r,s) of x[n, c, p*stride + r*dilation - padding, ...] * w[k,c,r,s]

    and with a residual or relu what follows it in a network, without another pass through memory where the backend can
    (cpu, outside autograd): y = max(y + residual, 0).

    Args:
        x: [N, C, H, W], contiguous, channels_last (the fast one on a GPU, unless bc < 8) or batch_last (see
            to_batch_last); float16, bfloat16, float32 or float64. Or one image [C, H, W]: y is [K, P, Q] then.
        values: [nnzb, bk, bc], the stored blocks; dtype and device of x.
        pattern: which blocks they are. One of `grouped(groups)` makes this a convolution in groups, with groups times
            pattern.shape[1] channels of x.
        bias: [K] or None.
        stride, padding, dilation: int or (height, width). The padding may be "valid", or "same" where that is the same
            on both sides.
        residual: [N, K, P, Q], added to y; dtype and device of x.
        relu: whether negative results become zero.
        backend: "torch" (the stored blocks scattered into a filter bank for PyTorch's own convolution), "cpu" (native
            code), "triton", "cupy", or None for the fastest that can run, by estimate and for each product alone:
            `explain` tells. A backend asked for by name runs or raises; nothing else takes its place.

    Returns:
        y [N, K, P, Q] in the memory format of x. Differentiable once in x, values, bias and residual; the gradient of
        values is [nnzb, bk, bc]: gradients exist at stored blocks only. Under autocast the tensors are cast.

    Raises:
        ValueError: shapes, dtypes, devices or a block size that do not fit, before any memory is touched.
        RuntimeError: the backend asked for is absent, with the reason.

    Equivalent to: F.conv2d(x, pattern.to_dense(values), bias, stride, padding, dilation, pattern.groups)
    """
    check_is_pattern(pattern, "conv2d()")
    pattern.check_values(values, "conv2d()")
    return convolve(
        x, values, pattern.index, bias, pattern.bank,
        *conv_pairs(stride, padding, dilation, "conv2d()", pattern.shape), backend, residual, relu,
    )  # fmt: skip


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    pattern: BSRPattern,
    x_shape: Sequence[int],
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """The input gradient of conv2d: dx[n,c,h,w] = sum over stored (k,c,r,s) of dy[n,k,p,q] * w[k,c,r,s].

    (p, q) runs over the output pixels that read (h, w) through tap (r, s). Arguments as in conv2d; dy is
    [N, K, P, Q], x_shape is (N, C, H, W). Returns dx in the memory format of dy. Not differentiable itself.

    Equivalent to: torch.nn.grad.conv2d_input(x_shape, pattern.to_dense(values), dy, stride, padding, dilation)
    """
    check_is_pattern(pattern, "conv2d_dgrad()")
    check_strided(dy, "dy", "conv2d_dgrad()")
    pattern.check_values(values, "conv2d_dgrad()")
    return DGRAD(
        dy, values, pattern.index, tuple(x_shape), pattern.bank,
        *conv_pairs(stride, padding, dilation, "conv2d_dgrad()"), memory_format_of(dy), backend,
    )  # fmt: skip


def conv2d_wgrad(
    x: Tensor,
    dy: Tensor,
    pattern: BSRPattern,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """The weight gradient of conv2d at the stored blocks: dv = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w].

    Arguments as in conv2d; dy is [N, K, P, Q]. Returns [nnzb, bk, bc] in the dtype of x. Not differentiable itself.

    Equivalent to: pattern.values_from_dense(
        torch.nn.grad.conv2d_weight(x, pattern.shape, dy, stride, padding, dilation))
    """
    check_is_pattern(pattern, "conv2d_wgrad()")
    check_strided(x, "x", "conv2d_wgrad()")
    check_strided(dy, "dy", "conv2d_wgrad()")
    return WGRAD(
        x, dy, pattern.index, (pattern.nnzb, *pattern.blocksize), pattern.bank,
        *conv_pairs(stride, padding, dilation, "conv2d_wgrad()"), backend,
    )  # fmt: skip


def linear(
    x: Tensor, values: Tensor, pattern: BSRPattern, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """y = x @ W^T + bias with W [K, C] stored as blocks: the 1x1 convolution of a batch of vectors.

    Args:
        x: [..., C].
        values: [nnzb, bk, bc].
        pattern: its shape is (K, C, 1, 1).
        bias: [K] or None.
        backend: as in conv2d.

    Returns:
        y [..., K], contiguous; with the vectors innermost where x [N, C] has them so (x.t() is contiguous) and N > 1,
        C > 1. Differentiable once in x, values and bias.

    Equivalent to: F.linear(x, pattern.to_dense(values)[:, :, 0, 0], bias)
    """
    check_is_pattern(pattern, "linear()")
    pattern.check_values(values, "linear()")
    return apply_linear(x, values, pattern.index, bias, pattern.bank, backend)


def apply_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    weight_shape: tuple[int, ...],
    backend: str | None,
) -> Tensor:
    """linear on a packed index: every vector is an image of one pixel, channels_last, or batch_last as its matrix."""
    check_strided(x, "x", "linear()")
    k, c, *kernel = weight_shape
    if kernel != [1, 1]:
        in_groups = f" and {kernel[2]} groups" if len(kernel) > 2 else ""
        raise ValueError(f"linear(): the pattern has shape {tuple(weight_shape[:4])}{in_groups}; it needs (K, C, 1, 1)")
    if x.dim() == 0 or x.shape[-1] != c:
        raise ValueError(f"linear(): x has shape {tuple(x.shape)}; it needs [..., C] with C = {c}")
    if x.dim() != 2:  # strides of several axes that merge into one matrix are no choice of its memory
        x = x.contiguous()
    pixels = x.reshape(-1, 1, 1, c).permute(0, 3, 1, 2)
    y = convolve(pixels, values, index, bias, weight_shape, (1, 1), (0, 0), (1, 1), backend)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], k)


def conv1d(
    x: Tensor,
    values: Tensor,
    pattern: BSRPattern,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolution along a line whose weight [K, C, S] is stored as blocks: conv2d on images of height 1, views of x.

    Args:
        x: [N, C, L], or one line [C, L].
        values: [nnzb, bk, bc].
        pattern: its shape is (K, C, 1, S).
        bias: [K] or None.
        stride, padding, dilation: int. The padding may be "valid", or "same" where that is the same on both sides.
        residual, relu, backend: as in conv2d; the residual is [N, K, Q].

    Returns:
        y [N, K, Q] or [K, Q], its channels side by side in memory where those of x are. Differentiable once in x,
        values, bias and residual.

    Equivalent to: F.conv1d(x, pattern.to_dense(values)[:, :, 0], bias, stride, padding, dilation)
    """
    check_is_pattern(pattern, "conv1d()")
    pattern.check_values(values, "conv1d()")
    return apply_conv1d(
        x, values, pattern.index, bias, pattern.bank,
        *line_pairs(stride, padding, dilation, "conv1d()", pattern.shape), backend, residual, relu,
    )  # fmt: skip


def apply_conv1d(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    weight_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    backend: str | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """conv1d on a packed index; stride, padding and dilation are those of images of height 1."""
    check_strided(x, "x", "conv1d()")
    k, c, r, _, groups = (*weight_shape, 1)[:5]
    if r != 1:
        raise ValueError(f"conv1d(): the pattern has shape {tuple(weight_shape[:4])}; it needs (K, C, 1, S)")
    if x.dim() not in (2, 3) or x.shape[-2] != c * groups:
        needed = f"[N, C, L] or [C, L] with C = {c * groups}"
        raise ValueError(f"conv1d(): x has shape {tuple(x.shape)}; it needs {needed}")
    if residual is not None:
        check_strided(residual, "residual", "conv1d()")
        if residual.shape[:-1] != (*x.shape[:-2], k):
            needed = "[N, K, Q]" if x.dim() == 3 else "[K, Q]"
            raise ValueError(f"conv1d(): residual has shape {tuple(residual.shape)}; it needs {needed}, that of y")
        residual = residual.unsqueeze(-2)
    y = convolve(x.unsqueeze(-2), values, index, bias, weight_shape, stride, padding, dilation, backend, residual, relu)
    return y.squeeze(-2)
