"""How results are shown: the table, the conclusions, the JSON file and the plot."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from layers import CHOSEN
from rows import ABSENT, ERROR, FAIL, KINDS, OK, REFUSED, RIVALS, TOTAL, Result, Row, Total
from timing import Ceilings

WIDTH = 132
_LEFT = "{:<9}{:>6}  {:<7} {:<14}{:<6}"
_NUMBERS = "{:>9}{:>9}{:>9}{:>9}{:>6}{:>6}{:>9}{:>9}{:>7}{:>9}{:>9}"
_TITLES = {"dense": "x dense", "grouped": "x group", "torch_bsr": "x bsr", "narrow": "x narrow"}


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
    left = _LEFT.format("blocks", "kept%", "backend", "layout", "kind")
    unit = "TFLOP/s" if on_gpu else "GFLOP/s"
    return left + _NUMBERS.format(
        "ms p20", "p50", "p80", unit, "roof%", "peak%", *(_TITLES[rival] for rival in RIVALS), "extra MB"
    )


def layer_lines(rows: Sequence[Row], on_gpu: bool) -> list[str]:
    """One layer: a title with what it is and what dense needs, then its rows."""
    first = rows[0]
    often = "once" if first.count == 1 else f"{first.count} times"
    times = "" if first.net == CHOSEN else f", {often} in {first.net}"
    rounds = max((len(row.sparse.times.laps) for row in rows if row.sparse.times), default=0)
    title = f"{first.layer}: {first.geometry}{times}" + (f"; {rounds} rounds" if rounds else "")
    dense = {row.kind: row.rivals["dense"] for row in rows if row.rivals}
    said = [f"{kind} {_ms(r.p50)} ({r.variant})" for kind, r in dense.items() if r.p50 is not None]
    lines = ["", title, *([f"  best dense, ms: {', '.join(said)}"] if said else [])]
    refused: set[tuple[str, float, str]] = set()
    for row in rows:
        case = row.blocksize_asked, row.sparsity_asked, row.backend_asked
        if row.sparse.status == REFUSED and case not in refused:
            lines += _words("every", row)
        elif row.sparse.status != REFUSED:
            lines += _row_lines(row, on_gpu)
        refused |= {case} if row.sparse.status == REFUSED else set()
    return lines


def _row_lines(row: Row, on_gpu: bool) -> list[str]:
    times = row.sparse.times
    if row.sparse.status != OK or times is None:
        return _words(row.kind, row)
    extra = "n/a" if row.sparse.extra_bytes is None else f"{row.sparse.extra_bytes / 1e6:.1f}"
    ratios = [_ratio(row, rival) for rival in RIVALS]
    numbers = _NUMBERS.format(
        _ms(times.p20),
        _ms(times.p50),
        _ms(times.p80),
        _rate(row.flops_per_second, on_gpu),
        _percent(row.roofline_share),
        _percent(row.peak_share),
        *ratios,
        extra,
    )
    return [_left(row.kind, row) + numbers]


def _words(kind: str, row: Row) -> list[str]:
    """A row without numbers: what happened and why."""
    left = _left(kind, row)
    note = f"{row.sparse.status}: {' '.join(row.sparse.reason.split())}"
    return textwrap.wrap(f"{left} {note}", WIDTH, subsequent_indent=" " * (len(left) + 1))


def _left(kind: str, row: Row) -> str:
    backend = row.backend or row.backend_asked
    return _LEFT.format(row.blocksize_asked, _kept(row.density), backend, row.sparse.variant, kind)


def _ratio(row: Row, rival: str) -> str:
    speedup = row.speedup(rival)
    if speedup is not None:
        return f"{speedup:.2f}"
    return FAIL if row.rivals.get(rival, Result(ABSENT)).status == FAIL else "n/a"


def _ms(value: float | None) -> str:
    """Four digits or so."""
    if value is None:
        return "n/a"
    digits = next((d for limit, d in ((1, 4), (10, 3), (100, 2), (1000, 1)) if value < limit), 0)
    return f"{value:.{digits}f}"


def _rate(flops_per_second: float | None, on_gpu: bool) -> str:
    return "n/a" if flops_per_second is None else f"{flops_per_second / (1e12 if on_gpu else 1e9):.1f}"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.0f}"


def _kept(density: float | None) -> str:
    return "" if density is None else f"{100 * density:.1f}"


# ---------------------------------------------------------------- totals


def total_lines(sums: Sequence[Total], on_gpu: bool) -> list[str]:
    """A network's sums, a line for each pattern, backend and kind; where shapes are missing, how many."""
    first = sums[0]
    lines = ["", f"{first.net}, each {'once' if first.net == CHOSEN else 'as often as it occurs'}:"]
    for total in sums:
        backend = "+".join(total.backends) or total.backend_asked
        left = _LEFT.format(total.blocksize_asked, _kept(total.density), backend, "best of each", total.kind)
        if total.ms is None or total.failed:
            lines.append(f"{left} no total: {_missing(total)}")
            continue
        rate = None if total.useful_flops is None else 1e3 * total.useful_flops / total.ms
        shares = (_percent(None if t is None else t / total.ms) for t in (total.roofline_ms, total.peak_ms))
        ratios = ("n/a" if (s := total.speedup(r)) is None else f"{s:.2f}" for r in RIVALS)
        numbers = _NUMBERS.format("", _ms(total.ms), "", _rate(rate, on_gpu), *shares, *ratios, "")
        missing = f"  [{_missing(total)}]" if total.layers < total.layers_asked else ""
        lines.append((left + numbers).rstrip() + missing)
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
    dense, sparse, roof = main.rival_ms["dense"], main.ms, main.roofline_ms
    text = f"{who}{', '.join(said)} the speed of the best dense convolution"
    if dense is not None and sparse is not None and roof:
        text += f" ({_ms(dense)} -> {_ms(sparse)} ms for {batch} images; the roofline allows {dense / roof:.1f}x)"
    if some.layers < some.layers_asked:
        text += f"; only {some.layers} of {some.layers_asked} shapes ran ({_missing(some)})"
    return text + "."


