"""Configs of the pixel encoder: an `EncoderConfig` changes speed and, by the order of its sums, the last bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .launch import Target

MOST_CHANNELS = 128
"""A pixel's channels stay in registers, and a weight in shared memory."""


@dataclass(frozen=True)
class EncoderConfig:
    """A config.

    Attributes:
        pixels: that a program takes together, a power of two.
        num_warps, num_stages: Triton's.
        piece: channels that a product of float32 takes at a time, and each product of "half"; a power of two.
        resident: whether weights of half precision are loaded once, and not for each `pixels`.
        keeps: whether x of half precision, which was projected, waits for the residual in registers; else it is
            projected again. The map that a "pool" of a pair encodes has its weights loaded for each tile then.
        blocks: programs that a multiprocessor runs at a time.
        joins: whether a program of "half" holds its part of the weight's gradient.
    """

    pixels: int
    num_warps: int
    num_stages: int = 1
    piece: int = MOST_CHANNELS
    resident: bool = False
    keeps: bool = False
    blocks: int = 1
    joins: bool = False

    def __post_init__(self) -> None:
        for name, least in (("pixels", 16), ("num_warps", 1), ("piece", 16)):
            number = getattr(self, name)
            if number < least or number & (number - 1):
                raise ValueError(f"{name}: expected a power of two, at least {least}, got {number}")
        for name in ("num_stages", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def programs(self, turns: int, batch: int, multiprocessors: int) -> int:
        """Programs of each of so many images, whose work is so many turns: as many as run at a time."""
        return max(1, min(turns, self.blocks * multiprocessors // max(batch, 1)))


def silu_form(dtype: torch.dtype, target: Target) -> str:
    """How silu is computed, as the kernels' FORM.

    "tanh": of bfloat16 on CUDA, in two instructions, to 2^-11 of the tanh (PTX ISA, tanh.approx), an eighth of what
    the storage rounds off. "exp2": of float16 on CUDA, which stores three more bits. "plain": elsewhere.
    """
    if target.backend != "cuda" or dtype.itemsize > 2:
        return "plain"
    return "tanh" if dtype == torch.bfloat16 else "exp2"


def kind_of(halves: int, *, measures: bool, rotates: bool, keys: bool = False, pair: bool = False) -> str:
    """The kind of a pass for `encoder_configs`; the first pass of two encoders is a "pair"."""
    if halves < 2:
        return "pair" if pair and not halves else "pass"
    if keys:
        return "keys"
    return "rotate" if rotates else "block" if measures else "apply"


def encoder_configs(kind: str, dtype: torch.dtype, target: Target, precision: str = "") -> list[EncoderConfig]:
    """Configs, best first; what comes later asks less of a card. Chosen by compiling each pass for each target.

    `kind` is that of a pass, "pool", "pair's pool", "moments", or "half" or "thin", of the backward pass; `precision`
    that of products of float32. At 128 channels a pass in half precision spills 16 bytes at most. In float32 a turn of
    some 5000 instructions reads few numbers back of what is spilled. As "float16x3" it is up to 336 bytes of a thread's
    with 64 pixels (the rotation 432 on sm_80) and 24 with 32, which take a quarter more instructions. As "tf32x3",
    where products take 32 channels at a time, passes with two warps spill up to 120 (128 on sm_120); four warps spill
    nothing, but for the pooling (16 bytes on sm_86 and sm_89, 48 on sm_120), and take a fifth more instructions.
    """
    if kind == "moments":
        return [EncoderConfig(1024, num_warps=4, blocks=2)]
    if kind == "thin":
        return [EncoderConfig(16, num_warps=4, num_stages=2, blocks=4), EncoderConfig(16, num_warps=4)]
    if kind == "half":
        pixels, warps, piece = (64, 8, 32) if dtype.itemsize == 2 else (32, 8, 16)
        if dtype.itemsize == 2 and target.arch in (80, 86, 89):  # with more pixels they spill
            pixels, warps = 32, 4 if target.arch == 80 else 8
        stages = 1 if target.backend == "hip" and dtype.itemsize > 2 else 2
        apart = EncoderConfig(pixels, num_warps=warps, num_stages=stages, piece=piece, blocks=2)
        least = EncoderConfig(16, num_warps=4, piece=16)
        if dtype.itemsize == 2 and target.arch == 90:
            return [EncoderConfig(32, num_warps=8, num_stages=2, joins=True), apart, least]
        return [apart, least]
    if target.backend == "hip":
        return [EncoderConfig(16, num_warps=4, keeps=True, blocks=2), EncoderConfig(16, num_warps=8, keeps=True)]
    if precision == "float16x3":
        return _float16x3_configs(target)
    if dtype.itemsize > 2:
        return _float32_configs(kind, target)
    # One program alone on a multiprocessor would load, multiply and activate one after the other: there are two, where
    # registers and shared memory allow it. Three weights and the pixels are 112 KB.
    least = EncoderConfig(16, num_warps=4)
    streamed = EncoderConfig(64, num_warps=4, keeps=True, blocks=2)
    if target.arch in (90, 100):
        warps = 8 if target.arch == 100 and kind in ("pair", "block", "rotate", "pool", "pair's pool") else 4
        return [EncoderConfig(64, num_warps=warps, resident=True, blocks=2), streamed, least]
    # With more pixels a thread these spill.
    if (kind, dtype, target.arch) == ("pass", torch.float16, 120) or (kind == "block" and target.arch in (86, 120)):
        return [EncoderConfig(32, num_warps=4, keeps=True, blocks=2), least]
    if (kind, dtype) == ("pair's pool", torch.float16) and target.arch in (86, 89, 120):
        return [EncoderConfig(64, num_warps=8, keeps=True, blocks=2), least]
    if kind == "pool" and target.arch not in (80, 89):
        return [EncoderConfig(32, num_warps=4, blocks=2), least]
    if target.arch == 80 and kind in ("pass", "pair", "pool", "pair's pool"):
        keeps = kind == "pair's pool"
        return [EncoderConfig(64, num_warps=4, resident=True, keeps=keeps, blocks=2), streamed, least]
    return [streamed, least]


def _float16x3_configs(target: Target) -> list[EncoderConfig]:
    pixels = 64 if target.arch in (80, 90) else 32  # where the matrix units bind, with room for the registers
    return [EncoderConfig(size, num_warps=4, piece=64, blocks=2) for size in (pixels, 16)]


def _float32_configs(kind: str, target: Target) -> list[EncoderConfig]:
    thin = EncoderConfig(16, num_warps=4, piece=32, blocks=2)
    if kind == "keys":
        return [thin]
    pools = kind in ("pool", "pair's pool")
    if pools and target.arch == 100:  # in pieces of 32 it would take more tensor memory than there is
        return [EncoderConfig(64, num_warps=8, piece=64), thin]
    if target.arch == 100:
        return [EncoderConfig(64, num_warps=4, piece=32, blocks=2), thin]
    if (kind == "rotate" and target.arch != 80) or (pools and target.arch not in (80, 90)):
        return [thin]
    return [EncoderConfig(16, num_warps=2, piece=32, blocks=4), thin]
