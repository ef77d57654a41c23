"""What chooses on a GPU, without one: predictions for devices by name, from counts of the kernels as they stand."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.counts import slots as counting
from bench.layers.networks import resnet50
from bench.layers.patterns import groups_used
from blocksparse import ConvGeometry, plan
from blocksparse.backends import Backend
from blocksparse.geometry import KINDS
from blocksparse.kernels import counted, cupy_conv, gpu_cost, gpus, measured, slot_cost, slots, tiles
from blocksparse.plan import plan_on

LAYERS = [layer for layer in resnet50() if layer.name != "stem"]
GPUS = st.sampled_from(list(gpus.NAMED))
BOUNDS = {"issue", "shared memory", "tensor cores", "L2", "HBM", "latency", "launch"}


def geometry(layer, batch=64) -> ConvGeometry:
    return ConvGeometry.of(layer.x_shape(batch), layer.shape, layer.stride, layer.padding)


def blocks_of(layer, blocksize, density):
    return max(1, round(density * layer.weights / math.prod(blocksize)))


def plan_of(layer, blocksize, density, gpu="h200", batch=64, dtype=torch.float16, **options):
    return plan_on(gpu, geometry(layer, batch), (blocks_of(layer, blocksize, density), *blocksize), dtype, **options)


def structures(layer):
    """Random blocks, narrow ones, single channels of few filters; equal groups, whole and in runs of 8 channels."""
    group = layer.k // groups_used(layer.k, 8)
    return {(32, 32), (64, 8), (16, 16), (8, 1), (group, 1), (group, 8)}


def named(name):
    return next(layer for layer in LAYERS if layer.name == name)


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    """The CUDA C++ kernels are asked about a GPU, not about the emulator."""
    monkeypatch.setattr(cupy_conv, "runtime", cupy_conv.Cuda())


# ---------------------------------------------------------------------- what is chosen


def test_wide_blocks_of_3x3_layers_run_on_blocks():
    for name in ("layer3.3x3", "layer4.3x3"):
        for gpu in ("h100", "h200"):
            found = plan_of(named(name), (32, 32), 0.1, gpu)
            assert found.backend == "triton"
            for product in found.products.values():
                assert product.estimate.seconds < product.dense.seconds


@pytest.mark.parametrize("gpu", gpus.NAMED)
def test_single_channels_and_many_weights_run_dense(gpu):
    for layer in (named("layer2.3x3"), named("layer3.3x3")):
        if gpu != "a100":  # its dense product is slow enough
            assert plan_of(layer, (8, 1), 0.1, gpu).backend == "torch"
        assert plan_of(layer, (32, 32), 0.9, gpu).backend == "torch"


def test_1x1_layers_run_dense_where_blocks_save_nothing():
    """They are bound by x and y, which every product moves."""
    for layer in LAYERS:
        if layer.shape[2:] == (1, 1):
            assert plan_of(layer, (8, 1), 0.1).backend == "torch"
            assert plan_of(layer, (32, 32), 0.9).backend == "torch"


def test_products_are_chosen_one_by_one():
    """Some layer runs one product on blocks and another one dense."""
    plans = [plan_of(layer, blocksize, 0.2) for layer in LAYERS for blocksize in ((32, 32), (64, 8))]
    assert any({product.backend for product in found.products.values()} == {"triton", "torch"} for found in plans)


@pytest.mark.parametrize("gpu", ["h200", pytest.param("h100", marks=pytest.mark.slow)])
@pytest.mark.parametrize("density", [0.05, 0.1, *(pytest.param(d, marks=pytest.mark.slow) for d in (0.2, 0.3, 0.5))])
def test_no_other_backend_would_be_faster(gpu, density):
    """Every layer and structure of ResNet-50. None is slower than a dense weight but by the launch that makes that."""
    for layer in LAYERS:
        for blocksize in structures(layer):
            found = plan_of(layer, blocksize, density, gpu)
            assert all(product.estimate.bound in BOUNDS for product in found.products.values())
            # The weight is written, the stored blocks are read, and for the gradient the other way.
            moved = 2 * layer.weights * (1 + 2 * density) / (0.7 * gpus.named(gpu, "").memory)
            assert all(p.estimate.seconds < p.dense.seconds + 2e-6 + moved for p in found.products.values())
            for name in ("torch", "triton", "cupy"):
                try:
                    other = plan_of(layer, blocksize, density, gpu, backend=name)
                except ValueError:
                    continue
                for kind in KINDS:
                    assert found.products[kind].estimate.seconds <= other.products[kind].estimate.seconds


def test_no_estimate_is_made_of_what_takes_longer_at_best(monkeypatch):
    """Two copies of x and y take longer than the whole product on blocks: no tile is picked for what comes between."""
    monkeypatch.setattr(slot_cost, "pick", None)
    for name in "layer1.3x3", "layer2.3x3", "layer3.3x3":
        assert " us by torch, at least " in plan_of(named(name), (32, 32), 0.1).products["fprop"].why


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "batch_last"])
def test_no_estimate_is_below_its_least(memory_format):
    for layer, blocksize in itertools.product(LAYERS[::4], ((32, 32), (8, 1))):
        bound = geometry(layer), (blocks_of(layer, blocksize, 0.1), *blocksize), torch.float16
        for name in ("torch", "cupy"):
            found = plan_on("h200", *bound, memory_format=memory_format, backend=name)
            run, work = found.fprop.func.__self__, found.fprop.args[0]
            for kind in KINDS:
                assert 0.0 <= run.at_least(kind, work) <= found.products[kind].estimate.seconds
        assert run.at_least("fprop", work) > 5e-6  # of cupy


def test_a_dense_filter_bank_costs_launches_alone():
    """The torch backend is PyTorch's product and one launch that makes its weight, whatever the batch."""
    for layer, batch in itertools.product(LAYERS, (1, 64, 256)):
        found = plan_of(layer, (8, 1), 0.1, batch=batch, backend="torch")
        for product in found.products.values():
            assert 0 < product.estimate.seconds - product.dense.seconds < 4e-6


