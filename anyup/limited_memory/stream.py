"""An upsampled map piece by piece, for outputs that are too large to hold whole."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from anyup.argument_checks import check_region, check_tile
from anyup.budget import limit_on
from anyup.caller_warning import warn
from anyup.finite import overflow
from anyup.limited_memory import choice
from anyup.limited_memory.choice import rows_at_once
from anyup.limited_memory.destinations import Destination, MemoryMap, destination_of
from anyup.limited_memory.executor import Executor
from anyup.limited_memory.plans import Plan
from anyup.limited_memory.request import Request
from anyup.ops.precision import check_dtype
from anyup.untraced import untraced

Tile = tuple[slice, slice, Tensor]
"""Rows and columns of the output, and its values there (B, C, rows, columns)."""


@untraced
def stream(
    request: Request,
    *,
    tile: int | Sequence[int] | None = None,
    max_memory: float | str | None,
    region: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    out: Any = None,
    keep: bool = False,
) -> Stream:
    """Check the arguments of `AnyUp.stream` now; compute each piece when it is taken.

    Without a limit the stream stores no map between the passes, or, with `keep`, whole maps of all but the output.
    Of a process with a share of the image the stream has the share's rows of the output, and without a limit it keeps
    the maps of all the share's rows.
    """
    own = None if request.share is None else request.share.output_rows
    if own is None:
        top, left, height, width = check_region(region, request.size)
        origin, shape = (top, left), (height, width)
    else:  # `out` is that of all processes, each of which writes its rows
        top, left, height, width = own.start, 0, own.stop - own.start, request.size[1]
        origin, shape = (0, 0), request.size
    where = top, left, max(height, 1), width
    check_dtype("dtype", dtype)
    tile_size = check_tile(tile, where[2:])
    if request.wants_gradient:
        raise RuntimeError("stream does not differentiate: call it under torch.no_grad() or torch.inference_mode()")
    values, destination = request.values, None
    if out is not None:
        destination = destination_of(out, (len(request), values.shape[1], *shape), request.inputs)
    dtype = dtype or (values.dtype if destination is None else destination.dtype)
    narrow = min((dtype, dtype if destination is None else destination.dtype), key=lambda each: torch.finfo(each).max)
    if values.device.type == "cpu" and (why := overflow(values, narrow)):
        warn(f"{why}: a result beyond that becomes infinite")
    task = request.task(region=where, tile=tile_size, out_dtype=dtype, mapped=isinstance(destination, MemoryMap))
    limit = limit_on(request.device, max_memory)
    request.check_room(task, whole=keep and limit is None)
    plan = choice.choose(task, limit, keep=keep)
    rows, columns = tile_size or (rows_at_once(plan), width)
    if destination is not None and tile_size is None:
        rows -= rows % destination.multiple if rows > destination.multiple else 0
    parts = Parts(range(top, top + height, rows), range(left, left + width, columns), (top + height, left + width))
    return Stream(Executor(request, plan), parts, dtype, origin, destination)


class Parts(Sequence[tuple[slice, slice]]):
    """The rows and columns of each piece, in reading order. No list, which may not fit the memory."""

    def __init__(self, rows: range, columns: range, end: tuple[int, int]) -> None:
        self._rows, self._columns, self._end = rows, columns, end

    def __len__(self) -> int:
        return len(self._rows) * len(self._columns)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected a piece of {len(self)}, got {index}")
        row, column = divmod(index % len(self), len(self._columns))
        first, left = self._rows[row], self._columns[column]
        bottom, right = self._end
        return slice(first, min(first + self._rows.step, bottom)), slice(left, min(left + self._columns.step, right))


class Stream(Iterator[Tile]):
    """The pieces of an upsampled map, each computed when it is taken; `len` tells how many there are in all.

    Attributes:
        parts: rows and columns of each piece, in their order.
    """

    def __init__(
        self,
        executor: Executor,
        parts: Sequence[tuple[slice, slice]],
        dtype: torch.dtype,
        origin: tuple[int, int],
        destination: Destination | None,
    ) -> None:
        self.parts = parts
        self._executor, self._dtype, self._origin, self._destination = executor, dtype, origin, destination
        self._first = 0
        self._tiles = self._make()

    @property
    def plan(self) -> Plan:
        """What is kept and what is computed again; `print` it."""
        return self._executor.plan

    def __len__(self) -> int:
        return len(self.parts)

    @untraced
    def __next__(self) -> Tile:
        return next(self._tiles)

    def skip(self, count: int) -> None:
        """Skip the next `count` pieces, which are then not computed."""
        self._first += count

    def close(self) -> None:
        """End the stream, and wait until the pieces taken so far have arrived in `out`."""
        self._tiles.close()

    @torch.no_grad()  # inside each step alone: the caller's code between two steps keeps its own mode
    def _make(self) -> Generator[Tile, None, None]:
        destination, (top, left) = self._destination, self._origin
        try:
            self._executor.join()
            while self._first < len(self.parts):
                rows, columns = self.parts[self._first]
                self._first += 1
                piece = self._executor.piece(rows, columns, self._dtype).permute(0, 3, 1, 2)
                if destination is not None:
                    destination.write(_less(rows, top), _less(columns, left), piece)
                yield rows, columns, piece
                del piece  # before the next one is made
        finally:
            if destination is not None:
                destination.finish()


def _less(span: slice, origin: int) -> slice:
    return slice(span.start - origin, span.stop - origin)
