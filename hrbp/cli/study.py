"""python -m hrbp study: structures and methods compared, from the command line."""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.batches import Batches
from ..data.folders import LAYOUT
from ..data.loading import load, set_named
from ..density import DISTRIBUTIONS
from ..methods.registry import METHODS
from ..models import NETWORKS
from ..structures.registry import STRUCTURES
from ..study.equal_accuracy import parts as equal_parts
from ..study.page import PAGE
from ..study.regularity import OPTIONS, Regularity
from ..study.regularity_table import GRAINS
from ..study.regularity_table import parts as regularity_parts
from ..study.runner import TEST_BATCH
from ..study.sensitivity import Sensitivity
from ..study.sensitivity_table import parts as sensitivity_parts
from ..study.study import Study
from ..study.study_table import parts as study_parts
from ..study.variants import ABLATION, BASELINES, LAMBDAS, PRESETS, Preset, Variant
from ..training.devices import the_device
from . import ablation, parsing, sr_ste, worth
from .ending import tell, tell_files

REGULARITY = "regularity"
MAX_TIME, MAX_STORAGE = 0.5, 0.25
TOLERANCE = 1.0  # points of accuracy
SHARING, MOST_JOBS = ("quick", worth.PRESET, ablation.PRESET, sr_ste.PRESET), 8  # presets of small networks
RETRAIN, TIMED_WIDTH = 2, 8.0  # epochs after a pruning; of resnet8: layers of 128 to 512 channels

DESCRIPTION = """\
Trains one network dense and sparse, with many structures and methods, and compares accuracy, memory and time. The
default takes about five minutes on a laptop.

  python -m hrbp study
  python -m hrbp study --structures dense hrbp hrbp++ --methods static rigl hrbp --sparsities 0.8 0.9 --seeds 0 1 2
  python -m hrbp study --preset paper --root ~/data                         Table 1 of the HRBP paper, for days
  python -m hrbp study --preset paper --model resnet32 --data cifar10 --seeds 0

--preset worth asks whether sparse networks are worth it: against narrow dense ones whose steps take as long, with five
paired seeds and 95% intervals. It says how long it will take before it begins: less than an hour on two cores.

  python -m hrbp study --preset worth --html
  python -m hrbp study --preset worth --quick                               under five minutes
  python -m hrbp study --preset worth --full --root ~/data                  two networks, two widths, CIFAR-10: for days

--preset ablation trains HRBP++ and changes to it, one at a time: taps, groups, first masks, methods, densities; it
measures how well the layers of each network can learn (channels read, dead weights, gradients, effective ranks), and
says which measure goes with accuracy.

  python -m hrbp study --preset ablation --html                             about half an hour

--preset sr-ste trains 2:4 and 1:4 from scratch with several lambda of SR-STE (Zhou et al., 2021), 0 (STE) and one below
0 among them, and shows how far the masks wander (SAD) beside the accuracy.

  python -m hrbp study --preset sr-ste --quick                              2:4 alone, a few minutes
  python -m hrbp study --preset sr-ste --lambdas 0 2e-4 2e-3 --sparsities 0.5 --seeds 0 1 2

--preset regularity prunes one trained network instead, grain by grain (single weights, vectors, kernels, filters, ...)
and from one sparsity to the next, with retraining after each; the table has storage, memory references, balance and
time, and ends with the best structure within the budgets; a second table has density, storage and references of each
grain at equal accuracy. Its default takes about ten minutes on two cores. With --sensitivity it prunes one layer at a
time, too, without training again.

  python -m hrbp study --preset regularity --max-time 0.5 --max-storage 0.2
  python -m hrbp study --preset regularity --model resnet32 --width 2 --data cifar10 --weights resnet32.pt --retrain 20
"""

END = """\
The same command again continues where it was stopped, by Ctrl-C or by anything else. In the folder: results.json,
table.csv, study.png, and each training with its log. Several networks or data sets have a folder each in it.
On a CPU small networks are trained side by side, one on each thread (--jobs); step times are measured before, on all.
--structures and --methods train all pairs that go together; dense and narrow networks are trained once.
Exit status: 0; 2 for an option or a file that cannot be used; 128 + N if stopped by signal N.
"""


