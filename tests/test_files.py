"""One writer to a folder, whoever dies; a full disk is told with the name of the file; forged states are refused."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

import processes
from hrbp import files
from hrbp.files import LOCK, naming, only_writer, whole_file
from hrbp.formats import model as saved
from hrbp.formats import sealed
from hrbp.study import runner as sweep
from hrbp.study.study import Study
from hrbp.study.variants import Variant
from hrbp.training import checkpoint, log
from hrbp.training.trainer import Trainer
from test_study import tiny
from test_train import variant

FILES = Path(files.__file__)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Figures of trainings take longer than these trainings; times of these networks tell nothing."""
    monkeypatch.setattr("hrbp.training.log.draw_training", lambda *_: None)
    monkeypatch.setattr("hrbp.study.study.ROUNDS", 1)
    monkeypatch.setattr("hrbp.study.timing.WARM_UP", 0)


# ---------------------------------------------------------------- one writer

HOLDER = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("files", sys.argv[1])  # alone: it loads nothing of the library
files = importlib.util.module_from_spec(spec)
sys.modules["files"] = files
spec.loader.exec_module(files)
with files.only_writer(sys.argv[2], "holder"):
    child = os.fork() if sys.argv[3] == "fork" else 1
    if child == 0:
        time.sleep(60)  # as a process that decodes images, which outlives a killed parent for a while
        os._exit(0)
    print(os.getpid(), child, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_folder_has_one_writer_and_is_free_when_that_is_killed(tmp_path, how):
    command = [sys.executable, "-c", HOLDER, str(FILES), str(tmp_path), how]
    with processes.Process(command, limit=60) as holder:
        while not holder.output()[0].endswith("\n"):
            assert holder.running(), holder.output()[1]
            time.sleep(0.02)
        pid, child = map(int, holder.output()[0].split())
        try:
            message = rf"me: process {pid} on {socket.gethostname()} is writing to {tmp_path}; wait until it ends"
            with pytest.raises(ValueError, match=message), only_writer(tmp_path, "me"):
                pass
            os.kill(pid, signal.SIGKILL)  # it alone
            while holder.running():
                time.sleep(0.02)
            assert (tmp_path / LOCK).exists()  # nobody could remove it
            with only_writer(tmp_path, "me"):
                pass
            assert not list(tmp_path.iterdir())
        finally:
            if how == "fork":
                os.kill(child, signal.SIGKILL)


def test_a_second_writer_of_one_process_is_refused(tmp_path):
    with only_writer(tmp_path / "new", "first"):
        with (
            pytest.raises(ValueError, match=f"second: process {os.getpid()} on"),
            only_writer(tmp_path / "new", "second"),
        ):
            pass
        assert (tmp_path / "new" / LOCK).exists()  # the refused one took nothing away
    with only_writer(tmp_path / "new", "third"):
        pass


def test_two_trainings_do_not_write_to_one_folder(tmp_path):
    first = variant("rigl", tmp_path)
    run, refused = first._run_step, []

    def step(x, y):
        if first.step == 4:
            with pytest.raises(ValueError, match=rf"Trainer\(\): process {os.getpid()} on .* is writing to") as caught:
                variant("rigl", tmp_path, resume=True)
            refused.append(caught)
        return run(x, y)

    first._run_step = step
    assert first.run().steps == 15
    assert len(refused) == 1
    assert not (tmp_path / LOCK).exists()


def test_what_another_training_has_written_is_not_overwritten(tmp_path):
    first = variant("rigl", tmp_path)
    second = variant("rigl", tmp_path, resume=True)
    first.run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"another training has written to .*; make it again with resume"):
        second.run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_studies_do_not_write_to_one_folder(tmp_path):
    made = tiny(tmp_path / "s", [Variant("dense")], seeds=(0,))
    with only_writer(tmp_path / "s", "other"):
        with pytest.raises(ValueError, match=r"Study\(\): process"):
            made.run()
        assert [path.name for path in (tmp_path / "s").iterdir()] == [LOCK]
    (tmp_path / "s" / LOCK).write_text("1 elsewhere\n")  # what a killed one leaves is no content of the folder
    assert len(tiny(tmp_path / "s", [Variant("dense")], seeds=(0,)).run()["runs"]) == 1


# ---------------------------------------------------------------- a full disk


