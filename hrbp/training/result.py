"""The result of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Result:
    """The result of a training.

    accuracy, loss  of the test images: share that is right, mean cross entropy; NaN if it was stopped before a test
    steps           optimizer steps done
    seconds         of training, with reading the images, without tests and checkpoints
    step_seconds    mean of a step
    sparsity        of the layers made sparse
    parameters      weights that are not masked away
    memory          bytes of weights, index, gradients and optimizer state
    history         one dict an epoch ("kind": "epoch") and one a mask update ("update"), the lines of the log
    stopped         the signal that stopped it early, such as "SIGTERM"; None: it is complete
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
