"""The products as torch ops: torch.ops.bsrconv.fprop, dgrad and wgrad, differentiable once, opaque to torch.compile.

Their schema is plain: x, values, the packed index tensor and integers. They never read a tensor on the host, so a step
captures into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .batching import fold, one_by_one, sample
from .derivatives import Bilinear, below_autograd, differentiable, has_storage, hashable, is_plain, outer_levels, primal
from .geometry import ConvGeometry
from .index import IndexTables, layout_of
from .kernels.cost import Setting
from .layout import CONTIGUOUS, FORMATS, laid_out, memory_format_of, new
from .pattern_checks import check_strided
from .plan import ConvPlan, plan_conv, setting_of
from .product_checks import Facts, check_dgrad, check_fprop, check_residual, check_wgrad

# ---------------------------------------------------------------- the ops

# weight_shape: (K, C, R, S); of a convolution in groups (K, C/groups, R, S, groups), see BSRPattern.bank.
_library = torch.library.Library("bsrconv", "DEF")
_CONV = "int[] weight_shape, int[] stride, int[] padding, int[] dilation"

_Ints = tuple[int, ...]
_Key = tuple[torch.Size, torch.dtype, torch.device]  # of a tensor
_Result = tuple[Sequence[int], str]  # shape and memory format


class Op:
    """One of the products as a torch op, defined by its subclass: schema, checks, result and what runs.

    The arguments of all three begin alike: two tensors, the packed index, one more (the bias, or a shape), then
    weight_shape, stride, padding and dilation.
    """

    schema: str
    check: Callable[..., tuple[ConvGeometry, Sequence[int]]]  # of these eight: the geometry and the shape of values

    def __init__(self, derivatives: type[torch.autograd.Function]) -> None:
        name = self.schema.partition("(")[0]
        _library.define(f"{self.schema} -> Tensor")
        self.op = getattr(torch.ops.bsrconv, name).default
        self.who = "conv2d()" if name == "fprop" else f"conv2d_{name}()"
        self.plan = lru_cache(maxsize=4096)(self._plan)
        _library.impl(name, lambda *args: self.run(*hashable(args)), "CompositeExplicitAutograd")
        _library.impl(name, differentiable(derivatives, self.op), "Autograd", with_keyset=True)
        torch.library.register_fake(f"bsrconv::{name}", self.fake, lib=_library)
        torch.library.register_vmap(f"bsrconv::{name}", self.batched, lib=_library)

    def __call__(self, a: Tensor, b: Tensor, index: Tensor, *args: Any) -> Tensor:
        """What runs itself, unless somebody watches or the result is to be differentiated: the op refuses that."""
        again = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        return (self.run if not again and is_plain(a, b, index) else self.op)(a, b, index, *args)

    def _plan(
        self, a: _Key, b: _Key, index: _Key, third: Any, weight_shape: _Ints, stride: _Ints, padding: _Ints,
        dilation: _Ints, backend: str | None, setting: Setting,
    ) -> ConvPlan:  # fmt: skip
        """The plan for arguments that are then known to be right: one look-up a call, and checks on the first."""
        if setting.memory_format not in FORMATS:
            raise ValueError(
                f"{self.who}: memory_format is {setting.memory_format!r}; it needs one of {', '.join(FORMATS)}"
            )
        geometry, values_shape = self.check(
            Facts(*a), Facts(*b), Facts(*index), third, weight_shape, stride, padding, dilation
        )
        layout = layout_of(index[0], index[1], geometry.weight_shape, values_shape[1:], values_shape[0], self.who)
        return plan_conv(self.who, geometry, values_shape, a[1], a[2], layout, backend, setting)

    def opened(
        self, a: Tensor, b: Tensor, index: Tensor, third: Any, weight_shape: _Ints, stride: _Ints, padding: _Ints,
        dilation: _Ints, backend: str | None, memory_format: str,
    ) -> tuple[ConvPlan, IndexTables]:  # fmt: skip
        """The plan of a call and the tables that it reads."""
        plan = self.plan(
            (a.shape, a.dtype, a.device), (b.shape, b.dtype, b.device), (index.shape, index.dtype, index.device),
            third, weight_shape, stride, padding, dilation, backend, setting_of(a, memory_format),
        )  # fmt: skip
        return plan, IndexTables(index.contiguous(), plan.layout)

    def run(self, *args: Any) -> Tensor:
        """The product of real tensors."""
        raise NotImplementedError

    def result(self, geometry: ConvGeometry, a: Any, third: Any, rest: Sequence[Any]) -> _Result:
        """Shape and memory format of what `run` returns; `rest` follows the eight arguments."""
        raise NotImplementedError

    def fake(self, a: Tensor, b: Tensor, index: Tensor, third: Any, *args: Any) -> Tensor:
        """The result without its content."""
        geometry, _ = self.check(a, b, index, third, *args[:4])
        shape, layout = self.result(geometry, a, third, args[4:])
        return new(shape, a, layout)

    def batched(self, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        """Under vmap: one call on a larger batch where the weights are one, else one by one."""
        one = [sample(arg, dim) for arg, dim in zip(args[:4], in_dims, strict=False)]
        geometry, _ = self.check(*one, *args[4:8])
        if in_dims[1] is None and in_dims[2] is None and (found := self.folded(info, in_dims, geometry, args)):
            return found
        shape, _ = self.result(geometry, one[0], one[3], args[8:])
        return one_by_one(info, in_dims, self.op, args, shape)

    def folded(
        self, info: Any, in_dims: Sequence[Any], geometry: ConvGeometry, args: Sequence[Any]
    ) -> tuple[Tensor, int] | None:
        """`batched` as one call, where neither values nor index have samples; None: there is no such call."""
        return None


class _Fprop(Op):
    schema = f"fprop(Tensor x, Tensor values, Tensor index, Tensor? bias, {_CONV}, str? backend=None)"
    check = staticmethod(check_fprop)

    def run(  # type: ignore[override]
        self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, weight_shape: _Ints, stride: _Ints,
        padding: _Ints, dilation: _Ints, backend: str | None = None, residual: Tensor | None = None, relu: bool = False,
    ) -> Tensor:  # fmt: skip
        layout = memory_format_of(x)
        plan, tables = self.opened(
            x, values, index, None if bias is None else Facts(bias.shape, bias.dtype, bias.device),
            weight_shape, stride, padding, dilation, backend, layout,
        )  # fmt: skip
        x, values = laid_out(x, layout), values.contiguous()
        bias = None if bias is None else bias.contiguous()
        if residual is None and not relu:
            return plan.fprop(x, values, tables, bias)
        if residual is not None:
            check_residual(residual, x, plan.geometry.y_shape)
            residual = laid_out(residual, layout)
        return plan.fprop_then(x, values, tables, bias, residual, relu)

    def result(self, geometry: ConvGeometry, a: Any, third: Any, rest: Sequence[Any]) -> _Result:
        return geometry.y_shape, memory_format_of(a) if isinstance(a, Tensor) else CONTIGUOUS

    def folded(
        self, info: Any, in_dims: Sequence[Any], geometry: ConvGeometry, args: Sequence[Any]
    ) -> tuple[Tensor, int]:
        x, values, index, bias, *rest = args
        own_bias = bias is not None and in_dims[3] is not None
        y = self.op(x if in_dims[0] is None else fold(x, in_dims[0]), values, index, None if own_bias else bias, *rest)
        y = y if in_dims[0] is None else y.unflatten(0, (info.batch_size, geometry.n))
        return y + bias.movedim(in_dims[3], 0)[:, None, :, None, None] if own_bias else y, 0


class _Dgrad(Op):
    schema = (
        f"dgrad(Tensor dy, Tensor values, Tensor index, SymInt[] x_shape, {_CONV}, str memory_format,"
        " str? backend=None)"
    )
    check = staticmethod(check_dgrad)

    def run(  # type: ignore[override]
        self, dy: Tensor, values: Tensor, index: Tensor, x_shape: _Ints, weight_shape: _Ints, stride: _Ints,
        padding: _Ints, dilation: _Ints, memory_format: str, backend: str | None = None,
    ) -> Tensor:  # fmt: skip
        plan, tables = self.opened(
            dy, values, index, x_shape, weight_shape, stride, padding, dilation, backend, memory_format
        )
        dy = laid_out(dy, memory_format)
        return plan.dgrad(dy, values.contiguous(), tables, memory_format)

    def result(self, geometry: ConvGeometry, a: Any, third: Any, rest: Sequence[Any]) -> _Result:
        return geometry.x_shape, rest[0]

    def folded(
        self, info: Any, in_dims: Sequence[Any], geometry: ConvGeometry, args: Sequence[Any]
    ) -> tuple[Tensor, int]:
        dy, values, index, _, *rest = args
        n, *image = geometry.x_shape
        dx = self.op(fold(dy, in_dims[0]), values, index, (info.batch_size * n, *image), *rest)
        return dx.unflatten(0, (info.batch_size, n)), 0


class _Wgrad(Op):
    schema = f"wgrad(Tensor x, Tensor dy, Tensor index, int[] values_shape, {_CONV}, str? backend=None)"
    check = staticmethod(check_wgrad)

    def run(  # type: ignore[override]
        self, x: Tensor, dy: Tensor, index: Tensor, values_shape: _Ints, weight_shape: _Ints, stride: _Ints,
        padding: _Ints, dilation: _Ints, backend: str | None = None,
    ) -> Tensor:  # fmt: skip
        layout = memory_format_of(x)
        plan, tables = self.opened(x, dy, index, values_shape, weight_shape, stride, padding, dilation, backend, layout)
        return plan.wgrad(laid_out(x, layout), laid_out(dy, layout), tables)

    def result(self, geometry: ConvGeometry, a: Any, third: Any, rest: Sequence[Any]) -> _Result:
        return tuple(third), CONTIGUOUS


def _gradients(
    x: Tensor, dy: Tensor, values: Tensor, index: Tensor, weight_shape: _Ints, stride: _Ints, padding: _Ints,
    dilation: _Ints, memory_format: str, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dgrad and wgrad, which have one plan and read the same dy."""
    plan, tables = DGRAD.opened(
        dy, values, index, x.shape, weight_shape, stride, padding, dilation, backend, memory_format
    )
    x = laid_out(x, memory_format)
    return plan.gradients(x, dy, values.contiguous(), tables, memory_format)


