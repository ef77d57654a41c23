"""Runs the stages of bench/gpu.py: processes within limits, whose results are kept when they are stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.shared.rows import ERROR, FAIL
from bench.stages.jobs import BENCH, Job, Stage

PATIENCE = 8.0  # seconds between an interrupt and the end


def run_stage(stage: Stage, seconds: float, out: Path, log: Any, found: dict[str, Any]) -> None:
    """Fills `found`: status, why, seconds, and the results of the jobs, also when it is interrupted."""
    begin = time.monotonic()
    found |= {"status": "failed", "why": "", "jobs": {}}
    if stage.missing:
        found |= {"status": "not run", "why": stage.missing, "seconds": 0.0}
        return
    whole = 1.0 if stage.parallel else sum(job.share for job in stage.jobs)
    waiting: list[tuple[Job, subprocess.Popen[bytes], float]] = []
    try:
        for job in stage.jobs:
            for ending in ("json", "xml"):  # of an earlier run
                (out / f"{job.name}.{ending}").unlink(missing_ok=True)
            limit = seconds * job.share / whole
            log.write(f"\n$ {' '.join(job.command)}\n")
            log.flush()
            waiting.append((job, start(job, log), time.monotonic() + limit))
            if not stage.parallel:
                finish(waiting, found, out)
        finish(waiting, found, out)
    finally:
        for job, process, _ in waiting:  # interrupted: what they have written so far counts
            stop(process)
            found["jobs"][job.name] = {"exit": process.returncode, "result": result_of(job, out)}
        found["seconds"] = time.monotonic() - begin
        late = [name for name, job in found["jobs"].items() if job.get("late")]
        wrong = [name for name, job in found["jobs"].items() if job["exit"] != 0 and name not in late]
        found["status"] = "failed" if wrong else "late" if late else "ok"
        reasons = (("exit status not 0", wrong), ("stopped at its limit", late))
        found["why"] = "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons if names)


def start(job: Job, log: Any) -> subprocess.Popen[bytes]:
    root = str(BENCH.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(
        job.command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(waiting: list[tuple[Job, subprocess.Popen[bytes], float]], found: dict[str, Any], out: Path) -> None:
    """Waits for every process until its limit."""
    while waiting:
        job, process, end = waiting[0]
        late = False
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            stop(process)
        found["jobs"][job.name] = {"exit": process.returncode, "late": late, "result": result_of(job, out)}
        waiting.pop(0)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process, so that it writes its results; then kill it and all that it started."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def result_of(job: Job, out: Path) -> Any:
    """What a job wrote; times of single repetitions stay in its own file."""
    if (out / f"{job.name}.xml").exists():
        return tests_of(out / f"{job.name}.xml")
    try:
        return without_laps(json.loads((out / f"{job.name}.json").read_text()))
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
    """Counts of pytest, and the names of what failed."""
    try:
        suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    counts = {n: sum(int(s.get(n, 0)) for s in suites) for n in ("tests", "failures", "errors", "skipped")}
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return counts | {"failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad]}


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
