"""python -m hrbp info: the masks in a file of weights, or the layers of a network."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..columns import columns
from ..formats.weights import layers, read_weights, saved_shape, sparse_layer, sparse_names
from ..models import NETWORKS, build, parameter_count
from ..reports.mask_report import MaskReport, report_mask
from ..reports.model_report import kept_of, table
from ..structures.recognise import stored_blocks
from . import parsing

INFO = """\
Reports the masks (zeros) of the weights in a file, or lists the layers of a network of this library.

  python -m hrbp info pruned.pt
  python -m hrbp info sparse.pt                       a checkpoint of BSR layers
  python -m hrbp info old.pt --like dense.pt          one of an older version; the dense one has its layers' shapes
  python -m hrbp info old.pt --like resnet32 --width 2
  python -m hrbp info resnet50 --classes 1000 --image-size 224
"""

INFO_END = """\
columns
  structure        what is recognised: dense, groups of filters that keep the same channels and taps,
                   filters, channels, kernels, vectors, blocks, element-wise groups, n:m, single weights
  kept%            share of the weights; a layer with up to 1% of zeros and no structure counts as dense
  cover            of groups: groups x channels of each / input channels; below 1 some channels are read by none
  unread%          share of the input channels that no filter reads, where there are such channels
  model%           storage by the model of Mao et al. (2017), 8 bits a weight and 4 an index, relative to dense; over
                   100 the index takes more than the zeros save
  dense, memory, file kB   the dense weight; stored blocks with their index in memory; in a checkpoint
  refs             memory references of an output pixel (weights, index, inputs, partial sums), per dense weight
  rows, cols       most weights of a filter, of an input channel / mean: 1 is even
  dgrad%           share that blocks fill of their bounding rectangles once kernels are rotated and transposed, as
                   the input gradient needs them: 100 is dense
  dgrad n:m        whether an n:m mask is one in the input gradient, too (in NHWC); else the share of m neighbouring
                   filters that keep more than n, or their number K where m does not divide it
Exit status: 0; 2 for a file or an option that cannot be used.
"""


def add_info(commands: parsing.Commands) -> None:
    """The command `info` and its options."""
    parser = commands.add_parser(
        "info", help="which masks a file's weights have; what a network looks like", description=INFO,
        epilog=INFO_END, formatter_class=parsing.AS_WRITTEN,
    )  # fmt: skip
    add = parser.add_argument
    add("file", type=parsing.path, metavar="FILE", help=f"a file of weights, or one of {', '.join(NETWORKS)}")
    add(
        "--like",
        type=parsing.path,
        metavar="FILE",
        help="for BSR layers of files without their shapes (older versions): dense weights or a network that has them",
    )
    add("--width", type=float, default=1.0, help="of a network: times its published channels, default 1")
    add("--classes", type=parsing.positive, default=10, help="of a network, default 10")
    add("--image-size", type=parsing.positive, default=32, help="of a network; it decides its first layer, default 32")
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    """A file's masks, or a network's layers."""
    if (network := _network_named(args.file)) is not None:
        print(_network_table(_build(network, args)))
        return 0
    tensors = read_weights(args.file)
    sparse, plain = sparse_names(tensors), layers(tensors)
    shapes = {} if args.like is None else _shapes(args.like, args)
    reports: dict[str, MaskReport] = {}
    unknown, chance = [], {}  # zeros in dense weights
    for name in _in_order(tensors, [*sparse, *plain]):
        if name in plain:
            weight, whole = plain[name], tensors.get(f"{name}.weight")
            masked = whole is not None and weight.dtype == torch.bool
            kind = whole if whole is not None and masked else weight
            mask = weight if weight.dtype == torch.bool else kept_of(weight)
            if mask.all() and (zeros := int((weight == 0).sum())):
                chance[name] = zeros
            reports[name] = report_mask(mask, dtype=kind.dtype if kind.is_floating_point() else torch.float32)
        elif name in shapes or saved_shape(tensors, name) is not None:
            pattern = sparse_layer(tensors, name, shapes.get(name))
            values = tensors[f"{name}.values" if name else "values"]
            reports[name] = report_mask(stored_blocks(pattern), dtype=values.dtype)
        else:
            unknown.append(name)
    if not reports and not unknown:
        raise ValueError(f"{args.file} has no weights of convolutions or linear layers ([K, C, R, S] or [K, C])")
    if reports:
        print(table(reports))
    if chance:
        listed = ", ".join(f"{name} ({zeros})" for name, zeros in chance.items())
        print(f"\nzeros in dense weights, counted as chance: {listed}")
    if unknown:
        print(("\n" if reports else "") + _unknown_table(tensors, unknown))
    return 0


def _in_order(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """Layer names in the order of the file."""
    place = {name: at for at, name in enumerate(tensors)}

    def first(name: str) -> int:
        return min((at for key, at in place.items() if key == name or key.startswith(f"{name}.")), default=0)

    return sorted(names, key=first)


def _shapes(like: str, args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    if (network := _network_named(like)) is not None:
        return {name: tuple(weight.shape) for name, weight in layers(_build(network, args).state_dict()).items()}
    return {name: tuple(weight.shape) for name, weight in layers(read_weights(like)).items()}


def _unknown_table(tensors: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """BSR layers whose shape is not known: all but the numbers of channels and taps."""
    lines = [["BSR layer", "filters", "blocks", "blocksize", "kB"]]
    for name in names:
        prefix = f"{name}." if name else ""
        values, indptr = tensors[prefix + "values"], tensors[prefix + "indptr"]
        if values.dim() != 3 or indptr.dim() != 1:
            raise ValueError(f"{prefix}values is {tuple(values.shape)}; a BSR layer needs (nnzb, bk, bc)")
        nnzb, bk, bc = values.shape
        parts = (tensors.get(prefix + part) for part in ("values", "indptr", "indices", "row_order"))
        size = sum(t.numel() * t.itemsize for t in parts if t is not None)
        lines.append([name, f"{(len(indptr) - 1) * bk}", f"{nnzb}", f"{bk}x{bc}", f"{size / 1e3:.1f}"])
    return (
        columns(lines)
        + "\nThe file has no shapes of these layers (an older version); --like FILE or --like NETWORK tells."
    )


def _network_named(text: str) -> str | None:
    """The network of this name, in any case; None: it is that of a file."""
    return text.lower() if text.lower() in NETWORKS and not Path(text).exists() else None


def _build(name: str, args: argparse.Namespace) -> torch.nn.Module:
    with torch.device("meta"):  # shapes alone
        return build(name, classes=args.classes, width=args.width, image_size=args.image_size)


def _network_table(model: torch.nn.Module) -> str:
    lines = [["layer", "type", "shape", "parameters"]]
    for name, module in model.named_modules():
        if own := list(module.parameters(recurse=False)):
            shape = "x".join(map(str, own[0].shape))
            lines.append([name, type(module).__name__, shape, f"{sum(p.numel() for p in own):,}"])
    lines.append(["all", "", "", f"{parameter_count(model):,}"])
    return columns(lines, left=(0, 1))
