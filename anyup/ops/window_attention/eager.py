"""Window attention in plain PyTorch: exact, and the cost is pixels times window.

The output is cut into rectangles of pixels whose windows nearly coincide (`segments`). A rectangle's keys are the
small union of its windows, so it needs one matrix product per head, a softmax, the mean over the heads, and one
product with the values. A bias, the sum of a row bias and a column bias, hides the few keys that only some
pixels of the rectangle see. No query-by-key mask, no upsampled keys or values, no copy of the output per head.
Rectangles of one shape form a batch that stays in the cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from anyup.ops.linear import grouped_product
from anyup.ops.memory import empty
from anyup.ops.parallel import map_tiles
from anyup.ops.precision import accumulator_dtype, product_dtype, working_dtype
from anyup.ops.tables import kept_for_graphs
from anyup.ops.window_attention.gathered_points import points, points_backward
from anyup.ops.window_attention.segments import Segments, axis_segments
from anyup.window import Part, Window, axis_bounds

__all__ = ["backward", "forward", "points", "points_backward", "scratch_bytes", "unsupported"]

# Values in the largest buffer of a batch: on a CPU what stays in its caches, elsewhere enough work for a launch.
_BUDGET = {"cpu": 2**19}
_BUDGET_ELSEWHERE = 2**25

_LONGEST_SEGMENT = 32
# On a CPU a rectangle is as high, but narrower, so that it has fewer keys that only some of its pixels see.
_LONGEST_COLUMNS = 16
# The gradients of keys and values sum over a rectangle's pixels in float32, and over rectangles in float64.
_LONGEST_SEGMENT_BACKWARD = 16

# The most logits, and the fewest rows, of a rectangle on a CPU where windows are large. With fewer, copying the keys
# would outweigh the products.
_MOST_LOGITS = 2**21
_FEWEST_ROWS = 8

# Keys beyond this may overflow in a product with a query.
_SAFE_KEY = 2.0**60


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported: this is the backend of last resort."""
    return []


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window,
    scale: float,
    max_queries: int | None = None,
    save_lse: bool = False,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (B, H, W, C) in the value's dtype, and the log-sum-exp (B, H, W, heads) of the scaled logits.

    The queries may be a part of a map.
    """
    batch, height, width, heads, _ = query.shape
    channels = value.shape[3]
    out = empty((batch, height, width, channels), value)
    lse = query.new_empty((batch, height, width, heads) if save_lse else (0,), dtype=working_dtype(query.dtype))
    scratch = _Scratch()
    for image in range(batch):
        keys, values = _grids(key[image], value[image])
        values = values.to(product_dtype(value.dtype, value.device))

        def attend(tiles: _Batch, image: int = image, keys: Tensor = keys, values: Tensor = values) -> None:
            logits = tiles.logits(query[image], keys, scale, scratch)
            if save_lse:
                tiles.put_pixels(lse[image], torch.logsumexp(logits, dim=-1).transpose(0, 1))
            first, *others = _softmax(logits).unbind(2)
            mean = scratch.take("mean", (tiles.pixels, tiles.count, tiles.keys), logits)
            torch.mul(first, 1 / heads, out=mean)
            for weights in others:  # several times as fast as `torch.mean`
                mean.add_(weights, alpha=1 / heads)
            mean, near = mean.to(values.dtype), tiles.take_keys(values)
            tiles.put_pixels(out[image], grouped_product(mean, near, partial(scratch.take, "update")).transpose(0, 1))

        map_tiles(attend, list(_batches(window, query, keys, channels, max_queries, part=part)), query.device)
    return out, lse


@lru_cache(maxsize=256)
def scratch_bytes(
    window: Window,
    rows: int,
    output_size: tuple[int, int],
    grid: tuple[int, int],
    shape: tuple[int, int, int],
    device_type: str,
) -> int:
    """The scratch memory of a thread, in bytes, for `rows` rows of an output; an estimate from above.

    `shape` is (heads, width of queries, channels of the values).
    """
    heads, dim, channels = shape
    budget = _BUDGET.get(device_type, _BUDGET_ELSEWHERE)
    most = 0
    longest = _longest_sides(window, output_size, grid, heads, _LONGEST_SEGMENT, device_type)
    for row in axis_segments(window, output_size[0], grid[0], min(rows, longest[0])):
        for column in axis_segments(window, output_size[1], grid[1], longest[1]):
            pixels, keys = row.length * column.length, row.keys * column.keys
            count = min(max(1, budget // (pixels * max(heads * keys, channels))), column.count)
            biased = row.bias is not None or column.bias is not None
            # Logits, which become weights, their mean, queries, and the result.
            kept = (heads + 1) * pixels * keys + (dim + channels) * pixels
            passing = max(biased * pixels * keys + 2 * dim * keys, channels * keys)
            most = max(most, count * (kept + passing))
    return 4 * most


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, *, window: Window, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; the weights are recomputed.

    A rectangle holds all keys of its pixels, so its softmax is exact and the saved `lse` is not needed: the
    exponential of a logit minus a rounded log-sum-exp is less accurate.

    With n heads, dP_a = dP / n and dS_a = P_a (dP_a - sum_j P_aj dP_aj). The sum is each head's own; it is not
    <dO, O>, because O mixes the heads.
    """
    batch, _, _, heads, _ = query.shape
    channels = value.shape[3]
    grad_query, grad_key, grad_value = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
    )
    scratch = _Scratch()
    for image in range(batch):
        keys, values = _grids(key[image], value[image])
        # Each is a sum over all pixels that see a key.
        sum_keys, sum_values = (torch.zeros_like(t, dtype=accumulator_dtype(t.device)) for t in (keys, values))
        for tiles in _batches(window, query, keys, channels, longest=_LONGEST_SEGMENT_BACKWARD):
            weights = torch.softmax(tiles.logits(query[image], keys, scale, scratch), dim=-1)
            weights = weights.permute(1, 2, 0, 3)  # (count, heads, pixels, keys)
            outer = tiles.pixels_of(grad[image]).flatten(1, 2).to(values.dtype)  # (count, pixels, C)
            tiles.add_keys(sum_values, weights.mean(dim=1).to(values.dtype).transpose(1, 2) @ outer)
            inner = (outer @ tiles.take_keys(values).transpose(1, 2)).to(keys.dtype)[:, None] / heads
            # dS (count, heads, pixels, keys)
            inner = inner.expand_as(weights)
            inner = torch.ops.aten._softmax_backward_data(inner, weights.contiguous(), -1, weights.dtype)
            queries = tiles.pixels_of(query[image]).flatten(1, 2).to(keys.dtype).transpose(1, 2)
            tiles.add_keys(sum_keys, (inner.transpose(2, 3) @ queries).transpose(1, 2))
            update = (inner @ tiles.take_keys(keys).transpose(1, 2)) * scale  # (count, heads, pixels, d)
            tiles.put_pixels(grad_query[image], update.transpose(1, 2))
        grad_key[image] = sum_keys.mul_(scale).transpose(0, 1)
        grad_value[image] = sum_values.transpose(0, 1)
    return grad_query, grad_key, grad_value


