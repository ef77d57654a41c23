"""How one layer is measured: patterns, contenders, checks, interleaved laps, and the rows that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import blocksparse as bs
import contenders
from contenders import LAYOUTS, Contender, NotApplicable, Problem, Truth, Verdict, judge
from layers import Layer
from patterns import Blocksize, Structure, build
from rows import ABSENT, ERROR, FAIL, KINDS, OK, REFUSED, RIVALS, TOTAL, Result, Row, Times, least_bytes
from timing import Ceilings, Clock, CpuMemory, CudaMemory, Lap, Rounds, interleave


@dataclass(frozen=True)
class Options:
    """What is measured of every layer. backends: None lets the library choose."""

    batch: int
    dtype: torch.dtype
    device: torch.device
    tf32: bool = False
    kinds: tuple[str, ...] = KINDS  # that run
    report: tuple[str, ...] = (*KINDS, TOTAL)  # that get a row
    blocksizes: tuple[Blocksize, ...] = (Blocksize(32, 32),)
    sparsities: tuple[float, ...] = (0.9,)
    backends: tuple[str | None, ...] = (None,)
    structure: Structure = field(default_factory=Structure)
    rounds: Rounds = field(default_factory=Rounds)
    seed: int = 0


CaseKey = tuple[object, ...]


@dataclass
class Entry:
    """A contender in the running. Entries of one case are variants of it, of which the best counts."""

    contender: Contender
    case: CaseKey
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)  # kind -> (status, reason)
    laps: dict[str, list[Lap]] = field(default_factory=dict)
    extra_bytes: dict[str, int | None] = field(default_factory=dict)

    def runs(self, kind: str) -> bool:
        return kind in self.contender.calls and kind not in self.failures


@dataclass
class Case:
    """One pattern of a layer and what competes on it, or why nothing does."""

    block: Blocksize
    sparsity: float
    pattern: bs.BSRPattern | None = None
    plans: dict[str | None, bs.ConvPlan] = field(default_factory=dict)
    refused: dict[str | None, str] = field(default_factory=dict)  # backend -> why
    keys: dict[str, CaseKey] = field(default_factory=dict)  # rival -> its entries
    absent: dict[str, str] = field(default_factory=dict)  # rival -> why not


class LayerBench:
    """Measures layers under fixed options, clock and ceilings."""

    def __init__(self, options: Options, clock: Clock, memory: CpuMemory | CudaMemory, ceilings: Ceilings) -> None:
        self.options, self.clock, self.memory, self.ceilings = options, clock, memory, ceilings
        self._eps = contenders.precision_eps(options.dtype, options.tf32)

    def run(self, layer: Layer, deadline: float) -> list[Row]:
        """All rows of one layer; repetitions go on until `deadline` (time.perf_counter())."""
        options = self.options
        generator = torch.Generator().manual_seed(options.seed)
        problem = Problem(layer, options.batch, options.dtype, options.device, generator)
        entries: list[Entry] = []
        cases = []
        for block in options.blocksizes:
            for sparsity in options.sparsities:
                cases.append(self._case(problem, block, sparsity, entries))
        self._weigh(entries)
        self._time(entries, deadline)
        return [
            self._row(layer, case, entries, backend, kind)
            for case in cases
            for backend in options.backends
            for kind in options.report
        ]

    # ------------------------------------------------------------ before the clock runs

    def _case(self, problem: Problem, block: Blocksize, sparsity: float, entries: list[Entry]) -> Case:
        """Builds the pattern, adds its contenders to `entries`, checked."""
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
                case.plans[backend] = bs.explain(
                    problem.x["contiguous"], values, pattern, layer.stride, layer.padding, backend=backend
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
        """What competes at this pattern, but for what is `known` from an earlier pattern of the layer."""
        layer, entries = problem.layer, []
        for backend in case.plans:
            for layout in LAYOUTS:
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
        for role, variants in builders.items():
            if case.keys[role] in known:
                continue
            try:
                entries += [Entry(variant(), case.keys[role]) for variant in variants]
            except NotApplicable as reason:
                case.absent[role] = str(reason)
        return entries

    def _check(self, entry: Entry, truth: Truth) -> None:
        """Runs every kind once and holds it against float64; notes what fails."""
        for kind in self.options.kinds:
            call = entry.contender.calls.get(kind)
            if call is None:
                continue
            try:
                verdict = _verdict(entry.contender, kind, call(), truth, self._eps)
            except Exception as error:  # whatever one contender raises is printed in its row and ends nothing
                entry.failures[kind] = (ERROR, f"{entry.contender.variant}: {type(error).__name__}: {error}")
                continue
            if not verdict.ok:
                entry.failures[kind] = (FAIL, f"{entry.contender.variant}: {verdict}")

    def _weigh(self, entries: list[Entry]) -> None:
        """Extra memory of every call; warms it up a second time."""
        for entry in entries:
            for kind, call in entry.contender.calls.items():
                if kind in self.options.kinds and entry.runs(kind):
                    extra = self.memory.extra_bytes(call)
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
        laps = interleave(calls, self.clock, self.options.rounds, deadline, lambda laps: lost_variants(laps, cases))
        for (at, kind), measured in laps.items():
            entries[at].laps[kind] = measured

    # ------------------------------------------------------------ rows

    def _row(self, layer: Layer, case: Case, entries: list[Entry], backend: str | None, kind: str) -> Row:
        options = self.options
        equal = options.structure.name == "hrbp" or case.block.bk is None
        row = Row(
            layer.net, layer.full_name, str(layer), layer.count, layer.shape, layer.x_shape(options.batch),
            layer.stride, layer.padding, "equal groups" if equal else "random blocks", str(case.block),
            case.sparsity, backend or "auto", kind, Result(REFUSED, case.refused.get(backend, "")),
        )  # fmt: skip
        pattern, plan = case.pattern, case.plans.get(backend)
        if pattern is None or plan is None:
            return row
        kinds = KINDS if kind == TOTAL else (kind,)
        flops = layer.flops(options.batch, pattern.nnzb * math.prod(pattern.blocksize))
        nbytes = [least_bytes(layer, options.batch, k, options.dtype.itemsize, pattern) for k in kinds]
        return replace(
            row,
            sparse=sparse_result([e for e in entries if e.case == _sparse_key(case, backend)], options.kinds, kind),
            rivals={role: self._rival(case, entries, role, kind) for role in RIVALS},
            blocksize=pattern.blocksize,
            nnzb=pattern.nnzb,
            density=pattern.density,
            backend=plan.backend,
            plan=str(plan),
            useful_flops=flops * len(kinds),
            roofline_ms=1e3 * sum(self.ceilings.seconds(flops, n) for n in nbytes),
            peak_ms=None if (peak := self.ceilings.peak_flops) is None else 1e3 * flops * len(kinds) / peak,
        )

    def _rival(self, case: Case, entries: list[Entry], role: str, kind: str) -> Result:
        if role in case.absent:
            return Result(ABSENT, case.absent[role])
        return best_result([e for e in entries if e.case == case.keys[role]], kind)


def _sparse_key(case: Case, backend: str | None) -> CaseKey:
    return "sparse", id(case), backend


def _verdict(contender: Contender, kind: str, got: Tensor, truth: Truth, eps: float) -> Verdict:
    if contender.exact is not None:
        return judge(got, contender.exact[kind](), None, eps, truth.terms[kind])
    own = truth.own[contender.variant if contender.variant in LAYOUTS else "channels_last"][kind]
    if contender.role == "dense":  # timed with a full filter bank, judged by the same call with the pattern's
        return judge(own, truth.exact[kind], None, eps, truth.terms[kind])
    view = contender.views.get(kind, lambda t: t)
    return judge(got, view(truth.exact[kind]), view(own), eps, truth.terms[kind])


def lost_variants(
    laps: Mapping[tuple[int, str], list[Lap]], cases: list[CaseKey], factor: float = 1.5
) -> set[tuple[int, str]]:
    """Keys (entry, kind) of variants that take `factor` times as long as the best of their case.

    A rival may change its variant from kind to kind; the library keeps one for all kinds.
    """
    p50 = {key: Times.of(measured).p50 for key, measured in laps.items()}

    def cost(at: int, kind: str) -> float:
        return sum(t for (n, _), t in p50.items() if n == at) if cases[at][0] == "sparse" else p50[at, kind]

    best: dict[tuple[CaseKey, str], float] = {}
    for at, kind in laps:
        key = cases[at], kind
        best[key] = min(cost(at, kind), best.get(key, math.inf))
    return {(at, kind) for at, kind in laps if cost(at, kind) > factor * best[cases[at], kind]}


def result_of(entry: Entry, kind: str) -> Result:
    """What one variant says about a kind."""
    variant = entry.contender.variant
    if kind not in entry.contender.calls:
        return Result(ABSENT, f"{', '.join(entry.contender.calls)} only", variant)
    if kind in entry.failures:
        return Result(*entry.failures[kind], variant)
    return Result(OK, "", variant, Times.of(entry.laps[kind]), entry.extra_bytes[kind])


def added_up(results: Mapping[str, Result]) -> Result:
    """The three kinds together: each round's three laps added, the largest extra memory; or the first that failed."""
    for kind, result in results.items():
        if result.times is None:
            return Result(result.status, f"{kind}, {result.reason}", result.variant)
    times = [result.times for result in results.values() if result.times]
    host = [t.host_p50 for t in times if t.host_p50 is not None]
    rounds = zip(*(t.laps for t in times), strict=False)  # a variant that lost may have fewer
    laps = [Lap(1e-3 * sum(each), 1e-3 * sum(host) if host else None) for each in rounds]
    extra = [result.extra_bytes for result in results.values() if result.extra_bytes is not None]
    variant = "+".join(dict.fromkeys(result.variant for result in results.values()))
    return Result(OK, "", variant, Times.of(laps), max(extra) if len(extra) == len(results) else None)


def best_result(variants: list[Entry], kind: str) -> Result:
    """A rival: the fastest variant that passed; if none did, why the first did not. Total: the best of each kind."""
    if kind == TOTAL:
        return added_up({k: best_result(variants, k) for k in KINDS})
    results = [result_of(entry, kind) for entry in variants]
    ran = [(result.p50, result) for result in results if result.p50 is not None]
    return min(ran, key=lambda pair: pair[0])[1] if ran else results[0]


def sparse_result(variants: list[Entry], kinds: tuple[str, ...], kind: str) -> Result:
    """The library: the one memory layout that is fastest over all `kinds`; a failure in any layout is shown."""
    every = [{k: result_of(entry, k) for k in kinds} for entry in variants]
    results = [added_up(by_kind) if kind == TOTAL else by_kind[kind] for by_kind in every]
    for result in results:
        if result.status != OK:
            return result
    cost = [sum(result.p50 or math.inf for result in by_kind.values()) for by_kind in every]
    return results[cost.index(min(cost))]
