"""Result files: how they are written, and how they are read, older ones too."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.shared.options import plain
from bench.shared.rows import Row
from hrbp.files import write_json

FORMAT = 2  # 1: files without this number, see `_as_now`

Json = dict[str, Any]


class Writer:
    """Writes one result file, whole each time, as often as there is more in it; without --json it writes nothing."""

    def __init__(self, kind: str, args: argparse.Namespace, machine: Json, *leave_out: str) -> None:
        self._path, self._begin = args.json, time.perf_counter()
        self._head = {"kind": kind, "format": FORMAT}
        self._facts = {"options": plain(args, "json", "plot", *leave_out), "machine": machine}

    def write(self, rows: Sequence[Row], complete: bool, **more: Any) -> None:
        """`complete` False: the run goes on, or was interrupted."""
        if self._path is not None:
            state = {"complete": complete, "seconds": time.perf_counter() - self._begin}
            content = self._head | state | self._facts | more | {"rows": [row.as_json() for row in rows]}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, content)


def read(path: Path) -> Json:
    """The content of a result file in the present form.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no result file.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict) or "machine" not in content:
        raise ValueError(f"{path}: it has no 'machine'")
    return as_now(content)


def as_now(content: Json) -> Json:
    """A file of an older form, or one inside a file of gpu.py, in the present form."""
    if content.get("format", 1) == FORMAT:
        return content
    content = {"kind": "run", "format": FORMAT, **content}
    if content["kind"] == "run":
        return content | {
            "rows": [_layer_row(row) for row in content["rows"]],
            "totals": [_renamed(total, {"rival_ms": "baseline_ms"}) for total in content["totals"]],
        }
    if content["kind"] == "step":
        names = {"way": "variant", "step_bytes": "extra_bytes"}
        return content | {"rows": [_renamed(row, names) for row in content["rows"]]}
    if content["kind"] == "infer":
        return content | {"rows": [_renamed(row, {"layout": "variant"}) for row in content["rows"]]}
    return content


def _layer_row(row: Json) -> Json:
    """A layer's row had what it measured under "sparse"."""
    row = _renamed(row, {"rivals": "baselines"})
    return row | row.pop("sparse")


def _renamed(row: Json, names: dict[str, str]) -> Json:
    return {names.get(name, name): value for name, value in row.items()}
