"""python bench/page.py FILES --out FOLDER: tables and a roofline figure from result files, and from nothing else."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from layers import CHOSEN, Layer
from rows import KINDS, OK, TOTAL, least_bytes

DESCRIPTION = """\
Makes FOLDER/index.md, and FOLDER/roofline-DEVICE.png where matplotlib is installed, from result files of bench/run.py,
bench/step.py, bench/launch.py and bench/gpu.py: for each device its layers against the best dense convolution, whole
steps, host time, what was checked, and on a GPU the goals.
"""

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "tf32": 4}
WHOLE = "every convolution but the stem, as often as it occurs"

Json = dict[str, Any]


@dataclass
class Device:
    """What all files say of one device."""

    name: str
    on_gpu: bool
    facts: list[str] = field(default_factory=list)
    runs: list[Json] = field(default_factory=list)  # of run.py
    steps: list[Json] = field(default_factory=list)  # rows
    launches: list[Json] = field(default_factory=list)  # rows
    checks: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit status."""
    parser = argparse.ArgumentParser("bench/page.py", description=DESCRIPTION)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        devices = read(args.files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"not a result file of this benchmark: {type(error).__name__}: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    text = []
    for device in devices:
        picture = f"roofline-{''.join(c if c.isalnum() else '-' for c in device.name)}.png"
        text += [*page(device), *([f"![roofline]({picture})", ""] if draw(device, args.out / picture) else [])]
    (args.out / "index.md").write_text("\n".join(text).rstrip() + "\n")
    print(args.out / "index.md")
    return 0


def read(files: Sequence[Path]) -> list[Device]:
    """The devices of all files, in the order of the files."""
    devices: dict[str, Device] = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        where = content["machine"]
        name = where["device"] + ("" if where["device_type"] == "cuda" else f", {where['threads']} threads")
        device = devices.setdefault(name, Device(name, where["device_type"] == "cuda"))
        versions = ", ".join(f"{n} {where[n]}" for n in ("torch", "triton", "cupy", "cuda", "cudnn") if where.get(n))
        gpu = where.get("gpu")
        driver = f", driver {gpu['driver_version']}, {gpu['clocks.max.sm']} at most" if isinstance(gpu, dict) else ""
        commit = (where["commit"] or "unknown")[:10] + (" with changes" if where["dirty"] else "")
        unfinished = "" if content["complete"] else "; not complete"
        device.facts.append(f"`{file.name}`: {versions}{driver}; commit {commit}{unfinished}")
        for kind, result in results_of(content, device):
            if kind == "run":
                device.runs.append(result)
            else:
                (device.steps if kind == "step" else device.launches).extend(result["rows"])
    return list(devices.values())


def results_of(content: Json, device: Device) -> Iterator[tuple[str, Json]]:
    """(kind, content) of a file; those inside a file of gpu.py, whose checks go to the device."""
    kind = content.get("kind", "run")
    if kind in ("run", "step", "launch"):
        yield kind, content
    elif kind == "gpu":
        for name, stage in content["stages"].items():
            found = [job["result"] for job in stage["jobs"].values() if job["result"]]
            device.checks.append(check_line(name, stage, found))
            for result in found:
                if name in ("layers", "step", "launch"):
                    yield result.get("kind", "run"), result
    else:
        raise ValueError(f"a file of kind {kind!r}")


def check_line(name: str, stage: Json, found: list[Json]) -> str:
    said = f"{name}: {stage['status']}"
    if name == "tests" and found:
        said += f", {found[0]['tests']} tests, {found[0]['failures'] + found[0]['errors']} failed"
    if name == "tiles":
        rows = [row for result in found for row in result["rows"]]
        said += f", {len(rows)} tiles, {sum(row['status'] != OK for row in rows)} wrong"
    return said + (f" ({stage['why']})" if stage.get("why") else "")


# ---------------------------------------------------------------- tables


def page(device: Device) -> list[str]:
    """Everything of one device, as Markdown."""
    text = [f"## {device.name}", "", *(f"- {fact}" for fact in device.facts), ""]
    if device.checks:
        text += ["Checks: " + "; ".join(device.checks) + ".", ""]
    if device.on_gpu:
        text += goal_table(device)
    for run in device.runs:
        text += layer_table(run)
    return text + step_table(device.steps) + launch_table(device.launches)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)] + [""]


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
        body.append([layer_label(next(iter(mine.values()))), *cells(mine, series, dense_of_row, time_of_row)])
    for net in dict.fromkeys(total["net"] for total in run["totals"] if total["net"] != CHOSEN):
        sums = {series_of(t): t for t in run["totals"] if t["net"] == net and t["kind"] == kind}
        if all(t["layers"] == t["layers_asked"] and not t["failed"] for t in sums.values()):
            body.append([WHOLE, *cells(sums, series, lambda t: t["rival_ms"]["dense"], lambda t: t["ms"])])
    what = {TOTAL: "forward and both gradients"}.get(kind, kind)
    title = f"{what}, {options['dtype']}, batch {options['batch']}"
    return [f"### {title}", "", *table(["layer", "dense", *series], body)]


