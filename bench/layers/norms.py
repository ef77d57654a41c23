"""BatchNorm, sum and ReLU behind the layers of a network, as predicted on a GPU that need not be here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from bench.layers.networks import Layer
from bench.shared.tables import number
from blocksparse.kernels import gpus, norm_cost
from blocksparse.layout import CHANNELS_LAST
from hrbp.columns import columns


@dataclass(frozen=True)
class NormRow:
    """Training, forward and backward, of what follows a convolution: these kernels, and PyTorch's operators."""

    layer: str
    what: str
    shape: tuple[int, int, int, int]
    count: int
    gpu: str
    nbytes: int
    seconds: float
    pytorch_nbytes: int
    pytorch_seconds: float
    predicted: bool = True


def follows(layer: Layer) -> tuple[bool, bool]:
    """Whether a sum, and whether a ReLU, follows the BatchNorm of a layer; a ReLU alone where no name tells."""
    return layer.name.endswith("1x1out"), not layer.name.endswith("skip")


def predict(layers: Iterable[Layer], batch: int, dtype: torch.dtype, gpu_name: str) -> list[NormRow]:
    """A row for each layer; channels_last."""
    gpu, found = gpus.named(gpu_name, "predict()"), []
    for layer in layers:
        residual, relu = follows(layer)
        n, c, h, w = shape = layer.y_shape(batch)
        sizes, size = (n * h * w, c, 1), n * c * h * w * dtype.itemsize
        own, theirs = norm_cost.own(residual, relu), norm_cost.pytorch(residual, relu)
        found.append(
            NormRow(
                layer.full_name, "BatchNorm" + "+sum" * residual + "+ReLU" * relu, shape, layer.count, gpu_name,
                sum(step.tensors for step in own) * size,
                math.fsum(norm_cost.seconds(s, sizes, dtype, CHANNELS_LAST, residual, gpu) for s in own),
                sum(step.tensors for step in theirs) * size,
                math.fsum(norm_cost.pytorch_seconds(s, sizes, dtype, gpu) for s in theirs),
            )
        )  # fmt: skip
    return found


HEAD = ["layer", "behind it", "times", "MB", "PyTorch MB", "predicted us", "PyTorch us", "x PyTorch"]


def lines(rows: Sequence[NormRow]) -> list[str]:
    """The table, each layer once, and their sum, each as often as it occurs."""
    cells = [HEAD]
    for row in rows:
        cells.append([row.layer, row.what, str(row.count), *_numbers([row], once=True)])
    return columns([*cells, ["all", "", "", *_numbers(rows)]], (0, 1)).splitlines()


def _numbers(rows: Sequence[NormRow], once: bool = False) -> list[str]:
    def of(name: str) -> float:
        return math.fsum((1 if once else row.count) * getattr(row, name) for row in rows)

    names = (
        ("nbytes", 1e-6, ".0f"),
        ("pytorch_nbytes", 1e-6, ".0f"),
        ("seconds", 1e6, ".1f"),
        ("pytorch_seconds", 1e6, ".1f"),
    )
    return [
        *(number(of(name), form, scale) for name, scale, form in names),
        number(of("pytorch_seconds") / of("seconds")),
    ]
