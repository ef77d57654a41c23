"""A training computes what it says, survives being killed, and is the same on one rank and two."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from torch import nn

import hrbp
import processes
from hrbp.cli import train as train_cli
from hrbp.data import Batches, MemorySet
from hrbp.formats import model as saved
from hrbp.formats import sealed
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.methods.registry import METHODS
from hrbp.reports import picture
from hrbp.training import checkpoint, log
from hrbp.training.optimizer import training_bytes
from hrbp.training.result import Diverged
from hrbp.training.run import train
from hrbp.training.settings import Settings
from hrbp.training.trainer import Trainer
from processes import ONE_THREAD

pytestmark = pytest.mark.usefixtures("no_figures")
ROOT = Path(__file__).parent.parent
draw_training = log.draw_training


# ---------------------------------------------------------------- small things to train


def images(count: int, seed: int = 0, classes: int = 4) -> MemorySet:
    """Noise, brighter in one channel or in none: that is the class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    pixels = torch.randint(0, 160, (count, 3, 8, 8), dtype=torch.uint8, generator=random)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[label : label + 1] += 40
    return MemorySet(pixels, labels, [str(i) for i in range(classes)])


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def network(norm: bool = True, dropout: float = 0.0, double: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)

    def conv(c, k, stride=1):
        return [nn.Conv2d(c, k, 3, stride, 1, bias=not norm), nn.BatchNorm2d(k) if norm else nn.Identity(), nn.ReLU()]

    layers = [*conv(3, 8), *conv(8, 16, 2), *conv(16, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout)]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    return nn.Sequential(Double(), model.double()) if double else model


def sparse(
    model: nn.Module, structure: str = "hrbp", sparsity: float = 0.5, evolve: str | None = None, **_
) -> nn.Module:
    options = {"hrbp": {"groups": 2}, "hrbp++": {"groups": 2}, "1xn": {"n": 8}}.get(structure, {})
    method = evolve if evolve in METHODS and METHODS[evolve].dense_weights else None
    return hrbp.sparsify(model, sparsity, structure=structure, method=method, distribution="uniform", **options)


def trainer(model: nn.Module, out=None, resume=False, config=None, batch=12, sets=None, **settings) -> Trainer:
    to_train, to_test = sets or (images(60), images(20, seed=1))
    settings = Settings(**{"epochs": 3, **settings})
    batches = Batches(to_train, batch, train=True, seed=3), Batches(to_test, batch, train=False)
    return Trainer(model, *batches, settings, out=out, resume=resume, config=config, quiet=True)


