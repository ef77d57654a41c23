"""Which structure keeps how much accuracy, at what memory and time: many trainings, one table, one figure."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data import Batches, ImageSet, load
from ..files import only_writer
from ..methods.evolver import Evolver
from ..methods.options import OPTIONS
from ..models import build, narrow, parameter_count
from ..reports.mask_report import columns, report_model
from ..reports.model_summary import summary
from ..reports.picture import draw_study
from ..structures.registry import Grains, Groups
from ..surgery.conversion import METHODS as MASTER_METHODS
from ..surgery.conversion import method_refuses, sparse_layers, sparsify, structure_for
from ..training.progress import Progress, duration
from ..training.trainer import Settings, Trainer, the_device
from . import runner

ROUNDS = 15  # in which every network takes one timed step after the other
IMAGES_PER_CLASS = 10  # that gradients of saliencies are of; GraSP's
TEST_BATCH = 500
FIGURE = "study.png"
RIVALS = ("dense", "narrow")
MAY_GROW = ("variants", "sparsities", "seeds", "trainings")  # of the settings, when a study is continued
NUMBERS, ENDED = ("sparsity", "parameters", "storage"), ("accuracy", "seconds", "step_seconds", "memory")  # of a result


# ---------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Variant:
    """One way to train; with a sparsity it is a line of the table.

    structure     "dense"; "narrow": dense and as thin as it takes to have as many parameters as the sparse networks;
                  else as in `sparsify`
    method        how the mask changes, as in `Evolver`
    saliency      what chooses the first mask
    distribution  of the layers' densities
    options       of the structure
    """

    structure: str
    method: str = "static"
    saliency: str = "random"
    distribution: str = "erk"
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What differs from the ordinary, such as "hrbp++ rigl"."""
        named = [f"{key}={Fraction(value).limit_denominator(99)}" for key, value in self.options.items()]
        ways = [way for way in (self.saliency, self.method) if way not in ("random", "static")]
        return " ".join([self.structure, *named, *ways])

    @property
    def layout(self) -> Variant:
        """The same without changes of the mask, which a step takes as long as; with those that every step makes."""
        method = self.method if self.method in MASTER_METHODS else "static"
        return Variant(self.structure, method, self.saliency, self.distribution, self.options)

    def refuses(self) -> str | None:
        """Why these do not go together, or None."""
        if self.structure in ("dense", "narrow"):
            return None if self.method == "static" else "it has no mask"
        rule = structure_for(self.method, self.structure, self.options)
        if self.method == "hrbp" and not isinstance(rule, Groups):
            return "it has no groups"
        if self.method in MASTER_METHODS:
            reason = method_refuses(self.method, rule)
            return reason and f"{self.method!r} {reason}"
        if self.method != "static" and not isinstance(rule, Grains | Groups):
            return "its masks do not change"
        return None


QUICK = tuple(Variant(name) for name in ("dense", "narrow", "unstructured", "hrbp++", "hrbp", "channel"))

TABLE_1 = (
    Variant("dense"),
    Variant("narrow"),
    Variant("unstructured"),
    Variant("channel"),
    Variant("unstructured", saliency="snip", distribution="global"),
    Variant("unstructured", saliency="grasp", distribution="global"),
    Variant("unstructured", "set"),
    Variant("unstructured", "rigl"),
    Variant("elementwise"),
    Variant("hrbp++"),
    Variant("hrbp++", "hrbp"),
)
ABLATION = tuple(Variant("hrbp++", options={"tap_density": taps / 9}) for taps in (1, 3, 5, 7, 9))

# Ma et al., HRBP (CPAL 2024), Table 1 and the ablation over s. Its HRBP has 4 of 9 taps: "hrbp++" here.
# (model, data) -> variant -> sparsity -> accuracy in %, and the speed-up of training on an A100 where there is one.
_Published = dict[str, dict[float, tuple[float, float | None]]]


def _table_1(dense: float, *pairs: tuple[float, float]) -> _Published:
    names = [variant.name for variant in TABLE_1[2:]]
    sparse: _Published = {name: {0.9: (a, None), 0.95: (b, None)} for name, (a, b) in zip(names, pairs, strict=True)}
    return {"dense": {0.0: (dense, None)}, **sparse}


