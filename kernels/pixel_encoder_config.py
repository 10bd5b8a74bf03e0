"""How the pixel encoder's kernels are cut: pixels of a program, warps. A `Config` changes speed and never a result."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import Target

MOST_CHANNELS = 128
"""A pixel's channels stay in registers, and a weight in shared memory."""


@dataclass(frozen=True)
class EncoderConfig:
    """A cut.

    Attributes:
        pixels: that a program takes together, a power of two.
        num_warps, num_stages: Triton's.
        piece: channels that a product takes at a time, a power of two.
    """

    pixels: int
    num_warps: int
    num_stages: int = 1
    piece: int = MOST_CHANNELS

    def __post_init__(self) -> None:
        for name, least in (("pixels", 16), ("num_warps", 1), ("piece", 16)):
            number = getattr(self, name)
            if number < least or number & (number - 1):
                raise ValueError(f"{name}: expected a power of two, at least {least}, got {number}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: expected at least 1, got {self.num_stages}")


def padded(channels: int) -> int:
    """Channels in a tile: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def encoder_configs(kind: str, dtype: torch.dtype, target: Target) -> list[EncoderConfig]:
    """Cuts, best first; what comes later asks less of a card. They were chosen by compiling each pass for each target.

    `kind` is "pass", or one of the passes that need more registers, "rotate" and "pool". At 128 channels none spills a
    register on any target, in half precision and in float32, where the products take 32 channels at a time for that;
    but for the pooling in float32 on sm_90, 56 bytes of a thread's, and the rotation on sm_100, 16.
    """
    if target.backend == "hip":
        return [EncoderConfig(16, num_warps=4), EncoderConfig(16, num_warps=8)]
    if dtype.itemsize > 2:
        thin = EncoderConfig(16, num_warps=4, piece=32)
        if (kind, target.arch) == ("pool", 100):  # in pieces of 32 it would take more tensor memory than there is
            return [EncoderConfig(64, num_warps=8, piece=64), thin]
        if target.arch == 100:
            return [EncoderConfig(64, num_warps=4, piece=32), thin]
        # The pooling on sm_90 reads 9 registers back from memory in each turn; four warps would take 1.4 times as long.
        if kind != "pass" and target.arch != 80 and (kind, target.arch) != ("pool", 90):
            return [thin]
        return [EncoderConfig(16, num_warps=2, piece=32), thin]
    least = EncoderConfig(16, num_warps=8)
    narrow = EncoderConfig(32, num_warps=8)
    if kind == "rotate":  # in two pieces, which change places
        narrow = EncoderConfig(32, num_warps=8, piece=64)
    first = narrow
    if kind == "pass":
        # The matrix units of two targets take 64 pixels for each four warps.
        first = EncoderConfig(128 if target.arch in (90, 100) else 64, num_warps=8)
    elif (kind, target.arch) == ("rotate", 100):
        first = EncoderConfig(64, num_warps=8, piece=64)
    return [first, narrow, least] if first != narrow else [narrow, least]
