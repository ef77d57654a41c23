"""The results of pruning one layer at a time: rows, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..columns import counted
from .page import Parts
from .regularity_table import GRAINS
from .spread import LEVEL, interval, mean

FIGURE = "sensitivity.png"


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer, grain and sparsity that was tested.

    layer, weights    name, and how many it has
    structure, asked  grain and sparsity, as asked for
    sparsity          of this layer: whole grains are pruned
    seeds             networks that it was tested in
    accuracy          of the network with this layer pruned, a mean over seeds, as a share
    lost, low, high   accuracy below that of the whole network, paired by seed, with its interval; None of one seed
    """
    settings, found = results["settings"], []
    images = settings["images"][1]
    for layer, weights in results["layers"].items():
        for structure in settings["structures"]:
            for asked in settings["sparsities"]:
                tested = {
                    seed: results["right"][key]
                    for seed in settings["networks"]
                    if (key := f"{seed}, {layer}, {structure}, {asked}") in results["right"]
                    and seed in results["whole"]
                }
                lost = interval([(results["whole"][seed] - right) / images for seed, (right, _) in tested.items()])
                if lost is not None:
                    found.append({
                        "layer": layer, "weights": weights, "structure": GRAINS.get(structure, structure),
                        "asked": asked, "sparsity": mean([sparsity for _, sparsity in tested.values()]),
                        "seeds": len(tested), "accuracy": mean([right / images for right, _ in tested.values()]),
                        "lost": lost.mean, "low": lost.low, "high": lost.high,
                    })  # fmt: skip
    return found


def parts(results: Mapping[str, Any]) -> Parts | None:
    """What is shown of it; None where nothing is tested yet."""
    found = rows(results)
    if not found:
        return None
    grains = list(dict.fromkeys(row["structure"] for row in found))
    cells = {(row["layer"], row["asked"], row["structure"]): row for row in found}
    lines = [
        [
            layer,
            f"{weights:,}",
            f"{100 * (1 - asked):g}",
            *(_cell(cells.get((layer, asked, grain))) for grain in grains),
        ]
        for layer, weights in results["layers"].items()
        for asked in results["settings"]["sparsities"]
    ]
    seeds = max(row["seeds"] for row in found)
    whole = mean([right / results["settings"]["images"][1] for right in results["whole"].values()])
    assert whole is not None
    title = f"One layer pruned at a time, not trained again: points of accuracy lost, {counted(seeds, 'seed')}"
    notes = [
        f"of {100 * whole:.1f}% of the whole network; +-: half of the {100 * LEVEL:g}% interval of differences paired"
        " by seed; density as asked for, a layer keeps whole grains",
    ]
    refused: dict[str, list[str]] = {}
    for key in results["refused"]:
        layer, structure, asked = key.rsplit(", ", 2)
        if structure in results["settings"]["structures"] and float(asked) in results["settings"]["sparsities"]:
            refused.setdefault(GRAINS.get(structure, structure), []).append(layer)
    notes += [f"{grain}: not in {', '.join(dict.fromkeys(names))}" for grain, names in refused.items()]
    return Parts(title, ["layer", "weights", "density %", *grains], lines, notes, _said(found), figure=FIGURE)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{100 * row['lost']:.1f}" + ("" if row["low"] is None else f" +- {50 * (row['high'] - row['low']):.1f}")


def _said(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each grain the layers that lose most and least, at the highest sparsity."""
    said = []
    highest = max(row["asked"] for row in found)
    for grain in dict.fromkeys(row["structure"] for row in found):
        mine = sorted((r for r in found if (r["structure"], r["asked"]) == (grain, highest)), key=lambda r: r["lost"])
        if len(mine) > 1:
            least, most = mine[0], mine[-1]
            said.append(
                f"{grain} at {100 * (1 - highest):g}% density: most is lost by {most['layer']}"
                f" ({100 * most['lost']:.1f} points), least by {least['layer']} ({100 * least['lost']:.1f})."
            )
    return said
