"""Makes the networks of the papers, at any width, and narrow dense baselines of a sparse network's size."""

from __future__ import annotations

import bisect
import functools
import math
import operator
from typing import Any

import torch
from torch import nn

from .arguments import any_case
from .files import memory_bytes
from .networks import NETWORKS, Widths

SMALL_IMAGE = 64  # up to this size a network meant for 224x224 images starts without its first two reductions
MOST_WIDTH, MOST_CHANNELS = 10_000, 1 << 30  # whose products a 64-bit integer holds
STEPS = 4096  # widths that `narrow` tries between 0 and 1; finer ones build no other networks


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
    return make(*shape, classes, Widths(width, multiple), small, channels)


@functools.lru_cache(maxsize=4096)
def _sizes(name: str, classes: int, width: float, small: bool, channels: int, multiple: int) -> tuple[int, int]:
    """Parameters of a network, and the filters of its narrowest convolution."""
    with torch.device("meta"):  # shapes alone: no memory, no random numbers
        model = _made(name, classes, width, small, channels, multiple)
    return parameter_count(model), min(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def _build(who: str, name: str, classes: int, width: float, image_size: int, channels: int, multiple: int) -> nn.Module:
    shape = _checked(who, name, classes, width, image_size, channels)
    meta = torch.get_default_device().type == "meta"
    if not meta and 4 * (count := _sizes(*shape, multiple)[0]) > memory_bytes():
        raise ValueError(
            f"{who}: {shape[0]} with width {width:g} and {classes} classes has {count:,} parameters,"
            f" {4e-9 * count:,.0f} GB; this machine has {1e-9 * memory_bytes():,.0f} GB: lower width or classes"
        )
    model = _made(*shape, multiple)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model._hrbp_network = {  # type: ignore[assignment]
        "name": shape[0], "classes": int(classes), "width": float(width), "image_size": int(image_size),
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
