"""conv2d, linear and the two gradients as torch ops: checked, differentiable once, opaque to torch.compile.

The ops live in torch.ops.bsrconv. Their schema is plain: x, values, the packed index tensor and integers. They never
read a tensor on the host, so a step captures into a CUDA graph; the torch backend alone reads the index when it has
changed since the last call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .geometry import ConvGeometry, conv_pairs
from .index import unpack_once
from .layout import format_of, is_channels_last, memory_format
from .pattern import BSRPattern
from .plan import DTYPES, ConvPlan, plan_conv, product_precision

IntPair = int | Sequence[int]


def conv2d(
    x: Tensor,
    values: Tensor,
    pattern: BSRPattern,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """2-d convolution whose filter bank is stored as blocks.

    y[n,k,p,q] = bias[k] + sum over stored (k,c,r,s) of x[n, c, p*stride + r*dilation - padding, ...] * w[k,c,r,s]

    Args:
        x: [N, C, H, W], contiguous or channels_last (the fast one on a GPU, unless bc < 8); float16, bfloat16, float32
            or float64.
        values: [nnzb, bk, bc], the stored blocks; dtype and device of x.
        pattern: which blocks they are.
        bias: [K] or None.
        stride, padding, dilation: int or (height, width).
        backend: "torch", "triton", "cupy", "dense" (the stored blocks scattered into a filter bank for PyTorch's own
            convolution), or None for the fastest that can run, by estimate: `explain` tells. A backend asked for by
            name runs or raises; nothing else takes its place.

    Returns:
        y [N, K, P, Q] in the memory format of x. Differentiable once in x, values and bias; the gradient of values is
        [nnzb, bk, bc]: gradients exist at stored blocks only. Under autocast x, values and bias are cast.

    Raises:
        ValueError: shapes, dtypes, devices or a block size that do not fit, before any memory is touched.
        RuntimeError: the backend asked for is absent, with the reason.

    Equivalent to: F.conv2d(x, pattern.to_dense(values), bias, stride, padding, dilation)
    """
    pattern.check_values(values, "conv2d()")
    return convolve(
        x, values, pattern.index, bias, pattern.shape,
        *conv_pairs(stride, padding, dilation, "conv2d()"), backend,
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
    pattern.check_values(values, "conv2d_dgrad()")
    return _run_dgrad(
        dy, values, pattern.index, tuple(x_shape), pattern.shape,
        *conv_pairs(stride, padding, dilation, "conv2d_dgrad()"), is_channels_last(dy), backend,
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
    return _run_wgrad(
        x, dy, pattern.index, (pattern.nnzb, *pattern.blocksize), pattern.shape,
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
        y [..., K], contiguous. Differentiable once in x, values and bias.

    Equivalent to: F.linear(x, pattern.to_dense(values)[:, :, 0, 0], bias)
    """
    pattern.check_values(values, "linear()")
    return apply_linear(x, values, pattern.index, bias, pattern.shape, backend)


# ---------------------------------------------------------------- on a packed index (what the modules call)


def convolve(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    weight_shape: tuple[int, int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    backend: str | None,
) -> Tensor:
    """conv2d on a packed index, with autocast applied."""
    plain = _plain(x, values, index, bias)
    if not plain or torch._C._is_any_autocast_enabled():
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, values = _autocast(x, dtype), _autocast(values, dtype)
            bias = None if bias is None else _autocast(bias, dtype)
    args = (x, values, index, bias, weight_shape, stride, padding, dilation, backend)
    if not plain:
        return torch.ops.bsrconv.fprop.default(*args)
    needs_grad = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    return _Conv2d.apply(*args) if needs_grad and torch.is_grad_enabled() else _fprop(*args)


def apply_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    weight_shape: tuple[int, int, int, int],
    backend: str | None,
) -> Tensor:
    """linear on a packed index: every vector is an image of one pixel, channels_last."""
    k, c, r, s = weight_shape
    if (r, s) != (1, 1):
        raise ValueError(f"linear(): the pattern has shape {tuple(weight_shape)}; it needs (K, C, 1, 1)")
    if x.dim() == 0 or x.shape[-1] != c:
        raise ValueError(f"linear(): x has shape {tuple(x.shape)}; it needs [..., C] with C = {c}")
    pixels = x.reshape(-1, 1, 1, c).permute(0, 3, 1, 2)
    y = convolve(pixels, values, index, bias, weight_shape, (1, 1), (0, 0), (1, 1), backend)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], k)


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """autocast's own rule: floating tensors but float64 are cast."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


# ---------------------------------------------------------------- the ops

_INTS = "int[] weight_shape, int[] stride, int[] padding, int[] dilation"
_library = torch.library.Library("bsrconv", "DEF")
_library.define(f"fprop(Tensor x, Tensor values, Tensor index, Tensor? bias, {_INTS}, str? backend=None) -> Tensor")
_library.define(
    f"dgrad(Tensor dy, Tensor values, Tensor index, SymInt[] x_shape, {_INTS}, bool channels_last, str? backend=None)"
    " -> Tensor"
)
_library.define(f"wgrad(Tensor x, Tensor dy, Tensor index, int[] values_shape, {_INTS}, str? backend=None) -> Tensor")


class _Facts(NamedTuple):
    """What the checks read of a tensor. A tensor itself will do, too."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device


