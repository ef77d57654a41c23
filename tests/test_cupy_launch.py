"""What CuPy makes of our calls, as far as it goes without a driver: it packs the arguments before it asks for one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import blocksparse as bs
from blocksparse import BSRPattern
from blocksparse.kernels import cupy_conv

cupy = pytest.importorskip("cupy")
from cupy.cuda.function import Function  # noqa: E402

pytestmark = pytest.mark.device
without_driver = pytest.mark.skipif(torch.cuda.is_available(), reason="about what CuPy does before it needs a driver")


def launched(function, args: tuple) -> str:
    """The error of launching `function`, which is none."""
    with pytest.raises((TypeError, cupy.cuda.runtime.CUDARuntimeError)) as error:
        function((1,), (128,), args, shared_mem=cupy_conv.slots.SHARED_BYTES, stream=SimpleNamespace(ptr=0))
    return str(error.value)


@without_driver
def test_cupy_takes_every_argument(monkeypatch):
    """Pointers, a null pointer, numbers and struct Conv by value; a list of numbers it would refuse."""
    calls = {}
    emulated = cupy_conv.runtime

    class Recorder:
        device_type = "cpu"
        absent = emulated.absent

        def launch(self, name, kind, flags, ctas, threads, shared, args):
            calls[name, any(arg is None for arg in args)] = tuple(map(cupy_conv._pointer, args))
            assert all(type(number) is int for number in (ctas, threads, shared))
            emulated.launch(name, kind, flags, ctas, threads, shared, args)

    monkeypatch.setattr(cupy_conv, "runtime", Recorder())
    for order in (None, torch.arange(16).flip(0)):
        pattern = BSRPattern.from_mask(torch.ones(16, 8, 3, 3, dtype=torch.bool), (8, 1), order)
        x, bias = bs.to_batch_last(torch.randn(33, 8, 12, 12)), None if order is None else torch.randn(16)
        values = torch.randn(pattern.nnzb, 8, 1).requires_grad_()
        bs.conv2d(x.requires_grad_(), values, pattern, bias, padding=1, backend="cupy").sum().backward()
    assert {name for name, _ in calls} == {"fprop", "dgrad", "wgrad", "add_splits", "add_shares"}
    assert {missing for _, missing in calls} == {False, True}

    function = Function.__new__(Function)
    for args in calls.values():
        assert "driver" in launched(function, args).lower()
    assert "size one" in launched(function, (np.zeros(2, cupy_conv.CONV),))
    assert "Unsupported type" in launched(function, (x,))


@without_driver
def test_modules_are_compiled_by_name():
    """RawModule and what is asked of its kernels; compiling them needs a device."""
    module = cupy.RawModule(code=cupy_conv.source("fprop"), options=("--std=c++17",))
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        module.get_function("fprop")
    assert cupy.RawKernel.max_dynamic_shared_size_bytes.__set__


def test_cupy_takes_torch_streams():
    """By the stream protocol, 0 being the default stream."""
    assert callable(torch.cuda.Stream.__cuda_stream__)
    for handle in (0, 16):
        stream = SimpleNamespace(__cuda_stream__=lambda handle=handle: (0, handle))
        assert cupy.cuda.Stream.from_external(stream).ptr == handle


def test_an_older_cupy_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cupy_conv.Cuda().absent() is None
    monkeypatch.setattr(cupy.cuda, "Stream", object)
    assert cupy_conv.Cuda().absent() == f"CuPy {cupy.__version__} is installed; this backend needs 14 or later"