PUBLISHED: dict[tuple[str, str], _Published] = {
    ("resnet32", "cifar10"): _table_1(
        94.80, (92.81, 91.38), (90.27, 87.19), (92.59, 91.01), (92.38, 91.39), (92.30, 90.76), (92.84, 92.02),
        (91.63, 90.77), (92.30, 90.84), (92.72, 91.25),
    ),
    ("resnet32", "cifar100"): _table_1(
        74.64, (69.48, 67.03), (62.71, 56.33), (68.89, 65.22), (69.24, 66.50), (69.66, 67.41), (70.98, 68.50),
        (66.97, 64.35), (69.22, 65.94), (69.51, 66.41),
    ),
    ("vgg19", "cifar10"): _table_1(
        94.23, (92.91, 91.91), (90.84, 87.12), (93.63, 93.43), (93.30, 93.04), (92.46, 91.73), (93.15, 92.30),
        (92.81, 91.86), (92.88, 91.66), (93.07, 91.79),
    ),
    ("vgg19", "cifar100"): _table_1(
        74.16, (70.39, 68.63), (59.61, 49.31), (72.84, 71.83), (71.95, 71.23), (72.36, 69.81), (71.63, 69.13),
        (70.52, 68.60), (70.25, 67.89), (70.49, 68.04),
    ),
}  # fmt: skip
for _pair, _name, _speeds in (
    (("resnet32", "cifar10"), "elementwise", (1.1, 1.2)), (("resnet32", "cifar10"), "hrbp++", (1.4, 1.6)),
    (("vgg19", "cifar10"), "elementwise", (1.2, 1.2)), (("vgg19", "cifar10"), "hrbp++", (1.4, 1.9)),
):  # fmt: skip
    for _sparsity, _speed in zip((0.9, 0.95), _speeds, strict=True):
        PUBLISHED[_pair][_name][_sparsity] = PUBLISHED[_pair][_name][_sparsity][0], _speed
for _variant, _accuracies in zip(
    ABLATION, ({0.9: 92.65, 0.95: 91.3}, {0.9: 92.2}, {0.9: 92.3}, {0.9: 92.3}, {0.9: 91.8, 0.95: 89.8}), strict=True
):
    PUBLISHED["resnet32", "cifar10"][_variant.name] = {s: (a, None) for s, a in _accuracies.items()}


@dataclass(frozen=True)
class Preset:
    """What a study does where nothing else is said."""

    models: Sequence[str]
    width: Mapping[str, float]
    data: Sequence[str]
    variants: Sequence[Variant]
    sparsities: Sequence[float]
    seeds: Sequence[int]
    batch_size: int
    training: Mapping[str, Any]


PRESETS = {
    "quick": Preset(
        ("resnet8",), {}, ("shapes",), QUICK, (0.9, 0.95), (0, 1), 64, {"epochs": 6, "lr": 0.1, "warmup": 0.5}
    ),
    "paper": Preset(
        ("resnet32", "vgg19"), {"resnet32": 2.0}, ("cifar10", "cifar100"), TABLE_1, (0.9, 0.95), (0, 1, 2), 128,
        {"epochs": 160, "lr": 0.1, "schedule": "step", "milestones": (0.5, 0.75), "gamma": 0.1},
    ),
}  # fmt: skip


# ---------------------------------------------------------------- running it


