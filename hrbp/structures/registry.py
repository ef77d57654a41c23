"""Every sparsity structure by its name: `make_mask` and `choose`.

A structure says which weights are kept or dropped together. Most are grains: boxes of the filter bank, kept or dropped
whole (Mao et al., Exploring the Regularity of Sparse Structure in Convolutional Neural Networks, 2017). The score of a
grain is the sum of its cells' scores, and the best grains are kept.

    unstructured  single weights
    n:m           single weights, n in every m neighbouring input channels (Zhou et al., ICLR 2021); "2:4" names one
    transposable  n:m along the input channels and along the filters: n:m in the input gradient, too
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

They are found in the files of this folder, by `named` (base.py): another structure is another file.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Annotated, Any

from torch import Tensor

from blocksparse import bank_shape

from ..arguments import any_case
from ..registry import Entry, Registry
from .base import Selection, Structure

# What the value of an option must be, by its annotation; 0 and 1 are True and False on a command line.
KINDS: dict[Any, tuple[type, str]] = {
    int: (Integral, "an integer"), bool: (Integral, "True or False"), float: (Real, "a number"), str: (str, "a string"),
    type(None): (type(None), "None"),
}  # fmt: skip


def _makers(module: types.ModuleType) -> Iterator[Entry[Callable[..., Structure]]]:
    """The functions of a file that `named` has registered."""
    for value in vars(module).values():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and hasattr(value, "structure"):
            yield Entry(value.structure.name, value, value.structure.place)


def _classes(module: types.ModuleType) -> Iterator[Entry[type[Structure]]]:
    """The structure classes of a file, by the names that model files use."""
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Structure) and value.__module__ == module.__name__:
            if value is Structure:
                continue
            if "__dataclass_fields__" not in vars(value):
                raise TypeError(
                    f"{module.__file__}: {value.__name__} is no dataclass; files of models hold its fields: it needs"
                    " @dataclass(frozen=True)"
                )
            yield Entry(value.__name__, value)


STRUCTURES: Registry[Callable[..., Structure]] = Registry("hrbp.structures", _makers)
CLASSES: Registry[type[Structure]] = Registry("hrbp.structures", _classes)


def structure(name: str, **options: object) -> Structure:
    """The structure of this name (see the list at the top of this file) in any case, or "2:4", "1:4", ... for n:m.

    Raises:
        ValueError: no such structure, or an option that is no such number.
        TypeError: an option that it does not have; the message lists those it has.
    """
    name = any_case(name, STRUCTURES)
    text = name if isinstance(name, str) else ""
    ratio = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if ratio is None and text not in STRUCTURES:
        raise ValueError(f"structure(): no structure {name!r}; choose one of {', '.join(STRUCTURES)} or a ratio as 2:4")
    make = STRUCTURES["n:m" if ratio else text]
    known = {} if ratio else inspect.signature(make, eval_str=True).parameters
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"structure({name!r}): no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    for option, value in options.items():
        if needs := _wrong(value, known[option].annotation):
            raise ValueError(f"structure({name!r}): {option} is {value!r}; it needs {needs}")
    return make(m=int(ratio[2]), n=int(ratio[1])) if ratio else make(**options)


def options_in_models(name: str, *, drawn: bool, gpu: bool) -> dict[str, object]:
    """Options that `sparsify` gives a structure; none for "2:4", ...

    Args:
        name: of the structure.
        drawn: the first masks are random.
        gpu: the model is for a GPU.
    """
    made: Any = STRUCTURES.get(name)
    if made is None:
        return {}
    return dict(made.structure.in_models(gpu)) | dict(made.structure.drawn if drawn else {})


def _wrong(value: object, annotation: Any) -> str | None:
    """What an option needs where this value does not fit its annotation; None where it fits."""
    needs = ""
    if typing.get_origin(annotation) is Annotated:
        annotation, needs = typing.get_args(annotation)[:2]
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (types.UnionType, typing.Union) else ()
    texts = []
    for kind in kinds or (annotation,):
        of, text = KINDS.get(kind, (object, ""))  # other kinds are checked by the structure
        if isinstance(value, of):
            return None
        texts.append(text)
    return needs or " or ".join(texts)


def listed() -> str:
    """The list of structures for help texts: name, unit that is kept or dropped, options."""
    lines = []
    for name, make in STRUCTURES.items():
        what = (inspect.getdoc(make) or "").split("\n")[0]
        lines.append(f"  {name:13} {what}")
        options = [f"{p.name}={_short(p.default)}" for p in inspect.signature(make).parameters.values()]
        if options:
            text, indent = f"options: {', '.join(options)}", " " * 16
            here, there = (options_in_models(name, drawn=False, gpu=gpu) for gpu in (False, True))
            others = [f"{option}={_short(value)}" for option, value in here.items()]
            others += [f"{option}={_short(value)} for a GPU" for option, value in there.items() - here.items()]
            text += f"; in a model {', '.join(others)}" if others else ""
            lines += textwrap.wrap(text, 120, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def make_mask(score: Tensor, sparsity: float, structure: str = "hrbp++", *, seed: int = 0, **options: object) -> Tensor:
    """The mask of this structure that keeps the most of the score.

    Args:
        score: [K, C, R, S], [K, C, S] (read as [K, C, 1, S]) or [K, C] (read as [K, C, 1, 1]), finite and >= 0,
            floating point or bool, on any device.
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


def choose(score: Tensor, sparsity: float, structure: str = "hrbp++", *, seed: int = 0, **options: object) -> Selection:
    """As `make_mask`, with the BSR form: Selection(mask [K, C, R, S], blocksize, row_order, grouping)."""
    made = _structure(structure, **options)
    if isinstance(score, Tensor) and score.dim() in (2, 3):
        score = score.reshape(bank_shape(score.shape))
    return made.choose(score, sparsity, seed)


_structure = structure  # `structure` is an argument above