def add_study(commands: parsing.Commands) -> None:
    """The command `study` and its options."""
    parser = commands.add_parser(
        "study", help="compare structures and methods", description=DESCRIPTION, epilog=END,
        formatter_class=parsing.AS_WRITTEN,
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", choices=(*PRESETS, REGULARITY), default="quick", help="which defaults, default quick")
    add("--model", choices=NETWORKS, nargs="+", metavar="NAME", help=f"{', '.join(NETWORKS)}")
    add("--width", type=float, nargs="+", metavar="W", help="times the published channel counts")
    add(
        "--data", nargs="+", type=parsing.path, metavar="NAME",
        help=f"shapes (generated), digits (scikit-learn's), cifar10, cifar100, or a folder with {LAYOUT}",
    )  # fmt: skip
    add("--root", type=parsing.path, default="data", help="where CIFAR's archives lie, default data")
    add(
        "--structures",
        nargs="+",
        type=str.lower,
        metavar="NAME",
        help=f"dense, narrow, {', '.join(STRUCTURES)}, 2:4, ...",
    )
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"how masks change: {', '.join(METHODS)}")
    add("--distribution", choices=DISTRIBUTIONS, help="of the layers' densities, default erk")
    add("--sparsities", nargs="+", type=float, metavar="S",
        help="of the layers made sparse, default 0.9 0.95, regularity: 0.5 0.75 0.875")  # fmt: skip
    add(
        "--seeds",
        nargs="+",
        type=parsing.seed,
        metavar="N",
        help="default 0 1, paper: 0 1 2, worth, ablation: 0 1 2 3 4",
    )
    add("--epochs", type=int, help="default 6, worth: 5, paper: 160")
    add("--batch-size", type=parsing.positive, help="default 64, paper: 128")
    add("--lr", type=float, help="default 0.1; half of that when training again after pruning")
    add(
        "--every",
        type=int,
        help="steps between mask changes, default 100, in short trainings a fortieth, of subp an epoch",
    )
    add("--out", type=parsing.path, metavar="DIR", help="folder, default runs/study, runs/study-PRESET")
    add(
        "--jobs", type=parsing.positive, metavar="N",
        help=f"trainings at a time on a CPU, whose threads they share out, default 1; of"
        f" {', '.join(SHARING)} as many as there are threads, {MOST_JOBS} at most",
    )  # fmt: skip
    add("--retime", action="store_true", help="measure step times anew; trainings that are finished stay")
    add("--html", action="store_true", help=f"also write {PAGE}: one file with the table, figures and settings")
    parsing.add_device(add)
    add = parser.add_argument_group("--preset sr-ste").add_argument
    add("--lambdas", nargs="+", type=float, metavar="L", help=f"default {' '.join(f'{value:g}' for value in LAMBDAS)}")
    add = parser.add_argument_group("--preset worth").add_argument
    add("--quick", action="store_true", help="fewer arms, epochs and seeds, one sparsity; of sr-ste, too")
    add("--full", action="store_true", help="resnet8 and resnet14, width 2 and 4, and CIFAR-10 where --root has it")
    add = parser.add_argument_group("--preset regularity").add_argument
    add("--weights", type=parsing.path, metavar="FILE", help="of the trained network, default: it is trained first")
    add("--retrain", type=int, help=f"epochs after each pruning, default {RETRAIN}")
    add("--timed-width", type=float, help=f"width of the timed network, default --width, of resnet8 {TIMED_WIDTH:g}")
    budget = parsing.number(math.ulp(0.0), math.inf, "(0, inf)")
    add("--max-time", type=budget, help=f"budget of time, relative to dense, default {MAX_TIME}")
    add("--max-storage", type=budget, help=f"budget of file size, relative to dense, default {MAX_STORAGE}")
    add(
        "--tolerance",
        type=parsing.number(0.0, 100.0, "[0, 100)"),
        help=f"points below the dense accuracy that still are equal accuracy, default {TOLERANCE:g}",
    )
    add("--sensitivity", action="store_true", help="also prune one layer at a time, to each sparsity, with each grain")
    parser.set_defaults(run=run_study, words=())


