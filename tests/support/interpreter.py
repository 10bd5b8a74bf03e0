"""Where Triton's interpreter runs, and it without work that it does in vain: most of the time of a small kernel."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

_KNOWN = ("_patch_lang", "_get_np_dtype", "interpreter_builder", "tl", "TritonSemantic")


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
    _replace_the_language_once(interpreter)
    _make_each_type_once(interpreter.tl.core, interpreter.TritonSemantic)
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


def _replace_the_language_once(interpreter: Any) -> None:
    """The language's functions are the interpreter's during a launch, replaced at each call: once for all is enough.

    Nothing that needs its own functions, as a compilation does, works in this process.
    """
    language, patch = interpreter.tl, interpreter._patch_lang
    patched: set[frozenset[str]] = set()
    stays = SimpleNamespace(restore=lambda: None)  # at the end of a launch

    @cache
    def parts(function: Any) -> frozenset[str]:
        """Of the language, what a function's module has imported: what is replaced on its behalf."""
        modules = {"language": language, "core": language.core}
        seen = function.__globals__.values()
        return frozenset(name for name, module in modules.items() if any(value is module for value in seen))

    def patch_once(function: Any) -> Any:
        found = parts(function)
        if found not in patched:
            patch(function)
            patched.add(found)
        return stays

    interpreter._patch_lang = patch_once


def _make_each_type_once(core: Any, semantic: Any) -> None:
    """A block's type and its shape are made anew for each value, and shapes compared through classes of Triton's."""
    block, tensor, dtype, constexpr = core.block_type, core.tensor, core.dtype, core.constexpr
    known = block(core.int32, [2])
    if vars(known).keys() != {"element_ty", "shape", "numel", "name"}:
        return
    if vars(tensor(None, known)).keys() != {"handle", "shape", "numel", "type", "dtype"}:
        return
    fill, equal, broadcast = block.__init__, dtype.__eq__, semantic.broadcast_impl_value
    blocks: dict[Any, Any] = {}

    def made(cls: Any, element: Any, shape: Any) -> Any:
        """The block that there is; of pointers as of dtypes, whose name says what they point to."""
        place = getattr(element, "address_space", None)
        key = (element.name, place, *[s.value if type(s) is constexpr else s for s in shape])
        return blocks.get(key) or blocks.setdefault(key, object.__new__(cls))

    def fill_once(self: Any, element: Any, shape: Any) -> None:
        if not vars(self):
            fill(self, element, shape)
            self.of_tensors = core.tuple([constexpr(s) for s in self.shape]), constexpr(self.numel)

    empty = core.tuple([])
    of_scalars = empty, constexpr(1)
    sequences = (list, tuple, core.tuple)

    def fill_tensor(self: Any, handle: Any, of: Any) -> None:
        self.handle, self.type, self.dtype = handle, of, of.scalar
        self.shape, self.numel = of.of_tensors if type(of) is block else of_scalars

    def same(self: Any, other: Any) -> Any:
        return self is other or equal(self, other)

    def broadcast_once(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = (getattr(side.type, "shape", empty).values for side in (lhs, rhs))
        if one == other:
            return lhs, rhs
        if one and other and len(one) != len(other):
            return broadcast(self, lhs, rhs)
        pairs = list(zip(one or other, other or one, strict=True))
        if any(m != n and 1 not in (m, n) for m, n in pairs):
            return broadcast(self, lhs, rhs)
        shape = [max(pair) for pair in pairs]
        return [widened(self, *side, shape) for side in ((lhs, one), (rhs, other))]

    def widened(self: Any, value: Any, sizes: list[int], shape: list[int]) -> Any:
        if sizes == shape:
            return value
        if sizes:
            handle = self.builder.create_broadcast(value.handle, shape)
        else:
            handle = self.builder.create_splat(SimpleNamespace(shape=shape), value.handle)
        return tensor(handle, block(value.dtype, shape))

    def unwrap_once(value: Any) -> Any:
        of = type(value)
        return value.value if of is constexpr else unwrap(value) if of in sequences else value

    unwrap, core._unwrap_if_constexpr = core._unwrap_if_constexpr, unwrap_once
    block.__new__, block.__init__, tensor.__init__, dtype.__eq__ = made, fill_once, fill_tensor, same
    semantic.broadcast_impl_value = broadcast_once
