"""What a method is: its options, what it needs of a model, when an update of the masks is due, and what it changes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers.in_groups import in_groups
from ..layers.record import SparsityRecord
from ..layers.view import SparseLayer
from ..structures.base import Selection, Structure
from .options import ANYTHING, WHO, Values

LEAST_UPDATES = 20  # of a training with `default_every`


@dataclass(frozen=True)
class Moment:
    """What a method sees of a training at one step.

    step         optimizer steps done, this one included; 0: the Evolver is being made
    total_steps  of the whole training
    record       what `sparsify` made of the model: structure, distribution, targets
    layers       name -> each sparse layer that the optimizer updates
    live         those of them that are not frozen: only these may change
    initial      sparsity of the live layers when the Evolver was made
    gradients    |dL/dW| [K, C, R, S] of the layers that took part in this step; None unless `needs_gradient`
    state        what the method wants to keep until its next update: plain values and tensors, by name; the Evolver's
                 state_dict has them
    """

    step: int
    total_steps: int
    record: SparsityRecord
    layers: Mapping[str, SparseLayer]
    live: Mapping[str, SparseLayer]
    initial: float
    gradients: Mapping[str, Tensor] | None
    state: dict[str, Any]

    def indexed(self) -> Iterator[tuple[int, str, SparseLayer]]:
        """Number, name and layer of those that may change, and have a gradient where gradients decide."""
        for i, (name, layer) in enumerate(self.layers.items()):
            if name in self.live and (self.gradients is None or name in self.gradients):
                yield i, name, layer

    def rule(self, layer: SparseLayer) -> Structure:
        """The structure that a layer's masks have: that of the record, in the groups of a convolution in groups."""
        return in_groups(self.record.structure, layer.groups)

    def generator(self, seed: int, layer: int) -> torch.Generator:
        """Of what is drawn at this step for the layer of this number; on the CPU: alike on all devices and ranks."""
        return torch.Generator().manual_seed(((seed * 1_000_003 + self.step) * 1_000_003 + layer) % 2**63)


@dataclass(frozen=True)
class Method(ABC):
    """One way in which masks change; its fields are its options.

    A subclass is a frozen dataclass with a name, in a file of this folder: registry.py finds it there, and the Evolver,
    `Settings`, the commands and their help texts have it. A field is made by `option`, which checks its values; options
    that other methods have, too, are mixins (options.py), and so are ways to time updates: exchanging.py, arriving.py,
    following.py. A method with an option `sparsity` prunes to it a model that was made at a lower one.

    name            in small letters
    place           where lists have it, lowest first; those of one place by name
    changes         masks change; False: an Evolver of it does nothing
    needs_gradient  the Evolver gathers dense gradients for its updates
    dense_weights   `sparsify` has to be told of it: layers keep a dense weight and compute with a part of it
    follows_weight  of those: that part is at any time what the structure keeps of the largest |weight|
    begins_dense    of those: all weights take part at first; SparsityRecord.target says what each layer is pruned to
    distribution    of the layers' densities, by default
    by_epoch        by default an update comes every epoch
    """

    name: ClassVar[str]
    place: ClassVar[int] = 1000
    changes: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    dense_weights: ClassVar[bool] = False
    follows_weight: ClassVar[bool] = False
    begins_dense: ClassVar[bool] = False
    distribution: ClassVar[str] = "erk"
    by_epoch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values: Values = field.metadata.get("values", ANYTHING)
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, values.taken(value))
            except (TypeError, ValueError):
                raise ValueError(f"{WHO}: {field.name} is {value!r}; it needs {values.needs}") from None

    # ------------------------------------------------------------------ options

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field]:
        """name -> field of each option, in order."""
        return {field.name: field for field in dataclasses.fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """name -> default of each option."""
        return {name: field.default for name, field in cls.options().items()}

    @classmethod
    def refuses_options(cls, names: Iterable[str]) -> str | None:
        """Why it cannot have options of these names, or None."""
        unknown = sorted(set(names) - set(cls.options()))
        takes = ", ".join(cls.options()) or "none"
        return f"method {cls.name!r} has no option {', '.join(unknown)}; it takes: {takes}" if unknown else None

    # ------------------------------------------------------------------ what it needs of a model

    @classmethod
    def refuses(cls, rule: Structure) -> str | None:
        """Why it cannot change masks of this structure, or None."""
        return None

    @classmethod
    def structure_options(cls, structure: str) -> dict[str, Any]:
        """Options of the structure of this name that it needs, where the caller says nothing of them."""
        return {}

    def check_steps(self, total_steps: int) -> None:
        """Refuse, by ValueError, steps in which no update would come, or not all that it needs."""
        return

    def check(self, now: Moment) -> None:
        """Refuse, by ValueError, a model that it could not change as its options say."""
        return

    def attach(self, model: nn.Module, now: Moment, optimizer: torch.optim.Optimizer) -> object:
        """Whatever has to last as long as the Evolver does, such as hooks; made once, with the Evolver."""
        return None

    # ------------------------------------------------------------------ when, and what

    @classmethod
    def default_every(cls, total_steps: int, until: Any = None, most: int = 100) -> int:
        """The steps between updates, at most `most`, that leave a training 20 updates or more where it has the steps.

        Args:
            total_steps: of the whole training.
            until: the option of that name, where it is given.
            most: steps between updates.
        """
        end = int(total_steps * cls._part(until))
        return max(1, min(most, end // (LEAST_UPDATES + 1)))

    @classmethod
    def _part(cls, until: Any) -> float:
        """The option `until`, given or not; 1 where there is none, or what is given is none."""
        default = cls.defaults().get("until", 1.0)
        try:
            return float(cls.options()["until"].metadata["values"].taken(default if until is None else until))
        except (KeyError, TypeError, ValueError):
            return 1.0

    @abstractmethod
    def due(self, step: int, total_steps: int, overdue: bool) -> bool:
        """Whether an update is due at this step.

        Args:
            step: from 1 on.
            total_steps: of the whole training.
            overdue: the last update that was due had a gradient that was not finite, and did not take place.
        """

    @abstractmethod
    def selections(self, now: Moment) -> dict[str, Selection]:
        """layer -> what it keeps from now on, of the layers that change; every rank has to come to the same."""
