"""Let layers train on 2:4 kernels, forward and input gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blocksparse import BSRModule

from ..layers.master import Master
from ..layers.semi_structured import device_refuses, multiples, refuses_product
from ..layers.semi_training import prepare
from ..layers.stored import PLAIN
from ..structures.transposable import Transposable
from ..wrappers import unwrapped


def train_semi_structured(model: nn.Module) -> dict[str, str | None]:
    """Let the layers whose masks are 2:4 in both directions train on sparse tensor cores, in place.

        model = hrbp.models.build("resnet50", classes=1000)
        hrbp.sparsify(model, 0.5, structure="transposable", method="sr-ste")
        print(hrbp.train_semi_structured(model.cuda()))

    Linear layers and 1x1 convolutions, on NVIDIA GPUs from compute capability 8.0 on, of a model that
    `sparsify(structure="transposable", method="ste" or "sr-ste")` made at sparsity 0.5: forward and input gradient run
    on compressed forms of the weight, made anew in every forward. They need float16 or bfloat16, by autocast or of the
    model; in another dtype the forward raises ValueError. The weight, its gradient (dense) and the optimizer's state
    stay as they are, files of the model, too. Other layers compute as before. `release` and `densify` end it.

    Not run on a GPU yet, and not timed: see hrbp/layers/semi_training.py.

    Returns:
        layer -> why it computes as before, None for those that train on 2:4 kernels.
    """
    told = {}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, (*PLAIN, BSRModule)):
            told[name] = _refuses(module)
            if told[name] is None:
                prepare()
                layer: Any = module
                layer.semi = True
    return told


def _refuses(module: Any) -> str | None:
    """Why a layer cannot train on 2:4 kernels, or None; the device is checked last."""
    if not isinstance(module, Master) or module.rule is None:
        return "no mask that follows its weight: sparsify(structure='transposable', method='sr-ste')"
    k, c, r, s = module.weight_shape
    if reason := refuses_product(module, (r, s)):
        return reason
    rule = module.rule
    if not isinstance(rule, Transposable) or (rule.kept(module.sparsity), rule.m) != (2, 4):
        return f"masks {rule.name}: 2:4 in both directions are those of structure 'transposable' at sparsity 0.5"
    rows, columns = multiples(torch.float16)
    if k % rows or c % columns or c % rows or k % columns:
        return f"{k}x{c} is no multiple of {rows}x{columns} in both directions"
    return device_refuses(module.weight.device)