@dataclass
class _Batch:
    """Rectangles of pixels, side by side in one band of rows, and the keys that they see.

    Grids are (w, h, ...): a rectangle's keys lie column by column.
    """

    rows: Segments  # one segment
    columns: Segments
    finite: bool

    @property
    def count(self) -> int:
        return self.columns.count

    @property
    def pixels(self) -> int:
        return self.rows.length * self.columns.length

    @property
    def keys(self) -> int:
        return self.rows.keys * self.columns.keys

    def pixels_of(self, pixel_map: Tensor) -> Tensor:
        """The pixels of each rectangle: (H, W, ...) -> (count, rows, columns, ...)."""
        band = pixel_map[self.rows.starts[0] : self.rows.starts[0] + self.rows.length]
        columns = self.columns.queries()
        band = band[:, columns] if isinstance(columns, slice) else band.index_select(1, columns)
        return band.unflatten(1, (self.count, self.columns.length)).transpose(0, 1)

    def put_pixels(self, pixel_map: Tensor, update: Tensor) -> None:
        """Write (count, pixels, ...) into these pixels of (H, W, ...)."""
        band = pixel_map[self.rows.starts[0] : self.rows.starts[0] + self.rows.length]
        columns = self.columns.queries()
        update = update.unflatten(1, (self.rows.length, self.columns.length)).transpose(0, 1)
        if isinstance(columns, slice):
            band[:, columns].unflatten(1, (self.count, self.columns.length)).copy_(update)
        else:  # a few segments at the borders
            for index, start in enumerate(self.columns.starts):
                band[:, start : start + self.columns.length] = update[:, index]

    def take_keys(self, grid: Tensor) -> Tensor:
        """(w, h, ...) -> (count, keys, ...), a copy."""
        band = grid[:, self.rows.key_starts[0] : self.rows.key_starts[0] + self.rows.keys]
        near = band.index_select(0, self.columns.key_positions.flatten())
        return near.view(self.count, self.keys, *grid.shape[2:])

    def add_keys(self, grid: Tensor, update: Tensor) -> None:
        """Add (count, keys, ...) to these keys of (w, h, ...); rectangles may share keys."""
        band = grid[:, self.rows.key_starts[0] : self.rows.key_starts[0] + self.rows.keys]
        update = update.reshape(-1, *band.shape[1:]).to(band.dtype)
        band.index_add_(0, self.columns.key_positions.flatten(), update)

    def logits(self, query: Tensor, keys: Tensor, scale: float, scratch: _Scratch) -> Tensor:
        """Scaled logits (pixels, count, heads, keys), -inf where a pixel does not see a key."""
        pixels = self.pixels_of(query).permute(1, 2, 0, 3, 4)  # (rows, columns, count, heads, d)
        queries = scratch.take("queries", pixels.shape, keys).copy_(pixels).flatten(0, 1)
        near = self.take_keys(keys).permute(0, 2, 3, 1).contiguous()  # (count, heads, d, keys)
        logits = grouped_product(queries.flatten(1, 2), near.flatten(0, 1), partial(scratch.take, "logits"))
        logits = logits.unflatten(1, (self.count, -1))
        bias = self._bias()
        if bias is None:
            return logits.mul_(scale)
        if self.finite:
            return torch.add(bias, logits, alpha=scale, out=logits)
        # Fill, not add: NaN - inf is NaN, so that a NaN in a key would reach pixels that do not see the key.
        return logits.mul_(scale).masked_fill_(bias < 0, -math.inf)

    def _bias(self) -> Tensor | None:
        """The sum of the row and the column bias, (pixels, count, 1, keys)."""
        if self.rows.bias is None and self.columns.bias is None:
            return None
        rows = 0.0 if self.rows.bias is None else self.rows.bias[0, :, None, None, None, :]
        columns = 0.0 if self.columns.bias is None else self.columns.bias.transpose(0, 1)[:, :, :, None]
        shape = (self.rows.length, self.columns.length, self.count, self.columns.keys, self.rows.keys)
        return (rows + columns).expand(shape).reshape(self.pixels, self.count, 1, self.keys)  # type: ignore[union-attr]


