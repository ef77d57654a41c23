"""ConvGeometry: the integers of one convolution, N C H W x K R S -> N K P Q, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

KINDS = ("fprop", "dgrad", "wgrad")  # the products: y, dx and dvalues
Pair = tuple[int, int]


def bank_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(K, C, R, S) of the filter bank that a dense layer's weight is.

    [K, C, R, S] of nn.Conv2d is one as it stands; [K, C, S] of nn.Conv1d is (K, C, 1, S), whose images have a height of
    1, and [K, C] of nn.Linear is (K, C, 1, 1). In memory all are the same: weight.view(bank_shape(weight.shape)).
    """
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"bank_shape(): the shape is {tuple(shape)}; it needs [K, C, R, S], [K, C, S] or [K, C]")
    k, c, *kernel = shape
    r, s = (1, 1, *kernel)[-2:]
    return k, c, r, s


def pair(value: int | Sequence[int], name: str, who: str, least: int) -> Pair:
    """`value` as two ints (height, width), each at least `least`; otherwise a ValueError that names it."""
    both = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(both) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in both) or min(both) < least:
        raise ValueError(f"{who}: {name} is {value!r}; it needs an int >= {least}, or two of them (height, width)")
    return both[0], both[1]


def conv_pairs(
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    who: str,
    weight_shape: Sequence[int] = (),
) -> tuple[Pair, Pair, Pair]:
    """(stride, padding, dilation) as pairs, checked; weight_shape: of the filters that padding "same" is for."""
    steps, spread = pair(stride, "stride", who, 1), pair(dilation, "dilation", who, 1)
    if isinstance(padding, str) and weight_shape:
        if padding == "same" and steps != (1, 1):
            raise ValueError(f"{who}: padding 'same' needs stride 1; stride is {stride!r}. Give the padding in numbers")
        rows, columns = named_padding(padding, weight_shape[2:], spread, who)
        return steps, (rows, columns), spread
    return steps, pair(padding, "padding", who, 0), spread  # type: ignore[arg-type]  # a name: refused


