"""Gradual magnitude pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..density import densities
from ..layers.view import SparseLayer
from ..structures.base import Selection, Structure, sparsity_of
from .arriving import Arriving
from .base import Moment
from .options import SPARSITY, WHO, option


@dataclass(frozen=True)
class GMP(Arriving):
    """gradual magnitude pruning to `sparsity`, from a model made sparse at a lower one (Zhu and Gupta, 2017)

        sparsity(t) = final + (initial - final) * (1 - t / end)^3,   end = until * total_steps

    Rows of groups are divided, and filters that are rearranged sorted, anew at the first update; then they stay.

    Source: Zhu and Gupta, To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression, 2017.
    """

    name = "gmp"
    place = 40

    sparsity: float | None = option(None, "the final one, of the layers made sparse")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            SPARSITY.taken(self.sparsity)
        except (TypeError, ValueError):
            raise ValueError(
                f"{WHO}: sparsity is {self.sparsity!r} with method 'gmp'; it needs the final one, {SPARSITY.needs}"
            ) from None

    @classmethod
    def refuses(cls, rule: Structure) -> str | None:
        return None if rule.can("shrink") else f"masks of structure {rule.name!r} do not change; use method='static'"

    def check(self, now: Moment) -> None:
        if not now.live:
            return
        if now.record.per_layer:
            raise ValueError(
                f"{WHO}: 'gmp' sets every layer's density by the model's distribution, and sparsify(per_layer=...) gave"
                f" {', '.join(list(now.record.per_layer)[:3])} a sparsity alone; leave per_layer out, or take a method"
                " that keeps each layer's density"
            )
        if now.record.min_density > 1 - self.final:
            raise ValueError(
                f"{WHO}: sparsity is {self.final} and min_density of the model {now.record.min_density}; 'gmp' needs a"
                f" sparsity of at most {1 - now.record.min_density:.6g} then"
            )
        sizes = {name: math.prod(layer.shape) for name, layer in now.live.items()}
        asked = self._asked(now, self.final)
        final = sum(now.rule(now.live[n]).density(now.live[n].shape, at) * sizes[n] for n, at in asked.items())
        # A model that has arrived may be continued, and which layers round up or down depends on its weights.
        if sum(layer.kept() for layer in now.live.values()) < 0.98 * final:
            raise ValueError(
                f"{WHO}: the model is {now.initial:.4f} sparse already; 'gmp' to {self.sparsity} cannot grow it"
            )

    @property
    def final(self) -> float:
        """The final sparsity."""
        assert self.sparsity is not None
        return self.sparsity

    def sparsity_at(self, now: Moment) -> float:
        """The sparsity of the layers that can change, at this step."""
        if now.step >= self.arrives(now.total_steps):
            return self.final
        left = 1 - min(1.0, now.step / max(1.0, self.until * now.total_steps))
        return self.final + (now.initial - self.final) * left**3

    def selections(self, now: Moment) -> dict[str, Selection]:
        if not now.live:
            return {}
        first = self._first(now)
        asked, final = (self._asked(now, sparsity) for sparsity in (self.sparsity_at(now), self.final))
        selections = {}
        for name, layer in now.live.items():
            rule = now.rule(layer).settled(layer.shape, sparsity_of(final[name]))
            selections[name] = rule.shrink(
                layer.mask(), layer.row_order(), _score(layer), sparsity_of(asked[name]), first
            )
        return selections

    def _first(self, now: Moment) -> bool:
        """Whether rows may move yet."""
        return now.step <= self.every

    def _asked(self, now: Moment, sparsity: float) -> dict[str, float]:
        """layer -> density at a sparsity, of the layers that can change."""
        live = now.live
        scores: Mapping[str, Tensor] = {}
        # As sparsify() does: what "erk" makes of a linear layer is of its two axes.
        shapes = {name: layer.dense_shape for name, layer in live.items()}
        if now.record.distribution == "global":
            orders = {name: None if self._first(now) else layer.row_order() for name, layer in live.items()}
            scores = {n: now.rule(a).ranked(_score(a), orders[n]).view(shapes[n]) for n, a in live.items()}
        return densities(
            shapes,
            sparsity,
            now.record.distribution,
            scores=scores,
            realise=lambda name, density: now.rule(live[name]).density(live[name].shape, density),
            min_density=now.record.min_density,
        )


def _score(layer: SparseLayer) -> Tensor:
    return layer.weight().abs().float()
