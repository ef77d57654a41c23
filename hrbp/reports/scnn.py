"""Memory references of a machine like SCNN: weights, indices, inputs and partial sums, for each kind of grain.

SCNN (Parashar et al., ISCA 2017) holds a few activations of one input channel and multiplies each with every weight of
that channel; the products are scattered to accumulators, a memory. Mao et al., Exploring the Regularity of Sparse
Structure in Convolutional Neural Networks (2017), count on such a machine that coarse grains save about half of the
references: the weights of a grain share an index, and products of a grain that fall into the same output are added up
before the accumulator is touched. That much is theirs. The count below is this library's own, written down in full; it
simulates neither paper's hardware, and its numbers are not to be compared with theirs.

A vector is `VECTOR` neighbours in a row of an input channel (the last of a row may be shorter). A record is a grain and
its index, as `Stream` stores it. Activations are taken as dense. For one image, with V vectors in an input channel:

        values   = V * (weights of all records, those of fillers included)
        indices  = V * (indices of all records, and the entries of lists that stand before them)
        inputs   = H * W * (channels that are read), where records are of one channel: a vector stays for all of them
                   H * W * (channels of each record, added up), where products of several channels are added up first,
                   of grains of several channels and of groups of HRBP: each record fetches its own
        sums     = over vectors and records, the different outputs that the products of the two fall into

An output counts once for each filter of the grain; it is one reference, read and written in one go. The channels of a
grain, and all channels of a group of HRBP, are gone through one after the other at the same place of the image, and
their products are added up first. Products that fall outside the output, between its strides for instance, write
nothing, and neither do fillers, whose weights are zero. With taps (i, j) in T_i of row i, stride t, padding p and
dilation d, the outputs that a grain meets along the rows and along the columns are independent:

        sums of a grain = filters * sum over i of  #{y: t | y + p - i*d, inside}
                          * sum over vectors of  #{ox: t*ox = x + p - j*d for an x of the vector and a j in T_i, inside}
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse import symmetric_padding

from ..structures.base import Selection
from .mask_report import records
from .model_report import layers_of
from .model_summary import inputs_of
from .stream import References

VECTOR = 4  # activations that SCNN's multipliers take at a time


@dataclass(frozen=True)
class Window:
    """How a layer slides over an image, rows first: sizes of input and output, stride, padding, dilation.

    times  how often it does so for one image: a linear layer runs once for every vector it is given
    """

    image: tuple[int, int]
    out: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    times: int = 1

    def outputs(self, taps: Iterable[tuple[int, int]], vector: int = VECTOR) -> int:
        """The different outputs that products with these taps fall into, vector by vector, added up."""
        in_row: dict[int, set[int]] = {}
        for row, column in taps:
            in_row.setdefault(row, set()).add(column)
        width, total = self.image[1], 0
        for row, columns in in_row.items():
            rows = sum(self._meets(0, y, row) is not None for y in range(self.image[0]))
            if rows:
                total += rows * sum(
                    len({self._meets(1, x, j) for x in range(at, min(at + vector, width)) for j in columns} - {None})
                    for at in range(0, width, vector)
                )
        return total

    def _meets(self, axis: int, at: int, tap: int) -> int | None:
        """The output that an input meets with a tap, along one axis; None: none."""
        place, rest = divmod(at + self.padding[axis] - tap * self.dilation[axis], self.stride[axis])
        return place if rest == 0 and 0 <= place < self.out[axis] else None


def scnn_references(mask: Tensor | Selection, window: Window, vector: int = VECTOR) -> References:
    """The references of a layer for one image; see the head of this file.

    Args:
        mask: bool [K, C, R, S], [K, C, S] or [K, C], whose structure is recognised; or a Selection.
        window: how the layer slides.
        vector: activations that are held at a time.
    """
    choice, (bk, bc, br, bs), stream = records(mask)
    kept = choice.mask
    k, _, r, s = kept.shape
    height, width = window.image
    vectors = height * -(-width // vector)
    read = stream.references()
    if choice.grouping is not None:
        taps = [[divmod(tap, s) for tap in of] for of in choice.grouping.taps.tolist()]
        rows = choice.grouping.rows
        sums = sum(rows * window.outputs(of, vector) for of in taps)
        bc, several = 1, True
    else:
        rows = k if stream.index_bits == 0 else bk
        ordered = kept if choice.row_order is None else kept[choice.row_order.long()]
        at = ordered[::bk, ::bc, ::br, ::bs].sum((0, 1))  # records of each box of taps
        if stream.index_bits == 0:
            at = torch.ones_like(at)
        sums = sum(
            rows * int(at[i, j]) * window.outputs(_box(i * br, j * bs, br, bs), vector)
            for i in range(r // br) for j in range(s // bs) if at[i, j]
        )  # fmt: skip
        several = bc > 1
    channels = kept.view(choice.groups, -1, *kept.shape[1:]).any(1).flatten(2).any(2).sum()
    inputs = len(stream.gaps) * bc if several and stream.index_bits else int(channels)
    each = (read.values * vectors, read.indices * vectors, inputs * height * width, sums)
    return References(*(window.times * count for count in each))


def _box(row: int, column: int, rows: int, columns: int) -> list[tuple[int, int]]:
    return [(row + i, column + j) for i in range(rows) for j in range(columns)]


def scnn_of_model(model: nn.Module, shape: Sequence[int], vector: int = VECTOR) -> dict[str, References]:
    """The references of every convolution and linear layer of a model for one image; the model stays as it is.

    Args:
        model: dense or sparse.
        shape: (C, H, W) of an image.
        vector: activations that are held at a time.
    """
    model = copy.deepcopy(model).cpu()
    seen = inputs_of(model, (1, *shape))
    modules = dict(model.named_modules())
    return {
        name: scnn_references(mask, window_of(modules[name], *seen[name]), vector)
        for name, (mask, _) in layers_of(model).items()
        if name in seen
    }


def window_of(module: Any, x: Tensor, y: Tensor) -> Window:
    """How a layer slides over an input, from that and its output; a Conv1d over one row."""
    if not hasattr(module, "stride"):
        return Window((1, 1), (1, 1), times=y.numel() // y.shape[-1])
    stride, padding, dilation = module.stride, symmetric_padding(module), module.dilation
    if x.dim() == 3:  # of a Conv1d
        (width, out), (step, pad, far) = (x.shape[2], y.shape[2]), (stride[0], padding[0], dilation[0])
        return Window((1, width), (1, out), (1, step), (0, pad), (1, far), len(x))
    image, seen = (x.shape[2], x.shape[3]), (y.shape[2], y.shape[3])
    return Window(image, seen, stride, (padding[0], padding[1]), dilation, len(x))