def run_study(args: argparse.Namespace) -> int:
    """The studies of all networks on all data sets, each with its table."""
    args.data = None if args.data is None else [set_named(name) for name in args.data]
    if args.lambdas is not None and args.preset != sr_ste.PRESET:
        raise ValueError(f"study: --lambdas is of --preset {sr_ste.PRESET}; leave it out, or take that preset")
    if args.distribution is not None and args.preset in (REGULARITY, sr_ste.PRESET, ablation.PRESET):
        raise ValueError(f"study: --distribution is not of --preset {args.preset}; leave it out")
    if args.preset != worth.PRESET:
        if args.full or (args.quick and args.preset != sr_ste.PRESET):
            option = "quick" if args.quick else "full"
            raise ValueError(f"study: --{option} is of --preset {worth.PRESET}; leave it out, or take that preset")
        if len(args.width or ()) > 1:
            raise ValueError(f"study: --preset {args.preset} takes one --width; run it once for each")
    elif args.quick and args.full:
        raise ValueError("study: --quick and --full are two sizes of the study; take one")
    if args.jobs is None:
        shared = args.preset in SHARING and the_device(args.device).type == "cpu"
        args.jobs = min(torch.get_num_threads(), MOST_JOBS) if shared else 1
    if args.preset == REGULARITY:
        if args.jobs > 1:
            raise ValueError(f"study: --jobs: --preset {REGULARITY} prunes again what it has trained; leave it out")
        if args.retime:
            raise ValueError(f"study: --retime is not of --preset {REGULARITY}; leave it out, or use a new folder")
        return run_regularity(args)
    for name in ("weights", "retrain", "timed_width", "max_time", "max_storage", "tolerance", "sensitivity"):
        if getattr(args, name) not in (None, False):
            option = name.replace("_", "-")
            raise ValueError(f"study: --{option} is of --preset {REGULARITY}; leave it out, or take that preset")
    preset = PRESETS[args.preset]
    training = _training(args, preset.training)
    if args.preset == worth.PRESET:
        stopped = worth.run_worth(args, lambda name, split: load(name, split, root=args.root), training, _variants)
        return 0 if stopped is None else _stopped(stopped)
    if args.preset == sr_ste.PRESET:
        stopped = sr_ste.run_sr_ste(args, lambda name, split: load(name, split, root=args.root), training)
        return 0 if stopped is None else _stopped(stopped)
    if args.preset == ablation.PRESET:
        stopped = ablation.run_ablation(args, lambda name, split: load(name, split, root=args.root), training)
        return 0 if stopped is None else _stopped(stopped)
    models, sets = (list(dict.fromkeys(names)) for names in (args.model or preset.models, args.data or preset.data))
    pairs = [(model, data) for data in sets for model in models]
    loaded = {data: (load(data, "train", root=args.root), load(data, "test", root=args.root)) for _, data in pairs}
    out = Path(args.out or ("runs/study" if args.preset == "quick" else f"runs/study-{args.preset}"))
    studies = [
        Study(
            out if len(pairs) == 1 else out / f"{model}-{loaded[data][0].name}",
            _variants(args, preset, model, data), model=model,
            width=preset.width.get(model, 1.0) if args.width is None else args.width[0], images=loaded[data],
            sparsities=args.sparsities or preset.sparsities,
            seeds=preset.seeds if args.seeds is None else args.seeds,
            batch_size=args.batch_size or preset.batch_size, every=args.every, device=args.device,
            retime=args.retime, jobs=args.jobs, **training,
        )
        for model, data in pairs
    ]  # fmt: skip
    for made in studies:
        results = made.run()
        tell(args, made, results, study_parts(results))
        if results["stopped"]:
            return _stopped(results["stopped"])
    return 0


