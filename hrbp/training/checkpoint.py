"""Checkpoints: two files, one of which is whole at every moment; and the comparison of two states."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import whole_file
from ..formats.sealed import TRAINING, read, sealed_bytes

LAST, PREVIOUS, DIVERGED = "last.pt", "previous.pt", "diverged.pt"


def write_training(folder: Path, state: dict[str, Any], name: str = LAST) -> None:
    """Write last.pt; what was last.pt becomes previous.pt. At every moment one of the two is whole."""
    content, last = sealed_bytes(TRAINING, state), folder / LAST
    with whole_file(folder / name) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if name == LAST and last.exists():
            os.replace(last, folder / PREVIOUS)


def read_training(folder: Path, refuses: Callable[[Any], str | None], say: Callable[[str], None]) -> Any:
    """The state in last.pt, or in previous.pt where that cannot be used; None where there is neither.

    Args:
        folder: of the two files.
        refuses: why a state is not of this training, or None.
        say: called with which file is not used, and why. It is set aside under another name.

    Raises:
        ValueError: there are checkpoints, and none can be used. They stay as they are.
    """
    bad: dict[Path, str] = {}
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = read(path, TRAINING, "resume")
        except ValueError as error:
            bad[path] = str(error)
            continue
        if reason := refuses(state):
            bad[path] = f"resume: {path} is of another training: {reason}"
            continue
        for refused, why in bad.items():
            os.replace(refused, refused.with_suffix(".refused"))  # or it would displace the good one
            say(f"{why}; set aside as {refused.with_suffix('.refused').name}, continuing from {path}")
        return state
    if bad:
        raise ValueError("; ".join(bad.values()) + "; nothing was changed: use the settings it had, or another folder")
    return None


def has_training(folder: Path) -> bool:
    """Whether there are checkpoints."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def stamp(folder: Path) -> tuple[int, int] | None:
    """Identity of last.pt, which changes when it is rewritten; None: there is none."""
    try:
        found = (folder / LAST).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def remove_leftovers(folder: Path) -> None:
    """Remove partial files of processes that were killed."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """The differences of two plain values, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            text
            for key in dict.fromkeys([*there, *here])
            for text in differences(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if there == here else [f"{name} is {_short(there)} there and {_short(here)} here"]


def misfits(there: Any, like: Any, name: str = "") -> str | None:
    """Where a state is of another kind than one that is `like` it, in words; None: nowhere.

    Compared are kinds of values and dtypes and shapes of tensors, under keys that both have; of tensors by name all.
    """
    if isinstance(like, dict) and isinstance(there, dict):
        tensors = any(isinstance(value, Tensor) for value in like.values())
        if tensors and (missing := [str(key) for key in like if key not in there]):
            return f"{name} has no {', '.join(missing[:3])}"
        parts = (misfits(there[key], like[key], f"{name}.{key}" if name else str(key)) for key in there.keys() & like)
        return next((part for part in parts if part), None)
    if isinstance(like, Tensor) and isinstance(there, Tensor):
        fits = (there.dtype, there.shape) == (like.dtype, like.shape)
    else:
        kinds = [float if type(value) is int else type(value) for value in (there, like)]
        fits = like is None or kinds[0] is kinds[1]
    return None if fits else f"{name} is {kind_of(there)} and needs {kind_of(like)}"


def kind_of(value: Any) -> str:
    """Dtype and shape of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
