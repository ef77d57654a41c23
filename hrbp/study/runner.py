"""What studies share: a folder of trainings that may be stopped anywhere, and times that are measured in turns."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from ..files import LOCK, whole_file
from ..progress import Progress
from ..training.checkpoint import LAST, PREVIOUS, differences
from ..training.result import Diverged
from ..training.trainer import Trainer

RESULTS, TABLE, RESULT = "results.json", "table.csv", "result.json"
WARM_UP = 2  # rounds that are not counted


# ---------------------------------------------------------------- the folder


def take_up(
    out: Path, settings: Mapping[str, Any], who: str, trainings: Iterable[Path], may_grow: Sequence[str]
) -> dict[str, Any]:
    """What results.json of the folder holds; {} for a new folder, or for one in which nothing has been trained yet.

    A study may be continued with more in it: what `may_grow` may differ where no training there is left out.

    Args:
        out: folder of the study.
        settings: of the study.
        who: for messages.
        trainings: the folders of its trainings.
        may_grow: names of settings that say which trainings there are, and nothing of how one is done.

    Raises:
        ValueError: the folder holds another study, or something else.
    """
    file = out / RESULTS
    if not file.exists():
        if out.exists() and (not out.is_dir() or any(not _ours(path.name) for path in out.iterdir())):
            raise ValueError(f"{who}: {out} holds something that is no study; use a new folder")
        return {}
    before = read(file)
    begun = {path.parent for name in (RESULT, LAST, PREVIOUS) for path in out.glob(f"*/{name}")}
    if not begun:
        return {}
    there = before.get("settings")
    found = differences(there, settings)
    fixed = [text for text in found if text.split(".")[0].split(" ")[0] not in may_grow]
    if fixed or (found and begun - set(trainings)):
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{who}: {out} holds a study with other settings: {'; '.join(found[:3])}{more}; use those, or another"
            " folder"
        )
    return before


def _ours(name: str) -> bool:
    """Whether this is the lock, or what a process that was killed left of a file."""
    return name == LOCK or (name.startswith(".") and name.endswith(".part"))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file of a study; ValueError if it is damaged."""
    try:
        found = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Study(): {path} is damaged ({error}); remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"Study(): {path} is no file of a study; remove it")
    return found


def is_number(value: Any) -> TypeGuard[float]:
    """Finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_seconds(before: Mapping[str, Any], key: str, out: Path) -> dict[str, Any]:
    """Times under a key of results.json: name -> seconds, or name -> name -> seconds."""
    found = before.get(key)
    flat = [
        seconds
        for part in (found.values() if isinstance(found, dict) else [None])
        for seconds in (part.values() if isinstance(part, dict) else [part])
    ]
    if not isinstance(found, dict) or not all(is_number(seconds) and seconds > 0 for seconds in flat):
        raise ValueError(f"Study(): {out / RESULTS} is damaged: {key!r} has no times; remove it")
    return found


def read_result(
    folder: Path, identity: Mapping[str, Any], numbers: Sequence[str], ended: Sequence[str] = ()
) -> dict[str, Any] | None:
    """What the finished training in this folder came to; None if it is not finished.

    Args:
        folder: of the training.
        identity: what it has to be of.
        numbers: keys that it needs.
        ended: further ones, of a training whose loss stayed finite.
    """
    file = folder / RESULT
    if not file.exists():
        return None
    result = read(file)
    if any(result.get(key) != value for key, value in identity.items()):
        raise ValueError(f"Study(): {file} is of another training; remove it, or use another folder")
    diverged = result.get("accuracy") is None and isinstance(result.get("diverged"), str)
    for key in numbers if diverged else (*numbers, *ended):
        if not is_number(result.get(key)):
            raise ValueError(
                f"Study(): {file} is damaged: {key!r} is {str(result.get(key))[:60]}, no number; remove it"
            )
    return result


def write_json(path: Path, content: Any) -> None:
    """Write plain values, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_results(out: Path, results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write results.json, and table.csv from the rows."""
    write_json(out / RESULTS, results)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["line"])
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(out / TABLE) as file:
        file.write(text.getvalue().encode())


# ---------------------------------------------------------------- one training


class RunningLine(Progress):
    """A training's lines, each in place of the one before, after what the study says of it."""

    def __init__(self, progress: Progress, head: str) -> None:
        super().__init__(progress.quiet, progress.stream)
        self.progress, self.head = progress, head

    def show(self, text: str) -> None:
        self.shown = time.monotonic()
        self.progress.show(f"{self.head}: {text}")

    def say(self, text: str) -> None:
        if self.due():
            self.show(text)


def finish(trainer: Trainer) -> tuple[nn.Module, dict[str, Any]] | str:
    """Train to the end: the model, and what it came to as plain values; or the signal that stopped it."""
    try:
        result = trainer.run()
    except Diverged as error:
        return trainer.model, {"accuracy": None, "diverged": str(error), "seconds": 0.0}
    if result.stopped:
        return result.stopped
    ended = {"accuracy": result.accuracy, "steps": result.steps, "seconds": result.seconds}
    return result.model, ended | {"step_seconds": result.step_seconds, "memory": result.memory}


# ---------------------------------------------------------------- times


def in_turns(steps: Mapping[str, Callable[[], float]], rounds: int, first: str = "dense") -> dict[str, float]:
    """Median seconds of steps, from rounds in which each is taken once: what else the machine does meets them alike.

    Ratios to `first` are those within a round: what slows a round down slows both sides.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + WARM_UP):
        for name, step in steps.items():
            times[name].append(step())
    counted = {name: seconds[WARM_UP:] for name, seconds in times.items()}
    pace = statistics.median(counted[first])
    return {
        name: pace * statistics.median(t / d for t, d in zip(seconds, counted[first], strict=True))
        for name, seconds in counted.items()
    }


def timed(device: torch.device, step: Callable[[], Any]) -> float:
    """Seconds of a step, with all that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def machine(device: torch.device) -> str:
    """What the times are of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"


# ---------------------------------------------------------------- seeds


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.mean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Of a sample; None of one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def doubt(found: Sequence[Mapping[str, Any]]) -> str:
    """Which differences of accuracy say nothing: those under twice their standard error, deviations pooled."""
    spread = [(row["seeds"], row["deviation"]) for row in found if row["deviation"] is not None]
    if not spread:
        return "with one seed, small differences say nothing"
    variance = sum((n - 1) * d**2 for n, d in spread) / sum(n - 1 for n, _ in spread)
    points = 200 * math.sqrt(2 * variance / min(row["seeds"] for row in found))
    return f"differences under {points:.1f} points are within the spread of the seeds"