def same(a, b, path: str = "") -> None:
    """Equal in every bit, and in structure."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def timeless(state: dict) -> dict:
    """A state without what the clock decides."""
    state = {name: value for name, value in state.items() if name != "seconds"}
    clock = ("seconds", "images_per_second")
    state["history"] = [{k: v for k, v in entry.items() if k not in clock} for entry in state["history"]]
    return state


def final_state(out: Path) -> dict:
    return timeless(sealed.read(out / "last.pt", sealed.TRAINING))


def signalled(made: Trainer, at: int, number: int = signal.SIGTERM) -> Trainer:
    """A trainer whose process gets a signal before its step `at`."""
    run, left = made._run_step, [at]

    def step(x, y):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return run(x, y)

    made._run_step = step
    return made


# ---------------------------------------------------------------- a step


class Twin:
    """The dense network under masks, trained by hand: what a sparse training has to compute."""

    def __init__(self, model: nn.Module, made: Trainer):
        self.model = hrbp.densify(copy.deepcopy(model))
        self.made, self.settings = made, made.settings
        self.parameters = dict(self.model.named_parameters())
        self.state = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in self.parameters.items()}
        self.masks = self.masks_now()
        self.steps = 0

    def masks_now(self) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": layer.mask() for name, layer in sparse_layers(self.made.model).items()}

    def step(self, x, y, lr: float) -> None:
        logits = self.model.train()(x)
        smooth, classes = self.settings.label_smoothing, logits.shape[1]
        target = F.one_hot(y, classes) * (1 - smooth) + smooth / classes
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        grads = torch.autograd.grad(loss, list(self.parameters.values()))
        self.steps += 1
        with torch.no_grad():
            for (name, p), g in zip(self.parameters.items(), grads, strict=True):
                first, second = self.state[name]
                decay = self.settings.weight_decay if p.dim() > 1 else 0.0
                mask = self.masks.get(name, torch.ones_like(p))
                if self.settings.optimizer == "sgd":
                    g = (g + decay * p) * mask
                    first.mul_(self.settings.momentum).add_(g)
                    p -= lr * (g + self.settings.momentum * first if self.settings.nesterov else first)
                else:
                    g = g * mask
                    first.mul_(0.9).add_(0.1 * g)
                    second.mul_(0.999).add_(0.001 * g * g)
                    p *= 1 - lr * decay
                    p -= lr * (first / (1 - 0.9**self.steps)) / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)

    def change(self) -> int:
        """Take over the masks of the sparse model: what is new starts at zero, what goes is forgotten."""
        old, self.masks = self.masks, self.masks_now()
        moved = 0
        with torch.no_grad():
            for name, mask in self.masks.items():
                moved += int((mask & ~old[name]).sum())
                for t in (self.parameters[name], *self.state[name]):
                    t.mul_(mask & old[name])
        return moved

    def check(self) -> None:
        """Weights and optimizer state of the sparse training are this twin's."""
        layers = sparse_layers(self.made.model)
        dense = dict(self.made.model.named_parameters())
        moments = ("momentum_buffer",) if self.settings.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
        for name, p in self.parameters.items():
            layer = layers.get(name.removesuffix(".weight"))  # the sparse layers here have no bias
            if layer is None or layer.master:
                ours, spread = dense[name], lambda t: t
            else:
                ours, spread = layer.parameter, layer.module.pattern.to_dense
            state = self.made.optimizer.state[ours]
            pairs = [(ours.detach(), p.detach()), *zip((state[m] for m in moments), self.state[name], strict=False)]
            for mine, theirs in pairs:
                torch.testing.assert_close(spread(mine), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("structure", "settings"),
    [
        ("hrbp", {"evolve": "rigl", "nesterov": True, "warmup": 1.5, "accumulate": 1}),
        ("hrbp++", {"evolve": "set", "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "label_smoothing": 0.1}),
        ("1xn", {"evolve": "rigl", "schedule": "step", "optimizer": "adamw"}),
        ("unstructured", {"evolve": "rigl", "momentum": 0.5, "label_smoothing": 0.2}),
        (
            "hrbp",
            {
                "evolve": "hrbp",
                "evolve_options": {"every": 4, "drop": 1.0},
                "schedule": "step",
                "milestones": (0.2, 0.6),
                "gamma": 0.5,
            },
        ),
        ("hrbp", {"evolve": "gmp", "evolve_options": {"every": 4, "sparsity": 0.8}}),
    ],
)
def test_sparse_step_is_the_dense_masked_step(structure, settings):
    epochs = 6
    model = sparse(network(double=True), structure)
    made = trainer(model, epochs=epochs, **{"evolve_options": {"every": 4}, **settings})
    twin, moved, updates = Twin(model, made), 0, 0
    total, warmup = epochs * len(made.train), settings.get("warmup", 0) * len(made.train)
    model.train()
    for epoch in range(epochs):
        for x, y in made.train.epoch(epoch):
            t = made.step
            lr = made.settings.lr
            if t < warmup:
                lr *= min(1, (t + 1) / warmup)
            elif made.settings.schedule == "cosine":
                lr *= (1 + math.cos(math.pi * (t - warmup) / (total - warmup))) / 2
            else:
                lr *= made.settings.gamma ** len([m for m in made.settings.milestones if t >= m * total])
            made._run_step(x, y)
            twin.step(x, y, lr)
            if len(made.history) > updates:
                updates = len(made.history)
                moved += twin.change()
            twin.check()
        made.batch = 0
    assert made.step == 30
    assert updates >= 5
    assert moved > 0 or settings["evolve"] == "gmp"


@pytest.mark.parametrize("accumulate", [2, 3])
def test_parts_of_a_batch_add_up(accumulate):
    finals = []
    for parts in (1, accumulate):
        made = trainer(
            sparse(network(norm=False, double=True)), accumulate=parts, evolve="rigl", evolve_options={"every": 3}
        )
        finals.append((made.run(), made.model.state_dict()))
    (whole, a), (cut, b) = finals
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-7, atol=1e-10)
    assert whole.history[-1]["loss"] == pytest.approx(cut.history[-1]["loss"])
    assert whole.history[-1]["accuracy"] == cut.history[-1]["accuracy"]


def test_moving_average():
    decay = 0.8
    made = trainer(sparse(network(double=True)), ema=decay, evolve="set", evolve_options={"every": 4})
    layers = sparse_layers(made.model)
    average = None
    made.model.train()
    for x, y in made.train.epoch():
        before = {name: layer.mask() for name, layer in layers.items()}
        made._run_step(x, y)
        now = {name: layer.weight() for name, layer in layers.items()}
        for name, layer in layers.items():  # what leaves the mask leaves the average
            if average is not None:
                average[name] = average[name] * (before[name] & layer.mask())
        average = now if average is None else {n: decay * average[n] + (1 - decay) * now[n] for n in now}
    for name, layer in sparse_layers(made.ema).items():
        assert torch.equal(layer.mask(), layers[name].mask())
        torch.testing.assert_close(layer.weight(), average[name], rtol=1e-9, atol=1e-12)
    running = dict(made.model.named_buffers())
    for name, buffer in made.ema.module.named_buffers():
        assert torch.equal(buffer, running[name]), name
    assert made.run().model is made.ema.module


def test_a_training_learns_and_says_what_it_did(tmp_path, capsys):
    sets = images(240), images(100, seed=1)
    made = trainer(
        sparse(network()), tmp_path, epochs=8, sets=sets, evolve="rigl", evolve_options={"every": 10}, batch=20
    )
    made.progress.quiet = False
    result = made.run()
    assert result.accuracy > 0.6
    assert result.steps == 96
    assert result.stopped is None
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 8
    assert "epoch 8/8" in out
    assert "images/s" in out
    assert "mask change" in out
    model = result.model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in made.test.epoch())
    assert result.accuracy == right / 100
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("epoch") == 8
    assert [line["step"] for line in lines if line["kind"] == "update"] == [10, 20, 30, 40, 50, 60, 70]
    assert lines[0]["kind"] == "config"
    assert lines[1:] == result.history
    x = torch.randn(2, 3, 8, 8)
    again = saved.load(tmp_path / "model.pt", network())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("structure", ["hrbp", "unstructured"])
