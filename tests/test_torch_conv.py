"""The torch backend's own promises: no im2col buffer, work on stored blocks only, never a stale decomposition."""

from __future__ import annotations

import gc
import math
import threading
import tracemalloc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import blocksparse as bs
from blocksparse import index
from blocksparse.index import unpack
from blocksparse.kernels import torch_conv


def equal_groups(channels: int, groups: int, kept: int, taps: list[int]) -> bs.BSRPattern:
    """`groups` groups of filters, each with its own `kept` channels, all with `taps` of nine."""
    mask = torch.zeros(groups, channels // groups, channels, 9, dtype=torch.bool)
    for group in mask:
        group[:, torch.randperm(channels)[:kept, None], torch.tensor(taps)] = True
    return bs.BSRPattern.from_mask(mask.view(channels, channels, 3, 3), (channels // groups, 1))


PATTERNS = {
    "hrbp": lambda: equal_groups(64, 8, 7, list(range(9))),
    "hrbp++": lambda: equal_groups(64, 8, 14, [1, 3, 4, 7]),
    "32x32": lambda: bs.BSRPattern.random((64, 64, 3, 3), (32, 32), 0.11),
    "8x8": lambda: bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1),
    "8x1": lambda: bs.BSRPattern.random((64, 64, 3, 3), (8, 1), 0.1),
}


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


class Flops(TorchDispatchMode):
    """Floating-point operations of matrix products (in place and out variants too) and convolutions."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.total += 2 * a.numel() * b.shape[-1]
        elif name == "convolution":
            self.total += 2 * out.numel() * math.prod(args[1].shape[1:])
        elif name == "convolution_backward":
            self.total += 2 * args[0].numel() * math.prod(args[2].shape[1:]) * sum(args[-1])
        return out


def three_products(pattern: bs.BSRPattern, layout: torch.memory_format, stride: int) -> list:
    """The three kernels as calls without arguments, on a 64-channel 28 x 28 layer."""
    g = bs.ConvGeometry.of((2, 64, 28, 28), pattern.shape, stride, 1)
    x = torch.randn(g.x_shape).contiguous(memory_format=layout)
    dy = torch.randn(g.y_shape).contiguous(memory_format=layout)
    values = torch.randn(pattern.nnzb, *pattern.blocksize)
    tables = unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
    last = layout == torch.channels_last
    return [
        lambda: torch_conv.fprop(x, values, tables, None, g),
        lambda: torch_conv.dgrad(dy, values, tables, g, last),
        lambda: torch_conv.wgrad(x, dy, tables, g, tuple(values.shape)),
    ]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_no_im2col_buffer(name, layout, stride):
    """A 3x3 im2col buffer is nine times x; no tensor here is much larger than a padded x."""
    for call in three_products(PATTERNS[name](), layout, stride):
        with Largest() as mode:
            call()
        assert 0 < mode.elements <= 1.5 * (2 * 64 * 28 * 28)


@pytest.mark.parametrize("name", ["hrbp", "hrbp++", "32x32", "8x8"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_work_is_that_of_the_stored_blocks(name, layout):
    """Multiplications stay near the stored share of the dense layer's; the rest is padding, of rows and of lists."""
    pattern = PATTERNS[name]()
    dense = 2 * 2 * 28 * 28 * 64 * 64 * 9
    for call in three_products(pattern, layout, 1):
        with Flops() as counter:
            call()
        assert 0.9 <= counter.total / (pattern.density * dense) <= 1.25


def test_a_mask_written_in_place_is_never_missed():
    x = torch.randn(1, 64, 6, 6)
    module = bs.BSRConv2d(PATTERNS["8x8"](), padding=1, backend="torch")
    for how in ("copy_", "data", "numpy"):
        module(x)
        new = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
        if how == "copy_":
            module.index.copy_(new.index)
        elif how == "data":
            module.index.data.copy_(new.index)
        else:  # no version counter sees this
            module.index.numpy()[:] = new.index.numpy()
        torch.testing.assert_close(module(x), module.to_dense()(x), rtol=1e-4, atol=1e-4)
        assert module.pattern == new


def test_threads_share_the_cache():
    modules = [bs.BSRConv2d(PATTERNS["8x8"](), padding=1, backend="torch") for _ in range(3)]
    x = torch.randn(1, 64, 6, 6)
    needed = [module.to_dense()(x) for module in modules]
    wrong = []

    def work():
        for _ in range(10):
            for module, y in zip(modules, needed, strict=True):
                if not torch.allclose(module(x), y, rtol=1e-4, atol=1e-4):
                    wrong.append(module)
                module.index.copy_(module.index.clone())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_image_sizes_leave_nothing_behind():
    """What a mask's products come to is asked for at every call, and may be for a new image size each time."""
    pattern = PATTERNS["8x8"]()
    tables = unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)

    def ask(sizes: range) -> None:
        for size in sizes:
            torch_conv.work(tables, bs.ConvGeometry.of((1, 64, size, 9), pattern.shape, 1, 1), pattern.blocksize)

    ask(range(1, 10))
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ask(range(10, 2010))
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000, f"{grown} bytes for 2,000 sizes"


def test_masks_leave_nothing_behind():
    """Masks written in place, and masks of another size: only the last decomposition of each index is kept."""
    module = bs.BSRConv2d(PATTERNS["8x8"](), padding=1, backend="torch")
    x = torch.randn(1, 64, 6, 6)
    alive = len(torch_conv._cache), len(index._views)
    for i in range(20):
        module.set_pattern(bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1 + i % 2 / 10))
        module(x)
    del module
    gc.collect()
    assert (len(torch_conv._cache), len(index._views)) <= alive
