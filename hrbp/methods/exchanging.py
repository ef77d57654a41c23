"""What methods share that exchange a part of what is kept at every update: SET, RigL, HRBP."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..layers.view import SparseLayer
from ..structures.base import Selection, Structure
from .base import Method, Moment
from .options import WHO, Drop, Every, Seeded, Until


@dataclass(frozen=True)
class Exchanging(Seeded, Until, Drop, Every, Method):
    """Every `every` steps, before `until`, a share of what is kept goes, and as much comes.

        share(t) = drop / 2 * (1 + cos(pi * t / end)),   end = until * total_steps

    A subclass says what comes: `growth`. What goes is what has least |weight|, unless it says otherwise: `worth`.
    Layers stay as sparse as they were.
    """

    @classmethod
    def refuses(cls, rule: Structure) -> str | None:
        return None if rule.can("exchange") else f"masks of structure {rule.name!r} do not change; use method='static'"

    def check_steps(self, total_steps: int) -> None:
        every, until = self.every, self.until
        end = until * total_steps
        if every >= end:
            most = math.ceil(end) - 1
            lower = f"lower every to at most {most}, or " if most >= 1 else ""
            raise ValueError(
                f"{WHO}: {self.name!r} would never change a mask: its first update comes at step every = {every}, and"
                f" masks stay from step until * total_steps = {until} * {total_steps} = {end:g} on; {lower}raise until"
                " or total_steps"
            )

    def due(self, step: int, total_steps: int, overdue: bool) -> bool:
        return overdue or (step % self.every == 0 and step < self.until * total_steps)

    def share(self, step: int, total_steps: int) -> float:
        """The share to exchange at this step."""
        end = max(1.0, self.until * total_steps)
        return self.drop / 2 * (1 + math.cos(math.pi * min(1.0, step / end)))

    def selections(self, now: Moment) -> dict[str, Selection]:
        share = self.share(now.step, now.total_steps)
        return {
            name: self.exchanged(
                now.rule(layer), layer.mask(), layer.row_order(), self.worth(now, i, name, layer),
                self.growth(now, i, name, layer), share,
            )
            for i, name, layer in now.indexed()
        }  # fmt: skip

    def exchanged(
        self, rule: Structure, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float
    ) -> Selection:
        """The selection when `share` of a mask is exchanged; see Structure.exchange."""
        return rule.exchange(mask, order, weight, growth, share)

    def worth(self, now: Moment, i: int, name: str, layer: SparseLayer) -> Tensor:
        """[K, C, R, S] >= 0: by which it is decided what of the i-th layer goes."""
        return layer.weight().abs().float()

    @abstractmethod
    def growth(self, now: Moment, i: int, name: str, layer: SparseLayer) -> Tensor:
        """[K, C, R, S] >= 0: by which the i-th layer grows."""
