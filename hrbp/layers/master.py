"""Layers that train a dense weight and compute with a part of it.

The weights that are left out get gradients as if they took part (straight-through estimator), so that they may come
back: training methods as SR-STE and SUBP need such a master weight. It costs the memory of a dense layer, in gradients
and optimizer state, too, and the time of a dense weight gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import BSRPattern, IndexedModule, bank_shape, conv1d, conv2d, linear, symmetric_padding

from ..structures.base import Selection, Structure
from .dense_conv import masked_conv
from .gradients import _StraightThrough, _StraightThroughForward, with_dense_gradient
from .in_groups import in_groups
from .semi_training import semi_product
from .twin import twin

CONFIGURATION = (
    "rule",
    "sparsity",
    "backend",
    "blocksize",
    "nnzb",
    "semi",
)  # attributes of a layer with a master weight


class Master(IndexedModule):
    """The base of these layers: which part of the weight takes part, and how.

    rule       the mask follows the weight: at any time it is what this structure keeps of |weight| at `sparsity`, and
               the layer computes with a masked copy of the weight; None: it is the buffer `mask`, until `set_selection`
               changes it
    blocksize  (bk, bc) of a layer without a rule: forward and input gradient run on stored blocks, gathered from the
               weight at each forward
    semi       forward and input gradient of a layer with a rule run on 2:4 kernels: see semi_training.py
    """

    weight: nn.Parameter
    mask: Tensor | None
    row_order: Tensor | None
    index: Tensor | None
    rule: Structure | None
    sparsity: float
    blocksize: tuple[int, int] | None
    nnzb: int
    backend: str | None
    semi: bool = False

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(K, C, R, S) of the weight as a filter bank."""
        return bank_shape(self.weight.shape)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def live(self) -> Tensor:
        """The mask, bool [K, C, R, S]: which weights take part."""
        if self.rule is not None:
            return self.rule.mask(self.weight.detach().view(self.weight_shape).abs(), self.sparsity)
        assert self.mask is not None
        return self.mask.view(self.weight_shape).clone()

    def selection(self) -> Selection:
        """What takes part now, in the structure's own blocks."""
        order, blocksize = self.row_order, self.blocksize
        if self.rule is not None:
            blocksize = self.rule.blocksize(self.weight_shape)
            order = self.rule.order(self.weight.detach().view(self.weight_shape).abs())
        assert blocksize is not None
        return Selection(self.live(), blocksize, order)

    @property
    def pattern(self) -> BSRPattern:
        """The blocks that take part, of a layer that has a blocksize; the index is a copy."""
        return self._pattern(self._index().clone())

    @property
    def values(self) -> Tensor:
        """[nnzb, bk, bc]: the weights in those blocks, a copy."""
        return self._stored()[1]

    def set_selection(self, selection: Selection) -> bool:
        """Change which part of the weight takes part. The weight, its gradient and optimizer state stay as they are.

        Args:
            selection: of a mask of the layer's shape, and with the layer's blocksize.

        Returns:
            True when the index kept its memory: as many blocks as before. False: compiled code recompiles and CUDA
            graphs must be made again (the Parameter stays, so DistributedDataParallel need not).

        Raises:
            ValueError: the mask follows the weight, or the selection does not fit; nothing has changed then.
        """
        who = f"{type(self).__name__}.set_selection()"
        if self.rule is not None:
            raise ValueError(f"{who}: the mask follows the weight ({self.rule.name}); it needs a layer with a mask")
        if tuple(selection.mask.shape) != self.weight_shape:
            raise ValueError(f"{who}: the mask has shape {tuple(selection.mask.shape)}; it needs {self.weight_shape}")
        if selection.blocksize != self.blocksize:
            raise ValueError(f"{who}: the selection has blocksize {selection.blocksize}; it needs {self.blocksize}")
        device = self.weight.device
        with self._ordinary_tensors():
            pattern = selection.pattern().grouped(getattr(self, "groups", 1)).to(device)
            if obstacle := self._obstacle(pattern):
                raise ValueError(f"{who}: {obstacle}")
            assert self.mask is not None
            self.mask.copy_(selection.mask.view(self.mask.shape))
            self._set_row_order(selection.row_order)
            return self._adopt(pattern)

    def to_dense(self) -> Any:
        """A plain layer that computes the same: its weight is new, zero where none takes part."""
        plain: Any = twin(self, PLAIN_OF[type(self)])
        for name in ("mask", "row_order", "index"):
            del plain._buffers[name]
        for name in CONFIGURATION:
            plain.__dict__.pop(name, None)
        plain._non_persistent_buffers_set.discard("index")
        with self._ordinary_tensors():
            weight = self.weight.detach() * self.live().view(self.weight.shape)
            plain.weight = nn.Parameter(weight, self.weight.requires_grad)
        return plain

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[safe-super]
        if self.rule is not None:
            semi = ", on 2:4 kernels" if self.semi else ""
            return f"{text}, mask={self.rule.name!r} of |weight|, sparsity={self.sparsity:.4g}{semi}"
        return f"{text}, blocksize={self.blocksize}, nnzb={self.nnzb}"

    # ------------------------------------------------------------------ computing

    def _blocksize(self) -> tuple[int, int]:
        if self.blocksize is None:
            raise ValueError(f"{type(self).__name__}: this layer computes with a mask; it has no blocks")
        return self.blocksize

    def _index(self) -> Tensor:
        assert self.index is not None
        return self.index

    def _pattern(self, index: Tensor) -> BSRPattern:
        groups = getattr(self, "groups", 1)
        return BSRPattern.from_index(self.weight_shape, self._blocksize(), self.nnzb, index, groups)

    def _stored(self) -> tuple[BSRPattern, Tensor]:
        """A pattern around this layer's own index, and its blocks."""
        pattern = self._pattern(self._index())
        return pattern, pattern.values_from_dense(self.weight.detach().view(self.weight_shape))

    def _masked(self) -> Tensor:
        mask = self.live().view(self.weight.shape)
        straight = _StraightThrough if torch.compiler.is_compiling() else _StraightThroughForward
        return straight.apply(self.weight, mask)

    # ------------------------------------------------------------------ changing, moving, loading

    @contextmanager
    def _ordinary_tensors(self) -> Iterator[None]:
        """New tensors can take part in training, even in torch.inference_mode(), unless the weight cannot itself."""
        with torch.inference_mode(self.weight.is_inference()), torch.no_grad():
            yield

    def _adopt(self, pattern: BSRPattern) -> bool:
        """Write a pattern into the index; True when the index kept its memory, as it was equally large."""
        if self._has_room(pattern):
            self._index().copy_(pattern.index)
            return True
        self.nnzb, self.index = pattern.nnzb, pattern.index.clone()
        return False

    def _has_room(self, pattern: BSRPattern) -> bool:
        return self.nnzb == pattern.nnzb and self.index is not None and self.index.shape == pattern.index.shape

    def _obstacle(self, pattern: BSRPattern) -> str | None:
        """Why this layer cannot adopt a pattern, or None."""
        if self._has_room(pattern) or not self._index_is_shared():
            return None
        return (
            "the layer is in shared memory, where its index cannot take another size, and other processes would keep"
            f" the old one: it holds {self.pattern}, and {pattern} was asked for. Change it before share_memory(), or"
            " that of copy.deepcopy(model)"
        )

    def _set_row_order(self, order: Tensor | None) -> None:
        if order is not None and self.row_order is not None:
            self.row_order.copy_(order)
        else:
            self.row_order = None if order is None else order.to(self.weight.device, torch.int64, copy=True)

    def _indexed(self) -> Tensor:
        return self.weight

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
        pattern = None
        mask, order = (state_dict.get(prefix + name) for name in ("mask", "row_order"))
        if self.rule is None and mask is not None:
            try:
                with self._ordinary_tensors():
                    pattern = self._pattern_of(mask, order)
                    assign = local_metadata.get("assign_to_params_buffers", False)
                    if assign and self._index_is_shared():
                        self.index = self._index().clone()  # the shared one stays with the shared mask
                    if obstacle := self._obstacle(pattern):
                        raise ValueError(obstacle)
                    self._set_row_order(order)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if pattern is not None:
            device = self._index().device if self.weight.device.type == "meta" else self.weight.device
            with self._ordinary_tensors():
                self._adopt(pattern.to(device))
                if self._index().device != device:  # load_state_dict(assign=True)
                    self.index = self._index().to(device)

    def _pattern_of(self, mask: Any, order: Any) -> BSRPattern:
        """The blocks of a saved mask."""
        for name, saved in (("mask", mask), ("row_order", order)):
            if saved is not None and not isinstance(saved, Tensor):
                raise TypeError(f"{name} is a {type(saved).__name__}; it needs a torch.Tensor")
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; it needs torch.bool {tuple(self.weight.shape)}"
            )
        if order is not None and order.shape != self.weight.shape[:1]:
            raise ValueError(f"row_order has shape {tuple(order.shape)}; it needs {tuple(self.weight.shape[:1])}")
        pattern = BSRPattern.from_mask(mask.view(self.weight_shape), self._blocksize(), order)
        pattern = pattern.grouped(getattr(self, "groups", 1))
        if not torch.equal(pattern.to_mask().view(mask.shape), mask):
            raise ValueError(f"mask is not made of blocks {self.blocksize}")
        return pattern


