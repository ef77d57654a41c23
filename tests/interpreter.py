"""Triton's interpreter without the work that comes to nothing: the kernels' tests take half as long.

What is computed, and how, stays as it is. Each part is left out by itself where a release of Triton has no such place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


def lighten() -> None:
    """Change the interpreter of this process; before or after kernels were decorated."""
    import triton.language as tl
    from triton.runtime import interpreter

    # A sum of integers is computed again in 64 bits, and compared with what the type holds; the assertion on that is
    # dropped unless `debug` is set, which it is not.
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype, tl)
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once(interpreter._patch_lang, interpreter._LangPatchScope, (tl, tl.core))


def _remembered(numpy_type: Callable[[Any], Any], tl: Any) -> Callable[[Any], Any]:
    """NumPy's type for one of Triton's: made once, from a table of all types that is made at each call."""
    known = functools.cache(numpy_type)

    def find(kind: Any) -> Any:
        scalar = kind.element_ty if type(kind) is tl.block_type else kind
        return known(scalar) if type(scalar) is tl.dtype else numpy_type(kind)

    return find


def _once(patch: Callable[[Any], Any], scope: type, languages: tuple[Any, ...]) -> Callable[[Any], Any]:
    """A launch puts the interpreter's functions into the language's modules and takes them out at its end.

    Each call of a device function does so again, by a search through these modules: it finds none that is left.
    """
    done: list[set[str]] = []  # modules that the launch under way, if there is one, has changed

    @functools.cache
    def modules(fn: Any) -> frozenset[str]:
        return frozenset(language.__name__ for language in languages if language in fn.__globals__.values())

    def put(fn: Any) -> Any:
        if done:  # a device function
            if modules(fn) <= done[-1]:
                return scope()
            done[-1] |= modules(fn)
            return patch(fn)
        made = patch(fn)
        take_out = made.restore

        def restore() -> None:
            done.clear()
            take_out()

        done.append(set(modules(fn)))
        made.restore = restore
        return made

    return put
