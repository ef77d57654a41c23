"""How a mask changes while training: SET, RigL, HRBP's own update, gradual pruning, STE, SR-STE, SUBP.

Every update drops what is least worth keeping and grows as much elsewhere, in the units of the structure: grains, or
the channels of a group. Layers stay as sparse as they were, so that stored blocks, gradients, optimizer state, compiled
code and CUDA graphs keep their memory; gradual magnitude pruning ("gmp") shrinks them and reallocates. With a dense
master weight (`sparsify(method=...)`) what is dropped learns on: the mask follows the weight, or is drawn ("subp").
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .choose import balanced, top
from .decay import Decay
from .density import densities
from .master import dense_gradient, symmetric_padding
from .regroup import Grouping, keep_by_counts
from .sparsify import FOLLOWING, SparseLayer, plan_of, sparse_layers
from .sparsify import METHODS as MASTER_METHODS
from .structure import Choice, Grains, Groups, grouping_choice, sparsity_of
from .subp import SoftPruning, pruned_share

METHODS = ("static", "set", "rigl", "hrbp", "gmp", "ste", "sr-ste", "subp")
ARRIVING = ("gmp", "subp")  # whose sparsity rises until it is final
DECAY = 2e-4  # lambda of Zhou et al. (2021)
DECAYING = ("sr-ste", "subp")


@dataclass(frozen=True)
class Update:
    """One change of the masks, or, where they follow the weights, what has changed since the last look.

    changed      layer -> share of the weights kept now that were not kept before
    reallocated  tensors have new memory: CUDA graphs and DistributedDataParallel made before must be made again
    sad          layer -> sum |E_now - E_before|: cells of the mask E that are not as they were at the update before, or
                 at the start (Zhou et al., ICLR 2021)
    drift        layer -> sum |E_now - E_start|
    """

    step: int
    changed: dict[str, float]
    reallocated: bool
    sad: dict[str, int]
    drift: dict[str, int]


class Evolver:
    """Changes the masks of a sparse model while it trains, from a loop of your own.

        evolver = Evolver(model, optimizer, "rigl", total_steps=10_000)
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            evolver.step()
            optimizer.zero_grad()

    Methods, for a layer of which a share `drop` of the kept units is exchanged (SET, RigL: units are the structure's):

    - "static": no change.
    - "set": the units of least |weight| go, random ones come (Mocanu et al., 2018).
    - "rigl": the units of least |weight| go, those of largest |gradient| come (Evci et al., 2020).
    - "hrbp": in every filter the weights of least |weight| go and those of largest |gradient| come, one by one; then
      each group chooses its channels and taps anew by counts (Ma et al., 2024, section 4.2). Groups only. New weights
      have to agree on a channel to outnumber an old one there, which is rare: "rigl" moves far more.
    - "gmp": gradual magnitude pruning to `sparsity`, from a model made sparse at a lower one, 0 for instance:
      sparsity(t) = final + (initial - final) * (1 - t / end)^3 (Zhu and Gupta, 2017).
    - "ste": the mask is that of the largest |weight|, anew at every step; what is left out learns on, from the gradient
      that it would have (straight-through).
    - "sr-ste": so, and what is left out decays, W <- W - lr * (g + decay * (1 - E) * W): masks settle (Zhou et al.,
      2021). See decay.py. Every `every` steps, to the end, it is looked how far the masks have come.
    - "subp": soft uniform block pruning of 1xn blocks (Xiang et al., NeurIPS 2023). Every n filters drop their
      worst blocks, equally many, and draw some of them back, ever fewer, as the sparsity rises from 0 at `begin` to
      that of `sparsify` at `until`: see subp.py. What is left out learns on and decays, as with "sr-ste". In its paper
      an update comes every epoch.

    The last three need a model made by `sparsify` with the same method, as it has to keep dense weights.

    Groups (hrbp, hrbp++) keep their filters, and filters that were rearranged their places; "set" and "rigl" exchange
    channels of groups and keep their taps, "gmp" divides or sorts the filters anew at its first update.

    The dense gradient of weights that are not stored is computed for the steps that need it alone, from the inputs and
    output gradients of the layers, added up over the backward passes of a step, and over data-parallel ranks. Masks
    are the same on every rank. A step whose gradient is not finite (an overflow of mixed precision) is made up for at
    the next one.

    Args:
        model: a model that `sparsify` made; may be wrapped in DistributedDataParallel. Where masks follow the weights,
            every rank takes those of rank 0.
        optimizer: the one that updates it; its state moves with the weights.
        method: one of the above.
        total_steps: optimizer steps of the whole training.
        every: steps between updates (delta T).
        drop: share exchanged at the start; falls as a cosine to zero at `until`.
        until: share of `total_steps` after which masks stay.
        sparsity: final sparsity of "gmp".
        decay: of "sr-ste" and "subp"; default: 2e-4.
        seed: of random growth.
        ema: copies of the model that average its weights: their masks change along.
        **options: of "subp": score, alpha, tau, pace, begin; see `SoftPruning` in subp.py.

    Raises:
        TypeError: an option that the method does not have.
        ValueError: an option out of range, a structure whose masks cannot change, or masks that differ between ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: str = "rigl",
        *,
        total_steps: int,
        every: int = 100,
        drop: float = 0.3,
        until: float = 0.75,
        sparsity: float | None = None,
        decay: float | None = None,
        seed: int = 0,
        ema: Iterable[nn.Module] = (),
        **options: Any,
    ) -> None:
        who = "Evolver()"
        if method not in METHODS:
            raise ValueError(f"{who}: method is {method!r}; it needs one of {', '.join(METHODS)}")
        for name, value, least in (("total_steps", total_steps, 1), ("every", every, 1)):
            if value < least:
                raise ValueError(f"{who}: {name} is {value}; it needs an integer >= {least}")
        for name, share in (("drop", drop), ("until", until)):
            if not 0 <= share <= 1:
                raise ValueError(f"{who}: {name} is {share}; it needs a number in [0, 1]")
        if (method == "gmp") != (sparsity is not None):
            raise ValueError(f"{who}: sparsity is {sparsity!r} with method {method!r}; 'gmp' needs one, others none")
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError(f"{who}: sparsity is {sparsity}; it needs a number in [0, 1)")
        if decay is not None and not (method in DECAYING and 0 <= decay < math.inf):
            takes = " and ".join(map(repr, DECAYING))
            raise ValueError(f"{who}: decay is {decay} with method {method!r}; {takes} take a number >= 0, others none")
        known = [field.name for field in fields(SoftPruning)] if method == "subp" else []
        if unknown := sorted(set(options) - set(known)):
            has = ", ".join(known) or "none"
            raise TypeError(f"{who}: method {method!r} has no option {', '.join(unknown)}; those of its own are: {has}")
        self._soft = SoftPruning(**options)
        if method == "subp":
            if self._soft.begin > until:
                raise ValueError(f"{who}: begin is {self._soft.begin} and until {until}; it needs begin <= until")
            if (arrives := every * max(1, math.ceil(until * total_steps / every))) > total_steps:
                raise ValueError(
                    f"{who}: 'subp' reaches its sparsity at step {arrives}, the first multiple of every = {every} from"
                    f" until = {until} on; it needs one of the {total_steps} steps: lower until or every"
                )
        plan = plan_of(model)
        assert plan is not None
        if plan.method != (method if method in MASTER_METHODS else None):
            made = "without a method" if plan.method is None else f"with method={plan.method!r}"
            raise ValueError(
                f"{who}: method is {method!r} and the model was made by sparsify() {made}; they need the same"
            )
        if method not in ("static", *FOLLOWING) and not isinstance(plan.structure, Grains | Groups):
            raise ValueError(f"{who}: masks of structure {plan.structure.name!r} do not change; use method='static'")
        if method == "hrbp" and not isinstance(plan.structure, Groups):
            raise ValueError(
                f"{who}: method 'hrbp' updates groups; the structure is {plan.structure.name!r}; use 'rigl'"
            )
        self.model, self.optimizer, self.method, self.plan = model, optimizer, method, plan
        self.total_steps, self.every, self.drop, self.until = total_steps, every, drop, until
        self.sparsity, self.seed = sparsity, seed
        self.ema = list(ema)
        self.steps = 0
        self._grows_by_gradient = method in ("rigl", "hrbp")
        self._overdue = False
        self._grads: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = sparse_layers(model)
        self.layers = {name: layer for name, layer in layers.items() if id(layer.parameter) in held}
        if not self.layers:
            raise ValueError(f"{who}: the optimizer updates no sparse layer; make it after sparsify()")
        if method != "static":
            for layer in self.layers.values():
                layer.check(model, optimizer, who)
        self._initial = 1 - sum(_kept(layer) for layer in layers.values()) / sum(
            math.prod(layer.shape) for layer in layers.values()
        )
        if sparsity is not None and sparsity < self._initial - 1e-6:
            raise ValueError(
                f"{who}: the model is {self._initial:.4f} sparse already; 'gmp' to {sparsity} cannot grow it"
            )
        if method in FOLLOWING and _ranks() > 1:
            for layer in self.layers.values():
                dist.broadcast(layer.parameter.detach(), 0)
        _check_ranks(self.layers, who)
        self._decay = None
        if method in DECAYING:
            self._decay = Decay(model, self.layers.values(), optimizer, DECAY if decay is None else decay)
        self._first = self._last = self._bits()
        self._arm()

    # ------------------------------------------------------------------ the loop's side

    def wants_dense_grad(self) -> bool:
        """Whether the next `step` needs dense gradients: this forward and backward must run the module itself.

        Compiled code and CUDA graphs made at other steps do not gather them: call the uncompiled model at such a step.
        """
        return self._grows_by_gradient and self._is_due(self.steps + 1)

    def step(self) -> Update | None:
        """Call after every optimizer.step(), before gradients are cleared; changes the masks when it is time to."""
        self.steps += 1
        try:
            return self._update() if self._is_due(self.steps) else None
        finally:
            self._arm()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimizer's own state."""
        return {
            "method": self.method, "steps": self.steps, "overdue": self._overdue, "initial": self._initial,
            "first": self._first, "last": self._last,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the model and the optimizer first."""
        if state.get("method") != self.method:
            raise ValueError(
                f"Evolver.load_state_dict(): the state is of method {state.get('method')!r}; this is {self.method!r}"
            )
        self.steps, self._overdue, self._initial = int(state["steps"]), bool(state["overdue"]), float(state["initial"])
        self._first, self._last = dict(state["first"]), dict(state["last"])
        self._arm()

    # ------------------------------------------------------------------ when

    def _is_due(self, step: int) -> bool:
        if self.method == "static":
            return False
        if self.method in FOLLOWING:
            return step % self.every == 0
        # Once more at the end or past it, where a schedule arrives.
        last = self.until * self.total_steps + (self.every if self.method in ARRIVING else 0)
        return self._overdue or (step % self.every == 0 and step < last)

    def _share(self) -> float:
        """The share to exchange now: drop / 2 * (1 + cos(pi * t / end))."""
        end = max(1.0, self.until * self.total_steps)
        return self.drop / 2 * (1 + math.cos(math.pi * min(1.0, self.steps / end)))

    def _sparsity_now(self) -> float:
        assert self.sparsity is not None
        left = 1 - min(1.0, self.steps / max(1.0, self.until * self.total_steps))
        return self.sparsity + (self._initial - self.sparsity) * left**3

    # ------------------------------------------------------------------ dense gradients

    def _arm(self) -> None:
        """Gather dense gradients in the coming step if it needs them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._grads = [], {}
        if self.wants_dense_grad():
            self._hooks = [
                layer.module.register_forward_hook(partial(self._watch, layer)) for layer in self.layers.values()
            ]

    def _watch(self, layer: SparseLayer, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(partial(self._gather, layer, args[0].detach()))

    def _gather(self, layer: SparseLayer, x: Tensor, dy: Tensor) -> None:
        grad = _dense_gradient(layer, x, dy.detach())
        so_far = self._grads.get(layer.name)
        self._grads[layer.name] = grad if so_far is None else so_far.add_(grad)

    def _gathered(self) -> dict[str, Tensor] | None:
        """layer -> |dense gradient| over all ranks; None where one is not finite."""
        missing = [name for name in self.layers if name not in self._grads]
        if missing:
            raise RuntimeError(
                f"Evolver.step(): no dense gradient of {', '.join(missing[:3])}; where wants_dense_grad() is true, run "
                "forward and backward through the uncompiled model, every sparse layer of it, before step()"
            )
        for name in self.layers:
            if _ranks() > 1:
                dist.all_reduce(self._grads[name])
        if not all(bool(torch.isfinite(grad).all()) for grad in self._grads.values()):
            return None
        return {name: grad.abs_() for name, grad in self._grads.items()}

    # ------------------------------------------------------------------ what

    def _update(self) -> Update | None:
        if self.method in FOLLOWING:
            return self._told(reallocated=False)
        grads = None
        if self._grows_by_gradient:
            grads = self._gathered()
            self._overdue = grads is None
            if grads is None:
                return None
        if self.method == "subp":
            choices = self._softly_pruned()
        else:
            choices = self._pruned() if self.method == "gmp" else self._exchanged(grads)
        in_place = True
        averages = [sparse_layers(model) for model in self.ema]
        for name, choice in choices.items():
            in_place &= self.layers[name].set(choice, self.optimizer)
            for average in averages:
                average[name].set(choice)
        return self._told(reallocated=not in_place)

    def _told(self, reallocated: bool) -> Update:
        """What has become of the masks since the last time."""
        before, self._last = self._last, self._bits()
        changed, sad, drift = {}, {}, {}
        for name, now in self._last.items():
            changed[name] = _ones(now & ~before[name]) / max(1, _ones(now))
            sad[name], drift[name] = _ones(now ^ before[name]), _ones(now ^ self._first[name])
        return Update(self.steps, changed, reallocated, sad, drift)

    def _bits(self) -> dict[str, Tensor]:
        """layer -> its mask, eight cells a byte."""
        return {n: torch.from_numpy(np.packbits(layer.mask().cpu().numpy())) for n, layer in self.layers.items()}

    def _exchanged(self, grads: dict[str, Tensor] | None) -> dict[str, Choice]:
        choices = {}
        for i, (name, layer) in enumerate(self.layers.items()):
            weight = layer.weight().abs().float()
            if grads is None:
                generator = torch.Generator().manual_seed(self._seed_of(i))
                growth = torch.rand(layer.shape, generator=generator).to(weight.device)
            else:
                growth = grads[name]
            choices[name] = _exchange(self.plan.structure, layer, weight, growth, self._share(), self.method == "hrbp")
        return choices

    def _seed_of(self, layer: int) -> int:
        """Of what is drawn for a layer at this step, on every rank."""
        return ((self.seed * 1_000_003 + self.steps) * 1_000_003 + layer) % 2**63

    def _softly_pruned(self) -> dict[str, Choice]:
        rule = self.plan.structure
        assert isinstance(rule, Grains)
        assert rule.box[0] is not None
        # An epoch of the paper is what lies between two updates.
        now, epochs = self.steps / self.every, self.total_steps / self.every
        begin, end = self._soft.begin * epochs, self.until * epochs
        choices = {}
        for i, (name, layer) in enumerate(self.layers.items()):
            sparsity, order = self.plan.target[name], layer.row_order()
            pruned = pruned_share(now, begin, end, sparsity, self._soft.pace)
            weight = layer.parameter.detach().view(layer.shape)
            kept = self._soft.kept(weight, rule.box[0], sparsity, pruned, self._seed_of(i), order)
            choices[name] = rule.choice(kept[:, :, None, None], layer.shape, order)
        return choices

    def _pruned(self) -> dict[str, Choice]:
        rule = self.plan.structure
        shapes = {name: layer.shape for name, layer in self.layers.items()}
        scores = {name: layer.weight().abs().float() for name, layer in self.layers.items()}
        first = self.steps <= self.every
        orders = {name: None if first else layer.row_order() for name, layer in self.layers.items()}
        asked = densities(
            shapes,
            self._sparsity_now(),
            self.plan.distribution,
            scores={name: rule.ranked(score, orders[name]) for name, score in scores.items()},
            realise=lambda name, density: rule.density(shapes[name], density),
        )
        choices = {}
        for name, layer in self.layers.items():
            sparsity = sparsity_of(asked[name])
            if isinstance(rule, Groups):
                choices[name] = _pruned_groups(rule, layer, scores[name], sparsity, regroup_rows=first)
            else:
                assert isinstance(rule, Grains)
                choices[name] = rule.choose(scores[name], sparsity, order=orders[name])
        return choices


# ---------------------------------------------------------------------- one layer


def _exchange(rule: Any, layer: SparseLayer, weight: Tensor, growth: Tensor, share: float, one_by_one: bool) -> Choice:
    """The new choice when `share` of a layer's units go by `weight` and as many come by `growth`, both [K, C, R, S]."""
    if isinstance(rule, Groups):
        grouping = rule.grouping(layer.mask(), layer.row_order())
        if one_by_one:
            return grouping_choice(_recounted(grouping, weight, growth, share))
        return grouping_choice(_exchanged_channels(grouping, weight, growth, share, rule.balanced))
    assert isinstance(rule, Grains)
    order = layer.row_order()
    kept, worth, wish = (rule.sums(t, order) for t in (layer.mask().float(), weight, growth))
    shape = kept.shape
    kept, worth, wish = (t.flatten(1) if rule.uniform else t.view(1, -1) for t in (kept > 0, worth, wish))
    return rule.choice(_swap_units(kept, worth, wish, share).view(shape), layer.shape, order)


def _swap_units(kept: Tensor, worth: Tensor, wish: Tensor, share: float) -> Tensor:
    """bool [rows, units]: in each row, `share` of the kept units go, those worth least, and as many come, most wished.

    A unit that goes may come back at once, as in RigL. Rows keep equally many units.
    """
    stay, go = _staying(kept, worth, share)
    return stay | top(wish.masked_fill(stay, -math.inf), go)


def _staying(kept: Tensor, worth: Tensor, share: float) -> tuple[Tensor, int]:
    """Which units stay, and how many go in each row: never more than there are others to come."""
    count = int(kept[0].sum())
    go = min(round(share * count), kept.shape[1] - count)
    return top(worth.masked_fill(~kept, -math.inf), count - go), go


def _in_groups(grouping: Grouping, cells: Tensor) -> Tensor:
    """[K, C, R, S] as [groups, rows, C, R*S]."""
    return cells.flatten(2)[grouping.row_order].view(grouping.groups, grouping.rows, cells.shape[1], -1)


def _exchanged_channels(grouping: Grouping, weight: Tensor, growth: Tensor, share: float, fair: bool) -> Grouping:
    """Every group exchanges runs of channels, and keeps its taps."""
    _, c, r, s = grouping.shape
    taps = torch.zeros(grouping.groups, r * s, device=weight.device)
    taps.scatter_(1, grouping.taps, 1.0)
    kept = torch.zeros(grouping.groups, c, dtype=torch.bool, device=weight.device)
    kept.scatter_(1, grouping.channels, True)

    def runs(t: Tensor) -> Tensor:
        return t.view(grouping.groups, -1, grouping.granule).sum(2)

    worth, wish = (runs(torch.einsum("grcp,gp->gc", _in_groups(grouping, t.float()), taps)) for t in (weight, growth))
    was = runs(kept.float()) > 0
    if fair:
        # Those that stay are worth more than any that may come, which keeps them: the old choice was fair, too.
        stay, _ = _staying(was, worth, share)
        wish = wish / wish.max().clamp_min(1e-30)
        value = torch.where(stay, 2.0 + grouping.groups * was.shape[1], wish.double())
        chosen = balanced(value[None], int(was[0].sum()))[0]
    else:
        chosen = _swap_units(was, worth, wish, share)
    starts = chosen.nonzero()[:, 1].view(grouping.groups, -1, 1) * grouping.granule
    channels = (starts + torch.arange(grouping.granule, device=starts.device)).flatten(1)
    return Grouping(grouping.shape, grouping.row_order, channels, grouping.taps, grouping.granule)


def _recounted(grouping: Grouping, weight: Tensor, growth: Tensor, share: float) -> Grouping:
    """HRBP's update: every filter exchanges single weights, then each group counts."""
    mask, worth, wish = (
        _in_groups(grouping, t).flatten(2).flatten(0, 1) for t in (grouping.mask(), weight, growth.float())
    )
    cells = _swap_units(mask, worth, wish, share).view(grouping.groups, grouping.rows, grouping.shape[1], -1)
    k, p = grouping.channels.shape[1], grouping.taps.shape[1]
    chosen = [keep_by_counts(group, k, p, grouping.granule) for group in cells]
    channels, taps = (torch.stack(lists) for lists in zip(*chosen, strict=True))
    return Grouping(grouping.shape, grouping.row_order, channels, taps, grouping.granule)


def _pruned_groups(rule: Groups, layer: SparseLayer, score: Tensor, sparsity: float, regroup_rows: bool) -> Choice:
    """Fewer channels and taps; rows are divided anew at the first time only, as that moves everything."""
    if regroup_rows:
        return rule.choose(score, sparsity)
    size = rule.size(layer.shape, sparsity)
    grouping = rule.grouping(layer.mask(), layer.row_order())
    sums = _in_groups(grouping, score).sum(1)
    taps = top(sums.sum(1), size.taps)
    for _ in range(2):
        runs = (sums * taps[:, None]).sum(2).view(grouping.groups, -1, rule.granule).sum(2)
        count = size.channels // rule.granule
        chosen = balanced(runs[None], count)[0] if rule.balanced else top(runs, count)
        channels = chosen.repeat_interleave(rule.granule, 1)
        taps = top((sums * channels[..., None]).sum(1), size.taps)
    kept_channels, kept_taps = (t.nonzero()[:, 1].view(grouping.groups, -1) for t in (channels, taps))
    return grouping_choice(Grouping(grouping.shape, grouping.row_order, kept_channels, kept_taps, rule.granule))


def _dense_gradient(layer: SparseLayer, x: Tensor, dy: Tensor) -> Tensor:
    """dL/dW [K, C, R, S] of a layer, of all its weights, stored or not; float32 at least."""
    module = layer.module
    if not hasattr(module, "stride"):
        return dense_gradient(x, dy, layer.shape[:2], None).view(layer.shape)
    padding = symmetric_padding(module) if isinstance(module, nn.Conv2d) else module.padding
    return dense_gradient(x, dy, layer.shape, (module.stride, padding, module.dilation))


# ---------------------------------------------------------------------- ranks


def _ones(bits: Tensor) -> int:
    return int(np.unpackbits(bits.numpy()).sum())


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _kept(layer: SparseLayer) -> int:
    return layer.parameter.numel() if layer.blocks else int(layer.mask().sum())


def _check_ranks(layers: dict[str, SparseLayer], who: str) -> None:
    """Refuse masks that differ between data-parallel ranks: they would average gradients of different weights."""
    if _ranks() == 1:
        return
    mine = {name: zlib.crc32(layer.mask().cpu().numpy().tobytes()) for name, layer in layers.items()}
    all_ranks: list[Any] = [None] * _ranks()
    dist.all_gather_object(all_ranks, mine)
    for rank, theirs in enumerate(all_ranks):
        if theirs != mine:
            raise ValueError(
                f"{who}: the masks of rank {rank} differ; give sparsify() the same seed and scores everywhere"
            )
