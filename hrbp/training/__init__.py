"""How is a model trained, stopped and continued?

`train` is one training in one call, `Trainer` the object behind it, `Settings` its options. A new setting is a field of
`Settings` with its check; state that a checkpoint has to hold goes into continuing.py.
"""

from .devices import ranks, the_device
from .optimizer import training_bytes
from .result import Diverged, Result
from .run import train
from .settings import Settings
from .trainer import Trainer

__all__ = ["Diverged", "Result", "Settings", "Trainer", "ranks", "the_device", "train", "training_bytes"]