def run_regularity(args: argparse.Namespace) -> int:
    """One network, pruned in many ways, and its table."""
    for name in ("methods", "every"):
        if getattr(args, name) is not None:
            raise ValueError(f"study: --{name} is about masks that change, which those of --preset regularity do not")
    if any(len(getattr(args, name) or ()) > 1 for name in ("model", "data")):
        raise ValueError("study: --preset regularity takes one --model and one --data; run it once for each")
    quick = PRESETS["quick"]
    training = _training(args, quick.training)
    structures = [*BASELINES, *GRAINS]
    if args.weights is not None:  # how long a narrow network would have to be trained is not known
        training.pop("epochs")
        structures.remove("narrow")
    data, model = (args.data or quick.data)[0], (args.model or quick.models)[0]
    width = 1.0 if args.width is None else args.width[0]
    timed_width = TIMED_WIDTH if args.width is None and model in quick.models else width
    made = Regularity(
        args.out or f"runs/study-{REGULARITY}", structures if args.structures is None else args.structures,
        model=model, width=width, weights=args.weights,
        images=(load(data, "train", root=args.root), load(data, "test", root=args.root)),
        **{} if args.sparsities is None else {"sparsities": args.sparsities},
        seeds=quick.seeds if args.seeds is None else args.seeds, batch_size=args.batch_size or quick.batch_size,
        retrain=RETRAIN if args.retrain is None else args.retrain,
        timed_width=timed_width if args.timed_width is None else args.timed_width, device=args.device, **training,
    )  # fmt: skip
    results = made.run()
    budgets = {"max_time": args.max_time or MAX_TIME, "max_storage": args.max_storage or MAX_STORAGE}
    if (shown := regularity_parts(results, **budgets)) is not None:
        equal = equal_parts(results, (TOLERANCE if args.tolerance is None else args.tolerance) / 100)
        shown = replace(shown, further=() if equal is None else (equal,))
    print(f"\n{'no training is finished yet' if shown is None else shown.text()}\n")
    if results["stopped"]:
        return _stopped(results["stopped"])
    if args.sensitivity and shown is not None:
        grains = [name for name in made.structures if name not in BASELINES]
        test = Batches(made.test, TEST_BATCH, train=False, device=made.device)
        told = Sensitivity(
            made.out, made.trained_networks(), grains, made.sparsities, test, options=OPTIONS
        ).run()  # fmt: skip
        if (more := sensitivity_parts(told)) is not None:
            print(f"{more.text()}\n")
            shown = replace(shown, further=(*shown.further, more))
        if told["stopped"]:
            return _stopped(signal.Signals(told["stopped"]).name)
    tell_files(args, made, results, shown)
    return 0


def _training(args: argparse.Namespace, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the trainings."""
    given = {key: value for key in ("epochs", "lr") if (value := getattr(args, key)) is not None}
    return {**preset, **given, **parsing.running(args)}


def _stopped(name: str) -> int:
    print(f"stopped by {name}; the same command continues")
    return 128 + signal.Signals[name].value


def _variants(args: argparse.Namespace, preset: Preset, model: str, data: str) -> Sequence[Variant]:
    """The variants asked for: all pairs of structure and method that fit together."""
    if args.structures is None and args.methods is None:
        return _distributed(args, [
            *preset.variants,
            *(ABLATION if (preset, model, data) == (PRESETS["paper"], "resnet32", "cifar10") else ()),
        ])  # fmt: skip
    structures = args.structures or dict.fromkeys(variant.structure for variant in preset.variants)
    chosen: list[Variant] = []
    left_out = []
    for structure in dict.fromkeys(structures):
        pairs = [Variant(structure, method) for method in dict.fromkeys(args.methods or ["static"])]
        if structure in BASELINES:  # all sizes of the preset
            pairs = [v for v in preset.variants if v.structure == structure] or [Variant(structure)]
        for variant in pairs:
            if reason := variant.refuses():
                left_out.append(f"{variant.name}, as {reason}")
            else:
                chosen.append(variant)
    if not chosen:
        raise ValueError(f"study: none of the structures goes together with the methods: {'; '.join(left_out)}")
    for words in left_out:
        print(f"left out: {words}")
    return _distributed(args, chosen)


def _distributed(args: argparse.Namespace, variants: Sequence[Variant]) -> Sequence[Variant]:
    """With the densities of --distribution."""
    if args.distribution is None:
        return variants
    sparse = [variant for variant in variants if variant.structure not in BASELINES]
    if fixed := [variant.name for variant in sparse if variant.own_distribution]:
        raise ValueError(f"study: --distribution: {', '.join(fixed)} comes with one of its own; leave the option out")
    return [replace(v, distribution=args.distribution) if v in sparse else v for v in variants]