class Study:
    """Trains every variant at every sparsity with every seed; made and run again, it continues where it was stopped.

        results = Study("runs/study", epochs=6).run()
        print(table(results))

    What cannot be trained (a structure at a sparsity that it has not, or in that network) is left out with its reason;
    the rest is trained. The study in a folder may be continued with more variants, sparsities and seeds.

    In the folder `out`: results.json and table.csv, written anew after every training, study.png, after every seed, and
    a folder for each training with its log, its checkpoints and, once it is finished, result.json.

    Step times are measured first: all networks take one step after the other, over and over, so that whatever else the
    machine does meets all of them alike. They are those of steps that do not change masks, at the final sparsity.

    Args:
        out: folder; a new one, or that of the same study.
        variants: what to compare. "dense" is trained once a seed.
        model, width: as in `models.build`.
        images: sets to train and to test with, or a name for `data.load`.
        sparsities: of the layers made sparse.
        seeds: of weights, masks, order and augmentation of the images.
        batch_size: images of a step.
        every: steps between changes of masks; default: 100, in short trainings a fortieth of them; of "subp" an
            epoch, or less where these would be fewer than twenty.
        device: default: the GPU if there is one.
        quiet: print nothing.
        **training: see `Settings`; epochs is needed.

    Raises:
        ValueError: options that do not fit, or a folder with another study or with something else.
        FileNotFoundError: no CIFAR at `root`; the message says what to put there.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        variants: Sequence[Variant] = QUICK,
        *,
        model: str = "resnet8",
        width: float = 1.0,
        images: tuple[ImageSet, ImageSet] | str = "shapes",
        sparsities: Sequence[float] = (0.9, 0.95),
        seeds: Sequence[int] = (0, 1),
        batch_size: int = 64,
        every: int | None = None,
        device: torch.device | str | None = None,
        quiet: bool = False,
        **training: Any,
    ) -> None:
        who = "Study()"
        for name, values in (("variants", [v.name for v in variants]), ("sparsities", sparsities), ("seeds", seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{who}: {name} is {list(values)}; it needs one or more, each once")
        if any(not 0 < sparsity < 1 for sparsity in sparsities):
            raise ValueError(f"{who}: sparsities is {list(sparsities)}; they need to be between 0 and 1")
        if every is not None and every < 1:
            raise ValueError(f"{who}: every is {every}; it needs an integer >= 1")
        for variant in variants:
            if reason := variant.refuses():
                raise ValueError(f"{who}: {variant.name!r} cannot be trained: {reason}; leave it out")
        self.device = the_device(device)
        self.out, self.model, self.width, self.batch_size = Path(out), model, width, batch_size
        if isinstance(images, str):
            images = load(images, "train"), load(images, "test")
        self.train, self.test = images
        shape = self.train.shape
        self.shape = {"classes": len(self.train.classes), "image_size": shape[1], "channels": shape[0]}
        self.training = Settings(**training)
        taken = {name for variant in variants for name in OPTIONS[variant.method]}
        if unknown := sorted(set(self.training.evolve_options) - taken):
            raise ValueError(f"{who}: evolve_options has {', '.join(unknown)}, which no method of the variants takes")
        self.total_steps = self.training.epochs * (len(self.train) // batch_size)
        self.every = max(1, min(100, self.total_steps // 40)) if every is None else every
        self.every_by_default = every is None
        self.say, self.seeds = Progress(quiet), list(seeds)
        asked = [
            (variant, sparsity)
            for sparsity in sparsities
            for variant in variants
            if variant.structure != "dense" or sparsity == sparsities[0]
        ]
        why = [(line, self._impossible(*line)) for line in asked]
        self.lines = [line for line, reason in why if reason is None]
        self.left_out = {_line_name(*line): reason for line, reason in why if reason is not None}
        sparse = [line[0].structure not in RIVALS for line in self.lines]
        if not self.lines or (not any(sparse) and any(v.structure not in RIVALS for v in variants)):
            reasons = [f"{name}: {reason}" for name, reason in self.left_out.items()]
            more = f"; and {len(reasons) - 2} more" if len(reasons) > 2 else ""
            raise ValueError(f"{who}: none of this can be trained: {'; '.join(reasons[:2])}{more}")
        self.runs = [(variant, sparsity, seed) for seed in seeds for variant, sparsity in self.lines]
        with torch.device("meta"):
            dense = build(model, width=width, **self.shape)  # type: ignore[arg-type]
        settings = {
            "model": model, "width": width, "data": self.train.name, "images": [len(self.train), len(self.test)],
            "labels": zlib.crc32(self.train.labels.cpu().numpy().tobytes()),
            "shape": shape, "dense_parameters": parameter_count(dense), "variants": [asdict(v) for v in variants],
            "sparsities": sparsities, "seeds": self.seeds, "batch_size": batch_size, "every": self.every,
            "training": asdict(self.training), "trainings": len(self.runs),
        }  # fmt: skip
        self.results: dict[str, Any] = json.loads(json.dumps({"settings": settings}))
        self.results.update(
            machine=runner.machine(self.device), steps={}, runs=[], stopped=None, left_out=self.left_out
        )
        self._take_up()

    def _take_up(self) -> None:
        """Take over what was measured in the folder; any other content than that of this study is refused."""
        folders = [self._folder(*run) for run in self.runs]
        before = runner.take_up(self.out, self.results["settings"], "Study()", folders, MAY_GROW)
        if before.get("machine") == self.results["machine"]:
            steps = runner.read_seconds(before, "steps", self.out)
            if {"dense", *(_line_name(v.layout, s) for v, s in self.lines)} <= steps.keys():
                self.results["steps"] = steps

    def _impossible(self, variant: Variant, sparsity: float) -> str | None:
        """Why this cannot be trained, found by making its trainer once; None: it can, or has been."""
        if any((self._folder(variant, sparsity, seed) / runner.RESULT).exists() for seed in self.seeds):
            return None
        drawn = replace(variant, saliency="random")
        try:
            with torch.random.fork_rng():
                if variant.method == "gmp":  # which starts elsewhere
                    self._network(drawn.layout, sparsity, self.seeds[0])
                self._trainer(drawn, sparsity, self.seeds[0])
        except ValueError as error:
            return " ".join(str(error).split())
        return None

    def run(self) -> dict[str, Any]:
        """Train what is not finished, to the end or until SIGINT or SIGTERM.

        Returns:
            What results.json holds: "settings", "machine", "steps" (seconds of a step by line of the table), "runs"
            (one dict a training) and "stopped" (the signal that stopped it, else None).
        """
        with only_writer(self.out, "Study()"):
            self._take_up()
            for line, reason in self.left_out.items():
                self.say.say(f"left out: {line}, as {reason}")
            return self._run()

    def _run(self) -> dict[str, Any]:
        found = [
            (run, runner.read_result(self._folder(*run), self._identity(*run), NUMBERS, ENDED)) for run in self.runs
        ]
        self.results["runs"] = [result for _, result in found if result is not None]
        self._write()
        if not self.results["steps"]:
            self._measure()
            self._write()
        todo = [run for run, result in found if result is None]
        begin, done, scale = time.monotonic(), 0.0, 1.0
        for i, (variant, sparsity, seed) in enumerate(todo):
            left = duration(scale * sum(self._expected(v, s) for v, s, _ in todo[i:]))
            at = len(self.runs) - len(todo) + i + 1
            head = f"[{at}/{len(self.runs)}, {left} left] {_line_name(variant, sparsity)} seed {seed}"
            result = self._train(variant, sparsity, seed, head)
            if isinstance(result, str):
                self.results["stopped"] = result
                break
            self.results["runs"].append(result)
            self._write()
            done += self._expected(variant, sparsity)
            scale = (time.monotonic() - begin) / done  # trainings test and write, too
            what = "diverged" if result["accuracy"] is None else f"{result['accuracy']:.2%}"
            self.say.say(f"{head}: {what} in {duration(result['seconds'])}")
            if i + 1 < len(todo) and todo[i + 1][2] != seed:
                self.say.say(f"\n{table(self.results)}\n")
                self._draw()
        self._write()
        self._draw()
        return self.results

    def _expected(self, variant: Variant, sparsity: float) -> float:
        return self.results["steps"][_line_name(variant.layout, sparsity)] * self.total_steps

    # ------------------------------------------------------------ one training

    def _folder(self, variant: Variant, sparsity: float, seed: int) -> Path:
        name = re.sub(r"[^\w.+=-]+", "-", f"{_line_name(variant, sparsity)} seed {seed}")
        return self.out / name

    def _identity(self, variant: Variant, sparsity: float, seed: int) -> dict[str, Any]:
        sparsity = 0.0 if variant.structure == "dense" else sparsity
        return {"line": _line_name(variant, sparsity), **asdict(variant), "asked": sparsity, "seed": seed}

    def _trainer(self, variant: Variant, sparsity: float, seed: int, **more: Any) -> Trainer:
        """Of one training; more: where it writes."""
        options: dict[str, Any] = {}
        if variant.method != "static":
            options = {} if variant.method == "subp" and self.every_by_default else {"every": self.every}
            options |= {"seed": seed, **self.training.evolve_options}
            options = {name: value for name, value in options.items() if name in OPTIONS[variant.method]}
            if variant.method == "gmp":
                options["sparsity"] = sparsity
        settings = Settings(**{**asdict(self.training), "evolve": variant.method, "evolve_options": options})
        return Trainer(
            self._network(variant, 0.0 if variant.method == "gmp" else sparsity, seed),
            Batches(self.train, self.batch_size, train=True, seed=seed, device=self.device),
            Batches(self.test, TEST_BATCH, train=False, device=self.device),
            settings, quiet=True, **more,
        )  # fmt: skip

    def _train(self, variant: Variant, sparsity: float, seed: int, head: str) -> dict[str, Any] | str:
        """What the table needs of a training, or the signal that stopped it."""
        folder, identity = self._folder(variant, sparsity, seed), self._identity(variant, sparsity, seed)
        trainer = self._trainer(variant, sparsity, seed, out=folder, resume=True, config=identity)
        trainer.progress = runner.RunningLine(self.say, head)
        ended = runner.finish(trainer)
        if isinstance(ended, str):
            return ended
        made, last = ended
        held = summary(made)
        stored = [report.storage for report in report_model(made).values()]
        finished = {
            **identity, **last, "sparsity": held.sparsity, "parameters": held.parameters,
            "storage": sum(s.values + s.file_index for s in stored),
            "masked": any(not layer.runs_blocks for layer in sparse_layers(made).values()),
        }  # fmt: skip
        runner.write_json(folder / runner.RESULT, finished)
        return finished

    def _network(self, variant: Variant, sparsity: float, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = build(self.model, width=self.width, **self.shape)  # type: ignore[arg-type]
        if variant.structure == "dense":
            return model
        if variant.structure == "narrow":
            sparsify(model, sparsity, structure="unstructured", seed=seed)
            torch.manual_seed(seed)
            return narrow(self.model, summary(model).parameters, **self.shape)
        options: dict[str, Any] = dict(variant.options)
        if variant.saliency not in ("random", "magnitude"):
            count = math.ceil(IMAGES_PER_CLASS * len(self.train.classes) / self.batch_size)
            options["batch"] = list(islice(Batches(self.train, self.batch_size, train=True, seed=seed).epoch(), count))
        method = variant.method if variant.method in MASTER_METHODS else None
        return sparsify(
            model, sparsity, structure=variant.structure, method=method, distribution=variant.distribution,
            saliency=variant.saliency, seed=seed, **options,
        )  # fmt: skip

    # ------------------------------------------------------------ step times

    def _measure(self) -> None:
        """Median seconds of a step of every network, from rounds in which each takes one."""
        self.say.say(f"measuring steps of {len(self.lines)} networks on {self.results['machine']}")
        batches = Batches(self.train, self.batch_size, train=True, device=self.device)
        x, y = next(iter(batches.epoch()))
        layouts = {_line_name(v.layout, s): (v.layout, s) for v, s in [(Variant("dense"), 0.0), *self.lines]}
        steps = {name: self._step(variant, sparsity, x, y) for name, (variant, sparsity) in layouts.items()}
        self.results["steps"] = runner.in_turns(steps, ROUNDS)

    def _step(self, variant: Variant, sparsity: float, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
        """A function that takes one step on a batch and returns its seconds."""
        settings = self.training
        form = torch.channels_last if settings.channels_last else torch.contiguous_format
        model = self._network(variant, sparsity, 0).to(self.device, memory_format=form)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, settings.momentum)
        evolver = None
        if variant.method == "subp":  # at its final sparsity
            evolver = Evolver(model, optimizer, variant.method, total_steps=1, every=1)
            evolver.step()
        elif variant.method != "static":  # what it does at every step counts; masks are looked at too rarely to
            evolver = Evolver(model, optimizer, variant.method, total_steps=1, every=sys.maxsize)
        amp = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.amp]

        def step() -> None:
            with torch.autocast(self.device.type, amp, enabled=amp is not None):
                logits = model(x.to(memory_format=form))
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            if evolver is not None:
                evolver.step()
            optimizer.zero_grad(set_to_none=True)

        return partial(runner.timed, self.device, step)

    def _write(self) -> None:
        runner.write_results(self.out, self.results, rows(self.results))

    def _draw(self) -> None:
        try:
            draw_study(self.out / FIGURE, rows(self.results), self.results["settings"], self.results["machine"])
        except ValueError as error:
            self.say.say(f"no figure: {error}")


def _line_name(variant: Variant, sparsity: float) -> str:
    return variant.name if variant.structure == "dense" else f"{variant.name} {100 * sparsity:g}%"


# ---------------------------------------------------------------- what it came to


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table, from what results.json holds; None where nothing is known.

    line, structure, asked        variant and sparsity, as asked for
    accuracy, deviation           mean and sample deviation over seeds, as shares
    seeds, diverged               trainings that came to an end; those whose loss did not stay finite
    kept                          accuracy / that of the dense network
    parameters                    weights that are not masked away
    sparsity, model_sparsity      of the layers made sparse; of the whole network, relative to the dense one
    memory                        bytes of weights, index, gradients and optimizer state
    storage                       bytes of convolutions and linear layers in a file: values and their BSR index
    step_seconds, step            of training, measured; relative to the dense network
    published, published_speedup  accuracy in the HRBP paper, as a share; training there, faster than dense
    """
    settings = results["settings"]
    published = _published(settings)
    steps, found = results["steps"], []
    lines: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(results["runs"], key=lambda run: run["asked"]):
        lines.setdefault(run["line"], []).append(run)
    order = {Variant(**v).name: i for i, v in enumerate(settings["variants"])}
    dense = runner.mean([r["accuracy"] for r in lines.get("dense", []) if r["accuracy"] is not None])
    for line, runs in lines.items():
        variant = Variant(**{key: runs[0][key] for key in Variant.__dataclass_fields__})
        asked = runs[0]["asked"]
        ended = [run for run in runs if run["accuracy"] is not None]
        right = [run["accuracy"] for run in ended]
        accuracy, parameters = runner.mean(right), round(statistics.mean(run["parameters"] for run in runs))
        memory = runner.mean([run["memory"] for run in ended])
        seconds = steps.get(_line_name(variant.layout, asked))
        paper, speedup = published.get(variant.name, {}).get(asked, (None, None))
        found.append({
            "line": line, "structure": variant.name, "asked": asked, "accuracy": accuracy,
            "deviation": runner.deviation(right), "seeds": len(ended), "diverged": len(runs) - len(ended),
            "kept": accuracy / dense if accuracy is not None and dense else None,
            "parameters": parameters, "sparsity": statistics.mean(run["sparsity"] for run in runs),
            "model_sparsity": 1 - parameters / settings["dense_parameters"],
            "memory": None if memory is None else round(memory),
            "storage": round(statistics.mean(run["storage"] for run in runs)),
            "step_seconds": seconds, "step": seconds / steps["dense"] if seconds else None,
            "published": None if paper is None else paper / 100, "published_speedup": speedup,
        })  # fmt: skip
    return sorted(found, key=lambda row: (row["asked"], order[row["structure"]]))