def test_mixed_precision_trains(amp, structure):
    made = trainer(
        sparse(network(), structure), amp=amp, channels_last=True, evolve="rigl", evolve_options={"every": 4}, epochs=6
    )
    seen = set()
    hook = made.model[3].register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    before = [layer.weight() for layer in sparse_layers(made.model).values()]
    result = made.run()
    hook.remove()
    assert seen == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert all(p.dtype == torch.float32 for p in made.model.parameters())
    losses = [entry["loss"] for entry in result.history if entry["kind"] == "epoch"]
    assert losses[-1] < losses[0] < 3
    assert any(entry["kind"] == "update" for entry in result.history)
    assert all(not torch.equal(a, b.weight()) for a, b in zip(before, sparse_layers(made.model).values(), strict=True))


# ---------------------------------------------------------------- memory


def test_memory_is_that_of_the_stored_blocks():
    def measured(model, optimizer):
        """Bytes reachable from the model and the optimizer after a backward pass."""
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        found = {}
        for p in model.parameters():
            for t in (p, p.grad, *optimizer.state[p].values()):
                if isinstance(t, torch.Tensor):
                    found[id(t)] = t
        found.update((id(b), b) for b in model.buffers())
        return sum(t.untyped_storage().nbytes() for t in found.values())

    totals = {}
    for sparsity in (0.0, 0.9):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 128, 3), nn.Conv2d(128, 128, 3, padding=1),
            nn.Flatten(), nn.Linear(2048, 4),
        )  # fmt: skip
        if sparsity:
            hrbp.sparsify(model, sparsity, structure="hrbp", distribution="uniform")
        made = trainer(model, epochs=1)
        totals[sparsity] = made.run().memory
        assert totals[sparsity] == training_bytes(model, made.optimizer) == measured(model, made.optimizer)
    cells = 9 * (64 * 128 + 128 * 128)
    left_dense = 3 * 4 * (3 * 64 * 9 + 64 + 2 * 64 + 2048 * 4 + 4 + 2 * 128)
    ratio = (totals[0.9] - left_dense) / (totals[0.0] - left_dense)
    stored = sum(layer.parameter.numel() for layer in sparse_layers(model).values()) / cells
    assert stored == pytest.approx(0.1, rel=0.1)
    assert stored < ratio < stored + 0.06  # the index of (16, 1) blocks


# ---------------------------------------------------------------- stopped and continued

VARIANTS = {
    "rigl": ("hrbp", {"evolve": "rigl", "evolve_options": {"every": 3}, "ema": 0.9, "nesterov": True}),
    "gmp": (
        "hrbp",
        {"evolve": "gmp", "evolve_options": {"every": 3, "sparsity": 0.8}, "optimizer": "adamw", "ema": 0.9},
    ),
    "set": ("unstructured", {"evolve": "set", "evolve_options": {"every": 4}, "schedule": "step", "warmup": 1.0}),
    "fp16": ("hrbp++", {"evolve": "rigl", "evolve_options": {"every": 3}, "amp": "fp16", "accumulate": 2}),
    "sr-ste": (
        "2:4",
        {"evolve": "sr-ste", "evolve_options": {"every": 4, "decay": 0.1}, "amp": "fp16", "accumulate": 2, "ema": 0.9},
    ),
    "subp": ("1xn", {"evolve": "subp", "evolve_options": {"every": 2, "decay": 0.1}, "amp": "fp16", "ema": 0.9}),
    "dense": (None, {"optimizer": "adamw", "amp": "bf16", "channels_last": True}),
}


def variant(name: str, out, resume=False, **more) -> Trainer:
    structure, settings = VARIANTS[name]
    model = network(dropout=0.3)
    torch.manual_seed(99 if resume else 11)  # of dropout: what continues has to bring its own
    return trainer(
        model if structure is None else sparse(model, structure, **settings), out, resume, **settings, **more
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("rigl", "sr-ste", "fp16") else pytest.mark.slow) for n in VARIANTS]
)
def test_stopped_within_an_epoch_and_continued(name, tmp_path):
    whole = variant(name, tmp_path / "whole").run()
    before = signal.getsignal(signal.SIGTERM)
    stopped = signalled(variant(name, tmp_path / "cut"), 4).run()
    assert (stopped.stopped, stopped.steps) == ("SIGTERM", 4)
    again = signalled(variant(name, tmp_path / "cut", resume=True), 4, signal.SIGINT)
    assert (again.step, again.epoch, again.batch) == (4, 0, 4)
    assert (again.run().stopped, again.step) == ("SIGINT", 8)
    result = variant(name, tmp_path / "cut", resume=True).run()
    assert signal.getsignal(signal.SIGTERM) == before
    assert (result.steps, result.stopped) == (15, None)
    same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))
    assert result.accuracy == whole.accuracy
    logs = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("cut", "whole")]
    assert [json.loads(line) for line in logs[0][1:]] == result.history
    assert logs[0][0] == logs[1][0]
    assert len(logs[0]) == len(logs[1])
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(result.model.eval()(x), whole.model.eval()(x))
    # A complete training is not trained any further.
    assert variant(name, tmp_path / "cut", resume=True).run().steps == 15


