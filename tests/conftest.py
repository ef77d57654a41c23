"""Where the suites run: on a GPU where there is one, else Triton in its interpreter and CUDA C++ under g++."""

from __future__ import annotations

import os

import processes

# Of this process and of those that it starts: the tests' tensors are too small for more, and threads that wait for each
# other take many times as long where something else runs. test_threads.py is about several. Before PyTorch is imported.
os.environ.update(processes.ONE_THREAD)

import torch

# Triton reads this when a kernel is decorated: before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

from blocksparse.kernels import cupy_conv
from emulator import Emulator

torch.set_num_threads(1)
if not torch.cuda.is_available():
    cupy_conv.runtime = Emulator()

# The default keeps the whole run short on two cores. HYPOTHESIS_PROFILE=deep draws twenty times as many cases.
_common = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=100, **_common)
settings.register_profile("deep", max_examples=2000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def limited():
    """A test whose workers hang fails."""
    with processes.limited():
        yield


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN: an element that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
