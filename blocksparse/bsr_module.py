"""What all layers on stored blocks share: values, bias and index, and how they change, move, are saved and loaded."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .carry import Carrier, expect_untold, ordinary_tensors, tensors_of_blocks, written
from .dense_view import HOW, read_only
from .geometry import bank_shape
from .indexed import IndexedModule
from .pattern import BSRPattern, check_is_pattern
from .pattern_checks import integers

SAVED = ("indptr", "indices", "row_order", "weight_shape", "groups")  # what a state_dict has beside the parameters


class BSRModule(IndexedModule):
    """A layer that stores blocks: BSRConv2d, BSRConv1d or BSRLinear.

    It has values, a bias, an index buffer of its own, and changes all three together.

    `index` is this module's copy of the pattern's packed tables. A new pattern of equal nnzb is written into it, into
    `values`, `values.grad` and the optimizer's state in place, so that compiled code and CUDA graphs stay valid.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    index: Tensor
    weight_shape: tuple[int, int, int, int]
    _groups = 1

    def __init__(
        self,
        pattern: BSRPattern,
        bias: bool,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_is_pattern(pattern, f"{type(self).__name__}()")
        super().__init__()
        self.weight_shape = pattern.shape
        self._groups = pattern.groups
        self.backend = backend
        device = torch.device(device) if device is not None else pattern.device
        with ordinary_tensors():
            values = torch.empty((pattern.nnzb, *pattern.blocksize), device=device, dtype=dtype)
            self.values = nn.Parameter(values)
            self.bias = nn.Parameter(torch.empty(pattern.shape[0], device=device, dtype=dtype)) if bias else None
            # Rebuilt from the state_dict's indptr and indices, so derived tables are not saved.
            self.register_buffer("index", _own_index(pattern, values.device), persistent=False)
        self.reset_parameters()
        _modules.add(self)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan_in), as torch's dense layers; fan_in is the mean number of stored inputs a filter."""
        fan_in = self.values.numel() / self.weight_shape[0]
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """The dense weight, zeros outside the pattern: a copy for reading, made anew each time it is asked for.

        Differentiable with respect to `values`. Writing to it raises a TypeError (see DenseWeight).
        """
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            return read_only(self._dense_weight())

    @weight.setter
    def weight(self, value: Any) -> None:
        raise TypeError(f"{type(self).__name__}.weight: {HOW.format(what='another weight')}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise TypeError(f"{type(self).__name__}.weight: {HOW.format(what='another parameter')}")
        super().register_parameter(name, param)

    def _dense_weight(self) -> Tensor:
        nnzb, bk, bc = self.values.shape
        pattern = BSRPattern.from_index(self.weight_shape, (bk, bc), nnzb, self.index, self._groups)
        return pattern.to_dense(self.values).view(self.dense_shape)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the weight of the dense layer that computes the same."""
        return self.weight_shape

    @property
    def pattern(self) -> BSRPattern:
        """The pattern this module runs now (a copy: writing to neither touches the other)."""
        nnzb, bk, bc = self.values.shape
        return BSRPattern.from_index(self.weight_shape, (bk, bc), nnzb, self.index.clone(), self._groups)

    # ------------------------------------------------------------------ the dense layer that computes the same

    def to_dense(self) -> Any:
        """A plain layer that computes the same, with zeros outside the pattern."""
        raise NotImplementedError

    def _take(self, dense: Any, pattern: BSRPattern) -> None:
        """The weights of a dense layer that the pattern stores, its bias, and its mode."""
        weight = dense.weight.reshape(bank_shape(dense.weight.shape))
        with torch.no_grad():
            self.values.copy_(pattern.to(weight.device).values_from_dense(weight))
            if self.bias is not None and dense.bias is not None:
                self.bias.copy_(dense.bias)
                self.bias.requires_grad_(dense.bias.requires_grad)
        self.values.requires_grad_(dense.weight.requires_grad)
        self.train(dense.training)

    def _give(self, dense: Any) -> Any:
        """A dense layer of the same sizes, with this one's weights, bias and mode."""
        with torch.no_grad():
            dense.weight.copy_(self.pattern.to_dense(self.values.detach()).view(self.dense_shape))
            if self.bias is not None:
                dense.bias.copy_(self.bias)
                dense.bias.requires_grad_(self.bias.requires_grad)
        dense.weight.requires_grad_(self.values.requires_grad)
        return dense.train(self.training)

    # ------------------------------------------------------------------ a new pattern

    def set_pattern(self, new: BSRPattern, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Change which blocks are stored: blocks in both patterns keep their values, new blocks start at zero.

        The gradient of `values` moves with them. With `optimizer`, so does its state: momentum, Adam moments and
        everything else of one number an element; what holds one number for a row, a column or the whole of a block
        (Adafactor's factors) goes with its block. New blocks have what the optimizer starts with; numbers of the
        parameter as a whole, such as step counters, stay. `values` stays the same Parameter object.

        Args:
            new: a pattern of the same shape (K, C, R, S); one without groups gets those of this module.
            optimizer: the optimizer that updates `values`. Without it an optimizer's state stays where it is: with as
                many blocks as before it belongs to other blocks from then on, with more or fewer the next
                `optimizer.step()` raises a RuntimeError that says so. Make a new optimizer then.

        Returns:
            True when everything was written in place: equal nnzb, blocksize and kind of row order. False when tensors
            were reallocated: then compiled code recompiles, and CUDA graphs and DistributedDataParallel wrappers that
            hold the old tensors must be rebuilt.

        Raises:
            TypeError: `new` is no BSRPattern.
            ValueError: another shape; an optimizer that does not hold `values`, or keeps state that cannot follow
                blocks (LBFGS, Shampoo); `values` shared with another module, or made by a parametrization; another
                number of blocks while the module is in shared memory. Nothing has changed then.
        """
        who = f"{type(self).__name__}.set_pattern()"
        check_is_pattern(new, who)
        if new.shape != self.weight_shape:
            raise ValueError(f"{who}: the pattern has shape {new.shape}; this module needs {self.weight_shape}")
        new = self._in_groups(new, who)
        if "values" not in self._parameters:
            raise ValueError(
                f"{who}: values is not a parameter of this module but computed from others (weight_norm, prune, ...);"
                " remove that first"
            )
        if obstacle := self._obstacle(new):
            raise ValueError(f"{who}: {obstacle}")
        shape = (new.nnzb, *new.blocksize)
        parts = [] if optimizer is None else tensors_of_blocks(optimizer, self.values, shape, who)
        with ordinary_tensors(self.values):
            new = new.to(self.index.device)
            if self.values.is_meta:
                return self._adopt(new, told=optimizer is not None)
            carry = Carrier(self.pattern, new)
            values, grad = carry(self.values), self.values.grad
            grads = None if grad is None else carry(grad)
            moved = [carry(part.tensor, part.fresh, part.reduced) for part in parts]
            in_place = self._adopt(new, told=optimizer is not None)
            self.values.copy_(values)
            self.values.grad = written(grad, grads)
            for part, t in zip(parts, moved, strict=True):
                part.state[part.name] = written(part.tensor, t)
        return in_place

    def _in_groups(self, pattern: BSRPattern, who: str) -> BSRPattern:
        """A pattern of this module's weight, in its groups."""
        if pattern.groups not in (1, self._groups):
            raise ValueError(f"{who}: the pattern has {pattern.groups} groups; this module needs {self._groups}")
        try:
            return pattern.grouped(self._groups)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from None

    def _obstacle(self, new: BSRPattern) -> str | None:
        """Why this module cannot take over a pattern of its shape, or None."""
        stays = self._has_room(new)
        if not stays and self._index_is_shared():
            return (
                "the module is in shared memory, where values and index cannot take another size, and other processes"
                f" would keep the old ones: it holds {self.pattern}, and {new} was asked for. Change the pattern before"
                " share_memory(), or that of copy.deepcopy(module)"
            )
        for other in list(_modules):
            if self._shares_values(other) and not (stays and other.index.data_ptr() == self.index.data_ptr()):
                if new == self.pattern:
                    return None
                return (
                    f"another {type(other).__name__} has the same values, and would read them under its old pattern."
                    " Give this one values of its own first: module.values ="
                    " nn.Parameter(module.values.detach().clone())"
                )
        return None

    def _shares_values(self, other: BSRModule) -> bool:
        """Whether another module's values are this one's, or in the same memory."""
        if other is self or other._buffers is self._buffers:  # copy.copy() of a module changes along
            return False
        mine, theirs = self._parameters.get("values"), other._parameters.get("values")
        if mine is None or theirs is None or mine is theirs:
            return mine is not None and mine is theirs
        plain = type(mine) is nn.Parameter and type(theirs) is nn.Parameter and mine.device == theirs.device
        return plain and mine.data_ptr() != 0 and mine.data_ptr() == theirs.data_ptr()

    def _has_room(self, new: BSRPattern) -> bool:
        """Whether a pattern can be written over this one in place."""
        return (
            tuple(self.values.shape) == (new.nnzb, *new.blocksize)
            and self.index.shape == new.index.shape
            and self.index.device.type != "meta"
        )

    def _adopt(self, new: BSRPattern, told: bool = False) -> bool:
        """Write `new` into this module's index and give `values` its shape; True when both kept their memory.

        Where the shape of `values` changes its content is undefined afterwards and its gradient dropped. told: an
        optimizer's state is about to change along.
        """
        shape = (new.nnzb, *new.blocksize)
        with ordinary_tensors(self.values):
            if self._has_room(new):
                self.index.copy_(new.index)
                return True
            self.index = _own_index(new, self.index.device)
            if tuple(self.values.shape) != shape:
                if not told:
                    expect_untold(self.values)
                self.values.grad = None
                # A graph that is still alive keeps the node that accumulates gradients of the old shape. Assigning
                # data of another dtype makes autograd drop it; the Parameter object stays the optimizer's.
                other = torch.float32 if self.values.dtype != torch.float32 else torch.float64
                data = self.values.new_empty(shape)
                self.values.data = data.new_empty(0, dtype=other)
                self.values.data = data
            return False

    # ------------------------------------------------------------------ moving, saving, loading

    def _indexed(self) -> Tensor:
        return self.values

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _modules.add(self)  # copies and unpickled ones

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        pattern = self.pattern
        destination[prefix + "indptr"] = pattern.indptr
        destination[prefix + "indices"] = pattern.indices
        if (order := pattern.row_order) is not None:
            destination[prefix + "row_order"] = order
        shape = torch.tensor(self.weight_shape, dtype=torch.int32, device=pattern.device)
        destination[prefix + "weight_shape"] = shape
        if self._groups > 1:
            destination[prefix + "groups"] = torch.tensor([self._groups], dtype=torch.int32, device=pattern.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {name: state_dict.get(prefix + name) for name in ("values", *SAVED)}
        needed = [name for name in ("values", "indptr", "indices") if ours[name] is None]
        if len(needed) == 3 and isinstance(dense := state_dict.get(prefix + "weight"), Tensor):
            name = type(self).__name__
            error_msgs.append(
                f"{prefix}weight is a dense layer's, {tuple(dense.shape)}; this {name} stores blocks, `values`. Load it"
                f" into the dense layer, then {name}.from_dense(layer, pattern); or put in its place"
                " values = module.pattern.values_from_dense(weight), and the pattern's indptr and indices"
            )
            return
        if len(needed) == 3:  # nothing of this layer's blocks: the usual report of missing keys
            missing_keys.extend(prefix + name for name in ("indptr", "indices"))
        elif needed:
            error_msgs.append(
                f"{prefix}: the checkpoint has no {', '.join(needed)}; values and pattern are loaded together or not at"
                " all"
            )
            return
        else:
            try:
                pattern = self._pattern_of(ours)
                pattern = pattern.to(self.index.device)
                if self._index_is_shared() and local_metadata.get("assign_to_params_buffers", False):
                    with ordinary_tensors():  # values of its own: the shared index stays with the shared ones
                        self.index = self.index.clone()
                if obstacle := self._obstacle(pattern):
                    raise ValueError(obstacle)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}: {error}")
                return
            self._adopt(pattern)
        # The parent knows parameters alone; keys that only this class writes are not unexpected.
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs)
        unexpected_keys.extend(key for key in found if key.removeprefix(prefix) not in SAVED)
        if self.index.device != self.values.device and self.values.device.type != "meta":
            with ordinary_tensors(self.values):
                self.index = self.index.to(self.values.device)  # load_state_dict(assign=True)

    def _pattern_of(self, saved: dict[str, Any]) -> BSRPattern:
        if saved["weight_shape"] is not None:  # files of older versions do not have it
            found = tuple(integers(saved["weight_shape"], "weight_shape", "load_state_dict()").tolist())
            if found != self.weight_shape:
                raise ValueError(
                    f"the saved layer has a weight of shape {found}, and this {type(self).__name__} one of"
                    f" {self.weight_shape}; make it from a pattern of the saved shape"
                )
        if saved["weight_shape"] is not None or saved["groups"] is not None:  # else the file does not tell
            groups = saved["groups"]
            number = 1 if groups is None else sum(integers(groups, "groups", "load_state_dict()").tolist())
            if number != self._groups:
                raise ValueError(
                    f"the saved layer has groups={number}, and this {type(self).__name__} groups={self._groups}; make"
                    f" it from pattern.grouped({number})"
                )
        values = saved["values"]
        if not isinstance(values, Tensor):
            kind = f"{type(values).__module__}.{type(values).__name__}".removeprefix("builtins.")
            raise TypeError(f"values is a {kind}; it needs a torch.Tensor (of a numpy array: torch.from_numpy(array))")
        if not values.is_floating_point():
            raise TypeError(f"values has dtype {values.dtype}; it needs floating point")
        if values.dim() != 3:
            raise ValueError(f"values has shape {tuple(values.shape)}; it needs (nnzb, bk, bc)")
        pattern = BSRPattern(self.weight_shape, values.shape[1:], saved["indptr"], saved["indices"], saved["row_order"])
        pattern = pattern.grouped(self._groups)
        if pattern.nnzb != values.shape[0]:
            raise ValueError(f"values has {values.shape[0]} blocks and the index {pattern.nnzb}; they must agree")
        return pattern

    def _describe(self) -> str:
        bk, bc = self.values.shape[1:]
        cells = math.prod(self.weight_shape)
        text = f"blocksize=({bk}, {bc}), nnzb={self.values.shape[0]}, density={self.values.numel() / cells:.4g}"
        text += "" if self.bias is not None else ", bias=False"
        return text + (f", backend={self.backend!r}" if self.backend else "")


_modules: weakref.WeakSet[BSRModule] = weakref.WeakSet()  # all that live, to see which share values


def _own_index(pattern: BSRPattern, device: torch.device) -> Tensor:
    """A copy of the packed tables on `device`; on the meta device the content stays where it is."""
    return pattern.index.clone() if device.type == "meta" else pattern.index.to(device, copy=True)
