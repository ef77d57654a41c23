"""The page of a device, as Markdown."""

from __future__ import annotations

from collections.abc import Callable

from bench.layers.networks import CHOSEN
from bench.layers.rows import TOTAL
from bench.pages.devices import Device, Json, dense_of, time_of
from bench.pages.goals import goal_table
from bench.shared.tables import NONE, markdown

WHOLE = "every convolution but the stem, as often as it occurs"


def page(device: Device) -> list[str]:
    """Everything of one device, as Markdown."""
    text = [f"## {device.name}", "", *(f"- {fact}" for fact in device.facts), ""]
    if device.checks:
        text += ["Checks: " + "; ".join(device.checks) + ".", ""]
    if device.on_gpu:
        text += goal_table(device)
    for run in device.runs:
        text += layer_table(run)
    return text + step_table(device.steps) + inference_table(device.inference) + launch_table(device.launches)


def ms(value: float) -> str:
    return f"{value:.1f} ms" if 1 <= value < 100 else f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def layer_table(run: Json) -> list[str]:
    """Layers by patterns: time, and how much faster than the best dense convolution."""
    options = run["options"]
    kind = (
        TOTAL if any(row["kind"] == TOTAL for row in run["rows"]) else run["rows"][0]["kind"] if run["rows"] else TOTAL
    )
    rows = [row for row in run["rows"] if row["kind"] == kind]
    if not rows:
        return []
    series = list(dict.fromkeys(series_of(row) for row in rows))
    body = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        mine = {series_of(row): row for row in rows if row["layer"] == layer}
        body.append([layer_label(next(iter(mine.values()))), *cells(mine, series, dense_of, time_of)])
    for net in dict.fromkeys(total["net"] for total in run["totals"] if total["net"] != CHOSEN):
        sums = {series_of(t): t for t in run["totals"] if t["net"] == net and t["kind"] == kind}
        if all(t["layers"] == t["layers_asked"] and not t["failed"] for t in sums.values()):
            body.append([WHOLE, *cells(sums, series, lambda t: t["baseline_ms"]["dense"], lambda t: t["ms"])])
    what = {TOTAL: "forward and both gradients"}.get(kind, kind)
    title = f"{what}, {options['dtype']}, batch {options['batch']}"
    return [f"### {title}", "", *markdown(["layer", "dense", *series], body)]


def cells(
    found: dict[str, Json],
    series: list[str],
    dense: Callable[[Json], float | None],
    own: Callable[[Json], float | None],
) -> list[str]:
    """The dense time, then each pattern's."""
    base = next((d for item in found.values() if (d := dense(item)) is not None), None)
    out = [NONE if base is None else ms(base)]
    for name in series:
        item = found.get(name)
        time = None if item is None else own(item)
        if item is None or time is None:
            out.append(NONE if item is None else item.get("status", NONE))
            continue
        baseline = dense(item)
        out.append(ms(time) + (f", **{baseline / time:.1f}x**" if baseline else ""))
    return out


def series_of(item: Json) -> str:
    """Pattern, sparsity and backend of a row or a total."""
    backend = "" if item["backend_asked"] == "auto" else f", {item['backend_asked']}"
    return f"{item['structure']} {item['blocksize_asked']} at {100 * item['sparsity_asked']:g}%{backend}"


def layer_label(row: Json) -> str:
    (k, c, r, s), (_, _, h, w) = row["shape"], row["x_shape"]
    channels = f"{c} channels" if c == k else f"{c} to {k} channels"
    return f"{r}x{s}, {channels}, {h}x{w}" + (f", stride {row['stride']}" if row["stride"] > 1 else "")


def step_table(rows: list[Json]) -> list[str]:
    """Whole training steps."""
    body = []
    for row in rows:
        speed = [f"**{row['speedup'][n]:.2f}x**" if row["speedup"].get(n) else NONE for n in ("dense", "same")]
        sizes = [NONE if row[n] is None else f"{row[n] / 1e6:.1f} MB" for n in ("extra_bytes", "state_bytes")]
        what = f"{row['network']}, batch {row['batch']}, {row['dtype']}"
        sparsity = f" at {100 * row['sparsity']:g}%" if row["sparsity"] else ""
        body.append([what, row["structure"] + sparsity, row["variant"], _time(row), *speed, *sizes])
    head = ["network", "structure", "way", "step", "x best dense", "x dense, same way", "peak beyond", "state"]
    return ["### training steps", "", *markdown(head, body)] if body else []


def launch_table(rows: list[Json]) -> list[str]:
    """Host time of a module call."""
    body = []
    updates = [row for row in rows if row.get("update_ms") is not None]
    for row in (row for row in rows if row not in updates):
        numbers = row["forward_us"], row["beyond"].get("forward"), row["step_us"], row["beyond"].get("step")
        name = f"{row['module']} {row['backend']}".strip()
        body.append([name, *(NONE if n is None else f"{n:.0f} us" for n in numbers)])
    head = ["module", "forward", "beyond nn.Conv2d", "forward + backward", "beyond nn.Conv2d"]
    said = [
        f"A mask update of 512x512x3x3 in blocks of {row['variant']}: {row['update_ms']:.2f} ms." for row in updates
    ]
    return ["### host time of a call", "", *markdown(head, body), *(said and [*said, ""])] if body else []


def inference_table(rows: list[Json]) -> list[str]:
    """Networks in every way that was timed."""
    body = []
    for row in rows:
        images = NONE if row["images_per_second"] is None else f"{row['images_per_second']:.1f}"
        speed = NONE if row["speedup"] is None else f"**{row['speedup']:.2f}x**"
        body.append([row["network"], row["weights"], f"{row['mode']}, {row['variant']}", _time(row), images, speed])
    head = ["network", "weights", "way", "a batch", "images/s", "x best dense"]
    return ["### inference", "", *markdown(head, body)] if body else []


def _time(row: Json) -> str:
    return ms(row["times"]["p50"]) if row["times"] else f"{row['status']}: {row['reason'][:80]}"
