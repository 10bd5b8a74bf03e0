"""How a kernel is cut: sizes of tiles and blocks, warps, stages. A rule that always works.

A `Config` changes speed and never a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MostKeys = Callable[[int, int], int]
"""Rows and columns of a tile to the most keys that one such tile sees."""


@dataclass(frozen=True)
class ForwardConfig:
    """A cut of the forward pass.

    Attributes:
        rows, columns: pixels of a tile.
        block_keys: keys worked on at once.
        resident_blocks: blocks whose weights stay in registers, the most that a tile sees; 0: any number, streamed.
        channel_slice: channels multiplied at once.
        slices: channel slices alive at once where keys are streamed.
        num_warps, num_stages: Triton's.
    """

    rows: int
    columns: int
    block_keys: int
    resident_blocks: int
    channel_slice: int
    slices: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "block_keys", "channel_slice", "num_warps"):
            number = getattr(self, name)
            if number < 1 or number & (number - 1):
                raise ValueError(f"{name}: expected a power of two, got {number}")
        # The smallest tile that the matrix units take.
        for name, number in (("rows * columns", self.rows * self.columns), ("block_keys", self.block_keys)):
            if number < 16:
                raise ValueError(f"{name}: expected at least 16, got {number}")
        if self.channel_slice < 16:
            raise ValueError(f"channel_slice: expected at least 16, got {self.channel_slice}")
        if self.resident_blocks < 0 or self.slices < 1 or self.num_stages < 1:
            raise ValueError(f"resident_blocks, slices, num_stages: expected 0, 1, 1 at least, got {self}")


_RESIDENT_KEYS = 256


def forward_configs(most_keys: MostKeys, *, half: bool) -> list[ForwardConfig]:
    """Cuts of the forward pass, best first; what comes later asks less of a card.

    `half` says that all operands of products are of two bytes.
    """
    if not half:
        keys = most_keys(4, 8)
        blocks = -(-keys // 16)
        few = ForwardConfig(4, 8, 16, blocks if blocks <= 8 else 0, 32, 1, num_warps=4, num_stages=1)
        return [few, ForwardConfig(4, 4, 16, 0, 16, 1, num_warps=4, num_stages=1)]
    # A larger tile asks for fewer bytes, a smaller one computes fewer logits that no pixel needs.
    small, large = (-(-most_keys(*tile) // 32) for tile in ((8, 8), (8, 16)))
    if 32 * small > _RESIDENT_KEYS:
        best = ForwardConfig(8, 8, 32, 0, 64, 4, num_warps=8, num_stages=2)
    elif large <= small and 32 * large <= _RESIDENT_KEYS:
        best = ForwardConfig(8, 16, 32, large, 64, 1, num_warps=8, num_stages=2)
    else:
        best = ForwardConfig(8, 8, 32, small, 64, 1, num_warps=4, num_stages=2)
    return [best, ForwardConfig(4, 8, 16, 0, 32, 1, num_warps=4, num_stages=1)]


@dataclass(frozen=True)
class BackwardQueryConfig:
    """A cut of the backward pass of the queries; attributes as of `ForwardConfig`."""

    rows: int
    columns: int
    block_keys: int
    resident_blocks: int
    channel_slice: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BackwardGridConfig:
    """A cut of the backward pass of keys or values.

    Attributes:
        rows, columns: keys of a tile.
        block_pixels: pixels worked on at once.
        channel_slice: channels multiplied at once.
        slices: channel slices that a program adds up, of values.
        parts: programs that share the pixels of a tile.
        num_warps, num_stages: Triton's.
    """

    rows: int
    columns: int
    block_pixels: int
    channel_slice: int
    slices: int
    parts: int
    num_warps: int
    num_stages: int


def backward_query_configs(most_keys: MostKeys, *, half: bool) -> list[BackwardQueryConfig]:
    """Cuts of the backward pass of the queries, best first."""
    if not half:
        return [BackwardQueryConfig(4, 8, 16, 0, 16, num_warps=4, num_stages=1)]
    blocks = -(-most_keys(8, 8) // 32)
    few = blocks if blocks <= 8 else 0
    best = BackwardQueryConfig(8, 8, 32, few, 64, num_warps=4 if 0 < blocks <= 2 else 8, num_stages=2)
    return [best, BackwardQueryConfig(4, 8, 16, 0, 32, num_warps=4, num_stages=1)]


# Programs enough for the cards of today; a fixed number, or the sums would depend on the card.
_GRID_PROGRAMS = 512
_MOST_PARTS = 16
# A part of fewer would not be worth its partial sum.
_LEAST_PIXELS_OF_A_PART = 2048


def backward_grid_configs(pixels: int, keys: int, channels: int, *, half: bool) -> list[BackwardGridConfig]:
    """Cuts of the backward pass of the keys and of the values, best first.

    `pixels` are those of one image, `keys` those of all images.
    """
    parts = min(_MOST_PARTS, _GRID_PROGRAMS * 16 // max(keys, 1), pixels // _LEAST_PIXELS_OF_A_PART)
    parts = max(1, parts)
    slices = 4 if channels > 128 else 2
    if not half:
        return [BackwardGridConfig(4, 4, 32, 32, slices, parts, num_warps=4, num_stages=1)]
    best = BackwardGridConfig(4, 4, 64, 64, slices, parts, num_warps=4, num_stages=2)
    return [best, BackwardGridConfig(4, 4, 32, 32, 2, parts, num_warps=4, num_stages=1)]