def _published(settings: Mapping[str, Any]) -> _Published:
    """What the paper says of this study; nothing if it trains otherwise."""
    paper = PRESETS["paper"]
    same = {name: list(v) if isinstance(v, tuple) else v for name, v in paper.training.items()}
    model = settings["model"]
    if settings["width"] != paper.width.get(model, 1.0) or settings["batch_size"] != paper.batch_size:
        return {}
    if any(settings["training"][name] != value for name, value in same.items()):
        return {}
    return PUBLISHED.get((model, settings["data"]), {})


def table(results: Mapping[str, Any]) -> str:
    """The table, what it says in a sentence for each sparsity, and what must be known to read it."""
    found = rows(results)
    if not found:
        return "no training is finished yet"
    papers, seeds = any(row["published"] is not None for row in found), len(results["settings"]["seeds"])
    head = ["", "sparsity %", "accuracy %", "seeds", "of dense %", "parameters", "whole net %", "training MB", "step",
            "stored kB"]  # fmt: skip
    lines = [head + ["paper %"] * papers]

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:{form}}"

    for row in found:
        spread = "" if row["deviation"] is None else f" +- {100 * row['deviation']:4.2f}"
        line = [
            row["structure"], _shown_sparsity(row),
            "diverged" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}",
            f"{row['seeds']}", cell(row["kept"], ".1f", 100), f"{row['parameters']:,}",
            f"{100 * row['model_sparsity']:.2f}", cell(row["memory"], ".3f", 1e-6),
            "-" if row["step"] is None else f"{row['step']:.2f}x", f"{row['storage'] / 1e3:.1f}",
        ]  # fmt: skip
        if papers:
            faster = f" ({row['published_speedup']}x)" if row["published_speedup"] else ""
            line.append(cell(row["published"], ".2f", 100) + faster)
        lines.append(line)
    settings = results["settings"]
    title = (
        f"{settings['model']} x {settings['width']:g}, {settings['data']}, {settings['training']['epochs']} epochs,"
        f" {seeds} seed{'s' if seeds > 1 else ''}; {len(results['runs'])} of"
        f" {settings['trainings']} trainings are finished"
    )
    return "\n".join([title, "", columns(lines), "", *_notes(results, found, papers), "", *sentences(found)])


