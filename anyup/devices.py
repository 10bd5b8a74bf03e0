"""The device that a model is put on, or that a command runs on."""

from __future__ import annotations

import torch


def usable_device(device: str | torch.device) -> torch.device:
    """The device; raises ValueError where this torch cannot put a tensor on it."""
    try:
        usable = torch.device(device)
        torch.empty(1, device=usable)
    # A build of torch without CUDA raises AssertionError, a driver that fails raises RuntimeError.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device: expected one that torch can use here, got {device!r} ({reason})") from error
    return usable


def choose_device(name: str | None) -> torch.device:
    """The named device; for None CUDA if available, else the CPU. Raises ValueError where it cannot compute."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = usable_device(name)
    if device.type == "meta":
        raise ValueError("device: 'meta' holds no numbers; choose cpu, cuda or mps")
    return device
