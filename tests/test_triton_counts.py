"""What the Triton kernels cost stays what kernels/counts/triton.json (BatchNorm's: norm.json) says.

The table is held to its goals and to the tiles in every run. A slow run compiles each row anew, for every target, with
this Python's Triton and with the oldest one that is supported, and fails where one got worse. The oldest one is a
folder that OLDEST_TRITON names: python -m pip install --no-deps --target FOLDER triton==3.6.0
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bench.count import FACTS, NORM, TABLE
from bench.counts import norms
from bench.counts.cases import SHIPPED, TARGETS, Case, entries, entry_of
from bench.counts.compiling import COMMAND, environment
from processes import LIMIT, Process

ROWS: list[dict[str, Any]] = json.loads(TABLE.read_text())
OLDEST = "3.6.0"
NEWEST = version("triton")
ANEW = "if that is meant: python bench/count.py --write --triton FOLDER writes the table anew, FOLDER with Triton 3.6.0"

# Shared memory of one program, in bytes; for sm_80's column that of sm_86 and sm_89, which use it too.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma", "gfx950": "v_mfma"}
EACH = {"fprop": 24, "dgrad": 24, "wgrad": 20}  # instructions of the main loop per tensor-core instruction, sm_90


def key(row: dict[str, Any]) -> str:
    """What a row is about, its counts left out."""
    return json.dumps({name: value for name, value in row.items() if name not in (*FACTS, "unit", "hash")})


def tabled() -> Iterator[tuple[str, Case]]:
    """(Triton, case) of every row, in the table's order."""
    newest = next(row["triton"] for row in ROWS)
    yield from ((newest, case) for arch in TARGETS for case in SHIPPED[arch])
    yield from ((OLDEST, case) for case in SHIPPED["sm_90"])


def name(row: dict[str, Any]) -> str:
    bk, bc = row["blocksize"]
    layer = f"{row['kernel']}x{row['kernel']}-s{row['stride']}-n{row['batch']}-d{row['density']}"
    return f"{row['target']}-{row['triton']}-{row['kind']}-{bk}x{bc}-{row['math']}-{layer}"


def test_the_table_is_of_the_tiles_that_are_shipped():
    """The case, and the tile that tiles.pick chooses for it now, of every row."""
    assert [key(row) for row in ROWS] == [key(case.row(triton)) for triton, case in tabled()], ANEW


@pytest.mark.parametrize("arch", [arch for arch in TARGETS if arch != "gfx950"])  # which has gfx942's tiles
def test_every_row_of_the_tile_table_is_counted(arch):
    assert {entry_of(case) for case in SHIPPED[arch]} == entries(arch)


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_row_of_the_table_is_good(row):
    """No spills, tensor cores, enough shared memory, 16-byte copies and swizzled operands, on NVIDIA."""
    assert row["spills"] == 0
    assert row["shared"] <= SHARED[row["target"]]
    if row["math"] == "ieee" and not row["target"].startswith("gfx"):
        assert row["mma"] == 0  # full fp32 has no tensor cores on NVIDIA
        return
    assert row["mma"] > 0
    if row["math"] == "tf32":
        return  # tensor cores of fp32 want K-major operands: what is not is transposed on its way, 4 bytes each
    assert row["unit"].startswith(UNITS[row["target"]])
    assert row["copy_bytes"] == 16
    if row["target"].startswith("gfx"):
        return  # Triton pads or swizzles there as it sees fit
    assert row["swizzled"]
    large = row["batch"] > 1  # what fills a device
    if row["target"] == "sm_90" and tuple(row["blocksize"]) in ((32, 32), (64, 8)) and row["stride"] == 1 and large:
        assert row["loop"] <= EACH[row["kind"]] * row["mma"]


# ---------------------------------------------------------------------- compiled anew


def start(cases: list[Case] | list[norms.NormCase], triton: Path | None) -> Process:
    return Process(COMMAND, given=json.dumps(cases), env=environment(triton), limit=3 * LIMIT)


