"""2:4 weights packed by PyTorch for CUTLASS, multiplied on a CPU: for machines without sparse tensor cores."""

from __future__ import annotations

from types import ModuleType

import pytest
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let `module` compress weights as CUTLASS reads them, and PyTorch multiply by what is packed in them."""

    def compressed(weight: Tensor) -> Tensor:
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        return SparseSemiStructuredTensorCUTLASS(
            weight.shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
        )

    def product(self, dense: Tensor, *, bias=None, should_transpose_dense=False, **_) -> Tensor:
        out = self.to_dense() @ (dense.t() if should_transpose_dense else dense)
        out = out if bias is None else out + bias[:, None]
        return out.t() if should_transpose_dense else out

    monkeypatch.setattr(module, "to_sparse_semi_structured", compressed)
    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "_mm", product)