_Key = tuple[torch.Size, torch.dtype, torch.device]


def _key(t: Tensor) -> _Key:
    """The facts of a tensor as they are looked up in a cache."""
    return t.shape, t.dtype, t.device


def _check(who: str, tensors: dict[str, Tensor | _Facts], index: Tensor | _Facts) -> None:
    """All tensors share the dtype and device of the first; the index is on that device."""
    (first, lead), *others = tensors.items()
    if lead.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{who}: {first} has dtype {lead.dtype}; it needs one of {names}")
    for name, t in others:
        if t.dtype != lead.dtype:
            raise ValueError(
                f"{who}: {name} has dtype {t.dtype} and {first} {lead.dtype}; they need one dtype"
                f" ({name}.to({lead.dtype}), or torch.autocast)"
            )
        if t.device != lead.device:
            raise ValueError(f"{who}: {name} is on {t.device} and {first} on {lead.device}; they need one device")
    if index.device != lead.device and lead.device.type != "meta":  # shapes alone need no index
        raise ValueError(
            f"{who}: the pattern is on {index.device} and {first} on {lead.device};"
            f" use pattern.to({str(lead.device)!r})"
        )


def _check_values(who: str, values_shape: Sequence[int], weight_shape: Sequence[int]) -> None:
    k, c = weight_shape[:2]
    if len(values_shape) != 3 or k % max(1, values_shape[1]) or c % max(1, values_shape[2]) or 0 in values_shape[1:]:
        raise ValueError(
            f"{who}: values has shape {tuple(values_shape)}; it needs (nnzb, bk, bc) where bk divides K = {k} and"
            f" bc divides C = {c}"
        )


def _check_dy(who: str, dy: Tensor | _Facts, geometry: ConvGeometry) -> None:
    if tuple(dy.shape) != geometry.y_shape:
        raise ValueError(
            f"{who}: dy has shape {tuple(dy.shape)}; this convolution needs {geometry.y_shape} = (N, K, P, Q)"
        )


def _check_fprop(
    x: Tensor | _Facts,
    values: Tensor | _Facts,
    index: Tensor | _Facts,
    bias: Tensor | _Facts | None,
    weight_shape: Sequence[int],
) -> None:
    who = "conv2d()"
    _check(who, {"x": x, "values": values} | ({} if bias is None else {"bias": bias}), index)
    _check_values(who, values.shape, weight_shape)
    if bias is not None and tuple(bias.shape) != (weight_shape[0],):
        raise ValueError(f"{who}: bias has shape {tuple(bias.shape)}; it needs ({weight_shape[0]},) = (K,)")


@lru_cache(maxsize=4096)
def _fprop_plan(
    x: _Key, values: _Key, index: _Key, bias: _Key | None,
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    backend: str | None, precision: str,
) -> ConvPlan:  # fmt: skip
    """The plan for arguments that are then known to be right: one look-up a call, and checks on the first."""
    _check_fprop(_Facts(*x), _Facts(*values), _Facts(*index), None if bias is None else _Facts(*bias), weight_shape)
    return plan_conv("conv2d()", x[0], weight_shape, values[0], (stride, padding, dilation), x[1], x[2], backend)


