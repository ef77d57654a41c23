"""The loop's side of masks that change while training: when a method is asked, what it is given, what becomes of it.

Every update drops what is least worth keeping and grows as much elsewhere, in the units of the structure: grains, or
the channels of a group. Layers stay as sparse as they were, so that stored blocks, gradients, optimizer state, compiled
code and CUDA graphs keep their memory; gradual magnitude pruning ("gmp") shrinks them and reallocates. With a dense
master weight (`sparsify(method=...)`) what is dropped learns on: the mask follows the weight, or is drawn ("subp").
What differs between methods is in their own files (base.py says which questions a method answers).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layers.record import record_of
from ..layers.view import SparseLayer, sparse_layers
from . import averages
from .agreement import checksum, facts, ranks, require_same
from .base import Moment
from .dense_grad import DenseGradients
from .drift import Drift, Update
from .options import STEPS
from .registry import METHODS, method_named

__all__ = ["METHODS", "Evolver", "Update"]


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

    The last three need a model made by `sparsify` with the same method, as it has to keep dense weights. Another method
    is another file in hrbp/methods; help(hrbp.methods.METHODS["rigl"]) says more of one.

    Layers that the optimizer does not hold, frozen ones (requires_grad=False at the time of an update) and, where
    gradients decide, those without one in this step (skipped, by stochastic depth for instance) keep their masks. What
    "gmp" prunes to a sparsity is the layers that can change.

    Groups (hrbp, hrbp++) keep their filters, and filters that were rearranged their places; "set" and "rigl" exchange
    channels of groups and keep their taps, "gmp" divides or sorts the filters anew at its first update.

    The dense gradient of weights that are not stored is computed for the steps that need it alone, from the inputs and
    output gradients of the layers, added up over the backward passes of a step, and over data-parallel ranks. A step
    whose gradient is not finite (an overflow of mixed precision) is made up for at the next one.

    Masks are the same on every rank: arguments, seeds and masks are compared when the Evolver is made, and the masks
    of every update before they are put in place. Every rank makes the Evolver, steps it and loads its state.

    An average of the weights that is a torch.optim.swa_utils.AveragedModel of this model follows its masks: those in
    `ema` at every update, others before their `update_parameters`. An average by hand, over a copy of the model, has
    to be in `ema`: nobody can tell it from other copies, and of stored blocks it adds up what lies in different places.

    Args:
        model: a model that `sparsify` made; may be wrapped in DistributedDataParallel or compiled. Where masks follow
            the weights, every rank takes those of rank 0.
        optimizer: the one that updates it; its state moves with the weights.
        method: one of the above, in any case: "RigL" is "rigl".
        total_steps: optimizer steps of the whole training.
        every: steps between updates (delta T), default 100. All methods but "static".
        drop: share exchanged at the start, default 0.3; falls as a cosine to zero at `until`. "set", "rigl", "hrbp".
        until: share of `total_steps` after which masks stay, default 0.75; "gmp" and "subp" arrive at their sparsity
            with the first update from there on. These and "set", "rigl", "hrbp".
        sparsity: final sparsity of "gmp", which needs one.
        decay: of "sr-ste" and "subp", default 2e-4; of "sr-ste" it may be below 0: what is left out grows.
        seed: of what "set" and "subp" draw, default 0. "rigl" and "hrbp" draw nothing, and take it as "set" does.
        ema: copies of the model that average its weights: their masks change along.
        **options: of "subp": score ("bpar" or "l1"), alpha, tau, pace ("cubic", "linear", "cosine", "exponential") and
            begin, see help(hrbp.methods.METHODS["subp"]); of a method of your own: its own.

    Raises:
        TypeError: an option that the method does not take.
        ValueError: an option out of range, steps too few for an update, or to arrive at the sparsity, a structure whose
            masks cannot change, a model in `ema` that is no copy, or what differs between ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: str = "rigl",
        *,
        total_steps: int,
        every: int | None = None,
        drop: float | None = None,
        until: float | None = None,
        sparsity: float | None = None,
        decay: float | None = None,
        seed: int | None = None,
        ema: Iterable[nn.Module] = (),
        **options: Any,
    ) -> None:
        who = "Evolver()"
        named = {"every": every, "drop": drop, "until": until, "sparsity": sparsity, "decay": decay, "seed": seed}
        given = {name: value for name, value in named.items() if value is not None} | options
        kind = METHODS.get(str(method).lower())
        told = {"method": str(method).lower(), "total_steps": total_steps} | (kind.defaults() if kind else {}) | given
        require_same(lambda: {name: repr(value) for name, value in told.items()}, who, "")
        kind = method_named(method, who)
        record = record_of(model)
        assert record is not None
        if record.method != (kind.name if kind.dense_weights else None):
            made = "without a method" if record.method is None else f"with method={record.method!r}"
            raise ValueError(
                f"{who}: method is {kind.name!r} and the model was made by sparsify() {made}; they need the same"
            )
        if reason := kind.refuses(record.structure):
            raise ValueError(f"{who}: {reason}")
        if reason := kind.refuses_options(given):
            raise TypeError(f"{who}: {reason}")
        try:
            self.total_steps: int = STEPS.taken(total_steps)
        except (TypeError, ValueError):
            raise ValueError(f"{who}: total_steps is {total_steps!r}; it needs {STEPS.needs}") from None
        self._method = kind(**given)
        self._method.check_steps(self.total_steps)
        self.model, self.optimizer, self.method, self.record = model, optimizer, kind.name, record
        self.every, self.drop, self.until, self.sparsity, self.decay, self.seed = (
            getattr(self._method, name, None) for name in named
        )
        self.ema = list(ema)
        self.steps = 0
        self._state: dict[str, Any] = {}
        self._overdue = False
        self._dense: DenseGradients | None = None
        self._copies_seen = 0
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.layers = {name: layer for name, layer in sparse_layers(model).items() if id(layer.parameter) in held}
        if not self.layers:
            raise ValueError(f"{who}: the optimizer updates no sparse layer; make it after sparsify()")
        if kind.changes:
            for layer in self.layers.values():
                layer.check(model, optimizer, who)
        averages.check(self.ema, self.layers, who)
        if kind.follows_weight and ranks() > 1:
            for layer in self.layers.values():
                dist.broadcast(layer.parameter.detach(), 0)
        remedy = "; give sparsify() the same arguments, seed and scores everywhere"
        require_same(lambda: facts(self.record, self.layers), who, remedy)
        self._initial = self._sparsity_of_live()
        self._method.check(self._now())
        self._attached = self._method.attach(model, self._now(), optimizer)
        self._drift = Drift(self.layers)
        self._register_hooks()

    # ------------------------------------------------------------------ the loop's side

    def wants_dense_grad(self) -> bool:
        """Whether the next `step` needs dense gradients.

        A CUDA graph captured at another step does not gather them: run the model itself at such a step. A compiled
        model is compiled once more for these steps; running the model itself saves that.
        """
        return self._method.needs_gradient and self._is_due(self.steps + 1)

    def step(self) -> Update | None:
        """Call after every optimizer.step(), before gradients are cleared; changes the masks when it is time to."""
        self.steps += 1
        if self._copies_seen != self.record.lineage.made and self._method.changes and not self._method.follows_weight:
            self._copies_seen = self.record.lineage.made
            averages.follow(self.model, self.ema)
        try:
            return self._update() if self._is_due(self.steps) else None
        finally:
            self._register_hooks()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimizer's own state."""
        own = {"own": dict(self._state)} if self._state else {}  # what the method keeps
        return {
            "method": self.method, "steps": self.steps, "overdue": self._overdue, "initial": self._initial,
            "first": self._drift.first, "last": self._drift.last, **own,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the model and the optimizer first."""
        if state.get("method") != self.method:
            raise ValueError(
                f"Evolver.load_state_dict(): the state is of method {state.get('method')!r}; this is {self.method!r}"
            )
        self.steps, self._overdue, self._initial = int(state["steps"]), bool(state["overdue"]), float(state["initial"])
        self._drift.first, self._drift.last = dict(state["first"]), dict(state["last"])
        self._state = dict(state.get("own", {}))
        self._copies_seen = 0
        position = {"the step of the state": str(self.steps), "an update that is due": str(self._overdue)}
        who, remedy = "Evolver.load_state_dict()", "; load the same state everywhere"
        require_same(lambda: position | facts(self.record, self.layers), who, remedy)
        self._register_hooks()

    # ------------------------------------------------------------------ when

    def _is_due(self, step: int) -> bool:
        return self._method.due(step, self.total_steps, self._overdue)

    # ------------------------------------------------------------------ dense gradients

    def _register_hooks(self) -> None:
        """Gather dense gradients in the coming step if it needs them."""
        if self._dense is not None:
            self._dense.close()
        self._dense = DenseGradients(self._live()) if self.wants_dense_grad() else None

    def _gathered(self) -> dict[str, Tensor] | None:
        """layer -> |dense gradient| over all ranks, of the layers that have one; None where one is not finite."""
        assert self._dense is not None
        live, sums = self._live(), self._dense.sums()
        found = [name in sums and name in live for name in self.layers]
        if ranks() > 1:  # each may have skipped other layers
            anywhere = torch.tensor(found, dtype=torch.int32, device=next(iter(self.layers.values())).parameter.device)
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
            found = [bool(there) for there in anywhere.tolist()]
        if live and not any(found):
            raise RuntimeError(
                f"Evolver.step(): no dense gradient of {', '.join(list(live)[:3])}, or of any other layer; where"
                " wants_dense_grad() is true, run forward and backward through the model itself before step(), not a"
                " CUDA graph of another step"
            )
        grads = {}
        for name in (name for name, there in zip(self.layers, found, strict=True) if there):
            if name not in sums:
                layer = self.layers[name]
                dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
                sums[name] = torch.zeros(layer.shape, dtype=dtype, device=layer.parameter.device)
            if ranks() > 1:
                dist.all_reduce(sums[name])
            grads[name] = sums[name]
        if not all(bool(torch.isfinite(grad).all()) for grad in grads.values()):
            return None
        return {name: grad.abs_() for name, grad in grads.items()}

    # ------------------------------------------------------------------ what

    def _live(self) -> dict[str, SparseLayer]:
        """The layers that can change now: those that are not frozen."""
        return {name: layer for name, layer in self.layers.items() if layer.parameter.requires_grad}

    def _now(self, gradients: dict[str, Tensor] | None = None) -> Moment:
        """What the method sees."""
        return Moment(
            self.steps, self.total_steps, self.record, self.layers, self._live(), self._initial, gradients, self._state
        )

    def _sparsity_of_live(self) -> float:
        layers = self._live() or self.layers
        kept = sum(layer.kept() for layer in layers.values())
        return 1 - kept / sum(math.prod(layer.shape) for layer in layers.values())

    def _update(self) -> Update | None:
        who, remedy = f"Evolver.step(), step {self.steps}", "; their weights must have diverged before"
        if self._method.follows_weight:
            update, now = self._drift.update(self.steps, reallocated=False), self._drift.last
            require_same(lambda: {f"the mask of {n!r}": checksum(bits) for n, bits in now.items()}, who, remedy)
            return update
        grads = None
        if self._method.needs_gradient:
            grads = self._gathered()
            self._overdue = grads is None
            if grads is None:
                return None
        selections = self._method.selections(self._now(grads))
        require_same(
            lambda: {f"the new mask of {n!r}": checksum(c.mask, c.row_order) for n, c in selections.items()},
            who,
            remedy,
        )
        in_place = True
        copies = [sparse_layers(model) for model in self.ema]
        for name, selection in selections.items():
            in_place &= self.layers[name].set(selection, self.optimizer)
            for copy in copies:
                copy[name].set(selection)
        return self._drift.update(self.steps, reallocated=not in_place)