def _save_for_backward(ctx: Any, inputs: Sequence[Any]) -> None:
    x, values, index, _, *ctx.ints, ctx.backend = inputs
    wants_x, wants_values = ctx.needs_input_grad[:2]
    # dgrad needs values, wgrad needs x: a frozen side keeps nothing alive.
    ctx.save_for_backward(x if wants_values else None, values if wants_x else None, index)
    ctx.x_shape, ctx.values_shape, ctx.memory_format = x.shape, values.shape, memory_format_of(x)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    dx = dv = db = None
    if dy is not None:
        x, values, index = ctx.saved_tensors
        if has_storage(dy):  # once for both products
            dy = laid_out(dy, ctx.memory_format)
        wants_x, wants_values = ctx.needs_input_grad[:2]
        into = *ctx.ints, ctx.memory_format, ctx.backend
        if wants_x and wants_values and not torch.is_grad_enabled() and is_plain(dy, x, index):
            dx, dv = _gradients(x, dy, values, index, *into)
        else:
            if wants_x:
                dx = DGRAD(dy, values, index, ctx.x_shape, *into)
            if wants_values:
                dv = WGRAD(x, dy, index, ctx.values_shape, *ctx.ints, ctx.backend)
        if ctx.needs_input_grad[3]:
            db = dy.sum((0, 2, 3))
    return dx, dv, None, db, *[None] * 7  # what is left over is dropped


