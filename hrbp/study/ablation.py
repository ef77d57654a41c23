"""The study of HRBP++, one change at a time, and of how well the layers of each network can learn."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from ..layers.view import sparse_layers
from ..reports.health import layer_health, mean_health
from ..training.trainer import Trainer
from .ablation_table import rows
from .study import Study
from .variants import Variant


class Ablation(Study):
    """A `Study` that measures the health of the layers of every network, at the start and at the end of its training.

        results = Ablation("runs/ablation", [Variant("hrbp++"), Variant("hrbp++", "rigl"), ...], epochs=6).run()
        print(table(results))

    The first variant that is no dense network is the base that the others are compared with. Health is the mean over
    the layers that become sparse, and over the same layers of dense networks, on the first batch of the training: see
    `layer_health`.
    """

    who, figure = "Ablation()", "ablation.png"
    tells = False

    def _more(self, trainer: Trainer, variant: Variant, sparsity: float, seed: int) -> dict[str, Any]:
        names = sparse_layers(self._network(Variant("unstructured"), sparsity, seed)).keys()
        x, y = next(iter(self._batches(seed)[0].epoch()))

        def health(model: nn.Module) -> dict[str, float]:
            found = layer_health(model.to(self.device), x, y)
            return asdict(mean_health({name: found[name] for name in names}))

        return {"health": {"start": health(self._first_network(variant, sparsity, seed)), "end": health(trainer.model)}}

    def _rows(self) -> list[dict[str, Any]]:
        return rows(self.results)
