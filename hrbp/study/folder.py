"""The folder of a study: which content is accepted, how its files are read and written."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ..files import LOCK, whole_file, write_json
from ..training.checkpoint import LAST, PREVIOUS, differences

RESULTS, TABLE, RESULT = "results.json", "table.csv", "result.json"


def take_up(
    out: Path, settings: Mapping[str, Any], who: str, trainings: Iterable[Path], may_grow: Sequence[str]
) -> dict[str, Any]:
    """The content of results.json; {} for a new folder, or for one without any training yet.

    A study may be continued with more trainings: settings in `may_grow` may differ, if no training there is dropped.

    Args:
        out: folder of the study.
        settings: of the study.
        who: for messages.
        trainings: the folders of its trainings.
        may_grow: names of settings that decide which trainings there are, not how one is done.

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
    """Whether this is the lock, or a partial file of a process that was killed."""
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
    """Whether it is a finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_seconds(before: Mapping[str, Any], key: str, out: Path) -> dict[str, Any]:
    """Seconds under a key of results.json: name -> seconds, or name -> name -> seconds."""
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
    """The result of the training in this folder; None if it is not finished.

    Args:
        folder: of the training.
        identity: values that result.json needs to have.
        numbers: keys that need a number.
        ended: further ones, unless the training diverged.
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


def write_results(out: Path, results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write results.json, and table.csv from the rows."""
    write_json(out / RESULTS, results)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["line"])
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(out / TABLE) as file:
        file.write(text.getvalue().encode())
