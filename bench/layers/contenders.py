"""Every way to compute a layer that is timed, and the result that each must equal.

A contender is a set of calls, one a kind (fprop, dgrad, wgrad), over tensors that are ready. A call does
not prepare anything that a training step could keep from the step before.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import blocksparse as bs
from bench.layers.networks import Layer

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Calls = dict[str, Callable[[], Tensor]]
View = Callable[[Tensor], Tensor]


class NotApplicable(Exception):
    """This contender cannot compute this layer or pattern; the message says why."""


@dataclass
class Contender:
    """One way to compute a layer.

    Attributes:
        role: "sparse", "dense", "grouped", "torch_bsr" or "narrow".
        variant: the memory layout of x and dy, or another way to call the same thing; the best one counts.
        calls: what is timed.
        views: how the dense result of a kind is seen in this contender's shape (default: as it is).
        saved_bytes: by kind, tensors beyond x, y and the weights that a training step has to keep for it.
        problem: what it computes where that is not the pattern: a full filter bank, or another layer.
    """

    role: str
    variant: str
    calls: Calls
    views: dict[str, View] = field(default_factory=dict)
    saved_bytes: dict[str, int] = field(default_factory=dict)
    problem: Problem | None = None


# ---------------------------------------------------------------- tensors and truth


class Problem:
    """The tensors of one layer, drawn once: x, dy and a dense w, in both memory layouts."""

    def __init__(
        self, layer: Layer, batch: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.batch, self.dtype, self.device, self.generator = batch, dtype, device, generator
        x, dy = (self.draw(shape) for shape in (layer.x_shape(batch), layer.y_shape(batch)))
        self._set(layer, x, dy, self.draw(layer.shape, (layer.weights / layer.k) ** -0.5))  # so that y is about 1

    def _set(self, layer: Layer, x: Tensor, dy: Tensor, w: Tensor) -> None:
        self.layer = layer
        self.x, self.dy, self.w = (in_layouts(t) for t in (x, dy, w))

    def narrowed(self, c: int, k: int) -> Problem:
        """The same images with the first `c` channels in and `k` out."""
        other = copy.copy(self)
        for name in ("exact_wgrad", "largest_wgrad", "full_truth"):
            other.__dict__.pop(name, None)
        x, dy, w = (t["contiguous"] for t in (self.x, self.dy, self.w))
        other._set(replace(self.layer, k=k, c=c), x[:, :c], dy[:, :k], w[:k, :c])
        return other

    def draw(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(device=self.device, dtype=self.dtype)

    def conv(self, layout: str, w: Tensor | None = None) -> Calls:
        """Dense convolution in one layout with this filter bank (default: the problem's own)."""
        w = self.w[layout] if w is None else w.contiguous(memory_format=LAYOUTS[layout])
        return conv_calls(self.layer, self.x[layout], w, self.dy[layout])

    @functools.cached_property
    def exact_wgrad(self) -> Tensor:
        return run_as(self, torch.float64, self.w["contiguous"], ("wgrad",))["wgrad"]

    @functools.cached_property
    def full_truth(self) -> Truth:
        """Of the problem's own filter bank, every kind."""
        return Truth.of(self, self.w["contiguous"], ("fprop", "dgrad", "wgrad"))

    @functools.cached_property
    def largest_wgrad(self) -> float:
        found = run_as(self, torch.float32, self.w["contiguous"], ("wgrad",), absolute=True)["wgrad"]
        return float(found.max()) if found.numel() else 0.0


def in_layouts(t: Tensor) -> dict[str, Tensor]:
    return {name: t.contiguous(memory_format=form) for name, form in LAYOUTS.items()}


def conv_calls(layer: Layer, x: Tensor, w: Tensor, dy: Tensor, groups: int = 1) -> Calls:
    """PyTorch's own convolution and its two gradients, each alone."""
    stride, padding, one = [layer.stride] * 2, list(layer.padding), [1, 1]

    def backward(mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(dy, x, w, None, stride, padding, one, False, [0, 0], groups, mask)

    return {
        "fprop": lambda: F.conv2d(x, w, None, stride, padding, one, groups),
        "dgrad": lambda: backward([True, False, False])[0],
        "wgrad": lambda: backward([False, True, False])[1],
    }


@dataclass(frozen=True)
class Truth:
    """What a pattern's results must equal: dense convolution in float64; and what shared/equal.py needs beside it.

    exact    kind -> result in float64
    own      kind -> PyTorch's own in the timed dtype, in the contiguous format: oneDNN's channels_last weight gradient
             of strided 1x1 convolutions is wrong for few channels (seen in PyTorch 2.13)
    largest  kind -> the largest sum of absolute products of an element
    """

    exact: dict[str, Tensor]
    own: dict[str, Tensor]
    largest: dict[str, float]

    @classmethod
    def of(cls, problem: Problem, w: Tensor, kinds: tuple[str, ...]) -> Truth:
        exact = run_as(problem, torch.float64, w, tuple(kind for kind in kinds if kind != "wgrad"))
        if "wgrad" in kinds:  # does not depend on w
            exact["wgrad"] = problem.exact_wgrad
        calls = problem.conv("contiguous", w)
        return cls(exact, {kind: calls[kind]() for kind in kinds}, largest_sums(problem, w, kinds))


def largest_sums(problem: Problem, w: Tensor, kinds: tuple[str, ...]) -> dict[str, float]:
    """The largest element of each kind on absolute values; in float32, as nothing cancels."""
    found = run_as(problem, torch.float32, w.abs(), tuple(kind for kind in kinds if kind != "wgrad"), absolute=True)
    sums = {kind: float(t.max()) if t.numel() else 0.0 for kind, t in found.items()}
    return sums | ({"wgrad": problem.largest_wgrad} if "wgrad" in kinds else {})


def run_as(
    problem: Problem, dtype: torch.dtype, w: Tensor, kinds: tuple[str, ...], absolute: bool = False
) -> dict[str, Tensor]:
    """Dense convolution in another dtype; of the absolute values of x and dy where asked."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # not worth a search: runs once
    try:
        x, dy = (t["contiguous"].to(dtype) for t in (problem.x, problem.dy))
        if absolute:
            x, dy = x.abs(), dy.abs()
        calls = conv_calls(problem.layer, x, w.to(dtype).contiguous(), dy)
        return {kind: calls[kind]() for kind in kinds}
    finally:
        torch.backends.cudnn.benchmark = benchmark


# ---------------------------------------------------------------- contenders


def sparse(problem: Problem, pattern: bs.BSRPattern, values: Tensor, layout: str, backend: str | None) -> Contender:
    """The library: conv2d and its two gradients on the stored blocks."""
    layer, x, dy = problem.layer, problem.x[layout], problem.dy[layout]
    x_shape, place = layer.x_shape(problem.batch), (layer.stride, layer.padding, 1)
    calls: Calls = {
        "fprop": lambda: bs.conv2d(x, values, pattern, None, *place, backend=backend),
        "dgrad": lambda: bs.conv2d_dgrad(dy, values, pattern, x_shape, *place, backend=backend),
        "wgrad": lambda: bs.conv2d_wgrad(x, dy, pattern, *place, backend=backend),
    }
    return Contender("sparse", layout, calls, {"wgrad": pattern.values_from_dense})


def dense(problem: Problem, layout: str) -> Contender:
    """PyTorch's convolution (oneDNN, cuDNN) with a full filter bank."""
    return Contender("dense", layout, problem.conv(layout), problem=problem)


def matmul(problem: Problem) -> Contender:
    """The dense product of a 1x1 kernel of stride 1 as matrix products (cuBLAS) of channels_last tensors as they lie.

    Raises:
        NotApplicable: another kernel, stride or padding.
    """
    layer = problem.layer
    if layer.kernel != (1, 1) or layer.stride != 1 or layer.padding != (0, 0):
        raise NotApplicable("1x1 with stride 1 only")
    n, (h, w), weight = problem.batch, layer.size, problem.w["contiguous"].flatten(1)
    x, dy = (t["channels_last"].permute(0, 2, 3, 1).reshape(n * h * w, -1) for t in (problem.x, problem.dy))

    def image(pixels: Tensor) -> Tensor:
        return pixels.view(n, h, w, -1).permute(0, 3, 1, 2)

    calls: Calls = {
        "fprop": lambda: image(x @ weight.t()),
        "dgrad": lambda: image(dy @ weight),
        "wgrad": lambda: (dy.t() @ x)[:, :, None, None],
    }
    return Contender("dense", "matmul", calls, problem=problem)


def grouped(problem: Problem, pattern: bs.BSRPattern, values: Tensor, layout: str) -> Contender:
    """By hand: gather the channels of each group, one grouped convolution; its gradients, scatter-add too.

    wgrad reads the gathered input that the forward pass left behind, as autograd would keep it. Taps that a
    group does not store are multiplied as zeros.

    Raises:
        NotApplicable: filters do not fall into equal groups that keep equally many channels.
    """
    channels = equal_channels(pattern.to_mask().cpu()).to(problem.device)
    groups = channels.shape[0]
    flat, shape = channels.flatten(), problem.layer.x_shape(problem.batch)
    x, dy = problem.x[layout], problem.dy[layout]

    def take(w: Tensor) -> Tensor:
        """[K, C, R, S] -> the weights of the grouped convolution [K, kept, R, S]."""
        rows = w.shape[0] // groups
        return torch.cat([w[g * rows : (g + 1) * rows][:, channels[g]] for g in range(groups)])

    form = LAYOUTS[layout]
    w = take(pattern.to_dense(values)).contiguous(memory_format=form)
    gathered = x.index_select(1, flat).contiguous(memory_format=form)
    direct = conv_calls(problem.layer, gathered, w, dy, groups)

    def fprop() -> Tensor:
        return conv_calls(problem.layer, x.index_select(1, flat), w, dy, groups)["fprop"]()

    def dgrad() -> Tensor:
        dx = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form).zero_()
        return dx.index_add_(1, flat, direct["dgrad"]())

    calls: Calls = {"fprop": fprop, "dgrad": dgrad, "wgrad": direct["wgrad"]}
    saved = {"wgrad": gathered.untyped_storage().nbytes()}
    return Contender("grouped", layout, calls, {"wgrad": take}, saved)


def equal_channels(mask: Tensor) -> Tensor:
    """int64 [groups, kept]: the channels of each group of consecutive filters of `mask` [K, C, R, S].

    Raises:
        NotApplicable: groups differ in size or in their number of channels.
    """
    used = mask.flatten(2).any(2)
    changes = 1 + (used[1:] != used[:-1]).any(1).nonzero().flatten()
    rows = math.gcd(len(used), *changes.tolist())
    counts = used[::rows].sum(1)
    if rows == 1 and len(used) > 1:
        raise NotApplicable("no two filters share their channels")
    if int(counts.min()) != int(counts.max()) or int(counts.min()) == 0:
        raise NotApplicable("groups of filters keep different numbers of channels")
    return used[::rows].nonzero()[:, 1].view(len(counts), -1)


def torch_bsr(problem: Problem, pattern: bs.BSRPattern, values: Tensor, variant: str) -> Contender:
    """torch.sparse_bsr times the pixels of channels_last x, as the matrix that it is: fprop of 1x1, stride 1.

    Raises:
        NotApplicable: another kernel or stride; PyTorch itself says what else it does not take, when called.
    """
    layer = problem.layer
    if layer.kernel != (1, 1) or layer.stride != 1:
        raise NotApplicable("1x1 with stride 1 only")
    matrix = pattern.to_torch(values)
    pixels = problem.x["channels_last"].permute(0, 2, 3, 1).reshape(-1, layer.c)
    if variant == "linear":
        return Contender("torch_bsr", variant, {"fprop": lambda: F.linear(pixels, matrix)}, {"fprop": _pixels_by_k})
    return Contender(
        "torch_bsr", variant, {"fprop": lambda: matrix @ pixels.t()}, {"fprop": lambda y: _pixels_by_k(y).t()}
    )


def _pixels_by_k(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


def narrow(problem: Problem, density: float, layout: str) -> Contender:
    """A dense layer of equal FLOPs: fewer channels in and out, the same images and kernel."""
    other = problem.narrowed(*narrow_sizes(problem.layer.c, problem.layer.k, density))
    return Contender("narrow", layout, other.conv(layout), problem=other)


def narrow_sizes(c: int, k: int, density: float) -> tuple[int, int]:
    """(C', K') with C'*K' as near density*C*K as multiples of 8 allow, and nearly C'/C = K'/K.

    Multiples of 8 because dense libraries compute in 8s; single channels where a layer is too small for that.
    """
    wanted, root = density * c * k, math.sqrt(density)

    def misfit(pair: tuple[int, int]) -> float:
        flops, aspect = pair[0] * pair[1] / wanted, (pair[0] / c) / (pair[1] / k)
        return abs(math.log(flops)) + 0.1 * abs(math.log(aspect))

    step = 8 if min(c, k) * root >= 8 else 1
    columns = [n for n in range(step, c + 1, step) if root / 2 <= n / c <= min(1.0, 2 * root)] or [
        max(1, round(c * root))
    ]
    pairs = [(n, max(step, step * round(wanted / n / step))) for n in columns]
    return min(((n, min(k, m)) for n, m in pairs), key=misfit)
