"""Kernels compiled ahead of time, on a machine without a GPU, exactly as a launch on one would compile them.

What a launch is specialised on is asked of Triton's own launcher: pointers and numbers divisible by 16, numbers equal
to 1, arguments that must not be specialised on. Not under `TRITON_INTERPRET`, where there is nothing to compile.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities without the dot."""


def target_of(name: str | int) -> GPUTarget:
    """The target of a compute capability ("80") or of an AMD architecture ("gfx942"); raises ValueError otherwise."""
    text = str(name)
    if text.isdigit():
        return GPUTarget("cuda", int(text), 32)
    if text.startswith("gfx"):
        return GPUTarget("hip", text, 64 if text.startswith("gfx9") else 32)
    raise ValueError(f"target: expected a compute capability such as 80 or a name such as gfx942, got {name!r}")


@dataclass(frozen=True)
class Compilation:
    """What the launcher hands to the compiler; equal keys share one compiled kernel."""

    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]
    key: str

    def run(self) -> Any:
        """Triton's `CompiledKernel`: `asm` by stage, `metadata.shared`."""
        return triton.compile(self.source, target=self.target, options=self.options)


def compilation_of(launch: Any, target: GPUTarget) -> Compilation:
    """The compilation that a `kernels.launch.Launch` asks for on a target.

    Its tensors may be on "meta": their address counts as divisible by 16, as one from torch's allocator is.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("Triton interprets kernels here: unset TRITON_INTERPRET before triton is imported")
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    # As `Launch.__call__` and Triton's `JITFunction.run` have them.
    given = {**launch.arguments, **launch.constants, **launch.options, "enable_fp_fusion": True, "debug": False}
    bound, specialization, options = binder(**given)
    parsed, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, options)
    text = repr((kernel.cache_key, str(specialization), str(options), str(target)))
    chosen = {**launch.options, "enable_fp_fusion": parsed.enable_fp_fusion}
    return Compilation(
        ASTSource(kernel, signature, constants, attributes), target, chosen, hashlib.sha256(text.encode()).hexdigest()
    )
