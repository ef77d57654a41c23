"""The products as torch ops: torch.ops.bsrconv.fprop, dgrad and wgrad, differentiable once, opaque to torch.compile.

Their schema is plain: x, values, the packed index tensor and integers. They never read a tensor on the host, so a step
captures into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import batching
from .geometry import ConvGeometry
from .index import IndexTables, layout_of
from .kernels.cost import Setting
from .layout import format_of, is_channels_last, memory_format
from .pattern_checks import check_strided
from .plan import ConvPlan, plan_conv, setting_of
from .product_checks import Facts, check_dgrad, check_dy, check_fprop, check_residual, check_wgrad

# ---------------------------------------------------------------- the ops

_INTS = "int[] weight_shape, int[] stride, int[] padding, int[] dilation"
_library = torch.library.Library("bsrconv", "DEF")
_library.define(f"fprop(Tensor x, Tensor values, Tensor index, Tensor? bias, {_INTS}, str? backend=None) -> Tensor")
_library.define(
    f"dgrad(Tensor dy, Tensor values, Tensor index, SymInt[] x_shape, {_INTS}, bool channels_last, str? backend=None)"
    " -> Tensor"
)
_library.define(f"wgrad(Tensor x, Tensor dy, Tensor index, int[] values_shape, {_INTS}, str? backend=None) -> Tensor")


_Key = tuple[torch.Size, torch.dtype, torch.device]


def _key(t: Tensor) -> _Key:
    """The facts of a tensor as they are looked up in a cache."""
    return t.shape, t.dtype, t.device


@lru_cache(maxsize=4096)
def _fprop_plan(
    x: _Key, values: _Key, index: _Key, bias: _Key | None,
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    backend: str | None, setting: str | Setting,
) -> ConvPlan:  # fmt: skip
    """The plan for arguments that are then known to be right: one look-up a call, and checks on the first."""
    check_fprop(Facts(*x), Facts(*values), Facts(*index), None if bias is None else Facts(*bias), weight_shape)
    layout = layout_of(index[0], index[1], weight_shape, values[0][1:], values[0][0], "conv2d()")
    return plan_conv(
        "conv2d()", x[0], weight_shape, values[0], (stride, padding, dilation), x[1], x[2], layout, backend, setting
    )


def _fprop(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None,
    weight_shape: tuple[int, int, int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], backend: str | None = None, residual: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    plan = _fprop_plan(
        _key(x), _key(values), _key(index), None if bias is None else _key(bias),
        weight_shape, stride, padding, dilation, backend, setting_of(x),
    )  # fmt: skip
    tables = IndexTables(index.contiguous(), plan.layout)
    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    bias = None if bias is None else bias.contiguous()
    if residual is not None:
        check_residual(residual, x, plan.geometry.y_shape)
        residual = residual.contiguous(memory_format=layout)
    if residual is not None or relu:
        return plan.fprop_then(x, values.contiguous(), tables, bias, residual, relu)
    return plan.fprop(x, values.contiguous(), tables, bias)


def _fprop_fake(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None,
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    check_fprop(x, values, index, bias, weight_shape)
    g = ConvGeometry.of(x.shape, weight_shape, stride, padding, dilation, "conv2d()")
    return torch.empty(g.y_shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@lru_cache(maxsize=4096)
def _dgrad_plan(
    dy: _Key, values: _Key, index: _Key, x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    backend: str | None, setting: str | Setting,
) -> ConvPlan:  # fmt: skip
    who, facts = "conv2d_dgrad()", Facts(*dy)
    check_dgrad(facts, Facts(*values), Facts(*index), weight_shape)
    layout = layout_of(index[0], index[1], weight_shape, values[0][1:], values[0][0], who)
    conv = stride, padding, dilation
    plan = plan_conv(who, x_shape, weight_shape, values[0], conv, dy[1], dy[2], layout, backend, setting)
    check_dy(who, facts, plan.geometry)
    return plan


def _dgrad(
    dy: Tensor, values: Tensor, index: Tensor, x_shape: tuple[int, ...],
    weight_shape: tuple[int, int, int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], channels_last: bool, backend: str | None = None,
) -> Tensor:  # fmt: skip
    plan = _dgrad_plan(
        _key(dy), _key(values), _key(index), x_shape,
        weight_shape, stride, padding, dilation, backend, setting_of(dy),
    )  # fmt: skip
    tables = IndexTables(index.contiguous(), plan.layout)
    dy = dy.contiguous(memory_format=format_of(channels_last))
    return plan.dgrad(dy, values.contiguous(), tables, channels_last)


def _dgrad_fake(
    dy: Tensor, values: Tensor, index: Tensor, x_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    channels_last: bool, backend: str | None = None,
) -> Tensor:  # fmt: skip
    check_dgrad(dy, values, index, weight_shape)
    g = ConvGeometry.of(x_shape, weight_shape, stride, padding, dilation, "conv2d_dgrad()")
    check_dy("conv2d_dgrad()", dy, g)
    return torch.empty(g.x_shape, dtype=dy.dtype, device=dy.device, memory_format=format_of(channels_last))


@lru_cache(maxsize=4096)
def _wgrad_plan(
    x: _Key, dy: _Key, index: _Key, values_shape: tuple[int, ...],
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    backend: str | None, setting: str | Setting,
) -> ConvPlan:  # fmt: skip
    who, facts = "conv2d_wgrad()", Facts(*dy)
    check_wgrad(Facts(*x), facts, Facts(*index), values_shape, weight_shape)
    layout = layout_of(index[0], index[1], weight_shape, values_shape[1:], values_shape[0], who)
    conv = stride, padding, dilation
    plan = plan_conv(who, x[0], weight_shape, values_shape, conv, x[1], x[2], layout, backend, setting)
    check_dy(who, facts, plan.geometry)
    return plan


def _wgrad(
    x: Tensor, dy: Tensor, index: Tensor, values_shape: tuple[int, ...],
    weight_shape: tuple[int, int, int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], backend: str | None = None,
) -> Tensor:  # fmt: skip
    plan = _wgrad_plan(
        _key(x), _key(dy), _key(index), values_shape,
        weight_shape, stride, padding, dilation, backend, setting_of(x),
    )  # fmt: skip
    tables = IndexTables(index.contiguous(), plan.layout)
    layout = memory_format(x)
    return plan.wgrad(x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout), tables)


def _wgrad_fake(
    x: Tensor, dy: Tensor, index: Tensor, values_shape: Sequence[int],
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    check_wgrad(x, dy, index, values_shape, weight_shape)
    g = ConvGeometry.of(x.shape, weight_shape, stride, padding, dilation, "conv2d_wgrad()")
    check_dy("conv2d_wgrad()", dy, g)
    return x.new_empty(tuple(values_shape))


def _gradients(
    x: Tensor, dy: Tensor, values: Tensor, index: Tensor,
    weight_shape: tuple[int, int, int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], channels_last: bool, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dgrad and wgrad, which have one plan and read the same dy."""
    plan = _dgrad_plan(
        _key(dy), _key(values), _key(index), x.shape,
        weight_shape, stride, padding, dilation, backend, setting_of(dy),
    )  # fmt: skip
    tables = IndexTables(index.contiguous(), plan.layout)
    x = x.contiguous(memory_format=format_of(channels_last))
    return plan.gradients(x, dy, values.contiguous(), tables, channels_last)


