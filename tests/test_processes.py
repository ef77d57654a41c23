"""No process that a test starts outlives its limit, and none is forked beside threads."""

from __future__ import annotations

import ast
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import emulator
import processes
from processes import Process, run

TESTS = Path(__file__).parent


def python(code: str, **options):
    return run([sys.executable, "-c", code], **options)


def test_output_input_and_status():
    done = python("import sys; print(sys.stdin.read()); print('aside', file=sys.stderr); sys.exit(3)", given="word")
    assert (done.returncode, done.stdout, done.stderr) == (3, "word\n", "aside\n")


def test_output_of_any_length_blocks_nobody():
    with Process([sys.executable, "-c", "print('x' * 10**6)"]) as process:
        while process.running():
            time.sleep(0.01)
        assert process.finish().stdout == "x" * 10**6 + "\n"


def ends(pid: int) -> bool:
    """Within a while."""
    for _ in range(100):
        if processes.ended(pid):
            return True
        time.sleep(0.1)
    return False


HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("child", child.pid, flush=True)
def waits_in_vain():
    time.sleep(1000)
waits_in_vain()
"""


@pytest.mark.slow
def test_what_hangs_is_ended_and_shows_its_output_and_where_it_was():
    """With what it started, which holds its output open."""
    with pytest.raises(AssertionError, match=r"still running after 10 s; its output so far:\nchild \d+\n") as error:
        python(HANGS, limit=10)  # that it is under way by then
    assert "in waits_in_vain" in str(error.value)
    assert ends(int(str(error.value).split("so far:\nchild ")[1].split()[0]))


def test_one_that_is_watched_is_ended_too():
    def watch(process):
        while process.running():
            time.sleep(0.05)

    with Process([sys.executable, "-c", HANGS], limit=1) as process:
        with pytest.raises(AssertionError, match="child"):
            watch(process)
        assert not process.running()


def test_leaving_it_ends_it():
    with Process([sys.executable, "-c", HANGS]) as process:
        while "child" not in process.output()[0]:
            assert process.running()
            time.sleep(0.05)
        pid = int(process.output()[0].split()[1])
    assert ends(pid)


def test_waiting_for_workers_ends():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s"), processes.limited(0.2):
        time.sleep(100)
    assert signal.getsignal(signal.SIGALRM) is before
    with processes.limited(0.1):
        pass
    time.sleep(0.2)


def test_no_fork_beside_threads():
    held = threading.Event()
    thread = threading.Thread(target=held.wait)
    thread.start()
    try:
        with pytest.raises(AssertionError, match=r"a process of \d+ threads must not fork"):
            processes.fork()
    finally:
        held.set()
        thread.join()


@pytest.mark.slow
def test_pieces_run_whatever_number_of_threads_is_asked_for(monkeypatch):
    """PyTorch's threads live in the process that forks where a variable lets them: its children would wait for them."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    product = (
        "torch.nn.functional.conv2d(torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)); torch.randn(10**6).sum()"
    )
    *fine, raised = emulator.sanitized([product, product, "raise RuntimeError('its own')"], product)
    assert fine == ["", ""]
    assert raised.endswith("RuntimeError: its own\n")


STARTERS = {"subprocess", "multiprocessing", "torch.multiprocessing", "pty"}


def test_tests_start_processes_here_only():
    """Everywhere else they would have no limit, or fork beside threads."""
    for path in TESTS.glob("*.py"):
        if path.name == "processes.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & STARTERS, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in STARTERS, path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("os.fork", "os.forkpty", "os.system", "os.popen"), f"{path}, line {node.lineno}"
