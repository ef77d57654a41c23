"""What the files of a package offer, by name: adding a file to the package is adding what it offers."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
SETTLED = 10**9  # nanoseconds after which the time of a folder tells of every later change


class Entry(NamedTuple, Generic[T]):
    """One thing that a file offers. place: where it is listed, lowest first; those of one place by name."""

    name: str
    value: T
    place: int = 1000


class Registry(Mapping[str, T]):
    """name -> what a file of a package offers under that name, in order of place, then name.

    The files are imported at the first look-up, and again when the folders of the package (its `__path__`) have other
    files than then. A file that cannot be imported raises its own error at every look-up.

    Args:
        package: as "hrbp.methods".
        entries: what a module of it offers.

    Raises:
        ValueError: at a look-up, if two files offer the same name.
    """

    def __init__(self, package: str, entries: Callable[[ModuleType], Iterable[Entry[T]]]) -> None:
        self._package, self._entries = package, entries
        self._files: list[tuple[str, str]] | None = None
        self._found: dict[str, T] = {}
        self._times: list[tuple[str, int]] | None = None  # of the folders, when they were last looked through

    def _all(self) -> dict[str, T]:
        folders = sys.modules[self._package].__path__
        times = _times(folders)
        if times is not None and times == self._times:
            return self._found
        files = sorted((name, str(getattr(at, "path", ""))) for at, name, _ in pkgutil.iter_modules(folders))
        if files != self._files:
            self._found, self._files = self._collected(name for name, _ in files), files
        self._times = times
        return self._found

    def _collected(self, files: Iterable[str]) -> dict[str, T]:
        found: list[tuple[Entry[T], str]] = []
        for file in files:
            module = importlib.import_module(f"{self._package}.{file}")
            found += [(entry, str(module.__file__)) for entry in self._entries(module)]
        origin: dict[str, str] = {}
        for entry, file in found:
            if entry.name in origin:
                raise ValueError(
                    f"{self._package}: both {origin[entry.name]} and {file} offer {entry.name!r}; rename one of them"
                )
            origin[entry.name] = file
        entries = sorted((entry for entry, _ in found), key=lambda entry: (entry.place, entry.name))
        return {entry.name: entry.value for entry in entries}

    def __getitem__(self, name: str) -> T:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._package!r}: {', '.join(self)})"


def _times(folders: Iterable[str]) -> list[tuple[str, int]] | None:
    """When each folder was last changed; None where that is so new that it may stay the same at the next change."""
    try:
        times = [(folder, os.stat(folder).st_mtime_ns) for folder in folders]
    except OSError:  # no folder: an archive
        return None
    return times if all(time.time_ns() - at > SETTLED for _, at in times) else None
