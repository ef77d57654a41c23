"""Where the property suites run: every backend on every device that it takes, by the library's own answer; threads."""

from __future__ import annotations

from contextlib import contextmanager

import torch

import blocksparse as bs


def _runs(backend: str, device: str) -> bool:
    """Whether a backend takes a plain layer there."""
    pattern = bs.BSRPattern.full((16, 16, 3, 3), (8, 8)).to(device)
    x, values = torch.empty(2, 16, 6, 6, device=device), torch.empty(pattern.nnzb, 8, 8, device=device)
    try:
        bs.explain(x, values, pattern, backend=backend)
    except (ValueError, RuntimeError):
        return False
    return True


# (backend, device) pairs that run in this process, the library's own answer; test_errors.py holds which must be there.
RUNNERS = [
    (backend, device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    for backend in bs.available_backends() if _runs(backend, device)
]  # fmt: skip


@contextmanager
def pytorch_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
