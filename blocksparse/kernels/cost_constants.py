"""Nanoseconds of the terms of cost.py on this processor.

cost_constants.json has those that bench/calibrate.py measured, for processors of some makers; others take the first. A
file in the user's cache, which `bench/calibrate.py --keep` writes, goes before them on the processor that it is of.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from . import machine

SHIPPED = Path(__file__).with_name("cost_constants.json")
TERMS = 9  # cost.Terms

Key = tuple[str, bool, str]  # dtype, channels_last, product
Pair = tuple[tuple[float, ...], tuple[float, ...]]  # on stored blocks; dense


def own_file() -> Path:
    """Where constants measured on this processor are kept."""
    return machine.cache() / f"constants-{hashlib.sha256(machine.processor().encode()).hexdigest()[:32]}.json"


def keep(found: Mapping[Key, Pair]) -> Path:
    """Keep constants for this processor, beside those of other dtypes that are kept already; returns the file.

    They are read when a process first estimates a product.
    """
    lines = [json.dumps(row) for row in rows({**_own(), **found})]
    path = own_file()
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        part.write('{"rows": [\n' + ",\n".join(lines) + "\n]}\n")
    os.replace(part.name, path)  # another process reads the whole of it, or the one before
    return path


def rows(found: Mapping[Key, Pair]) -> list[dict[str, Any]]:
    """Constants as the files have them."""
    return [
        {"dtype": dtype, "channels_last": last, "kind": kind, "stored": list(stored), "dense": list(dense)}
        for (dtype, last, kind), (stored, dense) in found.items()
    ]


@cache
def constants() -> dict[Key, Pair]:
    """Those in use, for every dtype that the native backend takes."""
    first, *others = json.loads(SHIPPED.read_text())["processors"]
    alike = next((entry for entry in others if entry["vendor"] == machine.vendor()), first)
    return {**_read(first["rows"]), **_read(alike["rows"]), **_own()}


def _own() -> dict[Key, Pair]:
    path = own_file()
    if not path.exists():
        return {}
    try:
        return _read(json.loads(path.read_text())["rows"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        warnings.warn(
            f"blocksparse: {path} is damaged ({error}); shipped constants are used. Remove it, or run"
            " bench/calibrate.py --keep again", RuntimeWarning, stacklevel=2,
        )  # fmt: skip
        return {}


def _read(rows: Sequence[Mapping[str, Any]]) -> dict[Key, Pair]:
    found = {}
    for row in rows:
        stored, dense = (tuple(float(value) for value in row[side]) for side in ("stored", "dense"))
        if len(stored) != TERMS or len(dense) != TERMS or not all(0 <= v < math.inf for v in (*stored, *dense)):
            raise ValueError(f"{row} needs {TERMS} numbers from 0 on for stored and for dense")
        found[row["dtype"], row["channels_last"], row["kind"]] = stored, dense
    return found
