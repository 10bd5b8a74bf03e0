"""How the pixel encoder's kernels are cut: pixels of a program, warps. A `Config` changes speed and never a result."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EncoderConfig:
    """A cut.

    Attributes:
        pixels: that a program takes together, a power of two.
        num_warps, num_stages: Triton's.
    """

    pixels: int
    num_warps: int
    num_stages: int = 1

    def __post_init__(self) -> None:
        for name, least in (("pixels", 16), ("num_warps", 1)):
            number = getattr(self, name)
            if number < least or number & (number - 1):
                raise ValueError(f"{name}: expected a power of two, at least {least}, got {number}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: expected at least 1, got {self.num_stages}")


MOST_CHANNELS = 256
"""A pixel's channels stay in registers."""


def padded(channels: int) -> int:
    """Channels in a tile: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def encoder_configs(channels: int, dtype: torch.dtype) -> list[EncoderConfig]:
    """Cuts, best first; what comes later asks less of a card."""
    dim = padded(channels)
    if dtype == torch.float32:
        first = EncoderConfig(32 if dim > 128 else 64, num_warps=8)
    else:
        first = EncoderConfig(64 if dim > 128 else 128, num_warps=8)
    return [first, EncoderConfig(32, num_warps=8), EncoderConfig(16, num_warps=8)]