_library.impl("fprop", lambda *args: _fprop(*_hashable(args)), "CompositeExplicitAutograd")
_library.impl("dgrad", lambda *args: _dgrad(*_hashable(args)), "CompositeExplicitAutograd")
_library.impl("wgrad", lambda *args: _wgrad(*_hashable(args)), "CompositeExplicitAutograd")
torch.library.register_fake("bsrconv::fprop", _fprop_fake, lib=_library)
torch.library.register_fake("bsrconv::dgrad", _dgrad_fake, lib=_library)
torch.library.register_fake("bsrconv::wgrad", _wgrad_fake, lib=_library)
torch.library.register_vmap("bsrconv::fprop", batching.fprop, lib=_library)
torch.library.register_vmap("bsrconv::dgrad", batching.dgrad, lib=_library)
torch.library.register_vmap("bsrconv::wgrad", batching.wgrad, lib=_library)
_fprop_op, _dgrad_op, _wgrad_op = (getattr(torch.ops.bsrconv, name).default for name in ("fprop", "dgrad", "wgrad"))


def _hashable(args: Sequence[Any]) -> list[Any]:
    """Arguments as the dispatcher passes them, lists of ints turned back into tuples."""
    return [tuple(arg) if isinstance(arg, list) else arg for arg in args]


