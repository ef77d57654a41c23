"""A mask structure of your own: python examples/own_structure.py

1. For one network: mask the weights with torch.nn.utils.prune in any way you like, and let `hrbp.from_prune` store what
   is left.
2. For every command and function of this library (sparsify, train --structure, study, ...): a class with `choose` and
   `density`, in a file in hrbp/structures. Here filter k keeps the input channels that follow
   channel k on a ring. CONTRIBUTING.md has the contract.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

import hrbp

STRUCTURE = '''
"""Filter k keeps the input channels that follow channel k on a ring."""

from dataclasses import dataclass

import torch

from hrbp.structures.base import Selection, Structure, named


@dataclass(frozen=True)
class Ring(Structure):
    name: str = "ring"

    def choose(self, score, sparsity, seed=0):
        k, c, r, s = score.shape
        ahead = (torch.arange(c) - torch.arange(k)[:, None]) % c  # how far channel c lies after channel k
        kept = ahead < self.count(score.shape, 1 - sparsity)
        return Selection(kept[:, :, None, None].expand(k, c, r, s).contiguous(), self.blocksize(score.shape))

    def density(self, shape, density):
        return self.count(shape, density) / shape[1]

    def count(self, shape, density):
        return max(1, round(density * shape[1]))


@named("ring")
def make_ring() -> Structure:
    """filters keep the input channels that follow theirs on a ring"""
    return Ring()
'''


def network() -> nn.Module:
    torch.manual_seed(0)
    return hrbp.models.build("resnet8", classes=10, image_size=16)


def main() -> None:
    x = torch.randn(2, 3, 16, 16)

    print("masks of torch.nn.utils.prune, taken over")
    model = network()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and name != "conv1":
            mask = (torch.rand(layer.weight.shape[:2]) < 0.2)[:, :, None, None].expand_as(layer.weight)
            prune.custom_from_mask(layer, "weight", mask)
    model.eval()
    needed = model(x)
    hrbp.from_prune(model)
    torch.testing.assert_close(model(x), needed, rtol=1e-4, atol=1e-4)
    print(hrbp.summary(model))

    print("\na structure of its own, in a file")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ring.py").write_text(STRUCTURE)
        sys.modules["hrbp.structures"].__path__.append(folder)  # or put the file into hrbp/structures
        model = hrbp.sparsify(network(), 0.8, structure="ring")
        print(hrbp.summary(model))
        sys.modules["hrbp.structures"].__path__.remove(folder)


if __name__ == "__main__":
    main()
