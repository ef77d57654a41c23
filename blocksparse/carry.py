"""What moves along when the elements of a parameter move: its gradient, and what an optimizer keeps for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .pattern import BSRPattern

# ---------------------------------------------------------------- the state of an optimizer


@dataclass(frozen=True)
class OptimizerTensor:
    """One tensor that an optimizer keeps for the elements of a parameter: `state[name]`.

    state    the optimizer's dictionary for this parameter
    reduced  axes over which it holds one number for all elements of the parameter (length 1 there); (): one an element
    fresh    what the optimizer itself starts such a tensor with
    """

    state: dict[str, Any]
    name: str
    reduced: tuple[int, ...]
    fresh: float

    @property
    def tensor(self) -> Tensor:
        return self.state[self.name]


def optimizer_tensors(
    optimizer: Optimizer, parameter: Tensor, who: str = "optimizer_tensors()"
) -> list[OptimizerTensor]:
    """What an optimizer keeps for the single elements of a parameter, for callers that move or replace these.

    Momentum, Adam moments and the like have the parameter's shape; statistics over some axes, as Adafactor's factors,
    have length 1 there. Numbers of the parameter as a whole, such as step counters, are not among them: they stay as
    they are. An optimizer inside another one is found (ZeroRedundancyOptimizer: on the rank that holds the state).

    Args:
        optimizer: one that updates `parameter`.
        parameter: whose elements are to move.
        who: the caller, for messages.

    Raises:
        ValueError: state of which nobody can say which element it belongs to: LBFGS's history, matrices over other axes
            (Shampoo), quantized state, nested dictionaries. Nothing has changed then.
    """
    held, found = False, []
    for one in _all_optimizers(optimizer):
        group = _group_of(one, parameter)
        held = held or group is not None
        kind = type(one).__name__
        if group is not None and isinstance(one, torch.optim.LBFGS):
            raise ValueError(
                f"{who}: {kind} keeps one history of all parameters together, which cannot follow single elements; "
                "use another optimizer, or change the pattern without one and make a new LBFGS afterwards"
            )
        if group is not None and getattr(one, "_overlap_with_ddp", False):
            raise ValueError(
                f"{who}: {kind}(overlap_with_ddp=True) keeps parameters and state in the buckets of"
                " DistributedDataParallel; make it without overlap_with_ddp"
            )
        state = getattr(one, "state", {}).get(parameter, {})
        for name, entry in state.items():
            if _is_of_the_whole(entry, parameter):
                continue
            reduced = _reduced(one, name, entry, parameter.shape)
            if reduced is None:
                has = f"of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else ""
                raise ValueError(
                    f"{who}: {kind} keeps {name!r}, a {type(entry).__name__} {has}".rstrip()
                    + f", for a parameter of shape {tuple(parameter.shape)}: which of it belongs to which element is "
                    "not known. Use an optimizer whose state has the parameter's shape; or change the pattern without "
                    "one, and make a new optimizer afterwards"
                )
            found.append(OptimizerTensor(state, name, reduced, _fresh(one, name, group)))
    if not held:
        raise ValueError(f"{who}: the optimizer does not update this parameter; pass the one that does, or None")
    return found


def tensors_of_blocks(optimizer: Optimizer, values: Tensor, shape: tuple[int, ...], who: str) -> list[OptimizerTensor]:
    """optimizer_tensors() of values [nnzb, bk, bc] that are to take `shape`: all can be moved block by block."""
    found = optimizer_tensors(optimizer, values, who)
    for part in found:
        if 0 in part.reduced:
            raise ValueError(
                f"{who}: {type(optimizer).__name__} keeps {part.name!r} of shape {tuple(part.tensor.shape)} for all"
                f" blocks of values {tuple(values.shape)} together, which cannot follow single ones; use another"
                " optimizer, or change the pattern without one and make a new one afterwards"
            )
    for one in _all_optimizers(optimizer):
        if shape != tuple(values.shape) and getattr(one, "parameters_as_bucket_view", False):
            raise ValueError(
                f"{who}: {type(one).__name__}(parameters_as_bucket_view=True) has values {tuple(values.shape)} in a"
                f" bucket, where {shape} have no room; make it without parameters_as_bucket_view"
            )
    return found


def _all_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer and those that it wraps."""
    found = [optimizer]
    for one in found:
        for inner in vars(one).values():
            for candidate in inner if isinstance(inner, list | tuple) else [inner]:
                if isinstance(candidate, Optimizer) and not any(candidate is known for known in found):
                    found.append(candidate)
    return found


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    groups = getattr(optimizer, "param_groups", ())
    return next((group for group in groups if any(p is parameter for p in group["params"])), None)


def _is_of_the_whole(entry: Any, parameter: Tensor) -> bool:
    """Whether an entry of the state is one number (or name, or nothing) for the whole parameter."""
    if isinstance(entry, Tensor):
        return type(entry) is Tensor and entry.shape != parameter.shape and entry.shape in ((), (1,))
    return entry is None or isinstance(entry, bool | int | float | str)


def _reduced(optimizer: Optimizer, name: str, entry: Any, shape: torch.Size) -> tuple[int, ...] | None:
    """The axes over which `entry` holds one number for all elements of a parameter; None: it is not of elements."""
    if not isinstance(entry, Tensor) or type(entry) not in (Tensor, nn.Parameter) or entry.dim() != len(shape):
        return None
    if isinstance(optimizer, torch.optim.Adafactor) and name in ("row_var", "col_var"):
        # By name: where the parameter itself has length 1 there, its shape does not tell.
        axis = len(shape) - (1 if name == "row_var" else 2)
        return (axis,) if entry.shape == (*shape[:axis], 1, *shape[axis + 1 :]) else None
    if entry.shape == shape:
        return ()
    if entry.is_floating_point() and all(n in (1, whole) for n, whole in zip(entry.shape, shape, strict=True)):
        return tuple(axis for axis, n in enumerate(entry.shape) if n != shape[axis])
    return None


