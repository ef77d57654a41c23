"""A module's buffer `index` follows the tensor that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class IndexedModule(nn.Module):
    """A module with a buffer `index`, the packed index of a BSRPattern, that follows one of its tensors.

    To another device it goes with its content, on the meta device the content stays, a change of dtype leaves it as it
    is, and it is in shared memory where the tensor is. A kernel must never meet index entries that nobody checked, nor
    another process values under a foreign index.
    """

    index: Tensor | None

    def _indexed(self) -> Tensor:
        """The tensor that the index is about."""
        raise NotImplementedError

    def _index_is_shared(self) -> bool:
        return self.index is not None and _is_shared(self.index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        index = self._buffers.pop("index")
        try:
            super()._apply(fn, recurse)
        finally:
            owner = self._indexed()
            if index is not None and owner.device.type != "meta":
                index = index.to(owner.device)
                if _is_shared(owner) != _is_shared(index):  # share_memory(), or its end
                    index = index.share_memory_() if _is_shared(owner) else index.clone()
            self._buffers["index"] = index
        return self


def _is_shared(t: Tensor) -> bool:
    """Whether t is in memory that other processes may have, too; on a GPU nobody can tell."""
    return t.device.type == "cpu" and t.is_shared()