@contextlib.contextmanager
def full():
    """No file of this process may be larger than 2000 bytes: a write fails as on a full disk, and names no file.
    Only for the write itself: pytest writes its own report to a file, too."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    model, path = torch.nn.Linear(50, 50), tmp_path / "file"
    writes = {
        "weights": lambda: saved.save(model, path),
        "checkpoint": lambda: checkpoint.write_training(tmp_path, {"model": model.state_dict()}),
        "results": lambda: sweep.write_json(path, list(range(2000))),
        "log": lambda: log.start_log(path, [{"kind": "epoch", "step": i} for i in range(200)]),
    }
    for name, write in writes.items():
        path.write_bytes(b"old")
        with pytest.raises(OSError, match=r"\[Errno") as caught, full():
            write()
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(tmp_path / "last.pt" if name == "checkpoint" else path), name
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
    path.write_bytes(bytes(1990))
    with pytest.raises(OSError, match="File too large") as caught, full():
        log.add_to_log(path, {"kind": "epoch", "loss": 0.5})
    assert caught.value.filename == str(path)


def test_errors_that_name_a_file_keep_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, naming("wrong"):
        os.stat(tmp_path / "missing")
    assert caught.value.filename == str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "no" / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "no" / "file")  # and not the hidden one beside it


# ---------------------------------------------------------------- forged content

JUNK = [None, -1, 3.5, "x", b"y", [1], {"a": 1}, torch.zeros(2), torch.zeros(3, 4, dtype=torch.int64), 10**30]


def paths(content, at=()):
    if at:
        yield at
    inner = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    for key, value in inner:
        yield from paths(value, (*at, key))


def forged(content, count: int, plain: bool = False):
    """Copies of nested content with something dropped, or replaced by what does not belong there."""
    draw, places = random.Random(0), list(paths(content))
    junk = [value for value in JUNK if not plain or isinstance(value, None | int | float | str | list | dict)]
    for at in draw.sample(places, min(count, len(places))):
        for drop in (True, False):
            changed = copy.deepcopy(content)
            inner = changed
            for key in at[:-1]:
                inner = inner[key]
            if drop:
                del inner[at[-1]]
            else:
                inner[at[-1]] = draw.choice(junk)
            yield changed


def refusals(use, contents) -> int:
    """How many are refused; anything but a ValueError fails the test."""
    count = 0
    for content in contents:
        try:
            use(content)
        except ValueError:
            count += 1
    return count


@pytest.mark.parametrize("name", ["rigl", "sr-ste"])
@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_forged_checkpoints_are_refused(tmp_path, name, count):
    variant(name, tmp_path / "out").run()
    state = sealed.read(tmp_path / "out" / "last.pt", sealed.TRAINING)
    state["position"] = {"step": 13, "epoch": 2, "batch": 3}  # two steps are left
    folder = tmp_path / "forged"
    folder.mkdir()

    def use(content):
        (folder / "previous.pt").unlink(missing_ok=True)
        (folder / "last.pt").write_bytes(sealed.sealed_bytes(sealed.TRAINING, content))
        variant(name, folder, resume=True).run()

    use(copy.deepcopy(state))
    assert refusals(use, forged(state, count)) > count


def test_forged_models_are_refused(tmp_path):
    import hrbp

    torch.manual_seed(0)
    hrbp.save(hrbp.sparsify(hrbp.models.build("resnet8", classes=4, width=0.5), 0.5), tmp_path / "good.pt")
    content = sealed.read(tmp_path / "good.pt", sealed.MODEL)

    def use(changed):
        (tmp_path / "forged.pt").write_bytes(sealed.sealed_bytes(sealed.MODEL, changed))
        hrbp.load(tmp_path / "forged.pt")

    assert refusals(use, forged(content, 60)) > 60


@pytest.mark.parametrize("count", [4, pytest.param(15, marks=pytest.mark.slow)])
def test_forged_results_are_refused(tmp_path, count):
    variants = [Variant("dense"), Variant("kernel")]
    tiny(tmp_path / "s", variants, seeds=(0,)).run()
    for file in [tmp_path / "s" / "results.json", *(tmp_path / "s").glob("kernel*/result.json")]:
        whole = file.read_text()

        def use(changed, file=file):
            file.write_text(json.dumps(changed))
            tiny(tmp_path / "s", variants, seeds=(0,)).run()

        assert refusals(use, forged(json.loads(whole), count, plain=True)) > count // 3
        for text in ("", "[", "[1]", "{" * 100_000, "NaN", '{"settings": 1}'):
            file.write_text(text)
            if file.name == "result.json":
                with pytest.raises(ValueError, match=r"is damaged|no file of a study|of another training"):
                    tiny(tmp_path / "s", variants, seeds=(0,)).run()
        file.write_text(whole)


# ---------------------------------------------------------------- studies


@pytest.mark.slow
def test_an_impossible_pair_does_not_end_a_study_nor_its_folder(tmp_path, capsys):
    """2:4 has one sparsity: at the other it is left out; the corrected command continues in the same folder."""
    out, options = tmp_path / "s", {"seeds": (0,), "sparsities": (0.5, 0.9)}
    first = tiny(out, [Variant("dense"), Variant("2:4"), Variant("kernel")], **options).run()
    assert list(first["left_out"]) == ["2:4 90%"]
    assert [run["line"] for run in first["runs"]] == ["dense", "2:4 50%", "kernel 50%", "kernel 90%"]
    more = tiny(out, [Variant("dense"), Variant("2:4"), Variant("kernel"), Variant("hrbp")], **options).run()
    assert len(more["runs"]) == 6
    with pytest.raises(ValueError, match="other settings: variants"):  # what is there is not left out of the table
        tiny(out, [Variant("dense"), Variant("hrbp")], **options)
    out = tmp_path / "t"
    tiny(out, [Variant("dense"), Variant("2:4"), Variant("kernel")], seeds=(0,), sparsities=(0.9,)).run()
    corrected = tiny(out, [Variant("dense"), Variant("kernel")], seeds=(0,), sparsities=(0.9,)).run()
    assert [run["line"] for run in corrected["runs"]] == ["dense", "kernel 90%"]


def test_a_folder_in_which_nothing_was_trained_takes_any_study(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("at once")

    with monkeypatch.context() as patch:
        patch.setattr(Study, "_measure", fails)
        with pytest.raises(ValueError, match="at once"):
            tiny(tmp_path / "s", [Variant("dense")], seeds=(0,)).run()
    assert (tmp_path / "s" / "results.json").exists()
    assert len(tiny(tmp_path / "s", [Variant("dense"), Variant("kernel")], seeds=(0,), epochs=1).run()["runs"]) == 2


def test_trainers_of_two_folders_are_apart(tmp_path):
    made = [variant("rigl", tmp_path / name) for name in ("a", "b")]
    assert all(isinstance(one, Trainer) and one.run().steps == 15 for one in made)
