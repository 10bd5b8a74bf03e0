"""How the pixel encoder's kernels are cut: pixels of a program, warps. A `Config` changes speed and never a result."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import Target


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


MOST_CHANNELS = 128
"""A pixel's channels stay in registers, and a weight in shared memory."""


def padded(channels: int) -> int:
    """Channels in a tile: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def encoder_configs(kind: str, dtype: torch.dtype, target: Target) -> list[EncoderConfig]:
    """Cuts, best first; what comes later asks less of a card. They were chosen by compiling each pass for each target.

    `kind` is "pass", or one of the passes that need more registers, "rotate" and "pool". In half precision at 128
    channels none spills a register on any target. In float32 on NVIDIA's the last pass and the pooling spill up to 256
    bytes, and the pooling's 136 KB of shared memory are more than sm_86, 89 and 120 have.
    """
    least = EncoderConfig(16, num_warps=8)
    if target.backend == "hip":
        return [EncoderConfig(16, num_warps=4), least]
    if dtype.itemsize > 2:
        return [least]
    narrow = EncoderConfig(32, num_warps=8)
    if target.arch in (90, 100):  # whose matrix units take 64 pixels for each four warps
        first = EncoderConfig(128, num_warps=8)
        if kind != "pass":
            first = narrow if target.arch == 90 else EncoderConfig(64, num_warps=8)
    else:
        first = EncoderConfig(64, num_warps=8) if kind == "pass" else narrow
    return [first, narrow, least] if first != narrow else [narrow, least]
