"""Atomic writes, and a lock that gives a folder one writer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk does, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file atomically: it appears at `path` when it is complete; after an error the old one stays.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    path = Path(path)
    start, temporary = f".{path.name}.", ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=start, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except OSError as error:  # name the file asked for, not the temporary one
        if error.errno is None or not Path(str(error.filename or start)).name.startswith(start):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write plain values, whole or not at all; ValueError for a number that is not finite."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())


def memory_bytes() -> int:
    """Memory of this machine; what is larger cannot be held."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------- one writer to a folder


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike[str], who: str) -> Iterator[None]:
    """Lock a folder: a second process, or a second writer of this process, is refused meanwhile.

    An operating-system lock on the file .lock in the folder: it ends with the process, however that ends, and needs no
    clean-up. Forked processes do not inherit it. Over NFS it works between machines if the server's lock service runs;
    on a file system without locks it has no effect.

    Args:
        folder: is made if it is not there.
        who: for the message.

    Raises:
        ValueError: another one holds it; the message says which process on which machine.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = _locked(folder, who)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):  # first the name, while it is ours; then the lock goes
                os.unlink(folder / LOCK)
            _close(handle)


_held: set[int] = set()  # descriptors of locks; a lock lives as long as any process has its descriptor


def _let_go() -> None:
    """In a forked process: the lock is its parent's."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _locked(folder: Path, who: str) -> int | None:
    """A descriptor that holds the lock; None where locks are not to be had."""
    path = folder / LOCK
    if sys.platform == "win32":
        return None
    while True:
        with naming(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _held.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            words = os.pread(handle, 300, 0).decode(errors="replace").split()
            holder = f"process {words[0]} on {words[1]}" if len(words) == 2 else "another process"
            _close(handle)
            raise ValueError(
                f"{who}: {holder} is writing to {folder}; wait until it ends, stop it, or use another folder"
            ) from None
        except OSError:  # a file system without locks
            return handle
        if _is_at(handle, path):
            with contextlib.suppress(OSError):  # a full disk tells others less, and locks them out all the same
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
            return handle
        _close(handle)  # its holder removed the file between our opening and our locking it: once more


def _close(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether a descriptor is of the file that has this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
