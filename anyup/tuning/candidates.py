"""Configs worth timing: those that differ from a given one in a single respect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyup.kernels.config_tables import KernelConfig
    from anyup.kernels.window_attention_config import MostKeys

QUICK_ASPECTS = ("tile", "block", "num_warps", "num_stages")
"""Where most of the gain is to be expected."""

ASPECTS = (
    *QUICK_ASPECTS, "residence", "tail_keys", "group_blocks", "channel_slice", "slices", "kept_programs",
    "load_once", "row_partials", "heads",
)  # fmt: skip
"""What configs differ in, in the order in which they are tried."""

_TILES = {
    "block_keys": ((4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    "block_pixels": ((4, 4), (4, 8), (8, 8)),
}
_BLOCKS = (16, 32, 64, 128)
_VALUES = {
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "channel_slice": (16, 32, 64, 128),
    "slices": (1, 2, 3, 4, 6),
    "kept_programs": (0, 1, 2),
    "row_partials": (1, 2, 4),
    "tail_keys": (0, 16, 32),
    "group_blocks": (1, 2, 4, 8),
}
_OF_RESIDENT_WEIGHTS = ("tail_keys", "group_blocks")
_OF_STREAMED_WEIGHTS = ("slices", "kept_programs")

# Beyond these a program's code or its registers are such that compiling takes minutes and running fails.
_MOST_PRODUCT = 128 * 128
_MOST_RESIDENT = 2**15
_MOST_UNROLLED = 64


def variations(config: KernelConfig, aspect: str, *, heads: int, most_keys: MostKeys) -> Iterator[KernelConfig]:
    """Configs that differ from `config` in one of `ASPECTS`, itself left out; none where its kernel has no such.

    Resident blocks are as many as hold the keys of every tile: `most_keys` tells by a tile's rows and columns.
    """
    from anyup.kernels.config_tables import held

    for changed in _changes(config, aspect, heads):
        try:
            other = replace(config, **changed)
            if getattr(other, "resident_blocks", 0):
                other = replace(other, **held(other, most_keys))
        except ValueError:  # a config checks itself
            continue
        if other != config and _is_small(other, heads):
            yield other


def _changes(config: Any, aspect: str, heads: int) -> Iterator[dict[str, Any]]:
    block = "block_keys" if hasattr(config, "block_keys") else "block_pixels"
    if aspect == "tile":
        yield from ({"rows": rows, "columns": columns} for rows, columns in _TILES[block])
    elif aspect == "block":
        for number in _BLOCKS:
            # A tail is less than a block.
            yield {block: number, **({"tail_keys": 0} if getattr(config, "tail_keys", 0) >= number else {})}
    elif aspect == "residence":
        if hasattr(config, "resident_blocks"):
            other_ways = {name: 0 for name in ("tail_keys", "kept_programs") if hasattr(config, name)}
            yield {**other_ways, "resident_blocks": 0 if config.resident_blocks else 1}
    elif aspect == "load_once":
        yield {"load_once": True}
        yield from ({"load_once": False, "piece": piece} for piece in (16, 32))
    elif aspect == "heads":
        if hasattr(config, "heads"):
            yield from ({"heads": number} for number in range(1, heads + 1) if heads % number == 0)
    elif hasattr(config, aspect) and _matters(config, aspect):
        yield from ({aspect: number} for number in _VALUES[aspect])


def _matters(config: Any, aspect: str) -> bool:
    """Whether an aspect is of the way in which a config keeps its weights."""
    resident = bool(getattr(config, "resident_blocks", 0))
    return aspect not in (_OF_STREAMED_WEIGHTS if resident else _OF_RESIDENT_WEIGHTS)


def _is_small(config: Any, heads: int) -> bool:
    tile, resident = config.rows * config.columns, getattr(config, "resident_blocks", 0)
    block = getattr(config, "block_keys", None) or config.block_pixels
    return (
        tile * max(block, config.channel_slice * getattr(config, "slices", 1)) <= _MOST_PRODUCT
        and tile * block * resident <= _MOST_RESIDENT
        and heads * resident <= _MOST_UNROLLED
    )
