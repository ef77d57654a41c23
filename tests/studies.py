"""What the tests of both studies share: short times, a stop in the middle of a training, a kill."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hrbp import data
from processes import Process

ROOT = Path(__file__).parent.parent


def quick(rounds: str):
    """A fixture: figures of trainings take longer than these trainings; times of these networks tell nothing."""

    @pytest.fixture(autouse=True, scope="module")
    def made():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hrbp.training.log.draw_training", lambda *_: None)
            patch.setattr(rounds, 1)
            patch.setattr("hrbp.study.timing.WARM_UP", 0)
            yield

    return made


def without(rows: list[dict], times: set[str]) -> list[dict]:
    """Rows without what differs from run to run."""
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def stop_at(monkeypatch: pytest.MonkeyPatch, last: int, *modules: str) -> type[data.Batches]:
    """Batches that ask for the end of the process when the `last` of those to train with is drawn; `drawn` counts."""

    class Counted(data.Batches):
        drawn = 0

        def epoch(self, epoch=0, start=0):
            for batch in super().epoch(epoch, start):
                if self.train:
                    Counted.drawn += 1
                    if Counted.drawn == last:
                        os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    for module in modules:
        monkeypatch.setattr(f"{module}.Batches", Counted)
    return Counted


@contextlib.contextmanager
def killed(module: str, out: Path, results: int) -> Iterator[None]:
    """A study (`tiny` of a test module) that was killed after so many trainings; none of those is done again."""
    code = f"from {module} import tiny; tiny({str(out)!r}).run()"
    with Process([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": ".:tests"}) as process:
        while process.running() and len(list(out.glob("*/result.json"))) < results:
            time.sleep(0.02)
        process.kill()
    finished = {file: file.stat().st_mtime_ns for file in out.glob("*/result.json")}
    assert len(finished) >= results
    yield
    assert finished == {file: file.stat().st_mtime_ns for file in finished}
