"""BSRConv2d, BSRLinear: modules whose parameters are the stored blocks only, and whose pattern may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .functional import apply_linear, convolve
from .geometry import conv_pairs
from .pattern import BSRPattern


class _BSRModule(nn.Module):
    """What the two modules share: values, bias, an index buffer of their own, and how all three change together.

    `index` is this module's copy of the pattern's packed tables. A new pattern of equal nnzb is written into it, into
    `values`, `values.grad` and the optimizer's state in place, so that compiled code and CUDA graphs stay valid.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    index: Tensor

    def __init__(
        self,
        pattern: BSRPattern,
        bias: bool,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.weight_shape = pattern.shape
        self.backend = backend
        device = torch.device(device) if device is not None else pattern.device
        values = torch.empty((pattern.nnzb, *pattern.blocksize), device=device, dtype=dtype)
        self.values = nn.Parameter(values)
        self.bias = nn.Parameter(torch.empty(pattern.shape[0], device=device, dtype=dtype)) if bias else None
        # Rebuilt from the state_dict's indptr and indices, so derived tables are not saved.
        self.register_buffer("index", _own_index(pattern, values.device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan_in), as torch's dense layers; fan_in is the mean number of stored inputs a filter."""
        fan_in = self.values.numel() / self.weight_shape[0]
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no weight: its parameter is `values`, the stored blocks, and to_dense()"
                " makes the dense layer. A parent that computes with its children's weights itself needs them dense"
            )
        return super().__getattr__(name)

    @property
    def pattern(self) -> BSRPattern:
        """The pattern this module runs now (a copy: writing to neither touches the other)."""
        nnzb, bk, bc = self.values.shape
        return BSRPattern.from_index(self.weight_shape, (bk, bc), nnzb, self.index.clone())

    # ------------------------------------------------------------------ a new pattern

    def set_pattern(self, new: BSRPattern, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Change which blocks are stored: blocks in both patterns keep their values, new blocks start at zero.

        The gradient of `values` and, with `optimizer`, every state tensor shaped like it (momentum, Adam moments) are
        carried the same way. `values` stays the same Parameter object.

        Args:
            new: a pattern of the same shape (K, C, R, S).
            optimizer: the optimizer that updates `values`.

        Returns:
            True when everything was written in place: equal nnzb, blocksize and kind of row order. False when tensors
            were reallocated: then compiled code recompiles, and CUDA graphs and DistributedDataParallel wrappers that
            hold the old tensors must be rebuilt.

        Raises:
            ValueError: another shape, or an optimizer that does not hold `values`; nothing has changed then.
        """
        who = f"{type(self).__name__}.set_pattern()"
        if new.shape != self.weight_shape:
            raise ValueError(f"{who}: the pattern has shape {new.shape}; this module needs {self.weight_shape}")
        if optimizer is not None and not any(
            p is self.values for group in optimizer.param_groups for p in group["params"]
        ):
            raise ValueError(
                f"{who}: the optimizer does not update this module's values; pass the one that does, or None"
            )
        old, shape = self.pattern, self.values.shape
        new = new.to(self.values.device)
        carry = _carrier(old, new)
        values = carry(self.values.detach())
        grad = None if self.values.grad is None else carry(self.values.grad)
        state = {} if optimizer is None else optimizer.state.get(self.values, {})
        carried = {name: carry(t) for name, t in state.items() if isinstance(t, Tensor) and t.shape == shape}
        in_place = self._adopt(new)
        with torch.no_grad():
            self.values.copy_(values)
            if grad is not None and in_place and self.values.grad is not None:
                self.values.grad.copy_(grad)
            else:
                self.values.grad = grad
            for name, t in carried.items():
                if in_place:
                    state[name].copy_(t)
                else:
                    state[name] = t
        return in_place

    def _adopt(self, new: BSRPattern) -> bool:
        """Write `new` into this module's index and give `values` its shape; True when both kept their memory.

        Where the shape of `values` changes its content is undefined afterwards and its gradient dropped.
        """
        packed, shape = new.index, (new.nnzb, *new.blocksize)
        same_values, same_index = tuple(self.values.shape) == shape, self.index.shape == packed.shape
        with torch.no_grad():
            if same_values and same_index and self.index.device.type != "meta":
                self.index.copy_(packed)
                return True
            self.index = _own_index(new, self.index.device)
            if not same_values:
                self.values.grad = None
                # A graph that is still alive keeps the node that accumulates gradients of the old shape. Assigning
                # data of another dtype makes autograd drop it; the Parameter object stays the optimizer's.
                other = torch.float32 if self.values.dtype != torch.float32 else torch.float64
                data = self.values.new_empty(shape)
                self.values.data = data.new_empty(0, dtype=other)
                self.values.data = data
            return False

    # ------------------------------------------------------------------ moving, saving, loading

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BSRModule:
        # The index follows `values` from device to device with its content: `to_empty`, the meta device and dtype
        # changes must never leave a kernel with index entries that nobody checked.
        index = self._buffers.pop("index")
        try:
            super()._apply(fn, recurse)
        finally:
            device = self.values.device
            self._buffers["index"] = index if device.type == "meta" or index is None else index.to(device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        pattern = self.pattern
        destination[prefix + "indptr"] = pattern.indptr
        destination[prefix + "indices"] = pattern.indices
        if (order := pattern.row_order) is not None:
            destination[prefix + "row_order"] = order

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
        ours = {name: state_dict.get(prefix + name) for name in ("values", "indptr", "indices", "row_order")}
        needed = [name for name in ("values", "indptr", "indices") if ours[name] is None]
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
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}: {error}")
                return
            self._adopt(pattern.to(self.index.device))
        # The parent knows parameters alone; keys that only this class writes are not unexpected.
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs)
        unexpected_keys.extend(
            key for key in found if key.removeprefix(prefix) not in ("indptr", "indices", "row_order")
        )
        if self.index.device != self.values.device and self.values.device.type != "meta":
            self.index = self.index.to(self.values.device)  # load_state_dict(assign=True)

    def _pattern_of(self, saved: dict[str, Any]) -> BSRPattern:
        values = saved["values"]
        if values.dim() != 3:
            raise ValueError(f"values has shape {tuple(values.shape)}; it needs (nnzb, bk, bc)")
        pattern = BSRPattern(self.weight_shape, values.shape[1:], saved["indptr"], saved["indices"], saved["row_order"])
        if pattern.nnzb != values.shape[0]:
            raise ValueError(f"values has {values.shape[0]} blocks and the index {pattern.nnzb}; they must agree")
        return pattern

    def _describe(self) -> str:
        bk, bc = self.values.shape[1:]
        cells = math.prod(self.weight_shape)
        text = f"blocksize=({bk}, {bc}), nnzb={self.values.shape[0]}, density={self.values.numel() / cells:.4g}"
        text += "" if self.bias is not None else ", bias=False"
        return text + (f", backend={self.backend!r}" if self.backend else "")


class BSRConv2d(_BSRModule):
    """nn.Conv2d whose filter bank is stored as the blocks of a BSRPattern.

    y = conv2d(x, values, pattern, bias, stride, padding, dilation); see blocksparse.conv2d.

    Parameters: `values` [nnzb, bk, bc] and `bias` [K]. Parameters, gradients and optimizer state exist for stored
    blocks only. The module owns a copy of the pattern's index (buffer `index`); its state_dict holds the pattern
    (`indptr`, `indices`, `row_order`) beside the values, and loads into a module with any other pattern of the same
    filter bank: `values` then takes the saved shape.

    Args:
        pattern: which blocks are stored.
        stride, padding, dilation: int or (height, width).
        bias: add a learnable bias [K].
        backend: as in blocksparse.conv2d.
        device: default: the pattern's.
        dtype: default: torch's.
    """

    def __init__(
        self,
        pattern: BSRPattern,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(pattern, bias, backend, device, dtype)
        self.stride, self.padding, self.dilation = conv_pairs(stride, padding, dilation, "BSRConv2d()")

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, pattern: BSRPattern, *, backend: str | None = None) -> BSRConv2d:
        """The stored blocks of `conv` (weights outside the pattern are dropped), on its device and in its dtype.

        Raises ValueError for groups > 1, padding modes other than zeros, and 'same' padding that is not symmetric.
        """
        who = "BSRConv2d.from_dense()"
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{who}: conv is {type(conv).__name__}; it needs an nn.Conv2d")
        if conv.groups != 1:
            raise ValueError(
                f"{who}: conv has groups={conv.groups}; it needs groups=1 (a grouped convolution is a block-diagonal"
                " pattern over the whole filter bank: build that filter bank first)"
            )
        if conv.padding_mode != "zeros":
            raise ValueError(f"{who}: conv has padding_mode={conv.padding_mode!r}; only 'zeros' is supported")
        module = cls(
            pattern, conv.stride, _symmetric_padding(conv, who), conv.dilation, conv.bias is not None,
            backend=backend, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        _copy_dense(module, conv, pattern, conv.weight)
        return module

    def to_dense(self) -> nn.Conv2d:
        """An nn.Conv2d that computes the same, with zeros outside the pattern."""
        k, c, r, s = self.weight_shape
        conv = nn.Conv2d(
            c, k, (r, s), self.stride, self.padding, self.dilation, bias=self.bias is not None,
            device=self.values.device, dtype=self.values.dtype,
        )  # fmt: skip
        return _fill_dense(conv, self, self.pattern.to_dense(self.values.detach()))

    def forward(self, x: Tensor) -> Tensor:
        return convolve(
            x, self.values, self.index, self.bias,
            self.weight_shape, self.stride, self.padding, self.dilation, self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        k, c, r, s = self.weight_shape
        return (
            f"{c}, {k}, kernel_size=({r}, {s}), stride={self.stride}, padding={self.padding},"
            f" dilation={self.dilation}, {self._describe()}"
        )


class BSRLinear(_BSRModule):
    """nn.Linear whose weight [K, C] is stored as the blocks of a BSRPattern of shape (K, C, 1, 1).

    y = x @ W^T + bias on x [..., C]; see blocksparse.linear and BSRConv2d for what is stored, saved and loaded.
    """

    def __init__(
        self,
        pattern: BSRPattern,
        bias: bool = True,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if pattern.shape[2:] != (1, 1):
            raise ValueError(f"BSRLinear(): the pattern has shape {pattern.shape}; it needs (K, C, 1, 1)")
        super().__init__(pattern, bias, backend, device, dtype)

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: BSRPattern, *, backend: str | None = None) -> BSRLinear:
        """The stored blocks of `linear` (weights outside the pattern are dropped), on its device and in its dtype."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"BSRLinear.from_dense(): linear is {type(linear).__name__}; it needs an nn.Linear")
        module = cls(
            pattern, linear.bias is not None,
            backend=backend, device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        _copy_dense(module, linear, pattern, linear.weight[:, :, None, None])
        return module

    def to_dense(self) -> nn.Linear:
        """An nn.Linear that computes the same, with zeros outside the pattern."""
        k, c = self.weight_shape[:2]
        linear = nn.Linear(c, k, bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype)
        return _fill_dense(linear, self, self.pattern.to_dense(self.values.detach())[:, :, 0, 0])

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(x, self.values, self.index, self.bias, self.weight_shape, self.backend)

    def extra_repr(self) -> str:
        k, c = self.weight_shape[:2]
        return f"{c}, {k}, {self._describe()}"


def _own_index(pattern: BSRPattern, device: torch.device) -> Tensor:
    """A copy of the packed tables on `device`; on the meta device the content stays where it is."""
    return pattern.index.clone() if device.type == "meta" else pattern.index.to(device, copy=True)


def _carrier(old: BSRPattern, new: BSRPattern) -> Callable[[Tensor], Tensor]:
    """Lays a tensor [nnzb, bk, bc] over the blocks of `old` out over those of `new`; zeros where `old` has none."""
    order, new_order = old.row_order, new.row_order
    same_rows = (order is None) == (new_order is None) and (
        order is None or new_order is None or torch.equal(order, new_order)
    )
    if old.blocksize != new.blocksize or not same_rows:
        return lambda t: new.values_from_dense(old.to_dense(t))
    if old.nnzb == 0:
        return lambda t: t.new_zeros((new.nnzb, *new.blocksize))
    keys, new_keys = _block_keys(old), _block_keys(new)
    at = torch.searchsorted(keys, new_keys).clamp_(max=old.nnzb - 1)
    absent = (keys[at] != new_keys)[:, None, None]
    return lambda t: t.index_select(0, at).masked_fill_(absent, 0)


def _block_keys(pattern: BSRPattern) -> Tensor:
    """One ascending int64 per stored block: its number in the full grid of blocks."""
    tables = pattern._tables
    _, c, r, s = pattern.shape
    return tables.rows.long() * (r * s * (c // pattern.blocksize[1])) + tables.indices


def _copy_dense(module: _BSRModule, dense: nn.Conv2d | nn.Linear, pattern: BSRPattern, weight: Tensor) -> None:
    with torch.no_grad():
        module.values.copy_(pattern.to(weight.device).values_from_dense(weight))
        if module.bias is not None and dense.bias is not None:
            module.bias.copy_(dense.bias)
            module.bias.requires_grad_(dense.bias.requires_grad)
    module.values.requires_grad_(dense.weight.requires_grad)
    module.train(dense.training)


def _fill_dense(dense: Any, module: _BSRModule, weight: Tensor) -> Any:
    with torch.no_grad():
        dense.weight.copy_(weight)
        if module.bias is not None:
            dense.bias.copy_(module.bias)
            dense.bias.requires_grad_(module.bias.requires_grad)
    dense.weight.requires_grad_(module.values.requires_grad)
    return dense.train(module.training)


def _symmetric_padding(conv: nn.Conv2d, who: str) -> tuple[int, ...]:
    """conv.padding as ints; torch's 'same' pads one more cell at the end when dilation*(kernel - 1) is odd."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError(
                f"{who}: padding 'same' of kernel {conv.kernel_size} at dilation {conv.dilation} is not symmetric;"
                " pad the input yourself and use padding 0"
            )
        return tuple(t // 2 for t in total)
    return tuple(int(p) for p in conv.padding)
