"""Runs the stages of bench/gpu.py: processes within limits, whose results are kept as they come."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.shared.rows import ERROR, FAIL
from bench.stages.jobs import BENCH, Job, Stage

PATIENCE = 8.0  # seconds between an interrupt and the end
OFTEN = 5.0  # seconds after which results of processes that run are read again
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass
class Running:
    """A job that was started, and when it has to be done (time.monotonic())."""

    job: Job
    process: subprocess.Popen[bytes]
    end: float


def run_stage(
    stage: Stage, seconds: float, folder: Path, log: Any, found: dict[str, Any], keep: Callable[[], None] = lambda: None
) -> None:
    """Fills `found`: status, why, seconds, and the results of the jobs; `keep` is called as often as there are more.

    A job's result is read while it runs, too: what it has measured is kept, whatever ends it.
    """
    begin = time.monotonic()
    found |= {"status": "failed", "why": "", "jobs": {}, "seconds": 0.0}
    if stage.missing or seconds <= 0:
        found |= {"status": "not run", "why": stage.missing or "no time was left"}
        return
    running: list[Running] = []
    late: set[str] = set()
    try:
        if stage.parallel:
            running = [start(job, folder, log, begin + seconds) for job in stage.jobs]
            late |= finish(running, folder, found, keep)
        else:
            for at, job in enumerate(stage.jobs):
                # What earlier jobs did not use, or took too much, is shared out over those to come.
                left = begin + seconds - time.monotonic()
                share = left * job.share / sum(each.share for each in stage.jobs[at:])
                running = [start(job, folder, log, time.monotonic() + share)]
                late |= finish(running, folder, found, keep)
    finally:
        stop(running)  # interrupted: what they have written so far counts
        collect(running, folder, found)
        found["seconds"] = time.monotonic() - begin
        wrong = [name for name, job in found["jobs"].items() if job["exit"] != 0 and name not in late]
        for name in late:
            found["jobs"][name]["late"] = True
        found["status"] = "failed" if wrong else "late" if late else "ok"
        reasons = (("exit status not 0", wrong), ("stopped at its limit", sorted(late)))
        found["why"] = "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons if names)


def start(job: Job, folder: Path, log: Any, end: float) -> Running:
    for ending in ("json", "xml"):  # of an earlier run
        (folder / f"{job.name}.{ending}").unlink(missing_ok=True)
    log.write(f"\n$ {' '.join(job.command)}\n")
    log.flush()
    root = str(BENCH.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = ONE_THREAD | os.environ | {"PYTHONPATH": path} | dict(job.environment)
    process = subprocess.Popen(
        job.command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    return Running(job, process, end)


def finish(running: list[Running], folder: Path, found: dict[str, Any], keep: Callable[[], None]) -> set[str]:
    """Waits for every process until its limit; the names of those that were stopped."""
    late: set[str] = set()
    read = time.monotonic()
    while alive := [each for each in running if each.process.poll() is None]:
        now = time.monotonic()
        if over := [each for each in alive if now >= each.end]:
            late |= {each.job.name for each in over}
            stop(over)
            continue
        if now - read >= OFTEN:
            collect(running, folder, found)
            keep()
            read = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            alive[0].process.wait(min(each.end for each in alive) - now if len(alive) == 1 else 0.2)
    collect(running, folder, found)
    keep()
    return late


def stop(running: list[Running]) -> None:
    """Interrupt processes, all at once, so that they write their results; then kill them and all that they started."""
    for each in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.process.pid, signal.SIGINT)
    patience = time.monotonic() + PATIENCE
    for each in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.process.wait(max(0.0, patience - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.wait()


def collect(running: list[Running], folder: Path, found: dict[str, Any]) -> None:
    """What the jobs have written; the exit status of one that runs is None."""
    for each in running:
        result = result_of(each.job, folder)
        found["jobs"][each.job.name] = {"exit": each.process.poll(), "late": False, "result": result}


def result_of(job: Job, folder: Path) -> Any:
    """What a job wrote; times of single repetitions stay in its own file."""
    if (folder / f"{job.name}.xml").exists():
        return tests_of(folder / f"{job.name}.xml")
    try:
        return without_laps(json.loads((folder / f"{job.name}.json").read_text()))
    except (OSError, ValueError):
        return None


def without_laps(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            name: len(value) if name == "laps" and isinstance(value, list) else without_laps(value)
            for name, value in content.items()
        }
    return [without_laps(value) for value in content] if isinstance(content, list) else content


def tests_of(file: Path) -> dict[str, Any] | None:
    """Counts of pytest, and what failed: name and message."""
    try:
        suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    counts = {n: sum(int(s.get(n, 0)) for s in suites) for n in ("tests", "failures", "errors", "skipped")}
    failed, reasons = [], []
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for part in (case.find("failure"), case.find("error")):
            if part is not None:
                failed.append(f"{case.get('classname')}::{case.get('name')}")
                reasons.append((part.get("message") or "")[:300])
    return counts | {"failed": failed, "reasons": reasons}


def summary_of(name: str, found: dict[str, Any]) -> str:
    """One line a stage."""
    text = f"{name}: {found.get('status')}, {found.get('seconds', 0.0):.0f} s"
    results = [job["result"] for job in found.get("jobs", {}).values() if job["result"]]
    for counts in (result for result in results if "tests" in result):
        bad = counts["failures"] + counts["errors"]
        text += f"; {counts['tests']} tests, {bad} failed, {counts['skipped']} skipped"
    rows = [row for result in results for row in result.get("rows", ())]
    if rows and name != "compile":
        text += f"; {len(rows)} rows, {sum(row['status'] in (FAIL, ERROR) for row in rows)} wrong"
    return text + (f" ({found['why']})" if found.get("why") else "")
