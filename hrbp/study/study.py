"""Which structure keeps how much accuracy, at what memory and time: many trainings, one table, one figure."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.batches import Batches
from ..data.loading import load
from ..data.sets import ImageSet
from ..files import only_writer
from ..layers.view import sparse_layers
from ..methods.evolver import Evolver
from ..methods.registry import METHODS
from ..models import build, narrow, parameter_count
from ..progress import Progress, duration
from ..reports.model_report import report_model
from ..reports.model_summary import summary
from ..reports.picture import draw_study
from ..surgery.conversion import sparsify
from ..training.devices import the_device
from ..training.settings import Settings
from ..training.trainer import Trainer
from . import runner
from .study_table import line_name, rows, table
from .variants import QUICK, RIVALS, Variant

ROUNDS = 15  # in which every network takes one timed step after the other
IMAGES_PER_CLASS = 10  # that gradients of saliencies are of; GraSP's
TEST_BATCH = 500
FIGURE = "study.png"
MAY_GROW = ("variants", "sparsities", "seeds", "trainings")  # of the settings, when a study is continued
NUMBERS, ENDED = ("sparsity", "parameters", "storage"), ("accuracy", "seconds", "step_seconds", "memory")  # of a result


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
        taken = {name for variant in variants for name in METHODS[variant.method].options()}
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
        self.left_out = {line_name(*line): reason for line, reason in why if reason is not None}
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
            if {"dense", *(line_name(v.layout, s) for v, s in self.lines)} <= steps.keys():
                self.results["steps"] = steps

    def _impossible(self, variant: Variant, sparsity: float) -> str | None:
        """Why this cannot be trained, found by making its trainer once; None: it can, or has been."""
        if any((self._folder(variant, sparsity, seed) / runner.RESULT).exists() for seed in self.seeds):
            return None
        drawn = replace(variant, saliency="random")
        try:
            with torch.random.fork_rng():
                if _prunes(variant):  # which starts elsewhere
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
            head = f"[{at}/{len(self.runs)}, {left} left] {line_name(variant, sparsity)} seed {seed}"
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
        return self.results["steps"][line_name(variant.layout, sparsity)] * self.total_steps

    # ------------------------------------------------------------ one training

    def _folder(self, variant: Variant, sparsity: float, seed: int) -> Path:
        name = re.sub(r"[^\w.+=-]+", "-", f"{line_name(variant, sparsity)} seed {seed}")
        return self.out / name

    def _identity(self, variant: Variant, sparsity: float, seed: int) -> dict[str, Any]:
        sparsity = 0.0 if variant.structure == "dense" else sparsity
        return {"line": line_name(variant, sparsity), **asdict(variant), "asked": sparsity, "seed": seed}

    def _trainer(self, variant: Variant, sparsity: float, seed: int, **more: Any) -> Trainer:
        """Of one training; more: where it writes."""
        method = METHODS[variant.method]
        options: dict[str, Any] = {} if method.by_epoch and self.every_by_default else {"every": self.every}
        options |= {"seed": seed, **self.training.evolve_options}
        options = {name: value for name, value in options.items() if name in method.options()}
        if _prunes(variant):
            options["sparsity"] = sparsity
        settings = Settings(**{**asdict(self.training), "evolve": variant.method, "evolve_options": options})
        return Trainer(
            self._network(variant, 0.0 if _prunes(variant) else sparsity, seed),
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
            "masked": any(layer.blocksize is None for layer in sparse_layers(made).values()),
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
        method = variant.method if METHODS[variant.method].dense_weights else None
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
        layouts = {line_name(v.layout, s): (v.layout, s) for v, s in [(Variant("dense"), 0.0), *self.lines]}
        steps = {name: self._step(variant, sparsity, x, y) for name, (variant, sparsity) in layouts.items()}
        self.results["steps"] = runner.in_turns(steps, ROUNDS)

    def _step(self, variant: Variant, sparsity: float, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
        """A function that takes one step on a batch and returns its seconds."""
        settings = self.training
        form = torch.channels_last if settings.channels_last else torch.contiguous_format
        model = self._network(variant, sparsity, 0).to(self.device, memory_format=form)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, settings.momentum)
        evolver, method = None, METHODS[variant.method]
        if method.begins_dense:  # at its final sparsity
            evolver = Evolver(model, optimizer, variant.method, total_steps=1, every=1)
            evolver.step()
        elif method.changes:  # what it does at every step counts; masks are looked at too rarely to
            evolver = Evolver(model, optimizer, variant.method, total_steps=1, every=sys.maxsize)

        def step() -> None:
            with settings.autocast(self.device):
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


def _prunes(variant: Variant) -> bool:
    """Whether its method prunes to a sparsity, from a lower one."""
    return "sparsity" in METHODS[variant.method].options()
