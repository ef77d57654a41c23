"""The device of a training, and the rank of this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def the_device(device: torch.device | str | None = None) -> torch.device:
    """A device that can be used: the one of this name, else the GPU of this rank where there is one, else the CPU.

    Raises:
        ValueError: no such device, or it cannot be used here.
    """
    try:
        name = device.strip().lower() if isinstance(device, str) else device
        here = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; it needs cpu, cuda, or one of several GPUs as cuda:1") from None
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if here.index is None else here.index)
        if here.index >= torch.cuda.device_count():
            raise ValueError(f"device: this rank needs {here} and there are {torch.cuda.device_count()} GPUs; use cpu")
        return here
    try:
        torch.ones(1, device=here).tolist()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = (str(error).splitlines() or ["it holds no numbers"])[0].partition(". ")[0]
        raise ValueError(f"device is {device!r}, which cannot be used here: {why}; use cpu or cuda") from error
    return here


_LEFT: list[Any] = []


@contextlib.contextmanager
def process_group(backend: str, **options: Any) -> Iterator[None]:
    """torch.distributed's process group, for as long as the block runs; options of init_process_group.

    The group itself is kept until the process ends. A DistributedDataParallel that outlives the block would else be the
    last that holds it, and would wait for its threads with Python's lock held, for which these may wait (PyTorch 2.13).
    """
    dist.init_process_group(backend, **options)
    _LEFT.append(dist.group.WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def ranks(device: torch.device | str | None = None) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world, device) of this process, in the process group that torchrun asks for: NCCL on GPUs, else gloo."""
    here = the_device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield rank, world, here
        return
    with process_group("nccl" if here.type == "cuda" else "gloo"):
        yield dist.get_rank(), dist.get_world_size(), here
