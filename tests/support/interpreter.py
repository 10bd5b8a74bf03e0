"""Where Triton's interpreter runs, and it without work that it does in vain: half of the time of a small kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

_KNOWN = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "interpreter_builder", "tl")


def broken() -> str | None:
    """Why Triton's interpreter can run no kernel with what is installed; None: it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        triton, numpy = (Version(version(name)) for name in ("triton", "numpy"))
    except PackageNotFoundError:  # ROCm's triton has another name
        return None
    # The bounds of its loops are arrays of one dimension, of which numpy no longer makes an int.
    if triton < Version("3.7") and numpy >= Version("2.4"):
        return f"the interpreter of triton {triton} fails with numpy {numpy}: it takes triton 3.7, or numpy below 2.4"
    return None


def not_interpreted() -> str | None:
    """Why kernels are not run in Triton's interpreter in this process; None: they are."""
    reason = broken()
    if reason is None and os.environ.get("TRITON_INTERPRET") != "1":
        reason = "there is a GPU, or TRITON_INTERPRET says so"
    return None if reason is None else f"runs in Triton's interpreter: {reason}"


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