def cells(
    found: dict[str, Json],
    series: list[str],
    dense: Callable[[Json], float | None],
    own: Callable[[Json], float | None],
) -> list[str]:
    """The dense time, then each pattern's."""
    base = next((d for item in found.values() if (d := dense(item)) is not None), None)
    out = ["n/a" if base is None else ms(base)]
    for name in series:
        item = found.get(name)
        time = None if item is None else own(item)
        if item is None or time is None:
            out.append("n/a" if item is None else item.get("sparse", {}).get("status", "n/a"))
            continue
        rival = dense(item)
        out.append(ms(time) + (f", **{rival / time:.1f}x**" if rival else ""))
    return out


def time_of_row(row: Json) -> float | None:
    return row["sparse"]["times"]["p50"] if row["sparse"]["times"] else None


def dense_of_row(row: Json) -> float | None:
    dense = row["rivals"].get("dense")
    return dense["times"]["p50"] if dense and dense["times"] else None


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
        time = ms(row["times"]["p50"]) if row["times"] else f"{row['status']}: {row['reason'][:80]}"
        speed = [f"**{row['speedup'][n]:.2f}x**" if row["speedup"].get(n) else "n/a" for n in ("dense", "same")]
        sizes = ["n/a" if row[n] is None else f"{row[n] / 1e6:.1f} MB" for n in ("step_bytes", "state_bytes")]
        what = f"{row['network']}, batch {row['batch']}, {row['dtype']}"
        sparsity = f" at {100 * row['sparsity']:g}%" if row["sparsity"] else ""
        body.append([what, row["structure"] + sparsity, row["way"], time, *speed, *sizes])
    head = ["network", "structure", "way", "step", "x best dense", "x dense, same way", "peak beyond", "state"]
    return ["### training steps", "", *table(head, body)] if body else []


def launch_table(rows: list[Json]) -> list[str]:
    """Host time of a module call."""
    body = []
    for row in rows:
        numbers = row["forward_us"], row["beyond"].get("forward"), row["step_us"], row["beyond"].get("step")
        name = f"{row['module']} {row['backend']}".strip()
        body.append([name, *("n/a" if n is None else f"{n:.0f} us" for n in numbers)])
    head = ["module", "forward", "beyond nn.Conv2d", "forward + backward", "beyond nn.Conv2d"]
    return ["### host time of a call", "", *table(head, body)] if body else []


# ---------------------------------------------------------------- goals


def goal_table(device: Device) -> list[str]:
    """Each goal, what was needed, and what was measured."""
    totals_ = [row for run in device.runs for row in run["rows"] if row["kind"] == TOTAL and time_of_row(row)]
    at90 = [row for row in totals_ if row["sparsity_asked"] == 0.9]
    threes = [row for row in at90 if row["shape"][2:] == [3, 3] and row["stride"] == 1]
    granules = [row for row in threes if row["blocksize_asked"] == "groupx8"]
    # structure "equal groups" of run.py --structure hrbp: a share of the taps, which density alone does not tell
    hrbp = [
        row
        for run in device.runs if run["options"].get("tap_density") == "4/9"
        for row in run["rows"] if row["kind"] == TOTAL and time_of_row(row) and row["shape"][2:] == [3, 3]
    ]  # fmt: skip
    nets = [row for row in at90 if row["net"] == "resnet50"]
    rivals = [row["speedup"][n] for row in totals_ for n in ("grouped", "torch_bsr") if row["speedup"].get(n)]
    rivals += [
        row["speedup"]["torch_bsr"]
        for run in device.runs for row in run["rows"]
        if row["kind"] == "fprop" and row["speedup"].get("torch_bsr")
    ]  # fmt: skip
    free = [row["speedup"]["dense"] for row in totals_ if row["backend_asked"] == "auto" and row["speedup"]["dense"]]
    roof = [max(r["percent_of_roofline"] for r in group) for group in by_layer(threes) if group]
    steps = {(row["network"]): 0.0 for row in device.steps}
    for row in device.steps:
        if row["sparsity"] and row["speedup"].get("dense"):
            steps[row["network"]] = max(steps[row["network"]], row["speedup"]["dense"])
    launches = [row["beyond"]["forward"] for row in device.launches if row["beyond"].get("forward") is not None]
    goals: list[tuple[str, str, float | None, bool]] = [  # what, needed, measured, whether more is better
        ("3x3 of stride 1, 90%, best pattern: least share of its roofline", "70%", min(roof, default=None), True),
        ("3x3 of stride 1, 90%, best pattern: x dense", "3", over_dense(threes), True),
        ("all convolutions but the stem, 90%, best pattern: x dense", "1.5", over_dense(nets), True),
        ("3x3, granule 8, 90%: x dense", "2.5", over_dense(granules), True),
        ("3x3, HRBP++ with 4/9 of the taps, 90%: x dense", "2.5", over_dense(hrbp), True),
        ("least of gather + grouped convolution and torch BSR: x each", "1", min(rivals, default=None), True),
        ("any sparsity, backend chosen by the library: least x dense", "0.97", min(free, default=None), True),
        ("training step, ResNet-50, 90%: x dense", "1.25", steps.get("resnet50") or None, True),
        ("training step, VGG-19, 95%: x dense", "3", steps.get("vgg19") or None, True),
        ("training step, WRN-32-2, 95%: x dense", "2", steps.get("wrn32-2") or None, True),
        ("host time of a module call beyond nn.Conv2d, us", "30", min(launches, default=None), False),
    ]
    body = []
    for what, needed, got, more in goals:
        least = float(needed.rstrip("%"))
        met = "" if got is None else "yes" if (got >= least if more else got <= least) else "no"
        body.append([what, ("at least " if more else "at most ") + needed, "n/a" if got is None else f"{got:.3g}", met])
    return ["### goals", "", *table(["what", "goal", "measured", "met"], body)]


