"""Data-parallel ranks have the same masks, or are told that they do not: two processes, gloo."""

from __future__ import annotations

import copy
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hrbp
import processes
from hrbp.layers.view import sparse_layers
from hrbp.methods.evolver import Evolver
from hrbp.training.devices import process_group

ROOT = Path(__file__).parent.parent
RANKS = 2
LIMIT = processes.LIMIT / 2  # seconds that a process may take


class Net(nn.Module):
    """Stochastic depth: `runs` are the blocks that take part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16, 4)
        self.runs: tuple[int, ...] = (0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for i in self.runs:
            x = x + F.relu(self.blocks[i](x), inplace=True)
        return self.head(x.mean((2, 3)))


def made(structure: str = "hrbp", sparsity: float = 0.8, method: str | None = None, seed: int = 0, **options) -> Net:
    torch.manual_seed(0)
    options = {"hrbp": {"groups": 2}, "1xn": {"n": 4}}.get(structure, {}) | options
    return hrbp.sparsify(Net().double(), sparsity, structure=structure, method=method, seed=seed, **options)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)


def evolver(net: nn.Module, method: str = "set", **options) -> Evolver:
    return Evolver(net, sgd(net), method, **{"total_steps": 100, "every": 1, **options})


def images(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)


def backward(net: nn.Module, step: int, rank: int) -> None:
    net(images(step, rank)).square().sum().backward()


def masks(net: nn.Module) -> dict[str, Tensor]:
    return {name: layer.mask() for name, layer in sparse_layers(net).items()}


# ---------------------------------------------------------------------- what every rank does


def differing(rank: int) -> None:
    """Each is a mistake that only the other rank's answer shows; nobody may wait for ever, nor change a mask."""

    def told(call) -> str:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    answers = {
        "seed": told(lambda: evolver(made(), seed=rank)),
        "default": told(lambda: evolver(made(), **{"seed": 0} if rank else {})),
        "every": told(lambda: evolver(made(), every=1 + rank)),
        "total_steps": told(lambda: evolver(made(), total_steps=100 + rank)),
        "drop": told(lambda: evolver(made(), "rigl", **{"drop": 0.1} if rank else {})),
        "method": told(lambda: evolver(made(), "set" if rank else "rigl")),
        "case": told(lambda: evolver(made(), "RigL" if rank else "rigl")),
        "refused": told(lambda: evolver(made(), every=0 if rank else 1)),
        "score": told(lambda: evolver(made("1xn", method="subp"), "subp", **{"score": "l1"} if rank else {})),
        "target": told(lambda: evolver(made("1xn", 0.5 + rank / 4, "subp"), "subp")),
        "masks": told(lambda: evolver(made(seed=rank))),
    }
    net = made("unstructured")
    one = evolver(net)
    with torch.no_grad():
        torch.manual_seed(rank)
        net.blocks[1].values.mul_(torch.rand(net.blocks[1].values.shape))
    before = masks(net)
    answers["diverged"] = told(one.step)
    answers["unchanged"] = str(all(torch.equal(mask, before[name]) for name, mask in masks(net).items()))
    net = made()
    one = evolver(net)
    net.blocks[2].requires_grad_(rank == 0)
    answers["frozen"] = told(one.step)
    net = made("unstructured", 0.5, "sr-ste")
    one = evolver(net, "sr-ste")
    with torch.no_grad():
        net.blocks[0].weight.mul_(1.0 + torch.rand(net.blocks[0].weight.shape) * rank)
    answers["following"] = told(one.step)
    state = evolver(made()).state_dict()
    answers["state"] = told(lambda: evolver(made()).load_state_dict({**state, "steps": 7 + rank}))
    one = evolver(made(), "rigl")
    answers["nowhere"] = told(one.step)
    Path(f"told-{rank}.json").write_text(json.dumps(answers))


def skipping(rank: int) -> None:
    """RigL where each rank skips other blocks, against the dense network that sees both."""
    net = made()
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = sgd(net)
    one = Evolver(wrapped, optimizer, "rigl", total_steps=100, every=1)
    moved = dict.fromkeys(masks(net), 0.0)
    for step, runs in enumerate([((0, 1), (1, 2)), ((0,), (2,)), ((0,), (0,)), ((), (1,)), ((0, 1, 2), (0, 1, 2))]):
        twin, wanted = hrbp.densify(copy.deepcopy(net)), {}
        twin.zero_grad()
        for other in range(RANKS):
            twin.runs = runs[other]
            backward(twin, step, other)
        for name in moved:
            grad = twin.get_submodule(name).weight.grad
            if grad is not None:
                wanted[name] = grad.abs()
        net.runs = runs[rank]
        backward(wrapped, step, rank)
        found = one._gathered()
        assert found.keys() == wanted.keys(), step
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10)
        one._gathered = lambda found=found: found  # it has added up what the other rank has
        optimizer.step()
        before = masks(net)
        update = one.step()
        del one._gathered
        optimizer.zero_grad()
        for name, mask in masks(net).items():
            moved[name] += update.changed[name]
            assert name in wanted or torch.equal(mask, before[name])
    assert min(moved.values()) > 0
    torch.save(net.state_dict(), f"skipping-{rank}.pt")