def _fprop(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None,
    weight_shape: tuple[int, int, int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], backend: str | None = None,
) -> Tensor:  # fmt: skip
    plan = _fprop_plan(
        _key(x), _key(values), _key(index), None if bias is None else _key(bias),
        weight_shape, stride, padding, dilation, backend, product_precision(x),
    )  # fmt: skip
    tables = unpack_once(index, weight_shape, plan.blocksize, plan.nnzb, "conv2d()")
    x = x.contiguous(memory_format=memory_format(x))
    return plan.on(tables).fprop(x, values.contiguous(), tables, None if bias is None else bias.contiguous())


def _fprop_fake(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None,
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    _check_fprop(x, values, index, bias, weight_shape)
    g = ConvGeometry.of(x.shape, weight_shape, stride, padding, dilation, "conv2d()")
    return torch.empty(g.y_shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _check_dgrad(
    dy: Tensor | _Facts, values: Tensor | _Facts, index: Tensor | _Facts, weight_shape: Sequence[int]
) -> None:
    _check("conv2d_dgrad()", {"dy": dy, "values": values}, index)
    _check_values("conv2d_dgrad()", values.shape, weight_shape)


@lru_cache(maxsize=4096)
def _dgrad_plan(
    dy: _Key, values: _Key, index: _Key, x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    backend: str | None, precision: str,
) -> ConvPlan:  # fmt: skip
    who, facts = "conv2d_dgrad()", _Facts(*dy)
    _check_dgrad(facts, _Facts(*values), _Facts(*index), weight_shape)
    plan = plan_conv(who, x_shape, weight_shape, values[0], (stride, padding, dilation), dy[1], dy[2], backend)
    _check_dy(who, facts, plan.geometry)
    return plan


def _dgrad(
    dy: Tensor, values: Tensor, index: Tensor, x_shape: tuple[int, ...],
    weight_shape: tuple[int, int, int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], channels_last: bool, backend: str | None = None,
) -> Tensor:  # fmt: skip
    plan = _dgrad_plan(
        _key(dy), _key(values), _key(index), x_shape,
        weight_shape, stride, padding, dilation, backend, product_precision(dy),
    )  # fmt: skip
    tables = unpack_once(index, weight_shape, plan.blocksize, plan.nnzb, "conv2d_dgrad()")
    dy = dy.contiguous(memory_format=format_of(channels_last))
    return plan.on(tables).dgrad(dy, values.contiguous(), tables, channels_last)


def _dgrad_fake(
    dy: Tensor, values: Tensor, index: Tensor, x_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    channels_last: bool, backend: str | None = None,
) -> Tensor:  # fmt: skip
    _check_dgrad(dy, values, index, weight_shape)
    g = ConvGeometry.of(x_shape, weight_shape, stride, padding, dilation, "conv2d_dgrad()")
    _check_dy("conv2d_dgrad()", dy, g)
    return torch.empty(g.x_shape, dtype=dy.dtype, device=dy.device, memory_format=format_of(channels_last))


def _check_wgrad(
    x: Tensor | _Facts,
    dy: Tensor | _Facts,
    index: Tensor | _Facts,
    values_shape: Sequence[int],
    weight_shape: Sequence[int],
) -> None:
    _check("conv2d_wgrad()", {"x": x, "dy": dy}, index)
    _check_values("conv2d_wgrad()", values_shape, weight_shape)


@lru_cache(maxsize=4096)
def _wgrad_plan(
    x: _Key, dy: _Key, index: _Key, values_shape: tuple[int, ...],
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    backend: str | None, precision: str,
) -> ConvPlan:  # fmt: skip
    who, facts = "conv2d_wgrad()", _Facts(*dy)
    _check_wgrad(_Facts(*x), facts, _Facts(*index), values_shape, weight_shape)
    plan = plan_conv(who, x[0], weight_shape, values_shape, (stride, padding, dilation), x[1], x[2], backend)
    _check_dy(who, facts, plan.geometry)
    return plan


def _wgrad(
    x: Tensor, dy: Tensor, index: Tensor, values_shape: tuple[int, ...],
    weight_shape: tuple[int, int, int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], backend: str | None = None,
) -> Tensor:  # fmt: skip
    plan = _wgrad_plan(
        _key(x), _key(dy), _key(index), values_shape,
        weight_shape, stride, padding, dilation, backend, product_precision(x),
    )  # fmt: skip
    tables = unpack_once(index, weight_shape, plan.blocksize, plan.nnzb, "conv2d_wgrad()")
    layout = memory_format(x)
    return plan.on(tables).wgrad(x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout), tables)


def _wgrad_fake(
    x: Tensor, dy: Tensor, index: Tensor, values_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    _check_wgrad(x, dy, index, values_shape, weight_shape)
    g = ConvGeometry.of(x.shape, weight_shape, stride, padding, dilation, "conv2d_wgrad()")
    _check_dy("conv2d_wgrad()", dy, g)
    return x.new_empty(tuple(values_shape))


def _save_for_backward(ctx: Any, inputs: Sequence[Any]) -> None:
    x, values, index, _, *ctx.ints, ctx.backend = inputs
    wants_x, wants_values = ctx.needs_input_grad[:2]
    # dgrad needs values, wgrad needs x: a frozen side keeps nothing alive.
    ctx.save_for_backward(x if wants_values else None, values if wants_x else None, index)
    ctx.x_shape, ctx.values_shape, ctx.channels_last = x.shape, values.shape, is_channels_last(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, index = ctx.saved_tensors
    dy = dy.contiguous(memory_format=format_of(ctx.channels_last))
    dx = dv = db = None
    if ctx.needs_input_grad[0]:
        dx = _run_dgrad(dy, values, index, ctx.x_shape, *ctx.ints, ctx.channels_last, ctx.backend)
    if ctx.needs_input_grad[1]:
        dv = _run_wgrad(x, dy, index, ctx.values_shape, *ctx.ints, ctx.backend)
    if ctx.needs_input_grad[3]:
        db = dy.sum((0, 2, 3))
    return dx, dv, None, db, None, None, None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "conv2d() is differentiable once: its gradients (conv2d_dgrad, conv2d_wgrad) have no gradient of their own."
        " Where second derivatives are needed, use F.conv2d with pattern.to_dense(values)"
    )


def _hashable(args: Sequence[Any]) -> list[Any]:
    """Arguments as the dispatcher passes them, lists of ints turned back into tuples."""
    return [tuple(arg) if isinstance(arg, list) else arg for arg in args]


_library.impl("fprop", lambda *args: _fprop(*_hashable(args)), "CompositeExplicitAutograd")
_library.impl("dgrad", lambda *args: _dgrad(*_hashable(args)), "CompositeExplicitAutograd")
_library.impl("wgrad", lambda *args: _wgrad(*_hashable(args)), "CompositeExplicitAutograd")
torch.library.register_fake("bsrconv::fprop", _fprop_fake, lib=_library)
torch.library.register_fake("bsrconv::dgrad", _dgrad_fake, lib=_library)
torch.library.register_fake("bsrconv::wgrad", _wgrad_fake, lib=_library)
torch.library.register_autograd(
    "bsrconv::fprop",
    _backward,
    setup_context=lambda ctx, inputs, output: _save_for_backward(ctx, _hashable(inputs)),
    lib=_library,
)
torch.library.register_autograd("bsrconv::dgrad", _no_double_backward, lib=_library)
torch.library.register_autograd("bsrconv::wgrad", _no_double_backward, lib=_library)


# ---------------------------------------------------------------- past the dispatcher, where nobody looks

# An op with a registered autograd formula costs five times as much on the host as the same autograd.Function over the
# same kernel. So eager calls on plain tensors take that; whatever traces, transforms or records ops gets the op.

_PLAIN = (Tensor, torch.nn.Parameter)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but these ordinary tensors is there: no compiler, mode, transform, trace or profiler."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    return all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)


class _Conv2d(torch.autograd.Function):
    """What register_autograd makes of bsrconv::fprop."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_for_backward(ctx, inputs)
        return _fprop(*inputs)

    backward = staticmethod(_backward)


def _run_dgrad(dy: Tensor, values: Tensor, index: Tensor, *args: Any) -> Tensor:
    return _gradient(_dgrad, torch.ops.bsrconv.dgrad.default, dy, values, index, *args)


def _run_wgrad(x: Tensor, dy: Tensor, index: Tensor, *args: Any) -> Tensor:
    return _gradient(_wgrad, torch.ops.bsrconv.wgrad.default, x, dy, index, *args)


def _gradient(kernel: Callable[..., Tensor], op: Any, a: Tensor, b: Tensor, index: Tensor, *args: Any) -> Tensor:
    """The kernel itself, unless somebody watches or the gradient is to be differentiated: the op refuses that."""
    again = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return (kernel if not again and _plain(a, b, index) else op)(a, b, index, *args)
