"""HRBP's own update: single weights are exchanged, then each group counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..structures.base import Selection, Structure
from .rigl import RigL


@dataclass(frozen=True)
class HRBP(RigL):
    """single weights go and come as in "rigl", then each group chooses its channels and taps anew by counts

    In every filter the weights of least |weight| go and those of largest |gradient| come, one by one; then each group
    chooses its channels and taps by counts. Groups only. New weights have to agree on a channel to outnumber an old one
    there, which is rare: "rigl" moves far more.

    Source: Ma et al., HRBP: Hardware-friendly Regrouping towards Block-based Pruning for Sparse CNN Training, CPAL
    2024, section 4.2.
    """

    name = "hrbp"
    place = 30

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
        return rule.recount(mask, order, weight, growth, share)