class MasterConv2d(Master, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d that trains a dense weight and computes with the part E that is in its mask.

    y = conv(x, E * weight, bias); dL/dweight is that of a dense layer: the gradient with respect to E * weight, not
    masked (Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013).

    `with_master` makes one of a plain layer. Without a rule, y and dL/dx are computed on the stored blocks alone and
    the layer is differentiable once.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.rule is not None:
            weight = self._masked()
            return semi_product(self, input, weight) if self.semi else masked_conv(self, input, weight)
        pattern, values = self._stored()
        conv = self.stride, symmetric_padding(self), self.dilation
        y = conv2d(input, values, pattern, self.bias, *conv, backend=self.backend)
        return with_dense_gradient(y, input, self.weight, (*conv, self.groups))


class MasterConv1d(Master, nn.Conv1d):  # type: ignore[misc]
    """nn.Conv1d that trains a dense weight and computes with the part E that is in its mask; see MasterConv2d."""

    def forward(self, input: Tensor) -> Tensor:
        if self.rule is not None:
            return masked_conv(self, input, self._masked())
        pattern, values = self._stored()
        conv = self.stride, symmetric_padding(self), self.dilation
        y = conv1d(input, values, pattern, self.bias, *conv, backend=self.backend)
        return with_dense_gradient(y, input, self.weight, (*conv, self.groups))


class MasterLinear(Master, nn.Linear):  # type: ignore[misc]
    """nn.Linear that trains a dense weight and computes with the part E that is in its mask; see MasterConv2d."""

    def forward(self, input: Tensor) -> Tensor:
        if self.rule is not None:
            weight = self._masked()
            return semi_product(self, input, weight) if self.semi else nn.functional.linear(input, weight, self.bias)
        pattern, values = self._stored()
        return with_dense_gradient(
            linear(input, values, pattern, self.bias, backend=self.backend), input, self.weight, None
        )


MASTER: dict[type[nn.Module], type[Master]] = {
    nn.Conv2d: MasterConv2d,
    nn.Conv1d: MasterConv1d,
    nn.Linear: MasterLinear,
}
PLAIN_OF = {master: plain for plain, master in MASTER.items()}


def with_master(
    layer: nn.Module, selection: Selection | None = None, *, rule: Structure | None = None, sparsity: float = 0.0,
    backend: str | None = None,
) -> Any:  # fmt: skip
    """A layer of MASTER with the weight of a plain one, the same Parameter.

    Args:
        layer: nn.Conv2d, nn.Conv1d or nn.Linear.
        selection: the part that takes part, in blocks, until the new layer's `set_selection`.
        rule, sparsity: instead of a selection: what this structure keeps of |weight|, a new mask in every forward.
        backend: of the blocks, as in blocksparse.conv2d.
    """
    made: Any = twin(layer, MASTER[type(layer)])
    device, groups = made.weight.device, getattr(made, "groups", 1)
    with torch.inference_mode(False):  # what a forward in training may use
        pattern = None if selection is None else selection.pattern().grouped(groups).to(device)
        mask = None if selection is None else selection.mask.view(made.weight.shape).to(device, copy=True)
        order = (
            None if selection is None or selection.row_order is None else selection.row_order.to(device, torch.int64)
        )
    made.rule = None if rule is None else in_groups(rule, groups)
    made.sparsity, made.backend = sparsity, backend
    made.blocksize, made.nnzb = (None, 0) if pattern is None else (pattern.blocksize, pattern.nnzb)
    made.register_buffer("mask", mask)
    made.register_buffer("row_order", order)
    made.register_buffer("index", None if pattern is None else pattern.index, persistent=False)
    return made
