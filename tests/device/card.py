"""What the tests in this folder run on: a real card, or the one that ttsem pretends."""

from __future__ import annotations

import torch


def no_device() -> str | None:
    """Why no kernel can be launched on "cuda" here; None: it can, on a card or as ttsem executes it."""
    return None if _pretended() else no_card()


def no_card() -> str | None:
    """Why this is no real card; None: it is one.

    Memory, capture and timing mean something on a card alone. ttsem answers for `torch.cuda.is_available` and the
    like, so the driver and the allocator are asked as well, for which it has no answers.
    """
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return "Triton interprets kernels in this process (TRITON_INTERPRET)"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA and ROCm" + ("; ttsem pretends" * _pretended())
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    name = type(driver.active).__module__
    if not name.startswith("triton."):
        return f"Triton's driver is a stand-in ({name})"
    before = torch.cuda.memory_allocated()
    held = torch.empty(2**20, dtype=torch.uint8, device="cuda")
    if torch.cuda.memory_allocated() - before < held.numel():
        return "the device's allocator does not count what it hands out"
    return None


def _pretended() -> bool:
    """Whether ttsem executes the launches of this process."""
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return False
    try:
        return type(driver.active).__module__.startswith("ttsem.")
    except RuntimeError:  # Triton finds no driver
        return False
