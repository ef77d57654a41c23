"""bench/gpu.py and what it runs: every stage at toy sizes, nothing lost when stopped, wrong answers named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import blocksparse as bs
from bench import gpu, launch, page, run, step, sweep
from bench.pages import devices, figure, goals, tables
from bench.shared import results
from bench.shared.clocks import Lap
from bench.shared.rows import FAIL, OK, Times
from bench.stages import jobs, running
from blocksparse import ops
from blocksparse.backends import named
from blocksparse.geometry import KINDS
from blocksparse.kernels import triton_bank, triton_kernels, triton_norm_kernels, triton_wgrad
from processes import run as run_process

ROOT = Path(__file__).resolve().parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU runs the stages for real")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the command


@no_gpu
@pytest.mark.slow
def test_every_stage_runs_and_makes_a_page(tmp_path):
    # A machine with a GPU may have no pytest-xdist, which the project's own options of pytest need.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "-p no:xdist"}
    found: dict = {}
    for command in jobs.COMMANDS:
        words = [sys.executable, str(ROOT / "bench" / "gpu.py"), command, "--quick", "--out", str(tmp_path)]
        done = run_process(words, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / f"{command}.log").read_text()[-3000:]
        results = json.loads((tmp_path / f"{command}.json").read_text())
        assert results["complete"] is True
        assert results["machine"]["gpu"] == "no CUDA device"
        found |= results["stages"]
        with tarfile.open(tmp_path / f"{command}.tar.gz") as archive:
            assert len(archive.getnames()) > 1
    assert len(list(tmp_path.iterdir())) == 3 * len(jobs.COMMANDS)
    assert list(found) == ["tests", "tiles", "launch", "compile", "layers", "sweep", "step", "sanitizer"]
    for name, stage in found.items():
        needs_gpu = name in ("tiles", "sanitizer", "compile", "sweep")
        assert (stage["status"], stage["why"]) == (("not run", "no CUDA device") if needs_gpu else ("ok", "")), name
    assert found["tests"]["jobs"]["tests"]["result"]["tests"] > 5
    for name, least in (("launch", 2), ("layers", 8), ("step", 4)):
        (job,) = found[name]["jobs"].values()
        assert len(job["result"]["rows"]) >= least, name
    files = [str(tmp_path / f"{command}.json") for command in jobs.COMMANDS]
    assert page.main([*files, "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "index.md").read_text()
    assert "sanitizer: not run (no CUDA device)" in text
    assert "### training steps" in text
    assert "### host time of a call" in text
    assert "| 3x3, 16 channels, 6x6 |" in text
    assert "### goals" not in text  # of a GPU


def test_without_a_gpu_only_toy_sizes_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["check", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "PyTorch sees no CUDA device here; --quick" in capsys.readouterr().err


def test_a_stage_of_another_command_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["layers", "--quick", "--stages", "tests", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "--stages tests: layers has compile, layers, sweep" in capsys.readouterr().err


def test_the_stages_of_a_gpu_name_real_options(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.shutil, "which", lambda name: f"/usr/bin/{name}")
    every = [jobs.stages(command, tmp_path, True, False, 500.0) for command in jobs.COMMANDS]
    found = {stage.name: stage for each in every for stage in each}
    assert not any(stage.missing for stage in found.values())
    assert found["tests"].jobs[0].command[-4:-1] == ("tests", "-m", "device or gpu")
    assert found["tiles"].jobs[0].command[-3:] == (jobs.TILES, "-k", "real_layer")
    assert (ROOT / jobs.TILES).exists()
    assert "addopts=" in found["tests"].jobs[0].command  # not the project's: those leave the slow ones out
    for job in (*found["layers"].jobs, *found["step"].jobs):
        assert "--json" in job.command
    for job in found["step"].jobs:
        step.parse_arguments(job.command[job.command.index("--network") :])
    timed, compiled = (
        [
            (layer, word)
            for job in found[name].jobs
            if "sweep" not in job.name
            # But for the backends, which may be absent here, every option is understood.
            for words in [_without_backends(job.command[job.command.index("--layer") :])]
            for layer in run.parse_arguments(words).layers
            for word in words
            if word.startswith("--") and word not in ("--seconds", "--repeats")
        ]
        for name in ("layers", "compile")
    )
    shapes = [{(layer.shape, layer.stride, layer.size, word) for layer, word in each} for each in (timed, compiled)]
    assert shapes[0] == shapes[1]  # what is timed is compiled before


def _without_backends(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in ("--backend", "triton", "cupy", "--keep")]


def test_kernels_of_ours_are_what_a_sanitizer_watches():
    files = triton_bank, triton_kernels, triton_norm_kernels, triton_wgrad
    triton = {name for file in files for name in vars(file) if name.endswith("_kernel") and not name.startswith("_")}
    assert len(triton) == 9
    assert all(re.match(jobs.OURS, name) for name in {*triton, *KINDS, "add_splits"})


def writes_then_sleeps(folder: Path, name: str) -> jobs.Job:
    """A process that writes a result, says so, and would go on for ever."""
    code = (
        "import json, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # who started the tests may ignore it
        f"json.dump({{'kind': 'launch', 'complete': False, 'rows': []}}, open({str(folder / name) + '.json'!r}, 'w'))\n"
        f"open({str(folder / name) + '.done'!r}, 'w').close()\n"
        "time.sleep(600)"
    )
    return jobs.Job(name, (sys.executable, "-c", code))


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


def run_one(stage: jobs.Stage, folder: Path, seconds: float = 60.0) -> dict:
    found: dict = {}
    with (folder / "log").open("w") as log:
        running.run_stage(stage, seconds, folder, log, found)
    return found


@pytest.mark.parametrize("parallel", [False, True])
def test_a_process_past_its_limit_is_stopped_and_its_result_kept(parallel, tmp_path, monkeypatch):
    real, names = running.finish, ("slow", "slower")

    def finish_late(started, *more):
        for each in started:
            wait_for(tmp_path / f"{each.job.name}.done")
        return real([dataclasses.replace(each, end=0.0) for each in started], *more)

    monkeypatch.setattr(running, "finish", finish_late)
    monkeypatch.setattr(running, "PATIENCE", 60.0)
    found = run_one(
        jobs.Stage("launch", 1.0, [writes_then_sleeps(tmp_path, name) for name in names], parallel), tmp_path
    )
    assert found["status"] == "late"
    assert found["why"] == "stopped at its limit: slow, slower"
    for name in names:
        job = found["jobs"][name]
        assert job["late"] is True
        assert job["exit"] in (-signal.SIGINT, 1)
        assert job["result"]["kind"] == "launch"


def test_results_are_kept_while_a_process_runs(tmp_path, monkeypatch):
    """A kill of the whole command loses nothing that a process has written."""
    seen: list[object] = []

    def keep() -> None:
        job = found["jobs"].get("slow")
        if job and job["result"]:
            seen.append(job["exit"])
            raise KeyboardInterrupt

    found: dict = {}
    monkeypatch.setattr(running, "OFTEN", 0.0)
    stage = jobs.Stage("launch", 1.0, [writes_then_sleeps(tmp_path, name) for name in ("slow", "other")], True)
    with (tmp_path / "log").open("w") as log, pytest.raises(KeyboardInterrupt):
        running.run_stage(stage, 600.0, tmp_path, log, found, keep)
    assert seen == [None]  # it ran
    assert found["jobs"]["slow"]["result"]["kind"] == "launch"


def test_an_interrupt_keeps_what_was_found_and_ends_the_processes(tmp_path, monkeypatch):
    started = []
    real_start = running.start

    def start(*args):
        started.append(real_start(*args))
        return started[-1]

    def interrupted(waiting, folder, *more):
        wait_for(folder / "slow.done")
        raise KeyboardInterrupt

    def stages(command, folder, *more):
        stage = jobs.Stage("launch", 1.0, [writes_then_sleeps(folder, "slow")])
        return [stage, dataclasses.replace(stage, name="layers")]

    monkeypatch.setattr(running, "start", start)
    monkeypatch.setattr(running, "finish", interrupted)
    monkeypatch.setattr(gpu, "stages", stages)
    assert gpu.main(["check", "--quick", "--out", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "check.json").read_text())
    assert results["complete"] is False
    assert list(results["stages"]) == ["launch"]
    assert results["stages"]["launch"]["jobs"]["slow"]["result"]["kind"] == "launch"
    assert [each.process.poll() is not None for each in started] == [True]


def test_a_stage_without_time_is_not_run(tmp_path):
    found = run_one(jobs.Stage("tiles", 1.0, [writes_then_sleeps(tmp_path, "slow")]), tmp_path, -1.0)
    assert (found["status"], found["why"]) == ("not run", "no time was left")


def test_a_stage_with_a_wrong_answer_fails(tmp_path):
    job = jobs.Job("bad", (sys.executable, "-c", "raise SystemExit(1)"))
    found = run_one(jobs.Stage("tiles", 1.0, [job, job._replace(name="worse")], True), tmp_path)
    assert found["status"] == "failed"
    assert found["why"] == "exit status not 0: bad, worse"


# ---------------------------------------------------------------- steps


def times(*ms: float) -> Times:
    return Times.of([Lap(1e-3 * t) for t in ms])


def test_steps_are_compared_with_the_fastest_dense_way_and_the_same_one():
    def row(structure, way, *ms):
        facts = {"sparsity": 0.9, "distribution": "erk", "batch": 1, "image_size": 8, "dtype": "fp32"}
        found = times(*ms) if ms else None
        return step.StepRow(network="net", structure=structure, variant=way, times=found, **facts)

    rows = [
        row("dense", "a", 4.0),
        row("dense", "b", 2.0),
        row("block", "a", 1.0),
        row("block", "b"),
        row("hrbp", "c", 8),
    ]
    step.compare(rows)
    assert rows[2].speedup == {"dense": pytest.approx(2.0), "same": pytest.approx(4.0)}
    assert rows[3].speedup == {}
    assert rows[4].speedup == {"dense": pytest.approx(0.25), "same": None}


WRONG = {"FPROP": "the mean square of its outputs is", "DGRAD": "the gradient of", "WGRAD": "the gradient of"}


@pytest.mark.parametrize("name", WRONG)
def test_a_sparse_network_that_learns_something_else_gets_no_time(name, monkeypatch, tmp_path, capsys):
    op, says = getattr(ops, name), WRONG[name]
    right, both = op.run, ops._gradients
    monkeypatch.setattr(op, "run", lambda *args: 1.01 * right(*args))

    def wrong_ones(*args, **facts):
        dx, dv = both(*args, **facts)
        return (1.01 * dx, dv) if name == "DGRAD" else (dx, 1.01 * dv)

    if name != "FPROP":
        monkeypatch.setattr(ops, "_gradients", wrong_ones)
    file = tmp_path / "step.json"
    options = ["--network", "resnet8", "--structure", "block", "--quick", "--device", "cpu", "--json", str(file)]
    assert step.main(options) == 1
    rows = [row for row in json.loads(file.read_text())["rows"] if row["structure"] == "block"]
    assert {row["status"] for row in rows} == {FAIL}
    assert all(says in row["reason"] and row["times"] is None and row["speedup"] == {} for row in rows)
    assert "FAIL" in capsys.readouterr().out


def test_a_structure_that_cannot_be_made_ends_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(step.CASES, "block", {"structure": "block", "blocksize": (7, 7)})
    file = tmp_path / "step.json"
    options = ["--network", "resnet8", "--structure", "block", "--quick", "--device", "cpu", "--json", str(file)]
    assert step.main(options) == 0
    rows = {row["structure"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["dense"]["status"] == OK
    assert rows["block"]["status"] == "refused"
    assert "no layer to make sparse" in rows["block"]["reason"]


def test_rounding_alone_is_far_from_a_failure(monkeypatch):
    """With this seed a unit at the kink of a ReLU would make a gradient differ by half a percent."""
    torch.manual_seed(0)
    network = step.NETWORKS["vgg19"].build()
    x = torch.randn(4, 3, 32, 32)
    monkeypatch.setattr(step, "NETWORK_ALLOWED", 2e-5)
    assert step.differs(step.hrbp.sparsify(network, 0.95, structure="hrbp++"), x) == ""


def test_an_interrupt_keeps_the_steps_that_were_timed(monkeypatch, tmp_path):
    calls = iter(range(11))

    class Clock:
        def lap(self, call, cold=True):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return Lap(1e-3)

    monkeypatch.setattr(step, "make_step_clock", lambda device: Clock())
    file = tmp_path / "step.json"
    options = ["--network", "resnet8", "--structure", "block", "--device", "cpu", "--json", str(file)]
    assert step.main(options) == 130
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 8
    assert all(row["status"] == OK and row["times"]["p50"] == pytest.approx(1.0) for row in rows)


def test_a_step_trains():
    torch.manual_seed(0)
    network = step.NETWORKS["resnet8"]
    x, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    run = step.Step(network.build(), x, target, step.Way("channels_last"), "fp32", None)
    losses = [float(run.call()) for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", [["--sparsity", "1"], ["--batch", "0"], ["--network", "lenet"]])
def test_wrong_options_end_a_step_run(options):
    with pytest.raises(SystemExit) as stop:
        step.main(options)
    assert stop.value.code == 2


# ---------------------------------------------------------------- tiles


@pytest.mark.slow
def test_every_tile_is_timed_beside_the_chosen_one(tmp_path, capsys, monkeypatch):
    file = tmp_path / "sweep.json"
    words = ["--layer", "32,32,3,1,4", "--blocksize", "32x32", "8x1", "--device", "cpu", "--quick", "--dtype", "fp32"]
    assert sweep.main([*words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {(row["backend"], row["kind"]) for row in rows} == {(b, kind) for b in ("triton", "cupy") for kind in KINDS}
    for backend in ("triton", "cupy"):
        for kind in KINDS:
            mine = [row for row in rows if (row["backend"], row["kind"]) == (backend, kind)]
            assert [row["chosen"] for row in mine] == [True] + [False] * (len(mine) - 1)
            assert len(mine) >= 2
            assert all(row["times"] for row in mine)
    text = capsys.readouterr().out
    assert "32,32,3,1,4 wgrad, blocks of 32x32 on triton: 3 of 3 tiles ran" in text

    class Wrong(type(named("triton", ""))):
        def fprop(self, work, tile, *tensors):
            result = super().fprop(work, tile, *tensors)
            return result if tile == self.tile("fprop", work) else 1.1 * result

    monkeypatch.setattr(sweep, "named", lambda *_: Wrong())
    assert sweep.main([*words[:2], "--blocksize", "32x32", "--kind", "fprop", *words[5:]]) == 1
    assert "FAIL: off by 0.1 of the largest element from the chosen tile" in capsys.readouterr().out


# ---------------------------------------------------------------- host time


def test_host_time_is_beside_that_of_the_dense_module(monkeypatch):
    seconds = {"dense forward": 1e-5, "dense step": 3e-5, "sparse forward": 2e-5, "sparse step": 7e-5}

    class Clock:
        def lap(self, call, cold=True):
            return Lap(seconds[call()])

    def calls(module, x):
        name = "sparse" if isinstance(module, bs.BSRConv2d) else "dense"
        return {kind: (lambda kind=kind: f"{name} {kind}") for kind in launch.KINDS}

    monkeypatch.setattr(launch, "kinds", calls)
    monkeypatch.setattr(bs, "available_backends", lambda: {"torch": None, "triton": "absent"})
    rows: list[launch.HostRow] = []
    launch.measure(torch.device("cpu"), Clock(), 3, rows)
    dense, sparse = rows
    assert (dense.module, sparse.module, sparse.backend) == ("nn.Conv2d", "BSRConv2d", "torch")
    assert (dense.forward_us, dense.step_us) == (pytest.approx(10.0), pytest.approx(30.0))
    assert sparse.beyond == {"forward": pytest.approx(10.0), "step": pytest.approx(40.0)}


# ---------------------------------------------------------------- the page


FILES = sorted((ROOT / "bench" / "results").glob("cpu-*.json"))


def test_the_readmes_table_is_that_of_the_page(tmp_path):
    """Every row of numbers in README's first table stands in the page that the committed files make."""
    assert page.main([*map(str, FILES), "--out", str(tmp_path)]) == 0
    made = (tmp_path / "index.md").read_text().splitlines()
    written = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ") and " ms, **" in line
    ]
    assert len(written) == 5
    for line in written:
        assert line in made