def _batches(
    window: Window,
    query: Tensor,
    keys: Tensor,
    channels: int,
    max_queries: int | None = None,
    longest: int = _LONGEST_SEGMENT,
    part: Part | None = None,
) -> Iterator[_Batch]:
    """All rectangles of an image; those of one shape in one band of rows form batches within the budget."""
    _, height, width, heads, _ = query.shape
    w, h = keys.shape[:2]
    budget = _BUDGET.get(keys.device.type, _BUDGET_ELSEWHERE)
    longest = longest if max_queries is None else min(longest, math.isqrt(max_queries))
    # On a CPU adding the bias is several times as fast as filling by a mask, but right only if all logits are finite.
    # On other devices both take about the same time, and the test would wait for the device. (NaN fails the test.)
    finite = keys.device.type == "cpu" and bool(keys.abs().max() <= _SAFE_KEY)
    top, left, full_height, full_width = part or (0, 0, height, width)
    longest_sides = _longest_sides(window, (full_height, full_width), (h, w), heads, longest, keys.device.type)
    row_classes, column_classes = (
        kept_for_graphs(
            axis_segments(window, queries, number, most, first, total, keys.device, keys.dtype), keys.device
        )
        for queries, number, first, total, most in zip(
            (height, width), (h, w), (top, left), (full_height, full_width), longest_sides, strict=True
        )
    )
    for row_class in row_classes:
        for rows in row_class.split(1):
            for column_class in column_classes:
                pixels = rows.length * column_class.length
                count = budget // (pixels * max(heads * rows.keys * column_class.keys, channels))
                if max_queries is not None:
                    count = min(count, max_queries // pixels)
                for columns in column_class.split(max(1, count)):
                    yield _Batch(rows, columns, finite)


@lru_cache(maxsize=256)
def _longest_sides(
    window: Window, output_size: tuple[int, int], grid: tuple[int, int], heads: int, longest: int, device_type: str
) -> tuple[int, int]:
    """The most rows and columns of a rectangle: fewer rows where large windows would make its logits too many."""
    if device_type != "cpu":
        return longest, longest
    keys, columns = 1, min(longest, _LONGEST_COLUMNS)
    for queries, number in zip(output_size, grid, strict=True):
        start, stop = axis_bounds(window, queries, number)
        keys *= max(last - first for first, last in zip(start, stop, strict=True))
    return min(longest, max(_FEWEST_ROWS, _MOST_LOGITS // (heads * keys * columns))), columns


def _grids(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """One image's keys (w, h, heads, d) and values (w, h, C), in their working dtypes."""
    keys, values = (t.transpose(0, 1).to(working_dtype(t.dtype)).contiguous() for t in (key, value))
    return keys, values


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in place; torch would copy what it does not find in the order of its memory."""
    order = sorted(range(logits.dim()), key=logits.stride, reverse=True)
    stored = logits.permute(order)
    torch.softmax(stored, dim=-1, out=stored)
    return logits


class _Scratch(threading.local):
    """Each thread's scratch buffers, reused for every batch: new memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor, in the dtype and on the device of `like`; it reuses the buffer of that name."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)
