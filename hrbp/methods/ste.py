"""STE: the mask is that of the largest weights, anew at every step."""

from __future__ import annotations

from dataclasses import dataclass

from .following import Following


@dataclass(frozen=True)
class STE(Following):
    """the mask is that of the largest |weight|, anew at every step; what is left out learns on (straight-through)

    What is left out gets the gradient that it would have if it took part.

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation,
    2013.
    """

    name = "ste"
    place = 50
