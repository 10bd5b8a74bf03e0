"""The devices of Triton's kernels: whether a device can run them, and the target that they are compiled for.

The answers are cached for each device, because every call of an operation needs them.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from anyup.installing import pip_install
from anyup.ops.precision import float32_matmul_precision

if TYPE_CHECKING:
    from anyup.kernels.launch import Target

_OLDEST_CAPABILITY = (8, 0)


@cache
def installed() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton runs kernels in its interpreter; Triton must be installed."""
    from triton import knobs

    return knobs.runtime.interpret


def device_reasons(device: torch.device) -> list[str]:
    """Why kernels cannot run on a device; empty: they can."""
    if not installed():
        return [f"triton is not installed (on Linux: {pip_install('triton')})"]
    return list(_device_reasons(device, interprets()))


def dtype_reasons(what: str, dtype: torch.dtype) -> list[str]:
    """Why kernels cannot compute in a dtype; `what` begins the reason, as in "pixels are"."""
    if dtype == torch.float64:
        return [f"{what} float64, the kernels compute in float32"]
    if dtype == torch.bfloat16 and interprets():
        return [f"{what} bfloat16, which Triton's interpreter multiplies wrongly"]
    return []


def discouraged(problem: object) -> list[str]:
    """Why kernels run only if the caller names the backend, although they can run a problem."""
    return ["Triton's interpreter is for tests, and slow"] if interprets() else []


@cache
def _device_reasons(device: torch.device, interpreted: bool) -> tuple[str, ...]:
    if interpreted:
        return () if device.type == "cpu" else (f"Triton's interpreter runs on cpu, not on {device.type}",)
    from triton.runtime import driver

    try:
        active, place = driver.active.get_current_target(), driver.active.get_active_torch_device()
    except RuntimeError:  # Triton counts the active drivers: there is none, or there are several
        return ("Triton finds no GPU that it can drive",)
    if device.type not in ("cuda", place.type):
        return (f"tensors are on {device.type}, Triton's kernels run on {place.type}",)
    if active.backend not in ("cuda", "hip"):
        return (f"Triton's target is {active.backend}, the kernels are for CUDA and ROCm",)
    if active.backend == "cuda":
        capability = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
        if capability < _OLDEST_CAPABILITY:
            have, need = (".".join(map(str, c)) for c in (capability, _OLDEST_CAPABILITY))
            return (f"the card's compute capability is {have}, at least {need} is needed",)
    return ()


def target(device: torch.device) -> Target:
    """The target that kernels are compiled for on a device; the device must be able to run kernels."""
    return _target(device, interprets())


@cache
def _target(device: torch.device, interpreted: bool) -> Target:
    from anyup.kernels.launch import Target

    if interpreted:
        return Target()
    from triton.runtime import driver

    # Triton returns the target of torch's current device.
    with torch.cuda.device(device if device.type == "cuda" else None):
        active = driver.active.get_current_target()
    return Target(active.backend, active.arch)


def multiprocessors(device: torch.device) -> int:
    """A GPU's multiprocessors; 1 in Triton's interpreter, which runs one program at a time; else 132."""
    return _multiprocessors(device, interprets())


@cache
def _multiprocessors(device: torch.device, interpreted: bool) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if interpreted else 132


@cache
def device_name(device: torch.device) -> str:
    """A GPU's name, by which tables of measured configs are looked up; for any other device its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def dot_precision() -> str:
    """Triton's `input_precision` for float32 products that follows torch's settings."""
    if torch.version.hip is not None or interprets():
        return "ieee"
    return "tf32x3" if float32_matmul_precision("cuda") == "highest" else "tf32"
