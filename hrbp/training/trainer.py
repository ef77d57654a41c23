"""One training: dense or sparse, on one device or many, that can be stopped anywhere and continued to the bit."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import signal
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data import Batches, ImageSet, load
from ..files import only_writer
from ..methods.evolver import METHODS, Evolver, Update
from ..methods.options import default_every, refused_options
from ..reports.model_summary import summary
from ..surgery.conversion import copied, plan_of, release, sparse_layers
from . import checkpoint, progress

CHECK_STEPS = 10  # between looks at the loss on a GPU, each of which waits for it; on a CPU every step is looked at
DEFAULTS = {"sgd": (0.1, 5e-4), "adamw": (1e-3, 1e-2)}  # learning rate, weight decay
STATE = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}  # what they keep of a weight
AMP = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("cosine", "step")
MOST_EPOCHS = 1_000_000
NOT_COMPARED = ("save_minutes", "compile")  # settings that may differ when a training is continued


@dataclass(frozen=True)
class Settings:
    """What a training does to its model, apart from the model and the images.

    epochs           how often every image is seen
    optimizer        "sgd" or "adamw"
    lr               learning rate at its highest; default: 0.1 for SGD, 0.001 for AdamW
    momentum         of SGD
    nesterov         SGD looks ahead
    weight_decay     of convolutions and linear layers, not of biases and batch norm; default: 5e-4 SGD, 0.01 AdamW
    schedule         "cosine" to zero, or "step": times gamma at each milestone
    milestones       of "step", as shares of the training
    gamma            of "step"
    warmup           epochs in which the learning rate rises linearly
    label_smoothing  share of the target spread over all classes
    amp              None, "bf16", or "fp16" (with loss scaling)
    channels_last    memory format of activations
    accumulate       a batch goes through the model in this many parts; the step is that of the whole batch
    ema              decay of an exponential moving average of the weights, which is then what is tested and saved
    evolve           how masks change: a method of `Evolver`, in any case
    evolve_options   those of `Evolver`; unless it is given, `every` is 100 steps, for "subp" an epoch, or less where
                     that leaves fewer than 20 updates. What is tested after an epoch has the masks of the next one
                     already when an update has come last, and while "subp" draws these it tests low
    compile          run steps through torch.compile; a name chooses its backend
    save_minutes     time between checkpoints within an epoch; each epoch ends with one anyway

    Raises:
        ValueError: a value out of range.
    """

    epochs: int
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float | None = None
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.0
    label_smoothing: float = 0.0
    amp: str | None = None
    channels_last: bool = False
    accumulate: int = 1
    ema: float | None = None
    evolve: str = "static"
    evolve_options: Mapping[str, Any] = field(default_factory=dict)
    compile: bool | str = False
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.evolve, str):
            object.__setattr__(self, "evolve", self.evolve.lower())
        lr, weight_decay = DEFAULTS.get(self.optimizer, (None, None))
        object.__setattr__(self, "lr", lr if self.lr is None else self.lr)
        object.__setattr__(self, "weight_decay", weight_decay if self.weight_decay is None else self.weight_decay)
        for name, known in (
            ("optimizer", DEFAULTS), ("schedule", SCHEDULES), ("amp", AMP), ("evolve", METHODS),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in tuple(known):
                raise ValueError(f"Settings(): {name} is {value!r}; it needs one of {', '.join(map(str, known))}")
        for name, least, most in (
            ("epochs", 1, MOST_EPOCHS), ("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf),
            ("gamma", 0, 1), ("warmup", 0, self.epochs), ("label_smoothing", 0, 1), ("accumulate", 1, math.inf),
            ("ema", 0, 1), ("save_minutes", 0, math.inf),
        ):  # fmt: skip
            value, whole = getattr(self, name), name in ("epochs", "accumulate")
            fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
            if not (fits and least <= value <= most and value < math.inf) and not (name == "ema" and value is None):
                end = f"{most}]" if most < math.inf else "inf)"
                needs = f"it needs {'an integer' if whole else 'a number'} in [{least}, {end}"
                raise ValueError(f"Settings(): {name} is {value!r}; {needs}")
        shares: list[Any] = list(self.milestones) if isinstance(self.milestones, tuple | list) else [None]
        if not all(isinstance(m, float) and 0 < m < 1 for m in shares) or shares != sorted(shares):
            raise ValueError(f"Settings(): milestones is {self.milestones}; it needs rising shares between 0 and 1")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("Settings(): nesterov needs optimizer 'sgd' with momentum")


@dataclass(frozen=True)
class Result:
    """What a training came to.

    accuracy, loss  of the test images: share that is right, mean cross entropy; NaN if it was stopped before a test
    steps           optimizer steps done
    seconds         of training, with reading the images, without tests and checkpoints
    step_seconds    mean of a step
    sparsity        of the layers made sparse
    parameters      weights that are not masked away
    memory          bytes of weights, index, gradients and optimizer state
    history         one dict an epoch ("kind": "epoch") and one a mask update ("update"), the lines of the log
    stopped         the signal that stopped it early, as "SIGTERM"; None: it is complete
    model           what was tested: the trained model, or its moving average
    """

    accuracy: float
    loss: float
    steps: int
    seconds: float
    step_seconds: float
    sparsity: float
    parameters: int
    memory: int
    history: list[dict[str, Any]]
    stopped: str | None
    model: nn.Module


class Diverged(RuntimeError):
    """The loss is not finite; the message says where the state is."""


class Trainer:
    """Trains a model; `run` does it.

        trainer = Trainer(model, Batches(train_set, 128, train=True), Batches(test_set, 500, train=False),
                          Settings(epochs=30, evolve="rigl"), out="runs/first")
        print(trainer.run().accuracy)

    In the folder `out`: log.jsonl (the configuration, then a line an epoch and a mask update), last.pt and previous.pt
    (checkpoints, see checkpoint.py), training.png, and at the end model.pt, for hrbp.load (of dense master weights only
    what takes part).

    A training that is continued ends with the same bits as one that was not stopped, where the operators have
    deterministic kernels (on a CPU they do; on a GPU call torch.use_deterministic_algorithms(True)).

    Inside torchrun, in `ranks()`, every rank makes a Trainer of the same model with its own share of the batches:
    gradients of the stored blocks are averaged, masks are the same everywhere, rank 0 tests along and writes.

    Args:
        model: as `sparsify` left it, or dense; moved to the batches' device and trained in place.
        train, test: `Batches` of the images to train and to test with, on one device.
        settings: see `Settings`.
        out: folder of the log and the checkpoints; None writes nothing.
        resume: continue what is in `out`, if there is anything. Without it, a folder that holds a training is refused.
        config: more of what makes this training, as plain values: written to the log, and compared on resume.
        quiet: print nothing.

    Raises:
        ValueError: settings or batches that do not fit together, or `out` holds another training.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        test: Batches,
        settings: Settings,
        *,
        out: str | os.PathLike | None = None,
        resume: bool = False,
        config: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        who = "Trainer()"
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for name, batches, kind in (("train", train, True), ("test", test, False)):
            if batches.train is not kind:
                raise ValueError(f"{who}: {name} is Batches(train={batches.train}); it needs train={kind}")
            if (batches.rank, batches.world) != (self.rank, self.world):
                raise ValueError(
                    f"{who}: {name} is for rank {batches.rank} of {batches.world}; this is {self.rank} of {self.world}"
                )
        if train.images.device != test.images.device:
            raise ValueError(f"{who}: train is on {train.images.device} and test on {test.images.device}; use one")
        if train.batch_size % (self.world * settings.accumulate):
            raise ValueError(
                f"{who}: batch_size is {train.batch_size} for {self.world} ranks and accumulate = {settings.accumulate}"
                f" parts; it needs a multiple of {self.world * settings.accumulate}"
            )
        plan = plan_of(model, required=False)
        if settings.evolve != "static" and plan is None:
            raise ValueError(f"{who}: evolve is {settings.evolve!r} and the model is dense; call hrbp.sparsify() first")
        if plan is not None and settings.evolve == "static" and plan.method is not None:
            raise ValueError(f"{who}: evolve is 'static'; the model was made for {plan.method!r} and needs that")
        if reason := refused_options(settings.evolve, settings.evolve_options):
            raise ValueError(f"{who}: evolve_options: {reason}")
        self.train, self.test, self.device = train, test, train.images.device
        self.total_steps = settings.epochs * len(train)
        self.settings = settings = self._with_every(settings)
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.format)  # type: ignore[call-overload]
        self.optimizer = _optimizer(self.model, settings)
        self.ema = None
        if settings.ema is not None:
            # Buffers are copied, not averaged: some are tables of integers.
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.evolver = None
        if settings.evolve != "static":
            averages = [] if self.ema is None else [self.ema]
            self.evolver = Evolver(
                self.model, self.optimizer, settings.evolve, total_steps=self.total_steps, ema=averages,
                **settings.evolve_options,
            )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.step = self.epoch = self.batch = 0  # done: steps, whole epochs, batches of the present epoch
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss and right ones of the epoch so far
        self.seconds = 0.0  # of the epoch so far
        self.config = self._config(config or {})
        self.history: list[dict[str, Any]] = []
        self.sparsity, self.changed = summary(self.model).sparsity, 0.0
        self.progress = progress.Progress(quiet or self.rank > 0)
        self._signal = self._stop = 0  # noted by this rank; agreed upon by all
        self._began = self._saved = time.monotonic()
        self.out = None if out is None else Path(out)
        self._written: tuple[int, int] | None = None  # which last.pt is ours
        if self.out is not None:
            with self._writing():
                self._open(self.out, resume, who)
        self._wrap()

    def _with_every(self, settings: Settings) -> Settings:
        """The settings with the steps between updates in them, for the log and for whoever continues."""
        if settings.evolve == "static":
            return settings
        most = {"most": len(self.train)} if settings.evolve == "subp" else {}
        given = dict(settings.evolve_options)
        every = default_every(settings.evolve, self.total_steps, given.get("until"), **most)
        return replace(settings, evolve_options={"every": every, **given})

    def run(self) -> Result:
        """Train to the end, or until SIGINT or SIGTERM: then the state is saved and Result.stopped says so.

        Raises:
            Diverged: the loss is not finite.
        """
        self._began, first = time.monotonic(), self.step
        self._signal = self._stop = 0
        with self._writing():
            self._on_first_rank(self._check_unchanged)
            with self._signals():
                while self.epoch < self.settings.epochs and not self._stop:
                    self._run_epoch(first)
            return self._ended()

    def _ended(self) -> Result:
        """What is said and written when no further step is taken."""
        stopped = signal.Signals(self._stop).name if self._stop else None
        if stopped:
            where = f"epoch {self.epoch + 1}, batch {self.batch}"
            kept = f"; {self.out} holds its state: resume it" if self.out else ""
            self.progress.say(f"stopped by {stopped} at {where}{kept}")
        elif self.out is not None and self.rank == 0:
            self._finish(self.out)
        return self._result(stopped)

    # ------------------------------------------------------------------ one epoch, one step

    def _run_epoch(self, first: int) -> None:
        self.model.train()
        start = time.perf_counter()
        for x, y in self.train.epoch(self.epoch, self.batch):
            save = self._run_step(x, y)
            self.seconds += time.perf_counter() - start
            if self.progress.due():
                self.progress.show(self._line(first))
            if self._stop or save:
                self._save()
            if self._stop:
                return
            start = time.perf_counter()
        tested = self._tested()
        loss, right = self._over_ranks(self.sums).tolist()
        images = len(self.train) * self.train.batch_size
        entry = {
            "kind": "epoch", "epoch": self.epoch + 1, "step": self.step,
            "loss": loss / images, "accuracy": right / images, "test_loss": tested[0], "test_accuracy": tested[1],
            "lr": self._lr(self.step - 1), "sparsity": self.sparsity,
            "seconds": self.seconds, "images_per_second": images / max(1e-9, self.seconds),
        }  # fmt: skip
        self._log(entry)
        self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        self._save()
        self.progress.say(
            f"epoch {self.epoch:{len(str(self.settings.epochs))}}/{self.settings.epochs}"
            f"  loss {entry['loss']:.4f}  accuracy {entry['accuracy']:.2%}  test {entry['test_accuracy']:.2%}"
            f"{self._masks()}  {entry['images_per_second']:,.0f} images/s  {self._left(first)}"
        )

    def _run_step(self, x: Tensor, y: Tensor) -> bool:
        """One step of the optimizer, and of the masks; whether the state should be saved."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(self.step)
        dense = self.evolver is not None and self.evolver.wants_dense_grad()
        run = self.wrapped if dense else self.compiled
        x = x.to(memory_format=self.format)
        parts = list(zip(x.chunk(self.settings.accumulate), y.chunk(self.settings.accumulate), strict=True))
        for i, (xs, ys) in enumerate(parts):
            wait = isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and i < len(parts) - 1
            with self.wrapped.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with self._autocast():
                    logits = run(xs)
                loss = F.cross_entropy(_wide(logits), ys, label_smoothing=self.settings.label_smoothing)
                self.scaler.scale(loss / len(parts)).backward()
            right = (logits.argmax(1) == ys).sum()
            self.sums += torch.stack((loss.detach().double() * len(ys), right.double()))
        save = self._look()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step, self.batch = self.step + 1, self.batch + 1
        if self.evolver is not None and (update := self.evolver.step()):
            self._note(update)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return save

    def _lr(self, step: int) -> float:
        """Linear from 0 in the warm-up; then lr/2 * (1 + cos(pi * t)), or lr * gamma^(milestones passed)."""
        settings, warmup = self.settings, self.settings.warmup * len(self.train)
        assert settings.lr is not None
        if step < warmup:
            return settings.lr * min(1.0, (step + 1) / warmup)
        if settings.schedule == "cosine":
            return settings.lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (self.total_steps - warmup)))
        return settings.lr * settings.gamma ** sum(step >= m * self.total_steps for m in settings.milestones)

    def _look(self) -> bool:
        """Stop if the loss is not finite; agree between ranks on stopping and saving; whether to save."""
        last = self.batch + 1 == len(self.train)
        if self.device.type != "cpu" and (self.step + 1) % CHECK_STEPS and not last:
            return False
        due = time.monotonic() - self._saved >= 60 * self.settings.save_minutes
        flags = [int(not math.isfinite(float(self.sums[0]))), self._signal, int(due and self.rank == 0)]
        if self.world > 1:
            agreed = torch.tensor(flags, device=self.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            flags = agreed.tolist()
        diverged, self._stop, save = flags
        if diverged:
            self._stop_diverged()
        return bool(save)

    def _stop_diverged(self) -> NoReturn:
        where = f"epoch {self.epoch + 1}, step {self.step + 1}"
        if self.device.type != "cpu":
            where += f" or up to {CHECK_STEPS - 1} before"
        kept = ""
        state = self._state()
        if self.out is not None:
            if self.rank == 0:
                checkpoint.write_training(self.out, state, checkpoint.DIVERGED)
            kept = (
                f"; the state is in {self.out / checkpoint.DIVERGED} and the last good one in"
                f" {self.out / checkpoint.LAST}"
            )
        raise Diverged(
            f"the loss is not finite at {where}{kept}; try a lower lr, a longer warmup, or amp bf16 for fp16"
        )

    def _note(self, update: Update) -> None:
        """Log a change of the masks; after one that moved tensors, make anew what holds the old ones.

        sad, drift: see `Update`; of all layers, and of each.
        """
        kept = {name: float(layer.mask().sum()) for name, layer in sparse_layers(self.model).items()}
        total = sum(kept[name] for name in update.changed)
        self.changed = sum(share * kept[name] for name, share in update.changed.items()) / max(1.0, total)
        self.sparsity = summary(self.model).sparsity
        self._log(
            {"kind": "update", "step": self.step, "epoch": self.epoch + 1, "changed": self.changed,
             "sparsity": self.sparsity, "reallocated": update.reallocated,
             "sad": sum(update.sad.values()), "drift": sum(update.drift.values()),
             "layers": {name: {"changed": share, "sad": update.sad[name], "drift": update.drift[name]}
                        for name, share in update.changed.items()}}
        )  # fmt: skip
        if update.reallocated:
            self.optimizer.zero_grad(set_to_none=True)
            self._wrap()

    def _wrap(self) -> None:
        """The model as a step runs it: data-parallel, and compiled but for steps that need dense gradients."""
        self.wrapped = self.compiled = self.model
        if self.world > 1:
            # Buffers are left alone: running statistics are only read in tests, index tables are the same everywhere.
            wrap: Any = nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(wrap).parameters  # torch 2.13
            self.wrapped = self.compiled = wrap(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
            )  # fmt: skip
        if backend := self.settings.compile:
            torch.compiler.reset()  # its limit on recompilations is meant for one layout
            run = torch.compile(self.wrapped, backend="inductor" if backend is True else backend)
            self.compiled = cast(nn.Module, run)

    def _autocast(self) -> torch.autocast:
        amp = self.settings.amp
        return torch.autocast(self.device.type, AMP[amp] if amp else None, enabled=amp is not None)

    # ------------------------------------------------------------------ tests

    @torch.no_grad()
    def _tested(self) -> tuple[float, float]:
        """(mean cross entropy, share that is right) of the test images, over all ranks."""
        model = self._trained()
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, 0)
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for x, y in self.test.epoch():
            with self._autocast():
                logits = model(x.to(memory_format=self.format))
            loss = F.cross_entropy(_wide(logits), y, reduction="sum")
            right = (logits.argmax(1) == y).sum()
            sums += torch.stack((loss.double(), right.double(), right.new_tensor(len(y)).double()))
        loss, right, images = self._over_ranks(sums).tolist()
        return loss / images, right / images

    def _trained(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def _over_ranks(self, sums: Tensor) -> Tensor:
        if self.world > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        return sums

    # ------------------------------------------------------------------ what is said

    def _line(self, first: int) -> str:
        done = max(1, self.batch * self.train.batch_size // self.world)
        loss, right = (self.sums / done).tolist()
        speed = self.batch * self.train.batch_size / max(1e-9, self.seconds)
        return (
            f"epoch {self.epoch + 1}/{self.settings.epochs}  batch {self.batch}/{len(self.train)}  loss {loss:.4f}"
            f"  accuracy {right:.2%}{self._masks()}  {speed:,.0f} images/s  {self._left(first)}"
        )

    def _masks(self) -> str:
        changed = "" if self.evolver is None else f"  mask change {self.changed:.2%}"
        return f"  sparsity {self.sparsity:.2%}{changed}" if plan_of(self.model, required=False) else ""

    def _left(self, first: int) -> str:
        passed, done = time.monotonic() - self._began, self.step - first
        if self.step == self.total_steps:
            return f"done in {progress.duration(passed)}"
        return f"{progress.duration(passed / max(1, done) * (self.total_steps - self.step))} left"

    def _log(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        if self.out is not None and self.rank == 0:
            progress.add_to_log(self.out / "log.jsonl", entry)

    def _finish(self, out: Path) -> None:
        model, plan = self._trained(), plan_of(self.model, required=False)
        if plan is not None and plan.method is not None:
            model = release(copied(model))
        checkpoint.save(model, out / "model.pt")
        try:
            progress.draw_training(out / "training.png", self.history)
        except ValueError as error:
            self.progress.say(f"no figure: {error}")

    def _result(self, stopped: str | None) -> Result:
        epochs = [entry for entry in self.history if entry["kind"] == "epoch"]
        seconds = sum(entry["seconds"] for entry in epochs) + self.seconds
        pace = [entry["seconds"] / len(self.train) for entry in epochs] or [seconds / max(1, self.step)]
        return Result(
            accuracy=epochs[-1]["test_accuracy"] if epochs else math.nan,
            loss=epochs[-1]["test_loss"] if epochs else math.nan,
            steps=self.step,
            seconds=seconds,
            step_seconds=statistics.median(pace),
            sparsity=self.sparsity,
            parameters=summary(self.model).parameters,
            memory=training_bytes(self.model, self.optimizer),
            history=self.history,
            stopped=stopped,
            model=self._trained(),
        )

    # ------------------------------------------------------------------ saving and continuing

    def _config(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides what this training computes, as plain values."""
        sparse = {id(layer.parameter): layer.shape for layer in sparse_layers(self.model).values()}
        shapes = [(name, sparse.get(id(p), tuple(p.shape))) for name, p in self.model.named_parameters()]
        data = {
            name: {
                "name": batches.images.name, "images": len(batches.images), "shape": batches.images.shape,
                "labels": zlib.crc32(batches.images.labels.cpu().numpy().tobytes()), "batch_size": batches.batch_size,
                "seed": batches.seed,
            }
            for name, batches in (("train", self.train), ("test", self.test))
        }  # fmt: skip
        config = {
            **more,
            "settings": {name: v for name, v in asdict(self.settings).items() if name not in NOT_COMPARED},
            "data": data,
            "model": {"class": type(self.model).__name__, "shapes": zlib.crc32(repr(shapes).encode())},
            "plan": checkpoint.plain_plan(self.model),
            "ranks": self.world,
        }
        try:
            return json.loads(json.dumps(config))
        except TypeError as error:
            raise ValueError(f"Trainer(): config has more than plain values: {error}") from error

    def _open(self, out: Path, resume: bool, who: str) -> None:
        """Begin a training in this folder, or continue the one it holds."""

        def stored() -> Any:
            checkpoint.remove_leftovers(out)
            if resume:
                return checkpoint.read_training(out, refuses, self.progress.say)
            if checkpoint.has_training(out):
                raise ValueError(f"{who}: {out} holds a training; continue it with resume, or use another folder")
            return None

        def refuses(state: Any) -> str | None:
            try:
                there = json.loads(json.dumps(state.get("config")))
            except (TypeError, ValueError):
                return "its configuration has more than plain values"
            found = checkpoint.differences(there, self.config)
            return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "") or None

        state = self._on_first_rank(stored)
        if state is not None:
            try:
                self._restore(state)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise ValueError(
                    f"{who}: the checkpoint in {out} fits its checksum and not a training ({what}); it was made"
                    " otherwise: use another folder"
                ) from error
            done = self.epoch == self.settings.epochs
            at = "is complete" if done else f"continues at epoch {self.epoch + 1}, batch {self.batch + 1}"
            self.progress.say(f"{out} {at}")
        if self.rank == 0:
            self._written = checkpoint.stamp(out)
            progress.start_log(out / "log.jsonl", [{"kind": "config", **self.config}, *self.history])
        if state is None:
            self._save()

    def _on_first_rank(self, function: Callable[[], Any]) -> Any:
        """What it returns or raises on rank 0, on every rank."""
        if self.world == 1:
            return function()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except (OSError, ValueError) as error:
                box[1] = error
        dist.broadcast_object_list(box, 0, device=self.device)
        if box[1] is not None:
            raise box[1]
        return box[0]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """While it lasts, the folder is ours alone; rank 0 holds it, and a refusal reaches every rank."""
        with contextlib.ExitStack() as held:
            if (out := self.out) is not None:
                self._on_first_rank(lambda: held.enter_context(only_writer(out, "Trainer()")))
            yield

    def _check_unchanged(self) -> None:
        if self.out is not None and self._written != checkpoint.stamp(self.out):
            raise ValueError(
                f"Trainer.run(): another training has written to {self.out} since this one was made; make it again with"
                " resume, or use another folder"
            )

    def _save(self) -> None:
        state = self._state()
        if self.out is not None and self.rank == 0:
            checkpoint.write_training(self.out, state)
            self._written = checkpoint.stamp(self.out)
        self._saved = time.monotonic()

    def _state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on; all ranks have to call it."""
        on_gpu = self.device.type == "cuda"
        mine = {
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "sums": self.sums.cpu(),
        }
        every = [mine]
        if self.world > 1:
            every = [{} for _ in range(self.world)]
            dist.all_gather_object(every, mine)
        return {
            "config": self.config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "evolver": None if self.evolver is None else self.evolver.state_dict(),
            "position": {"step": self.step, "epoch": self.epoch, "batch": self.batch},
            "ranks": every,
            "seconds": self.seconds,
            "changed": self.changed,
            "history": self.history,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        mine = state["ranks"][self.rank]
        like: dict[str, Any] = {"sums": self.sums.cpu(), "random": torch.get_rng_state()}
        like["scaler"] = self.scaler.state_dict()
        like["evolver"] = None if self.evolver is None else self.evolver.state_dict()
        if wrong := checkpoint.misfits({**state, **mine}, like):
            raise ValueError(wrong)
        self.model.load_state_dict(state["model"])
        groups = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        _check_optimizer(self.optimizer, groups, self.settings.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.evolver is not None:
            self.evolver.load_state_dict(state["evolver"])
        self.step, self.epoch, self.batch = (int(state["position"][name]) for name in ("step", "epoch", "batch"))
        if not (0 <= self.epoch <= self.settings.epochs and 0 <= self.batch <= len(self.train)):
            raise ValueError(f"its position is epoch {self.epoch + 1}, batch {self.batch + 1}")
        self.seconds, self.changed = float(state["seconds"]), float(state["changed"])
        self.history = progress.checked_history(state["history"])
        self.sparsity = summary(self.model).sparsity
        self.sums.copy_(mine["sums"])
        torch.set_rng_state(mine["random"])
        if self.device.type == "cuda" and mine["random_gpu"] is not None:
            torch.cuda.set_rng_state(mine["random_gpu"], self.device)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are noted, and acted upon after the step; a second one acts at once."""
        before: dict[int, Any] = {}

        def note(number: int, _: FrameType | None) -> None:
            self._signal = number
            signal.signal(number, signal.SIG_DFL)

        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a model's weights and buffers (index tables are such), of its gradients, and of optimizer state."""
    weights = list(model.parameters())
    gradients = [p for p in weights if p.requires_grad]
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in (*weights, *gradients, *model.buffers(), *state))


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least: exponentials overflow in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Weight decay is for weights that multiply inputs; biases and batch norm have one dimension."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    assert settings.lr is not None
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, settings.lr)
    return torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=settings.nesterov)


