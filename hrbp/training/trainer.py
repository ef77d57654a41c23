"""One training: dense or sparse, on one device or many; stopped anywhere, it resumes bit for bit."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import signal
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.batches import Batches
from ..formats.model import save
from ..layers.record import record_of
from ..layers.view import sparse_layers
from ..methods.evolver import Evolver, Update
from ..methods.registry import METHODS
from ..progress import Progress, duration
from ..reports.model_summary import summary
from ..surgery.conversion import release
from ..wrappers import copied
from . import checkpoint, log
from .continuing import Continued
from .fused import as_called
from .optimizer import learning_rate, make_optimizer, training_bytes
from .result import Diverged, Result
from .settings import Settings, with_every
from .signals import noted

CHECK_STEPS = 10  # steps between checks of the loss on a GPU, as each one synchronizes; on a CPU every step is checked


class Trainer(Continued):
    """Trains a model; `run` does it.

        trainer = Trainer(model, Batches(train_set, 128, train=True), Batches(test_set, 500, train=False),
                          Settings(epochs=30, evolve="rigl"), out="runs/first")
        print(trainer.run().accuracy)

    In the folder `out`: log.jsonl (the configuration, then a line an epoch and a mask update), last.pt and previous.pt
    (checkpoints, see checkpoint.py), training.png, and at the end model.pt, for hrbp.load (of dense master weights only
    what takes part).

    A training that is resumed ends with the same bits as one that was not stopped, if the operators have deterministic
    kernels (on a CPU they do; on a GPU call torch.use_deterministic_algorithms(True)).

    Inside torchrun, in `ranks()`, every rank makes a Trainer of the same model with its own share of the batches:
    gradients of the stored blocks are averaged, masks are the same everywhere, rank 0 tests along and writes.

    Args:
        model: as `sparsify` left it, or dense; moved to the batches' device and trained in place.
        train, test: `Batches` of the images to train and to test with, on one device.
        settings: see `Settings`.
        out: folder of the log and the checkpoints; None writes nothing.
        resume: continue the training in `out`, if there is one. Without it, a folder that holds a training is refused.
            Settings with more epochs than it was begun with lengthen it, finished or not: the learning rate is from
            then on that of the longer training, and masks change when they would have changed in the shorter one.
        config: more facts that identify this training, as plain values: logged, and compared on resume.
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
        record = record_of(model, required=False)
        method = METHODS[settings.evolve]
        if method.changes and record is None:
            raise ValueError(f"{who}: evolve is {settings.evolve!r} and the model is dense; call hrbp.sparsify() first")
        if record is not None and not method.changes and record.method is not None:
            raise ValueError(
                f"{who}: evolve is {settings.evolve!r}; the model was made for {record.method!r} and needs that"
            )
        if reason := method.refuses_options(settings.evolve_options):
            raise ValueError(f"{who}: evolve_options: {reason}")
        self.train, self.test, self.device = train, test, train.images.device
        self.progress = Progress(quiet or self.rank > 0)
        self.out = None if out is None else Path(out)
        self.total_steps = settings.epochs * len(train)
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.format)  # type: ignore[call-overload]
        self.mask_epochs = self._as_begun(settings.epochs, resume)
        self.settings = settings = with_every(settings, len(train), self.mask_epochs)
        self.optimizer = make_optimizer(self.model, settings)
        self.ema = None
        if settings.ema is not None:
            # Buffers are copied, not averaged: some are tables of integers.
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.evolver = None
        if method.changes:
            averages = [] if self.ema is None else [self.ema]
            self.evolver = Evolver(
                self.model, self.optimizer, settings.evolve, total_steps=self.mask_epochs * len(train), ema=averages,
                **settings.evolve_options,
            )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.step = self.epoch = self.batch = 0  # done: steps, whole epochs, batches of the present epoch
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss and right ones of the epoch so far
        self.seconds = 0.0  # of the epoch so far
        self.config = self._config(config or {})
        self.history: list[dict[str, Any]] = []
        self.sparsity, self.changed = summary(self.model).sparsity, 0.0
        self._signal = self._stop = 0  # noted by this rank; agreed upon by all
        self._began = self._saved = time.monotonic()
        self._written: tuple[int, int] | None = None  # which last.pt is ours
        if self.out is not None:
            with self._writing():
                self._open(self.out, resume, who)
        self.called = as_called(self.model, settings, self.device, self.progress)
        self._wrap()

    def run(self) -> Result:
        """Train to the end, or until SIGINT or SIGTERM: then the state is saved and Result.stopped says so.

        Raises:
            Diverged: the loss is not finite.
        """
        self._began, first = time.monotonic(), self.step
        self._signal = self._stop = 0
        with self._writing():
            self._on_first_rank(self._check_unchanged)
            with noted(self._note_signal):
                while self.epoch < self.settings.epochs and not self._stop:
                    self._run_epoch(first)
            return self._ended()

    def _note_signal(self, number: int) -> None:
        self._signal = number

    def _ended(self) -> Result:
        """Report and write the end of the training, or where it was stopped."""
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
            "lr": learning_rate(self.settings, self.step - 1, len(self.train)), "sparsity": self.sparsity,
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
        """One step of the optimizer and of the masks; returns whether to save the state."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step, len(self.train))
        dense = self.evolver is not None and self.evolver.wants_dense_grad()
        run = self.wrapped if dense else self.compiled
        x = x.to(memory_format=self.format)
        parts = list(zip(x.chunk(self.settings.accumulate), y.chunk(self.settings.accumulate), strict=True))
        for i, (xs, ys) in enumerate(parts):
            wait = isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and i < len(parts) - 1
            with self.wrapped.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with self.settings.autocast(self.device):
                    logits = run(xs)
                loss = F.cross_entropy(_wide(logits), ys, label_smoothing=self.settings.label_smoothing)
                self.scaler.scale(loss / len(parts)).backward()
            right = (logits.argmax(1) == ys).sum()
            self.sums += torch.stack((loss.detach().double() * len(ys), right.double()))
        save = self._check()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step, self.batch = self.step + 1, self.batch + 1
        if self.evolver is not None and (update := self.evolver.step()):
            self._note(update)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return save

    def _check(self) -> bool:
        """Raise if the loss is not finite; agree between ranks on stopping and saving; returns whether to save."""
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
        """Log an update of the masks; after one that replaced tensors, rebuild what refers to the old ones.

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
        self.wrapped = self.compiled = self.called
        if self.world > 1:
            # Buffers are not synchronized: running statistics are read in tests alone, index tables are equal.
            wrap: Any = nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(wrap).parameters  # torch 2.13
            self.wrapped = self.compiled = wrap(
                self.called, device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
            )  # fmt: skip
        if backend := self.settings.compile:
            torch.compiler.reset()  # its limit on recompilations is meant for one layout
            run = torch.compile(self.wrapped, backend="inductor" if backend is True else backend)
            self.compiled = cast(nn.Module, run)

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
        run = self.called if self.ema is None else model
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for at, (x, y) in enumerate(self.test.epoch()):
            if at and self.progress.due():
                right = float(sums[1] / sums[2])
                self.progress.show(
                    f"epoch {self.epoch + 1}/{self.settings.epochs}  test batch {at}/{len(self.test)}"
                    f"  test accuracy so far {right:.2%}"
                )
            with self.settings.autocast(self.device):
                logits = run(x.to(memory_format=self.format))
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

    # ------------------------------------------------------------------ progress and log

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
        return f"  sparsity {self.sparsity:.2%}{changed}" if record_of(self.model, required=False) else ""

    def _left(self, first: int) -> str:
        passed, done = time.monotonic() - self._began, self.step - first
        if self.step == self.total_steps:
            return f"done in {duration(passed)}"
        return f"{duration(passed / max(1, done) * (self.total_steps - self.step))} left"

    def _log(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        if self.out is not None and self.rank == 0:
            log.add_to_log(self.out / "log.jsonl", entry)

    def _finish(self, out: Path) -> None:
        model, record = self._trained(), record_of(self.model, required=False)
        if record is not None and record.method is not None:
            model = release(copied(model))
        save(model, out / "model.pt")
        try:
            log.draw_training(out / "training.png", self.history, out.name)
        except ValueError as error:
            self.progress.say(f"no figure: {error}")

    def _result(self, stopped: str | None) -> Result:
        epochs = [entry for entry in self.history if entry["kind"] == "epoch"]
        seconds = sum(entry["seconds"] for entry in epochs) + self.seconds
        pace = [entry["seconds"] / len(self.train) for entry in epochs] or [seconds / max(1, self.step)]
        return Result(
            accuracy=epochs[-1]["test_accuracy"] if epochs else math.nan,
            loss=epochs[-1]["test_loss"] if epochs else math.nan,
            steps=self.step, seconds=seconds, step_seconds=statistics.median(pace), sparsity=self.sparsity,
            parameters=summary(self.model).parameters, memory=training_bytes(self.model, self.optimizer),
            history=self.history, stopped=stopped, model=self._trained(),
        )  # fmt: skip


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least: exponentials overflow in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
