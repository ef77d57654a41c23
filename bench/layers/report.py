"""How the results of layers are shown: the table, sums over a network, the conclusions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from bench.layers.networks import CHOSEN
from bench.layers.rows import BASELINES, KINDS, TOTAL, LayerRow, Total
from bench.shared.ceilings import Ceilings
from bench.shared.rows import ERROR, FAIL, REFUSED
from bench.shared.tables import WIDTH, milliseconds, number, percentiles, words
from hrbp.columns import columns

# The table is printed layer by layer: its columns are as wide in every part.
LEFT = (7, 5, 7, 13, 5)
NUMBERS = (6, 6, 6, 7, 5, 5, 7, 7, 5, 8, 8, 7, 5)  # the last two on a GPU
TITLES = {"dense": "x dense", "grouped": "x group", "torch_bsr": "x bsr", "narrow": "x narrow"}


def head_lines(machine: dict[str, Any], dtype: str, batch: int, ceilings: Ceilings) -> list[str]:
    """What this runs on, its ceilings, and the titles of the columns; --help explains them."""
    on_gpu = machine["device_type"] == "cuda"
    threads = "" if on_gpu else f", {machine['threads']} threads"
    matmul = f"{ceilings.matmul_flops / 1e12:.0f} T" if on_gpu else f"{ceilings.matmul_flops / 1e9:.1f} G"
    copy = f"{ceilings.copy_bytes / 1e9:.1f} GB/s"
    peak = "" if ceilings.peak_flops is None else f", multiply-adds alone {ceilings.peak_flops / 1e9:.1f} GFLOP/s"
    load, cores = machine["load_at_start"] or 0.0, machine["cores"]
    busy = f"other programs are busy here (load {load:.1f} on {cores} cores): times and ratios will suffer"
    return [
        *([f"WARNING: {busy}"] if load > cores / 2 and not on_gpu else []),
        f"{machine['device']}{threads}; torch {machine['torch']}; {dtype}, batch {batch}",
        f"ceilings measured now: copy {copy} (read + written), {dtype} matmul {matmul}FLOP/s{peak}",
        "",
        table_head(on_gpu),
    ]


def table_head(on_gpu: bool) -> str:
    unit = "TFLOP/s" if on_gpu else "GFLOP/s"
    numbers = ["ms p20", "p50", "p80", unit, "roof%", "peak%", *(TITLES[name] for name in BASELINES), "extra MB"]
    numbers += ["pred ms", "err%"] if on_gpu else []
    return _line(["blocks", "kept%", "backend", "layout", "kind"], numbers)


def _line(left: Sequence[str], numbers: Sequence[str] = ()) -> str:
    widths = (*LEFT, *NUMBERS)[: len(left) + len(numbers)]
    return columns([[*left, *numbers]], tuple(range(len(LEFT))), widths)


def layer_lines(rows: Sequence[LayerRow], on_gpu: bool) -> list[str]:
    """One layer: a title with what it is and what dense needs, then its rows."""
    first = rows[0]
    often = "once" if first.count == 1 else f"{first.count} times"
    times = "" if first.net == CHOSEN else f", {often} in {first.net}"
    rounds = max((len(row.times.laps) for row in rows if row.times), default=0)
    title = f"{first.layer}: {first.geometry}{times}" + (f"; {rounds} rounds" if rounds else "")
    dense = {row.kind: row.baselines["dense"] for row in rows if row.baselines}
    said = [f"{kind} {milliseconds(r.p50)} ({r.variant})" for kind, r in dense.items() if r.p50 is not None]
    lines = ["", title, *([f"  best dense, ms: {', '.join(said)}"] if said else [])]
    refused: set[tuple[str, float, str]] = set()
    for row in rows:
        case = row.blocksize_asked, row.sparsity_asked, row.backend_asked
        if row.status != REFUSED:
            lines += _row_lines(row, on_gpu)
        elif case not in refused:
            lines += words(_line(_names(row, "every")), row)
            refused.add(case)
    return lines


def _row_lines(row: LayerRow, on_gpu: bool) -> list[str]:
    names = _names(row, row.kind)
    if row.times is None:
        return words(_line(names), row)
    numbers = [
        *percentiles(row.times),
        _rate(row.flops_per_second, on_gpu),
        number(row.roofline_share, ".0f", 100),
        number(row.peak_share, ".0f", 100),
        *(_ratio(row, name) for name in BASELINES),
        number(row.extra_bytes, ".1f", 1e-6),
        *([milliseconds(row.predicted_ms), number(row.prediction_error, "+.0f", 100)] if on_gpu else []),
    ]
    return [_line(names, numbers)]


def _names(row: LayerRow, kind: str) -> list[str]:
    return [row.blocksize_asked, _kept(row.density), row.backend or row.backend_asked, row.variant, kind]


def _ratio(row: LayerRow, name: str) -> str:
    baseline = row.baselines.get(name)
    return FAIL if baseline is not None and baseline.status == FAIL else number(row.speedup(name))


def _rate(flops_per_second: float | None, on_gpu: bool) -> str:
    return number(flops_per_second, ".1f", 1e-12 if on_gpu else 1e-9)


def _kept(density: float | None) -> str:
    return "" if density is None else number(density, ".1f", 100)


# ---------------------------------------------------------------- totals


def total_lines(sums: Sequence[Total], on_gpu: bool) -> list[str]:
    """A network's sums, a line for each pattern, backend and kind; where shapes are missing, how many."""
    first = sums[0]
    lines = ["", f"{first.net}, each {'once' if first.net == CHOSEN else 'as often as it occurs'}:"]
    for total in sums:
        backend = "+".join(total.backends) or total.backend_asked
        names = [total.blocksize_asked, _kept(total.density), backend, "best of each", total.kind]
        if total.ms is None or total.failed:
            lines.append(f"{_line(names)} no total: {_missing(total)}")
            continue
        rate = None if total.useful_flops is None else 1e3 * total.useful_flops / total.ms
        numbers = [
            "", milliseconds(total.ms), "", _rate(rate, on_gpu),
            *(number(None if t is None else t / total.ms, ".0f", 100) for t in (total.roofline_ms, total.peak_ms)),
            *(number(total.speedup(name)) for name in BASELINES), "",
        ]  # fmt: skip
        missing = f"  [{_missing(total)}]" if total.layers < total.layers_asked else ""
        lines.append(_line(names, numbers) + missing)
    return lines


