"""Trying the configs of a kernel until the device takes one.

A backend that launches a kernel with several configs calls `run_first`: a config that does not compile or does not
launch gives way to the next one. When none is left, a `BackendFailure` tells the dispatcher to go on to the next
backend.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from anyup.ops.dispatch import BackendFailure
from anyup.ops.refusals import remember

Config = TypeVar("Config", bound=Hashable)
Result = TypeVar("Result")

# What the driver says where no kernel runs any more in this process, whatever its config, or where memory or a capture
# is at fault and not the kernel (CUDA driver API, CUresult; HIP uses the same words).
_NO_REFUSAL = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "launch timed out",
    "context is destroyed",
    "assert triggered",
    "hardware stack error",
    "global/shared address space",
    "invalid program counter",
    "launch failure",
    "tensor memory not completely freed",
    "ECC error",
    "hardware error",
    "terminated by the server",
    "external entity",
    "unknown error",
    "out of memory",
    "capturing",
)

_refused: dict[tuple[Hashable, Hashable], str] = {}


def run_first(run: Callable[[Config], Result], configs: Sequence[Config], *, kernel: Hashable = None) -> Result:
    """The result with the first config that the device takes; raises BackendFailure where it takes none.

    Args:
        run: compiles and launches with a config.
        configs: configs, best first.
        kernel: the kernel's name, its device and all else that it is compiled for. Later calls with an equal `kernel`
            skip a config that was refused. None: every call tries every config.
    """
    failures: list[str] = []
    cause: Exception | None = None
    for config in configs:
        known = None if kernel is None else _refused.get((kernel, config))
        if known is None:
            try:
                return run(config)
            except Exception as error:
                if not is_refusal(error):
                    raise
                known, cause = summary_of(error), error
            remember(f"{_in_words(kernel)}, config {config}: {known}")
            if kernel is not None:
                _refused[kernel, config] = known
        failures.append(known)
    raise BackendFailure("; ".join(failures)) from cause


def is_refusal(error: Exception) -> bool:
    """Whether an error means that this kernel cannot be compiled or launched here, while other kernels still may.

    Triton raises its own classes. It raises RuntimeError for failures of its passes, of LLVM and of the driver, and
    OSError or SubprocessError where it finds no C compiler or cannot write its cache.
    """
    if isinstance(error, (OSError, subprocess.SubprocessError)) or _is_of_triton(error, "TritonError"):
        return True
    # Torch's errors for a lack of memory and for a lost card are subclasses of RuntimeError, which do not count.
    return type(error) is RuntimeError and not any(words in str(error) for words in _NO_REFUSAL)


def summary_of(error: Exception) -> str:
    """An error in one line: the last line of a CompilationError, which begins with the source, else the first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if _is_of_triton(error, 'CompilationError') else 0]}"


def _in_words(kernel: Hashable) -> str:
    parts = kernel if isinstance(kernel, tuple) else ("of no name" if kernel is None else kernel,)
    return "kernel " + " ".join(str(part).removeprefix("torch.") for part in parts)


def _is_of_triton(error: Exception, name: str) -> bool:
    """Whether an error is an instance of a class of Triton, without an import of Triton."""
    return any(kind.__name__ == name and kind.__module__.startswith("triton.") for kind in type(error).__mro__)