def by_layer(rows: list[Json]) -> list[list[Json]]:
    """Rows of equal layer, batch and dtype together."""
    groups: dict[tuple[Any, ...], list[Json]] = {}
    for row in rows:
        groups.setdefault((tuple(row["shape"]), tuple(row["x_shape"]), row["stride"]), []).append(row)
    return list(groups.values())


def over_dense(rows: list[Json]) -> float | None:
    """Dense over the best pattern, summed over layers, each as often as it occurs in its network."""
    dense = sparse = 0.0
    for group in by_layer(rows):
        pairs = [(time_of_row(row), dense_of_row(row), row["count"]) for row in group]
        known = [(own, base, count) for own, base, count in pairs if own is not None and base is not None]
        if known:
            own, base, count = min(known, key=lambda item: item[0] / item[1])
            dense, sparse = dense + base * count, sparse + own * count
    return dense / sparse if sparse else None


# ---------------------------------------------------------------- the figure


@dataclass(frozen=True)
class Point:
    """One kernel on the roofline: FLOP per byte that must move, useful FLOP per second."""

    label: str
    intensity: float
    flops_per_second: float


def points(device: Device) -> list[Point]:
    """Every kind of every row that was timed."""
    found = []
    for run in device.runs:
        item = SIZES[run["options"]["dtype"]]
        for row in run["rows"]:
            if row["kind"] in KINDS and time_of_row(row) and row["flops_per_second"]:
                nbytes = bytes_of(row, item)
                found.append(Point(series_of(row), row["useful_flops"] / nbytes, row["flops_per_second"]))
    return found


def bytes_of(row: Json, item: int) -> int:
    k, c, r, s = row["shape"]
    batch, _, h, w = row["x_shape"]
    padding = row["padding"][0], row["padding"][1]
    layer = Layer(row["net"], row["layer"], k, c, (r, s), row["stride"], padding, (h, w))
    pattern = SimpleNamespace(nnzb=row["nnzb"], blocksize=row["blocksize"], shape=row["shape"])
    return least_bytes(layer, batch, row["kind"], item, cast(Any, pattern))


def draw(device: Device, path: Path) -> bool:
    """The figure; False where there is nothing to draw, or nothing to draw with."""
    found = points(device)
    if not found:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for label in dict.fromkeys(point.label for point in found):
        mine = [point for point in found if point.label == label]
        axis.scatter([p.intensity for p in mine], [p.flops_per_second for p in mine], s=12, label=label)
    ceilings = {
        (run["options"]["dtype"], *run["ceilings"]["at_start"].values()): run["ceilings"]["at_start"]
        for run in device.runs
    }
    left, right = min(p.intensity for p in found) / 2, max(p.intensity for p in found) * 4
    for dtype in dict.fromkeys(key[0] for key in ceilings):
        copy = max(c["copy_bytes"] for key, c in ceilings.items() if key[0] == dtype)
        matmul = max(c["matmul_flops"] for key, c in ceilings.items() if key[0] == dtype)
        xs = sorted({left, min(max(left, matmul / copy), right), right})
        axis.plot(xs, [min(matmul, copy * x) for x in xs], linewidth=0.8, color="black")
        axis.annotate(dtype, (right, min(matmul, copy * right)), fontsize="x-small", ha="right", va="bottom")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("useful FLOP per byte that must move")
    axis.set_ylabel("useful FLOP/s")
    axis.set_title(f"{device.name}: layers under the ceilings measured in the same run", fontsize="small")
    axis.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    assert all(math.isfinite(point.intensity) for point in found)
    return True


if __name__ == "__main__":
    sys.exit(main())
