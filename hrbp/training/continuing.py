"""How a training is saved and resumed bit for bit: its configuration, its state, its folder."""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..columns import counted
from ..data.batches import Batches
from ..files import only_writer
from ..formats.model import plain_record
from ..layers.view import sparse_layers
from ..methods.evolver import Evolver
from ..progress import Progress
from ..reports.model_summary import summary
from . import checkpoint, log
from .older import config_as_now, groups_as_begun, optimizer_as_now
from .optimizer import check_optimizer
from .settings import Settings

NOT_COMPARED = ("save_minutes", "compile", "fuse")  # settings that may differ when a training is continued


class Continued:
    """The half of `Trainer` that writes its folder and resumes from it; Trainer sets the attributes declared here."""

    rank: int
    world: int
    train: Batches
    test: Batches
    settings: Settings
    device: torch.device
    mask_epochs: int  # epochs of the timetable of the masks: fewer than settings.epochs once a training was lengthened
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    evolver: Evolver | None
    scaler: torch.amp.GradScaler
    step: int  # done: steps, whole epochs, batches of the present epoch
    epoch: int
    batch: int
    sums: Tensor  # loss and right ones of the epoch so far
    seconds: float  # of the epoch so far
    config: dict[str, Any]
    history: list[dict[str, Any]]
    sparsity: float
    changed: float
    progress: Progress
    out: Path | None
    _written: tuple[int, int] | None  # which last.pt is ours
    _saved: float

    def _config(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that determines what this training computes, as plain values."""
        sparse = {id(layer.parameter): layer for layer in sparse_layers(self.model).values()}
        shapes = []
        for name, p in self.model.named_parameters():
            layer = sparse.get(id(p))
            if layer is not None and not layer.master and layer.blocksize == (1, 1):
                name = f"{name.removesuffix('values')}weight"  # as when single weights were masked, see older.py
            shapes.append((name, tuple(p.shape) if layer is None else layer.shape))
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
            "plan": plain_record(self.model),
            "ranks": self.world,
        }
        if self.mask_epochs != self.settings.epochs:
            config["mask_epochs"] = self.mask_epochs
        try:
            return json.loads(json.dumps(config))
        except TypeError as error:
            raise ValueError(f"Trainer(): config has more than plain values: {error}") from error

    def _as_begun(self, epochs: int, resume: bool) -> int:
        """Take over from the training that is continued what its model had by default in an older version.

        Returns:
            How many epochs it was begun with, where that is fewer than it is to have.
        """
        if not resume or self.out is None:
            return epochs
        log_file = self.out / "log.jsonl"
        begun = self._on_first_rank(lambda: log.configuration(log_file))
        groups_as_begun(self.model, begun)
        first = _epochs_begun(begun)
        return epochs if first is None else min(first, epochs)

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
                there = config_as_now(json.loads(json.dumps(state.get("config"))))
            except (TypeError, ValueError):
                return "its configuration has more than plain values"
            here = json.loads(json.dumps(self.config))
            if isinstance(there, dict) and _epochs_begun(there) == self.mask_epochs and _longer(here, there):
                for config in (there, here):  # it is lengthened
                    config["settings"].pop("epochs")
                    config.pop("mask_epochs", None)
            found = checkpoint.differences(there, here)
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
            planned = state["config"]["settings"]["epochs"]
            if planned != self.settings.epochs:
                masks = f", masks change as in one of {self.mask_epochs}" if self.evolver is not None else ""
                self.progress.say(
                    f"{out} was planned for {counted(planned, 'epoch')} and gets {self.settings.epochs}: the"
                    f" learning rate is that of a training of {self.settings.epochs} from here on{masks}"
                )
            done = self.epoch == self.settings.epochs
            at = "is complete" if done else f"continues at epoch {self.epoch + 1}, batch {self.batch + 1}"
            self.progress.say(f"{out} {at}")
        if self.rank == 0:
            self._written = checkpoint.stamp(out)
            log.start_log(out / "log.jsonl", [{"kind": "config", **self.config}, *self.history])
        if state is None:
            self._save()

    def _on_first_rank(self, function: Callable[[], Any]) -> Any:
        """Call it on rank 0; every rank returns or raises the same."""
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
        """Lock the folder (rank 0) for the duration of the context; a refusal is raised on every rank."""
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
        """The state that the rest of the training depends on; all ranks have to call it."""
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
        saved = optimizer_as_now(state["optimizer"], state["model"], self.model, self.optimizer)
        self.optimizer.load_state_dict(dict(saved))
        check_optimizer(self.optimizer, groups, self.settings.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.evolver is not None:
            self.evolver.load_state_dict(state["evolver"])
        self.step, self.epoch, self.batch = (int(state["position"][name]) for name in ("step", "epoch", "batch"))
        if not (0 <= self.epoch <= self.settings.epochs and 0 <= self.batch <= len(self.train)):
            raise ValueError(f"its position is epoch {self.epoch + 1}, batch {self.batch + 1}")
        self.seconds, self.changed = float(state["seconds"]), float(state["changed"])
        self.history = log.checked_history(state["history"])
        self.sparsity = summary(self.model).sparsity
        self.sums.copy_(mine["sums"])
        torch.set_rng_state(mine["random"])
        if self.device.type == "cuda" and mine["random_gpu"] is not None:
            torch.cuda.set_rng_state(mine["random_gpu"], self.device)


def _epochs_begun(config: Any) -> int | None:
    """The epochs that a training was begun with, of its configuration; None where that has none."""
    settings = config.get("settings") if isinstance(config, dict) else None
    begun = config.get("mask_epochs", settings.get("epochs")) if isinstance(settings, dict) else None
    return begun if isinstance(begun, int) and begun >= 1 else None


def _longer(here: dict[str, Any], there: dict[str, Any]) -> bool:
    """Whether a configuration has more epochs than another one."""
    epochs = there["settings"].get("epochs")
    return isinstance(epochs, int) and here["settings"]["epochs"] > epochs
