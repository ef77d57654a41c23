"""bench/: its tables, patterns and arithmetic are right, it never reports a time for a wrong answer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import blocksparse as bs
import processes
from bench import run
from bench.layers import contenders, measure, networks, patterns, report
from bench.layers import rows as rows_module
from bench.layers.networks import NETS, Layer, parse_layer
from bench.layers.rows import BASELINES, KINDS, TOTAL, LayerRow
from bench.shared import clocks, memory, results, schedule
from bench.shared.ceilings import Ceilings
from bench.shared.clocks import Lap, Rounds
from bench.shared.equal import judge, network_error
from bench.shared.rows import FAIL, OK, REFUSED, Row, Times

ROOT = Path(__file__).resolve().parents[1]
CEILINGS = Ceilings(copy_bytes=1e10, matmul_flops=1e11)
SMALL = ["--device", "cpu", "--dtype", "fp32", "--batch", "2", "--repeats", "2", "--sparsity", "0.5"]


@pytest.fixture(autouse=True)
def one_thread():
    """Small layers gain nothing from threads, and lose much where other programs run beside the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("net", "convs", "weights", "macs"),
    [
        ("resnet50", 53, 23_454_912, 4_087_136_256),  # torchvision: 25.6 M parameters, 4.09 GMACs with the classifier
        ("resnet32", 33, 1_854_304, None),
        ("vgg19", 16, 20_018_880, 398_131_200),  # torchvision's features: 20,024,384 with 5,504 biases
    ],
)
def test_layer_tables_have_the_known_sizes(net, convs, weights, macs):
    table = NETS[net]()
    assert sum(layer.count for layer in table) == convs
    assert sum(layer.count * layer.weights for layer in table) == weights
    if macs is not None:
        assert sum(layer.count * layer.flops(1) for layer in table) == 2 * macs
    shapes = [(layer.shape, layer.stride, layer.size) for layer in table]
    assert len(set(shapes)) == len(shapes)
    assert len({layer.name for layer in table}) == len(table)


