"""CIFAR-10 and CIFAR-100, from their archives as they were published; nothing in them is executed."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .sets import MemorySet

MOST_FILE, MOST_ARCHIVE = 1 << 28, 1 << 30  # bytes; the largest file has 155 MB, the archives unpacked 187 MB
# name: folder, archive, files to train, files to test, file of the names, key of the labels, key of the names
CIFAR = {
    "cifar10": (
        "cifar-10-batches-py", "cifar-10-python.tar.gz", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"],
        "batches.meta", b"labels", b"label_names",
    ),
    "cifar100": (
        "cifar-100-python", "cifar-100-python.tar.gz", ["train"], ["test"],
        "meta", b"fine_labels", b"fine_label_names",
    ),
}  # fmt: skip
_CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def cifar_place(name: str, root: Path) -> Path | None:
    """The folder or the archive of "cifar10" or "cifar100"; None: there is none."""
    folder, archive = CIFAR[name][:2]
    itself = [root] if root.name in (folder, archive) else []
    return next((p for p in (*itself, root / folder, root / archive) if p.exists()), None)


def cifar_set(name: str, split: str, root: Path) -> MemorySet:
    """A split of the official python version of CIFAR-10 or CIFAR-100."""
    folder, archive, train, test, meta, label_key, names_key = CIFAR[name]
    files = train if split == "train" else test
    place = cifar_place(name, root)
    if place is None:
        raise FileNotFoundError(
            f"load(): {name} is not in {root.resolve()}; put {archive} (the 'python version' of"
            " https://www.cs.toronto.edu/~kriz/cifar.html) or the folder in it there, or pass root"
        )
    found = _folder_files(place, [*files, meta]) if place.is_dir() else _archive_files(place, folder, [*files, meta])
    names = _unpickle(found[meta], f"{place}/{meta}").get(names_key)
    if not isinstance(names, list) or not all(isinstance(n, bytes) for n in names):
        raise ValueError(f"{place}/{meta} has no list of names under {names_key!r}; it is not the file of {name}")
    images, labels = [], []
    for file in files:
        where = f"{place}/{file}"
        content = _unpickle(found.pop(file), where)
        pixels, these = _byte_matrix(content.get(b"data"), where), content.get(label_key)
        if pixels.shape[1] != 3072:
            raise ValueError(f"{where} has data of shape {pixels.shape}; {name} needs (images, 3072)")
        if not isinstance(these, list) or len(these) != len(pixels) or any(type(i) is not int for i in these):
            raise ValueError(
                f"{where} has no list of {len(pixels)} ints under {label_key!r}; it is not a file of {name}"
            )
        if min(these) < 0 or max(these) >= len(names):
            raise ValueError(f"{where} has labels {min(these)} to {max(these)}; {name} has {len(names)} classes")
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels += these
    mean, std = _CIFAR_STATISTICS[name]
    return MemorySet(
        torch.from_numpy(np.concatenate(images)), torch.tensor(labels), [n.decode("latin1") for n in names],
        name=name, mean=mean, std=std,
    )  # fmt: skip


def _folder_files(folder: Path, names: list[str]) -> dict[str, bytes]:
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(f"load(): {folder} has no {', '.join(missing)}; extract the archive again")
    for name in names:
        if (size := (folder / name).stat().st_size) > MOST_FILE:
            raise ValueError(f"load(): {folder / name} has {size} bytes; no file of CIFAR has more than {MOST_FILE}")
    return {name: (folder / name).read_bytes() for name in names}


class _Limited:
    """A stream that ends with an error where it has more bytes than MOST_ARCHIVE."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.left = stream, MOST_ARCHIVE

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {MOST_ARCHIVE} bytes")
        return data


def _archive_files(archive: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    wanted, found = {f"{folder}/{name}": name for name in names}, {}
    with open(archive, "rb") as file:
        try:
            stream = _Limited(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if not member.isfile() or member.name not in wanted:
                        continue
                    if member.size > MOST_FILE:  # sparse members have zeros that are not in the archive
                        raise ValueError(f"{member.name} claims {member.size} bytes")
                    if content := tar.extractfile(member):
                        found[wanted[member.name]] = content.read()
            while stream.read(1 << 20):  # to the end, where gzip compares its checksum
                pass
        except Exception as error:  # damaged archives raise nearly anything
            raise ValueError(
                f"load(): {archive} is cut short, damaged or no .tar.gz ({error}); download it again"
            ) from error
    missing = [n for n in wanted if wanted[n] not in found]
    if missing:
        raise ValueError(f"load(): {archive} has no {', '.join(missing)}; it is not the archive of that name")
    return found


class _Inert:
    """Stands for whatever numpy object a pickle names: keeps what it is made from, and does nothing."""

    args: tuple = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DataUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Reads dicts, lists, numbers and bytes. Calls nothing that a file names: numpy arrays come as inert records.

    The unpickler in Python: what its memory may hold is what the file has; that in C makes room for numbers in it.
    """

    ARRAYS = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in self.ARRAYS:
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of CIFAR does")


def _unpickle(content: bytes, where: str) -> dict:
    try:
        unpickled = _DataUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{where} is damaged or foreign ({error}); extract or download it again") from error
    if not isinstance(unpickled, dict):
        raise ValueError(f"{where} holds a {type(unpickled).__name__}; files of CIFAR hold a dict")
    return unpickled


def _byte_matrix(record: Any, where: str) -> np.ndarray:
    """The uint8 matrix that an inert record describes: its state is (version, shape, dtype, Fortran order, bytes)."""
    match record:
        case _Inert(state=(_, (int(rows), int(cols)), _Inert(args=(b"u1", *_)), fortran, bytes(data))):
            if rows > 0 and cols > 0 and rows * cols == len(data):
                return np.frombuffer(data, np.uint8).reshape((rows, cols), order="F" if fortran else "C")
    raise ValueError(f"{where} has no matrix of bytes under b'data'; it is not a file of CIFAR's python version")
