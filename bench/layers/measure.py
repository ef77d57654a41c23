"""Measures one layer: builds patterns and contenders, checks them, times them interleaved, and makes the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import blocksparse as bs
from bench.layers import contenders
from bench.layers.contenders import LAYOUTS, Contender, NotApplicable, Problem, Truth
from bench.layers.networks import Layer
from bench.layers.patterns import Blocksize, Structure, build
from bench.layers.rows import BASELINES, KINDS, TOTAL, LayerRow, least_bytes
from bench.shared.ceilings import Ceilings
from bench.shared.clocks import Clock, Lap, Rounds, interleave
from bench.shared.equal import Verdict, judge
from bench.shared.kernels import kernels_of
from bench.shared.memory import CpuMemory, CudaMemory
from bench.shared.rows import ABSENT, ERROR, FAIL, OK, REFUSED, Row, Times


@dataclass(frozen=True)
class Options:
    """What is measured for every layer. backends: None lets the library choose."""

    batch: int
    dtype: torch.dtype
    device: torch.device
    kinds: tuple[str, ...] = KINDS  # that run
    report: tuple[str, ...] = (*KINDS, TOTAL)  # that get a row
    blocksizes: tuple[Blocksize, ...] = (Blocksize(32, 32),)
    sparsities: tuple[float, ...] = (0.9,)
    backends: tuple[str | None, ...] = (None,)
    structure: Structure = field(default_factory=Structure)
    rounds: Rounds = field(default_factory=Rounds)
    seed: int = 0


CaseKey = tuple[object, ...]
WARM = Rounds(5, 5)  # with warm caches, on a GPU


@dataclass
class Entry:
    """A contender and what was measured of it. Entries of one case are variants, of which the best counts."""

    contender: Contender
    case: CaseKey
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)  # kind -> (status, reason)
    laps: dict[str, list[Lap]] = field(default_factory=dict)
    extra_bytes: dict[str, int | None] = field(default_factory=dict)
    warm_ms: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, list[str]] = field(default_factory=dict)

    def runs(self, kind: str) -> bool:
        return kind in self.contender.calls and kind not in self.failures


@dataclass
class Case:
    """One pattern of a layer and its contenders, or why there are none."""

    block: Blocksize
    sparsity: float
    pattern: bs.BSRPattern | None = None
    plans: dict[tuple[str | None, str], bs.ConvPlan] = field(default_factory=dict)  # (backend, memory format)
    refused: dict[str | None, str] = field(default_factory=dict)  # backend -> why
    keys: dict[str, CaseKey] = field(default_factory=dict)  # baseline -> its entries
    absent: dict[str, str] = field(default_factory=dict)  # baseline -> why not


class LayerBench:
    """Measures layers under fixed options, clock and ceilings."""

    def __init__(self, options: Options, clock: Clock, memory: CpuMemory | CudaMemory, ceilings: Ceilings) -> None:
        self.options, self.clock, self.memory, self.ceilings = options, clock, memory, ceilings

    def run(self, layer: Layer, deadline: Callable[[], float]) -> list[LayerRow]:
        """All rows of one layer; `deadline`, asked after the checks: until when repetitions go on (perf_counter)."""
        options = self.options
        generator = torch.Generator().manual_seed(options.seed)
        problem = Problem(layer, options.batch, options.dtype, options.device, generator)
        entries: list[Entry] = []
        cases = []
        for block in options.blocksizes:
            for sparsity in options.sparsities:
                cases.append(self._case(problem, block, sparsity, entries))
        self._measure_memory(entries)
        self._time(entries, deadline())
        return [
            self._row(layer, case, entries, backend, kind)
            for case in cases
            for backend in options.backends
            for kind in options.report
        ]

    # ------------------------------------------------------------ before the clock runs

    def _case(self, problem: Problem, block: Blocksize, sparsity: float, entries: list[Entry]) -> Case:
        """Builds the pattern, checks its contenders and adds them to `entries`."""
        case, layer, options = Case(block, sparsity), problem.layer, self.options
        try:
            pattern = build(layer.shape, block, options.structure, sparsity, problem.generator)
        except ValueError as error:
            case.refused = dict.fromkeys(options.backends, str(error))
            return case
        case.pattern = pattern = pattern.to(options.device)
        fan_in = pattern.density * layer.weights / layer.k
        values = problem.draw((pattern.nnzb, *pattern.blocksize), fan_in**-0.5)
        for backend in options.backends:
            try:
                for layout in LAYOUTS:
                    case.plans[backend, layout] = bs.explain(
                        problem.x[layout], values, pattern, layer.stride, layer.padding, backend=backend
                    )
            except (ValueError, RuntimeError) as error:
                case.refused[backend] = str(error)
        if case.plans:
            try:
                truth = Truth.of(problem, pattern.to_dense(values), options.kinds)
            except RuntimeError as error:  # out of memory, or a dtype that PyTorch cannot convolve here
                case.plans = {}
                case.refused = dict.fromkeys(options.backends, f"cannot be checked against dense: {error}")
                return case
            new = self._contenders(problem, case, pattern, values, {entry.case for entry in entries})
            for entry in new:
                self._check(entry, truth)
            entries += new
        return case

    def _contenders(
        self, problem: Problem, case: Case, pattern: bs.BSRPattern, values: Tensor, known: set[CaseKey]
    ) -> list[Entry]:
        """The contenders of this pattern, without those `known` from an earlier pattern of the layer."""
        layer, entries = problem.layer, []
        for backend, layout in case.plans:
            contender = contenders.sparse(problem, pattern, values, layout, backend)
            entries.append(Entry(contender, _sparse_key(case, backend)))
        narrow = contenders.narrow_sizes(layer.c, layer.k, pattern.density)
        case.keys = {
            "dense": ("dense",),
            "grouped": ("grouped", id(case)),
            "torch_bsr": ("torch_bsr", id(case)),
            "narrow": ("narrow", *narrow),
        }
        ways = ("linear", "matmul") if problem.device.type == "cuda" else ("matmul",)
        builders: dict[str, list[Callable[[], Contender]]] = {
            "dense": [partial(contenders.dense, problem, v) for v in LAYOUTS],
            "grouped": [partial(contenders.grouped, problem, pattern, values, v) for v in LAYOUTS],
            "torch_bsr": [partial(contenders.torch_bsr, problem, pattern, values, v) for v in ways],
            "narrow": [partial(contenders.narrow, problem, pattern.density, v) for v in LAYOUTS],
        }
        if problem.device.type == "cuda":
            builders["dense"].append(partial(contenders.matmul, problem))
        for role, variants in builders.items():
            if case.keys[role] in known:
                continue
            for variant in variants:
                try:
                    entries.append(Entry(variant(), case.keys[role]))
                except NotApplicable as reason:
                    case.absent[role] = str(reason)
            if any(entry.case == case.keys[role] for entry in entries):
                case.absent.pop(role, None)
        return entries

    def _check(self, entry: Entry, truth: Truth) -> None:
        """Runs every kind once and holds it against float64; notes what fails."""
        for kind in self.options.kinds:
            call = entry.contender.calls.get(kind)
            if call is None:
                continue
            try:
                verdict = verdict_of(entry.contender, kind, call(), truth)
            except Exception as error:  # printed in its row; the others go on
                entry.failures[kind] = (ERROR, f"{entry.contender.variant}: {type(error).__name__}: {error}")
                continue
            if not verdict.ok:
                entry.failures[kind] = (FAIL, f"{entry.contender.variant}: {verdict}")

    def _measure_memory(self, entries: list[Entry]) -> None:
        """Extra memory of every call, which also warms it up a second time."""
        for entry in entries:
            for kind, call in entry.contender.calls.items():
                if kind in self.options.kinds and entry.runs(kind):
                    try:
                        extra = self.memory.extra_bytes(call)
                    except RuntimeError as error:  # out of memory, now that all contenders are there
                        entry.failures[kind] = (ERROR, f"{entry.contender.variant}: {type(error).__name__}: {error}")
                        continue
                    saved = entry.contender.saved_bytes.get(kind, 0)
                    entry.extra_bytes[kind] = None if extra is None else extra + saved

    # ------------------------------------------------------------ the clock

    def _time(self, entries: list[Entry], deadline: float) -> None:
        calls = {
            (at, kind): entry.contender.calls[kind]
            for at, entry in enumerate(entries)
            for kind in self.options.kinds
            if entry.runs(kind)
        }
        cases = [entry.case for entry in entries]
        laps = interleave(
            calls, self.clock, self.options.rounds, deadline, drop=lambda laps: lost_variants(laps, cases)
        )
        for (at, kind), measured in laps.items():
            entries[at].laps[kind] = measured
        if self.options.device.type == "cuda":
            for (at, kind), measured in interleave(calls, self.clock, WARM, 0.0, cold=False).items():
                entries[at].warm_ms[kind] = Times.of(measured).p50
                entries[at].kernels[kind] = kernels_of(calls[at, kind], self.options.device)

    # ------------------------------------------------------------ rows

    def _row(self, layer: Layer, case: Case, entries: list[Entry], backend: str | None, kind: str) -> LayerRow:
        options = self.options
        equal = options.structure.name == "hrbp" or case.block.bk is None
        row = LayerRow(
            net=layer.net, layer=layer.full_name, geometry=str(layer), count=layer.count, shape=layer.shape,
            x_shape=layer.x_shape(options.batch), stride=layer.stride, padding=layer.padding,
            structure="equal groups" if equal else "random blocks", blocksize_asked=str(case.block),
            sparsity_asked=case.sparsity, backend_asked=backend or "auto", kind=kind,
            status=REFUSED, reason=case.refused.get(backend, ""),
        )  # fmt: skip
        pattern = case.pattern
        plans = {layout: plan for (name, layout), plan in case.plans.items() if name == backend}
        if pattern is None or not plans:
            return row
        kinds = KINDS if kind == TOTAL else (kind,)
        flops = layer.flops(options.batch, pattern.nnzb * math.prod(pattern.blocksize))
        nbytes = [least_bytes(layer, options.batch, k, options.dtype.itemsize, pattern) for k in kinds]
        mine = sparse_result([e for e in entries if e.case == _sparse_key(case, backend)], options.kinds, kind)
        plan = plans.get(mine.variant, plans["contiguous"])
        return replace(
            row,
            **vars(mine),
            baselines={role: self._baseline(case, entries, role, kind) for role in BASELINES},
            blocksize=pattern.blocksize,
            nnzb=pattern.nnzb,
            density=pattern.density,
            backend=plan.backend if kind == TOTAL else plan.products[kind].backend,
            plan=str(plan),
            predicted_ms=predicted_ms(plan, kinds),
            predicted_bound=None if kind == TOTAL else bound_of(plan, kind),
            useful_flops=flops * len(kinds),
            least_bytes=sum(nbytes),
            roofline_ms=1e3 * sum(self.ceilings.seconds(flops, n) for n in nbytes),
            peak_ms=None if (peak := self.ceilings.peak_flops) is None else 1e3 * flops * len(kinds) / peak,
        )

    def _baseline(self, case: Case, entries: list[Entry], role: str, kind: str) -> Row:
        if role in case.absent:
            return Row(status=ABSENT, reason=case.absent[role])
        return best_result([e for e in entries if e.case == case.keys[role]], kind)


def predicted_ms(plan: bs.ConvPlan, kinds: tuple[str, ...]) -> float | None:
    """Of these products, where the plan has a prediction of each (on a GPU), and no measurement in its place."""
    found = [plan.products[kind].estimate for kind in kinds]
    known = [1e3 * e.seconds for e in found if e is not None and e.bound]
    return math.fsum(known) if len(known) == len(kinds) else None


def bound_of(plan: bs.ConvPlan, kind: str) -> str | None:
    """What the prediction says that the product is bound by."""
    found = plan.products[kind].estimate
    return found.bound or None if found is not None else None


def _sparse_key(case: Case, backend: str | None) -> CaseKey:
    return "sparse", id(case), backend


def verdict_of(contender: Contender, kind: str, got: Tensor, truth: Truth) -> Verdict:
    """Hold a contender's result against the pattern's, or against what it computes instead."""
    if contender.problem is not None:
        truth = contender.problem.full_truth
    view = contender.views.get(kind, lambda t: t)
    return judge(got, view(truth.exact[kind]), view(truth.own[kind]), truth.largest[kind])


def lost_variants(
    laps: Mapping[tuple[int, str], list[Lap]], cases: list[CaseKey], factor: float = 1.5
) -> set[tuple[int, str]]:
    """Keys (entry, kind) of variants whose fastest lap takes `factor` times as long as that of the best of their case.

    Fastest laps: another program that takes the machine for a few laps excludes nobody. A baseline may change its
    variant from kind to kind; the library keeps one for all kinds.
    """
    least = {key: min(lap.seconds for lap in measured) for key, measured in laps.items()}

    def cost(at: int, kind: str) -> float:
        return sum(t for (n, _), t in least.items() if n == at) if cases[at][0] == "sparse" else least[at, kind]

    best: dict[tuple[CaseKey, str], float] = {}
    for at, kind in laps:
        key = cases[at], kind
        best[key] = min(cost(at, kind), best.get(key, math.inf))
    return {(at, kind) for at, kind in laps if cost(at, kind) > factor * best[cases[at], kind]}


def result_of(entry: Entry, kind: str) -> Row:
    """The measurement of one variant for a kind."""
    variant = entry.contender.variant
    if kind not in entry.contender.calls:
        return Row(status=ABSENT, reason=f"{', '.join(entry.contender.calls)} only", variant=variant)
    if kind in entry.failures:
        status, reason = entry.failures[kind]
        return Row(status=status, reason=reason, variant=variant)
    return Row(
        variant=variant, times=Times.of(entry.laps[kind]), extra_bytes=entry.extra_bytes[kind],
        warm_ms=entry.warm_ms.get(kind), kernels=entry.kernels.get(kind, []),
    )  # fmt: skip


def added_up(results: Mapping[str, Row]) -> Row:
    """The three kinds together: each round's three laps added, the largest extra memory; or the first that failed."""
    for kind, result in results.items():
        if result.times is None:
            return Row(status=result.status, reason=f"{kind}, {result.reason}", variant=result.variant)
    times = [result.times for result in results.values() if result.times]
    host = [t.host_p50 for t in times if t.host_p50 is not None]
    rounds = zip(*(t.laps for t in times), strict=False)  # a variant that lost may have fewer
    laps = [Lap(1e-3 * sum(each), 1e-3 * sum(host) if host else None) for each in rounds]
    extra = [result.extra_bytes for result in results.values() if result.extra_bytes is not None]
    variant = "+".join(dict.fromkeys(result.variant for result in results.values()))
    warm = [result.warm_ms for result in results.values() if result.warm_ms is not None]
    return Row(
        variant=variant,
        times=Times.of(laps),
        extra_bytes=max(extra) if len(extra) == len(results) else None,
        warm_ms=sum(warm) if len(warm) == len(results) else None,
        kernels=[name for result in results.values() for name in result.kernels],
    )


def best_result(variants: list[Entry], kind: str) -> Row:
    """A baseline: the fastest variant that passed; if none did, why the first did not. Total: the best of each kind."""
    if kind == TOTAL:
        return added_up({k: best_result(variants, k) for k in KINDS})
    results = [result_of(entry, kind) for entry in variants]
    ran = [(result.p50, result) for result in results if result.p50 is not None]
    return min(ran, key=lambda pair: pair[0])[1] if ran else results[0]


def sparse_result(variants: list[Entry], kinds: tuple[str, ...], kind: str) -> Row:
    """The library: the one memory layout that is fastest over all `kinds`; a failure in any layout is shown."""
    every = [{k: result_of(entry, k) for k in kinds} for entry in variants]
    results = [added_up(by_kind) if kind == TOTAL else by_kind[kind] for by_kind in every]
    for result in results:
        if result.status != OK:
            return result
    cost = [sum(result.p50 or math.inf for result in by_kind.values()) for by_kind in every]
    return results[cost.index(min(cost))]