# ---------------------------------------------------------------- derivatives

# Every product is linear in each of its two tensors: forward-mode derivatives are products again. PyTorch's
# register_autograd knows backward mode alone and gives zeros for the other, hence kernels for the Autograd keys.


# False of a tensor that stands for others: in a transform, batched, or one that has got out of a transform, as those
# that torch.func.vjp keeps for its backward.
_has_storage = torch._C._has_storage


def _save_for_backward(ctx: Any, inputs: Sequence[Any]) -> None:
    x, values, index, _, *ctx.ints, ctx.backend = inputs
    wants_x, wants_values = ctx.needs_input_grad[:2]
    # dgrad needs values, wgrad needs x: a frozen side keeps nothing alive.
    ctx.save_for_backward(x if wants_values else None, values if wants_x else None, index)
    ctx.x_shape, ctx.values_shape, ctx.channels_last = x.shape, values.shape, is_channels_last(x)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    dx = dv = db = None
    if dy is not None:
        x, values, index = ctx.saved_tensors
        if _has_storage(dy):  # once for both products
            dy = dy.contiguous(memory_format=format_of(ctx.channels_last))
        wants_x, wants_values = ctx.needs_input_grad[:2]
        into = *ctx.ints, ctx.channels_last, ctx.backend
        if wants_x and wants_values and not torch.is_grad_enabled() and _plain(dy, x, index):
            dx, dv = _gradients(x, dy, values, index, *into)
        else:
            if wants_x:
                dx = dgrad(dy, values, index, ctx.x_shape, *into)
            if wants_values:
                dv = wgrad(x, dy, index, ctx.values_shape, *ctx.ints, ctx.backend)
        if ctx.needs_input_grad[3]:
            db = dy.sum((0, 2, 3))
    return dx, dv, None, db, *[None] * 7  # what is left over is dropped


# forward_ad.unpack_dual without its cost. Its level is 0 wherever there is one: nested levels are torch.func's alone.
_unpack_dual = torch._VF._unpack_dual


class _Level(NamedTuple):
    """What a call of an op is in the midst of: the keys of the dispatcher, and which derivatives are recorded."""

    keyset: Any
    backward: bool
    forward: bool


class _Fprop(torch.autograd.Function):
    """The derivatives of bsrconv::fprop: `_Product` with a bias, and a backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *args, op, level = inputs
        _save_for_backward(ctx, args)
        ctx.save_for_forward(*args[:3])
        ctx.set_materialize_grads(False)
        y = _below_autograd(op, level, args)
        ctx.y_shape = y.shape
        return y

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dv: Tensor | None, _: None, db: Tensor | None, *rest: None) -> Tensor:
        x, values, index = ctx.saved_tensors
        with _outer_levels():
            x, values = _primal(x), _primal(values)
            parts = [] if dx is None else [_fprop_op(dx, values, index, None, *ctx.ints, ctx.backend)]
            parts += [] if dv is None else [_fprop_op(x, dv, index, None, *ctx.ints, ctx.backend)]
            parts += [] if db is None else [db.view(-1, 1, 1).expand(ctx.y_shape)]
            return sum(parts[1:], parts[0])


class _Product(torch.autograd.Function):
    """The derivatives of bsrconv::dgrad and wgrad, bilinear in their first two arguments: forward mode alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *args, ctx.op, level = inputs
        ctx.save_for_forward(*args[:2])
        ctx.rest = args[2:]
        ctx.set_materialize_grads(False)
        return _below_autograd(ctx.op, level, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "conv2d() is differentiable once: its gradients (conv2d_dgrad, conv2d_wgrad) have no gradient of their own."
            " Where second derivatives are needed, use F.conv2d with pattern.to_dense(values)"
        )

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *rest: None) -> Tensor:
        with _outer_levels():
            a, b = map(_primal, ctx.saved_tensors)
            parts = [] if da is None else [ctx.op(da, b, *ctx.rest)]
            parts += [] if db is None else [ctx.op(a, db, *ctx.rest)]
            return sum(parts[1:], parts[0])