def compiled(rank: int) -> None:
    """A compiled data-parallel model, with RigL and with a dense master weight."""
    for method, structure, master in (("rigl", "hrbp", None), ("subp", "1xn", "subp")):
        states = []
        for compile_it in (False, True):
            torch._dynamo.reset()
            net = made(structure, method=master)
            wrapped = DistributedDataParallel(net)
            run = torch.compile(wrapped, backend="aot_eager") if compile_it else wrapped
            optimizer = sgd(net)
            one = Evolver(wrapped, optimizer, method, total_steps=6, every=2)
            for step in range(4):
                backward(run, step, rank)
                optimizer.step()
                one.step()
                optimizer.zero_grad()
            states.append(net.state_dict())
        for name, t in states[0].items():
            torch.testing.assert_close(states[1][name], t, rtol=1e-8, atol=1e-10, msg=f"{method}: {name}")
        torch.save(states[1], f"compiled-{method}-{rank}.pt")


def worker(rank: int, *tasks: str) -> None:
    limit = timedelta(seconds=LIMIT / 4)
    torch.set_num_threads(1)
    meeting = f"file://{Path('store').absolute()}"
    with process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=limit):
        for task in tasks:
            print(task, flush=True)
            globals()[task](rank)
            dist.barrier()


# ---------------------------------------------------------------------- the tests


def run(folder: Path, *tasks: str) -> None:
    """The tasks, in a process a rank; what any of them wrote is shown if one fails."""
    code = f"import test_evolve_ranks as t; t.worker({{rank}}, *{tasks!r})"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        processes.Process([sys.executable, "-c", code.format(rank=rank)], cwd=folder, env=environment)
        for rank in range(RANKS)
    ]
    ended = [rank.finish() for rank in started]
    assert [rank.returncode for rank in ended] == [0] * RANKS, "\n".join(rank.stdout + rank.stderr for rank in ended)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder of two tasks: one start of the ranks serves both."""
    folder = tmp_path_factory.mktemp("ranks")
    run(folder, "differing", "skipping")
    return folder


@pytest.fixture(scope="module")
def told(written) -> dict[str, str]:
    first, second = (json.loads((written / f"told-{rank}.json").read_text()) for rank in range(RANKS))
    assert first == second  # a rank that raises alone leaves the others waiting
    return first


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("seed", "ValueError: Evolver(): seed is 0 on rank 0 and 1 on rank 1; every rank needs the same"),
        ("default", "nothing"),
        ("every", "ValueError: Evolver(): every is 1 on rank 0 and 2 on rank 1; every rank needs the same"),
        ("total_steps", "ValueError: Evolver(): total_steps is 100 on rank 0 and 101 on rank 1"),
        ("drop", "ValueError: Evolver(): drop is 0.3 on rank 0 and 0.1 on rank 1"),
        ("method", "ValueError: Evolver(): method is 'rigl' on rank 0 and 'set' on rank 1"),
        ("case", "nothing"),
        ("refused", "ValueError: Evolver(): every is 1 on rank 0 and 0 on rank 1"),
        ("score", "ValueError: Evolver(): score is 'bpar' on rank 0 and 'l1' on rank 1"),
        ("target", "ValueError: Evolver(): the density asked of 'blocks.0' is 0.5 on rank 0 and 0.25 on rank 1 (and"),
        ("masks", "ValueError: Evolver(): the mask of 'blocks.0' is "),
        ("diverged", "ValueError: Evolver.step(), step 1: the new mask of 'blocks.1' is "),
        ("unchanged", "True"),
        ("frozen", "ValueError: Evolver.step(), step 1: the new mask of 'blocks.2' is "),
        ("following", "ValueError: Evolver.step(), step 1: the mask of 'blocks.0' is "),
        ("state", "ValueError: Evolver.load_state_dict(): the step of the state is 7 on rank 0 and 8 on rank 1;"),
        ("nowhere", "RuntimeError: Evolver.step(): no dense gradient of blocks.0, blocks.1, blocks.2, or of any other"),
    ],
)
@pytest.mark.slow
def test_what_differs_between_ranks_is_told_on_all_of_them(told, case, message):
    assert told[case].startswith(message)


@pytest.mark.slow
def test_ranks_that_skip_other_layers_grow_by_the_gradients_of_all(written):
    states = [torch.load(written / f"skipping-{rank}.pt", weights_only=True) for rank in range(RANKS)]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


@pytest.mark.slow
def test_a_compiled_data_parallel_model_trains(tmp_path):
    run(tmp_path, "compiled")
    for method in ("rigl", "subp"):
        states = [torch.load(tmp_path / f"compiled-{method}-{rank}.pt", weights_only=True) for rank in range(RANKS)]
        assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


LAST = """
import sys
import torch
from torch import distributed, nn
from hrbp.training.devices import process_group

def train():
    with process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1):
        parallel = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        for _ in range(2):
            parallel(torch.randn(2, 4)).sum().backward()

sys.setswitchinterval(1000)  # a thread that wants Python's lock waits until it is let go
for _ in range(300):  # most runs would hang at one of them
    train()
print("done")
"""


@pytest.mark.slow
def test_a_network_that_outlives_its_process_group():
    """PyTorch waits for the group's threads where it ends, for as long as these wait for Python's lock."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = processes.run([sys.executable, "-c", LAST], env=environment, limit=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "done\n"
