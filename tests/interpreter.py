"""Triton's interpreter without work that it does in vain: half of the time of a small kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

_KNOWN = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "interpreter_builder", "tl")


def leave_out_what_is_in_vain() -> None:
    """Change the interpreter of this process; one that is made of other parts than those known here is left alone."""
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in _KNOWN):
        return
    _replace_the_language_once_a_launch(interpreter)
    # Whether an integer overflows is computed after each operation, and looked at only where `debug` is set.
    builder: Any = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    # A table of all dtypes is made for each look into it.
    of_type, scalar_type = interpreter._get_np_dtype, interpreter.tl.dtype
    of_scalar = cache(of_type)

    def numpy_dtype(of: Any) -> Any:
        return of_scalar(of) if type(of) is scalar_type else of_type(of)

    interpreter._get_np_dtype = numpy_dtype


def _replace_the_language_once_a_launch(interpreter: Any) -> None:
    """The language's functions are replaced by the interpreter's at each call of a device function: once is enough."""
    language, scope = interpreter.tl, interpreter._LangPatchScope
    patch: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    class Scope(scope):  # type: ignore[misc,valid-type]
        def restore(self) -> None:  # the end of a launch
            patched.clear()
            super().restore()

    @cache
    def parts(function: Any) -> frozenset[str]:
        """Of the language, what a function's module has imported: what is replaced on its behalf."""
        modules = {"language": language, "core": language.core}
        seen = function.__globals__.values()
        return frozenset(name for name, module in modules.items() if any(value is module for value in seen))

    def patch_once(function: Any) -> Any:
        found = parts(function)
        if found in patched:
            return None  # nobody restores what was replaced for a device function
        patched.add(found)
        return patch(function)

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_once
