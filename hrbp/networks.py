"""The classes of the papers' networks: ResNets, VGG-19, MobileNetV1 and V2."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

GOLDEN = (math.sqrt(5) - 1) / 2


class Widths:
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
        widths: Widths,
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
        self, blocks: tuple[tuple[int, int], ...], classes: int, widths: Widths, small: bool, channels: int
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
        self, blocks: tuple[tuple[int, int], ...], classes: int, widths: Widths, small: bool, channels: int
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
        self, stages: tuple[tuple[int, int, int, int], ...], classes: int, widths: Widths, small: bool, channels: int
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
