"""The one rule for 'equal': at most twice PyTorch's own error in the same dtype, against float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import blocksparse as bs

# A result of exact arithmetic still rounds once to its dtype, and sums of a few products may round luckily in
# PyTorch: the floor is this many units of rounding of the largest product sum.
FLOOR_ULPS = 4.0


def assert_close(actual: Tensor, exact: Tensor, torch_own: Tensor, magnitude: Tensor, what: str) -> None:
    """Largest error and RMS error of `actual` against `exact` (float64).

    `torch_own` is PyTorch's dense result in the same dtype; `magnitude` the same product of absolute values, which
    bounds what rounding may do when terms cancel.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, needed {tuple(exact.shape)}"
    assert actual.dtype == torch_own.dtype, f"{what}: dtype {actual.dtype}, needed {torch_own.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: {int((~torch.isfinite(actual)).sum())} elements are not finite"
    ulp = torch.finfo(actual.dtype).eps * float(magnitude.abs().max())
    error = (actual.double().cpu() - exact.cpu()).abs()
    own = (torch_own.double().cpu() - exact.cpu()).abs()
    worst, allowed = float(error.max()), 2 * float(own.max()) + FLOOR_ULPS * ulp
    assert worst <= allowed, f"{what}: largest error {worst:.3g}, allowed {allowed:.3g}"
    rms, allowed = float(error.square().mean().sqrt()), 2 * float(own.square().mean().sqrt()) + ulp
    assert rms <= allowed, f"{what}: RMS error {rms:.3g}, allowed {allowed:.3g}"


def assert_products(
    x: Tensor,
    values: Tensor,
    pattern: bs.BSRPattern,
    bias: Tensor | None,
    dy: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    backend: str | None,
    kinds: tuple[str, ...] = ("fprop", "dgrad", "wgrad"),
) -> dict[str, Tensor]:
    """Run the kinds on `backend`, hold each to the reference, and return the results."""
    conv = (stride, padding, dilation)
    host = pattern.to("cpu")
    x_, v_, dy_ = (t.detach().cpu() for t in (x, values, dy))
    b_ = None if bias is None else bias.detach().cpu()
    weight = pattern.to_dense(values.detach())
    # PyTorch's own error is measured in its contiguous format: oneDNN's channels_last weight gradient of strided 1x1
    # convolutions is wrong for few channels (seen in PyTorch 2.13), and would excuse any error of ours.
    own_x, own_dy = x.detach().contiguous(), dy.contiguous()
    results = {}
    if "fprop" in kinds:
        y = bs.conv2d(x, values, pattern, bias, *conv, backend=backend)
        assert_close(
            y.detach(),
            bs.reference.fprop(x_, v_, host, b_, *conv),
            F.conv2d(own_x, weight, None if bias is None else bias.detach(), *conv),
            bs.reference.fprop(x_.abs(), v_.abs(), host, None if b_ is None else b_.abs(), *conv),
            f"fprop on {backend}",
        )
        results["fprop"] = y.detach()
    if "dgrad" in kinds:
        dx = bs.conv2d_dgrad(dy, values, pattern, x.shape, *conv, backend=backend)
        assert_close(
            dx,
            bs.reference.dgrad(dy_, v_, host, x.shape, *conv),
            torch.nn.grad.conv2d_input(x.shape, weight, own_dy, *conv),
            bs.reference.dgrad(dy_.abs(), v_.abs(), host, x.shape, *conv),
            f"dgrad on {backend}",
        )
        results["dgrad"] = dx
    if "wgrad" in kinds:
        dv = bs.conv2d_wgrad(x, dy, pattern, *conv, backend=backend)
        dense = torch.nn.grad.conv2d_weight(own_x, pattern.shape, own_dy, *conv)
        assert_close(
            dv,
            bs.reference.wgrad(x_, dy_, host, *conv),
            pattern.values_from_dense(dense),
            bs.reference.wgrad(x_.abs(), dy_.abs(), host, *conv),
            f"wgrad on {backend}",
        )
        results["wgrad"] = dv
    return results