def test_a_1x1_layer_in_batch_last_is_dense_without_copies():
    """One image of it is a matrix; with a stride its pixels are gathered, and dx has zeros around them."""
    for stride, extra in ((1, {"fprop": 0, "dgrad": 0}), (2, {"fprop": 1 / 4 + 1 / 4, "dgrad": 1 / 4 + 1 / 4 + 1})):
        g = ConvGeometry(64, 256, 56, 56, 128, 1, 1, (stride, stride))
        there, read = (
            plan_on("h200", geometry, (51, 64, 1), torch.float16, memory_format=form).products
            for geometry, form in ((g, "batch_last"), (replace(g, h=g.p, w=g.q, stride=(1, 1)), "channels_last"))
        )
        for kind, bytes_of_x in extra.items():
            moved = bytes_of_x * math.prod(g.x_shape) * 2 / (0.85 * 0.9 * 4.8e12)
            launches = (2 if kind == "dgrad" else 1) * 1.5e-6 if stride > 1 else 0.0
            assert there[kind].dense.seconds == pytest.approx(read[kind].dense.seconds + moved + launches, rel=1e-6)


def test_what_explain_says():
    text = str(plan_of(named("layer3.3x3"), (32, 32), 0.1))
    assert "fprop: triton (predicted " in text
    assert " us, bound by " in text
    assert " us by torch" in text
    assert " us by cupy" in text
    assert "PyTorch's product of a dense weight: predicted 28.9 us, bound by tensor cores" in text
    asked = str(plan_of(named("layer3.3x3"), (32, 32), 0.1, backend="torch"))
    assert "(asked for; predicted " in asked


def test_what_is_known_of_no_kernel_runs_dense():
    """float64, and contiguous images in Triton, of which nothing was counted."""
    assert plan_of(named("layer3.3x3"), (32, 32), 0.1, dtype=torch.float64).backend == "torch"
    layouts = {row["format"] for row in counted.rows("triton")}
    if "contiguous" not in layouts:
        assert "triton" not in plan_of(named("layer3.3x3"), (32, 32), 0.1, memory_format="contiguous").backend


def test_odd_names_and_backends_are_refused():
    with pytest.raises(ValueError, match=r"plan_on\(\): GPU is 'h300'; it needs one of 'a100', 'h100'"):
        plan_of(named("layer3.3x3"), (32, 32), 0.1, "h300")
    with pytest.raises(ValueError, match="backend 'triton' cannot run this: bc = 1"):
        plan_of(named("layer3.3x3"), (32, 1), 0.1, backend="triton")
    with pytest.raises(ValueError, match="backend 'cupy' cannot run this: arch = gfx942"):
        plan_of(named("layer3.3x3"), (32, 1), 0.1, "mi300x", backend="cupy")