class _WithBackward(torch.autograd.Function):
    """The derivatives of bsrconv::fprop: `Bilinear` with a bias, and a backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *args, op, level = inputs
        _save_for_backward(ctx, args)
        ctx.save_for_forward(*args[:3])
        ctx.set_materialize_grads(False)
        y = below_autograd(op, level, args)
        ctx.y_shape = y.shape
        return y

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dv: Tensor | None, _: None, db: Tensor | None, *rest: None) -> Tensor:
        x, values, index = ctx.saved_tensors
        with outer_levels():
            x, values = primal(x), primal(values)
            parts = [] if dx is None else [FPROP.op(dx, values, index, None, *ctx.ints, ctx.backend)]
            parts += [] if dv is None else [FPROP.op(x, dv, index, None, *ctx.ints, ctx.backend)]
            parts += [] if db is None else [db.view(-1, 1, 1).expand(ctx.y_shape)]
            return sum(parts[1:], parts[0])


FPROP = _Fprop(_WithBackward)
DGRAD = _Dgrad(Bilinear)
WGRAD = _Wgrad(Bilinear)


# ---------------------------------------------------------------- past the dispatcher, where nobody looks

# An op with a registered autograd formula costs five times as much on the host as the same autograd.Function over the
# same kernel. So eager calls on plain tensors take that; whatever traces, transforms or records ops gets the op.


class _Conv2d(torch.autograd.Function):
    """What register_autograd makes of bsrconv::fprop."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_for_backward(ctx, inputs)
        return FPROP.run(*inputs)

    backward = staticmethod(_backward)


def convolve(
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
    """relu(conv2d + residual) on a packed index, with autocast applied; either may be left out. x may be one image."""
    if isinstance(x, Tensor) and x.dim() == 3:
        one = None if residual is None else residual[None]
        return convolve(
            x[None], values, index, bias, weight_shape, stride, padding, dilation, backend, one, relu
        ).squeeze(0)
    plain = is_plain(x, values, index, bias, residual)
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
    if plain:
        inputs = (x, values, bias, residual)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
            return FPROP.run(*args, residual, relu)
    y = _Conv2d.apply(*args) if plain else FPROP.op(*args)
    if residual is not None:
        check_residual(residual, x, y.shape)
        y = y + residual
    return y.relu() if relu else y


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """autocast's own rule: floating tensors but float64 are cast."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
