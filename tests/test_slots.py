"""SlotTile: the predicate refuses by name and reason, and every other work gets a tile that fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blocksparse import ConvGeometry
from blocksparse.kernels import gpus, slot_cost, slots

KINDS = ("fprop", "dgrad", "wgrad")
PLAIN = ConvGeometry(2, 64, 14, 14, 64, 3, 3, (1, 1), (1, 1))


def test_plain_work_is_taken():
    for dtype in slots.DTYPES:
        for arch in ("", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_120"):
            assert slots.refusal(PLAIN, (8, 1), dtype, "cuda", arch) is None
    assert slots.refusal(replace(PLAIN, k=2048), (2048, 1), torch.float16, "cuda") is None
    assert slots.refusal(PLAIN, (8, 1), torch.float16, "cpu", home="cpu") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": (12, 1)}, r"bk = 12: .*must be a multiple of 8; use backend='torch'"),
        ({"blocksize": (1, 8)}, r"bk = 1: values move in pieces of 16 bytes"),
        ({"dtype": torch.float64}, r"dtype = torch.float64: it takes torch.float16, torch.bfloat16, torch.float32"),
        ({"device_type": "mps"}, r"device = mps: it runs on CUDA GPUs"),
        ({"device_type": "cpu"}, r"device = cpu: it runs on CUDA GPUs"),
        ({"arch": "sm_75"}, r"arch = sm_75: .*sm_80 or later"),
        ({"arch": "gfx942"}, r"arch = gfx942: it is CUDA C\+\+, for NVIDIA GPUs; use backend='triton'"),
        ({"n": 2**23}, r"N\*H\*W = 1644167168: .*below 1073741824; split the work"),
        ({"padding": (2**29, 0)}, r"N\*P\*Q = "),
        ({"k": 2**15, "c": 2**15}, r"K\*C\*R\*S / 8 = "),
        ({"c": 2**15 + 1}, r"C = 32769: it lists at most 32768 channels"),
        ({"r": 9, "s": 8, "padding": (4, 4)}, r"R\*S = 72: it lists at most 64 taps of a channel"),
        ({"padding": (400, 400), "dilation": (400, 400)}, r"fprop: with 3x3 taps, .*do not fit 99 KB of shared memory"),
        (
            {"r": 7, "s": 7, "padding": (3, 3), "dtype": torch.float32},
            r"dgrad: with 7x7 taps, stride \(1, 1\) .*do not fit 99 KB",
        ),
        ({"padding": (2**29, 0), "n": 0}, r"H \+ 2\*padding = "),
        ({"padding": (0, 2**29), "n": 0}, r"W \+ 2\*padding = "),
        ({"stride": (2**30, 1)}, r"stride = 1073741824"),
        ({"dilation": (1, 2**30), "s": 1}, r"dilation = 1073741824"),
    ],
)
def test_refusals_name_what_and_why(change, message):
    call = {"blocksize": (8, 1), "dtype": torch.float16, "device_type": "cuda", "arch": "sm_90"}
    call |= {name: value for name, value in change.items() if name in call}
    geometry = replace(PLAIN, **{name: value for name, value in change.items() if name not in call})
    reason = slots.refusal(geometry, **call)
    assert reason is not None
    assert re.match(message, reason), reason


@st.composite
def work(draw: st.DrawFn) -> tuple[ConvGeometry, tuple[int, int], int, torch.dtype]:
    """Anything the predicate may meet: from a pixel to a large layer, kernels of more taps than it takes."""
    bk, bc = draw(st.integers(1, 40)) * 8, draw(st.sampled_from([1, 2, 3, 4, 8, 16, 128]))
    r, s = draw(st.integers(1, 7) | st.just(40)), draw(st.integers(1, 7) | st.just(40))
    k, c = bk * draw(st.integers(1, 32)), bc * draw(st.integers(1, 64))
    pairs = [st.tuples(*[st.integers(low, 5)] * 2) for low in (1, 0, 1)]
    stride, padding, dilation = (draw(pair) for pair in pairs)
    dilation = draw(st.just(dilation) | st.tuples(st.integers(1, 300), st.integers(1, 300)))
    least_h, least_w = (d * (k - 1) + 1 for d, k in zip(dilation, (r, s), strict=True))
    n, h, w = draw(st.integers(0, 200)), least_h + draw(st.integers(0, 99)), least_w + draw(st.integers(0, 99))
    geometry = ConvGeometry.of((n, c, h, w), (k, c, r, s), stride, padding, dilation)
    nnzb = draw(st.integers(0, (k // bk) * (c // bc) * r * s))
    return geometry, (bk, bc), nnzb, draw(st.sampled_from(slots.DTYPES))


@given(work())
def test_every_work_gets_a_tile_that_fits(case):
    """What the kernels take for granted of the sizes that they are given."""
    g, blocksize, nnzb, dtype = case
    if slots.refusal(g, blocksize, dtype, "cuda") is not None:
        return
    for kind in KINDS:
        tile = slot_cost.pick(kind, g, blocksize, nnzb, dtype, "tf32")
        places = slots.layout(kind, g, blocksize, dtype, tile)
        most = gpus.NAMED["h100"].shared - 1024 if kind == "dgrad" else slots.SHARED_BYTES
        assert places.shared == tile.shared <= most
        assert all(at % 16 == 0 for at in places)
        assert places.stage_at + 2 * places.stage <= tile.shared
        assert tile.splits >= 1
        assert slots.grid(kind, g, blocksize, tile) < 2**30  # pixels and entries are counted in 32 bits
        assert tile.part >= 1
        if kind == "dgrad":
            own = slots.bands(g, blocksize[0], tile)
            assert blocksize[0] % tile.filters == 0 or tile.filters % blocksize[0] == 0
            assert g.k % tile.filters == 0
            assert tile.area <= tile.warps * tile.nt // 2
            # What is listed in parts always fits.
            assert own * -(-tile.part // (16 * tile.mt)) <= tile.capacity
            assert tile.part <= tile.planes or own == 1
            assert tile.part <= tile.units <= g.c
            assert tile.planes < 1 << 13
            assert tile.lists == 1 or (slots.classes(g) == 1 and tile.lists <= slots.MOST_SHARES)
            assert slots.workspace(g, tile.lists) <= slots.SHARES_BYTES
            assert own * (tile.lists - 1) < g.k // max(blocksize[0], tile.filters) or tile.lists == 1
            assert tile.held >= 2
            assert places.values_at + tile.held * places.value_stage <= tile.shared
            continue
        assert 1 <= tile.units <= slots.MOST_UNITS
        assert tile.part % tile.units == 0
        assert tile.part // tile.units * -(-tile.units * g.taps // 16) * 16 <= tile.capacity
        if kind == "wgrad":
            assert tile.units * g.taps <= tile.warps * tile.mt * 16
            assert 4 * tile.splits * nnzb * blocksize[0] * blocksize[1] <= slots.WORKSPACE_BYTES or tile.splits == 1
        else:
            assert tile.area <= tile.warps * tile.nt // 2


@given(work())
def test_the_taps_that_reach_a_pixel(case):
    """Those of a filter bank of ones, added up where an image is large enough for every class of pixels."""
    g = case[0]
    axes = [(size, *rest) for size, *rest in zip((g.r, g.s), g.stride, g.padding, g.dilation, strict=True)]
    found = 1
    for taps, stride, padding, dilation in axes:
        size = 2 * (taps * dilation + stride * taps)
        y = torch.zeros(1, 1, (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1)
        dx = torch.nn.grad.conv1d_input(
            (1, 1, size), torch.ones(1, 1, taps), torch.ones_like(y), stride, padding, dilation
        )
        found *= int(dx.max())
    large = replace(g, h=10**6, w=10**6)
    assert slots.most_taps(large) == found
    assert slots.most_taps(g) <= found


@pytest.mark.parametrize(("channels", "pixels"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_the_device_is_filled(channels, pixels):
    """The 3x3 layers of ResNet-50 at batch 64 in eight groups, 90% sparse."""
    g = ConvGeometry(64, channels, pixels, pixels, channels, 3, 3, (1, 1), (1, 1))
    nnzb = 8 * round(0.1 * channels * 9)
    for kind in KINDS:
        tile = slot_cost.pick(kind, g, (channels // 8, 1), nnzb, torch.float16)
        assert slots.grid(kind, g, (channels // 8, 1), tile) >= 0.8 * 132
