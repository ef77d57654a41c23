"""A model as an ONNX file, for programs without PyTorch."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.view import sparse_layers
from ..surgery.conversion import densify
from ..wrappers import copied, unwrapped


def export_onnx(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    quiet: bool = False,
    **options: Any,
) -> None:
    """Write a model to an ONNX file, in eval mode, its sparse layers as dense ones with zeros; the model stays.

        hrbp.export_onnx(model, torch.randn(1, 3, 224, 224), "model.onnx", dynamic_shapes={"x": {0: "batch"}})

    ONNX has no operator for stored blocks, so the file is as large, and computes as much, as that of the dense model.
    It prints a line that says so. The sparse operators themselves run in what torch.export.export makes, wherever
    Python has imported blocksparse.

    Args:
        model: sparse or dense; wrappers are looked through.
        x: an input, or a tuple of them.
        path: of the file.
        quiet: print nothing.
        **options: of torch.onnx.export.

    Raises:
        ImportError: the packages that torch.onnx.export needs are not installed.
        ValueError: the model computes what plain layers do not (`fuse`).
    """
    model = unwrapped(model)
    sparse = sparse_layers(model)
    dense = densify(copied(model)).eval()
    try:
        torch.onnx.export(dense, x if isinstance(x, tuple) else (x,), os.fspath(path), **{"verbose": False, **options})
    except ImportError as error:
        raise ImportError(
            f"export_onnx(): torch.onnx.export cannot work here ({error}): pip install onnx onnxscript"
        ) from None
    if sparse and not quiet:
        cells = sum(layer.mask().numel() for layer in sparse.values())
        kept = sum(layer.kept() for layer in sparse.values())
        print(
            f"{os.fspath(path)}: {len(sparse)} sparse layers were written as dense ones, with zeros in the"
            f" {1 - kept / cells:.1%} of their weights that are not stored; it runs in the time of a dense model"
        )
