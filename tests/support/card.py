"""What the tests in this folder run on: a real card, or the one that ttsem pretends."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch

_KERNELS_READ = 128

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels compute in."""


def under_ttsem() -> bool:
    """Whether ttsem runs these tests; `pretended` is whether it executes what is launched now."""
    return "ttsem" in sys.modules


def in_dtypes(names: Iterable[str]) -> list[tuple[str, torch.dtype]]:
    """The (name, dtype) to test: on a card each name in each dtype.

    ttsem looks for accesses out of bounds, races and undefined values. These follow from the shape and the config, and
    configs from whether a dtype is half: so under it the first name has all dtypes, and each other one has one, by
    turns. Triton's interpreter has the numbers of each dtype, on more shapes.
    """
    pairs = [(number, name, dtype) for number, name in enumerate(names) for dtype in DTYPES]
    if under_ttsem():
        pairs = [(number, name, dtype) for number, name, dtype in pairs if not number or DTYPES[number % 3] is dtype]
    return [(name, dtype) for _, name, dtype in pairs]


rehearsed = False
"""Whether tests of a real card run where there is none, to see that they run (`rehearsal`)."""


def no_device() -> str | None:
    """Why no kernel can be launched on "cuda" here; None: it can, on a card or as ttsem executes it."""
    return None if pretended() else no_card()


def no_card() -> str | None:
    """Why this is no real card; None: it is one.

    Memory, capture and timing mean something on a card alone. ttsem answers for `torch.cuda.is_available` and the
    like, so the driver and the allocator are asked as well, for which it has no answers.
    """
    from triton import knobs
    from triton.runtime import driver

    if rehearsed:
        return None
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA and ROCm" + ("; ttsem pretends" * pretended())
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if knobs.runtime.interpret:
        return "Triton interprets kernels in this process (TRITON_INTERPRET)"
    name = type(driver.active).__module__
    if not name.startswith("triton."):
        return f"Triton's driver is a stand-in ({name})"
    before = torch.cuda.memory_allocated()
    held = torch.empty(2**20, dtype=torch.uint8, device="cuda")
    if torch.cuda.memory_allocated() - before < held.numel():
        return "the device's allocator does not count what it hands out"
    return None


def description() -> dict[str, str]:
    """The card and the software that results belong to."""
    import triton

    import anyup

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "device": torch.cuda.get_device_name(),
        "compute_capability": capability,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": triton.__version__,
        "anyup": anyup.__version__,
    }


def pretended() -> bool:
    """Whether ttsem executes the launches of this process."""
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return False
    try:
        return type(driver.active).__module__.startswith("ttsem.")
    except RuntimeError:  # Triton finds no driver
        return False


def first_stage_only(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str] | None:
    """A hook of Triton's compiler that leaves out every stage after the one that ttsem executes.

    Four fifths of the time would go into machine code that nothing runs; `benchmarks.modelled_gpu` looks at that.
    """
    if stages is None:  # asked for what tells these entries of the cache from others
        return ("ttir only", "ttir only")
    for name in list(stages):
        if name != "ttir":
            del stages[name]
    stages[backend.binary_ext] = _no_binary
    return None


def as_pretended(patch: Any) -> None:
    """Patch what a card that ttsem pretends has no answer to: memory, captures, calls repeated by Triton's launcher."""
    from triton import knobs
    from ttsem import mlir, sanitize

    know_instructions()
    # Reading a kernel's text again at each launch would take half of the time. What is read is not changed.
    patch.setattr(mlir, "parse", lru_cache(_KERNELS_READ)(mlir.parse))
    # It would print each tensor that is converted, to see whether that says "cuda".
    is_cuda = sanitize._is_cuda
    patch.setattr(sanitize, "_is_cuda", lambda device: not isinstance(device, torch.Tensor) and is_cuda(device))
    patch.setattr(knobs.runtime, "add_stages_inspection_hook", first_stage_only)
    patch.setattr("anyup.budget.free_memory", lambda device: None)
    patch.setattr("anyup.budget.total_memory", lambda device: None)
    patch.setattr("anyup.repetition.DEVICES", ())
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def know_instructions() -> None:
    """Tell ttsem, which knows instructions of PTX by their text, what the pixel encoder's are.

    Approximately, as a card makes them: a hyperbolic tangent to eleven bits, a sine to 2^-20 (PTX ISA).
    """
    import numpy
    from ttsem import ops

    from anyup.kernels import pixel_encoder_passes as passes

    def tanh(half: Any) -> list[Any]:
        half = numpy.asarray(half, numpy.float32)
        bits = numpy.tanh(half.astype(numpy.float64)).astype(numpy.float32).view(numpy.uint32)
        return [half + half * (bits & numpy.uint32(0xFFFF_E000)).view(numpy.float32)]

    def exp2(x: Any) -> list[Any]:
        x = numpy.asarray(x, numpy.float32)
        with numpy.errstate(over="ignore"):
            return [x * (1 / (1 + numpy.exp2(x * numpy.float32(-1.4426950408889634))))]

    def rounded(function: Any) -> Any:
        return lambda x: [numpy.round(function(numpy.asarray(x, numpy.float64)) * 2**20).astype(numpy.float32) / 2**20]

    meanings = {
        passes.SILU_OF_HALF: tanh,
        passes.SILU: exp2,
        passes.SINE: rounded(numpy.sin),
        passes.COSINE: rounded(numpy.cos),
    }
    for text, meaning in meanings.items():
        ops.PTX_FRAGMENTS[ops._norm_asm(text.value)] = (meaning, "div")


def _no_binary(module: Any, metadata: dict[str, Any]) -> bytes:
    metadata.update(name="", shared=0)  # what a compiled kernel is asked for
    return b""
