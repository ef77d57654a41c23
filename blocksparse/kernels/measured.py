"""Measured seconds of products: a table that overrides the predictions of gpu_cost.py where it has the very product.

The tables are measured/*.json beside this file, one for each device: `python bench/run.py --keep` writes them on a GPU.
None is shipped: nobody has measured these kernels yet. Without the files, predictions alone decide.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from ..geometry import ConvGeometry
from .counted import triton_version

HERE = Path(__file__).parent / "measured"
FACTS = (
    "backend", "kind", "x", "weight", "stride", "padding", "dilation", "blocksize", "nnzb", "dtype", "precision",
    "channels_last",
)  # fmt: skip


def facts(
    backend: str, kind: str, g: ConvGeometry, blocksize: tuple[int, int], nnzb: int, dtype: torch.dtype,
    precision: str, channels_last: bool,
) -> dict[str, Any]:  # fmt: skip
    """What a row is about: a product of one backend."""
    name = str(dtype).removeprefix("torch.")
    weight = g.weight_shape if g.groups == 1 else (*g.weight_shape, g.groups)
    values = (
        backend, kind, g.x_shape, weight, g.stride, g.padding, g.dilation, blocksize, nnzb, name, precision,
        channels_last,
    )  # fmt: skip
    return {key: list(v) if isinstance(v, tuple) else v for key, v in zip(FACTS, values, strict=True)}


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in FACTS])


def path_of(device: str) -> Path:
    """The file of a device, by its driver's name."""
    return HERE / f"{'-'.join(''.join(c if c.isalnum() else ' ' for c in device.lower()).split())}.json"


@functools.cache
def _table(device: str) -> dict[str, float]:
    path = path_of(device)
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    # Other versions of Triton make other kernels.
    if content["device"] != device or content["triton"] != list(triton_version()):
        return {}
    return {_key(row): row["seconds"] for row in content["rows"]}


def seconds(device: str, row: dict[str, Any]) -> float | None:
    """Measured seconds of the product that `facts` describes, or None."""
    table = _table(device)
    return table.get(_key(row)) if table else None


def merged(device: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a device's file with these rows (facts and seconds) added, newer ones in place of older."""
    path = path_of(device)
    old = json.loads(path.read_text()) if path.exists() else {}
    same = old.get("triton") == list(triton_version())
    found = {_key(row): row for row in [*(old["rows"] if same else []), *rows]}
    return {"device": device, "triton": list(triton_version()), "rows": list(found.values())}
