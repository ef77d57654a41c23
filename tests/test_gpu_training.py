"""Training on a GPU: what a user's loop does there. What a CPU can do as well runs on it where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import blocksparse as bs
import hrbp
from hrbp.training.devices import process_group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRUCTURES = {
    "block": {"structure": "block", "blocksize": (8, 8)},
    "hrbp++": {"structure": "hrbp++", "groups": 2},
    "unstructured": {"structure": "unstructured"},
}


def network(structure: str, method: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = hrbp.models.build("resnet8", classes=4, width=1 if DEVICE == "cuda" else 0.5, image_size=16)
    options = {"structure": "2:4"} if method == "sr-ste" else STRUCTURES[structure]
    return hrbp.sparsify(model, 0.5, method=method, distribution="uniform", **options).to(DEVICE)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(16) % 4
    x = torch.randn(16, 3, 16, 16, generator=generator) + y.view(-1, 1, 1, 1)
    return [(x.to(DEVICE, dtype), y.to(DEVICE))] * count


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


@pytest.mark.device
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("structure", "method"),
    [("block", "set"), ("hrbp++", "rigl"), ("hrbp++", "hrbp"), ("unstructured", "gmp"), ("block", "sr-ste")],
)
def test_masks_that_change_train(structure, method, channels_last):
    model = network(structure, method if method == "sr-ste" else None)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    options = {"sparsity": 0.8} if method == "gmp" else {}
    evolver = hrbp.Evolver(model, optimizer, method, total_steps=24, every=4, **options)
    losses, updates = [], 0
    for x, y in batches(24):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        updates += evolver.step() is not None
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert updates > 0
    assert all(p.device.type == DEVICE for p in model.parameters())
    x, _ = batches(1)[0]
    model.eval()
    torch.testing.assert_close(hrbp.densify(copy.deepcopy(model))(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.device
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_scaled_loss_in_half_precision(structure):
    """GradScaler skips the steps whose gradients are not finite, and unscales those of stored blocks."""
    model = network(structure)
    optimizer, scaler = sgd(model), torch.amp.GradScaler(DEVICE, init_scale=2.0**40, growth_interval=1000)
    dtype = torch.float16 if DEVICE == "cuda" else torch.bfloat16
    losses = []
    for x, y in batches(60 if DEVICE == "cuda" else 16):
        with torch.autocast(DEVICE, dtype):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert losses[-1] < 0.8 * losses[0]
    if DEVICE == "cuda":
        assert scaler.get_scale() < 2.0**40  # float16 has no such gradients: steps were skipped


@pytest.mark.device
def test_one_process_of_data_parallel(tmp_path):
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    with process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1):
        model, alone = network("hrbp++"), network("hrbp++")
        parallel = DistributedDataParallel(model, device_ids=[0] if DEVICE == "cuda" else None)
        runs = []
        for each, call in ((model, parallel), (alone, alone)):
            optimizer = sgd(each)
            evolver = hrbp.Evolver(each, optimizer, "rigl", total_steps=12, every=3, seed=1)
            for x, y in batches(12):
                loss = F.cross_entropy(call(x), y)
                loss.backward()
                optimizer.step()
                evolver.step()
                optimizer.zero_grad()
            runs.append(float(loss.detach()))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


@pytest.mark.device
@pytest.mark.parametrize("blocksize", [(32, 32), (64, 8), (8, 1)], ids=str)
def test_the_same_bits_in_every_launch(blocksize):
    """A race between copies and products shows in one launch of many."""
    launches = 1000 if DEVICE == "cuda" else 3
    pattern = bs.BSRPattern.random((128, 128, 3, 3), blocksize, 0.2, torch.Generator().manual_seed(0)).to(DEVICE)
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    layout = torch.channels_last if blocksize[1] >= 8 else torch.contiguous_format
    x = torch.randn(8, 128, 14, 14, device=DEVICE, dtype=dtype).contiguous(memory_format=layout)
    values = torch.randn(pattern.nnzb, *blocksize, device=DEVICE, dtype=dtype)
    calls = (
        lambda: bs.conv2d(x, values, pattern, None, 1, 1),
        lambda: bs.conv2d_dgrad(x, values, pattern, x.shape, 1, 1),
        lambda: bs.conv2d_wgrad(x, x, pattern, 1, 1),
    )
    for call in calls:
        first = call()
        differing = sum((call() != first).any().to(torch.int64) for _ in range(launches))
        assert int(differing) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_captured_step_trains_under_new_masks(structure):
    """Replays of a whole step are the eager steps, also after a mask of equal size was written in place."""
    eager, captured = network(structure), network(structure)
    optimizers = sgd(eager), sgd(captured)
    x, y = batches(1)[0]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, optimizers[1])
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        step(eager, optimizers[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, optimizers[1])
    for _ in range(3):
        graph.replay()
        assert float(loss) == pytest.approx(float(step(eager, optimizers[0])), rel=1e-3)
    eager.load_state_dict(captured.state_dict())
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    for model, optimizer in zip((eager, captured), optimizers, strict=True):
        evolver = hrbp.Evolver(model, optimizer, "set", total_steps=2, every=1, seed=3)
        assert evolver.step() is not None
    for _ in range(3):
        graph.replay()
        assert float(loss) == pytest.approx(float(step(eager, optimizers[0])), rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_compiled_step_is_the_eager_one(structure):
    losses = []
    for compiled in (False, True):
        model = network(structure)
        call, optimizer = torch.compile(model) if compiled else model, sgd(model)
        for x, y in batches(4):
            loss = F.cross_entropy(call(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.gpu
def test_a_model_moves_to_the_gpu_and_back(tmp_path):
    model = network("hrbp++").cpu()
    x, _ = batches(1)[0]
    moved = copy.deepcopy(model).cuda().eval()
    needed = model.eval()(x.cpu())
    torch.testing.assert_close(moved(x).cpu(), needed, rtol=1e-3, atol=1e-3)
    hrbp.save(moved, tmp_path / "model.pt")
    torch.testing.assert_close(hrbp.load(tmp_path / "model.pt").eval()(x.cpu()), needed, rtol=1e-3, atol=1e-3)
