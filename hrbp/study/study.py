"""Accuracy, memory and time of many structures and methods: many trainings, one table, one figure."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..columns import counted
from ..data.batches import Batches
from ..data.sets import ImageSet
from ..files import only_writer
from ..layers.view import sparse_layers
from ..methods.evolver import Evolver
from ..methods.registry import METHODS
from ..models import build, narrow, parameter_count
from ..progress import duration
from ..reports.model_report import report_model
from ..reports.model_summary import summary
from ..reports.study_picture import draw_study
from ..surgery.conversion import sparsify
from ..training.fused import as_called
from ..training.settings import Settings
from ..training.trainer import Trainer
from .folder import RESULT, RESULTS, is_number, read
from .jobs import trained_side_by_side
from .runner import Line, Run, Runner, recorded
from .study_table import BOUNDS, line_name, rows, step_times, table, update_name
from .timing import interleaved, timed
from .variants import PRUNES, QUICK, Variant

ROUNDS = 31  # of the interleaved timing
PACE_ROUNDS = 6  # of dense steps on all threads and on a share
FORWARD = 0.4  # of the time of a step, to test as many images: for the time that is left
IMAGES_PER_CLASS = 10  # for the gradients of saliencies, as in GraSP


class Study(Runner):
    """Trains every variant at every sparsity with every seed; run again, it continues where it was stopped.

        results = Study("runs/study", epochs=6).run()
        print(table(results))

    A variant that cannot be trained (a structure that does not have that sparsity, or does not fit the network) is left
    out, with the reason. The study in a folder may be continued with more variants, sparsities and seeds.

    The folder `out` holds results.json and table.csv, rewritten after every training, study.png, redrawn after every
    seed, and a folder for each training with its log, its checkpoints and, when it is finished, result.json.

    Step times are measured first, interleaved: all networks take one step in turn, over many rounds, so that other load
    on the machine affects all of them alike. They are of steps at the final sparsity; steps that change masks are
    measured apart. `measure` does this and nothing else.

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
        retime: measure step times anew, also where they are known.
        jobs: trainings at a time, on a CPU: processes that share out its threads, which is faster for small networks.
        **training: see `Settings`; epochs is needed.

    Raises:
        ValueError: options that do not fit, or a folder with another study or with something else.
        FileNotFoundError: no CIFAR at `root`; the message says what to put there.
    """

    who, figure, times = "Study()", "study.png", "steps"
    may_grow = "variants", "sparsities", "seeds", "trainings"
    numbers, ended = ("sparsity", "parameters", "storage"), ("accuracy", "seconds", "step_seconds", "memory")
    pace = 1.0  # work is in seconds
    tells = True  # the table after every seed

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
        retime: bool = False,
        jobs: int = 1,
        **training: Any,
    ) -> None:
        super().__init__(
            out, model=model, width=width, images=images, batch_size=batch_size, device=device, quiet=quiet,
            variants=[v.name for v in variants], sparsities=sparsities, seeds=seeds,
        )  # fmt: skip
        self.retime, self.jobs = retime, jobs
        if jobs < 1 or (jobs > 1 and self.device.type != "cpu"):
            raise ValueError(f"{self.who}: jobs is {jobs} on {self.device}; it needs 1, or more on a CPU")
        if every is not None and every < 1:
            raise ValueError(f"{self.who}: every is {every}; it needs an integer >= 1")
        for variant in variants:
            if reason := variant.refuses():
                raise ValueError(f"{self.who}: {variant.name!r} cannot be trained: {reason}; leave it out")
        self.training = Settings(**training)
        taken = {name for variant in variants for name in METHODS[variant.method].options()}
        if unknown := sorted(set(self.training.evolve_options) - taken):
            raise ValueError(
                f"{self.who}: evolve_options has {', '.join(unknown)}, which no method of the variants takes"
            )
        self.total_steps = self.training.epochs * (len(self.train) // batch_size)
        self.every = max(1, min(100, self.total_steps // 40)) if every is None else every
        self.every_by_default = every is None
        asked = [
            (variant, sparsity)
            for sparsity in sparsities
            for variant in variants
            if variant.structure != "dense" or sparsity == sparsities[0]
        ]
        with torch.device("meta"):
            dense = build(model, width=width, **self.shape)
        settings = {
            "dense_parameters": parameter_count(dense), "variants": [v.record for v in variants],
            "sparsities": sparsities, "every": self.every, "training": recorded(self.training),
        }  # fmt: skip
        self._set_up(asked, settings, self.training.fuse)

    def measure(self) -> float:
        """Measure step times, unless they are known; returns the seconds that the trainings left will take by them."""
        with only_writer(self.out, self.who):
            self._take_up()
            found = [(run, self._result_of(*run)) for run in self.runs]
            self._prepare([result for _, result in found if result is not None])
            return self.pace * sum(self._work(*run) for run, result in found if result is None)

    def _take_up(self) -> None:
        super()._take_up()
        self.results[BOUNDS] = {}
        if self.results["steps"]:
            bounds = read(self.out / RESULTS).get(BOUNDS, {})
            if not isinstance(bounds, dict) or not all(_is_pair(pair) for pair in bounds.values()):
                raise ValueError(f"Study(): {self.out / RESULTS} is damaged: {BOUNDS!r} has no times; remove it")
            self.results[BOUNDS] = bounds

    def _take_times(self, found: dict[str, Any]) -> None:
        if self._timed_lines().keys() <= found.keys() and not self.retime:
            self.results["steps"] = found

    def _timed_lines(self) -> dict[str, tuple[Variant, float, bool]]:
        """Name -> what is timed: variant, sparsity, whether in a step that changes masks."""
        lines = [(Variant("dense"), 0.0), *self.lines]
        return {line_name(v.layout, s): (v.layout, s, False) for v, s in lines} | {
            update_name(v, s): (v, s, True) for v, s in self.lines if v.updates
        }

    def _impossible(self, variant: Variant, sparsity: float) -> str | None:
        """Tested by making its trainer once, unless it has been trained."""
        if any((self._folder(variant, sparsity, seed) / RESULT).exists() for seed in self.seeds):
            return None
        drawn = replace(variant, saliency="random")
        try:
            with torch.random.fork_rng():
                if _prunes(variant):  # it starts at another sparsity
                    self._network(drawn.layout, sparsity, self.seeds[0])
                if variant.structure == "narrow":
                    self._check_narrow(variant, sparsity)
                self._trainer(drawn, sparsity, self.seeds[0])
        except ValueError as error:
            return " ".join(str(error).split())
        return None

    def _prepare(self, ended: list[dict[str, Any]]) -> str | None:
        self.results["runs"] = ended
        self._write()
        if not self.results["steps"]:
            self._measure()
            self._write()
        left = [run for run in self.runs if self._result_of(*run) is None]
        if left:
            if self.jobs > 1 and self.pace == 1.0:
                self.pace = self._pace(min(self.jobs, len(left)))
            seconds = self.pace * sum(self._work(*run) for run in left)
            at_once = f", {self.jobs} at a time" if self.jobs > 1 else ""
            self.say.say(
                f"{counted(len(left), 'training')} of {counted(self.total_steps, 'step')}{at_once}: about"
                f" {duration(seconds)} on {self.results['machine']}, by the measured steps"
            )
        return None

    def _pace(self, jobs: int) -> float:
        """Seconds for one of steps as they were measured, where so many trainings share out the threads."""
        threads = torch.get_num_threads()
        step = self._step(Variant("dense"), 0.0, False, *self._batch())
        seconds = []
        try:
            for each in [threads, max(1, threads // jobs)] * PACE_ROUNDS:
                torch.set_num_threads(each)
                seconds.append(step())
        finally:
            torch.set_num_threads(threads)
        return median(seconds[3::2]) / median(seconds[2::2]) / jobs

    def _ended(self, todo: Sequence[Run], head: Callable[[Run], str]) -> Iterator[tuple[Run, dict[str, Any] | str]]:
        if min(self.jobs, len(todo)) > 1:
            return trained_side_by_side(self, todo, self.jobs)
        return super()._ended(todo, head)

    def _work(self, variant: Variant, sparsity: float, seed: int) -> float:
        step = step_times(self.results, variant, sparsity)
        assert step is not None  # measured first
        tests = self.training.epochs * len(self.test) / self.batch_size
        return step[0] * (self.total_steps + FORWARD * tests)

    def _so_far(self) -> str:
        """The best sparse line, of those that are trained with most seeds."""
        found = [row for row in self._rows() if row["accuracy"] is not None and row["structure"] != "dense"]
        found = [row for row in found if not row["structure"].startswith("narrow")]
        if not found:
            return ""
        most = max(row["seeds"] for row in found)
        best = max((row for row in found if row["seeds"] == most), key=lambda row: row["accuracy"])
        return f"best so far {best['line']} {best['accuracy']:.1%}"

    def _seed_ended(self) -> None:
        if self.tells:
            self.say.say(f"\n{table(self.results)}\n")
        self._draw()

    def _line_name(self, variant: Variant, sparsity: float) -> str:
        return line_name(variant, sparsity)

    def _structure_of(self, line: Line) -> str:
        return line[0].structure

    def _rows(self) -> list[dict[str, Any]]:
        return rows(self.results)

    def _draw_to(self, path: Path) -> None:
        draw_study(path, self._rows(), self.results["settings"], self.results["machine"])

    # ------------------------------------------------------------ one training

    def _identity(self, variant: Variant, sparsity: float, seed: int) -> dict[str, Any]:
        sparsity = 0.0 if variant.structure == "dense" else sparsity
        return {"line": line_name(variant, sparsity), **variant.record, "asked": sparsity, "seed": seed}

    def _trainer(self, variant: Variant, sparsity: float, seed: int, **more: Any) -> Trainer:
        """The trainer of one training; more: its folder."""
        name = PRUNES if variant.start == "dense" else variant.method
        method = METHODS[name]
        options: dict[str, Any] = {} if method.by_epoch and self.every_by_default else {"every": self.every}
        options |= {"seed": seed, **self.training.evolve_options}
        if variant.start == "dense":
            half = max(1, self.total_steps // 2)
            options |= {"every": half, "until": half / self.total_steps}
        options = {name: value for name, value in options.items() if name in method.options()}
        if _prunes(variant):
            options["sparsity"] = sparsity
        options |= variant.evolve
        settings = Settings(**{**asdict(self.training), "evolve": name, "evolve_options": options})
        return Trainer(self._first_network(variant, sparsity, seed), *self._batches(seed), settings, quiet=True, **more)

    def train_one(self, variant: Variant, sparsity: float, seed: int, head: str) -> dict[str, Any] | str:
        folder, identity = self._folder(variant, sparsity, seed), self._identity(variant, sparsity, seed)
        trainer = self._trainer(variant, sparsity, seed, out=folder, resume=True, config=identity)
        ended = self._finish(trainer, head)
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
        if last["accuracy"] is not None:
            finished |= self._more(trainer, variant, sparsity, seed)
        return self._keep(folder, finished)

    def _more(self, trainer: Trainer, variant: Variant, sparsity: float, seed: int) -> dict[str, Any]:
        """Further values of the result of a training that did not diverge."""
        return {}

    def _first_network(self, variant: Variant, sparsity: float, seed: int) -> nn.Module:
        """What a training starts with."""
        started = variant.layout if variant.start == "dense" else variant
        return self._network(started, 0.0 if _prunes(variant) else sparsity, seed)

    def _network(self, variant: Variant, sparsity: float, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = build(self.model, width=self.width, **self.shape)
        if variant.structure == "dense":
            return model
        if variant.structure == "narrow":
            sparsify(model, sparsity, structure="unstructured", seed=seed)
            torch.manual_seed(seed)
            return narrow(self.model, round(variant.times * summary(model).parameters), **self.shape)
        options: dict[str, Any] = dict(variant.options)
        if variant.saliency not in ("random", "magnitude"):
            count = math.ceil(IMAGES_PER_CLASS * len(self.train.classes) / self.batch_size)
            options["batch"] = list(islice(Batches(self.train, self.batch_size, train=True, seed=seed).epoch(), count))
        method = variant.method if METHODS[variant.method].dense_weights else None
        with warnings.catch_warnings():  # of groups that are too few: they were asked for
            if "groups" in variant.options:
                warnings.filterwarnings("ignore", "sparsify.*too few groups")
            return sparsify(
                model, sparsity, structure=variant.structure, method=method, distribution=variant.distribution,
                saliency=variant.saliency, seed=seed, **options,
            )  # fmt: skip

    def _check_narrow(self, variant: Variant, sparsity: float) -> None:
        count, whole = (parameter_count(self._network(v, sparsity, self.seeds[0])) for v in (variant, Variant("dense")))
        if count >= whole:
            raise ValueError(f"it would have {count:,} parameters, and the dense network has {whole:,}")

    # ------------------------------------------------------------ step times

    def _measure(self) -> None:
        """Median seconds of a step of every network, interleaved."""
        timed_lines = self._timed_lines()
        self.say.say(f"measuring steps of {len(timed_lines)} networks on {self.results['machine']}")
        x, y = self._batch()
        steps = {name: self._step(*line, x, y) for name, line in timed_lines.items()}
        found = interleaved(steps, ROUNDS, progress=self.say, what="steps")
        self.results["steps"] = {name: timing.seconds for name, timing in found.items()}
        self.results[BOUNDS] = {name: [timing.low, timing.high] for name, timing in found.items()}
        self.retime = False

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels to measure with."""
        return next(iter(Batches(self.train, self.batch_size, train=True, device=self.device).epoch()))

    def _step(
        self, variant: Variant, sparsity: float, updates: bool, x: torch.Tensor, y: torch.Tensor
    ) -> Callable[[], float]:
        """A function that takes one step on a batch and returns its seconds; `updates`: one that changes masks."""
        settings = self.training
        form = torch.channels_last if settings.channels_last else torch.contiguous_format
        model = self._network(variant, sparsity, 0).to(self.device, memory_format=form)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, settings.momentum)
        run = as_called(model, settings, self.device, self.say)
        evolver, method = None, METHODS[variant.method]
        if method.begins_dense:  # at its final sparsity
            evolver = Evolver(model, optimizer, variant.method, total_steps=1, every=1)
            evolver.step()
        elif updates:
            options: dict[str, Any] = {**variant.evolve, "every": 1}
            evolver = Evolver(model, optimizer, variant.method, total_steps=sys.maxsize, **options)
        elif method.changes:  # its work in every step counts
            evolver = Evolver(model, optimizer, variant.method, total_steps=1, every=sys.maxsize)

        def step() -> None:
            with settings.autocast(self.device):
                logits = run(x.to(memory_format=form))
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            if evolver is not None:
                evolver.step()
            optimizer.zero_grad(set_to_none=True)

        return partial(timed, self.device, step)


def _prunes(variant: Variant) -> bool:
    """Whether it is pruned to a sparsity, from a lower one."""
    return variant.start == "dense" or "sparsity" in METHODS[variant.method].options()


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(number) and number > 0 for number in value)