def _missing(total: Total) -> str:
    refused = total.layers_asked - total.layers - total.failed
    parts = [
        f"{n} of {total.layers_asked} shapes {what}" for n, what in ((total.failed, FAIL), (refused, "refused")) if n
    ]
    return ", ".join(parts)


def conclusions(sums: Iterable[Total], batch: int) -> list[str]:
    """A plain sentence for each network, pattern and backend: how much faster than dense, and what is possible."""
    groups: dict[tuple[Any, ...], dict[str, Total]] = {}
    for t in sums:
        key = (t.net, t.structure, t.blocksize_asked, t.sparsity_asked, t.backend_asked)
        groups.setdefault(key, {})[t.kind] = t
    return [line for kinds in groups.values() for line in textwrap.wrap(_conclusion(kinds, batch), WIDTH)]


def _conclusion(kinds: dict[str, Total], batch: int) -> str:
    some = next(iter(kinds.values()))
    names = {
        "fprop": "forward",
        "dgrad": "input gradient",
        "wgrad": "weight gradient",
        TOTAL: "all three together",
    }
    backend = "+".join(some.backends) or some.backend_asked
    who = (
        f"{some.net}, {some.structure} {some.blocksize_asked} at {100 * some.sparsity_asked:g}% sparsity"
        f" ({backend} backend): "
    )
    broken = [names[kind] for kind, t in kinds.items() if t.failed]
    if broken:
        return f"{who}no speed-up to report; {', '.join(broken)} failed its check."
    said = [f"{names[k]} {s:.2f}x" for k in (*KINDS, TOTAL) if k in kinds and (s := kinds[k].speedup("dense"))]
    if not said:
        return f"{who}nothing to compare; {_missing(some) or 'dense did not run'}."
    main = kinds.get(TOTAL, some)
    dense, sparse, roof = main.baseline_ms["dense"], main.ms, main.roofline_ms
    text = f"{who}{', '.join(said)} the speed of the best dense convolution"
    if dense is not None and sparse is not None and roof:
        times = f"{milliseconds(dense)} -> {milliseconds(sparse)} ms for {batch} images"
        text += f" ({times}; the roofline allows {dense / roof:.1f}x)"
    if some.layers < some.layers_asked:
        text += f"; only {some.layers} of {some.layers_asked} shapes ran ({_missing(some)})"
    return text + "."


def drift(before: Ceilings, after: Ceilings) -> str:
    """A sentence: did the machine stay as fast as it was."""
    copy = 100 * (after.copy_bytes / before.copy_bytes - 1)
    matmul = 100 * (after.matmul_flops / before.matmul_flops - 1)
    verdict = "steady" if max(abs(copy), abs(matmul)) <= 10 else "not steady: trust ratios, not times"
    return f"Ceilings at the end against the start: copy {copy:+.0f}%, matmul {matmul:+.0f}% ({verdict})."


def failed(rows: Iterable[LayerRow]) -> int:
    """How many rows failed their check or raised."""
    return sum(row.status in (FAIL, ERROR) for row in rows)
