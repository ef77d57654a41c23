"""The regularity study: one trained network, pruned with each kind of grain; accuracy, storage and time of each.

The study of Mao et al., Exploring the Regularity of Sparse Structure in Convolutional Neural Networks (2017): a grain
is worth the sum of |w| in it, every layer keeps the same share of its grains, and the network is trained again after
each step of pruning, from one sparsity to the next.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.sets import ImageSet
from ..formats.model import load as load_model
from ..formats.model import save
from ..formats.weights import weights_for
from ..layers.record import record_of
from ..models import build, narrow
from ..progress import duration
from ..reports.model_summary import summary
from ..reports.network_costs import costs_of
from ..reports.study_picture import draw_regularity
from ..structures.n_m import NM
from ..structures.registry import structure as make_structure
from ..surgery.conversion import densify, sparsify
from ..training.fused import as_called
from ..training.result import Diverged
from ..training.settings import Settings
from ..training.trainer import Trainer
from .folder import RESULT, RESULTS, read, read_result, read_seconds
from .regularity_table import BOUNDS, FINEST, GRAINS, line_name, narrow_names, narrow_size, rows
from .runner import Line, Runner, recorded
from .spread import mean
from .timing import interleaved, timed
from .variants import BASELINES

OPTIONS: dict[str, dict[str, Any]] = {"1xn": {"n": 8}, "n:m": {"m": 8}, "block": {"blocksize": (8, 8)}}
SPARSITIES = (0.5, 0.75, 0.875)  # those of 4:8, 2:8 and 1:8
ROUNDS = 7  # of the interleaved timing
TIMED_BATCH = 8
COSTS = ("parameters", "stream", "references", "fprop_balance", "dgrad_balance")
MODEL = "model.pt"


class Regularity(Runner):
    """Prunes one trained network with every grain to every sparsity; run again, it continues where it stopped.

        results = Regularity("runs/regularity", epochs=6).run()
        print(table(results, max_time=0.5, max_storage=0.25))

    Each grain and seed is a chain: the network trained with that seed is pruned to the lowest sparsity and retrained,
    the result is pruned to the next sparsity, and so on. Two baselines go through the same chain, of the same epochs
    at the same learning rates, without being pruned: the dense network, to which losses are relative, and narrow
    networks with as many parameters as the sparse ones of each sparsity. At each link the narrow ones and the dense one
    are a curve of accuracy over time, on which the rival of equal time is interpolated: see rival.py.

    Times are of forward + backward of the same network, `timed_width` times as wide as published, with masks of the
    same kinds and sparsities, interleaved with the dense network: networks that train in minutes have layers too small
    to show the speed of a structure.

    A link that cannot be made (a structure that does not have that sparsity, or does not fit the network) is left out,
    with the reason; the rest of its chain is trained. A study may be continued with more structures and seeds.

    The folder `out` holds results.json and table.csv, rewritten after every training, regularity.png, and a folder for
    each training with its log, its checkpoints and, when it is finished, model.pt and result.json.

    Args:
        out: folder; a new one, or that of the same study.
        structures: names of `make_mask`; 1xn, n:m and block have n = 8, m = 8 and 8x8 filters by channels here.
        model, width: as in `models.build`.
        weights: a file with the trained weights of that network; None: it is trained first.
        images: sets to train and to test with, or a name for `data.load`.
        sparsities: of the layers made sparse; pruned to from low to high.
        seeds: of the weights, of the order and augmentation of the images, and of searches for groups. With `weights`
            of training again alone.
        batch_size: images of a step.
        retrain: epochs after each pruning.
        retrain_lr: learning rate there; default: half of that before.
        timed_width: of the timed network; default: `width`.
        device: default: the GPU if there is one.
        quiet: print nothing.
        **training: see `Settings`; epochs, those of the network before it is pruned, is needed without `weights`.

    Raises:
        ValueError: options that do not fit, or a folder with another study or with something else.
    """

    who, figure, times = "Regularity()", "regularity.png", "times"
    may_grow = "structures", "seeds", "trainings"
    numbers, ended = ("seconds",), ("accuracy", "sparsity", "file", *COSTS)

    def __init__(
        self,
        out: str | os.PathLike[str],
        structures: Sequence[str] = (*BASELINES, *GRAINS),
        *,
        model: str = "resnet8",
        width: float = 1.0,
        weights: str | os.PathLike[str] | None = None,
        images: tuple[ImageSet, ImageSet] | str = "shapes",
        sparsities: Sequence[float] = SPARSITIES,
        seeds: Sequence[int] = (0, 1),
        batch_size: int = 64,
        retrain: int = 2,
        retrain_lr: float | None = None,
        timed_width: float | None = None,
        device: torch.device | str | None = None,
        quiet: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(
            out, model=model, width=width, images=images, batch_size=batch_size, device=device, quiet=quiet,
            structures=structures, sparsities=sparsities, seeds=seeds,
        )  # fmt: skip
        who = self.who
        if "dense" not in structures:
            raise ValueError(f"{who}: structures has no 'dense', which losses are relative to; add it")
        if weights is not None and "narrow" in structures:
            raise ValueError(
                f"{who}: structures has 'narrow', which is trained for as long as the network; of weights from a file"
                " that is not known: leave it out"
            )
        self.structures, self.sparsities = list(structures), sorted(sparsities)
        self.chains = [name for s in structures for name in (narrow_names(self.sparsities) if s == "narrow" else [s])]
        if weights is not None:
            training.setdefault("epochs", 1)  # not used: the network is trained already
        self.training = Settings(**training)
        assert self.training.lr is not None
        again = {"epochs": retrain, "lr": self.training.lr / 2 if retrain_lr is None else retrain_lr, "warmup": 0.0}
        self.retraining = Settings(**{**asdict(self.training), **again})
        self.timed_width = width if timed_width is None else timed_width
        self.weights = None if weights is None else weights_for(weights, build(model, width=width, **self.shape), who)
        with torch.device("meta"):
            build(model, width=self.timed_width, **self.shape)  # refuses a width
        self._batches(self.seeds[0])  # refuses a size
        asked = [(structure, sparsity) for structure in self.chains for sparsity in self.sparsities]
        settings = {
            "weights": None if self.weights is None else _checksum(self.weights), "structures": self.structures,
            "sparsities": self.sparsities, "timed_width": self.timed_width,
            "training": None if self.weights else recorded(self.training), "retraining": recorded(self.retraining),
            "learning_rates": "of every arm the same",
        }  # fmt: skip
        self._set_up(asked, settings, self.training.fuse)
        self.results["trained"] = None

    def _other_folders(self) -> list[Path]:
        return [self._trained(seed, name) for seed in self.seeds for name in ("dense", *narrow_names(self.sparsities))]

    def _take_up(self) -> None:
        super()._take_up()
        self.results[BOUNDS] = {}
        if self.results["times"] and BOUNDS in (before := read(self.out / RESULTS)):
            self.results[BOUNDS] = read_seconds(before, BOUNDS, self.out)

    def _take_times(self, found: dict[str, Any]) -> None:
        self.results["times"] = found

    def _impossible(self, structure: str, sparsity: float) -> str | None:
        """Tested by making its masks once, at random, unless it has been trained."""
        if any((self._folder(structure, sparsity, seed) / RESULT).exists() for seed in self.seeds):
            return None
        size = narrow_size(structure)
        unpruned = structure == "dense" or size is not None
        rule = None if unpruned else make_structure(structure, **OPTIONS.get(structure, {}))
        try:
            with torch.random.fork_rng():
                if size is not None:
                    self._narrow(size, 0)
                elif rule is not None:
                    if isinstance(rule, NM):
                        rule.kept(sparsity)
                    self._pruned(build(self.model, width=self.width, **self.shape), structure, sparsity, "random")
        except ValueError as error:
            return " ".join(str(error).split())
        return None

    def _prepare(self, ended: list[dict[str, Any]]) -> str | None:
        self.results["trained"] = self._trained_before(self.seeds[0], "dense")
        self.results["runs"] = ended if self.results["trained"] else []  # their values are relative to it
        self._write()
        for seed in self.seeds if self.weights is None else self.seeds[:1]:
            if stopped := self._train_first(seed, "dense"):
                return stopped
        begun = [result for seed in self.seeds if (result := self._trained_before(seed, "dense"))]
        right = mean([result["accuracy"] for result in begun if "accuracy" in result])
        self.results["trained"] = begun[0] if right is None else {**begun[0], "accuracy": right}
        self.results["runs"] = ended
        self._measure()
        return None

    def trained_networks(self) -> dict[int, Path]:
        """seed -> file of the network that its chains begin with; of weights from a file the first seed alone."""
        seeds = self.seeds if self.weights is None else self.seeds[:1]
        return {seed: self._trained(seed, "dense") / MODEL for seed in seeds}

    def _line_name(self, structure: str, sparsity: float) -> str:
        return line_name(structure, sparsity)

    def _structure_of(self, line: Line) -> str:
        return line[0] if narrow_size(line[0]) is None else "narrow"

    def _rows(self) -> list[dict[str, Any]]:
        return rows(self.results)

    def _draw_to(self, path: Path) -> None:
        draw_regularity(path, self._rows(), self.results["settings"], self.results["machine"])

    # ------------------------------------------------------------ trainings

    def _identity(self, structure: str, sparsity: float, seed: int) -> dict[str, Any]:
        return {"line": line_name(structure, sparsity), "structure": structure, "asked": sparsity, "seed": seed}

    def _trained(self, seed: int, name: str) -> Path:
        """Folder of a network before its chain: "dense", or a narrow one; from a file it is that of every seed."""
        if self.weights is not None:
            return self.out / "trained"
        return self.out / re.sub(r"[^\w.+=-]+", "-", f"{'' if name == 'dense' else name + ' '}trained seed {seed}")

    def _trained_before(self, seed: int, name: str) -> dict[str, Any] | None:
        return read_result(self._trained(seed, name), {"line": "trained"}, ("file", *COSTS))

    def _train_first(self, seed: int, name: str) -> str | None:
        """A network before its chain, in model.pt of its folder; or the signal that stopped its training."""
        folder, identity = self._trained(seed, name), {"line": "trained"}
        if self._trained_before(seed, name) is not None:
            return None
        what, size = "the network to prune" if name == "dense" else name, narrow_size(name)
        torch.manual_seed(seed)
        model = build(self.model, width=self.width, **self.shape) if size is None else self._narrow(size, seed)
        folder.mkdir(exist_ok=True)
        if self.weights is not None:
            model.load_state_dict(self.weights)
            save(model, folder / MODEL)
            ended: Any = model, {}
        else:
            ended = self._finished(model, self.training, seed, folder, identity, f"{what} seed {seed}")
        if isinstance(ended, str):
            return ended
        model, last = ended
        if last.get("diverged"):
            raise Diverged(f"Regularity.run(): {what}: {last['diverged']}")
        result = {**identity, **last, **costs_of(model, self.train.shape), "file": _size(folder)}
        self._keep(folder, result)
        if "accuracy" in result:
            self.say.say(f"{what}, seed {seed}: {result['accuracy']:.2%} in {duration(result['seconds'])}")
        return None

    def train_one(self, structure: str, sparsity: float, seed: int, head: str) -> dict[str, Any] | str:
        """One link of a chain."""
        folder, identity = self._folder(structure, sparsity, seed), self._identity(structure, sparsity, seed)
        at, settings = self.sparsities.index(sparsity), self.retraining
        earlier = [i for i in range(at) if (structure, self.sparsities[i]) in self.lines]
        since = at - earlier[-1] if earlier else at + 1  # links: the epochs of those left out are trained as well
        settings = replace(settings, epochs=since * settings.epochs)
        first = "dense" if narrow_size(structure) is None else structure
        before = self._trained(seed, first)
        if earlier:
            last = structure, self.sparsities[earlier[-1]], seed
            before = self._folder(*last)
            if (result := self._result_of(*last)) and result["accuracy"] is None:
                return self._result(folder, identity, None, {**result, **identity})  # diverged
        elif stopped := self._train_first(seed, first):
            return stopped
        model = load_model(before / MODEL)
        if structure != "dense" and first == "dense":
            model = self._pruned(densify(model), structure, sparsity, "magnitude", seed)
        ended = self._finished(model, settings, seed, folder, identity, head)
        return ended if isinstance(ended, str) else self._result(folder, identity, *ended)

    def _finished(
        self, model: nn.Module, settings: Settings, seed: int, folder: Path, identity: Mapping[str, Any], head: str
    ) -> tuple[nn.Module, dict[str, Any]] | str:
        trainer = Trainer(model, *self._batches(seed), settings, out=folder, resume=True, config=identity, quiet=True)
        return self._finish(trainer, head)

    def _result(
        self, folder: Path, identity: Mapping[str, Any], model: nn.Module | None, last: Mapping[str, Any]
    ) -> dict[str, Any]:
        result = {**identity, **last}
        if model is not None and last["accuracy"] is not None:
            record = record_of(model, required=False)
            dense = {} if record is None else record.dense
            refused = [name for name, why in dense.items() if record and why.startswith(f"{record.structure.name}: ")]
            costs = {"sparsity": summary(model).sparsity, "file": _size(folder), **costs_of(model, self.train.shape)}
            result |= {**costs, "refused": refused}
        return self._keep(folder, result)

    def _pruned(self, model: nn.Module, structure: str, sparsity: float, saliency: str, seed: int = 0) -> nn.Module:
        return sparsify(
            model, sparsity, structure=structure, distribution="uniform", saliency=saliency, seed=seed,
            **OPTIONS.get(structure, {}),
        )  # fmt: skip

    def _narrow(self, sparsity: float, seed: int, width: float | None = None) -> nn.Module:
        """A dense network with the parameters of the sparse ones."""
        sparse = build(self.model, width=self.width if width is None else width, **self.shape)
        self._pruned(sparse, FINEST, sparsity, "random")
        torch.manual_seed(seed)
        return narrow(self.model, summary(sparse).parameters, **self.shape)

    # ------------------------------------------------------------ times

    def _measure(self) -> None:
        """Seconds of forward + backward: structure by structure, its sparsities interleaved with dense."""
        images = torch.randn(TIMED_BATCH, *self.train.shape, device=self.device)
        times, bounds, begun = self.results["times"], self.results[BOUNDS], False
        for structure in self.chains:
            needed = {str(sparsity) for made, sparsity in self.lines if made == structure}
            if structure == "dense" or not needed or needed <= times.get(structure, {}).keys():
                continue
            if not begun:
                self.say.say(f"measuring {self.model} x {self.timed_width:g} on {self.results['machine']}")
                begun = True
            steps = {"dense": self._step(self._timed_network("dense", 0.0), images)}
            alike = narrow_size(structure) is not None  # at every sparsity the same network
            for sparsity in sorted(needed)[:1] if alike else sorted(needed):
                steps[sparsity] = self._step(self._timed_network(structure, float(sparsity)), images)
            found = interleaved(steps, ROUNDS, progress=self.say, what=structure)
            if alike:
                found |= dict.fromkeys(needed, found[sorted(needed)[0]])
            times[structure] = {name: timing.seconds for name, timing in found.items()}
            bounds[structure] = {f"{name} {end}": getattr(timing, end) for name, timing in found.items()
                                 for end in ("low", "high")}  # fmt: skip
            self._write()

    def _timed_network(self, structure: str, sparsity: float) -> nn.Module:
        torch.manual_seed(0)
        if (size := narrow_size(structure)) is not None:
            return self._narrow(size, 0, self.timed_width)
        model = build(self.model, width=self.timed_width, **self.shape)
        return model if structure == "dense" else self._pruned(model, structure, sparsity, "magnitude")

    def _step(self, model: nn.Module, images: torch.Tensor) -> Callable[[], float]:
        form = torch.channels_last if self.training.channels_last else torch.contiguous_format
        model, images = model.to(self.device, memory_format=form), images.to(memory_format=form)  # type: ignore[call-overload]
        run = as_called(model, self.training, self.device, self.say)

        def step() -> None:
            with self.training.autocast(self.device):
                y = run(images)
            y.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        return partial(timed, self.device, step)


def _size(folder: Path) -> int:
    return (folder / MODEL).stat().st_size


def _checksum(weights: Mapping[str, torch.Tensor]) -> int:
    sums = [(name, zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().tobytes())) for name, t in weights.items()]
    return zlib.crc32(repr(sorted(sums)).encode())
