"""A launch: a kernel with all its arguments, which code here runs, compiles ahead of time or reports to a listener."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for: Triton's backend ("cuda", "hip") and architecture (80, "gfx942").

    The defaults stand for the interpreter and for unknown cards.
    """

    backend: str = "any"
    arch: int | str = 0


OPAQUE_ZERO = "opaque_zero"
"""A kernel argument that is 0, which the compiler does not know: it takes what is computed with it for another value.

So the compiler computes an address or a mask anew where that is cheaper than a register for it through a loop. Where
the compiler would split a sum and move its constant half out of the loop, an exclusive or takes the sum's place.
"""

SIZES = (
    "height", "width", "grid_rows", "grid_columns", "tile_rows", "tile_columns", "cell_rows", "cell_columns",
    OPAQUE_ZERO, "images",
)  # fmt: skip
"""Kernel arguments that kernels are not specialised on, so that a new image size compiles no new kernel."""

PART = ("part_row", "part_column", "whole_height", "whole_width")
"""Kernel arguments that say where in a larger output the pixels lie; all None where they are the whole output."""


_MOST_COMPILERS = 8
"""The most threads that compile at a time: each may take hundreds of megabytes."""


class _ThisThread(threading.local):
    """This thread's `listener` of launches, and whether its launches are only compiled (`ahead`)."""

    listener: Callable[[Launch, Any], None] | None = None
    ahead: bool = False


_thread = _ThisThread()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: a `triton.jit` function.
        grid: number of programs along each axis.
        arguments: tensors and numbers by name.
        constants: the kernel's `tl.constexpr` arguments by name.
        options: `num_warps` and `num_stages`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, int]

    def __call__(self) -> None:
        """Launch the kernel on its tensors' device; nothing happens if the grid has no program."""
        if not all(self.grid):
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        # Triton launches on torch's current device, whatever device the tensors are on. Its interpreter calls
        # operations of torch, which a dispatch mode must not see.
        unseen = contextlib.nullcontext() if _thread.listener is None else _disable_current_modes()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(), unseen:
            # Explicit, because Triton 3.10 changes the default.
            settings = {**self.constants, **self.options, "enable_fp_fusion": True}
            if _thread.ahead:
                self.kernel.warmup(grid=self.grid, **self.arguments, **settings)
                return
            compiled = self.kernel[self.grid](**self.arguments, **settings)
        if _thread.listener is not None:
            _thread.listener(self, compiled)

    @property
    def values(self) -> list[Any]:
        """All arguments in the kernel's order, the form that a compiled kernel takes."""
        given = {**self.arguments, **self.constants}
        return [given.get(each.name, each.default) for each in self.kernel.params]


@contextlib.contextmanager
def listening(listener: Callable[[Launch, Any], None]) -> Iterator[None]:
    """Within the block call `listener` with each launch of this thread and the compiled kernel that Triton launched."""
    before, _thread.listener = _thread.listener, listener
    try:
        yield
    finally:
        _thread.listener = before


def compiles_ahead() -> bool:
    """Whether this thread is in a block of `compiled_ahead`."""
    return _thread.ahead


@contextlib.contextmanager
def compiled_ahead() -> Iterator[None]:
    """Within the block this thread's launches are compiled, side by side on the CPU's cores, and not launched.

    A kernel that does not compile raises later, at its launch. Without Triton's `AsyncCompileMode` kernels are compiled
    one after the other.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:  # a private module of Triton, which may disappear
        beside: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        pool = None
    else:
        pool = ThreadPoolExecutor(min(_MOST_COMPILERS, os.cpu_count() or 1))
        beside = AsyncCompileMode(pool)
    _thread.ahead = True
    try:
        with beside:
            yield
            _thread.ahead = False
    finally:
        _thread.ahead = False
        if pool is not None:
            pool.shutdown()


def is_direct(compiled: Any) -> bool:
    """Whether a compiled kernel may be launched directly, without the checks of `JITFunction.run` before the launch.

    A direct launch is the last statement of `JITFunction.run`, the same from triton 3.5 to 3.9. False where another
    implementation runs kernels: the interpreter, or a class that replaces `JITFunction`.
    """
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    return isinstance(compiled, CompiledKernel) and JITFunction.run.__module__ == JITFunction.__module__


def hooked() -> bool:
    """Whether a profiler has hooks on launches, which only a launch through Triton calls."""
    from triton import knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def stream_of(device: int) -> int:
    """Torch's current stream on a device, on which Triton launches."""
    from triton.runtime import driver

    return driver.active.get_current_stream(device)


def strides_of(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """The strides of a tensor's axes as kernel arguments: `name_axis_stride`, the axes separated by spaces."""
    return {f"{name}_{axis}_stride": stride for axis, stride in zip(axes.split(), tensor.stride(), strict=True)}


def part_arguments(part: tuple[int, int, int, int] | None) -> dict[str, int | None]:
    """First row and column of a part of an output and the whole output's size, as kernel arguments."""
    return dict(zip(PART, part or (None,) * 4, strict=True))


def size_arguments(query: Tensor, key: Tensor, tiles: tuple[int, int]) -> dict[str, int]:
    """The sizes of the output (B, H, W, ...), of the key grid (B, h, w, ...) and of the grid of tiles."""
    sizes = (*query.shape[1:3], *key.shape[1:3], *tiles)
    return dict(zip(SIZES, sizes, strict=False))
