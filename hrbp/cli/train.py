"""python -m hrbp train: one training from the command line."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import signal
import sys
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.folders import LAYOUT
from ..data.loading import load, set_named
from ..data.sets import ImageSet
from ..density import DISTRIBUTIONS
from ..formats.pretrained import network_of, plain_bytes, pretrained, start_from
from ..methods.options import SHARED
from ..methods.registry import METHODS
from ..methods.registry import listed as listed_methods
from ..models import NETWORKS, build, narrow
from ..reports.model_summary import summary
from ..saliencies import SALIENCIES
from ..structures.registry import STRUCTURES
from ..structures.registry import listed as listed_structures
from ..surgery.conversion import sparsify
from ..surgery.decision import structure_for
from ..training.result import Diverged
from ..training.run import train
from ..training.settings import RATES, SCHEDULES, Settings
from . import parsing

EPOCHS = {"shapes": 20, "cifar10": 160, "cifar100": 160}  # the last two: the HRBP paper's
FOLDER_EPOCHS = 100
DENSE, NARROW = "dense", "narrow"
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}
AS_THEY_ARE = (  # options that are fields of Settings
    "optimizer", "lr", "momentum", "nesterov", "weight_decay", "schedule", "gamma", "warmup", "label_smoothing",
    "accumulate", "ema", "evolve", "compile", "fuse", "save_minutes",
)  # fmt: skip

DESCRIPTION = """\
Trains one network that is sparse from the first step: only the stored blocks have weights, gradients and optimizer
state.

  python -m hrbp train                                      HRBP++ at 90%, generated images, a few minutes on a laptop
  python -m hrbp train --structure dense                    the same network, dense
  python -m hrbp train --structure narrow                   a thin dense one with as many weights as the sparse one
  python -m hrbp train --structure hrbp --evolve rigl       masks that change while training
  python -m hrbp train --structure unstructured --evolve gmp --sparsity 0.95
  python -m hrbp train --structure 2:4 --sparsity 0.5 --evolve sr-ste       N:M from scratch; "ste" without the decay
  python -m hrbp train --structure 1xn --option n=16 --sparsity 0.75 --evolve subp   uniform blocks from scratch
  python -m hrbp train --model resnet32 --width 2 --data cifar10 --root ~/data --schedule step --out runs/first
  python -m hrbp train --weights torchvision:resnet50 --data ~/pets --epochs 20 --out runs/pets    trained weights,
                                                            made sparse by magnitude, then fine-tuned
  python -m hrbp train --out runs/first ... --resume        the same command again: continues where it was
  torchrun --nproc-per-node 4 -m hrbp train --model resnet50 --data ~/imagenet --batch-size 1024 --lr 0.4 --warmup 5
"""

END = """\
In the folder: log.jsonl (the configuration, then a line an epoch and a mask update), last.pt and previous.pt
(checkpoints), and at the end training.png and model.pt:

  model = hrbp.load("runs/first/model.pt")
  y = model(x)

Ctrl-C or SIGTERM saves and stops; a killed process loses what came after its last checkpoint, nothing more.
--resume with a larger --epochs lengthens a training, finished or not: from there on the learning rate is that of the
longer training; masks change when they would have changed in the shorter one.

Structures, with their options (--option groups=16 --option granule=8; their method is rule here: --option rule=paper):

{structures}

Methods of --evolve, with their options: --every, --drop, --until and --decay, others by --evolve-option; seed is that
of --seed, sparsity that of --sparsity, from --initial-sparsity on:

{methods}

