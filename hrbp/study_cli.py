"""python -m hrbp study: the options, and what is printed."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .data import load
from .evolve import METHODS
from .models import NETWORKS
from .structure import STRUCTURES
from .study import ABLATION, FIGURE, PRESETS, Preset, Study, Variant, table
from .sweep import RESULTS, TABLE

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Trains one network dense and sparse, in many ways, and puts side by side what that keeps of its accuracy, and what it
costs in memory and time. The default takes about five minutes on a laptop.

  python -m hrbp study
  python -m hrbp study --structures dense hrbp hrbp++ --methods static rigl hrbp --sparsities 0.8 0.9 --seeds 0 1 2
  python -m hrbp study --preset paper --root ~/data                         Table 1 of the HRBP paper, for days
  python -m hrbp study --preset paper --model resnet32 --data cifar10 --seeds 0
"""

END = """\
The same command again continues where it was stopped, by Ctrl-C or by anything else. In the folder: results.json,
table.csv, study.png, and each training with its log. Several networks or data sets have a folder each in it.
--structures and --methods train all pairs that go together; dense and narrow networks are trained once.
Exit status: 0; 2 for an option or a file that cannot be used; 128 + N if stopped by signal N.
"""


def add_study(commands: Commands) -> None:
    """The command `study` and its options."""
    parser = commands.add_parser(
        "study", help="compare structures and methods", description=DESCRIPTION, epilog=END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="what holds where nothing else is said, default quick")
    add("--model", choices=NETWORKS, nargs="+", metavar="NAME", help=f"{', '.join(NETWORKS)}")
    add("--width", type=float, help="times the published channel counts")
    add("--data", nargs="+", metavar="NAME", help="shapes (generated), cifar10, cifar100, or a folder of images")
    add("--root", default="data", help="where CIFAR's archives lie, default data")
    add("--structures", nargs="+", metavar="NAME", help=f"dense, narrow, {', '.join(STRUCTURES)}, 2:4, ...")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"how masks change: {', '.join(METHODS)}")
    add("--sparsities", nargs="+", type=float, metavar="S", help="of the layers made sparse, default 0.9 0.95")
    add("--seeds", nargs="+", type=int, metavar="N", help="default 0 1, paper: 0 1 2")
    add("--epochs", type=int, help="default 6, paper: 160")
    add("--batch-size", type=int, help="default 64, paper: 128")
    add("--lr", type=float, help="default 0.1")
    add(
        "--every",
        type=int,
        help="steps between mask changes, default 100, in short trainings a fortieth, of subp an epoch",
    )
    add("--out", metavar="DIR", help="folder, default runs/study, paper: runs/study-paper")
    add("--device", help="default cuda if there is a GPU, else cpu")
    add("--amp", choices=("none", "bf16", "fp16"), help="mixed precision, default bf16 on a GPU, none on a CPU")
    parser.set_defaults(run=run_study)


def run_study(args: argparse.Namespace) -> int:
    """The studies of all networks on all data sets, each with its table."""
    preset = PRESETS[args.preset]
    on_gpu = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).type == "cuda"
    training = dict(preset.training)
    training |= {key: value for key in ("epochs", "lr") if (value := getattr(args, key)) is not None}
    training |= {
        "amp": {"none": None, None: "bf16" if on_gpu else None}.get(args.amp, args.amp),
        "channels_last": on_gpu,
    }
    pairs = [(model, data) for data in args.data or preset.data for model in args.model or preset.models]
    loaded = {data: (load(data, "train", root=args.root), load(data, "test", root=args.root)) for _, data in pairs}
    out = Path(args.out or ("runs/study" if args.preset == "quick" else f"runs/study-{args.preset}"))
    studies = [
        Study(
            out if len(pairs) == 1 else out / f"{model}-{loaded[data][0].name}",
            _variants(args, preset, model, data), model=model,
            width=preset.width.get(model, 1.0) if args.width is None else args.width, images=loaded[data],
            sparsities=args.sparsities or preset.sparsities,
            seeds=preset.seeds if args.seeds is None else args.seeds,
            batch_size=args.batch_size or preset.batch_size, every=args.every, device=args.device, **training,
        )
        for model, data in pairs
    ]  # fmt: skip
    for made in studies:
        results = made.run()
        print(f"\n{table(results)}\n")
        if results["stopped"]:
            print(f"stopped by {results['stopped']}; the same command continues")
            return 128 + signal.Signals[results["stopped"]].value
        print(f"in {made.out}: {RESULTS}, {TABLE}, {FIGURE}, and a folder for each training")
    return 0


def _variants(args: argparse.Namespace, preset: Preset, model: str, data: str) -> Sequence[Variant]:
    """What the command line asks for: all pairs that go together."""
    if args.structures is None and args.methods is None:
        return (
            *preset.variants,
            *(ABLATION if (preset, model, data) == (PRESETS["paper"], "resnet32", "cifar10") else ()),
        )
    structures = args.structures or dict.fromkeys(variant.structure for variant in preset.variants)
    chosen = []
    for structure in dict.fromkeys(structures):
        pairs = [Variant(structure, method) for method in dict.fromkeys(args.methods or ["static"])]
        if structure in ("dense", "narrow"):
            pairs = [Variant(structure)]
        for variant in pairs:
            if reason := variant.refuses():
                print(f"left out: {variant.name}, as {reason}")
            else:
                chosen.append(variant)
    return chosen
