"""Which shapes a mask may take: every sparsity structure behind one call.

A structure says what may be kept together. Most are grains, boxes of the filter bank that are kept or dropped whole
(Mao et al., Exploring the Regularity of Sparse Structure in Convolutional Neural Networks, 2017): a grain is worth the
sum of the scores of its cells, and the best ones stay.

    unstructured  single weights
    n:m           single weights, n in every m neighbouring input channels (Zhou et al., ICLR 2021); "2:4" names one
    vector        a row of a kernel
    kernel        one filter and one input channel
    filter        one filter
    channel       one input channel of all filters
    block         bk filters x bc input channels at one tap
    1xn           n filters and one input channel, all taps (Lin et al., 1xN Pattern, 2022); with `rearrange`
                  filters are sorted by their scores first; with `uniform` equally many in every n filters (SUBP: Xiang
                  et al., NeurIPS 2023)
    elementwise   groups of similar filters that keep the same cells of C x R x S: dense blocks in the output, not in
                  the input gradient; the baseline of the HRBP paper
    hrbp          groups of filters that keep the same channels, all taps (see regrouping.py)
    hrbp++        groups of filters that keep the same channels and the same taps, 4/9 of them
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from numbers import Integral, Real

from torch import Tensor

from ..arguments import any_case
from .base import Choice, Structure
from .elementwise import Elementwise, make_elementwise
from .grains import Grains, make_block, make_one_by_n
from .groups import Groups, make_groups
from .mixed import Mixed
from .n_m import NM, make_n_m

STRUCTURES: dict[str, Callable[..., Structure]] = {
    "unstructured": lambda: Grains("unstructured", (1, 1, 1, 1)),
    "n:m": make_n_m,
    "vector": lambda: Grains("vector", (1, 1, 1, None)),
    "kernel": lambda: Grains("kernel", (1, 1, None, None)),
    "filter": lambda: Grains("filter", (1, None, None, None)),
    "channel": lambda: Grains("channel", (None, 1, None, None)),
    "block": make_block,
    "1xn": make_one_by_n,
    "elementwise": make_elementwise,
    "hrbp": make_groups("hrbp", 1.0),
    "hrbp++": make_groups("hrbp++", 4 / 9),
}
CLASSES = {kind.__name__: kind for kind in (Grains, NM, Groups, Elementwise, Mixed)}  # as files of models name them


# What options are, and where None is one of their values.
KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("n", "m", "groups", "granule", "row_granule", "min_rows"), (Integral, "an integer")),
    **dict.fromkeys(("uniform", "rearrange", "balanced"), (Integral, "True or False")),  # 0 and 1 from a command line
    "tap_density": (Real, "a number in (0, 1]"),
}
NONE = (("n", "n:m"), ("row_granule", "hrbp"), ("row_granule", "hrbp++"))


def structure(name: str, **options: object) -> Structure:
    """The structure of this name (see the list at the top of this file) in any case, or "2:4", "1:4", ... for n:m.

    Raises:
        ValueError: no such structure, or an option that is no such number.
        TypeError: an option that it does not have; the message lists those it has.
    """
    name = any_case(name, STRUCTURES)
    text = name if isinstance(name, str) else ""
    ratio = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    make = (lambda: NM(int(ratio[2]), int(ratio[1]))) if ratio else STRUCTURES.get(text)
    if make is None:
        raise ValueError(f"structure(): no structure {name!r}; choose one of {', '.join(STRUCTURES)} or a ratio as 2:4")
    known = inspect.signature(make).parameters
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"structure({name!r}): no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    for option, value in options.items():
        kind, needs = KINDS.get(option, (object, ""))
        if not isinstance(value, kind) and not (value is None and (option, name) in NONE):
            raise ValueError(f"structure({name!r}): {option} is {value!r}; it needs {needs}")
    return make(**options)


def make_mask(score: Tensor, sparsity: float, structure: str = "hrbp++", *, seed: int = 0, **options: object) -> Tensor:
    """The mask of this structure that keeps the most of the score.

    Args:
        score: [K, C, R, S] or [K, C] (read as [K, C, 1, 1]), finite and >= 0, floating point or bool, on any device.
        sparsity: share of the weights that is dropped, in [0, 1). Structures keep whole grains, and at least one:
            the share kept is as near as these allow.
        structure: see the list at the top of this file.
        seed: of the structures that search (elementwise, hrbp, hrbp++).
        **options: of the structure: n, m (n:m), n, uniform, rearrange (1xn), blocksize (block), groups, min_rows,
            method (elementwise, hrbp, hrbp++), tap_density, granule, row_granule, balanced (hrbp, hrbp++).

    Returns:
        bool, of the score's shape and device.

    Raises:
        ValueError, TypeError: a score, sparsity, structure or option that makes no mask; the message says why.
    """
    return choose(score, sparsity, structure, seed=seed, **options).mask.view(score.shape)


def choose(score: Tensor, sparsity: float, structure: str = "hrbp++", *, seed: int = 0, **options: object) -> Choice:
    """As `make_mask`, with the BSR form: Choice(mask [K, C, R, S], blocksize, row_order, grouping)."""
    made = _structure(structure, **options)
    if isinstance(score, Tensor) and score.dim() == 2:
        score = score[:, :, None, None]
    return made.choose(score, sparsity, seed)


_structure = structure  # `structure` is an argument above
