"""Processes that tests start: each one ends within a limit, together with all that it started, and shows its output.

The limit is there for hangs, and many times what any of them takes on a busy machine: no test fails on its speed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LIMIT = 600.0  # seconds


class Process:
    """A command beside the test, in a session of its own. Its output goes to files, so that it never waits for us.

    Args:
        given: what it reads from stdin.
        env, cwd: as of subprocess.Popen.
        limit: seconds after which it has hung. Who then asks for it gets an AssertionError with its output so far;
            a Python process adds where each of its threads was.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        given: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        limit: float = LIMIT,
    ) -> None:
        self.command, self.limit = [str(word) for word in command], limit
        self._files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(3)]  # noqa: SIM115
        stdin, stdout, stderr = self._files
        stdin.write(given)
        stdin.seek(0)
        self._end = time.monotonic() + limit
        self._process = subprocess.Popen(
            self.command, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, start_new_session=True,
            env={"PYTHONFAULTHANDLER": "1", **(os.environ if env is None else env)},
        )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for file in self._files:
            file.close()

    def running(self) -> bool:
        """Whether it has not ended yet; AssertionError past the limit."""
        if self._process.poll() is None and time.monotonic() > self._end:
            self._hung()
        return self._process.poll() is None

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and output, once it has ended; AssertionError past the limit."""
        with self:
            try:
                self._process.wait(max(0.0, self._end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._hung()
            return subprocess.CompletedProcess(self.command, self._process.returncode, *self.output())

    def kill(self) -> None:
        """End it and all that it started, at once; nothing where it has ended."""
        if self._process.poll() is None:
            self._kill(self._tree())

    def output(self) -> list[str]:
        """What it has written so far: stdout, stderr."""
        texts = []
        for file in self._files[1:]:
            file.seek(0)
            texts.append(file.read())
        return texts

    def _tree(self) -> list[int]:
        """It and every process below it; those may have sessions of their own."""
        pids = [self._process.pid]
        for pid in pids:
            with contextlib.suppress(OSError):  # it has just ended, or this is not Linux
                for file in Path(f"/proc/{pid}/task").glob("*/children"):
                    pids += map(int, file.read_text().split())
        return pids

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _hung(self) -> None:
        pids = self._tree()
        for pid in pids:  # faulthandler prints the stacks; of one process after the other, into one file
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
            for _ in range(50):
                if not ended(pid):
                    time.sleep(0.1)
        self._kill(pids)
        raise AssertionError(
            f"{shlex.join(self.command)[:1000]}: still running after {self.limit:g} s; its output so far:\n"
            + "".join(self.output())
        )


def ended(pid: int) -> bool:
    """Whether this process has ended; its parent may not have taken note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def run(
    command: Sequence[str],
    *,
    given: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    limit: float = LIMIT,
) -> subprocess.CompletedProcess[str]:
    """subprocess.run with its output captured, and an end to it: see Process."""
    return Process(command, given=given, env=env, cwd=cwd, limit=limit).finish()


@contextlib.contextmanager
def limited(limit: float = LIMIT) -> Iterator[None]:
    """The body, or an AssertionError once the limit is over: for workers that a library starts and waits for."""

    def expired(*_: object) -> None:
        raise AssertionError(f"still running after {limit:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fork() -> int:
    """os.fork(), where that is safe: in a process of one thread.

    A child has no thread but the one that forked, and waits without end for what others held or were to do: OpenMP's
    are the ones that PyTorch leaves behind.
    """
    tasks = Path("/proc/self/task")  # of Linux: threads of C code, too
    threads = len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()
    assert threads == 1, f"a process of {threads} threads must not fork"
    return os.fork()


# Variables under which PyTorch, MKL and NumPy start no threads, whatever a user has set.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# What PyTorch's compiler keeps on disk calls ops by the schema that they had: a folder for each state of ops.py.
_OPS = hashlib.sha256(Path(__file__).parents[1].joinpath("blocksparse", "ops.py").read_bytes()).hexdigest()[:12]
COMPILED = {"TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"torchinductor-{os.getuid()}-{_OPS}")}