def drift(before: Ceilings, after: Ceilings) -> str:
    """A sentence: did the machine stay as fast as it was."""
    copy = 100 * (after.copy_bytes / before.copy_bytes - 1)
    matmul = 100 * (after.matmul_flops / before.matmul_flops - 1)
    verdict = "steady" if max(abs(copy), abs(matmul)) <= 10 else "not steady: trust ratios, not times"
    return f"Ceilings at the end against the start: copy {copy:+.0f}%, matmul {matmul:+.0f}% ({verdict})."


# ---------------------------------------------------------------- files


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a temporary file beside `path`, then a rename."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(temporary).chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Bars of speed-up over dense, a group a layer and a panel a kind; one colour a pattern and backend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row.kind for row in rows))
    layers = list(dict.fromkeys(row.layer for row in rows))
    series = list(dict.fromkeys(_series(row) for row in rows))
    width = 0.8 / len(series)
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(max(6.0, 0.5 * len(layers)), 2.4 * len(kinds) + 2), sharex=True, squeeze=False
    )
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        for at, name in enumerate(series):
            speed = {row.layer: row.speedup("dense") for row in rows if row.kind == kind and _series(row) == name}
            heights = [speed.get(layer) or 0.0 for layer in layers]
            axis.bar([i + at * width for i in range(len(layers))], heights, width, label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel(f"{kind}: x dense")
    axes[0, 0].legend()
    axes[0, 0].set_title(title, fontsize="small")
    axes[-1, 0].set_xticks([i + 0.4 - width / 2 for i in range(len(layers))], layers, rotation=90)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _series(row: Row) -> str:
    return f"{row.blocksize_asked} at {100 * row.sparsity_asked:g}%, {row.backend or row.backend_asked}"


def failed(rows: Iterable[Row]) -> int:
    """How many rows failed their check or raised."""
    return sum(row.sparse.status in (FAIL, ERROR) for row in rows)
