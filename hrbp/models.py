"""The networks of the papers, at any width: ResNets, VGG-19, MobileNetV1 and V2, and narrow dense baselines."""

from __future__ import annotations

import bisect
import functools
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import any_case
from .files import memory_bytes

SMALL_IMAGE = 64  # up to this size a network meant for 224x224 images starts without its first two reductions
MOST_WIDTH, MOST_CHANNELS = 10_000, 1 << 30  # whose products a 64-bit integer holds
STEPS = 4096  # widths that `narrow` tries between 0 and 1; finer ones build no other networks
GOLDEN = (math.sqrt(5) - 1) / 2


def build(name: str, *, classes: int, width: float = 1.0, image_size: int = 32, channels: int = 3) -> nn.Module:
    """A network with fresh weights (Kaiming normal, He et al. 2015, from torch's global generator).

    | name                         | first layer                                     | source                     |
    |------------------------------|-------------------------------------------------|----------------------------|
    | resnet8, 14, 20, 32, 44, 56  | 3x3; stages of 16, 32, 64 filters, basic blocks | He et al. 2016, sec. 4.2   |
    | resnet18, resnet34, resnet50 | 7x7 stride 2 and pooling; 3x3 on small images   | He et al. 2016, sec. 4.1   |
    | vgg19                        | 3x3; batch norm, one classifier layer           | Wang et al. 2020 (GraSP)   |
    | mobilenetv1                  | 3x3 stride 2; stride 1 on small images          | Howard et al. 2017         |
    | mobilenetv2                  | 3x3 stride 2; stride 1 on small images          | Sandler et al. 2018        |

    'ResNet-32' and 'WRN-32-2' of the HRBP paper are resnet32 with width 2. Where a residual block changes shape a 1x1
    convolution projects. Small images are those of up to 64 pixels. resnet18, 34, 50 and mobilenetv2 at width 1 have
    the state_dict names and shapes of torchvision. Only nn.Conv2d, nn.BatchNorm2d and nn.Linear hold parameters.

    Args:
        name: one of the above, in any case.
        classes: outputs of the classifier.
        width: every channel count is multiplied by it. Fractions round some layers up and others down, so that the
            parameter count grows in small steps with the width.
        image_size: height and width of the images it is meant for; it decides the first layer alone.
        channels: of the images.

    Raises:
        ValueError: an unknown name, or a number that makes no network.
    """
    return _build("build()", name, classes, width, image_size, channels, multiple=1)


def narrow(name: str, parameters: int, *, classes: int, image_size: int = 32, channels: int = 3) -> nn.Module:
    """The dense network `name`, of the width that has as many `parameters`: the baseline of a sparse one.

    Channel counts are multiples of 8, for the sake of its speed, where that comes within 1% of the budget and leaves no
    layer at less than 16 channels; else of 4, 2 or 1. The nearest count is taken: within 1% for the networks here down
    to a twentieth of their published size, within 3% down to a hundredth, as near as whole channels allow below.

    Args:
        parameters: all of them, those of batch norm and classifier included (`parameter_count` of the sparse network).
        name, classes, image_size, channels: as in `build`.

    Raises:
        ValueError: as in `build`, or one channel a layer is more than the budget.
    """
    who = "narrow()"
    budget = _positive(who, "parameters", parameters)

    def sized(multiple: int, step: int) -> tuple[int, int]:
        return _sizes(*_checked(who, name, classes, step / STEPS, image_size, channels), multiple)

    def count(multiple: int, step: int) -> int:
        return sized(multiple, step)[0]

    smallest = count(1, 1)
    if smallest > budget:
        raise ValueError(
            f"{who}: {name} with one channel a layer has {smallest} parameters and the budget is {budget}; keep more"
            " parameters, or take a smaller network"
        )
    best, width, rounding = math.inf, 1.0, 1
    for multiple in (8, 4, 2, 1):
        limit = STEPS
        while count(multiple, limit) <= budget:
            limit *= 2
        above = bisect.bisect(range(limit), budget, lo=1, key=functools.partial(count, multiple))
        for step in {max(above - 1, 1), above}:
            parameters, fewest = sized(multiple, step)
            error = abs(parameters / budget - 1)
            if error < best and (multiple == 1 or fewest >= 2 * multiple):
                best, width, rounding = error, step / STEPS, multiple
        if best <= 0.01:
            break
    return _build(who, name, classes, width, image_size, channels, rounding)


def rebuild(network: dict[str, Any]) -> nn.Module:
    """The network that `build` or `narrow` made, with fresh weights, from the record that they left on it."""
    return _build("rebuild()", **network)


