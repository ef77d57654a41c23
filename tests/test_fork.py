"""os.fork() beside threads: what the library remembers is never locked in the child, and is right there."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).parent.parent

# The child looks up and plans, and computes nothing: PyTorch's own thread pools do not survive a fork.
FORKS = """
import os, signal, sys, threading, time
from dataclasses import replace

import torch
import blocksparse as bs
from blocksparse.index import unpack
from blocksparse.kernels import torch_conv

torch.manual_seed(0)
pattern = bs.BSRPattern.random((16, 16, 3, 3), (8, 8), 0.5)
values = torch.zeros(pattern.nnzb, 8, 8)
tables = unpack(pattern.index, pattern.shape, pattern.blocksize, pattern.nnzb)
g = bs.ConvGeometry.of((1, 16, 8, 8), pattern.shape, 1, 1)
places = values.dtype, values.device, None
planned = bs.plan.plan_conv("test", g.x_shape, pattern.shape, values.shape, [(1, 1)] * 3, *places)
assert planned.on(tables).backend == "dense"
stop = threading.Event()


def look_up():
    while not stop.is_set():
        torch_conv._decomposition(tables, g, pattern.blocksize)


def plan():
    while not stop.is_set():
        replace(planned).on(tables)  # a plan that was never asked for its dense twin


def remember():
    while not stop.is_set():
        fresh = unpack(pattern.index.clone(), pattern.shape, pattern.blocksize, pattern.nnzb)
        torch_conv._decomposition(fresh, g, pattern.blocksize)


work = {"look_up": look_up, "plan": plan, "remember": remember}[sys.argv[1]]
sys.setswitchinterval(1e-7)
thread = threading.Thread(target=work, daemon=True)
thread.start()
for i in range(100):
    time.sleep(0.001)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends this process if it waits for ever
        torch_conv._decomposition(tables, g, pattern.blocksize)
        os._exit(0 if replace(planned).on(tables).backend == "dense" else 9)
    _, status = os.waitpid(child, 0)
    if status:
        print("child", i, "ended with", os.waitstatus_to_exitcode(status))
        os._exit(1)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("thread", ["look_up", "plan", "remember"])
def test_a_fork_beside_a_thread_that_is_planning(thread):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKS, thread]
    result = processes.run(command, env=env)
    assert result.returncode == 0, result.stdout + result.stderr


def test_locks_are_made_anew_in_a_child():
    """cached_property holds one for all objects up to Python 3.11; functools.cache and lru_cache hold none."""
    for path in [*(ROOT / "blocksparse").rglob("*.py"), *(ROOT / "hrbp").rglob("*.py")]:
        tree = ast.walk(ast.parse(path.read_text()))
        names = {getattr(node, "attr", getattr(node, "id", getattr(node, "name", None))) for node in tree}
        assert "cached_property" not in names, path
        locks = names & {"Lock", "RLock", "Condition", "Semaphore", "Queue", "SimpleQueue"}
        assert not locks or "register_at_fork" in names, f"{path}: {locks}"
