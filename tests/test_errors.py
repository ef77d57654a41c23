"""Bad input raises before any memory is touched, and the message says who, what came and what was needed."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch

import blocksparse as bs
import processes
from runners import RUNNERS

PATTERN = bs.BSRPattern.random((16, 8, 3, 3), (8, 8), 0.5)
X = torch.randn(2, 8, 6, 6)
VALUES = torch.randn(PATTERN.nnzb, 8, 8)
DY = torch.randn(2, 16, 4, 4)


def conv(x=X, values=VALUES, pattern=PATTERN, bias=None, **options):
    return bs.conv2d(x, values, pattern, bias, **options)


@pytest.mark.parametrize(
    ("who", "call"),
    [
        ("conv2d()", lambda x, dy, pattern: bs.conv2d(x, VALUES, pattern)),
        ("conv2d_dgrad()", lambda x, dy, pattern: bs.conv2d_dgrad(dy, VALUES, pattern, X.shape)),
        ("conv2d_wgrad()", lambda x, dy, pattern: bs.conv2d_wgrad(x, dy, pattern)),
        ("linear()", lambda x, dy, pattern: bs.linear(x, VALUES, pattern)),
        ("explain()", lambda x, dy, pattern: bs.explain(x, VALUES, pattern)),
    ],
)
def test_other_types_are_named_with_the_remedy(who, call):
    numpy = r"(x|dy) is ndarray; it needs a tensor \(torch.as_tensor\(array\)"
    with pytest.raises(TypeError, match=rf"^{re.escape(who)}: {numpy}"):
        call(X.numpy(), DY.numpy(), PATTERN)
    with pytest.raises(TypeError, match=rf"^{re.escape(who)}: pattern is a tensor of torch.bool; .*from_mask"):
        call(X, DY, PATTERN.to_mask())
    with pytest.raises(TypeError, match=r"x is ndarray; it needs a tensor"):
        bs.BSRConv2d(PATTERN)(X.numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: conv(values=VALUES[1:]),
            r"conv2d\(\): values has shape \(8, 8, 8\); pattern needs \(9, 8, 8\)",
        ),
        (lambda: conv(values=VALUES[:, :4]), r"pattern needs \(9, 8, 8\) = \(nnzb, bk, bc\)"),
        (lambda: conv(x=X[:, :4]), r"conv2d\(\): x has 4 channels .* needs 8"),
        (lambda: conv(x=X[0, 0]), r"x has shape \(6, 6\); it needs 4 dimensions \[N, C, H, W\]"),
        (
            lambda: conv(x=X.double()),
            r"values has dtype torch.float32 and x torch.float64; they need one dtype",
        ),
        (
            lambda: conv(x=X.int(), values=VALUES.int()),
            r"x has dtype torch.int32; it needs one of float64, float32",
        ),
        (lambda: conv(bias=torch.ones(8)), r"bias has shape \(8,\); it needs \(16,\) = \(K,\)"),
        (lambda: conv(bias=torch.ones(16).half()), r"bias has dtype torch.float16 and x torch.float32"),
        (lambda: conv(stride=0), r"conv2d\(\): stride is 0; it needs an int >= 1"),
        (lambda: conv(padding=(1, -1)), r"padding is \(1, -1\)"),
        (lambda: conv(dilation="2"), "dilation is '2'"),
        (lambda: conv(x=X[:, :, :2]), "is smaller than the 3 x 3 kernel"),
        (
            lambda: conv(backend="cudnn"),
            r"backend is 'cudnn'; it needs one of 'torch', 'cpu', 'triton', 'cupy' or None",
        ),
        (
            lambda: bs.conv2d_dgrad(DY[:, :, 1:], VALUES, PATTERN, X.shape),
            r"conv2d_dgrad\(\): dy has shape \(2, 16, 3, 4\); this convolution needs \(2, 16, 4, 4\) = \(N, K, P, Q\)",
        ),
        (lambda: bs.conv2d_dgrad(DY, VALUES, PATTERN, X.shape[1:]), "it needs 4 dimensions"),
        (lambda: bs.conv2d_wgrad(X, DY[:1], PATTERN), r"conv2d_wgrad\(\): dy has shape \(1, 16, 4, 4\)"),
        (lambda: bs.conv2d_wgrad(X, DY.half(), PATTERN), r"dy has dtype torch.float16 and x torch.float32"),
        (
            lambda: bs.linear(torch.ones(2, 8), VALUES, PATTERN),
            r"linear\(\): the pattern has shape .* \(K, C, 1, 1\)",
        ),
        (
            lambda: bs.linear(torch.ones(2, 4), torch.ones(2, 8, 8), bs.BSRPattern.full((16, 8, 1, 1), (8, 8))),
            r"linear\(\): x has shape \(2, 4\); it needs \[..., C\] with C = 8",
        ),
        (
            lambda: torch.ops.bsrconv.fprop(
                X, VALUES, PATTERN.index[:-4], None, PATTERN.shape, [1, 1], [0, 0], [1, 1], None
            ),
            "the packed index is .* Take it from BSRPattern.index",
        ),
        (
            lambda: torch.ops.bsrconv.fprop(
                X, VALUES[:, :5], PATTERN.index, None, PATTERN.shape, [1, 1], [0, 0], [1, 1], None
            ),
            r"values has shape \(9, 5, 8\); it needs \(nnzb, bk, bc\) where bk divides K = 16",
        ),
        (lambda: conv(x=X.to("meta")), r"x is on meta|values is on cpu and x on meta"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_mixed_devices():
    with pytest.raises(ValueError, match=r"the pattern on cpu; move one of them \(pattern.to\('cuda:0'\)\)"):
        conv(x=X.cuda(), values=VALUES.cuda())
    with pytest.raises(ValueError, match="values is on cpu and x on cuda:0"):
        conv(x=X.cuda())


@pytest.mark.device
def test_a_named_backend_never_gives_way_to_another():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fine = bs.BSRPattern.random((16, 8, 3, 3), (8, 1), 0.5)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run this: .*bc"):
        conv(X.to(device), torch.randn(fine.nnzb, 8, 1, device=device), fine.to(device), backend="triton")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run this: .*float64"):
        conv(X.double().to(device), VALUES.double().to(device), PATTERN.to(device), backend="triton")
    with pytest.raises(ValueError, match=r"backend 'cupy' cannot run this: .*float64"):
        conv(X.double().to(device), VALUES.double().to(device), PATTERN.to(device), backend="cupy")


def test_available_backends_says_why():
    backends = bs.available_backends()
    assert list(backends) == ["torch", "cpu", "triton", "cupy"]
    assert backends["torch"] is None
    assert backends["cpu"] is None  # the tests need a C++ compiler
    assert backends["triton"] is None  # a GPU, or the interpreter that conftest asks for
    assert backends["cupy"] is None  # a GPU, or the emulator that conftest puts in its place


def test_what_is_available_is_tested():
    gpu = torch.cuda.is_available()
    needed = [("torch", "cpu"), ("cpu", "cpu"), *(() if gpu else [("triton", "cpu"), ("cupy", "cpu")])]
    needed += [("torch", "cuda"), ("triton", "cuda"), ("cupy", "cuda")] if gpu else []
    assert needed == RUNNERS


def run_python(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    result = processes.run([sys.executable, "-c", code], env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_an_absent_backend_is_explained():
    code = """if True:
        import torch, blocksparse as bs
        p = bs.BSRPattern.full((8, 8, 3, 3), (8, 8))
        args = torch.ones(1, 8, 5, 5), torch.ones(9, 8, 8), p
        for backend in "triton", "cupy":
            print(bs.available_backends()[backend])
            try:
                bs.conv2d(*args, backend=backend)
            except RuntimeError as error:
                print(error)
            print(bs.explain(*args).backend)
    """
    lines = run_python(code).splitlines()
    assert len(lines) == 6
    for backend, (why, error, default) in zip(("triton", "cupy"), (lines[:3], lines[3:]), strict=True):
        assert "no CUDA device is visible" in why
        assert f"backend '{backend}' cannot run this: no CUDA device is visible" in error
        assert error.endswith("Available here: torch, cpu; backend=None chooses one that can")
        assert default in ("torch", "cpu")


def test_a_broken_triton_is_named():
    code = """if True:
        import sys
        sys.modules["triton"] = None  # what an import of a package that is not installed finds
        import torch, blocksparse as bs
        p = bs.BSRPattern.full((8, 8, 3, 3), (8, 8))
        print(bs.available_backends()["triton"])
        print(bs.conv2d(torch.ones(1, 8, 5, 5), torch.ones(9, 8, 8), p).shape)
    """
    why, shape = run_python(code, TRITON_INTERPRET="1").splitlines()
    assert "importing Triton failed" in why
    assert shape == "torch.Size([1, 8, 3, 3])"
