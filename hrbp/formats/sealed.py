"""Files of this library: torch.save's bytes, and a last line that says what they are and what their checksum is."""

from __future__ import annotations

import hashlib
import io
import os
import re
from typing import IO, Any, NamedTuple

import torch

MARK = b"\nhrbp "  # starts the last line of a sealed file: hrbp KIND VERSION SHA256-of-all-before
LONGEST = 128  # bytes of that line
CHUNK = 1 << 20  # bytes read at a time


class Seal(NamedTuple):
    """What the last line of a file says: of which kind it is, of which version, and what SHA-256 the rest has."""

    kind: str
    version: str
    checksum: str
    size: int  # bytes before that line


def with_seal(kind: str, version: int, data: bytes) -> bytes:
    """The bytes, and that line."""
    return data + MARK + f"{kind} {version} {hashlib.sha256(data).hexdigest()}\n".encode()


def seal_of(file: IO[bytes]) -> Seal | None:
    """That line; None: the file has none, or what is left of one that is damaged."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - LONGEST))
    end = file.read()
    at = end.rfind(MARK)
    words = re.fullmatch(rb"hrbp (\w+) (\d+) ([0-9a-f]{64})\n", end[at + 1 :]) if at >= 0 else None
    if words is None:
        return None
    kind, version, checksum = (word.decode() for word in words.groups())
    return Seal(kind, version, checksum, start + at)


def is_whole(file: IO[bytes], seal: Seal) -> bool:
    """Whether the content has the checksum that the seal says."""
    digest, left = hashlib.sha256(), seal.size
    file.seek(0)
    while left and (part := file.read(min(CHUNK, left))):
        digest.update(part)
        left -= len(part)
    return digest.hexdigest() == seal.checksum


VERSION = 1
MODEL, TRAINING = "model", "training"


def sealed_bytes(kind: str, content: dict[str, Any]) -> bytes:
    """torch.save's bytes, and a last line that says what they are and what their checksum is."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return with_seal(kind, VERSION, buffer.getvalue())


def read(path: str | os.PathLike[str], kind: str, who: str = "read()") -> dict[str, Any]:
    """The content of a file of this kind ("model" or "training"), tensors on the CPU; nothing in it is executed.

    Raises ValueError for a file that is damaged, foreign, of the other kind or of another version.
    """
    with open(path, "rb") as file:
        seal = seal_of(file)
        if seal is None:
            raise ValueError(
                f"{who}: {path} is cut short or was not written by hrbp; it needs a whole hrbp {kind} file"
            )
        if seal.kind != kind:
            raise ValueError(f"{who}: {path} holds a {seal.kind}; it needs a {kind}")
        if seal.version != str(VERSION):
            raise ValueError(f"{who}: {path} has format {seal.version}; this hrbp reads format {VERSION}")
        if not is_whole(file, seal):
            raise ValueError(f"{who}: {path} is damaged: its checksum does not fit its content")
        file.seek(0)
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises nearly anything
            raise ValueError(f"{who}: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{who}: {path} holds a {type(found).__name__}; it needs the dict that hrbp writes")
    return found
