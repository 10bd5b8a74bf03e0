"""The tiles of pixels that both directions of the pixel encoder work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from anyup.ops.parallel import cut, map_tiles

Result = TypeVar("Result")

# Pixels of a tile: on a CPU a tile's working set of some 5 MB stays in a shared cache and still amortises handing
# work to the threads; elsewhere a tile bounds the scratch memory.
_TILE_PIXELS = {"cpu": 4096}
_TILE_PIXELS_ELSEWHERE = 2**18


def map_pixels(
    function: Callable[[slice], Result], count: int, device: torch.device, multiple: int = 1
) -> list[Result]:
    """The function's result for each tile of `count` pixels, in order; all but the last are some `multiple` long."""
    most = _TILE_PIXELS.get(device.type, _TILE_PIXELS_ELSEWHERE)
    return map_tiles(function, cut(count, most, device, multiple), device)
