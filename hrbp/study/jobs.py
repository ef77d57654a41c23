"""Trainings of a study side by side on a CPU: processes that share out its threads.

Two small networks side by side, each on one thread, are trained faster than one after the other on two: what is between
their products is not shared out. Each process gets the study once and then training after training, which write their
own folders as they always do.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO, Any

import torch

from blocksparse import keep_freed_memory

from ..progress import Progress
from ..training.signals import noted
from .runner import Run, Runner

LOOK, END_SECONDS = 0.2, 60.0  # how often to look for a signal; that a process may take to write its checkpoint


def trained_side_by_side(study: Runner, todo: Sequence[Run], jobs: int) -> Iterator[tuple[Run, dict[str, Any] | str]]:
    """Trainings with their results as they end; a signal's name as the last result where one came.

    Args:
        study: what is trained is sent to other processes as it stands.
        todo: the trainings.
        jobs: processes, each with its share of PyTorch's threads.

    Raises:
        ChildProcessError: a process was killed.
        Exception: what a training raised; the others are stopped first, and continue where they were.
    """
    came: list[int] = []
    left, ended = deque(todo), deque[tuple[Run, Any]]()  # which threads share without a lock
    processes = [_Process(study, max(1, torch.get_num_threads() // jobs)) for _ in range(min(jobs, len(todo)))]
    under_way: dict[int, Run] = {}

    def feed(process: _Process) -> None:
        while not came:
            try:
                under_way[id(process)] = run = left.popleft()
            except IndexError:
                return
            result = process.train(run)
            del under_way[id(process)]
            ended.append((run, result))
            if not isinstance(result, dict):
                return

    def stop(number: int) -> None:
        came.append(number)
        for process in processes:
            process.send(number)

    feeders = [threading.Thread(target=feed, args=(process,), daemon=True) for process in processes]
    try:
        with noted(stop):
            for feeder in feeders:
                feeder.start()
            waiting = len(todo)
            while waiting and not came:
                if not ended:
                    time.sleep(LOOK)
                    if study.say.due():
                        study.say.show(f"under way: {', '.join(study.named(*run) for run in list(under_way.values()))}")
                    continue
                run, result = ended.popleft()
                if isinstance(result, BaseException):
                    raise result
                waiting -= 1
                yield run, result
            for feeder in feeders:
                feeder.join(END_SECONDS)
        for run, result in list(ended):  # after the signal
            if isinstance(result, dict):
                yield run, result
        if came:
            yield todo[0], signal.Signals(came[0]).name
    finally:
        for process in processes:
            process.close()


class _Process:
    """A process that trains what it is given, one training after the other."""

    def __init__(self, study: Runner, threads: int) -> None:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        # A session of its own: Ctrl-C comes to this process alone, which passes it on.
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import work; work()"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.orders, self.results = self.process.stdin, self.process.stdout
        self.first: tuple[Runner, int] | None = (study, threads)

    def train(self, run: Run) -> dict[str, Any] | str | BaseException:
        """The result of a training, or the signal that stopped it, or what it raised."""
        try:
            if self.first is not None:
                _send(self.orders, self.first)
                self.first = None
            _send(self.orders, run)
            return pickle.load(self.results)
        except (EOFError, BrokenPipeError):
            status = self.process.wait()
            why = f"by signal {-status} (too little memory? fewer jobs need less)" if status < 0 else f"with {status}"
            return ChildProcessError(f"a process that trained ended {why}; run the study again to continue")
        except Exception as error:  # sent to whoever waits for the result
            return error

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def close(self) -> None:
        """End the process; a training under way writes its checkpoint first."""
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.orders, self.results):
            with contextlib.suppress(OSError):
                pipe.close()


def _send(pipe: IO[bytes], what: Any) -> None:
    pickle.dump(what, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def work() -> None:
    """What each process does: trainings from standard input, their results to standard output."""
    parent = os.getppid()
    orders, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else is written among the results
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # nobody waits for the results; a checkpoint is written

    threading.Thread(target=watch, daemon=True).start()
    keep_freed_memory()
    study, threads = pickle.load(orders)
    torch.set_num_threads(threads)
    study.say = Progress(quiet=True)
    with contextlib.suppress(EOFError, BrokenPipeError):  # no more
        while True:
            run = pickle.load(orders)
            try:
                result: Any = study.train_one(*run, "")
            except Exception as error:
                result = error
            _send(results, result)
            if isinstance(result, str):
                return