PRELUDE = """if True:
import faulthandler, os, random, signal, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import processes, torch
torch.set_num_threads(1)
from test_train import *
out = Path(sys.argv[1])

def child(function, *args):
    pid = processes.fork()
    if pid == 0:
        # Ranks that wait for each other in vain end, too, and say where they were.
        faulthandler.dump_traceback_later(processes.LIMIT / 2, exit=True)
        try:
            function(*args)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

variant("rigl", None).run()  # loads what torch loads late, once for all children

def finished(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def script(code: str, out: Path, *words: str) -> str:
    """Run code in a fresh process that forks its workers: torch is imported once. Returns what it printed."""
    prelude = PRELUDE.format(tests=str(ROOT / "tests"), root=str(ROOT)).removeprefix("if True:\n")
    done = processes.run(
        [sys.executable, "-c", prelude + code, str(out), *words],
        env={**os.environ, **ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


KILLED = """
def run(folder, started=lambda: None, **options):
    made = variant("rigl", folder, save_minutes=0.0, **options)  # a checkpoint after every step
    print("from", made.step, flush=True)
    run_step = made._run_step
    def step(x, y):
        started()
        return run_step(x, y)
    made._run_step = step
    made.run()

def run_killed_at(call, name):
    # Dies at a call of os.fsync or os.replace: before it, or right after.
    real, left = getattr(os, name), [call // 2]
    def counted(*args):
        left[0] -= 1
        if left[0] < 0 and call % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, name, counted)
    run(out / "cut", resume=True)

def run_anyhow(tell=None):
    # A byte for every step that starts: what the steps before it came to is written by then.
    run(out / "cut", (lambda: os.write(tell, b".")) if tell else (lambda: None), resume=True)

def prepared():
    variant("rigl", out / "cut")

assert finished(child(prepared)) == 0
seed = int.from_bytes(os.urandom(4), "little")
print("seed", seed, flush=True)
random.seed(seed)
kills = 0
for i in range(6):
    if i % 2:
        told, tell = os.pipe()
        pid = child(run_anyhow, tell)
        os.close(tell)
        for _ in range(random.randrange(2, 5)):
            os.read(told, 1)  # nothing where it has ended
        time.sleep(random.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        os.close(told)
    else:
        pid = child(run_killed_at, random.randrange(2, 12), random.choice(["fsync", "replace"]))
    status = finished(pid)
    assert status in (0, -signal.SIGKILL), status
    kills += status != 0
assert finished(child(run_anyhow)) == 0
def whole():
    run(out / "whole")
assert finished(child(whole)) == 0
print("kills", kills)
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    printed = script(KILLED, tmp_path)
    assert int(printed.split()[-1]) >= 2, printed
    assert len({line for line in printed.splitlines() if line.startswith("from")}) >= 3, printed
    same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))
    assert sorted(p.name for p in (tmp_path / "cut").iterdir() if ".part" in p.name) == []


# ---------------------------------------------------------------- files that are not to be used


def trained(out: Path, **settings) -> Trainer:
    made = trainer(sparse(network()), out, evolve="set", evolve_options={"every": 4}, **settings)
    made.run()
    return made


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """The folder of a training that has ended."""
    out = tmp_path_factory.mktemp("complete") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "draw_training", lambda path, *_: path.touch())
        trained(out)
    return out


