"""Derivatives of ops, recorded as PyTorch does: for one level at a time, in backward and forward mode; and who watches.

Every product is linear in each of its two tensors: forward-mode derivatives are products again. PyTorch's
register_autograd knows backward mode alone and gives zeros for the other, hence kernels for the Autograd keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

# False of a tensor that stands for others: in a transform, batched, or one that has got out of a transform, as those
# that torch.func.vjp keeps for its backward.
has_storage = torch._C._has_storage


def hashable(args: Sequence[Any]) -> list[Any]:
    """Arguments as the dispatcher passes them, lists of ints turned back into tuples."""
    return [tuple(arg) if isinstance(arg, list) else arg for arg in args]


# forward_ad.unpack_dual without its cost. Its level is 0 wherever there is one: nested levels are torch.func's alone.
_unpack_dual = torch._VF._unpack_dual


class Level(NamedTuple):
    """What a call of an op is in the midst of: the keys of the dispatcher, and which derivatives are recorded."""

    keyset: Any
    backward: bool
    forward: bool


class Bilinear(torch.autograd.Function):
    """The derivatives of bsrconv::dgrad and wgrad, bilinear in their first two arguments: forward mode alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *args, ctx.op, level = inputs
        ctx.save_for_forward(*args[:2])
        ctx.rest = args[2:]
        ctx.set_materialize_grads(False)
        return below_autograd(ctx.op, level, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "conv2d() is differentiable once: its gradients (conv2d_dgrad, conv2d_wgrad) have no gradient of their own."
            " Where second derivatives are needed, use F.conv2d with pattern.to_dense(values)"
        )

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *rest: None) -> Tensor:
        with outer_levels():
            a, b = map(primal, ctx.saved_tensors)
            parts = [] if da is None else [ctx.op(da, b, *ctx.rest)]
            parts += [] if db is None else [ctx.op(a, db, *ctx.rest)]
            return sum(parts[1:], parts[0])


def outer_levels() -> Any:
    """Forward mode, which PyTorch ends for a jvp: other levels of torch.func.jvp go on."""
    return forward_ad._set_fwd_grad_enabled(True)


def primal(t: Tensor) -> Tensor:
    """A tensor without the tangent of the innermost level."""
    return _unpack_dual(t, level=0)[0]


def below_autograd(op: Any, level: Level, args: Sequence[Any]) -> Tensor:
    """The op itself, or for the next level of torch.func's transforms: with the modes that Function.apply has ended."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return op.redispatch(level.keyset & torch._C._after_autograd_keyset, *args)
        with torch.set_grad_enabled(level.backward), forward_ad._set_fwd_grad_enabled(level.forward):
            return op.redispatch(level.keyset & torch._C._after_autograd_keyset, *args)


def differentiable(function: type[torch.autograd.Function], op: Any) -> Callable[..., Tensor]:
    """What the Autograd keys run: `function` for one level of differentiation.

    The dispatcher comes here once for every level of torch.func's transforms, so that the function must not take care
    of these itself, as Function.apply does: hence the apply of its parent.
    """
    count = len(op._schema.arguments)

    def kernel(keyset: Any, *args: Any) -> Tensor:
        level = Level(keyset, torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
        if not _differentiated(level, args):
            return below_autograd(op, level, args)
        args = (*hashable(args), *[None] * (count - len(args)))  # the dispatcher drops a backend that is None
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, function).apply(*args, op, level)  # type: ignore[misc]

    return kernel


def _differentiated(level: Level, args: Sequence[Any]) -> bool:
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


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but these ordinary tensors is there: no compiler, mode, transform, trace or profiler."""
    return is_eager(*tensors) and not torch.autograd._profiler_enabled()  # which torch.compile cannot follow


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors that are computed now: no compiler, mode, transform or trace."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return all(t is None or (type(t) in _PLAIN and not t.is_meta and has_storage(t)) for t in tensors)
