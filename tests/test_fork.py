"""os.fork() beside threads: what the library remembers is never locked in the child, and is right there."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).parent.parent

# The child plans, and computes nothing: PyTorch's own thread pools do not survive a fork.
FORKS = """
import os, signal, sys, threading, time

import torch
import blocksparse as bs
from blocksparse import plan

torch.manual_seed(0)
pattern = bs.BSRPattern.random((64, 64, 3, 3), (8, 8), 0.1)
values = torch.zeros(pattern.nnzb, 8, 8)


def planned():
    x = torch.empty(1, 64, 8, 8)
    return bs.explain(x, values, pattern, 1, 1).backend


def look_up(stop):
    while not stop.is_set():
        planned()


def make(stop):
    while not stop.is_set():
        plan.plan_conv.cache_clear()
        planned()


needed = planned()
sys.setswitchinterval(1e-7)
for work in (look_up, make):
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), daemon=True)
    thread.start()
    for i in range(int(sys.argv[1])):
        time.sleep(0.001)
        child = os.fork()
        if child == 0:
            signal.alarm(120)  # ends this process if it waits for ever
            os._exit(0 if planned() == needed else 9)
        _, status = os.waitpid(child, 0)
        if status:
            print("child", i, "beside", work.__name__, "ended with", os.waitstatus_to_exitcode(status))
            os._exit(1)
    stop.set()
    thread.join()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("forks", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_fork_beside_a_thread_that_is_planning(forks):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKS, str(forks)]
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