def _fresh(optimizer: Optimizer, name: str, group: dict[str, Any] | None) -> float:
    if group is not None and isinstance(optimizer, torch.optim.Rprop) and name == "step_size":
        return float(group["lr"])
    if group is not None and isinstance(optimizer, torch.optim.Adagrad) and name == "sum":
        return float(group["initial_accumulator_value"])
    return 0.0


# ---------------------------------------------------------------- writing


@contextmanager
def ordinary_tensors(like: Tensor | None = None) -> Iterator[None]:
    """No gradients are recorded, and new tensors can be trained even where the caller is in torch.inference_mode().

    Parameters that are inference tensors themselves, as `like` may be, stay so.
    """
    with torch.inference_mode(like is not None and like.is_inference()), torch.no_grad():
        yield


def written(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new`, in the memory of `old` where it fits."""
    return old.copy_(new) if old is not None and new is not None and old.shape == new.shape else new


# ---------------------------------------------------------------- blocks move


class Carrier:
    """Lays tensors over the blocks of `old` out over those of `new`.

    Called with t [nnzb, bk, bc] it gives [nnzb', bk', bc'], `fresh` in cells that `old` does not store. `reduced`: axes
    1 or 2 of which t holds a mean, of length 1; where blocks are cut anew, the new one is the mean of what its cells
    had.
    """

    def __init__(self, old: BSRPattern, new: BSRPattern) -> None:
        self._old, self._new = old, new
        order, new_order = old.row_order, new.row_order
        same_rows = (order is None) == (new_order is None) and (
            order is None or new_order is None or torch.equal(order, new_order)
        )
        self._at: Tensor | None = None
        if old.blocksize == new.blocksize and same_rows:
            keys, new_keys = _block_keys(old), _block_keys(new)
            if old.nnzb == 0:
                self._at, self._absent = new_keys, torch.ones_like(new_keys, dtype=torch.bool)
            else:
                self._at = torch.searchsorted(keys, new_keys).clamp_(max=old.nnzb - 1)
                self._absent = keys[self._at] != new_keys
            self._absent = self._absent[:, None, None]
        else:
            self._absent = ~new.values_from_dense(old.to_mask())

    def __call__(self, t: Tensor, fresh: float = 0.0, reduced: tuple[int, ...] = ()) -> Tensor:
        if self._at is not None:
            if self._old.nnzb == 0:
                return t.new_full((self._new.nnzb, *t.shape[1:]), fresh)
            return t.index_select(0, self._at).masked_fill_(self._absent, fresh)
        cells = t.expand(self._old.nnzb, *self._old.blocksize)
        moved = self._new.values_from_dense(self._old.to_dense(cells)).masked_fill_(self._absent, fresh)
        return moved.mean(reduced, keepdim=True) if reduced else moved


def _block_keys(pattern: BSRPattern) -> Tensor:
    """One ascending int64 per stored block: its number in the full grid of blocks."""
    _, c, r, s = pattern.shape
    return pattern._tables.rows.long() * (r * s * (c // pattern.blocksize[1])) + pattern.indices


# ---------------------------------------------------------------- optimizers that were not told

_untold = WeakTensorKeyDictionary()  # parameter -> shapes that it had
_handle: RemovableHandle | None = None


def expect_untold(parameter: Tensor) -> None:
    """A parameter is about to take another shape, and no optimizer is told.

    From now on, until an optimizer has stepped with state of the new shape, one that still has state of an old shape
    raises a sentence at its next step, before anything is updated. PyTorch raises a size mismatch there, or, in its
    fused optimizers, writes beyond the state's memory.
    """
    global _handle
    _untold.setdefault(parameter, set()).add(parameter.shape)
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_refuse_stale)


def _refuse_stale(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _handle
    if torch.compiler.is_compiling():
        return
    for parameter, shapes in list(_untold.items()):
        fits = False
        for name, had, needs in _kept(optimizer, parameter, shapes):
            if needs is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step(): {name!r} has shape {had}; the parameter needs {needs} since "
                    "set_pattern() or load_state_dict() gave it other blocks, of which this optimizer was not told. "
                    "set_pattern(new, optimizer) carries its state along; otherwise make a new optimizer"
                )
            fits = True
        if fits:
            del _untold[parameter]
    if not len(_untold) and _handle is not None:
        _handle.remove()
        _handle = None


def _kept(
    optimizer: Optimizer, parameter: Tensor, shapes: set[torch.Size]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
    """(name, shape, shape that it needs) of what an optimizer keeps for a parameter; None: it fits.

    What is of none of the parameter's shapes, now or before, is not judged.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        every = optimizer.param_groups[0]["params"]
        history = optimizer.state.get(every[0], {}).get("d") if _group_of(optimizer, parameter) else None
        elements = (sum(p.numel() for p in every),)
        if isinstance(history, Tensor):
            yield "d", tuple(history.shape), None if history.shape == elements else elements
        return
    for name, entry in getattr(optimizer, "state", {}).get(parameter, {}).items():
        if not isinstance(entry, Tensor) or _is_of_the_whole(entry, parameter):
            continue
        reduced = _reduced(optimizer, name, entry, parameter.shape)
        if reduced is not None and 0 not in reduced:  # state of a single block before is none of all blocks now
            yield name, tuple(entry.shape), None
        elif any(_reduced(optimizer, name, entry, shape) is not None for shape in shapes):
            yield name, tuple(entry.shape), tuple(parameter.shape)