def damaged(kind: str, out: Path, tmp_path: Path) -> tuple[bytes, str]:
    """What is put in place of last.pt, and what is said of it."""
    good = (out / "last.pt").read_bytes()
    if kind == "cut short":
        return good[: len(good) // 2], "cut short"
    if kind == "cut at its end":
        return good[:-1], "cut short"
    if kind == "empty":
        return b"", "cut short"
    if kind == "one bit":
        middle = len(good) // 2
        return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "checksum"
    if kind == "other settings":
        trained(tmp_path / "other", lr=0.05)
        return (tmp_path / "other" / "last.pt").read_bytes(), "settings.lr is 0.05 there and 0.1 here"
    if kind == "other images":
        trained(tmp_path / "other", sets=(images(60, seed=5), images(20)))
        return (tmp_path / "other" / "last.pt").read_bytes(), "data.train.labels"
    if kind == "foreign":
        torch.save({"model": network().state_dict()}, tmp_path / "foreign.pt")
        return (tmp_path / "foreign.pt").read_bytes(), "not written by hrbp"
    if kind == "model":
        return (out / "model.pt").read_bytes(), "holds a model; it needs a training"
    content = good[: good.rfind(sealed.MARK)]
    return content + good[good.rfind(sealed.MARK) :].replace(b" 1 ", b" 2 "), "format 2"


KINDS = (
    "cut short", "cut at its end", "empty", "one bit", "other settings", "other images", "foreign", "model", "version",
)  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k in ("cut short", "one bit", "other settings") else pytest.mark.slow) for k in KINDS],
)
def test_unusable_checkpoints_are_refused(kind, complete, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    expected = final_state(out)
    bad, reason = damaged(kind, out, tmp_path)
    (out / "last.pt").write_bytes(bad)
    made = trainer(sparse(network()), evolve="set", evolve_options={"every": 4})
    said = []
    state = checkpoint.read_training(
        out, lambda s: "; ".join(checkpoint.differences(s["config"], made.config)), said.append
    )
    assert state["position"] == {"step": 10, "epoch": 2, "batch": 0}
    assert reason in said[0]
    assert "continuing from" in said[0]
    assert str(out / "previous.pt") in said[0]
    assert (out / "last.refused").read_bytes() == bad
    result = trainer(sparse(network()), out, resume=True, evolve="set", evolve_options={"every": 4}).run()
    assert result.steps == 15
    same(final_state(out), expected)
    # With neither of the two there is nothing to continue, and nothing is overwritten.
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(bad)
    with pytest.raises(ValueError, match="nothing was changed") as error:
        trainer(sparse(network()), out, resume=True, evolve="set", evolve_options={"every": 4})
    assert reason in str(error.value)
    assert all((out / name).read_bytes() == bad for name in ("last.pt", "previous.pt"))


def test_a_folder_in_use_is_refused(complete):
    before = {p.name: p.read_bytes() for p in complete.iterdir()}
    with pytest.raises(ValueError, match="holds a training; continue it with resume"):
        trained(complete)
    assert {p.name: p.read_bytes() for p in complete.iterdir()} == before


def test_what_is_executed_when_loading_a_checkpoint(tmp_path):
    """Nothing: a pickle that would run code is refused although its checksum fits."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "last.pt").write_bytes(sealed.sealed_bytes(sealed.TRAINING, {"config": Evil()}))
    with pytest.raises(ValueError, match="cannot be read"):
        sealed.read(tmp_path / "last.pt", sealed.TRAINING)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["rigl", "fp16"])
def test_diverging_stops_with_evidence(name, tmp_path):
    made = variant(name, tmp_path)
    run = made._run_step

    def step(x, y):
        return run(x * torch.inf if made.step == 7 else x, y)

    made._run_step = step
    with pytest.raises(Diverged, match=r"not finite at epoch 2, step 8.*diverged\.pt.*last\.pt"):
        made.run()
    evidence = sealed.read(tmp_path / "diverged.pt", sealed.TRAINING)
    assert evidence["position"]["step"] == 7
    assert not math.isfinite(float(evidence["ranks"][0]["sums"][0]))
    good = sealed.read(tmp_path / "last.pt", sealed.TRAINING)
    assert good["position"]["step"] == 5
    assert all(t.isfinite().all() for t in good["model"].values())
    assert variant(name, tmp_path, resume=True).run().steps == 15


# ---------------------------------------------------------------- ranks

RANKS = """
import socket
import torch.distributed as dist
from hrbp.training.devices import ranks

CASES = {
    "rigl": ("hrbp", dict(evolve="rigl", evolve_options={"every": 2})),
    "set": ("hrbp++", dict(evolve="set", evolve_options={"every": 2}, optimizer="adamw", ema=0.9)),
    "parts": ("unstructured", dict(evolve="rigl", evolve_options={"every": 2}, accumulate=2)),
    "gmp": ("hrbp", dict(evolve="gmp", evolve_options={"every": 2, "sparsity": 0.8})),
    "sr-ste": ("2:4", dict(evolve="sr-ste", evolve_options={"every": 2, "decay": 0.1}, optimizer="adamw", ema=0.9)),
    "subp": ("1xn", dict(evolve="subp", evolve_options={"every": 2, "decay": 0.1}, ema=0.9)),
    "norm": ("hrbp", dict(evolve="rigl", evolve_options={"every": 2})),
}

def made(name, rank, world, **options):
    structure, settings = CASES[name]
    torch.manual_seed(rank)  # ranks start with other weights: rank 0's count
    model = sparse(network(norm=name == "norm", double=True, seed=rank), structure, **settings)
    batches = [Batches(s, 12, train=kind, seed=3, rank=rank, world=world)
               for s, kind in ((images(60), True), (images(20, seed=1), False))]
    return Trainer(model, *batches, Settings(epochs=3, **settings), quiet=True, **options)

def report(name, trainer, result):
    state = timeless(trainer._state())
    sent = getattr(trainer, "sent", None)
    stored = sum(p.numel() for p in trainer.model.parameters())
    masks = {n: layer.mask() for n, layer in sparse_layers(trainer.model).items()}
    torch.save({"state": state, "masks": masks, "accuracy": result.accuracy, "loss": result.loss,
                "stopped": result.stopped, "steps": result.steps, "sent": sent, "stored": stored}, name)

def counted(trainer):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    trainer.sent = []
    def hook(group, bucket):
        trainer.sent.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)
    trainer.wrapped.register_comm_hook(None, hook)
    return trainer

