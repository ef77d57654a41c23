"""Parameters, storage, memory references and balance of a whole network, for one image."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from .model_report import report_model
from .model_summary import inputs_of, summary
from .scnn import scnn_of_model
from .stream import References


def costs_of(model: nn.Module, shape: Sequence[int]) -> dict[str, Any]:
    """Of all convolutions and linear layers: parameters, bytes as a stream, references, balance.

    References are those of one image's forward pass, each layer's as often as it has output pixels; those of a machine
    like SCNN, by kind, are counted vector by vector: see scnn.py.

    Args:
        model: stays as it is.
        shape: (C, H, W) of an image.
    """
    model = copy.deepcopy(model).cpu()
    inputs = inputs_of(model, (1, *shape))
    pixels = {name: out.numel() // out.shape[1] for name, (_, out) in inputs.items()}
    reports = report_model(model)
    work = {name: report.kept * pixels[name] for name, report in reports.items()}
    total = max(1, sum(work.values()))
    scnn = scnn_of_model(model, shape).values()
    return {
        "parameters": summary(model).parameters,
        "stream": sum(report.storage.model for report in reports.values()),
        "references": sum(sum(report.references) * pixels[name] for name, report in reports.items()),
        "scnn": {kind: sum(getattr(each, kind) for each in scnn) for kind in References._fields},
        "fprop_balance": sum(report.fprop_balance * work[name] for name, report in reports.items()) / total,
        "dgrad_balance": sum(report.dgrad_balance * work[name] for name, report in reports.items()) / total,
    }
