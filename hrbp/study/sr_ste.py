"""The study of SR-STE's lambda: how far masks wander while a network trains, and what it comes to.

Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (ICLR 2021), train with

        W <- W - lr * (g(W~) + lambda * (1 - E) * W),        W~ = E * W, E the mask of the largest |W|

and look at SAD = |E_j - E_i|_1, the cells in which masks of two moments differ: lambda = 0 (STE) lets masks wander,
lambda > 0 holds them, lambda < 0 drives them on.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from ..files import whole_file
from ..layers.view import sparse_layers
from ..reports.sad_picture import draw_sad
from ..training.trainer import Trainer
from .sr_ste_table import curves, rows
from .study import Study
from .study_table import where
from .variants import Variant

CURVES = "sad.csv"


class Lambdas(Study):
    """A `Study` that keeps how far the masks of every training have come, at every look, layer by layer.

        results = Lambdas("runs/sr-ste", [Variant("dense"), Variant("n:m", "ste"), ...], epochs=3).run()
        print(table(results))

    A look comes every `every` steps: SAD is that of the masks then and at the look before, drift that of the masks then
    and at the start. Beside the files of a study the folder holds sad.csv, a line for every training, look and layer.
    """

    who, figure = "Lambdas()", "sr-ste.png"
    tells = False

    def _more(self, trainer: Trainer, variant: Variant, sparsity: float, seed: int) -> dict[str, Any]:
        if trainer.evolver is None:
            return {}
        looks = [entry for entry in trainer.history if entry["kind"] == "update"]
        masks = {
            name: {
                "cells": math.prod(layer.shape),
                **{key: [look["layers"][name][key] for look in looks] for key in ("sad", "drift")},
            }
            for name, layer in sparse_layers(trainer.model).items()
        }
        return {"looks": [look["step"] for look in looks], "masks": masks}

    def _rows(self) -> list[dict[str, Any]]:
        return rows(self.results)

    def _write(self) -> None:
        super()._write()
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["line", "seed", "step", "layer", "cells", "sad", "drift"])
        for run in self.results["runs"]:
            for layer, mask in run.get("masks", {}).items():
                for step, sad, drift in zip(run["looks"], mask["sad"], mask["drift"], strict=True):
                    writer.writerow([run["line"], run["seed"], step, layer, mask["cells"], sad, drift])
        with whole_file(self.out / CURVES) as file:
            file.write(text.getvalue().encode())

    def _draw_to(self, path: Path) -> None:
        draw_sad(path, where(self.results), self.every, curves(self.results), self._rows())