def test_layers_follow_each_other():
    """Every size and channel count that a layer reads is one that some layer of the network writes."""
    for net, build in NETS.items():
        table = build()
        written = {(layer.k, layer.output_size) for layer in table}
        pooled = {(k, (p // 2, q // 2)) for k, (p, q) in written}
        for layer in table:
            assert layer.name == "stem" or (layer.c, layer.size) in written | pooled, f"{net}: {layer}"


def test_resnet50_strides_on_the_3x3():
    table = {layer.name: layer for layer in NETS["resnet50"]()}
    strided = {layer.name for layer in table.values() if layer.stride == 2}
    firsts = {f"layer{stage}.0.{name}" for stage in (2, 3, 4) for name in ("3x3", "skip")}
    assert strided == firsts | {"stem"}
    assert table["layer3.3x3"].count == 5
    assert table["layer1.1x1out"].count == 4  # three blocks and the projection, which is the same convolution


def test_a_network_comes_without_its_stem_and_a_layer_by_name():
    assert all(layer.c > 3 for layer in parse_layer("resnet50"))
    assert sum(layer.count for layer in parse_layer("resnet50")) == 52
    (layer,) = parse_layer("resnet50.layer2.3x3")
    assert (layer.shape, layer.size, layer.stride, layer.count) == ((128, 128, 3, 3), (28, 28), 1, 1)
    assert layer.full_name == "resnet50.layer2.3x3"
    assert parse_layer("resnet50.stem")[0].c == 3


@pytest.mark.parametrize(
    ("spec", "shape", "stride", "size", "output"),
    [
        ("64,32,3,1,56", (32, 64, 3, 3), 1, (56, 56), (56, 56)),
        ("8,16,1,2,7", (16, 8, 1, 1), 2, (7, 7), (4, 4)),
        ("8,8,1x7,1,9x17", (8, 8, 1, 7), 1, (9, 17), (9, 17)),
        ("8, 8, 7x7, 2, 20", (8, 8, 7, 7), 2, (20, 20), (10, 10)),
    ],
)
def test_custom_layers(spec, shape, stride, size, output):
    (layer,) = parse_layer(spec)
    assert (layer.shape, layer.stride, layer.size, layer.output_size) == (shape, stride, size, output)
    x = torch.zeros(layer.x_shape(2))
    assert F.conv2d(x, torch.zeros(shape), stride=stride, padding=layer.padding).shape == layer.y_shape(2)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet18", "resnet50, resnet32, vgg19"),
        ("resnet50.layer2.3x4", "did you mean resnet50.layer2.3x3?"),
        ("64,64,3,1", "C,K,R,stride,H"),
        ("64,64,3,0,56", "at least 1"),
        ("64,64,a,1,56", "64,64,3,1,56"),
        ("8,8,3x9,1,1x0", "at least 1"),
    ],
)
def test_layer_specs_that_are_wrong_say_what_is_right(spec, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_layer(spec)


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("text", "block"),
    [("32x32", (32, 32)), ("16,8", (16, 8)), ("group", (None, 1)), ("groupx8", (None, 8))],
)
def test_blocksizes(text, block):
    parsed = patterns.parse_blocksize(text)
    assert (parsed.bk, parsed.bc) == block
    assert patterns.parse_blocksize(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["32", "32x", "0x8", "groups", "8x8x8", "groupx0"])
def test_blocksizes_that_are_wrong(text):
    with pytest.raises(ValueError, match="blocksize"):
        patterns.parse_blocksize(text)


@pytest.mark.parametrize(
    ("filters", "groups", "used"), [(64, 8, 8), (32, 8, 4), (48, 8, 6), (8, 8, 1), (12, 8, 1), (2048, 8, 8), (7, 8, 1)]
)
def test_groups_used(filters, groups, used):
    assert patterns.groups_used(filters, groups) == used


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (64, 96, 1, 1), (32, 40, 5, 3)])
@pytest.mark.parametrize("tap_density", [Fraction(1), Fraction(4, 9)])
@pytest.mark.parametrize("granule", [1, 8])
def test_equal_groups_are_equal_and_of_their_own(shape, tap_density, granule):
    k, c, r, s = shape
    groups, sparsity = 4, 0.75
    mask = patterns.equal_groups(shape, sparsity, groups, tap_density, granule, generator())
    taps = max(1, round(r * s * tap_density))
    by_group = mask.view(groups, k // groups, c, r * s)
    assert (by_group == by_group[:, :1]).all()  # the filters of a group agree
    kept = set()
    for group in by_group[:, 0]:
        channels, kept_taps = group.any(1), group.any(0)
        assert torch.equal(group, channels[:, None] & kept_taps[None, :])  # a product
        assert kept_taps.sum() == taps
        assert (channels.view(-1, granule) == channels.view(-1, granule)[:, :1]).all()
        kept.add(int(channels.sum()))
    assert len(kept) == 1
    assert len({tuple(group.flatten().tolist()) for group in by_group[:, 0]}) > 1  # random, not one for all
    run_density = granule * taps / (c * r * s)  # what one run of channels adds
    assert abs(float(mask.float().mean()) - (1 - sparsity)) <= run_density / 2 + 1e-6


def test_build_makes_what_was_asked_for():
    shape, block, hrbp = (64, 64, 3, 3), patterns.Structure(), patterns.Structure("hrbp", 8, Fraction(4, 9))
    random = patterns.build(shape, patterns.Blocksize(16, 8), block, 0.9, generator())
    assert random.blocksize == (16, 8)
    assert random.nnzb == round(0.1 * 4 * 72)
    group = patterns.build(shape, patterns.Blocksize(None, 1), block, 0.9, generator())
    assert group.blocksize == (8, 1)
    assert group.nnzb == 8 * 9 * round(6.4)
    one = patterns.build((64, 64, 1, 1), patterns.Blocksize(32, 32), block, 0.9, generator())
    assert one.nnzb == 1  # 10 % of 4 blocks, but one at least
    taps = patterns.build(shape, patterns.Blocksize(4, 8), hrbp, 0.9, generator())
    assert taps.blocksize == (4, 8)
    assert taps.nnzb == 16 * 4 * round(64 * 0.1 / (4 / 9) / 8)


@pytest.mark.parametrize(
    ("shape", "block", "structure", "says"),
    [
        ((48, 64, 1, 1), patterns.Blocksize(32, 32), patterns.Structure(), "does not divide"),
        ((64, 60, 1, 1), patterns.Blocksize(None, 8), patterns.Structure(), "do not divide"),
        ((64, 64, 1, 1), patterns.Blocksize(16, 1), patterns.Structure("hrbp"), "filters of a group"),
    ],
)
def test_patterns_that_cannot_be_are_refused(shape, block, structure, says):
    with pytest.raises(ValueError, match=says):
        patterns.build(shape, block, structure, 0.9, generator())


# ---------------------------------------------------------------- arithmetic


def test_roofline_is_the_slower_of_compute_and_memory():
    assert CEILINGS.seconds(flops=1e11, nbytes=1) == pytest.approx(1.0)
    assert CEILINGS.seconds(flops=1, nbytes=2e10) == pytest.approx(2.0)


def test_least_bytes_counts_everything_once():
    (layer,) = parse_layer("64,32,3,1,10")
    pattern = bs.BSRPattern.full((32, 64, 3, 3), (16, 8))
    numbers = 4 * 64 * 100 + 4 * 32 * 100 + 32 * 64 * 9
    index = 4 * (3 + pattern.nnzb)
    for kind in KINDS:
        assert rows_module.least_bytes(layer, 4, kind, 2, pattern) == 2 * numbers + index


def test_a_strided_1x1_reads_a_quarter_of_x_and_writes_all_of_dx():
    (layer,) = parse_layer("64,32,1,2,10")
    pattern = bs.BSRPattern.full((32, 64, 1, 1), (32, 32))
    rest = 4 * (4 * 32 * 25 + 32 * 64) + 4 * (2 + 2)
    assert rows_module.least_bytes(layer, 4, "fprop", 4, pattern) == 4 * (4 * 64 * 25) + rest
    assert rows_module.least_bytes(layer, 4, "dgrad", 4, pattern) == 4 * (4 * 64 * 100) + rest


def test_least_bytes_of_a_strided_3x3_reads_all_of_x():
    (layer,) = parse_layer("8,8,3,2,56")
    pattern = bs.BSRPattern.full((8, 8, 3, 3), (8, 8))
    plain = 4 * (8 * 56 * 56 + 8 * 28 * 28 + 8 * 8 * 9) + 4 * (2 + 9)
    assert rows_module.least_bytes(layer, 1, "wgrad", 4, pattern) == plain


@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
def test_percentiles_are_numpys(percent):
    samples = [3.0, 1.0, 10.0, 7.5, 2.0]
    assert clocks.percentile(samples, percent) == pytest.approx(np.percentile(samples, percent))


@pytest.mark.parametrize("size", [(64, 64), (256, 64), (64, 256), (512, 512), (1024, 2048), (32, 32), (128, 32)])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
def test_the_narrow_layer_has_about_equal_flops(size, density):
    c, k = contenders.narrow_sizes(*size, density)
    assert 1 <= c <= size[0]
    assert 1 <= k <= size[1]
    assert c * k / (density * size[0] * size[1]) == pytest.approx(1, abs=0.26)


def test_a_row_computes_speed_and_speedup_from_medians():
    row = make_row(sparse=[2.0, 4.0, 3.0], dense=[6.0, 9.0, 30.0])
    assert row.p50 == pytest.approx(3.0)
    assert row.speedup("dense") == pytest.approx(3.0)
    assert row.flops_per_second == pytest.approx(6e9 / 3e-3)
    assert row.roofline_share == pytest.approx(0.5)
    assert row.speedup("grouped") is None


# ---------------------------------------------------------------- totals and conclusions


def result(ms: list[float], variant: str = "contiguous") -> Row:
    return Row(variant=variant, times=Times.of([Lap(1e-3 * v) for v in ms]), extra_bytes=0)


def make_row(
    sparse: list[float], dense: list[float], count: int = 1, layer: str = "a", kind: str = "fprop", **changes
) -> LayerRow:
    row = LayerRow(
        net="net", layer=layer, geometry="", count=count, shape=(64, 64, 3, 3), x_shape=(1, 64, 8, 8), stride=1,
        padding=(1, 1), structure="random blocks", blocksize_asked="32x32", sparsity_asked=0.9, backend_asked="auto",
        kind=kind, baselines={name: Row(status="n/a") for name in BASELINES} | {"dense": result(dense)},
        blocksize=(32, 32), nnzb=4, density=0.1, backend="torch", plan="", useful_flops=6_000_000_000, roofline_ms=1.5,
    )  # fmt: skip
    return dataclasses.replace(row, **(vars(result(sparse)) | changes))


def test_totals_weigh_layers_by_their_count():
    (total,) = rows_module.totals([make_row([1.0], [10.0], count=1), make_row([5.0], [5.0], count=3, layer="b")])
    assert total.ms == pytest.approx(16.0)
    assert total.speedup("dense") == pytest.approx(25 / 16)
    assert total.baseline_ms["grouped"] is None
    assert total.roofline_ms == pytest.approx(6.0)


def test_a_failed_layer_leaves_no_total():
    wrong = make_row([5.0], [5.0], layer="b", status=FAIL, reason="max error 1", times=None)
    sums = rows_module.totals([make_row([1.0], [10.0]), wrong])
    text = "\n".join([*report.total_lines(sums, False), *report.conclusions(sums, 8)])
    assert "no total: 1 of 2 shapes FAIL" in text
    assert "no speed-up to report" in text
    assert "10.00" not in text


def test_a_refused_layer_is_named_beside_the_total_of_the_others():
    refused = make_row([5.0], [5.0], layer="b", status=REFUSED, reason="no", times=None, baselines={})
    sums = rows_module.totals([make_row([1.0], [10.0]), refused])
    assert "[1 of 2 shapes refused]" in report.total_lines(sums, False)[-1]
    assert "only 1 of 2 shapes ran" in " ".join(report.conclusions(sums, 8))


# ---------------------------------------------------------------- the clock


class FakeClock:
    """Laps that last as long as the call says; notes the order of calls."""

    def __init__(self) -> None:
        self.order: list[object] = []

    def lap(self, call, cold=True):
        assert cold
        name, seconds = call()
        self.order.append(name)
        return Lap(seconds)


def test_rounds_are_interleaved():
    clock, names = FakeClock(), "abc"
    calls = {name: (lambda name=name: (name, 1.0)) for name in names}
    laps = clocks.interleave(calls, clock, Rounds(4, 4), deadline=0.0)
    assert {name: len(each) for name, each in laps.items()} == dict.fromkeys(names, 4)
    rounds = [clock.order[at : at + 3] for at in range(0, 12, 3)]
    assert all(sorted(each) == list(names) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_rounds_end_at_the_deadline_but_not_before_the_least():
    calls = {"a": lambda: ("a", 1.0)}
    assert len(clocks.interleave(calls, FakeClock(), Rounds(3, 9), deadline=0.0)["a"]) == 3
    assert len(clocks.interleave(calls, FakeClock(), Rounds(3, 9), deadline=math.inf)["a"]) == 9


def test_a_losing_variant_gets_no_further_laps():
    calls = {(0, "fprop"): lambda: ("a", 1.0), (1, "fprop"): lambda: ("b", 2.0), (2, "fprop"): lambda: ("c", 9.0)}
    cases = [("dense",), ("dense",), ("narrow",)]  # 1 loses to 0; 2 is slow but alone in its case
    laps = clocks.interleave(
        calls, FakeClock(), Rounds(2, 6), math.inf, lambda laps: measure.lost_variants(laps, cases)
    )
    assert [len(each) for each in laps.values()] == [6, 2, 6]


def test_a_disturbed_lap_excludes_no_variant():
    laps = {(0, "fprop"): [Lap(0.9), Lap(0.8), Lap(0.1)], (1, "fprop"): [Lap(0.11), Lap(0.12), Lap(0.11)]}
    assert measure.lost_variants(laps, [("dense",)] * 2) == set()


def test_the_library_loses_a_layout_for_all_kinds_or_for_none():
    ms = {(0, "fprop"): 1.0, (0, "dgrad"): 5.0, (1, "fprop"): 2.0, (1, "dgrad"): 3.0}
    laps = {key: [Lap(1e-3 * t)] for key, t in ms.items()}
    assert measure.lost_variants(laps, [("dense",)] * 2) == {(1, "fprop"), (0, "dgrad")}
    assert measure.lost_variants(laps, [("sparse",)] * 2) == set()  # 6 against 5
    assert measure.lost_variants(laps, [("sparse",)] * 2, 1.1) == {(0, "fprop"), (0, "dgrad")}


def test_a_baseline_may_change_its_layout_from_kind_to_kind_and_the_library_may_not():
    ms = {"contiguous": (1.0, 9.0, 3.0), "channels_last": (5.0, 2.0, 4.0)}
    entries = [
        measure.Entry(
            contenders.Contender("any", layout, dict.fromkeys(KINDS, torch.Tensor)),
            ("any",),
            laps={kind: [Lap(1e-3 * t)] for kind, t in zip(KINDS, times, strict=True)},
            extra_bytes=dict(zip(KINDS, (1, 7, 3), strict=True)),
        )
        for layout, times in ms.items()
    ]
    assert measure.best_result(entries, TOTAL).p50 == pytest.approx(1 + 2 + 3)
    assert measure.sparse_result(entries, KINDS, TOTAL).p50 == pytest.approx(5 + 2 + 4)
    assert measure.sparse_result(entries, KINDS, "fprop").p50 == pytest.approx(5)
    assert measure.sparse_result(entries, KINDS, TOTAL).extra_bytes == 7
    entries[0].failures["wgrad"] = (FAIL, "wrong")
    assert measure.best_result(entries, TOTAL).p50 == pytest.approx(1 + 2 + 4)
    assert measure.sparse_result(entries, KINDS, TOTAL).status == FAIL
    assert measure.sparse_result(entries, KINDS, "fprop").status == OK


def test_peak_memory_sees_scratch_but_not_the_result():
    cpu = memory.CpuMemory()
    scratch, out = 12 * 2**20, 4 * 2**20
    seen = cpu.extra_bytes(lambda: (torch.ones(scratch // 4), torch.ones(out // 4))[1])
    if seen is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert seen == pytest.approx(scratch, rel=0.1)


# ---------------------------------------------------------------- contenders and their check


@pytest.fixture(params=["9x9x3x1", "8x7x3x2", "8x8x1x1", "9x6x1x2"])
def problem(request) -> contenders.Problem:
    h, w, r, stride = map(int, request.param.split("x"))
    layer = Layer(networks.CHOSEN, "test", 32, 16, (r, r), stride, (r // 2, r // 2), (h, w))
    return contenders.Problem(layer, 3, torch.float32, torch.device("cpu"), generator())


def assert_right(contender: contenders.Contender, truth: contenders.Truth) -> None:
    for kind, call in contender.calls.items():
        verdict = measure.verdict_of(contender, kind, call(), truth)
        assert verdict.ok, f"{contender.role} {contender.variant} {kind}: {verdict}"


@pytest.mark.parametrize("layout", contenders.LAYOUTS)
def test_every_contender_computes_the_layer(problem, layout):
    for tap_density in (Fraction(1), Fraction(4, 9)):
        structure = patterns.Structure("hrbp", 4, tap_density)
        pattern = patterns.build(problem.layer.shape, patterns.Blocksize(4, 2), structure, 0.6, generator(1))
        values = problem.draw((pattern.nnzb, *pattern.blocksize))
        truth = contenders.Truth.of(problem, pattern.to_dense(values), KINDS)
        assert_right(contenders.sparse(problem, pattern, values, layout, "torch"), truth)
        assert_right(contenders.grouped(problem, pattern, values, layout), truth)
        assert_right(contenders.dense(problem, layout), truth)
        assert_right(contenders.narrow(problem, pattern.density, layout), truth)


def test_a_dense_1x1_as_matrix_products(problem):
    if problem.layer.kernel != (1, 1) or problem.layer.stride != 1:
        with pytest.raises(contenders.NotApplicable, match="1x1 with stride 1"):
            contenders.matmul(problem)
        return
    assert_right(contenders.matmul(problem), contenders.Truth.of(problem, problem.w["contiguous"], KINDS))


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support")
def test_torchs_bsr_computes_a_1x1(problem):
    pattern = bs.BSRPattern.random(problem.layer.shape, (8, 8), 0.5, generator())
    values = problem.draw((pattern.nnzb, 8, 8))
    if problem.layer.kernel != (1, 1) or problem.layer.stride != 1:
        with pytest.raises(contenders.NotApplicable, match="1x1 with stride 1"):
            contenders.torch_bsr(problem, pattern, values, "matmul")
        return
    truth = contenders.Truth.of(problem, pattern.to_dense(values), ("fprop",))
    for variant in ("matmul", "linear"):
        assert_right(contenders.torch_bsr(problem, pattern, values, variant), truth)


def test_equal_channels_finds_the_groups():
    mask = torch.zeros((6, 4, 1, 2), dtype=torch.bool)
    mask[:2, [0, 3], 0, 1] = True
    mask[2:, 1:3, 0, :] = True  # two groups that happen to keep the same channels
    assert contenders.equal_channels(mask).tolist() == [[0, 3], [1, 2], [1, 2]]


def test_equal_channels_refuses_unequal_groups():
    mask = torch.zeros((4, 4, 1, 1), dtype=torch.bool)
    mask[:2, :1] = mask[2:, 1:3] = True
    with pytest.raises(contenders.NotApplicable, match="different numbers"):
        contenders.equal_channels(mask)
    with pytest.raises(contenders.NotApplicable, match="no two filters"):
        contenders.equal_channels(torch.eye(4, dtype=torch.bool).view(4, 4, 1, 1))


def test_judge_takes_rounding_and_nothing_else():
    exact = torch.randn(1000, generator=generator(), dtype=torch.float64)
    rounded, eps, largest = exact.float(), 2.0**-23, 10.0
    assert judge(rounded, exact, rounded, largest).ok
    assert judge(rounded * (1 + eps), exact, rounded, largest).ok
    one_off, lost = rounded.clone(), rounded.clone()
    one_off[17] += 1e-4
    lost[17] = math.nan
    for wrong in (one_off, lost, rounded[:-1], rounded * 1.00001, torch.zeros(1000), rounded.double()):
        assert not judge(wrong, exact, rounded, largest).ok
    many = exact.repeat(1000)
    one_in_a_million = many.float()
    one_in_a_million[17] += 1e-5  # lost in the RMS
    assert not judge(one_in_a_million, many, many.float(), largest).ok
    # PyTorch's own error excuses as much again, but only where PyTorch is right itself.
    noise = 1e-6 * torch.randn(1000, generator=generator(), dtype=torch.float64)
    assert not judge((exact + 5 * noise).float(), exact, rounded, largest).ok
    assert judge((exact + 5 * noise).float(), exact, (exact + 3 * noise).float(), largest).ok
    noisy = (exact + 0.1).float()
    assert "no yardstick" in str(judge(noisy, exact, noisy, largest))


def test_the_error_of_a_network_s_gradient():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert network_error(zeros, zeros) == 0  # of a branch that nothing goes through
    assert network_error(ones, zeros) == math.inf
    assert network_error(ones + 0.01, ones) == pytest.approx(0.01, rel=1e-3)
    assert math.isnan(network_error(ones * math.nan, ones))
    assert math.isnan(network_error(ones, ones * math.nan))


def test_judge_knows_that_long_sums_round_more():
    """A float32 sum of many products, in an order worse than PyTorch's, is right; a few lost terms are not."""
    x, y = torch.randn((2, 64, 20_000), generator=generator()).unbind()
    exact, own = (x.double() * y.double()).sum(1), (x * y).sum(1)
    largest = float((x * y).abs().sum(1).max())
    worse = (x * y).cumsum(1, dtype=torch.float32)[:, -1]
    assert judge(worse, exact, own, largest).ok
    assert not judge((x * y)[:, :-1].sum(1), exact, own, largest).ok


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def fast(monkeypatch):
    """No time for ceilings."""
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: CEILINGS)


def read_rows(path: Path) -> dict[tuple[str, str], dict]:
    return {(row["blocksize_asked"], row["kind"]): row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize("name", ["conv2d", "conv2d_dgrad", "conv2d_wgrad"])
def test_a_wrong_answer_prints_fail_and_no_speedup(name, fast, monkeypatch, capsys, tmp_path):
    right = getattr(bs, name)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs).clone()
        out.view(-1)[out.numel() // 2] += 1e-3
        return out

    monkeypatch.setattr(bs, name, wrong)
    file = tmp_path / "rows.json"
    status = run.main(["--layer", "16,16,3,1,6", "--blocksize", "8x8", "--json", str(file), *SMALL])
    bad = {"conv2d": "fprop", "conv2d_dgrad": "dgrad", "conv2d_wgrad": "wgrad"}[name]
    printed = {line.split()[4]: line for line in capsys.readouterr().out.splitlines() if line.startswith("8x8 ")}
    rows = read_rows(file)
    assert status == 1
    for kind in (*KINDS, TOTAL):
        row = rows["8x8", kind]
        if kind in (bad, TOTAL):
            assert "FAIL" in printed[kind]
            assert "max error" in printed[kind]
            assert (row["status"], row["times"]) == (FAIL, None)
            assert set(row["speedup"].values()) == {None}
            assert row["flops_per_second"] is row["percent_of_roofline"] is None
        else:
            assert "FAIL" not in printed[kind]
            assert row["speedup"]["dense"] > 0


def test_a_call_that_raises_is_an_error_in_its_row(fast, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(bs, "conv2d", broken)
    assert run.main(["--layer", "16,16,1,1,6", "--blocksize", "8x8", "--kind", "fprop", *SMALL]) == 1
    printed = capsys.readouterr().out
    assert "error: contiguous: RuntimeError: illegal instruction" in printed
    assert "nan" not in printed


def test_a_refused_pattern_prints_the_reason_and_no_number(fast, capsys, tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--layer", "16,16,3,1,6", "--blocksize", "24x8", "8x8", "--kind", "fprop", "--json", str(file)]
    assert run.main([*arguments, *SMALL]) == 0
    rows = read_rows(file)
    assert rows["24x8", "fprop"]["status"] == REFUSED
    assert rows["24x8", "fprop"]["times"] is None
    assert rows["8x8", "fprop"]["status"] == OK
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("24x8")]
    assert "refused" in line
    assert "does not divide" in line


def test_a_run_where_nothing_ran_is_a_failure(fast):
    assert run.main(["--layer", "16,16,3,1,6", "--blocksize", "24x8", *SMALL]) == 1


def test_an_interrupt_keeps_the_layers_before_it(fast, monkeypatch, capsys, tmp_path):
    measured, right = [], measure.LayerBench.run

    def interrupted(self, layer, deadline):
        if measured:
            raise KeyboardInterrupt
        measured.append(layer)
        return right(self, layer, deadline)

    monkeypatch.setattr(measure.LayerBench, "run", interrupted)
    file = tmp_path / "rows.json"
    arguments = ["--layer", "16,16,3,1,6", "16,16,1,1,6", "--blocksize", "8x8", "--json", str(file)]
    assert run.main([*arguments, *SMALL]) == 130
    content = json.loads(file.read_text())
    assert content["complete"] is False
    assert {row["layer"] for row in content["rows"]} == {"16,16,3,1,6"}
    assert "interrupted" in capsys.readouterr().out


def test_checks_take_nothing_of_the_time_of_a_layer_s_repetitions(fast, monkeypatch):
    order, check, deadline = [], measure.LayerBench._check, run.Schedule.deadline
    monkeypatch.setattr(measure.LayerBench, "_check", lambda *a: (order.append("check"), check(*a)))
    monkeypatch.setattr(run.Schedule, "deadline", lambda *a: (order.append("deadline"), deadline(*a))[1])
    assert run.main(["--layer", "16,16,3,1,6", "--blocksize", "8x8", *SMALL]) == 0
    assert order.count("check") > 1
    assert order.index("deadline") == len(order) - 1


def test_a_layer_at_which_the_machine_was_busy_is_measured_again(fast, monkeypatch, capsys, tmp_path):
    """The steadier of both measurements counts, in the place of the first."""
    measured, right = [], measure.LayerBench.run

    def once_busy(self, layer, deadline):
        measured.append(layer.name)
        factor = 9.0 if measured == ["16,16,3,1,6"] else 1.0
        rows = right(self, layer, deadline)
        for row in rows:
            for timed in (row, *row.baselines.values()):
                timed.times = timed.times and dataclasses.replace(timed.times, p20=1.0, p80=factor)
        return rows

    monkeypatch.setattr(measure.LayerBench, "run", once_busy)
    file = tmp_path / "rows.json"
    words = ["--layer", "16,16,3,1,6", "16,16,1,1,6", "--blocksize", "8x8", "--seconds", "0.1", "--json", str(file)]
    sizes = ["--device", "cpu", "--dtype", "fp32", "--batch", "2", "--sparsity", "0.5"]
    assert run.main([*words, *sizes]) == 0
    assert measured == ["16,16,3,1,6", "16,16,1,1,6", "16,16,3,1,6"]
    assert "once more, since the machine was not steady: 16,16,3,1,6\n" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["layer"] for row in rows] == ["16,16,3,1,6"] * 4 + ["16,16,1,1,6"] * 4
    assert all(row["times"]["p80"] == 1.0 for row in rows)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_check_that_failed_in_either_measurement_counts(fast, monkeypatch, wrong):
    spreads, measured, right = iter([9.0, 1.0]), [], measure.LayerBench.run
    found = {}

    def once_wrong(self, layer, deadline):
        rows = right(self, layer, deadline)
        found[id(rows)] = next(spreads)
        rows[0].status = FAIL if len(measured) == wrong else OK
        measured.append(rows)  # kept: ids stay theirs
        return rows

    monkeypatch.setattr(measure.LayerBench, "run", once_wrong)
    monkeypatch.setattr(run, "spread", lambda rows: found[id(rows)])
    words = ["--layer", "16,16,3,1,6", "--blocksize", "8x8", "--seconds", "0.1"]
    assert run.main([*words, "--device", "cpu", "--dtype", "fp32", "--batch", "2", "--sparsity", "0.5"]) == 1
    assert len(measured) == 2


def test_totals_of_a_round_are_the_sum_of_its_kinds(fast, tmp_path):
    file = tmp_path / "rows.json"
    run.main(["--layer", "16,16,3,1,6", "--blocksize", "8x8", "--json", str(file), *SMALL])
    rows = read_rows(file)
    by_kind = [rows["8x8", kind]["times"]["laps"] for kind in KINDS]
    assert rows["8x8", TOTAL]["times"]["laps"] == pytest.approx([sum(each) for each in zip(*by_kind, strict=True)])
    assert rows["8x8", TOTAL]["useful_flops"] == 3 * rows["8x8", "fprop"]["useful_flops"]


def test_the_command_writes_a_table_and_a_complete_file(tmp_path, capsys):
    file, figure = tmp_path / "deep" / "rows.json", tmp_path / "bars.svg"
    layers_asked = ["--layer", "16,16,3,1,6", "32,16,1,1,5x4"]
    pytest.importorskip("matplotlib")
    words = [*layers_asked, "--blocksize", "group", "8x8", *SMALL, "--json", str(file), "--plot", str(figure)]
    status = run.main(words)
    out, err = capsys.readouterr()
    assert status == 0, out + err
    assert max(map(len, out.splitlines())) <= 150
    assert "x dense" in out
    assert "the speed of the best dense convolution" in out
    assert "[2/2] 32,16,1,1,5x4" in err
    content = json.loads(file.read_text())
    assert content["complete"] is True
    assert {"python", "torch", "triton", "cupy", "cudnn", "threads", "cpu", "device", "commit", "dirty"} <= set(
        content["machine"]
    )
    assert content["options"]["batch"] == 2
    assert content["ceilings"]["at_start"]["copy_bytes"] > 0
    assert len(content["rows"]) == 2 * 2 * 4
    assert len(content["totals"]) == 2 * 4
    for row in content["rows"]:
        assert row["status"] == OK, row
        times = row["times"]
        assert 0 < times["least"] <= times["p20"] <= times["p50"] <= times["p80"] <= times["most"]
        assert len(times["laps"]) == 2
        assert row["baselines"]["dense"]["status"] == row["baselines"]["narrow"]["status"] == OK
        assert row["speedup"]["dense"] == pytest.approx(row["baselines"]["dense"]["times"]["p50"] / times["p50"])
        assert (row["speedup"]["grouped"] is not None) or row["blocksize_asked"] == "8x8"
    assert figure.stat().st_size > 1000
    assert [path.name for path in file.parent.iterdir()] == ["rows.json"]


SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n != "run" else []) for n in SCRIPTS])
def test_every_script_explains_itself_from_a_bare_checkout(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = processes.run([sys.executable, ROOT / "bench" / f"{name}.py", "--help"], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"python bench/{name}.py" in done.stdout  # an example
    assert re.search("(second|minute)s?", done.stdout)  # and how long it takes


@pytest.mark.parametrize(("load", "warns"), [(0.3, False), (3.0, True), (None, False)])
def test_a_busy_machine_is_named(load, warns):
    machine = {"device_type": "cpu", "device": "cpu", "threads": 2, "cores": 2, "torch": "2", "load_at_start": load}
    assert report.head_lines(machine, "fp32", 8, CEILINGS)[0].startswith("WARNING") is warns


def test_a_result_file_is_whole_or_not_there(tmp_path, monkeypatch):
    args = argparse.Namespace(json=tmp_path / "deep" / "rows.json", device=torch.device("cpu"), seconds=1.0)
    writer = results.Writer("run", args, {"device": "x"})
    writer.write([make_row([1.0], [2.0])], complete=False)
    before = results.read(args.json)
    assert (before["kind"], before["format"], before["complete"]) == ("run", results.FORMAT, False)
    assert before["options"]["device"] == "cpu"
    with pytest.raises(ValueError, match="JSON"):
        writer.write([make_row([1.0], [2.0], peak_ms=math.nan)], complete=True)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        writer.write([], complete=True)
    assert results.read(args.json) == before
    assert list(args.json.parent.iterdir()) == [args.json]


def test_a_file_of_the_older_form_reads_as_one_of_now():
    row = make_row([1.0, 3.0], [4.0]).as_json()
    own = {name: row.pop(name) for name in ("status", "reason", "variant", "times", "extra_bytes")}
    baselines = row.pop("baselines")
    (total,) = [total.as_json() for total in rows_module.totals([make_row([1.0, 3.0], [4.0])])]
    sums = {("rival_ms" if name == "baseline_ms" else name): value for name, value in total.items()}
    older = {"machine": {}, "rows": [row | {"sparse": own, "rivals": baselines}], "totals": [sums]}
    now = results.as_now(older)
    assert (now["kind"], now["rows"], now["totals"]) == ("run", [row | own | {"baselines": baselines}], [total])
    assert results.as_now(now) is now
    step = {"kind": "step", "machine": {}, "rows": [{"way": "eager", "step_bytes": 3, "times": None}]}
    assert results.as_now(step)["rows"] == [{"variant": "eager", "extra_bytes": 3, "times": None}]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--layer is needed"),
        (["--layer", "resnet51"], "resnet50, resnet32, vgg19"),
        (["--layer", "vgg19", "--blocksize", "32"], "BKxBC"),
        (["--layer", "vgg19", "--sparsity", "1"], "[0, 1)"),
        (["--layer", "vgg19", "--tap-density", "5/4"], "4/9"),
        (["--layer", "vgg19", "--device", "cpu", "--dtype", "tf32"], "CUDA"),
        (["--layer", "vgg19", "--json", "."], "file name"),
        (["--layer", "vgg19", "--backend", "cudnn"], "choose from"),
    ],
)
def test_options_that_are_wrong_say_what_is_right(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert says in message


def test_a_backend_that_is_absent_is_refused_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(bs, "available_backends", lambda: {"torch": None, "triton": "no driver", "cupy": None})
    with pytest.raises(SystemExit):
        run.main(["--layer", "vgg19", "--backend", "triton"])
    assert "--backend triton cannot run here: no driver" in capsys.readouterr().err


def test_progress_says_how_long_the_rest_takes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(schedule.time, "perf_counter", lambda: now[0])
    progress = schedule.Schedule([1.0, 3.0, 4.0], end=180.0, fixed=False)
    assert progress.deadline(0) == pytest.approx(110.0)
    now[0] = 120.0
    assert progress.deadline(1) == pytest.approx(120 + 60 * 3 / 7)
    assert progress.seconds_left(1) == pytest.approx(140.0)  # at this pace longer than the time that was granted
    fixed = schedule.Schedule([1.0, 1.0], end=0.0, fixed=True)
    assert fixed.seconds_left(0) is None
    now[0] = 125.0
    assert fixed.seconds_left(1) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "foo", "foo is no device to measure on; it needs cpu, cuda or cuda:1"),
        ("--device", "meta", "meta is no device to measure on"),
        ("--device", "cuda:99", "CUDA device"),
        ("--sparsity", "x", "x is not in [0, 1)"),
        ("--batch", "x", "x is not a positive number"),
        ("--seconds", "nan", "nan is no number of seconds"),
    ],
)
def test_odd_options_are_one_message(capsys, option, value, message):
    with pytest.raises(SystemExit) as ended:
        run.parse_arguments(["--layer", "8,8,3,1,8", option, value])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in err
    assert "Traceback" not in err