def _shown_sparsity(row: Mapping[str, Any]) -> str:
    if row["asked"] == 0:
        return "0"
    return f"as {100 * row['asked']:g}" if row["structure"] == "narrow" else f"{100 * row['sparsity']:.2f}"


def _notes(results: Mapping[str, Any], found: Sequence[Mapping[str, Any]], papers: bool) -> list[str]:
    notes = []
    if (dense := results["steps"].get("dense")) is not None:
        notes.append(
            f"step: time of a training step on {results['machine']} relative to dense ({1e3 * dense:.3g} ms for"
            f" {results['settings']['batch_size']} images), measured in turns; under 1 is faster"
        )
        slow = dict.fromkeys(row["structure"] for row in found if row["step"] and row["step"] > 1.05)
        if slow:
            notes.append(f"slower than dense here: {', '.join(slow)}")
    notes.append("training MB: weights, index, gradients and optimizer state; stored kB: layers in a file, with index")
    if masked := dict.fromkeys(run["structure"] for run in results["runs"] if run.get("masked")):
        notes.append(f"{', '.join(masked)}: a dense weight under a mask, with a dense layer's memory and time")
    methods = {Variant(**v).name: v["method"] for v in results["settings"]["variants"]}
    if trained := [
        name for name in dict.fromkeys(row["structure"] for row in found) if methods[name] in MASTER_METHODS
    ]:
        notes.append(
            f"{', '.join(trained)}: trains a dense weight, with a dense layer's memory; stored is what computes"
        )
    if any(row["structure"] == "narrow" for row in found):
        notes.append("narrow: a dense network of as many parameters as the sparse ones")
    notes += [f"left out: {line}, as {reason}" for line, reason in results.get("left_out", {}).items()]
    if papers:
        notes.append("paper: HRBP (CPAL 2024), Table 1; in brackets, training on an A100 against dense")
    return notes


def sentences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each structure keeps, best first: one sentence for each sparsity, computed from the rows."""
    ended = [row for row in found if row["accuracy"] is not None]
    dense = next((row for row in ended if row["structure"] == "dense"), None)
    said = []
    for asked in sorted({row["asked"] for row in ended} - {0.0}):
        here = sorted((row for row in ended if row["asked"] == asked), key=lambda row: -row["accuracy"])
        if dense is None:
            start = f"At {100 * asked:g}% sparsity the accuracy is "
            parts = [f"{100 * row['accuracy']:.1f}% with {row['structure']}" for row in here]
        else:
            start = f"At {100 * asked:g}% sparsity, of the dense network's {100 * dense['accuracy']:.1f}% accuracy, "
            parts = [
                f"{row['structure']} keeps {100 * row['kept']:.1f}% ({100 * row['accuracy']:.1f}%)" for row in here
            ]
            parts[1:] = [part.replace(" keeps", "", 1) for part in parts[1:]]
        listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        said.append(f"{start}{listed}; {runner.doubt(here)}.")
    return said
