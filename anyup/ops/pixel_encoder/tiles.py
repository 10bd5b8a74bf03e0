"""The tiles of pixels that both directions of the pixel encoder work on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from anyup.ops.memory import PIXELS_AT_A_TIME
from anyup.ops.parallel import even_slices, map_tiles, on_one_thread
from anyup.ops.pixel_encoder.statistics import Statistics, TileStatistics

Result = TypeVar("Result")

# Pixels of a tile: on a CPU a tile's working set of some 5 MB stays in a shared cache and still amortises handing
# work to the threads.
_TILE_PIXELS = {"cpu": 4096}


def map_pixels(
    function: Callable[[slice], Result], count: int, device: torch.device, multiple: int = 1
) -> list[Result]:
    """The function's result for each tile of `count` pixels, in order; all but the last are some `multiple` long."""
    return map_tiles(function, _tiles(count, device, multiple), device)


def map_groups(function: Callable[[slice], Result], batch: int, count: int, device: torch.device) -> list[Result]:
    """The function's result for each group of images, in order, that have `count` pixels each.

    As many as fill a tile are a group, and groups run side by side. An image that is larger is one, with tiles that do.
    """
    groups = even_slices(batch, max(1, tile_pixels(device) // max(1, count)), device)
    if count > tile_pixels(device):
        return [function(some) for some in groups]
    return map_tiles(function, groups, device)


def measured(
    function: Callable[[slice], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    multiple: int = 1,
) -> Statistics:
    """The statistics of the pixels, in that dtype, that the function returns for each tile; `shape` is all tiles'.

    Pixels are (n, D), or (k, n, D) of several images: each image's channels are then channels of their own, k D.
    """
    count, dim = shape[-2:]
    tiles = _tiles(count, device, multiple)
    found = TileStatistics(len(tiles), math.prod(shape[:-2]) * dim, dtype, device)
    map_tiles(lambda index: found.take(index, function(tiles[index])), range(len(tiles)), device)
    with on_one_thread():
        return found.statistics()


def tile_pixels(device: torch.device) -> int:
    """The most pixels of a tile."""
    return _TILE_PIXELS.get(device.type, PIXELS_AT_A_TIME)


def scratch_bytes(pixels: int, pixel_bytes: int, device_type: str, workers: int) -> int:
    """Bytes of one map, of so many for a pixel, of the tiles that the workers hold at a time."""
    tiles = max(1, -(-pixels // _TILE_PIXELS.get(device_type, PIXELS_AT_A_TIME)))  # of about one size
    return workers * -(-pixels // tiles) * pixel_bytes


def _tiles(count: int, device: torch.device, multiple: int) -> list[slice]:
    return even_slices(count, tile_pixels(device), device, multiple)