def content(rows: list[dict], machine: dict | None = None) -> dict:
    where = {"device": "H", "device_type": "cuda", "threads": 1, "torch": "2", "commit": "c" * 40, "dirty": False}
    return {
        "kind": "run", "format": results.FORMAT, "complete": True, "machine": where | (machine or {}), "rows": rows,
        "totals": [],
        "options": {"dtype": "fp16", "batch": 8, "tap_density": "1"},
        "ceilings": {"at_start": {"copy_bytes": 1e12, "matmul_flops": 1e14}, "at_end": None},
    }  # fmt: skip


def layer_row(sparse: float | None, dense: float, **changes) -> dict:
    def result(t):
        return {"status": FAIL if t is None else OK, "times": None if t is None else {"p50": t}}

    speed = None if sparse is None else dense / sparse
    return {
        "net": "resnet50", "layer": "a", "count": 1, "shape": [64, 64, 3, 3], "x_shape": [8, 64, 9, 9], "stride": 1,
        "padding": [1, 1], "structure": "random blocks", "blocksize_asked": "32x32", "sparsity_asked": 0.9,
        "backend_asked": "auto", "kind": "total", **result(sparse), "baselines": {"dense": result(dense)},
        "blocksize": [32, 32], "nnzb": 4, "useful_flops": 1e6, "flops_per_second": 1e9 if sparse else None,
        "percent_of_roofline": None if sparse is None else 50.0,
        "speedup": {"dense": speed, "grouped": None, "torch_bsr": None, "narrow": None},
    } | changes  # fmt: skip


