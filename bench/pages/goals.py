"""The goals of a GPU, which bench/goals.json lists, and what was measured of each.

A goal has a measure (a function of MEASURES), the rows that it is taken of ("rows": column -> the value that it needs),
and "at_least" or "at_most": a number, or one for each device, by a part of its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.pages.devices import Device, Json, dense_of, time_of
from bench.shared.tables import NONE, markdown

FILE = Path(__file__).resolve().parents[1] / "goals.json"


def goal_table(device: Device) -> list[str]:
    """Each goal, what was needed, and what was measured."""
    body = []
    for goal in json.loads(FILE.read_text()):
        more = "at_least" in goal
        limit = goal["at_least" if more else "at_most"]
        if isinstance(limit, dict):
            limit = next((number for name, number in limit.items() if name in device.name), None)
            if limit is None:  # none is set for this device
                continue
        got = MEASURES[goal["measure"]](device, goal)
        met = "" if got is None else "yes" if (got >= limit if more else got <= limit) else "no"
        needed = f"at {'least' if more else 'most'} {limit:g}{goal.get('unit', '')}"
        body.append([goal["goal"], needed, NONE if got is None else f"{got:.3g}", met])
    return ["### goals", "", *markdown(["what", "goal", "measured", "met"], body)]


# ---------------------------------------------------------------- rows


def layer_rows(device: Device, where: Json) -> list[Json]:
    """Rows of layers that were timed, and have these values; options of their run are columns here, too."""
    found = [
        row
        | {"kernel": row["shape"][2:], "tap_density": run["options"].get("tap_density")}
        | {"dtype": run["options"]["dtype"], "batch": row["x_shape"][0]}
        for run in device.runs
        for row in run["rows"]
        if time_of(row) is not None
    ]
    return [row for row in found if _fits(row, where)]


def _fits(row: Json, where: Json) -> bool:
    return all(row.get(name) == needed for name, needed in where.items())


def by_layer(rows: list[Json]) -> list[list[Json]]:
    """Rows of equal layer, batch and dtype together."""
    groups: dict[tuple[Any, ...], list[Json]] = {}
    for row in rows:
        groups.setdefault((tuple(row["shape"]), tuple(row["x_shape"]), row["stride"], row["dtype"]), []).append(row)
    return list(groups.values())


# ---------------------------------------------------------------- measures


def least_roofline_percent(device: Device, goal: Json) -> float | None:
    """Of each layer the pattern that reaches most of its roofline; of those the least."""
    groups = by_layer(layer_rows(device, goal["rows"]))
    return min((max(row["percent_of_roofline"] for row in group) for group in groups), default=None)


def over_dense(device: Device, goal: Json) -> float | None:
    """Dense over the best pattern, summed over layers, each as often as it occurs in its network."""
    dense = sparse = 0.0
    for group in by_layer(layer_rows(device, goal["rows"])):
        pairs = [(time_of(row), dense_of(row), row["count"]) for row in group]
        known = [(own, base, count) for own, base, count in pairs if own is not None and base is not None]
        if known:
            own, base, count = min(known, key=lambda item: item[0] / item[1])
            dense, sparse = dense + base * count, sparse + own * count
    return dense / sparse if sparse else None


def least_speedup(device: Device, goal: Json) -> float | None:
    """The least speed-up over any of the baselines in "over": name -> kind of the rows that it is taken of."""
    found = [
        row["speedup"].get(name)
        for name, kind in goal["over"].items()
        for row in layer_rows(device, goal["rows"] | {"kind": kind})
    ]
    return min((speedup for speedup in found if speedup), default=None)


def best_step(device: Device, goal: Json) -> float | None:
    """The best speed-up of a training step over the fastest dense way."""
    rows = [row for row in device.steps if row["sparsity"] and _fits(row, goal["rows"])]
    return max((speedup for row in rows if (speedup := row["speedup"].get("dense"))), default=None)


def least_host_us(device: Device, goal: Json) -> float | None:
    """Host microseconds of a forward call beyond those of nn.Conv2d, of the best backend."""
    found = [row["beyond"].get("forward") for row in device.launches if _fits(row, goal["rows"])]
    return min((us for us in found if us is not None), default=None)


def slowest_update_ms(device: Device, goal: Json) -> float | None:
    """Milliseconds of a mask update, of the slowest blocksize."""
    found = [row["update_ms"] for row in device.launches if row.get("update_ms") is not None]
    return max(found, default=None)


MEASURES: dict[str, Callable[[Device, Json], float | None]] = {
    "least_roofline_percent": least_roofline_percent,
    "over_dense": over_dense,
    "least_speedup": least_speedup,
    "best_step": best_step,
    "least_host_us": least_host_us,
    "slowest_update_ms": slowest_update_ms,
}