# ---------------------------------------------------------------------- properties


@st.composite
def work(draw: st.DrawFn):
    """(geometry, blocksize, most blocks, dtype, precision)."""
    blocksize = draw(st.sampled_from([(32, 32), (64, 8), (16, 16), (8, 8), (128, 64), (8, 1), (64, 2), (24, 48)]))
    k, c = blocksize[0] * draw(st.integers(1, 16)), blocksize[1] * draw(st.integers(1, 16))
    kernel, stride = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2))
    size, n = draw(st.integers(7, 112)), draw(st.integers(1, 128))
    g = ConvGeometry.of((n, c, size, size), (k, c, kernel, kernel), stride, kernel // 2)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    return g, blocksize, g.k * g.c * g.taps // math.prod(blocksize), dtype, draw(st.sampled_from(["tf32", "ieee"]))


def seconds(g, blocksize, nnzb, dtype, precision, gpu, backend=None):
    found = plan_on(gpu, g, (nnzb, *blocksize), dtype, precision=precision, backend=backend)
    return [found.products[kind].estimate.seconds for kind in KINDS]


@settings(max_examples=25)
@given(work(), GPUS, st.integers(1, 99))
def test_more_blocks_are_never_faster(case, gpu, percent):
    """Of cupy's gradients that is not promised: how they are cut, and what taps are expected, follows from it, too."""
    g, blocksize, most, dtype, precision = case
    for backend in ("torch", "triton", "cupy"):
        try:
            few, many = (
                seconds(g, blocksize, nnzb, dtype, precision, gpu, backend)
                for nnzb in (max(1, most * percent // 100), most)
            )
        except ValueError:
            continue
        pairs = list(zip(few, many, strict=True))[: 1 if backend == "cupy" else 3]
        assert all(0 < a <= b * 1.0001 < 10 for a, b in pairs), (backend, few, many)


@settings(max_examples=25)
@given(work(), GPUS)
def test_twice_the_batch_is_never_faster(case, gpu):
    g, blocksize, most, dtype, precision = case
    g = replace(g, n=-(-g.n // 16) * 16)  # whole tiles of cupy's images: other batches take longer
    for backend in ("torch", "triton", "cupy", None):
        try:
            one, two = (
                seconds(replace(g, n=n), blocksize, max(1, most // 10), dtype, precision, gpu, backend)
                for n in (g.n, 2 * g.n)
            )
        except ValueError:
            continue
        assert all(a <= b * 1.0001 for a, b in zip(one, two, strict=True)), (backend, one, two)


def test_a_better_device_is_faster():
    for layer in LAYERS:
        for blocksize in structures(layer):
            slow, fast = (plan_of(layer, blocksize, 0.1, gpu) for gpu in ("h100", "h200"))
            for kind in KINDS:
                assert fast.products[kind].estimate.seconds <= slow.products[kind].estimate.seconds


def test_terms_by_hand():
    """One term at a time, of a device with round numbers."""
    gpu = gpus.NAMED["h100"]._replace(units=100, clock=1e9 / gpu_cost.SUSTAINED, memory=1e12, tensor=4096, l2=20.0)
    needs = gpu_cost.Demand(200.0, 4, 8, 1e8, 0.5, 1e6, 1e9, 4096.0, 1e9, 1e8, 1e8, 4.0)
    found = gpu_cost.terms(needs, gpu)
    # Two programs a unit are two warps to each scheduler: half an instruction a clock of the four.
    assert found["issue"] == pytest.approx(1e8 / 100 / (4 * 0.5) / 1e9)
    assert found["shared memory"] == pytest.approx(1e6 / 100 / gpu_cost.SHARED / 1e9)
    assert found["tensor cores"] == pytest.approx(1e9 / 100 / 4096 / gpu_cost.TENSOR / 1e9)
    assert found["L2"] == pytest.approx(1e9 / (100 * 20e9 * gpu_cost.L2))
    assert found["HBM"] == pytest.approx(1e8 / (0.9e12 * gpu_cost.HBM))
    assert found["latency"] == pytest.approx(4 * gpu_cost.LATENCY)
    # One program too many: one unit has three where two were the most.
    more = gpu_cost.terms(needs._replace(programs=201.0), gpu)
    assert more["issue"] > 1.4 * found["issue"] * 2 / 3 * 200 / 201
    assert gpu_cost.estimate(needs, gpu).bound == "L2"
    little = needs._replace(issue=0.0, wavefronts=0.0, flops=0.0, l2_read=0.0, l2_written=0.0, hbm=0.0, chain=1.0)
    assert gpu_cost.estimate(little, gpu) == (pytest.approx(gpu_cost.LATENCY + gpu_cost.LAUNCH), "launch", False)


def test_resident_programs():
    gpu = gpus.NAMED["h100"]
    assert gpu_cost.resident(128, 4, 40 << 10, gpu) == 4  # by registers
    assert gpu_cost.resident(64, 4, 100 << 10, gpu) == 2  # by shared memory
    assert gpu_cost.resident(16, 8, 1 << 10, gpu) == 8  # by warps
    assert gpu_cost.resident(255, 16, 300 << 10, gpu) == 1


# ---------------------------------------------------------------------- devices


def test_what_a_driver_tells_is_read():
    facts = SimpleNamespace(
        name="NVIDIA H200", multi_processor_count=132, clock_rate=1_980_000, memory_clock_rate=3_201_000,
        memory_bus_width=6016, shared_memory_per_multiprocessor=233_472,
    )  # fmt: skip
    found, sheet = gpus.read(facts, "sm_90"), gpus.NAMED["h200"]
    assert found.name == "NVIDIA H200"
    assert found.memory == pytest.approx(sheet.memory, rel=0.01)
    assert found._replace(name="h200", memory=sheet.memory) == sheet


def test_what_a_driver_does_not_tell_is_typical():
    facts = SimpleNamespace(name="A GPU", multi_processor_count=84)
    found = gpus.read(facts, "sm_86")
    assert (found.units, found.tensor, found.column) == (84, 1024, "sm_80")
    assert found.clock == gpus.NAMED["a100"].clock
    assert gpus.of(torch.device("cpu")) is None


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_has_counts(kind):
    for column, math_, block_n in itertools.product(gpus.TYPICAL, ("half", "tf32", "ieee"), (8, 16, 32, 64, 128)):
        for entry in tiles.find(kind, block_n, math_, column):
            sizes = entry.block_m, block_n, entry.block_k, entry.num_warps, entry.num_stages
            for version in ((3, 6), (3, 9), (9, 0)):
                loop = counted.triton(kind, math_, column, version, True, 1, (block_n, block_n), sizes)
                assert loop.each > 0 < loop.outside
                assert 16 <= loop.registers <= 255
    for math_, bk in itertools.product(counting.NUMBERS, (8, 16, 24, 32, 64, 128)):
        for cut in slots.cuts(kind, bk, counting.NUMBERS[math_][0]):
            found = counted.cupy(kind, math_, *cut)
            assert all(count > 0 for count in (found.load, found.task, found.mma, found.step, found.outside))


@pytest.mark.parametrize("row", counted.rows("cupy"), ids=lambda row: "-".join(map(str, list(row.values())[:6])))
def test_the_budgets_of_the_cuda_kernels(row):
    """What the head of each .cu file says, of every kernel that is counted."""
    assert row["spills"] == 0
    assert row["registers"] <= 128
    assert row["load"] <= 14
    assert row["rest"] <= 18
    assert row["mma"] <= (12 if row["math"] == "FP16" else 15)
    assert row["result"] <= 45
    assert row["step"] <= 200


def test_a_counted_kernel_is_its_own_nearest():
    for row in counted.rows("triton"):
        number = "half" if row["dtype"] != "float32" else row["precision"]
        version = tuple(int(part) for part in row["triton"].split(".")[:2])
        sizes = tuple(row["tile"][name] for name in counted.TILE)
        last, column = row["format"] == "channels_last", gpus.column_of(row["target"])
        loop = counted.triton(row["kind"], number, column, version, last, row["stride"], tuple(row["blocksize"]), sizes)
        same = [  # of targets that share a column the first is taken
            other for other in counted.rows("triton")
            if all(other[key] == row[key] for key in ("kind", "dtype", "precision", "triton", "blocksize", "format",
                                                      "stride", "tile"))
            and gpus.column_of(other["target"]) == column
        ]  # fmt: skip
        assert (loop.each, loop.outside) in [(other["loop"], other["outside"]) for other in same]


@pytest.mark.slow
def test_the_counts_of_the_cuda_kernels_are_those_of_today():
    """A change that makes a kernel need more instructions shows here; `bench/count.py --cupy --write` counts anew."""
    table = {tuple(row[name] for name in counting.Special._fields): row for row in counted.rows("cupy")}
    assert set(table) == {tuple(special) for special in counting.counted()}
    chosen = [next(s for s in counting.counted() if s.kind == kind and s.filters == 32) for kind in KINDS]
    for row in counting.rows(chosen):
        kept = table[tuple(row[name] for name in counting.Special._fields)]
        assert row["spills"] == 0
        if row["nvrtc"] == kept["nvrtc"]:
            assert row == kept
        else:  # another compiler
            for name in ("load", "mma", "result", "outside", "registers"):
                assert row[name] == pytest.approx(kept[name], rel=0.25), (name, row, kept)


# ---------------------------------------------------------------------- measurements


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A folder of measured times of its own."""
    monkeypatch.setattr(measured, "HERE", tmp_path)
    measured._table.cache_clear()
    yield tmp_path
    measured._table.cache_clear()


def test_a_measurement_overrides_the_prediction(table):
    layer, blocksize = named("layer3.3x3"), (32, 32)
    g, nnzb = geometry(layer), blocks_of(layer, blocksize, 0.1)
    assert plan_of(layer, blocksize, 0.1).products["dgrad"].backend == "triton"
    facts = measured.facts("torch", "dgrad", g, blocksize, nnzb, torch.float16, "ieee", True)
    measured.path_of("h200").write_text(json.dumps(measured.merged("h200", [facts | {"seconds": 1e-6}])))
    measured._table.cache_clear()
    found = plan_of(layer, blocksize, 0.1)
    assert found.products["dgrad"].backend == "torch"
    assert found.products["dgrad"].why.startswith("measured 1 us; ")
    assert found.products["fprop"].backend == "triton"
    elsewhere = {"gpu": "h100"}, {"density": 0.2}, {"batch": 32}
    for change in elsewhere:
        other = plan_of(**{"layer": layer, "blocksize": blocksize, "density": 0.1, **change})
        assert "measured" not in str(other)


def test_measurements_are_merged_and_dropped_with_another_triton(table, monkeypatch):
    layer, blocksize = named("layer3.3x3"), (32, 32)
    facts = measured.facts("torch", "fprop", geometry(layer), blocksize, 58, torch.float16, "ieee", True)
    for t in (1e-3, 2e-3):
        content = measured.merged("NVIDIA H200", [facts | {"seconds": t}])
        assert [row["seconds"] for row in content["rows"]] == [t]
        measured.path_of("NVIDIA H200").write_text(json.dumps(content))
    assert measured.path_of("NVIDIA H200").name == "nvidia-h200.json"
    assert measured.seconds("NVIDIA H200", facts) == 2e-3
    measured._table.cache_clear()
    monkeypatch.setattr(measured, "triton_version", lambda: (9, 9))
    assert measured.seconds("NVIDIA H200", facts) is None


# ---------------------------------------------------------------------- on a device that answers as a GPU


def test_a_plan_for_a_device_reads_its_numbers(monkeypatch):
    """As plan_conv makes it where there is a GPU."""
    monkeypatch.setattr(gpus, "of", lambda device: gpus.NAMED["h200"] if device.type == "cuda" else None)
    monkeypatch.setattr(Backend, "absent", lambda self: None)
    for backend in plan.all_backends().values():
        monkeypatch.setattr(type(backend), "absent", lambda self: None)
    layer, blocksize = named("layer3.3x3"), (32, 32)
    there = plan_of(layer, blocksize, 0.1)
    shape = (there.nnzb, *blocksize)
    setting = plan.Setting(0, "channels_last")
    args = there.geometry, shape, torch.float16, torch.device("cuda", 0), there.layout
    plan.plan_conv.cache_clear()
    found = plan.plan_conv("a test", *args, None, setting)
    assert found.products == there.products
    assert plan.plan_conv("a test", *args, None, setting) is found  # made once
    plan.plan_conv.cache_clear()
