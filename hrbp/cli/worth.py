"""python -m hrbp study --preset worth: sparse networks against narrow dense ones of equal time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..columns import counted
from ..data.cifar import cifar_place
from ..data.digits import has_digits
from ..progress import duration
from ..study.page import write_study
from ..study.study import Study
from ..study.variants import PRESETS, WORTH_QUICK, Variant
from ..study.worth import FIGURE, draw
from ..study.worth_table import parts, table
from . import parsing

PRESET = "worth"
QUICK_EPOCHS, QUICK_SEEDS = {"shapes": 2, "digits": 5}, (0, 1, 2)
FULL_MODELS, FULL_WIDTHS = ("resnet8", "resnet14"), (2.0, 4.0)

Load = Callable[[str, str], Any]  # name, split


def run_worth(
    args: argparse.Namespace, load: Load, training: Mapping[str, Any], variants: Callable[..., Sequence[Variant]],
) -> str | None:  # fmt: skip
    """Train, or continue, all studies; print the table and the answer; draw the figure.

    Args:
        args: of the command.
        load: makes an image set.
        training: settings of the trainings; epochs of the preset where none are given.
        variants: chooses the variants, of (args, preset, model, data).

    Returns:
        The signal that stopped it, or None.
    """
    preset, given = PRESETS[PRESET], {name: getattr(args, name) for name in ("model", "width", "data")}
    models = given["model"] or (FULL_MODELS if args.full else preset.models)
    widths = given["width"] or (FULL_WIDTHS if args.full else [preset.width[preset.models[0]]])
    out = Path(args.out or f"runs/study-{PRESET}{'-quick' if args.quick else ''}")
    made = []
    for data in dict.fromkeys(given["data"] or _sets(args)):
        images = load(data, "train"), load(data, "test")
        epochs = args.epochs or (QUICK_EPOCHS if args.quick else preset.epochs).get(data, training["epochs"])
        for model in dict.fromkeys(models):
            for width in dict.fromkeys(widths):
                quick = args.quick and args.structures is None and args.methods is None
                made.append(Study(
                    out / f"{model}-x{width:g}-{images[0].name}",
                    WORTH_QUICK if quick else variants(args, preset, model, data),
                    model=model, width=width, images=images,
                    sparsities=args.sparsities or (preset.sparsities[:1] if args.quick else preset.sparsities),
                    seeds=args.seeds or (QUICK_SEEDS if args.quick else preset.seeds),
                    batch_size=args.batch_size or preset.batch_size, every=args.every, device=args.device,
                    retime=args.retime, jobs=args.jobs, **{**training, "epochs": epochs},
                ))  # fmt: skip
    return _run(out, made, args)


def _sets(args: argparse.Namespace) -> list[str]:
    """The image sets of the preset that are there; a line for each that is not."""
    found = list(PRESETS[PRESET].data)
    if not has_digits():
        found.remove("digits")
        print("left out: digits, as scikit-learn is not installed (pip install scikit-learn)")
    if args.full:
        if cifar_place("cifar10", Path(args.root)) is None:
            print(f"left out: cifar10, as it is not in {args.root} (--root)")
        else:
            found.append("cifar10")
    return found


def _run(out: Path, made: Sequence[Study], args: argparse.Namespace) -> str | None:
    left = [study.measure() for study in made]
    print(
        f"expected: {duration(sum(left))} for what is left of {counted(len(made), 'study', 'studies')}, by the measured"
        " steps; it may be stopped at any time, and the same command continues"
    )
    results: list[Mapping[str, Any]] = []
    for i, study in enumerate(made):
        study.later, study.tells = sum(left[i + 1 :]), False
        results.append(study.run())
        if (stopped := results[-1]["stopped"]) is not None:
            break
    print(f"\n{table(results)}\n")
    try:
        print(f"figure: {draw(out, results)}")
    except ValueError as error:
        print(f"no figure: {error}")
    if (shown := parts(results)) is not None and args.html:
        print(f"page: {write_study(out, shown, results, FIGURE, [*parsing.program().split(), *args.words])}")
    return stopped
