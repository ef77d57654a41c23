"""Random convolutions in which an axis of y, or a part of it, meets nothing but padding; and strided 1x1 ones.

There PyTorch's own convolution was seen to crash, to corrupt the heap and to read beyond its input (PyTorch 2.13,
oneDNN 3.12): see blocksparse/kernels/aten_conv.py. Run as a process of its own, so that a crash is a failure:

    python tests/padding_sweep.py SEED COUNT

Every case goes to stdout before it runs: the last line is the one that crashed.
"""

from __future__ import annotations

import random
import sys

import torch
from torch import nn

import blocksparse as bs
from hrbp.layers.dense_conv import masked_conv
from hrbp.layers.gradients import dense_gradient
from oracle import assert_products
from strategies import guarded, nonzero

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FIRST_SEEN = {"dtype": torch.float32, "layout": "channels_last", "full": True, "bias": True, "blocksize": (1, 1)}
# An axis that meets only padding; a batch that two threads do not divide; filters whose sizes of one fit both formats;
# a read beyond x.
KNOWN = [
    {"x": (5, 32, 4, 1), "weight": (32, 32, 3, 3), "stride": (2, 2), "padding": (1, 5), "dilation": (2, 2)},
    {"x": (3, 12, 30, 30), "weight": (12, 12, 1, 1), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)},
    {"x": (5, 8, 2, 1), "weight": (1, 8, 1, 1), "stride": (2, 2), "padding": (6, 3), "dilation": (4, 2)},
    {"x": (5, 12, 1, 1), "weight": (48, 12, 1, 1), "stride": (4, 3), "padding": (0, 0), "dilation": (1, 1)},
]


def drawn(rng: random.Random) -> dict:
    """Sizes of a convolution; in seven of ten an axis of y meets only padding."""
    if rng.random() < 0.2:
        x = (rng.choice([1, 3]), rng.choice([1, 2, 3, 8, 12]), *(rng.choice([1, 2, 8, 14, 28]) for _ in "hw"))
        weight = rng.choice([4, 8, 12, 16]), x[1], 1, 1
        return {"x": x, "weight": weight, "stride": (2, rng.choice([1, 2, 3])), "padding": (0, 0), "dilation": (1, 1)}
    while True:
        channels = rng.choice([1, 3, 4, 8, 12, 16, 20, 32])
        x = (rng.choice([1, 2, 5]), channels, *(rng.choice([1, 1, 2, 3, 4, 7]) for _ in "hw"))
        weight = rng.choice([1, 4, 8, 16, 20, 32]), channels, *(rng.choice([1, 2, 3, 5]) for _ in "hw")
        stride, dilation = (tuple(rng.choice([1, 2, 2, 3, 4]) for _ in "hw") for _ in range(2))
        case = {"x": x, "weight": weight, "stride": stride, "dilation": dilation}
        case["padding"] = tuple(rng.choice([0, 1, 2, 3, 5, 6, 8]) for _ in "hw")
        try:
            g = bs.ConvGeometry.of(x, weight, stride, case["padding"], dilation)
        except ValueError:
            continue
        if g.p * g.q < 400 and (g.only_padding or rng.random() < 0.1):
            return case


def choices(case: dict, rng: random.Random) -> dict:
    """What else there is to choose; PyTorch's bfloat16 gradient of strided 1x1 convolutions is no yardstick."""
    k, c, r, s = case["weight"]
    halves = [] if r * s == 1 else [torch.bfloat16, torch.float16]
    blocksizes = [(bk, bc) for bk, bc in [(k, 1), (k, c), (4, 4), (4, 1)] if k % bk == 0 and c % bc == 0]
    return {
        "dtype": rng.choice([torch.float32, torch.float32, torch.float32, torch.float64, *halves]),
        "layout": rng.choice(["channels_last", "channels_last", "contiguous"]),
        "full": rng.random() < 0.5,
        "bias": rng.random() < 0.7,
        "blocksize": rng.choice(blocksizes),
    }


def run(case: dict, seed: int) -> None:
    """The three products on both backends of PyTorch operators, the dense gradient, and a layer under a mask."""
    conv = case["stride"], case["padding"], case["dilation"]
    g = bs.ConvGeometry.of(case["x"], case["weight"], *conv)
    generator, layout, dtype = torch.Generator().manual_seed(seed), case["layout"], case["dtype"]
    density = 1.0 if case["full"] else 0.6
    pattern = bs.BSRPattern.random(g.weight_shape, case["blocksize"], density, generator)
    x, dy = (guarded(nonzero(s, dtype, generator), "cpu", layout) for s in (g.x_shape, g.y_shape))
    values = nonzero((pattern.nnzb, *pattern.blocksize), dtype, generator)
    bias = nonzero((g.k,), dtype, generator) if case["bias"] else None
    for backend in ("torch", "cpu"):
        assert_products(x, values, pattern, bias, dy, *conv, backend)
    whole = bs.BSRPattern.full(g.weight_shape, (g.k, g.c))
    for kind in (dtype, torch.bfloat16):
        a, b = (guarded(t.to(kind), "cpu", layout) for t in (x, dy))
        grad = dense_gradient(a, b, g.weight_shape, conv)
        needed = whole.to_dense(bs.reference.wgrad(a, b, whole, *conv))
        torch.testing.assert_close(grad, needed.to(grad.dtype), rtol=2e-5, atol=2e-5 * g.n * g.p * g.q)
    layer = plain(pattern, values, bias, conv).to(memory_format=FORMATS[layout])
    y = bs.reference.fprop(x, values, pattern, bias, *conv)
    loose = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-4)
    ours = masked_conv(layer, x, layer.weight).double()
    torch.testing.assert_close(ours, y, rtol=loose, atol=loose * float(y.detach().abs().max() + 1))


def plain(pattern: bs.BSRPattern, values: torch.Tensor, bias: torch.Tensor | None, conv: tuple) -> nn.Conv2d:
    """A convolution with zeros outside the pattern."""
    k, c, *kernel = pattern.shape
    layer = nn.Conv2d(c, k, kernel, *conv, bias=bias is not None, dtype=values.dtype)
    layer.weight.data = pattern.to_dense(values)
    if bias is not None:
        layer.bias.data = bias
    return layer


def main() -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(seed)
    torch.set_num_threads(2)  # the heap was corrupted by several
    for i in range(-len(KNOWN), count):
        case = KNOWN[i] | FIRST_SEEN if i < 0 else drawn(rng)
        case = choices(case, rng) | case
        print(i, case, flush=True)
        run(case, seed + i)
    print("done")


if __name__ == "__main__":
    main()
