"""What result files say, gathered by device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.shared import results
from bench.shared.rows import OK

Json = dict[str, Any]


@dataclass
class Device:
    """What all files say of one device."""

    name: str
    on_gpu: bool
    facts: list[str] = field(default_factory=list)
    runs: list[Json] = field(default_factory=list)  # of run.py
    steps: list[Json] = field(default_factory=list)  # rows
    launches: list[Json] = field(default_factory=list)  # rows
    inference: list[Json] = field(default_factory=list)  # rows
    checks: list[str] = field(default_factory=list)


def read(files: Sequence[Path]) -> list[Device]:
    """The devices of all files, in the order of the files."""
    devices: dict[str, Device] = {}
    for file in files:
        content = results.read(file)
        where = content["machine"]
        name = where["device"] + ("" if where["device_type"] == "cuda" else f", {where['threads']} threads")
        device = devices.setdefault(name, Device(name, where["device_type"] == "cuda"))
        versions = ", ".join(f"{n} {where[n]}" for n in ("torch", "triton", "cupy", "cuda", "cudnn") if where.get(n))
        gpu = where.get("gpu")
        driver = f", driver {gpu['driver_version']}, {gpu['clocks.max.sm']} at most" if isinstance(gpu, dict) else ""
        commit = (where["commit"] or "unknown")[:10] + (" with changes" if where["dirty"] else "")
        unfinished = "" if content["complete"] else "; not complete"
        device.facts.append(f"`{file.name}`: {versions}{driver}; commit {commit}{unfinished}")
        for kind, result in results_of(content, device):
            if kind == "run":
                device.runs.append(result)
                continue
            rows = {"step": device.steps, "launch": device.launches, "infer": device.inference}[kind]
            rows.extend(result["rows"])
    return list(devices.values())


def results_of(content: Json, device: Device) -> Iterator[tuple[str, Json]]:
    """(kind, content) of a file; those inside a file of gpu.py, whose checks go to the device."""
    kind = content["kind"]
    if kind in ("run", "step", "launch", "infer"):
        yield kind, content
    elif kind == "gpu":
        for name, stage in content["stages"].items():
            found = [job["result"] for job in stage["jobs"].values() if job["result"]]
            device.checks.append(check_line(name, stage, found))
            for result in found:
                if name in ("layers", "step", "launch"):
                    result = results.as_now(result)
                    yield result["kind"], result
    else:
        raise ValueError(f"a file of kind {kind!r}")


def check_line(name: str, stage: Json, found: list[Json]) -> str:
    said = f"{name}: {stage['status']}"
    for counts in (result for result in found if "tests" in result):
        said += f", {counts['tests']} tests, {counts['failures'] + counts['errors']} failed"
    if name == "tiles" and (rows := [row for result in found for row in result.get("rows", ())]):  # an older file
        said += f", {len(rows)} tiles, {sum(row['status'] != OK for row in rows)} wrong"
    return said + (f" ({stage['why']})" if stage.get("why") else "")


def time_of(row: Json) -> float | None:
    """Median milliseconds of a row, or of a baseline of one."""
    return row["times"]["p50"] if row and row["times"] else None


def dense_of(row: Json) -> float | None:
    """Median milliseconds of the dense convolution beside a layer's row."""
    return time_of(row["baselines"].get("dense"))