def worse(row: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What got worse, in words."""
    found = [
        f"{fact} {now[fact]}, was {row[fact]}"
        for fact in ("loop", "outside", "registers", "spills", "shared") if now[fact] > row[fact]
    ]  # fmt: skip
    less = ("mma", "swizzled", "copy_bytes")
    found += [f"{fact} {now[fact]}, was {row[fact]}" for fact in less if now[fact] < row[fact]]
    return [*found, f"unit {now['unit']}, was {row['unit']}"] if now["unit"] != row["unit"] else found


def held(rows: list[dict[str, Any]], triton: Path | None) -> None:
    """Compile what these rows are about in two processes, and fail for each that got worse."""
    cases = {key(case.row(version)): case for version, case in tabled()}
    asked = [cases[key(row)] for row in rows]
    halves = [asked[::2], asked[1::2]]
    with start(halves[0], triton) as first, start(halves[1], triton) as second:
        found = {}
        for process in (first, second):
            done = process.finish()
            assert done.returncode == 0, done.stderr[-3000:]
            found |= {key(now): now for now in json.loads(done.stdout)}
    bad = [f"{name(row)}: {', '.join(words)}" for row in rows if (words := worse(row, found[key(row)]))]
    assert not bad, "\n".join([*bad, ANEW])


def of_this_triton() -> list[dict[str, Any]]:
    rows = [row for row in ROWS if row["triton"] == NEWEST]
    assert rows, f"{TABLE.name} has no rows of Triton {NEWEST}, which is installed; {ANEW}"
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_costs_what_the_table_says(arch):
    held([row for row in of_this_triton() if row["target"] == arch], None)


@pytest.mark.slow
def test_every_kernel_costs_what_the_table_says_under_the_oldest_triton():
    folder = os.environ.get("OLDEST_TRITON")
    if not folder:
        pytest.fail(
            "OLDEST_TRITON is not set: nothing is known about the kernels under Triton 3.6.0, which GPU machines run."
            " python -m pip install --no-deps --target FOLDER triton==3.6.0, then OLDEST_TRITON=FOLDER pytest -m slow"
        )
    held([row for row in ROWS if row["triton"] == OLDEST], Path(folder))


# ---------------------------------------------------------------------- BatchNorm

NORMS: list[dict[str, Any]] = json.loads(NORM.read_text())
NORMS_ANEW = "if that is meant: python bench/count.py --norm --write --triton FOLDER writes the table anew"


def about(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (*norms.FACTS, "hash")}


def test_every_kernel_of_batch_norm_is_counted_and_good():
    """No spills, 16-byte loads and stores, and two programs of 8 warps in a multiprocessor."""
    newest = NORMS[0]["triton"]
    assert [about(row) for row in NORMS] == [c.row(t) for t in (newest, OLDEST) for c in norms.SHIPPED], NORMS_ANEW
    for row in NORMS:
        assert (row["spills"], row["access_bytes"]) == (0, 16), row
        assert row["registers"] <= 128, row
        assert row["shared"] <= 16 << 10, row


@pytest.mark.slow
@pytest.mark.parametrize("triton", [NEWEST, OLDEST])
def test_every_kernel_of_batch_norm_costs_what_the_table_says(triton):
    folder = os.environ.get("OLDEST_TRITON") if triton == OLDEST else None
    if triton == OLDEST and not folder:
        pytest.fail("OLDEST_TRITON is not set: see test_every_kernel_costs_what_the_table_says_under_the_oldest_triton")
    with start(norms.SHIPPED, Path(folder) if folder else None) as process:
        done = process.finish()
    assert done.returncode == 0, done.stderr[-3000:]
    found = [row for row in NORMS if row["triton"] == triton]
    assert len(found) == len(norms.SHIPPED), f"{NORM.name} has no rows of Triton {triton}; {NORMS_ANEW}"
    bad = []
    for row, now in zip(found, json.loads(done.stdout), strict=True):
        assert about(row) == about(now)
        worse = [name for name in norms.FACTS if (now[name] - row[name]) * (-1 if name == "access_bytes" else 1) > 0]
        bad += [f"{about(row)}: {name} {now[name]}, was {row[name]}" for name in worse]
    assert not bad, "\n".join([*bad, NORMS_ANEW])


def test_what_got_worse_is_said():
    row = {
        "loop": 100, "mma": 8, "outside": 500, "registers": 90, "spills": 0, "shared": 1000, "swizzled": True,
        "copy_bytes": 16, "unit": "HGMMA",
    }  # fmt: skip
    assert worse(row, row | {"loop": 99, "registers": 80}) == []
    bad = {"loop": 101, "spills": 8, "swizzled": False, "copy_bytes": 2, "unit": "HMMA"}
    assert worse(row, row | bad) == [
        "loop 101, was 100", "spills 8, was 0", "swizzled False, was True", "copy_bytes 2, was 16",
        "unit HMMA, was HGMMA",
    ]  # fmt: skip
