"""The options of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import torch

from ..methods.registry import METHODS

RATES = {"sgd": (0.1, 5e-4), "adamw": (1e-3, 1e-2)}  # learning rate, weight decay
AMP = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("cosine", "step")
MOST_EPOCHS = 1_000_000


@dataclass(frozen=True)
class Settings:
    """The options of a training, apart from the model and the images.

    epochs           passes over the images
    optimizer        "sgd" or "adamw"
    lr               learning rate at its highest; default: 0.1 for SGD, 0.001 for AdamW
    momentum         of SGD
    nesterov         Nesterov momentum, of SGD
    weight_decay     of convolutions and linear layers, not of biases and batch norm; default: 5e-4 SGD, 0.01 AdamW
    schedule         "cosine" to zero, or "step": times gamma at each milestone
    milestones       of "step", as shares of the training
    gamma            of "step"
    warmup           epochs in which the learning rate rises linearly
    label_smoothing  share of the target spread over all classes
    amp              None, "bf16", or "fp16" (with loss scaling)
    channels_last    memory format of activations
    accumulate       a batch goes through the model in this many parts; the step is that of the whole batch
    ema              decay of an exponential moving average of the weights, which is then tested and saved
    evolve           how masks change: a method of `Evolver`, in any case
    evolve_options   those of `Evolver`; unless it is given, `every` is 100 steps, for "subp" an epoch, or less where
                     that leaves fewer than 20 updates. A test after an epoch whose last step updated the masks uses
                     the new masks; while "subp" draws blocks back, such a test scores low
    compile          run steps through torch.compile; a name chooses its backend
    fuse             BatchNorm, residual sum and ReLU as one operation, see `fuse_training`: on a CPU, without compile
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
    fuse: bool = True
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.evolve, str):
            object.__setattr__(self, "evolve", self.evolve.lower())
        lr, weight_decay = RATES.get(self.optimizer, (None, None))
        object.__setattr__(self, "lr", lr if self.lr is None else self.lr)
        object.__setattr__(self, "weight_decay", weight_decay if self.weight_decay is None else self.weight_decay)
        for name, known in (
            ("optimizer", RATES), ("schedule", SCHEDULES), ("amp", AMP), ("evolve", METHODS),
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

    def autocast(self, device: torch.device) -> torch.autocast:
        """Mixed precision on this device, as `amp` says."""
        return torch.autocast(device.type, AMP[self.amp] if self.amp else None, enabled=self.amp is not None)


def with_every(settings: Settings, steps: int, epochs: int) -> Settings:
    """The settings with `every` filled in (steps between mask updates), for the log and for resuming.

    Args:
        settings: of the training.
        steps: of an epoch.
        epochs: in which masks change.
    """
    method, given = METHODS[settings.evolve], dict(settings.evolve_options)
    if "every" not in method.options():
        return settings
    most = {"most": steps} if method.by_epoch else {}
    every = method.default_every(epochs * steps, given.get("until"), **most)
    return replace(settings, evolve_options={"every": every, **given})