--data FOLDER is a folder with train/CLASS/*.png to train with, one folder for each class, and val/CLASS/*.png or
test/CLASS/*.png, with the same classes, to test with; .jpeg, .webp and other images as well.
Exit status: 0; 1 if the loss is not finite; 2 for an option or a file that cannot be used; 128 + N if stopped by
signal N.
"""


def add_train(commands: parsing.Commands) -> None:
    """The command `train` and its options."""
    parser = commands.add_parser(
        "train", help="train a sparse or dense network", description=DESCRIPTION,
        epilog=END.format(structures=listed_structures(), methods=listed_methods()), formatter_class=parsing.AS_WRITTEN,
    )  # fmt: skip
    add = parser.add_argument_group("network").add_argument
    add(
        "--model", choices=NETWORKS, metavar="NAME",
        help=f"default resnet20, or that of --weights torchvision:NAME; {', '.join(NETWORKS)}",
    )  # fmt: skip
    add(
        "--weights", type=parsing.path, metavar="FILE|torchvision:NAME",
        help="begin with trained weights, of a file or of torchvision (which has to be installed); the network is made"
        " sparse by their magnitude, and --lr is a tenth of its default",
    )  # fmt: skip
    add("--width", type=float, default=1.0, help="times the published channel counts, default 1")
    add(
        "--data", type=parsing.path, default="shapes",
        help=f"shapes (generated, default), cifar10, cifar100, or a folder with {LAYOUT}",
    )  # fmt: skip
    add("--root", type=parsing.path, default="data", help="where CIFAR's archives lie, default data")
    add("--image-size", type=int, help="height and width, default 16 for shapes, 224 for a folder")
    add("--workers", type=parsing.count, default=4, help="processes that decode the images of a folder, default 4")

    add = parser.add_argument_group("sparsity").add_argument
    add(
        "--structure",
        type=str.lower,
        default="hrbp++",
        help=f"{', '.join(STRUCTURES)}, 2:4, ..., dense or narrow; default hrbp++",
    )
    share = parsing.number(0, 1, "[0, 1)")
    add("--sparsity", type=share, default=0.9, help="of the layers made sparse, default 0.9")
    others = "".join(f", with {m} {METHODS[m].distribution}" for m in METHODS if METHODS[m].distribution != "erk")
    add("--distribution", choices=DISTRIBUTIONS, help=f"of the layers' densities, default erk{others}")
    add("--min-density", type=share, default=0.0, metavar="SHARE", help="no layer keeps a smaller share, default 0")
    add(
        "--layer-sparsity", type=_layer_sparsity, action="append", default=[], metavar="NAME=SPARSITY",
        help="a layer's own sparsity; NAME may have * and ? as wildcards. --sparsity is that of the others then",
    )  # fmt: skip
    add("--saliency", choices=SALIENCIES, help="what chooses the first masks, default random, magnitude with --weights")
    add("--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="of the structure, see below")
    add("--evolve", type=str.lower, choices=METHODS, default="static", help="how masks change, default static")
    by_epoch = "".join(f", of {method} an epoch" for method in METHODS if METHODS[method].by_epoch)
    for field in _fields():
        also = f"{by_epoch}; fewer for at least 20 changes" if field.name == "every" else ""
        text = f"{field.metadata['help']}, default {field.default:g}{also} ({', '.join(_taking(field.name))})"
        add(f"--{field.name}", type=type(field.default), help=text)
    add("--initial-sparsity", type=float, help=f"where {', '.join(_taking('sparsity'))} starts, default 0")
    add(
        "--evolve-option", type=_option, action="append", default=[], metavar="NAME=VALUE",
        help="of the method that --evolve names, see below",
    )  # fmt: skip

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="default 20 for shapes, 160 for CIFAR, 100 for a folder")
    add("--batch-size", type=int, default=128, help="of all ranks together, default 128")
    lr, decay = (", ".join(f"{rates[i]:g} for {name}" for name, rates in RATES.items()) for i in (0, 1))
    setting = partial(_add_setting, add)
    setting("optimizer", "", choices=RATES)
    setting("lr", f"highest learning rate, default {lr}", type=float)
    setting("momentum", "of sgd", type=float)
    setting("nesterov", "of sgd", action="store_true")
    setting("weight_decay", f"default {decay}; none on biases and batch norm", type=float)
    setting("schedule", "", choices=SCHEDULES)
    setting("milestones", "of step: shares of the training", type=float, nargs="+")
    setting("gamma", "of step: the factor at each", type=float)
    setting("warmup", "epochs in which the learning rate rises", type=float)
    setting("label_smoothing", "share of the target that is spread over all classes", type=float)
    setting("ema", "average the weights, as 0.999; the average is tested and saved", type=float, metavar="DECAY")
    add("--seed", type=parsing.seed, default=0, help="of weights, masks and the order of images, default 0")

    add = parser.add_argument_group("running").add_argument
    add("--out", type=parsing.path, help="folder to write to, default runs/MODEL-STRUCTURE-SPARSITY-EVOLVE-SEED")
    add("--resume", action="store_true", help="continue what the folder holds, if it holds anything")
    parsing.add_device(add)
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory format, default yes on a GPU")
    setting = partial(_add_setting, add)
    setting("accumulate", "parts in which a batch goes through the network", type=int)
    setting("compile", "run steps through torch.compile", action="store_true")
    setting(
        "fuse", "BatchNorm, sum and ReLU as one operation, default yes; on a CPU", action=argparse.BooleanOptionalAction
    )
    setting("save_minutes", "minutes between checkpoints within an epoch", type=float)
    parser.set_defaults(run=run_train)


def _add_setting(add: Callable[..., Any], name: str, text: str, **more: Any) -> None:
    """An option that is a field of Settings, with the default that it has there."""
    default = DEFAULTS[name]
    if default is not None and not isinstance(default, bool):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else f"{default}"
        text = f"{text}, default {shown}" if text else f"default {shown}"
    add(f"--{name.replace('_', '-')}", default=default, help=text, **more)


def run_train(args: argparse.Namespace) -> int:
    """Run one training and print its result."""
    evolve_options = _evolve_options(args)
    running, first = parsing.running(args), int(os.environ.get("RANK", 0)) == 0
    if args.channels_last is not None:
        running["channels_last"] = args.channels_last
    options, args.data = _structure_options(args), set_named(args.data)
    weights = _begin_with(args)
    sets = [
        load(args.data, split, root=args.root, image_size=args.image_size, seed=args.seed, workers=args.workers)
        for split in ("train", "test")
    ]
    model, fresh = _network(args, sets[0], options, weights)
    if first:
        made = summary(model)
        print(
            f"{args.model}, {args.structure}: {made.parameters:,} of {made.dense_parameters:,} parameters; layers made"
            f" sparse are {made.sparsity:.2%} sparse"
        )
        if args.weights is not None:
            print(f"begins with {args.weights}" + (f"; {fresh}" if fresh else ""))
        print("".join(f"{note}\n" for note in made.notes), end="")
    described = (
        "model", "width", "structure", "sparsity", "distribution", "saliency", "option", "initial_sparsity", "seed"
    )  # fmt: skip
    out = args.out or f"runs/{args.model}-{args.structure}-{args.sparsity}-{args.evolve}-{args.seed}"
    try:
        result = train(
            model,
            (sets[0], sets[1]),
            batch_size=args.batch_size,
            seed=args.seed,
            device=args.device,
            out=out,
            resume=args.resume,
            config={name: getattr(args, name) for name in described} | _said(args, weights),
            epochs=EPOCHS.get(args.data, FOLDER_EPOCHS) if args.epochs is None else args.epochs,
            **{name: getattr(args, name) for name in AS_THEY_ARE},
            milestones=tuple(args.milestones),
            **running,
            evolve_options=evolve_options,
        )
    except Diverged as error:
        print(f"{parsing.program()} train: {error}", file=sys.stderr)
        return 1
    if result.stopped:
        return 128 + signal.Signals[result.stopped].value
    if first:
        print(
            f"test accuracy {result.accuracy:.2%}, loss {result.loss:.4f}; {result.parameters:,} parameters,"
            f" {result.memory / 1e6:.2f} MB of weights, gradients and optimizer state,"
            f" {1e3 * result.step_seconds:.3g} ms a step; in {out}"
        )
    return 0


def _begin_with(args: argparse.Namespace) -> dict[str, Tensor] | None:
    """The weights of --weights, None without; fills in the options whose default depends on them."""
    if args.weights is None:
        args.model, args.saliency = args.model or "resnet20", args.saliency or "random"
        return None
    if args.structure == NARROW:
        raise ValueError("train: --structure narrow has fewer channels than the network of --weights; leave one out")
    named = network_of(args.weights)
    if named is not None and args.model not in (None, named):
        raise ValueError(f"train: --weights {args.weights} are of {named}, and --model is {args.model}; leave it out")
    args.model, args.saliency = args.model or named or "resnet20", args.saliency or "magnitude"
    if args.lr is None:
        args.lr = RATES[args.optimizer][0] / 10
    return pretrained(args.weights)


def _said(args: argparse.Namespace, weights: dict[str, Tensor] | None) -> dict[str, Any]:
    """Facts of a training that most trainings do not have."""
    said: dict[str, Any] = {}
    if weights is not None:
        checksum = 0
        for name in sorted(weights):
            checksum = zlib.crc32(plain_bytes(weights[name]), zlib.crc32(name.encode(), checksum))
        said["weights"] = checksum
    if args.min_density:
        said["min_density"] = args.min_density
    if args.layer_sparsity:
        said["layer_sparsity"] = dict(args.layer_sparsity)
    return said


def _evolve_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the method that changes masks; one that the method does not have is refused."""
    if args.initial_sparsity is None:
        args.initial_sparsity = 0.0
    elif args.evolve not in (prunes := _taking("sparsity")):
        raise ValueError(
            f"train: --initial-sparsity is where --evolve {', '.join(prunes)} starts; --evolve is {args.evolve}"
        )
    method = METHODS[args.evolve]
    ours = {name: getattr(args, name) for name in ("seed", "sparsity") if name in method.options()}
    given = {field.name: value for field in _fields() if (value := getattr(args, field.name)) is not None}
    given |= dict(args.evolve_option)
    if reason := method.refuses_options(given):
        raise ValueError(f"train: --evolve {args.evolve}: {reason}")
    return ours | given


def _fields() -> list[dataclasses.Field]:
    """The options of methods that are options of the command, too: those that several methods share."""
    return [field for shared in SHARED for field in dataclasses.fields(shared)]


def _taking(option: str) -> list[str]:
    """The methods that have this option."""
    return [name for name, method in METHODS.items() if option in method.options()]


def _structure_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of --option, checked against the options of the structure."""
    options = dict(args.option)
    if args.structure == DENSE:
        if options:
            raise ValueError(f"train: --option {', '.join(options)}: --structure dense has no options; leave them out")
        return {}
    name = "hrbp++" if args.structure == NARROW else args.structure
    if "method" in options:  # sparsify() has one of its own, which --evolve decides
        raise ValueError("train: --option method: it is rule here (rule=paper); --evolve is the method of the training")
    try:
        structure_for(None, name, options)
    except TypeError as error:
        raise ValueError(f"train: --option: {error}") from error
    return options


def _network(
    args: argparse.Namespace, images: ImageSet, options: dict[str, Any], weights: dict[str, Tensor] | None
) -> tuple[nn.Module, str | None]:
    """The network, sparse unless it is to be dense; and what --weights did not give it, in a sentence."""
    shape = {"classes": len(images.classes), "image_size": images.shape[1], "channels": images.shape[0]}
    torch.manual_seed(args.seed)
    model = build(args.model, width=args.width, **shape)
    fresh = None if weights is None else start_from(model, weights, args.weights)
    if args.structure == DENSE:
        if args.min_density or args.layer_sparsity:
            raise ValueError("train: --min-density and --layer-sparsity are of sparse layers; --structure is dense")
        return model, fresh
    options = dict(options)
    if args.saliency in ("snip", "grasp", "synflow", "magnitude+gradient"):
        options["batch"] = next(iter(Batches(images, args.batch_size, train=True, seed=args.seed).epoch()))
    structure = "hrbp++" if args.structure == NARROW else args.structure
    sparsity = args.initial_sparsity if "sparsity" in METHODS[args.evolve].options() else args.sparsity
    method = args.evolve if METHODS[args.evolve].dense_weights else None
    sparsify(
        model, sparsity, structure=structure, method=method, distribution=args.distribution, saliency=args.saliency,
        min_density=args.min_density, per_layer=dict(args.layer_sparsity), seed=args.seed, **options,
    )  # fmt: skip
    if args.structure == NARROW:
        torch.manual_seed(args.seed)
        return narrow(args.model, summary(model).parameters, **shape), None
    return model, fresh


def _layer_sparsity(text: str) -> tuple[str, float]:
    name, found, value = text.rpartition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=SPARSITY")
    return name, parsing.number(0, 1, "[0, 1)")(value)


def _option(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (MemoryError, RecursionError, SyntaxError, ValueError):  # a plain word
        return name, value