def _check_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], name: str) -> None:
    """ValueError unless an optimizer that was loaded has the settings of `groups`, and state that fits its weights."""
    for group, like in zip(optimizer.param_groups, groups, strict=True):
        for key in like.keys() - {"params", "lr"}:
            if key not in group or type(group[key]) is not type(like[key]) or group[key] != like[key]:
                raise ValueError(f"{key} of the optimizer is {str(group.get(key))[:60]} and was {like[key]}")
    for parameter, state in optimizer.state.items():
        if not isinstance(state, dict) or state.keys() - STATE[name] or (state and STATE[name] - state.keys()):
            raise ValueError(f"the state of a weight is {str(state)[:60]}; {name} has {', '.join(STATE[name])}")
        for key, value in state.items():
            fits = isinstance(value, Tensor) and value.shape in (
                parameter.shape,
                torch.Size() if key == "step" else None,
            )
            if not fits and not (value is None and name == "sgd"):
                raise ValueError(f"{key} of a weight {tuple(parameter.shape)} is {checkpoint.kind_of(value)}")


def train(
    model: nn.Module,
    images: tuple[ImageSet, ImageSet] | str = "shapes",
    *,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """Train a model on images, on a GPU where there is one, and on all ranks inside torchrun.

    Args:
        model: as in `Trainer`.
        images: sets to train and to test with, or a name for hrbp.data.load.
        batch_size: of all ranks together.
        seed: of the order and augmentation of the images.
        device: default: the GPU if there is one.
        out, resume, config, quiet: as in `Trainer`.
        **settings: see `Settings`; epochs is needed.
    """
    with ranks(device) as (rank, world, here):
        sets = (load(images, "train"), load(images, "test")) if isinstance(images, str) else images
        to_train, to_test = (
            Batches(s, batch_size, train=kind, seed=seed, rank=rank, world=world, device=here)
            for s, kind in zip(sets, (True, False), strict=True)
        )
        made = Settings(**settings)
        return Trainer(model, to_train, to_test, made, out=out, resume=resume, config=config, quiet=quiet).run()


def the_device(device: torch.device | str | None = None) -> torch.device:
    """A device that can be used: the one of this name, else the GPU of this rank where there is one, else the CPU.

    Raises:
        ValueError: no such device, or it cannot be used here.
    """
    try:
        name = device.strip().lower() if isinstance(device, str) else device
        here = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; it needs cpu, cuda, or one of several GPUs as cuda:1") from None
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if here.index is None else here.index)
        if here.index >= torch.cuda.device_count():
            raise ValueError(f"device: this rank needs {here} and there are {torch.cuda.device_count()} GPUs; use cpu")
        return here
    try:
        torch.ones(1, device=here).tolist()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = (str(error).splitlines() or ["it holds no numbers"])[0].partition(". ")[0]
        raise ValueError(f"device is {device!r}, which cannot be used here: {why}; use cpu or cuda") from error
    return here


@contextlib.contextmanager
def ranks(device: torch.device | str | None = None) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world, device) of this process, in the process group that torchrun asks for: NCCL on GPUs, else gloo."""
    here = the_device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield rank, world, here
        return
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), here
    finally:
        dist.destroy_process_group()
