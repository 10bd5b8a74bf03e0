"""An upsampled map tile by tile, for outputs that nobody wants, or has the memory, to hold whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyup.banded import BandedImage, band_rows, output_rows
from anyup.image_context import ImageContext
from anyup.ops.precision import FLOATING
from anyup.ops.window_attention import explain_backends, window_attention
from anyup.problem import check_size
from anyup.window import Part

if TYPE_CHECKING:
    from anyup.model import AnyUp

BAND_PIXELS = 2**16
"""Pixels worked on at a time: some 30 MB for each map of 128 float32 channels."""

Tile = tuple[slice, slice, Tensor]
"""Rows and columns of the output, and its values there (B, C, rows, columns)."""


def stream(
    model: AnyUp,
    image: Tensor | ImageContext,
    features: Tensor,
    output_size: Sequence[int] | None,
    *,
    tile: int | Sequence[int] | None,
    region: Sequence[int] | None,
    values: Tensor | None,
    dtype: torch.dtype | None,
) -> Iterator[Tile]:
    """Check the arguments of `AnyUp.stream` now; compute as tiles are taken."""
    size = model.check(image, features, output_size, values=values)
    top, left, height, width = check_region(region, size)
    carried = features if values is None else values
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype: expected a floating-point dtype of 16, 32 or 64 bits, got {dtype!r}")
    tile_size = _check_tile(tile, (height, width))
    given = image.image if isinstance(image, ImageContext) else image
    tensors = (given, features, carried, *model.parameters())
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("stream does not differentiate: call it under torch.no_grad() or torch.inference_mode()")
    if not isinstance(image, ImageContext):
        asked = model._backends["pixel_encoder"]
        if asked is not None and "torch" not in ([asked] if isinstance(asked, str) else asked):
            raise NotImplementedError(f"backend: bands of pixels are encoded by 'torch' alone, got {asked!r}")
    source = _Source(model, image, size)
    h, w = features.shape[2:]
    heads = model.config["num_heads"]
    stand_in = torch.empty((), dtype=source.dtype, device=given.device)
    head_dim = model.config["qk_dim"] // heads
    explanation = explain_backends(
        stand_in.expand(1, 1, 1, heads, head_dim),
        stand_in.expand(1, h, w, heads, head_dim),
        carried[:1].permute(0, 2, 3, 1) if len(carried) else carried.new_empty(1, h, w, carried.shape[1]),
        window=model.window,
        backend=model._backends["window_attention"],
        part=Part(0, 0, *size),
    )
    if explanation.chosen is None:
        raise NotImplementedError(f"no backend can run this:\n{explanation}")
    parts = [
        (slice(row, min(row + rows, top + height)), slice(column, min(column + columns, left + width)))
        for rows, columns in (tile_size or (source.rows(height), width),)
        for row in range(top, top + height, rows)
        for column in range(left, left + width, columns)
    ]
    return _tiles(source, features, carried, parts, dtype or carried.dtype)


@torch.no_grad()  # of each step: what the caller does between two tiles is his own
def _tiles(
    source: _Source, features: Tensor, carried: Tensor, parts: Sequence[tuple[slice, slice]], dtype: torch.dtype
) -> Iterator[Tile]:
    keys = source.keys(features) if len(features) else features
    values = carried.permute(0, 2, 3, 1).contiguous()
    for rows, columns in parts:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        step = source.rows(height)
        bands = [slice(row, min(row + step, rows.stop)) for row in range(rows.start, rows.stop, step)]
        if len(bands) == 1 and len(values) == 1:
            out = source.attend(0, rows, columns, keys, values).to(dtype)
        else:
            out = values.new_empty((len(values), height, width, values.shape[3]), dtype=dtype)
            for band in bands:
                within = slice(band.start - rows.start, band.stop - rows.start)
                for index in range(len(values)):
                    out[index, within] = source.attend(index, band, columns, keys, values)[0]
        yield rows, columns, out.permute(0, 3, 1, 2)
        del out  # before the next one is made


class _Source:
    """The queries and keys of a batch: from a context, or made from the images band by band when first asked for."""

    def __init__(self, model: AnyUp, image: Tensor | ImageContext, size: tuple[int, int]) -> None:
        self._model, self._image, self._size = model, image, size
        self.dtype = model._compute_dtype((image.image if isinstance(image, ImageContext) else image).device)
        self._banded: list[BandedImage] = []

    def rows(self, height: int) -> int:
        """Output rows worked on at a time, of at most `height`."""
        if isinstance(self._image, ImageContext):
            rows = band_rows(self._size[1], BAND_PIXELS)
        else:
            rows = output_rows((self._image.shape[2], self._image.shape[3]), self._size, BAND_PIXELS)
        return min(rows, height)

    def keys(self, features: Tensor) -> Tensor:
        """(B, h, w, heads, head_dim)."""
        grid = (features.shape[2], features.shape[3])
        if isinstance(self._image, ImageContext):
            return self._model._query_and_key(self._image, features, self._size)[1]
        self._banded = [BandedImage(self._model, one, self._size, self.dtype, BAND_PIXELS) for one in self._image]
        keys = [one.image_keys(grid) for one in self._banded]
        return self._model._keys(torch.cat(keys), features).to(self.dtype)

    def attend(self, index: int, rows: slice, columns: slice, keys: Tensor, values: Tensor) -> Tensor:
        """(1, rows, columns, C) of one image."""
        if isinstance(self._image, ImageContext):
            queries = self._image.queries[index : index + 1, rows, columns]
        else:
            queries = self._banded[index].queries(rows, columns)
        one = slice(index, index + 1)
        return window_attention(
            queries,
            keys[one],
            values[one],
            window=self._model.window,
            backend=self._model._backends["window_attention"],
            part=Part(rows.start, columns.start, *self._size),
        )


def check_region(region: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width); raises a ValueError or TypeError unless it lies inside the output. None: all."""
    if region is None:
        return 0, 0, *size
    if not isinstance(region, Sequence) or len(region) != 4:
        raise ValueError(f"region: expected (top, left, height, width), got {region!r}")
    for number in region:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"region: expected integers, got {number!r}")
    top, left, height, width = region
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(
            f"region: expected (top, left, height, width) inside the output of {size}, got {tuple(region)}"
        )
    return top, left, height, width


def _check_tile(tile: Any, region: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of a tile; a number is rows of the region's width."""
    if tile is None:
        return None
    if isinstance(tile, int):
        tile = (tile, region[1])
    return check_size("tile", tile)