def worker(rank, world, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    with ranks("cpu"):
        for name in sys.argv[2:]:
            trainer = made(name, rank, world, out=out / f"{name}-{world}")
            if world > 1 and name in ("rigl", "parts"):
                counted(trainer)
            report(out / f"{name}-{world}-{rank}.pt", trainer, trainer.run())
        if world > 1 and "rigl" in sys.argv:  # a signal to one rank stops both at the same step
            trainer = made("rigl", rank, world, out=out / "cut")
            report(out / f"stopped-{rank}.pt", trainer, (signalled(trainer, 8) if rank else trainer).run())
            trainer = made("rigl", rank, world, out=out / "cut", resume=True)
            report(out / f"resumed-{rank}.pt", trainer, trainer.run())
            trainer = made("set", rank, world, out=out / "nan")  # so does a loss that one rank alone finds infinite
            run = trainer._run_step
            trainer._run_step = lambda x, y: run(x * torch.inf if rank and trainer.step == 3 else x, y)
            try:
                trainer.run()
            except Diverged as error:
                (out / f"nan-{rank}.txt").write_text(str(error))
            try:
                made("set", rank, world, out=out / "rigl-2", resume=True)
            except ValueError as error:
                (out / f"refused-{rank}.txt").write_text(str(error))

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

for world in (1, 2):
    port = free_port()
    assert [finished(pid) for pid in [child(worker, rank, world, port) for rank in range(world)]] == [0] * world
"""


@pytest.mark.parametrize("names", [("rigl", "norm"), ("set", "parts", "gmp", "sr-ste", "subp")], ids=", ".join)
@pytest.mark.slow
def test_two_ranks_are_one_with_the_same_batch(names, tmp_path):
    script(RANKS, tmp_path, *names)

    def of(name):
        return torch.load(tmp_path / f"{name}.pt", weights_only=True)

    for name in names:
        one, first, second = of(f"{name}-1-0"), of(f"{name}-2-0"), of(f"{name}-2-1")
        for part in ("model", "optimizer", "ema"):  # masks and running statistics, too
            same(first["state"][part], second["state"][part])
        same(first["masks"], second["masks"])
        if name == "norm":  # its batches are each rank's own
            continue
        same(one["masks"], first["masks"])
        for key, t in one["state"]["model"].items():
            torch.testing.assert_close(t, first["state"]["model"][key], rtol=1e-7, atol=1e-10)
        assert first["accuracy"] == second["accuracy"] == one["accuracy"]
        assert first["loss"] == pytest.approx(one["loss"])
        for a, b in zip(one["state"]["history"], first["state"]["history"], strict=True):
            assert a.pop("layers", None) == b.pop("layers", None)  # counts of cells
            assert a == pytest.approx(b)
        updates = [e for e in first["state"]["history"] if e["kind"] == "update"]
        assert len(updates) >= 5
        assert name == "gmp" or max(e["changed"] for e in updates) > 0
    for name in {"rigl", "parts"} & set(
        names
    ):  # once a step the parameters, which are the stored blocks, and nothing else
        assert sum(of(f"{name}-2-0")["sent"]) == 15 * of(f"{name}-2-0")["stored"]
    if "rigl" not in names:
        return
    stopped = [of(f"stopped-{rank}") for rank in (0, 1)]
    assert [s["steps"] for s in stopped] == [8, 8]
    assert {s["stopped"] for s in stopped} == {"SIGTERM"}
    for rank in (0, 1):
        same(of(f"resumed-{rank}")["state"], of(f"rigl-2-{rank}")["state"])
        assert "epoch 1, step 4" in (tmp_path / f"nan-{rank}.txt").read_text()
        assert "settings.optimizer" in (tmp_path / f"refused-{rank}.txt").read_text()


# ---------------------------------------------------------------- fused


class Branches(nn.Module):
    """What it computes depends on numbers: torch.fx cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x) if x.mean() < 1e9 else x


@pytest.mark.parametrize("evolve", ["static", "rigl", "sr-ste"])
def test_fused_steps_compute_the_same(evolve):
    settings = {"evolve": evolve, "evolve_options": {"every": 3} if evolve == "rigl" else {}}
    structure = "n:m" if evolve == "sr-ste" else "hrbp"
    plain, made = (
        trainer(sparse(network(double=True), structure, evolve=evolve), fuse=fuse, **settings) for fuse in (False, True)
    )
    assert plain.called is plain.model
    assert made.called.fusion.norms == made.called.fusion.relus == 3
    assert plain.run().accuracy == made.run().accuracy
    for name, t in made.model.state_dict().items():
        torch.testing.assert_close(t, plain.model.state_dict()[name], msg=lambda text, name=name: f"{name}: {text}")
    assert made.optimizer.state_dict().keys() == plain.optimizer.state_dict().keys()


def test_a_network_that_cannot_be_followed_trains_as_it_is(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(hrbp.progress.Progress, "say", lambda self, text: said.append(text))
    made = trainer(Branches())
    assert made.called is made.model
    made.run()
    assert any("BatchNorm and ReLU run one after the other: fuse_training(): " in text for text in said)
    assert trainer(network(norm=False)).called._modules.keys() >= {"0"}  # the network itself: there is nothing to fuse


# ---------------------------------------------------------------- compiled


def test_compiled_steps_survive_mask_updates():
    counters = torch._dynamo.utils.counters
    settings = {"evolve": "rigl", "evolve_options": {"every": 3}, "epochs": 4}
    eager = trainer(sparse(network()), fuse=False, **settings)  # as compiled
    eager.run()
    made = trainer(sparse(network()), compile="aot_eager", **settings)
    counters.clear()
    graphs, run = [], made._run_step

    def step(x, y):
        saved = run(x, y)
        graphs.append(counters["stats"]["unique_graphs"])
        return saved

    made._run_step = step
    result = made.run()
    assert sum(entry["kind"] == "update" for entry in result.history) == 4
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}, graphs
    same(made.model.state_dict(), eager.model.state_dict())
    # Fewer blocks are new tensors: compiled again, as often as that happens, without an end to it.
    settings = {"evolve": "gmp", "evolve_options": {"every": 3, "sparsity": 0.9, "until": 1.0}, "epochs": 3}
    made = trainer(sparse(network(), sparsity=0.0), compile="eager", **settings)
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2):
        result = made.run()
    moved = sum(entry["kind"] == "update" and entry["reallocated"] for entry in result.history)
    assert counters["stats"]["unique_graphs"] == moved > 3  # the last change comes after the last step
    eager = trainer(sparse(network(), sparsity=0.0), fuse=False, **settings)
    eager.run()
    same(made.model.state_dict(), eager.model.state_dict())


