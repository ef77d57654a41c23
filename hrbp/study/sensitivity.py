"""How sensitive is each layer of a trained network to pruning: one layer at a time, by each kind of grain.

As in Mao et al., Exploring the Regularity of Sparse Structure in Convolutional Neural Networks (2017), and Han et al.,
Learning both Weights and Connections for Efficient Neural Networks (2015): a layer loses the grains of least sum |w|,
the others stay whole, nothing is trained again, and the test images tell what that costs.
"""

from __future__ import annotations

import csv
import io
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches
from ..files import only_writer, whole_file, write_json
from ..formats.model import load
from ..layers.stored import PLAIN
from ..progress import Progress, duration
from ..reports.sensitivity_picture import draw_sensitivity
from ..structures.registry import make_mask
from ..training.signals import noted
from .folder import read
from .sensitivity_table import FIGURE, rows

FILE, TABLE = "sensitivity.json", "sensitivity.csv"


class Sensitivity:
    """Prunes one layer at a time, of each network, with each grain, to each sparsity; run again, it continues.

        results = Sensitivity(out, {0: "trained.pt"}, ["unstructured", "kernel"], [0.5, 0.75], test).run()
        print(parts(results).text())

    Writes sensitivity.json after every layer, and sensitivity.csv and sensitivity.png at the end. A grain that a layer
    cannot have at some sparsity is left out, with the reason.

    Args:
        out: folder; may hold a study.
        networks: seed -> file of a trained dense network, as `hrbp.save` writes it.
        structures: names of `make_mask`.
        sparsities: that a layer is pruned to.
        test: batches of the test images.
        options: structure -> its options.
        quiet: print nothing.

    Raises:
        ValueError: the folder holds the sensitivity of other networks, or on other images.
    """

    def __init__(
        self,
        out: Path,
        networks: Mapping[int, Path],
        structures: Sequence[str],
        sparsities: Sequence[float],
        test: Batches,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        quiet: bool = False,
    ) -> None:
        self.out, self.networks, self.test, self.options = Path(out), dict(networks), test, options or {}
        self.say = Progress(quiet)
        images = test.images
        settings = {
            "networks": {str(seed): zlib.crc32(Path(path).read_bytes()) for seed, path in networks.items()},
            "images": [images.name, len(images), zlib.crc32(images.labels.cpu().numpy().tobytes())],
            "structures": list(structures), "sparsities": sorted(sparsities),
        }  # fmt: skip
        self.results: dict[str, Any] = json.loads(json.dumps({"settings": settings}))
        self.results |= {"whole": {}, "layers": {}, "right": {}, "refused": {}, "stopped": None}
        self._take_up()

    def _take_up(self) -> None:
        """What is known already: right answers by "seed, layer, structure, sparsity"."""
        file = self.out / FILE
        if not file.exists():
            return
        before, settings = read(file), self.results["settings"]
        there = before.get("settings", {})
        others = [
            seed for seed, sum_ in there.get("networks", {}).items() if settings["networks"].get(seed, sum_) != sum_
        ]
        if others or there.get("images") != settings["images"]:
            what = f"the network of seed {others[0]} is another one" if others else "the test images are others"
            raise ValueError(f"Sensitivity(): {file} is of something else: {what}; remove it, or use another folder")
        self.results |= {key: before[key] for key in ("whole", "layers", "right", "refused")}

    def run(self) -> dict[str, Any]:
        """Test what is not known yet, to the end or until SIGINT or SIGTERM.

        Returns:
            What sensitivity.json holds: "settings"; "whole": seed -> right answers of the whole network; "layers": name
            -> weights; "right": key -> [right answers, sparsity of the layer]; "refused": key without seed -> why;
            "stopped": number of the signal that stopped it, else None.
        """
        stop: list[int] = []
        with only_writer(self.out, "Sensitivity()"):
            self._take_up()
            with noted(stop.append), torch.no_grad():
                begin, done = time.monotonic(), 0
                for seed, path in self.networks.items():
                    if stop:
                        break
                    model = load(path).to(self.test.images.labels.device).eval()
                    layers = {name: m for name, m in model.named_modules() if isinstance(m, PLAIN)}
                    if str(seed) not in self.results["whole"]:
                        self.results["whole"][str(seed)] = self._right(model)
                    for name, layer in layers.items():
                        self.results["layers"][name] = layer.weight.numel()
                        done += self._prune(model, seed, name, layer, stop)
                        if stop:
                            break
                        if done and self.say.due():
                            self.say.show(
                                f"sensitivity, seed {seed}: {name}, {duration(time.monotonic() - begin)} so far"
                            )
                        write_json(self.out / FILE, self.results)
            self.results["stopped"] = stop[0] if stop else None
            self._end()
        return self.results

    def _prune(self, model: nn.Module, seed: int, name: str, layer: Any, stop: Sequence[int]) -> int:
        """One layer, with everything that is not known; returns how many tests it took."""
        weight, done = layer.weight.detach().clone(), 0
        try:
            for key, structure, sparsity in self._todo(seed, name):
                if stop:
                    break
                try:
                    options = self.options.get(structure, {})
                    mask = make_mask(weight.abs().float(), sparsity, structure=structure, **options)
                except ValueError as error:
                    self.results["refused"][key.split(", ", 1)[1]] = " ".join(str(error).split())
                    continue
                layer.weight.copy_(weight * mask)
                self.results["right"][key] = [self._right(model), 1 - float(mask.float().mean())]
                done += 1
        finally:
            layer.weight.copy_(weight)
        return done

    def _todo(self, seed: int, layer: str) -> Iterator[tuple[str, str, float]]:
        settings = self.results["settings"]
        for structure in settings["structures"]:
            for sparsity in settings["sparsities"]:
                what = f"{layer}, {structure}, {sparsity}"
                key = f"{seed}, {what}"
                if key not in self.results["right"] and what not in self.results["refused"]:
                    yield key, structure, sparsity

    def _right(self, model: nn.Module) -> int:
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in self.test.epoch())

    def _end(self) -> None:
        write_json(self.out / FILE, self.results)
        found = rows(self.results)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(found[0]) if found else ["layer"])
        writer.writeheader()
        writer.writerows(found)
        with whole_file(self.out / TABLE) as file:
            file.write(text.getvalue().encode())
        try:
            draw_sensitivity(self.out / FIGURE, found)
        except ValueError as error:
            self.say.say(f"no figure: {error}")