def _outer_levels() -> Any:
    """Forward mode, which PyTorch ends for a jvp: other levels of torch.func.jvp go on."""
    return forward_ad._set_fwd_grad_enabled(True)


def _primal(t: Tensor) -> Tensor:
    """A tensor without the tangent of the innermost level."""
    return _unpack_dual(t, level=0)[0]


def _below_autograd(op: Any, level: _Level, args: Sequence[Any]) -> Tensor:
    """The op itself, or for the next level of torch.func's transforms: with the modes that Function.apply has ended."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return op.redispatch(level.keyset & torch._C._after_autograd_keyset, *args)
        with torch.set_grad_enabled(level.backward), forward_ad._set_fwd_grad_enabled(level.forward):
            return op.redispatch(level.keyset & torch._C._after_autograd_keyset, *args)


def _autograd_kernel(function: type[torch.autograd.Function], op: Any) -> Callable[..., Tensor]:
    """What the Autograd keys run: `function` for one level of differentiation.

    The dispatcher comes here once for every level of torch.func's transforms, so that the function must not take care
    of these itself, as Function.apply does: hence the apply of its parent.
    """
    count = len(op._schema.arguments)

    def kernel(keyset: Any, *args: Any) -> Tensor:
        level = _Level(keyset, torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
        if not _differentiated(level, args):
            return _below_autograd(op, level, args)
        args = (*_hashable(args), *[None] * (count - len(args)))  # the dispatcher drops a backend that is None
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, function).apply(*args, op, level)  # type: ignore[misc]

    return kernel


def _differentiated(level: _Level, args: Sequence[Any]) -> bool:
    """Whether a derivative may be asked for: if not, as in compiled code, `function` would cost more than it does."""
    if level.backward and torch._C._any_requires_grad(*args):
        return True
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    if level.forward:
        for arg in args[:4]:
            if isinstance(arg, Tensor) and arg.is_floating_point() and _unpack_dual(arg, level=0)[1] is not None:
                return True
    return False


for _function, _op in ((_Fprop, _fprop_op), (_Product, _dgrad_op), (_Product, _wgrad_op)):
    _library.impl(_op._opname, _autograd_kernel(_function, _op), "Autograd", with_keyset=True)


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
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    return all(t is None or (type(t) in _PLAIN and not t.is_meta and _has_storage(t)) for t in tensors)


class _Conv2d(torch.autograd.Function):
    """What register_autograd makes of bsrconv::fprop."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_for_backward(ctx, inputs)
        return _fprop(*inputs)

    backward = staticmethod(_backward)


def dgrad(dy: Tensor, values: Tensor, index: Tensor, *args: Any) -> Tensor:
    return _gradient(_dgrad, _dgrad_op, dy, values, index, *args)


def wgrad(x: Tensor, dy: Tensor, index: Tensor, *args: Any) -> Tensor:
    return _gradient(_wgrad, _wgrad_op, x, dy, index, *args)


def _gradient(kernel: Callable[..., Tensor], op: Any, a: Tensor, b: Tensor, index: Tensor, *args: Any) -> Tensor:
    """The kernel itself, unless somebody watches or the gradient is to be differentiated: the op refuses that."""
    again = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return (kernel if not again and _plain(a, b, index) else op)(a, b, index, *args)


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
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(conv2d + residual) on a packed index, with autocast applied; either may be left out."""
    plain = _plain(x, values, index, bias, residual)
    if not plain:
        for name, t in (("x", x), ("values", values), ("bias", bias), ("residual", residual)):
            if t is not None:
                check_strided(t, name, "conv2d()")
    if not plain or torch._C._is_any_autocast_enabled():
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, values = _autocast(x, dtype), _autocast(values, dtype)
            bias = None if bias is None else _autocast(bias, dtype)
            residual = None if residual is None else _autocast(residual, dtype)
    args = (x, values, index, bias, weight_shape, stride, padding, dilation, backend)
    more = residual is not None or relu
    if plain:
        inputs = (x, values, bias, residual)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
            return _fprop(*args, residual, relu) if more else _fprop(*args)
    y = _Conv2d.apply(*args) if plain else _fprop_op(*args)
    if residual is not None:
        check_residual(residual, x, y.shape)
        y = y + residual
    return y.relu() if relu else y


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """autocast's own rule: floating tensors but float64 are cast."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
