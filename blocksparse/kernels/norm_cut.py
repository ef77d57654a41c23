"""How a BatchNorm is cut into programs of a GPU: the sizes of a tile, and what each program reads.

A leaf: nothing here imports Triton or touches a device. A tensor lies in memory as [rows, channels, inner]:

    across   inner = 1 (channels_last, [N, C]): `rows` lines of channels side by side; a tile of programs owns COLS
             channels, and its chunks are ROWS lines of them
    along    contiguous and batch_last: each channel is a tile of its own, `rows` lines of `inner` numbers; its chunks
             are ROWS lines of COLS numbers

Program `split` of a tile reads the chunks split, split + splits, ...: all programs together sweep through memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

FORWARD, BACKWARD = 8192, 4096  # elements of a chunk: 32 a thread, and 16 of two or three tensors
WARPS = 8
COLUMNS = 32  # channels side by side: 64 bytes in 16 bits
PER_UNIT = 2  # programs that a multiprocessor holds
FULL, WAVES = 8, 4  # programs of a tile that fill one wave well enough; else so many waves, the last of them not full
LEAST = 4  # chunks of a program, where there are enough programs
LIMIT = 2**31 - 1  # of each size; offsets of elements are 64 bits wide


class Cut(NamedTuple):
    """Sizes of one BatchNorm on a GPU.

    Attributes:
        lines: of `length` numbers each, `apart` elements from each to the next.
        wide: chunks side by side in a line.
        chunks: of a tile.
        splits: programs of a tile.
        tiles: of all channels.
        block_rows, block_cols: of a chunk.
        even: whether no chunk reaches past the end.
        vectors: whether 8 numbers in a row begin at multiples of 8.
    """

    channels: int
    lines: int
    length: int
    apart: int
    wide: int
    chunks: int
    splits: int
    tiles: int
    block_rows: int
    block_cols: int
    across: bool
    even: bool
    vectors: bool

    @property
    def programs(self) -> int:
        return self.tiles * self.splits


def _power_of_2(size: int) -> int:
    """The least one that is not below."""
    return 1 << (size - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def cut(rows: int, channels: int, inner: int, units: int, tile: int) -> Cut:
    """How a tensor [rows, channels, inner] is cut, into chunks of `tile`, for a device of so many multiprocessors."""
    across = inner == 1
    length = channels if across else inner
    block_cols = min(_power_of_2(length), COLUMNS if across else tile)
    block_rows = min(_power_of_2(rows), max(1, tile // block_cols))
    tiles, wide = (-(-channels // block_cols), 1) if across else (channels, -(-inner // block_cols))
    chunks = -(-rows // block_rows) * wide
    slots = PER_UNIT * units
    # One wave of programs where it can be filled; the last program of a tile adds up what all its splits found.
    splits = slots // tiles
    if splits < FULL:  # more waves, of programs that are worth their beginning and end
        splits = max(splits, min(round(WAVES * slots / tiles), chunks // LEAST))
    splits = min(chunks, max(1, splits))
    return Cut(
        channels, rows, length, channels * inner, wide, chunks, splits, tiles, block_rows, block_cols, across,
        even=rows % block_rows == 0 and length % block_cols == 0, vectors=length % 8 == 0,
    )  # fmt: skip
