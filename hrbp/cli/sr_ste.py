"""python -m hrbp study --preset sr-ste: what SR-STE's lambda does to masks and accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from ..study.sr_ste import CURVES, Lambdas
from ..study.sr_ste_table import parts
from ..study.variants import LAMBDAS, PRESETS, lambda_variants
from .ending import tell

PRESET = "sr-ste"
QUICK_EPOCHS, QUICK_SPARSITIES, QUICK_SEEDS = 3, (0.5,), (0, 1, 2)

Load = Callable[[str, str], Any]  # name, split


def run_sr_ste(args: argparse.Namespace, load: Load, training: Mapping[str, Any]) -> str | None:
    """Train, or continue, print the table and the answer, draw the figure.

    Args:
        args: of the command.
        load: makes an image set.
        training: settings of the trainings; epochs of the preset where none are given.

    Returns:
        The signal that stopped it, or None.
    """
    preset = PRESETS[PRESET]
    if args.methods is not None:
        raise ValueError(f"study: --methods: --preset {PRESET} has ste and sr-ste; leave it out, or give --lambdas")
    for name in ("model", "data"):
        if len(getattr(args, name) or ()) > 1:
            raise ValueError(f"study: --preset {PRESET} takes one --{name}; run it once for each")
    lambdas = LAMBDAS if args.lambdas is None else args.lambdas
    if len(set(lambdas)) < len(lambdas):
        raise ValueError(f"study: --lambdas is {' '.join(f'{value:g}' for value in lambdas)}; give each once")
    data, model = (args.data or preset.data)[0], (args.model or preset.models)[0]
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else preset.epochs.get(data, training["epochs"]))
    made = Lambdas(
        args.out or f"runs/study-{PRESET}{'-quick' if args.quick else ''}",
        lambda_variants(args.structures or ("n:m",), lambdas),
        model=model, width=1.0 if args.width is None else args.width[0],
        images=(load(data, "train"), load(data, "test")),
        sparsities=args.sparsities or (QUICK_SPARSITIES if args.quick else preset.sparsities),
        seeds=args.seeds or (QUICK_SEEDS if args.quick else preset.seeds),
        batch_size=args.batch_size or preset.batch_size, every=args.every, device=args.device,
        retime=args.retime, jobs=args.jobs,
        **{**training, "epochs": epochs},
    )  # fmt: skip
    results = made.run()
    tell(args, made, results, parts(results), CURVES)
    return results["stopped"]