def named_padding(name: str, kernel_size: Sequence[int], dilation: Sequence[int], who: str) -> tuple[int, ...]:
    """What padding "same" or "valid" is in numbers; ValueError where "same" pads one cell more at the end."""
    if name not in ("same", "valid"):
        raise ValueError(f"{who}: padding is {name!r}; it needs 'same', 'valid', an int or two of them (height, width)")
    total = [0 if name == "valid" else d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise ValueError(
            f"{who}: padding 'same' of kernel {tuple(kernel_size)} at dilation {tuple(dilation)} is not symmetric;"
            " pad the input yourself and use padding 0"
        )
    return tuple(t // 2 for t in total)


def line_pairs(
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    who: str,
    weight_shape: Sequence[int] = (),
) -> tuple[Pair, Pair, Pair]:
    """conv_pairs of a convolution along a line, whose image has a height of 1: stride, padding, dilation are one int.

    weight_shape: (K, C, 1, S).
    """
    given: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, value in given.items():
        one = value[0] if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1 else value
        number = isinstance(one, int) and not isinstance(one, bool) and one >= (name != "padding")
        if not number and not (name == "padding" and isinstance(one, str)):
            or_name = ", 'same' or 'valid'" if name == "padding" else ""
            raise ValueError(f"{who}: {name} is {value!r}; it needs an int >= {int(name != 'padding')}{or_name}")
        given[name] = one
    pad = given["padding"]
    return conv_pairs(
        (1, given["stride"]), pad if isinstance(pad, str) else (0, pad), (1, given["dilation"]), who, weight_shape
    )


@dataclass(frozen=True, slots=True)
class ConvGeometry:
    """Sizes of a 2-d convolution.

    x is [N, C, H, W], the filter bank [K, C, R, S], of which in a convolution in groups only blocks on the diagonal are
    not zero (groups.py): a dense weight is [K, C/groups, R, S]. y is [N, K, P, Q] with
    P = (H + 2*padding[0] - dilation[0]*(R - 1) - 1) // stride[0] + 1, and Q likewise along W.
    A tap is one kernel offset (r, s), numbered r*S + s.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        who: str = "ConvGeometry.of()",
    ) -> ConvGeometry:
        """Checked geometry of `x_shape` [N, C, H, W] under `weight_shape` [K, C, R, S].

        A convolution in groups has a fifth number there, their number: (K, C/groups, R, S, groups).

        Raises ValueError, with `who` in front, for shapes that are not 4-d, channels that differ, strides,
        paddings or dilations out of range, and a kernel that is larger than the padded input.
        """
        if len(x_shape) != 4:
            raise ValueError(
                f"{who}: x has shape {tuple(x_shape)}; it needs 4 dimensions [N, C, H, W] (unsqueeze(0) a single image)"
            )
        if len(weight_shape) not in (4, 5):
            raise ValueError(f"{who}: the filter bank has shape {tuple(weight_shape)}; it needs [K, C, R, S]")
        n, c, h, w = x_shape
        k, weight_c, r, s, groups = (*weight_shape, 1)[:5]
        if groups < 1 or k % groups:
            raise ValueError(f"{who}: {groups} groups do not divide the {k} filters of {tuple(weight_shape[:4])}")
        if c != weight_c * groups:
            of_groups = f" in {groups} groups" if groups > 1 else ""
            raise ValueError(
                f"{who}: x has {c} channels (shape {tuple(x_shape)});"
                f" the filter bank {tuple(weight_shape[:4])} = (K, C, R, S){of_groups} needs {weight_c * groups}"
            )
        geometry = cls(
            n, c, h, w, k, r, s,
            *conv_pairs(stride, padding, dilation, who), groups,
        )  # fmt: skip
        if geometry.p < 1 or geometry.q < 1:
            raise ValueError(
                f"{who}: y would be {geometry.p} x {geometry.q}: the input {h} x {w} with padding"
                f" {geometry.padding} is smaller than the {r} x {s} kernel at dilation {geometry.dilation}"
            )
        return geometry

    @property
    def p(self) -> int:
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.p, self.q

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Of the filter bank over all channels, which the index is of."""
        return self.k, self.c, self.r, self.s

    @property
    def dense_shape(self) -> tuple[int, int, int, int]:
        """Of a dense weight."""
        return self.k, self.c // self.groups, self.r, self.s

    @property
    def weights(self) -> int:
        """Of a dense weight."""
        return self.k * self.c // self.groups * self.taps

    @property
    def taps(self) -> int:
        return self.r * self.s

    @property
    def pointwise(self) -> bool:
        """Whether each pixel of y reads one pixel of x: 1x1 without padding."""
        return self.taps == 1 and self.padding == (0, 0)

    @property
    def of_matrices(self) -> bool:
        """Whether contiguous tensors are matrices: y = weight @ x."""
        return self.pointwise and self.stride == (1, 1) and self.n == self.groups == 1

    def of_pixels_read(self) -> ConvGeometry:
        """A pointwise convolution as one of stride 1 over the pixels it reads: x[:, :, ::stride[0], ::stride[1]]."""
        return replace(self, h=self.p, w=self.q, stride=(1, 1))

    @property
    def only_padding(self) -> bool:
        """Whether an axis of y meets nothing but padding: y is the bias then, and gradients are zeros."""
        down = _meets(self.h, self.r, self.p, self.stride[0], self.padding[0], self.dilation[0])
        return not (down and _meets(self.w, self.s, self.q, self.stride[1], self.padding[1], self.dilation[1]))

    def __str__(self) -> str:
        return (
            f"x {self.n}x{self.c}x{self.h}x{self.w} * {'x'.join(map(str, self.dense_shape))}"
            f" -> y {self.n}x{self.k}x{self.p}x{self.q}"
            f" (stride {self.stride}, padding {self.padding}, dilation {self.dilation}"
            f"{f', {self.groups} groups' if self.groups > 1 else ''})"
        )


def _meets(size: int, taps: int, out: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether any tap of any output reads one of the `size` pixels of an axis."""
    for tap in range(taps):
        first = max(0, -(-(padding - tap * dilation) // stride))  # the first output that is not before the pixels
        if first < out and first * stride + tap * dilation - padding < size:
            return True
    return False