def device_of(tmp_path: Path, *contents: dict) -> devices.Device:
    files = []
    for i, each in enumerate(contents):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(each))
    (device,) = devices.read(files)
    return device


def goals_of(device: devices.Device) -> dict[str, list[str]]:
    lines = [line[2:-2].split(" | ") for line in goals.goal_table(device) if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_every_goal_has_a_measure_and_a_limit(tmp_path):
    listed = json.loads(goals.FILE.read_text())
    assert {goal["measure"] for goal in listed} == set(goals.MEASURES)
    assert all(("at_least" in goal) != ("at_most" in goal) for goal in listed)
    assert len({goal["goal"] for goal in listed}) == len(listed)
    assert all(cells[1:] == ["n/a", ""] for cells in goals_of(device_of(tmp_path, content([]))).values())


def test_goals_take_the_best_pattern_of_each_layer_and_count_layers(tmp_path):
    large = {"x_shape": [64, 64, 9, 9]}
    rows = [
        layer_row(2.0, 8.0, **large),  # 4x
        layer_row(4.0, 8.0, blocksize_asked="group", structure="equal groups", percent_of_roofline=80.0, **large),
        layer_row(5.0, 10.0, layer="b", count=3, x_shape=[64, 64, 5, 5]),  # 2x, three times
        layer_row(1.0, 50.0, layer="c", stride=2, **large),  # counts for the net alone
        layer_row(1.0, 0.5, sparsity_asked=0.5, **large),
    ]
    halves = content(rows, {"device": "NVIDIA H200"})
    other = content([layer_row(1.0, 100.0, **large)], {"device": "NVIDIA H200"})
    other["options"] = other["options"] | {"dtype": "bf16"}
    found = goals_of(device_of(tmp_path, halves, other))
    blocks, groups = (f"3x3 of stride 1, 90%, {name}, batch 64: x dense" for name in ("(32, 32)", "HRBP"))
    assert found[blocks] == ["at least 3", f"{(8 + 30) / (2 + 15):.3g}", "no"]
    assert found[groups][1:] == ["2", "no"]
    assert found[blocks.replace("64", "256")][1:] == ["n/a", ""]
    assert found["all convolutions but the stem, 90%, best pattern: x dense"] == [
        "at least 1.5",
        f"{88 / 18:.3g}",
        "yes",
    ]
    assert found["3x3 of stride 1, 90%, best pattern: least share of its roofline"][1:] == ["50", "no"]
    assert found["any layer and sparsity, backend chosen by the library, total: least x dense"][1:] == ["0.5", "no"]
    assert found["training step, VGG-19, 95%: x dense"][1:] == ["n/a", ""]
    (tmp_path / "h100").mkdir()
    assert goals_of(device_of(tmp_path / "h100", content(rows, {"device": "NVIDIA H100"})))[blocks][0] == "at least 2.5"
    (tmp_path / "other").mkdir()
    assert blocks not in goals_of(device_of(tmp_path / "other", content(rows)))


def test_goals_of_steps_and_launches(tmp_path):
    step_row = {
        "network": "vgg19", "batch": 1, "dtype": "bf16", "structure": "hrbp", "sparsity": 0.95, "variant": "w",
        "times": {"p50": 1.0}, "speedup": {"dense": 3.5, "same": 1.0}, "extra_bytes": None, "state_bytes": 1,
    }  # fmt: skip
    launch_row = {"module": "BSRConv2d", "backend": "triton", "forward_us": 40.0, "step_us": 90.0,
                  "beyond": {"forward": 25.0, "step": 41.0}}  # fmt: skip
    steps = content([step_row, step_row | {"speedup": {"dense": 2.0}}]) | {"kind": "step"}
    update = {
        "module": "set_pattern",
        "variant": "8x1",
        "update_ms": 7.0,
        "forward_us": None,
        "step_us": None,
        "beyond": {},
    }
    device = device_of(tmp_path, steps, content([launch_row, update]) | {"kind": "launch"})
    found = goals_of(device)
    assert found["a mask update of 512x512x3x3, ms"] == ["at most 5", "7", "no"]
    assert "A mask update of 512x512x3x3 in blocks of 8x1: 7.00 ms." in tables.page(device)
    assert found["training step, VGG-19, 95%: x dense"] == ["at least 3", "3.5", "yes"]
    assert found["host time of a module call beyond nn.Conv2d, us"] == ["at most 30", "25", "yes"]
    assert "| BSRConv2d triton | 40 us | 25 us | 90 us | 41 us |" in tables.page(device)


def test_a_failed_row_shows_no_number(tmp_path):
    device = device_of(tmp_path, content([layer_row(None, 8.0), layer_row(2.0, 8.0, blocksize_asked="8x8")]))
    (line,) = [line for line in tables.page(device) if line.startswith("| 3x3, 64 channels, 9x9")]
    assert line == "| 3x3, 64 channels, 9x9 | 8.0 ms | FAIL | 2.0 ms, **4.0x** |"


def test_points_of_the_roofline_are_useful_flops_over_least_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    row = layer_row(2.0, 8.0, kind="fprop")
    device = device_of(tmp_path, content([row]))
    (point,) = figure.points(device)
    nbytes = 2 * (8 * 64 * 81 + 8 * 64 * 81 + 4 * 32 * 32) + 4 * (2 + 1 + 4)
    assert point.intensity == pytest.approx(1e6 / nbytes)
    assert point.flops_per_second == 1e9
    assert figure.draw(device, tmp_path / "roofline.png") is True
    assert (tmp_path / "roofline.png").stat().st_size > 5000
    assert figure.draw(dataclasses.replace(device, runs=[]), tmp_path / "none.png") is False


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit) as stop:
        page.main([str(tmp_path / "x.json"), "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "not a result file of this benchmark" in capsys.readouterr().err