# ---------------------------------------------------------------- models in files


@pytest.mark.parametrize("structure", ["hrbp", "hrbp++", "unstructured", "2:4", "block", "elementwise", None])
def test_saved_models_load_in_two_lines(structure, tmp_path):
    model = hrbp.models.build("resnet8", classes=5, width=0.5, image_size=16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    if structure is not None:
        options = {"blocksize": (8, 8)} if structure == "block" else {"groups": 2} if "hrbp" in structure else {}
        hrbp.sparsify(model, 0.5, structure=structure, saliency="magnitude", **options)
    path = tmp_path / "model.pt"
    saved.save(model, path)
    again = saved.load(path)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model.eval()(x))
    assert not again.training
    assert saved.plain_record(again) == saved.plain_record(model)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert str(hrbp.summary(again)) == str(hrbp.summary(model))
    if structure is not None and structure != "elementwise":  # a loaded model can be trained on
        hrbp.Evolver(again, torch.optim.SGD(again.parameters(), 0.1), "static", total_steps=3).step()
    dense = hrbp.models.build("resnet8", classes=5, width=0.5, image_size=16)
    dense.load_state_dict(saved.dense_state_dict(model))
    torch.testing.assert_close(dense.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]  # it worked on a copy


def test_narrow_and_other_networks_in_files(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    narrow = hrbp.models.narrow("resnet8", 3000, classes=5, image_size=16).eval()
    saved.save(narrow, tmp_path / "narrow.pt")
    assert torch.equal(saved.load(tmp_path / "narrow.pt")(x), narrow(x))
    own = sparse(network(), "hrbp++").eval()
    saved.save(torch.optim.swa_utils.AveragedModel(own), tmp_path / "own.pt")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(saved.load(tmp_path / "own.pt", network(seed=5))(x), own(x))
    with pytest.raises(ValueError, match="pass model="):
        saved.load(tmp_path / "own.pt")
    with pytest.raises(ValueError, match="does not fit the model"):
        saved.load(tmp_path / "own.pt", nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(FileNotFoundError):
        saved.load(tmp_path / "none.pt")
    raw = (tmp_path / "own.pt").read_bytes()
    (tmp_path / "own.pt").write_bytes(raw[:-100])
    with pytest.raises(ValueError, match="cut short"):
        saved.load(tmp_path / "own.pt", network())


@pytest.mark.parametrize("structure", ["hrbp++", "unstructured"])
def test_torch_export(structure):
    model = sparse(network(), structure).eval()
    x = torch.randn(3, 3, 8, 8)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
    stored = {name: p.numel() for name, p in model.named_parameters()}
    assert {name: p.numel() for name, p in exported.state_dict.items() if name in stored} == stored


# ---------------------------------------------------------------- the command, and mistakes


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    train_cli.add_train(parser.add_subparsers())
    args = parser.parse_args(["train", *words])
    return args.run(args)


@pytest.fixture
def small_shapes(monkeypatch):
    monkeypatch.setattr(train_cli, "load", lambda name, split, **_: images(60 if split == "train" else 20))


SMALL = ("--model", "resnet8", "--width", "0.5", "--epochs", "2", "--batch-size", "20", "--device", "cpu")


@pytest.mark.parametrize(
    "words",
    [
        ("--structure", "dense"),
        ("--structure", "narrow", "--sparsity", "0.5"),
        ("--structure", "hrbp", "--evolve", "rigl", "--every", "2", "--option", "groups=2", "--amp", "bf16"),
        ("--structure", "unstructured", "--evolve", "gmp", "--every", "2", "--saliency", "snip", "--ema", "0.9"),
        ("--structure", "2:4", "--sparsity", "0.5", "--evolve", "sr-ste", "--every", "2", "--decay", "0.001"),
        (
            "--structure",
            "1xn",
            "--option",
            "n=4",
            "--evolve",
            "subp",
            "--evolve-option",
            "score=l1",
            "--sparsity",
            "0.5",
        ),
    ],
)
def test_the_command(words, tmp_path, small_shapes, capsys, monkeypatch):
    drawn = not {"dense", "rigl"}.isdisjoint(words)
    if drawn:
        monkeypatch.setattr(log, "draw_training", draw_training)
    words = (*SMALL, *words, "--out", str(tmp_path / "run"))
    assert command(*words) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"log.jsonl", "last.pt", "previous.pt", "model.pt", "training.png"}
    assert ((tmp_path / "run" / "training.png").stat().st_size > 0) == drawn
    expected = 0.5 if {"narrow", "2:4", "subp"} & set(words) else 0.9 if "dense" not in words else 0.0
    model = saved.load(tmp_path / "run" / "model.pt")
    if "narrow" not in words:
        assert hrbp.summary(model).sparsity == pytest.approx(expected, abs=0.05)
    with pytest.raises(ValueError, match="holds a training"):
        command(*words)
    capsys.readouterr()
    assert command(*words, "--resume") == 0
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        command(*words, "--resume", "--seed", "1")


def test_masks_that_follow_the_weights_are_logged_drawn_and_left_behind_at_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("hrbp.training.log.draw_training", lambda path, history, name: drawn.extend(history))
    made = variant("sr-ste", tmp_path)
    layers = sparse_layers(made.model)
    start = before = {name: layer.mask() for name, layer in layers.items()}
    counts = []
    run = made._run_step

    def step(x, y):
        nonlocal before
        result = run(x, y)
        if made.step % 4 == 0:
            now = {name: layer.mask() for name, layer in layers.items()}
            counts.append([{n: int((now[n] != m[n]).sum()) for n in now} for m in (before, start)])
            before = now
        return result

    made._run_step = step
    result = made.run()
    told = [entry for entry in result.history if entry["kind"] == "update"]
    assert [entry["step"] for entry in told] == [4, 8, 12]
    for entry, (sad, drift) in zip(told, counts, strict=True):
        assert (entry["sad"], entry["drift"]) == (sum(sad.values()), sum(drift.values()))
        assert {name: layer["sad"] for name, layer in entry["layers"].items()} == sad
        assert {name: layer["drift"] for name, layer in entry["layers"].items()} == drift
    assert told[-1]["drift"] > told[0]["drift"] > 0
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    assert logged == result.history == drawn
    monkeypatch.undo()
    epochs = [entry for entry in drawn if entry["kind"] == "epoch"]
    for history, name in ((drawn, "evolved.png"), (epochs, "static.png")):
        log.draw_training(tmp_path / name, history)
    widths = [imread(tmp_path / name).shape[1] for name in ("evolved.png", "static.png")]
    assert widths[0] * 3 == pytest.approx(widths[1] * 4, abs=4)
    for name in ("sad", "drift"):
        other = [{**entry, name: entry[name] // 2} if entry["kind"] == "update" else entry for entry in drawn]
        log.draw_training(tmp_path / "other.png", other)
        assert (imread(tmp_path / "other.png") != imread(tmp_path / "evolved.png")).any()

    dropped = sum(int((~layer.mask()).sum()) for layer in sparse_layers(made.ema).values())
    dense = sum(p.numel() for p in made.model.parameters())
    assert result.parameters == dense - sum(int((~layer.mask()).sum()) for layer in layers.values())
    assert result.memory >= 3 * 4 * dense  # weights, gradients, momentum, of every weight
    final = saved.load(tmp_path / "model.pt", network())
    assert not any(layer.master for layer in sparse_layers(final).values())
    assert record_of(final).method is None
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(final(x), result.model.eval()(x))
    assert sum(p.numel() for p in final.parameters()) == dense - dropped < dense
    with pytest.raises(ValueError, match="evolve is 'static'; the model was made for 'sr-ste' and needs that"):
        trainer(sparse(network(), "2:4", evolve="sr-ste"))


def test_the_command_says_how_it_ended(tmp_path, small_shapes, capsys, monkeypatch):
    assert command(*SMALL, "--lr", "1e30", "--out", str(tmp_path / "nan")) == 1
    assert "not finite" in capsys.readouterr().err
    real = Trainer._run_step

    def step(self, x, y):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, x, y)

    monkeypatch.setattr(Trainer, "_run_step", step)
    words = (*SMALL, "--structure", "dense", "--out", str(tmp_path / "cut"))
    assert command(*words) == 130
    assert "stopped by SIGINT at epoch 1, batch 1" in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "_run_step", real)
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    assert command(*words, "--resume") == 0
    out = capsys.readouterr().out
    assert "continues at epoch 1, batch 2" in out
    assert "no figure: a picture needs matplotlib" in out
    assert not (tmp_path / "cut" / "training.png").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; it needs one of sgd, adamw"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"schedule": "linear"}, "schedule"),
        ({"amp": "fp8"}, "amp is 'fp8'"),
        ({"milestones": (0.7, 0.5)}, "milestones"),
        ({"warmup": 4.0}, "warmup"),
        ({"evolve": "best"}, "evolve is 'best'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"accumulate": 5}, "accumulate = 5 parts"),
        ({"evolve": "rigl"}, "the model is dense"),
    ],
)
def test_mistakes_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(network(), **settings)


def test_batches_that_do_not_fit_are_told():
    to_train, to_test = (Batches(images(20), 10, train=kind) for kind in (True, False))
    with pytest.raises(ValueError, match=r"train is Batches\(train=False\)"):
        Trainer(network(), to_test, to_test, Settings(1))
    with pytest.raises(ValueError, match=r"test is Batches\(train=True\)"):
        Trainer(network(), to_train, to_train, Settings(1))
    with pytest.raises(ValueError, match="for rank 1 of 2; this is 0 of 1"):
        Trainer(network(), Batches(images(20), 10, train=True, rank=1, world=2), to_test, Settings(1))
    with pytest.raises(ValueError, match="plain values"):
        Trainer(network(), to_train, to_test, Settings(1), config={"x": object()})


def test_train_takes_images():
    result = train(network(), (images(24), images(12)), batch_size=12, device="cpu", quiet=True, epochs=1)
    assert result.steps == 2
