"""Cutting an axis of the output into segments of pixels whose windows nearly coincide.

Consecutive pixels share their window (at an integer upsampling ratio most of a cell does), and neighbouring
runs differ by one key at an end. A segment joins such runs as long as the union of their windows stays about as
long as one window, so that a whole segment is worked on with one small set of keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from anyup.window import Window, part_bounds

_CPU = torch.device("cpu")

# The fixed cost of a segment, as a number of pixels. Without it segments would be single pixels where windows move fast
# (features about as fine as the output).
_OVERHEAD_PIXELS = 6


@dataclass(frozen=True)
class Segments:
    """Segments of equal length whose key ranges have equal length too, so that they form a batch.

    Attributes:
        length: queries in each segment.
        starts: first query of each segment.
        keys: length of each key range, which holds the windows of all its segment's queries.
        key_starts: first key of each key range.
        query_positions: (count, length) int64, the queries of each segment.
        key_positions: (count, keys) int64, the keys of each range.
        bias: (count, length, keys), 0 where a query sees a key of the range and -inf elsewhere; None where every
            query sees the whole range.
    """

    length: int
    starts: tuple[int, ...]
    keys: int
    key_starts: tuple[int, ...]
    query_positions: Tensor
    key_positions: Tensor
    bias: Tensor | None

    @property
    def count(self) -> int:
        return len(self.starts)

    def split(self, count: int) -> Iterator[Segments]:
        """The segments in groups of at most `count`."""
        for first in range(0, self.count, count):
            some = slice(first, first + count)
            yield replace(
                self,
                starts=self.starts[some],
                key_starts=self.key_starts[some],
                query_positions=self.query_positions[some],
                key_positions=self.key_positions[some],
                bias=None if self.bias is None else self.bias[some],
            )

    def queries(self) -> Tensor | slice:
        """The queries, segment by segment: a slice where they are adjacent, else (count * length,) int64."""
        if all(b - a == self.length for a, b in zip(self.starts, self.starts[1:], strict=False)):
            return slice(self.starts[0], self.starts[-1] + self.length)
        return self.query_positions.flatten()


@lru_cache(maxsize=64)
def axis_segments(
    window: Window,
    queries: int,
    keys: int,
    longest: int,
    first: int = 0,
    total: int | None = None,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[Segments, ...]:
    """Segments that cover an axis, none longer than `longest`, chosen for little work.

    The axis may be a part of a longer one: from query `first` on, of `total` queries. Positions and bias are on
    `device`, and the bias has the dtype `dtype`.
    """
    start, stop = part_bounds(window, queries, keys, first, queries if total is None else total)
    widest = max(b - a for a, b in zip(start, stop, strict=True))
    candidates = [_segments_within(start, stop, round(widest * growth), longest) for growth in (1, 1.25, 1.5, 2)]
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for first, last in min(candidates, key=lambda candidate: _work(candidate, start, stop)):
        by_length[last - first].append((first, last))
    with torch.inference_mode(False):  # later calls outside inference mode use the tables too
        return tuple(_batch(segments, start, stop, keys, device, dtype) for segments in by_length.values())


def _segments_within(
    start: tuple[int, ...], stop: tuple[int, ...], most_keys: int, longest: int
) -> list[tuple[int, int]]:
    """Greedy (first, last) query ranges whose windows' union holds at most `most_keys` keys."""
    segments = []
    first, low, high = 0, start[0], stop[0]
    for query in range(1, len(start)):
        low, high = min(low, start[query]), max(high, stop[query])
        if high - low > most_keys or query - first >= longest:
            segments.append((first, query))
            first, low, high = query, start[query], stop[query]
    return [*segments, (first, len(start))]


def _union(first: int, last: int, start: tuple[int, ...], stop: tuple[int, ...]) -> tuple[int, int]:
    return min(start[first:last]), max(stop[first:last])


def _work(segments: list[tuple[int, int]], start: tuple[int, ...], stop: tuple[int, ...]) -> int:
    work = 0
    for first, last in segments:
        low, high = _union(first, last, start, stop)
        work += (last - first + _OVERHEAD_PIXELS) * (high - low)
    return work


def _batch(
    segments: list[tuple[int, int]],
    start: tuple[int, ...],
    stop: tuple[int, ...],
    keys: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Segments:
    """Segments of equal length as a batch; key ranges are widened to the longest one, and stay inside the grid."""
    length = segments[0][1] - segments[0][0]
    starts = tuple(first for first, _ in segments)
    unions = [_union(first, last, start, stop) for first, last in segments]
    width = max(high - low for low, high in unions)
    key_starts = tuple(min(low, keys - width) for low, _ in unions)
    position = _ranges(key_starts, width)
    low = torch.tensor([start[first:last] for first, last in segments], device="cpu")[:, :, None]
    high = torch.tensor([stop[first:last] for first, last in segments], device="cpu")[:, :, None]
    unseen = (position[:, None] < low) | (position[:, None] >= high)
    bias = torch.zeros(unseen.shape, dtype=dtype, device="cpu").masked_fill_(unseen, float("-inf"))
    return Segments(
        length=length,
        starts=starts,
        keys=width,
        key_starts=key_starts,
        query_positions=_ranges(starts, length).to(device),
        key_positions=position.to(device),
        bias=bias.to(device) if bool(unseen.any()) else None,
    )


def _ranges(starts: tuple[int, ...], length: int) -> Tensor:
    """(ranges, length): `length` consecutive numbers from each start on."""
    return torch.tensor(starts, device="cpu")[:, None] + torch.arange(length, device="cpu")