def parameter_count(model: nn.Module) -> int:
    """Number of values that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _checked(
    who: str, name: str, classes: int, width: float, image_size: int, channels: int
) -> tuple[str, int, float, bool, int]:
    """(name, classes, width, whether images are small, channels): what decides the shapes of a network."""
    name = any_case(name, NETWORKS)
    if name not in NETWORKS:
        raise ValueError(f"{who}: name is {name!r}; it needs one of {', '.join(NETWORKS)}")
    if not 0 < width < math.inf:
        raise ValueError(f"{who}: width is {width!r}; it needs a positive number (1 is the published network)")
    classes, channels = _positive(who, "classes", classes), _positive(who, "channels", channels)
    size = _positive(who, "image_size", image_size)
    if name == "vgg19" and size < 16:
        raise ValueError(f"{who}: image_size is {size}; vgg19 halves images four times and needs 16 or more")
    if width > MOST_WIDTH or max(classes, channels) > MOST_CHANNELS:
        raise ValueError(
            f"{who}: width is {width:g}, classes {classes} and channels {channels}; they need at most {MOST_WIDTH},"
            f" {MOST_CHANNELS} and {MOST_CHANNELS}"
        )
    return name, classes, float(width), size <= SMALL_IMAGE, channels


def _made(name: str, classes: int, width: float, small: bool, channels: int, multiple: int) -> nn.Module:
    make, shape = NETWORKS[name]
    return make(*shape, classes, _Widths(width, multiple), small, channels)


@functools.lru_cache(maxsize=4096)
def _sizes(name: str, classes: int, width: float, small: bool, channels: int, multiple: int) -> tuple[int, int]:
    """Parameters of a network, and the filters of its narrowest convolution."""
    with torch.device("meta"):  # shapes alone: no memory, no random numbers
        model = _made(name, classes, width, small, channels, multiple)
    return parameter_count(model), min(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def _network(
    who: str, name: str, classes: int, width: float, image_size: int, channels: int, multiple: int
) -> nn.Module:
    shape = _checked(who, name, classes, width, image_size, channels)
    if torch.get_default_device().type != "meta":
        count, _ = _sizes(*shape, multiple)
        if 4 * count > memory_bytes():
            raise ValueError(
                f"{who}: {shape[0]} with width {width:g} and {classes} classes has {count:,} parameters,"
                f" {4e-9 * count:,.0f} GB; this machine has {1e-9 * memory_bytes():,.0f} GB: lower width or classes"
            )
    return _made(*shape, multiple)


def _build(who: str, name: str, classes: int, width: float, image_size: int, channels: int, multiple: int) -> nn.Module:
    name = any_case(name, NETWORKS)  # as it will be written down
    model = _network(who, name, classes, width, image_size, channels, multiple)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model._hrbp_network = {  # type: ignore[assignment]
        "name": name, "classes": int(classes), "width": float(width), "image_size": int(image_size),
        "channels": int(channels), "multiple": multiple,
    }  # fmt: skip
    return model


def _positive(who: str, name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{who}: {name} is {value!r}; it needs an int of at least 1") from None
    if number < 1:
        raise ValueError(f"{who}: {name} is {value!r}; it needs an int of at least 1")
    return number


class _Widths:
    """Channel counts of a network `width` times as wide, asked for layer after layer.

    widths(base) = multiple * max(1, floor(base * width / multiple + offset)), where every layer has its own offset in
    (0, 1), spread evenly (the golden-ratio sequence). A count that needs no rounding is exact.
    """

    def __init__(self, width: float, multiple: int) -> None:
        self.width, self.multiple, self.offset = width, multiple, 0.5

    def __call__(self, base: int) -> int:
        count = math.floor(base * self.width / self.multiple + self.offset)
        self.offset = (self.offset + GOLDEN) % 1
        return self.multiple * max(1, count)


def _conv(c: int, k: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, k, kernel, stride, kernel // 2, groups=groups, bias=False)


# ---------------------------------------------------------------- residual networks; attribute names are torchvision's


class BasicBlock(nn.Module):
    """y = relu(shortcut(x) + BN(conv3x3(relu(BN(conv3x3(x))))))"""

    expansion = 1

    def __init__(self, c: int, inner: int, k: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(c, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, k, 3), nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(_conv(c, k, 1, stride), nn.BatchNorm2d(k)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """y = relu(shortcut(x) + BN(conv1x1(relu(BN(conv3x3(relu(BN(conv1x1(x)))))))); the 3x3 takes the stride."""

    expansion = 4

    def __init__(self, c: int, inner: int, k: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(c, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, k, 1), nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(_conv(c, k, 1, stride), nn.BatchNorm2d(k)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stages of residual blocks, each half the size and twice the filters of the one before."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        first: int,
        depths: tuple[int, ...],
        classes: int,
        widths: _Widths,
        small: bool,
        channels: int,
    ) -> None:
        super().__init__()
        base, c = first, widths(first)
        reduces = not small and first == 64
        self.conv1 = _conv(channels, c, 7, 2) if reduces else _conv(channels, c, 3)
        self.bn1 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if reduces else nn.Identity()
        self.stages = len(depths)
        for stage, depth in enumerate(depths):
            inner = first * 2**stage
            project, base = base != inner * block.expansion, inner * block.expansion
            k = widths(base) if project else c
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(block(c, widths(inner), k, 2 if stage and not i else 1, project and not i))
                c = k
            self.add_module(f"layer{stage + 1}", blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


# ---------------------------------------------------------------- networks without shortcuts


class VGG(nn.Module):
    """Blocks of 3x3 convolutions with batch norm, 2x2 max-pooling between them, and one linear classifier."""

    def __init__(
        self, blocks: tuple[tuple[int, int], ...], classes: int, widths: _Widths, small: bool, channels: int
    ) -> None:
        super().__init__()
        self.features, c = nn.Sequential(), channels
        for i, (base, depth) in enumerate(blocks):
            if i:
                self.features.append(nn.MaxPool2d(2))
            for _ in range(depth):
                k = widths(base)
                self.features.extend((_conv(c, k, 3), nn.BatchNorm2d(k), nn.ReLU(inplace=True)))
                c = k
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class Separable(nn.Module):
    """y = relu(BN(conv1x1(relu(BN(depthwise3x3(x))))))"""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.depthwise, self.bn1 = _conv(c, c, 3, stride, groups=c), nn.BatchNorm2d(c)
        self.pointwise, self.bn2 = _conv(c, k, 1), nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.depthwise(x)))
        return self.relu(self.bn2(self.pointwise(x)))


class MobileNetV1(nn.Module):
    """Depthwise-separable convolutions: thirteen of them after one ordinary convolution."""

    def __init__(
        self, blocks: tuple[tuple[int, int], ...], classes: int, widths: _Widths, small: bool, channels: int
    ) -> None:
        super().__init__()
        c = widths(32)
        self.conv1, self.bn1 = _conv(channels, c, 3, 1 if small else 2), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential()
        for base, stride in blocks:
            k = widths(base)
            self.blocks.append(Separable(c, k, stride))
            c = k
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class InvertedResidual(nn.Module):
    """y = x + BN(conv1x1(relu6(BN(depthwise3x3(relu6(BN(conv1x1(x))))))); no x where the shape changes.

    The first 1x1 convolution widens by `expansion`, the last one narrows; with expansion 1 the first is left out.
    """

    def __init__(self, c: int, k: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = c * expansion
        self.conv = nn.Sequential()
        if expansion > 1:
            self.conv.append(_conv_bn_relu6(c, inner, 1))
        self.conv.extend((_conv_bn_relu6(inner, inner, 3, stride, groups=inner), _conv(inner, k, 1), nn.BatchNorm2d(k)))
        self.shortcut = stride == 1 and c == k

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.shortcut else y


def _conv_bn_relu6(c: int, k: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(c, k, kernel, stride, groups), nn.BatchNorm2d(k), nn.ReLU6(inplace=True))


class MobileNetV2(nn.Module):
    """Inverted residuals: seventeen of them between an ordinary convolution and a 1x1 one."""

    def __init__(
        self, stages: tuple[tuple[int, int, int, int], ...], classes: int, widths: _Widths, small: bool, channels: int
    ) -> None:
        super().__init__()
        c = widths(32)
        self.features = nn.Sequential(_conv_bn_relu6(channels, c, 3, 1 if small else 2))
        for expansion, base, depth, stride in stages:
            k = widths(base)
            for i in range(depth):
                self.features.append(InvertedResidual(c, k, 1 if i else stride, expansion))
                c = k
        k = widths(1280)
        self.features.append(_conv_bn_relu6(c, k, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(k, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


# (expansion, filters, blocks, stride of the first): Sandler et al., table 2
INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _separable_blocks() -> Iterator[tuple[int, int]]:
    """(filters, stride)"""
    yield from ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2))
    yield from ((512, 1),) * 5
    yield from ((1024, 2), (1024, 1))


NETWORKS: dict[str, tuple[type[nn.Module], tuple]] = {
    **{f"resnet{6 * n + 2}": (ResNet, (BasicBlock, 16, (n, n, n))) for n in (1, 2, 3, 5, 7, 9)},
    "resnet18": (ResNet, (BasicBlock, 64, (2, 2, 2, 2))),
    "resnet34": (ResNet, (BasicBlock, 64, (3, 4, 6, 3))),
    "resnet50": (ResNet, (Bottleneck, 64, (3, 4, 6, 3))),
    "vgg19": (VGG, (((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)),)),
    "mobilenetv1": (MobileNetV1, (tuple(_separable_blocks()),)),
    "mobilenetv2": (MobileNetV2, (INVERTED,)),
}
