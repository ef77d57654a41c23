"""python -m hrbp study --preset ablation: HRBP++, one change at a time, and how well its layers can learn."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from ..study.ablation import Ablation
from ..study.ablation_table import parts
from ..study.variants import PRESETS
from .ending import tell

PRESET = "ablation"

Load = Callable[[str, str], Any]  # name, split


def run_ablation(args: argparse.Namespace, load: Load, training: Mapping[str, Any]) -> str | None:
    """Train, or continue, print the table and the answer, draw the figure.

    Args:
        args: of the command.
        load: makes an image set.
        training: settings of the trainings; epochs of the preset where none are given.

    Returns:
        The signal that stopped it, or None.
    """
    preset = PRESETS[PRESET]
    for name in ("structures", "methods"):
        if getattr(args, name) is not None:
            raise ValueError(f"study: --{name}: --preset {PRESET} has its own, HRBP++ and changes to it; leave it out")
    for name in ("model", "data"):
        if len(getattr(args, name) or ()) > 1:
            raise ValueError(f"study: --preset {PRESET} takes one --{name}; run it once for each")
    data, model = (args.data or preset.data)[0], (args.model or preset.models)[0]
    made = Ablation(
        args.out or f"runs/study-{PRESET}", preset.variants, model=model,
        width=preset.width.get(model, 1.0) if args.width is None else args.width[0],
        images=(load(data, "train"), load(data, "test")), sparsities=args.sparsities or preset.sparsities,
        seeds=args.seeds or preset.seeds, batch_size=args.batch_size or preset.batch_size, every=args.every,
        device=args.device, retime=args.retime, jobs=args.jobs,
        **{**training, "epochs": args.epochs or preset.epochs.get(data, training["epochs"])},
    )  # fmt: skip
    results = made.run()
    tell(args, made, results, parts(results))
    return results["stopped"]
