"""Are sparse networks worth it? Studies of several networks and image sets in one table, with the answer in sentences.

Every sparse arm is compared with the narrow dense network whose step takes as long, with the one that has as many
parameters, and with single weights of the same sparsity; by seed, with 95% intervals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..columns import counted
from .page import Parts
from .spread import LEVEL, points
from .study_table import difference, rows
from .variants import BASELINES

Results = Mapping[str, Any]  # content of a study's results.json


def where(results: Results) -> str:
    """Network and images of a study, as "resnet8 x 2 on shapes"."""
    settings = results["settings"]
    return f"{settings['model']} x {settings['width']:g} on {settings['data']}"


def shown_name(structure: str) -> str:
    """An arm as tables and figures name it: t for the number of groups, without what goes along with it."""
    return re.sub(r" balanced=\S+", "", structure).replace("groups=", "t=")


def is_sparse(row: Mapping[str, Any]) -> bool:
    return row["structure"].split()[0] not in BASELINES


def parts(studies: Sequence[Results]) -> Parts | None:
    """What is shown of the studies; None where no training is finished."""
    found = [(results, rows(results)) for results in studies if results["runs"]]
    if not found:
        return None
    head = ["", "sparsity %", "accuracy %", "step ms", "parameters", "above narrow of equal time",
            "above narrow of equal parameters", "above unstructured"]  # fmt: skip
    many, lines = len(found) > 1, []
    for results, mine in found:
        for row in mine:
            name = shown_name(row["structure"])
            lines.append([
                f"{where(results)}: {name}" if many else name, _sparsity(row), _accuracy(row), _step(row),
                f"{row['parameters']:,}", *(points(difference(row, key)) for key in ("gain", "of_equal", "of_single")),
            ])  # fmt: skip
    said = [*overall(found), *(sentence for results, mine in found for sentence in answers(results, mine))]
    return Parts("sparse networks against narrow dense ones of equal time", head, lines, _notes(studies), said)


def table(studies: Sequence[Results]) -> str:
    """The table, notes on its columns, and the answers."""
    if (found := parts(studies)) is None:
        return "no training is finished yet"
    return found.text()


def overall(found: Sequence[tuple[Results, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """The answer in one sentence: how often sparse is above, or below, narrow dense at equal time; none if unknown."""
    known = [one for _, mine in found for row in mine if (one := difference(row, "gain")) and one.low is not None]
    if not known:
        return []
    above, below = (sum(one.side == side for one in known) for side in (1, -1))
    chance = (1 - LEVEL) / 2 * len(known)
    many = f"{counted(len(known), 'comparison')} with the narrow dense network of equal measured step time"
    if above > 2 * chance:
        start = f"Sparse networks are worth their time here in {above} of {many}; in"
    else:
        start = f"Sparse networks are not shown to be worth their time here: of {many} they are above it in {above}, in"
    return [
        f"{start} {below} they are below it, in {len(known) - above - below} no difference is shown (by chance alone"
        f" {chance:.1f} would be above and as many below)."
    ]


def answers(results: Results, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence at equal time, one at equal parameters, and one for each sparsity on groups against single weights."""
    said = []
    sparse = [row for row in found if is_sparse(row)]
    for key, rival, same in (
        ("gain", "the narrow dense network whose step takes as long", "At equal measured step time"),
        ("of_equal", "the narrow dense network of as many parameters", "At equal parameters"),
    ):
        known = [(row, one) for row in sparse if (one := difference(row, key)) is not None and one.low is not None]
        if not known:
            continue
        above = sorted((pair for pair in known if pair[1].side > 0), key=lambda pair: -pair[1].mean)
        below = [pair for pair in known if pair[1].side < 0]
        best = above[0] if above else max(known, key=lambda pair: pair[1].mean)
        verdict = (
            f"{len(above)} of {counted(len(known), 'sparse arm')} {'is' if len(above) == 1 else 'are'} above {rival}"
            if above else f"none of {counted(len(known), 'sparse arm')} is shown to be above {rival}"
        )  # fmt: skip
        rest = len(known) - len(above) - len(below)
        said.append(
            f"{same}, {where(results)}: {verdict}, {len(below)} below, of {rest} no difference is shown;"
            f" best is {_named(best[0])}: {points(best[1])} points."
        )
    for asked in sorted({row["asked"] for row in sparse}):
        groups = [row for row in sparse if row["asked"] == asked and row["structure"].startswith("hrbp++")]
        known = [(row, one) for row in groups if (one := difference(row, "of_single")) is not None]
        if known:
            best = max(known, key=lambda pair: pair[1].mean)
            said.append(
                f"Against single weights at {100 * asked:g}%, {where(results)}: the best HRBP++,"
                f" {shown_name(best[0]['structure'])}: {points(best[1])} points."
            )
    return said


def _notes(studies: Sequence[Results]) -> list[str]:
    first, share = studies[0], 100 * LEVEL
    compared = sum(is_sparse(row) for results in studies for row in rows(results))
    notes = [
        f"{where(results)}: {counted(results['settings']['training']['epochs'], 'epoch')},"
        f" {counted(len(results['settings']['seeds']), 'seed')}; {len(results['runs'])} of"
        f" {results['settings']['trainings']} trainings are finished"
        for results in studies
    ]
    notes += [
        f"all arms of a network: the same images in the same order for a seed, the same number of steps and the same"
        f" learning rates; intervals are {share:g}% ones, of Student's t over seeds, of differences paired by seed",
        f"of {compared} such intervals about {(1 - LEVEL) * compared:.1f} exclude 0 by chance",
        f"step: of a training step on {first['machine']}, median of interleaved steps, with its interval relative to"
        " dense; steps that change masks count as often as they come",
        "narrow of equal time: interpolated, for each seed, on the curve of dense networks of several widths; an"
        " interval holds at either end of that of the step time",
        "narrow 2x: of twice the parameters of the sparse networks; t=8: eight groups, which may read less than all"
        " channels, otherwise there are as many as read them all; from dense: half of the training dense, then pruned"
        " by magnitude, and its step is the mean of both",
    ]
    notes += [
        f"left out, {where(results)}: {line}, as {reason}"
        for results in studies
        for line, reason in results.get("left_out", {}).items()
    ]
    return notes


def _named(row: Mapping[str, Any]) -> str:
    return f"{shown_name(row['structure'])} at {100 * row['asked']:g}%"


def _sparsity(row: Mapping[str, Any]) -> str:
    if row["asked"] == 0:
        return "0"
    return f"{100 * row['sparsity']:.1f}" if is_sparse(row) else f"as {100 * row['asked']:g}"


def _accuracy(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return "diverged"
    spread = "" if row["low"] is None else f" +- {50 * (row['high'] - row['low']):.1f}"
    return f"{100 * row['accuracy']:.1f}{spread}"


def _step(row: Mapping[str, Any]) -> str:
    if row["step_seconds"] is None:
        return "-"
    low, high = (1e3 * row[key] for key in ("step_low", "step_high"))
    return f"{1e3 * row['step_seconds']:.1f}" + ("" if low == high else f" [{low:.1f}, {high:.1f}]")
