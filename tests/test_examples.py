"""Every file of examples/ runs as a user would start it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import processes

EXAMPLES = Path(__file__).parent.parent / "examples"
OPTIONS = {  # what makes one short
    "finetune_torchvision.py": ["--fresh", "--steps", "2", "--size", "64", "--batch", "2"],
    "custom_loop.py": ["--epochs", "1", "--images", "300"],
    "blocksparse_alone.py": [],
    "own_structure.py": [],
}
SAYS = {
    "finetune_torchvision.py": "dense tensors for plain PyTorch",
    "custom_loop.py": "updates of the masks",
    "blocksparse_alone.py": "forward + backward: dense",
    "own_structure.py": "ring (1, 1)",
}


def test_all_examples_are_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == set(OPTIONS) == set(SAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_an_example_runs(name, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    result = processes.run([sys.executable, str(EXAMPLES / name), *OPTIONS[name]], cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert SAYS[name] in result.stdout
    assert not list(tmp_path.iterdir())
