"""What both studies share: trainings in a folder, one after the other, which may be stopped anywhere and resumed."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..data.batches import Batches
from ..data.loading import load
from ..data.sets import ImageSet
from ..files import only_writer, write_json
from ..progress import Progress, duration
from ..training.devices import the_device
from ..training.result import Diverged
from ..training.settings import Settings
from ..training.trainer import Trainer
from . import folder, timing
from .variants import BASELINES

TEST_BATCH = 500

Line = tuple[Any, float]  # a line of the table: what is trained, and its sparsity
Run = tuple[Any, float, int]  # a training: of a line, with a seed


def recorded(training: Settings) -> dict[str, Any]:
    """A training as settings of a study have it; without `fuse`, which decides on times alone."""
    return {name: value for name, value in asdict(training).items() if name != "fuse"}


class RunningLine(Progress):
    """Shows the lines of a training as the running line of the study, with a prefix."""

    def __init__(self, progress: Progress, head: str) -> None:
        super().__init__(progress.quiet, progress.stream)
        self.progress, self.head = progress, head

    def show(self, text: str) -> None:
        self.shown = time.monotonic()
        self.progress.show(f"{self.head}: {text}")

    def say(self, text: str) -> None:
        if self.due():
            self.show(text)


class Runner(ABC):
    """Trains every line of the table with every seed; results.json and table.csv are rewritten after each training.

    A study defines which lines there are, how one is trained and what its result holds; see the abstract methods.

    Each training has a folder in `out` with its log, its checkpoints and, when it is finished, result.json. A study
    that is run again reads these and continues where it was stopped.
    """

    who: ClassVar[str]  # for messages
    figure: ClassVar[str]  # file name
    may_grow: ClassVar[Sequence[str]]  # settings that may differ when a study is continued
    numbers: ClassVar[Sequence[str]]  # that a result needs
    ended: ClassVar[Sequence[str]]  # further ones, of a training whose loss stayed finite
    times: ClassVar[str]  # key of results.json that has the measured seconds
    later = 0.0  # seconds of studies that follow, to be told as left
    jobs = 1  # trainings at a time
    pace: float | None = None  # seconds for a unit of `_work`, before anything is trained; None: not known

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        model: str,
        width: float,
        images: tuple[ImageSet, ImageSet] | str,
        batch_size: int,
        device: torch.device | str | None,
        quiet: bool,
        **lists: Sequence[Any],
    ) -> None:
        """lists: variants or structures, sparsities, seeds; one or more of each, without duplicates."""
        for name, values in lists.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{self.who}: {name} is {list(values)}; it needs one or more, each once")
        if any(not 0 < sparsity < 1 for sparsity in lists["sparsities"]):
            raise ValueError(f"{self.who}: sparsities is {list(lists['sparsities'])}; they need to be between 0 and 1")
        self.device, self.say = the_device(device), Progress(quiet)
        self.out, self.model, self.width, self.batch_size = Path(out), model, width, batch_size
        self.seeds = list(lists["seeds"])
        self.train, self.test = (load(images, "train"), load(images, "test")) if isinstance(images, str) else images
        shape = self.train.shape
        self.shape: dict[str, Any] = {"classes": len(self.train.classes), "image_size": shape[1], "channels": shape[0]}

    def _set_up(self, asked: Sequence[Line], settings: Mapping[str, Any], fused: bool) -> None:
        """Find which lines can be trained, and read what the folder holds; the last step of __init__.

        fused: whether steps are fused (`Settings.fuse`): times of others are measured again.

        Raises:
            ValueError: no line can be trained, or the folder holds something else.
        """
        why = [(line, self._impossible(*line)) for line in asked]
        self.lines = [line for line, reason in why if reason is None]
        self.left_out = {self._line_name(*line): reason for line, reason in why if reason is not None}
        sparse = [[self._structure_of(line) not in BASELINES for line in lines] for lines in (self.lines, asked)]
        if not self.lines or (any(sparse[1]) and not any(sparse[0])):
            reasons = [f"{name}: {reason}" for name, reason in self.left_out.items()]
            more = f"; and {len(reasons) - 2} more" if len(reasons) > 2 else ""
            raise ValueError(f"{self.who}: none of this can be trained: {'; '.join(reasons[:2])}{more}")
        self.runs = [(what, sparsity, seed) for seed in self.seeds for what, sparsity in self.lines]
        settings = {
            "model": self.model, "width": self.width, "data": self.train.name,
            "images": [len(self.train), len(self.test)],
            "labels": zlib.crc32(self.train.labels.cpu().numpy().tobytes()), "shape": self.train.shape,
            "seeds": self.seeds, "batch_size": self.batch_size, "default_groups": "as many as read every channel",
            **settings, "trainings": len(self.runs),
        }  # fmt: skip
        self.results: dict[str, Any] = json.loads(json.dumps({"settings": settings}))
        self.results |= {"machine": timing.machine(self.device), self.times: {}, "runs": [], "stopped": None}
        self.results["fused"] = fused
        self.results["left_out"] = self.left_out
        self._take_up()

    def _take_up(self) -> None:
        """Read the times measured before; a folder with anything but this study is refused."""
        folders = [*self._other_folders(), *(self._folder(*run) for run in self.runs)]
        before = folder.take_up(self.out, self.results["settings"], self.who, folders, self.may_grow)
        if all(before.get(key) == self.results[key] for key in ("machine", "fused")):
            self._take_times(folder.read_seconds(before, self.times, self.out))

    def run(self) -> dict[str, Any]:
        """Train what is not finished, to the end or until SIGINT or SIGTERM.

        Returns:
            What results.json holds: "settings", "machine", measured seconds ("steps" of a `Study`: of a training step
            by line of the table; "times" of a `Regularity`: structure -> sparsity -> of forward + backward, with those
            of the dense network in the same rounds), "runs" (one dict a training) and "stopped" (the signal that
            stopped it, else None); of a `Regularity` also "trained", the network before it was pruned.
        """
        with only_writer(self.out, self.who):
            self._take_up()
            for line, reason in self.left_out.items():
                self.say.say(f"left out: {line}, as {reason}")
            found = [(run, self._result_of(*run)) for run in self.runs]
            stopped = self._prepare([result for _, result in found if result is not None])
            return self._end(stopped or self._train_all([run for run, result in found if result is None]))

    def _train_all(self, todo: Sequence[Run]) -> str | None:
        """Run the trainings that are left; returns the signal that stopped one of them."""
        left, begin, done, pace = list(todo), time.monotonic(), 0.0, self.pace
        place = {(self._identity(*run)["line"], run[2]): i for i, run in enumerate(self.runs)}

        def head(run: Run) -> str:
            """What comes before the words about a training: how far the study is."""
            time_left = pace and f", {duration(pace * sum(self._work(*r) for r in left) + self.later)} left"
            best = f"; {words}" if (words := self._so_far()) else ""
            return f"[{len(self.runs) - len(left) + 1}/{len(self.runs)}{time_left or ''}{best}] {self.named(*run)}"

        for run, result in self._ended(todo, head):
            if isinstance(result, str):
                return result
            said = head(run)
            self.results["runs"].append(result)
            self.results["runs"].sort(key=lambda ended: place[ended["line"], ended["seed"]])
            self._write()
            left.remove(run)
            done += self._work(*run)
            begun = min(self.jobs - 1, len(left)) * self._work(*run) / 2  # the others are halfway
            pace = (time.monotonic() - begin) / (done + begun)  # trainings test and write, too
            what = "diverged" if result["accuracy"] is None else f"{result['accuracy']:.2%}"
            self.say.say(f"{said}: {what} in {duration(result['seconds'])}")
            if left and all(seed != run[2] for *_, seed in left):
                self._seed_ended()
        return None

    def _ended(self, todo: Sequence[Run], head: Callable[[Run], str]) -> Iterator[tuple[Run, dict[str, Any] | str]]:
        """Trainings with their results as they end; a signal's name as the result of one that was stopped."""
        for run in todo:
            yield run, self.train_one(*run, head(run))

    def named(self, what: Any, sparsity: float, seed: int) -> str:
        """A training in words."""
        return f"{self._line_name(what, sparsity)} seed {seed}"

    def __getstate__(self) -> dict[str, Any]:
        """For a process that trains: all but the stream that is written to."""
        return {**self.__dict__, "say": None}

    def _end(self, stopped: str | None) -> dict[str, Any]:
        self.results["stopped"] = stopped
        self._write()
        self._draw()
        return self.results

    def _write(self) -> None:
        folder.write_results(self.out, self.results, self._rows())

    def _draw(self) -> None:
        """The figure; without matplotlib a line that says so."""
        try:
            self._draw_to(self.out / self.figure)
        except ValueError as error:
            self.say.say(f"no figure: {error}")

    # ------------------------------------------------------------ one training

    def _folder(self, what: Any, sparsity: float, seed: int) -> Path:
        """Of one training."""
        return self.out / re.sub(r"[^\w.+=-]+", "-", self.named(what, sparsity, seed))

    def _result_of(self, what: Any, sparsity: float, seed: int) -> dict[str, Any] | None:
        """The result of a training; None: it is not finished."""
        run = what, sparsity, seed
        return folder.read_result(self._folder(*run), self._identity(*run), self.numbers, self.ended)

    def _batches(self, seed: int) -> tuple[Batches, Batches]:
        """Batches to train and to test with."""
        return (
            Batches(self.train, self.batch_size, train=True, seed=seed, device=self.device),
            Batches(self.test, TEST_BATCH, train=False, device=self.device),
        )

    def _finish(self, trainer: Trainer, head: str) -> tuple[nn.Module, dict[str, Any]] | str:
        """Train to the end; returns the model and its result as plain values, or the signal that stopped it."""
        trainer.progress = RunningLine(self.say, head)
        try:
            result = trainer.run()
        except Diverged as error:
            return trainer.model, {"accuracy": None, "diverged": str(error), "seconds": 0.0}
        if result.stopped:
            return result.stopped
        ended = {"accuracy": result.accuracy, "steps": result.steps, "seconds": result.seconds}
        return result.model, ended | {"step_seconds": result.step_seconds, "memory": result.memory}

    def _keep(self, where: Path, result: dict[str, Any]) -> dict[str, Any]:
        """Write a finished training's result.json."""
        where.mkdir(parents=True, exist_ok=True)
        write_json(where / folder.RESULT, result)
        return result

    # ------------------------------------------------------------ what a study says

    @abstractmethod
    def _line_name(self, what: Any, sparsity: float) -> str:
        """Of a line of the table."""

    @abstractmethod
    def _structure_of(self, line: Line) -> str:
        """Name of its structure, or "dense", or "narrow"."""

    @abstractmethod
    def _impossible(self, what: Any, sparsity: float) -> str | None:
        """Why this cannot be trained; None: it can."""

    @abstractmethod
    def _identity(self, what: Any, sparsity: float, seed: int) -> dict[str, Any]:
        """The keys of result.json that identify the training."""

    @abstractmethod
    def train_one(self, what: Any, sparsity: float, seed: int, head: str) -> dict[str, Any] | str:
        """Train; returns what the table needs, or the signal that stopped it. head: prefix of the running line."""

    @abstractmethod
    def _prepare(self, ended: list[dict[str, Any]]) -> str | None:
        """Measure times, and set results["runs"] to the finished trainings; returns the signal that stopped it."""

    @abstractmethod
    def _take_times(self, found: dict[str, Any]) -> None:
        """Keep times measured earlier on this machine, if they cover this study."""

    @abstractmethod
    def _rows(self) -> list[dict[str, Any]]:
        """Of the table."""

    @abstractmethod
    def _draw_to(self, path: Path) -> None:
        """Draw the figure; ValueError where there is nothing to draw."""

    def _work(self, what: Any, sparsity: float, seed: int) -> float:
        """Expected duration of a training, in any unit."""
        return 1.0

    def _so_far(self) -> str:
        """What the study has come to, for the running line."""
        return ""

    def _other_folders(self) -> list[Path]:
        """Folders of trainings that belong to no line."""
        return []

    def _seed_ended(self) -> None:
        """Called when all lines are trained with one seed and others follow."""
        self._draw()
