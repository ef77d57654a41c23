"""HRBP's own update: single weights are exchanged, then each group counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..structures.base import Selection, Structure
from .options import one_of, option
from .rigl import RigL

UNITS = ("weight", "kernel")


@dataclass(frozen=True)
class HRBP(RigL):
    """weights or kernels of filters go and come as in "rigl", then each group chooses channels and taps by counts

    In every filter the units of least |weight| go and those of largest |gradient| come; then each group chooses its
    channels and taps by counts. Groups only. The paper does not say what the units are. unit="weight": one by one. New
    ones have to agree on a channel to outnumber an old one there, which is rare. unit="kernel": of one filter and one
    input channel, the units of the mask that its groups are made of. "rigl" exchanges whole channels of a group.

    Source: Ma et al., HRBP: Hardware-friendly Regrouping towards Block-based Pruning for Sparse CNN Training, CPAL
    2024, section 4.2.
    """

    name = "hrbp"
    place = 30

    unit: str = option("weight", f"what a filter exchanges ({', '.join(UNITS)})", one_of(UNITS))

    @classmethod
    def refuses(cls, rule: Structure) -> str | None:
        if reason := super().refuses(rule):
            return reason
        if rule.can("recount"):
            return None
        return f"method {cls.name!r} updates groups; the structure is {rule.name!r}; use 'rigl'"

    def exchanged(
        self, rule: Structure, mask: Tensor, order: Tensor | None, weight: Tensor, growth: Tensor, share: float
    ) -> Selection:
        return rule.recount(mask, order, weight, growth, share, self.unit)
