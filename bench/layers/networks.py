"""Which convolutions are measured: the layers of three networks, and layers given by their numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One convolution without groups or dilation, and how often its network holds it."""

    net: str
    name: str
    k: int
    c: int
    kernel: Pair
    stride: int
    padding: Pair
    size: Pair  # H, W of the input
    count: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(K, C, R, S)."""
        return self.k, self.c, *self.kernel

    @property
    def output_size(self) -> Pair:
        """P, Q."""
        (h, w), (r, s), (top, left) = self.size, self.kernel, self.padding
        return (h + 2 * top - r) // self.stride + 1, (w + 2 * left - s) // self.stride + 1

    @property
    def weights(self) -> int:
        return self.k * self.c * self.kernel[0] * self.kernel[1]

    @property
    def full_name(self) -> str:
        return self.name if self.net == CHOSEN else f"{self.net}.{self.name}"

    def x_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.c, *self.size

    def y_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.k, *self.output_size

    def flops(self, batch: int, weights: int | None = None) -> int:
        """Of fprop, dgrad or wgrad alike, with `weights` non-zero weights (default: all of them)."""
        p, q = self.output_size
        return 2 * batch * p * q * (self.weights if weights is None else weights)

    def __str__(self) -> str:
        (r, s), (h, w) = self.kernel, self.size
        return f"{self.c}->{self.k} {r}x{s} stride {self.stride} on {h}x{w}"


CHOSEN = "chosen layers"  # the network of layers that were asked for one by one


def _conv(net: str, name: str, c: int, k: int, kernel: int, stride: int, size: int) -> Layer:
    pad = kernel // 2
    return Layer(net, name, k, c, (kernel, kernel), stride, (pad, pad), (size, size))


def _merged(convs: Iterable[Layer]) -> list[Layer]:
    """Equal convolutions once, under the name of the first, with their count."""
    unique: dict[Layer, Layer] = {}
    for conv in convs:
        key = replace(conv, name="")
        seen = unique.get(key)
        unique[key] = replace(seen, count=seen.count + 1) if seen else conv
    return list(unique.values())


def resnet50() -> list[Layer]:
    """All 53 convolutions of torchvision's ResNet-50 at 224x224: in a strided block the 3x3 takes the stride.

    layerL.0.* exist in the first block of stage L only; 1x1in narrows, 1x1out widens, skip is the projection.
    """
    net, convs, c, size = "resnet50", [_conv("resnet50", "stem", 3, 64, 7, 2, 224)], 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            name, first = f"layer{stage}.", "0." if block == 0 else ""
            convs.append(_conv(net, f"{name}{first}1x1in", c, width, 1, 1, size))
            strided = "0." if stride == 2 else ""
            convs.append(_conv(net, f"{name}{strided}3x3", width, width, 3, stride, size))
            convs.append(_conv(net, f"{name}1x1out", width, 4 * width, 1, 1, size // stride))
            if block == 0:
                convs.append(_conv(net, f"{name}0.skip", c, 4 * width, 1, stride, size))
            c, size = 4 * width, size // stride
    return _merged(convs)


def resnet32() -> list[Layer]:
    """All 33 convolutions of ResNet-32 of twice the width, on 32x32 images: WideResNet-32-2 in the HRBP paper.

    Stages of 32, 64 and 128 filters, each five blocks of two 3x3 convolutions;
    1x1 projections where shapes change.
    """
    net, convs, c, size = "resnet32", [_conv("resnet32", "stem", 3, 32, 3, 1, 32)], 32, 32
    for stage, width in enumerate((32, 64, 128), start=1):
        for block in range(5):
            stride = 2 if stage > 1 and block == 0 else 1
            name, strided = f"layer{stage}.", "0." if stride == 2 else ""
            convs.append(_conv(net, f"{name}{strided}3x3", c, width, 3, stride, size))
            convs.append(_conv(net, f"{name}3x3", width, width, 3, 1, size // stride))
            if stride == 2:
                convs.append(_conv(net, f"{name}0.skip", c, width, 1, stride, size))
            c, size = width, size // stride
    return _merged(convs)


def vgg19() -> list[Layer]:
    """All 16 convolutions of VGG-19 on 32x32 images: 3x3, stride 1, 2x2 max-pooling after each of five blocks."""
    net, convs, c, size = "vgg19", [], 3, 32
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)), start=1):
        for _ in range(depth):
            first = "0." if c != width else ""
            name = "stem" if c == 3 else f"block{block}.{first}3x3"
            convs.append(_conv(net, name, c, width, 3, 1, size))
            c = width
        size //= 2
    return _merged(convs)


NETS = {"resnet50": resnet50, "resnet32": resnet32, "vgg19": vgg19}


def parse_layer(spec: str) -> list[Layer]:
    """The layers that `spec` names: a network (all but its stem), one layer of it, or C,K,R,stride,H.

    R may be RxS and H may be HxW; padding is R//2, S//2.

    Raises:
        ValueError: `spec` is none of these; the message lists what is.
    """
    if spec in NETS:
        return [layer for layer in NETS[spec]() if layer.name != "stem"]
    if "," in spec:
        return [_custom(spec)]
    net, _, name = spec.partition(".")
    if net in NETS:
        return [_named(net, name, spec)]
    raise ValueError(
        f"layer {spec!r}: it needs a network ({', '.join(NETS)}), one layer of it (resnet50.layer2.3x3;"
        " --list shows all), or five numbers C,K,R,stride,H (64,64,3,1,56)"
    )


def _named(net: str, name: str, spec: str) -> Layer:
    layers = {layer.name: layer for layer in NETS[net]()}
    if name in layers:
        return replace(layers[name], net=CHOSEN, name=spec, count=1)
    near = difflib.get_close_matches(name, layers, n=1)
    hint = f"; did you mean {net}.{near[0]}?" if near else ""
    raise ValueError(f"layer {spec!r}: {net} has {', '.join(layers)}{hint}")


def _custom(spec: str) -> Layer:
    numbers = r"(\d+),(\d+),(\d+)(?:x(\d+))?,(\d+),(\d+)(?:x(\d+))?"
    match = re.fullmatch(numbers, spec.replace(" ", ""))
    if match is None:
        raise ValueError(f"layer {spec!r}: it needs C,K,R,stride,H or C,K,RxS,stride,HxW, such as 64,64,3,1,56")
    c, k, r, s, stride, h, w = (int(v) for v in match.groups(default="-1"))
    s, w = (r if s == -1 else s), (h if w == -1 else w)
    if 0 in (c, k, r, s, stride, h, w):
        raise ValueError(f"layer {spec!r}: every number needs to be at least 1")
    layer = Layer(CHOSEN, spec, k, c, (r, s), stride, (r // 2, s // 2), (h, w))
    if min(layer.output_size) < 1:
        raise ValueError(f"layer {spec!r}: the {r}x{s} kernel is larger than the padded {h}x{w} input")
    return layer
