"""An upsampled map within a budget of memory: whole, or piece by piece for outputs that nobody wants to hold whole."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from anyup.banded import BandedImage, Workspace, check_backends
from anyup.budget import is_plain, is_small, limit_on
from anyup.caller_warning import warn
from anyup.finite import overflow
from anyup.image_context import ImageContext
from anyup.ops import memory
from anyup.ops.dispatch import wants_gradient
from anyup.ops.parallel import on_one_thread
from anyup.ops.precision import FLOATING, autocasts
from anyup.ops.window_attention import explain_backends, window_attention
from anyup.ops.window_attention.points import attend_points
from anyup.outputs import MemoryMap, Target, target_of
from anyup.planning import BudgetError, Plan, Task, choose, rows_at_once, task_of
from anyup.problem import OutputSize, check_region, check_tile
from anyup.untraced import untraced
from anyup.window import Part

if TYPE_CHECKING:
    from anyup.model import AnyUp
    from anyup.repetition import Seen

Tile = tuple[slice, slice, Tensor]
"""Rows and columns of the output, and its values there (B, C, rows, columns)."""

SMALL_BAND = 4096
"""Pixels that the tiles of a CPU's threads do not share."""

Result = TypeVar("Result")


@untraced
def stream(
    model: AnyUp,
    image: Tensor | ImageContext,
    features: Tensor,
    output_size: OutputSize,
    *,
    tile: int | Sequence[int] | None,
    max_memory: int | str | None,
    region: Sequence[int] | None,
    values: Tensor | None,
    dtype: torch.dtype | None,
    out: Any = None,
    keep: bool = False,
    q_chunk_size: int | None = None,
) -> Stream:
    """Check the arguments of `AnyUp.stream` now; compute as tiles are taken.

    Without a limit it keeps nothing, or, with `keep`, whole maps of all but the output.
    """
    size = model.check(image, features, output_size, values=values)
    top, left, height, width = where = check_region(region, size)
    carried = features if values is None else values
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype: expected a floating-point dtype of 16, 32 or 64 bits, got {dtype!r}")
    tile_size = check_tile(tile, (height, width))
    if wants_gradients(model, image, features, carried):
        raise RuntimeError("stream does not differentiate: call it under torch.no_grad() or torch.inference_mode()")
    target = None
    if out is not None:
        read = {"image": image.image if isinstance(image, ImageContext) else image, "features": features}
        read |= {} if values is None else {"values": values}
        target = target_of(out, (len(features), carried.shape[1], height, width), read)
    dtype = dtype or (carried.dtype if target is None else target.dtype)
    narrow = min((dtype, dtype if target is None else target.dtype), key=lambda each: torch.finfo(each).max)
    if carried.device.type == "cpu" and (why := overflow(carried, narrow)):
        warn(f"{why}: a result beyond that becomes infinite")
    task = task_of(model, image, features, size, values=values, region=where, tile=tile_size, dtype=dtype)
    task = replace(task, mapped=isinstance(target, MemoryMap))
    limit = limit_on(features.device, max_memory)
    _check_room(task, features, whole=keep and limit is None)
    plan = choose(task, limit, keep=keep)
    source = Source(model, image, features, carried, size, Rescue(plan), q_chunk_size)
    rows, columns = tile_size or (rows_at_once(plan), width)
    if target is not None and tile_size is None:
        rows -= rows % target.multiple if rows > target.multiple else 0
    parts = Parts(range(top, top + height, rows), range(left, left + width, columns), (top + height, left + width))
    return Stream(source, parts, dtype, (top, left), target)


class Parts(Sequence[tuple[slice, slice]]):
    """Rows and columns of each piece, from left to right and from top to bottom; they may be more than memory holds."""

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
        source: Source,
        parts: Sequence[tuple[slice, slice]],
        dtype: torch.dtype,
        origin: tuple[int, int],
        target: Target | None,
    ) -> None:
        self.parts = parts
        self._source, self._dtype, self._origin, self._target = source, dtype, origin, target
        self._first = 0
        self._tiles = self._make()

    @property
    def plan(self) -> Plan:
        """What is kept and what is computed again; `print` it."""
        return self._source.plan

    def __len__(self) -> int:
        return len(self.parts)

    @untraced
    def __next__(self) -> Tile:
        return next(self._tiles)

    def skip(self, count: int) -> None:
        """Leave out the next pieces, which are not computed then."""
        self._first += count

    def close(self) -> None:
        """Stop here; what was written into `out` has arrived there."""
        self._tiles.close()

    @torch.no_grad()  # of each step: what the caller does between two tiles is his own
    def _make(self) -> Generator[Tile, None, None]:
        target, (top, left) = self._target, self._origin
        try:
            while self._first < len(self.parts):
                rows, columns = self.parts[self._first]
                self._first += 1
                piece = self._source.piece(rows, columns, self._dtype).permute(0, 3, 1, 2)
                if target is not None:
                    target.write(_less(rows, top), _less(columns, left), piece)
                yield rows, columns, piece
                del piece  # before the next one is made
        finally:
            if target is not None:
                target.finish()


def _less(part: slice, origin: int) -> slice:
    return slice(part.start - origin, part.stop - origin)


@untraced
def call(
    model: AnyUp,
    image: Tensor | ImageContext,
    features: Tensor,
    size: tuple[int, int],
    vis_attn: bool,
    q_chunk_size: int | None,
    values: Tensor | None,
    max_memory: int | str | None,
    out: Any,
    seen: Seen | None = None,
) -> Any:
    """The call of an `AnyUp` with checked arguments, within a budget: maps are whole where they may be."""
    with model._threads(image, size, features):
        carried = features if values is None else values
        if out is not None:
            if vis_attn:
                raise ValueError("vis_attn: the picture is not drawn where the result goes to `out`")
            if wants_gradients(model, image, features, carried):
                raise RuntimeError(
                    "out does not differentiate: call it under torch.no_grad() or torch.inference_mode()"
                )
            for _ in stream(
                model, image, features, size,
                tile=None, max_memory=max_memory, region=None, values=values, dtype=None,
                out=out, keep=True, q_chunk_size=q_chunk_size,
            ):  # fmt: skip
                pass
            return out
        task = task_of(model, image, features, size, values=values)
        limit = _limit(task, features.device, max_memory)
        differentiates = wants_gradients(model, image, features, carried)
        _check_room(task, features, whole=differentiates or limit is None)
        if differentiates:
            if max_memory is not None:
                raise RuntimeError(
                    "max_memory does not differentiate: call it under torch.no_grad() or torch.inference_mode()"
                )
            return model._upsample(image, features, size, vis_attn, q_chunk_size, values)
        rescue = Rescue(choose(task, limit))
        if rescue.plan.order == "whole":
            try:
                call = partial(model._upsample, image, features, size, vis_attn, q_chunk_size, values)
                if seen is None or not seen.repetition.is_open:
                    return call()
                # What torch.compile makes of flex attention launches kernels that nobody sees.
                chosen = model.explain(image, features, size, values=values).chosen.values()
                return call() if "flex" in chosen else seen.record(rescue.plan.peak_bytes, lambda: (call(),))[0]
            except torch.OutOfMemoryError as error:
                rescue.fail(error)
        if vis_attn:
            raise ValueError(f"vis_attn: the picture needs whole maps, which do not fit; the plan is\n{rescue.plan}")
        return _upsample(model, image, features, size, rescue, values=values, q_chunk_size=q_chunk_size)


def _limit(task: Task, device: torch.device, max_memory: int | str | None) -> int | None:
    """The bytes that a call may allocate; None where whole maps take so few that nobody asks."""
    if max_memory is None and device.type == "cuda" and is_small(choose(task, None).peak_bytes, device):
        return None
    return limit_on(device, max_memory)


def _check_room(task: Task, features: Tensor, *, whole: bool) -> None:
    """Raise ValueError where the device of the features has no room for what is kept at once."""
    if is_plain(features):
        task.check_room(features.device, whole=whole)


@torch.no_grad()
def _upsample(
    model: AnyUp,
    image: Tensor | ImageContext,
    features: Tensor,
    size: tuple[int, int],
    rescue: Rescue,
    *,
    values: Tensor | None,
    q_chunk_size: int | None,
) -> Tensor:
    """A call one image after the other, each by the plan: (B, C, H, W), channels last in memory."""
    carried = features if values is None else values
    columns, out = slice(0, size[1]), None
    for index in range(len(features)):
        one = slice(index, index + 1)
        part = image.part(one) if isinstance(image, ImageContext) else image[one]
        source = Source(model, part, features[one], carried[one], size, rescue, q_chunk_size)
        source.prepare()
        if out is None:
            out = source.new(len(features), *size)
        source.fill(out[one], slice(0, size[0]), columns)
    assert out is not None
    return out.permute(0, 3, 1, 2)


class Rescue:
    """Runs the steps of a plan; when a GPU's memory does not suffice, the rest of them with half the budget, once.

    Attributes:
        plan: that is followed now.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._happened = False

    def attempt(self, step: Callable[[], Result], adopt: Callable[[], None]) -> Result:
        """The step's result; where it fails for memory, `adopt` the smaller plan and take the step again.

        Raises torch.OutOfMemoryError, with the plan, where it has failed before.
        """
        while True:
            try:
                return step()
            except torch.OutOfMemoryError as error:
                self.fail(error)
            adopt()  # outside of the handler: the error holds the frames that hold what is to be freed

    def fail(self, error: torch.OutOfMemoryError) -> None:
        """Take half the budget, once."""
        if self._happened:
            raise torch.OutOfMemoryError(
                f"out of memory again, with half the budget: {error}\nThe plan was\n{self.plan}"
            ) from error
        self._happened = True
        half = (self.plan.limit or self.plan.peak_bytes) // 2
        try:
            self.plan = choose(self.plan.task, half)
        except BudgetError as unmet:
            self.plan = choose(self.plan.task, unmet.smallest)


class Source:
    """The queries and keys of a batch by a plan, made when first asked for, and what the pixels make of them."""

    def __init__(
        self,
        model: AnyUp,
        image: Tensor | ImageContext,
        features: Tensor,
        carried: Tensor,
        size: tuple[int, int],
        rescue: Rescue,
        q_chunk_size: int | None = None,
    ) -> None:
        self._model, self._image, self._features, self._carried, self._size = model, image, features, carried, size
        self._rescue, self._q_chunk_size = rescue, q_chunk_size
        device = features.device
        self._dtype = model._compute_dtype(device)
        # What makes whole maps runs as the caller called it, whenever it runs.
        self._autocasts = autocasts(device.type)
        self._banded: list[BandedImage] = []
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._check_backends()

    @property
    def plan(self) -> Plan:
        """That is followed now."""
        return self._rescue.plan

    def prepare(self) -> None:
        """Make keys, and all of the queries that the plan keeps."""
        self._rescue.attempt(self._prepare, self._adopt)

    def new(self, batch: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """(batch, height, width, C), in the dtype of what is carried if None."""
        like = self._carried if dtype is None else self._carried.new_empty(0, dtype=dtype)
        shape = (batch, height, width, self._carried.shape[1])
        return self._rescue.attempt(lambda: memory.empty(shape, like), self._adopt)

    def piece(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """(B, rows, columns, C)."""
        with self._model._threads(self._image, self._size, self._features):
            self.prepare()
            height, width, batch = rows.stop - rows.start, columns.stop - columns.start, len(self._features)
            if batch == 1 and height <= rows_at_once(self._rescue.plan):
                return self._rescue.attempt(lambda: self._attend(0, rows, columns).to(dtype), self._adopt)
            out = self.new(batch, height, width, dtype)
            self.fill(out, rows, columns)
            return out

    def fill(self, out: Tensor, rows: slice, columns: slice) -> None:
        """Write these rows and columns of the output into (B, rows, columns, C), a band at a time."""
        done = rows.start

        def step() -> int:
            stop = min(done + rows_at_once(self._rescue.plan), rows.stop)
            for index in range(len(out)):
                part = self._attend(index, slice(done, stop), columns)
                out[index, done - rows.start : stop - rows.start] = part[0]
            return stop

        while done < rows.stop:
            done = self._rescue.attempt(step, self._adopt)

    def at(self, index: int, rows: Tensor, columns: Tensor) -> Tensor:
        """(N, C) of one image at single pixels, (N,) on the CPU."""
        return self._rescue.attempt(lambda: self._at(index, rows, columns), self._adopt)

    def _at(self, index: int, rows: Tensor, columns: Tensor) -> Tensor:
        self._prepare()
        assert self._keys is not None and self._values is not None
        if self._queries is not None:
            queries = self._queries[index, rows, columns]
        else:
            queries = self._banded[index].queries_at(rows, columns)
        return attend_points(
            queries, self._keys[index], self._values[index], rows, columns, window=self._model.window, size=self._size
        )

    def _attend(self, index: int, rows: slice, columns: slice) -> Tensor:
        """(1, rows, columns, C) of one image."""
        self._prepare()
        with self._threads():
            return self._attended(index, rows, columns)

    def _threads(self) -> AbstractContextManager[object]:
        """One thread where a band is so small that several would wait for each other at each step."""
        plan = self._rescue.plan
        small = plan.bands is not None and plan.bands.rows * plan.task.image[1] <= SMALL_BAND
        return on_one_thread() if small and self._features.device.type == "cpu" else nullcontext()

    def _attended(self, index: int, rows: slice, columns: slice) -> Tensor:
        one = slice(index, index + 1)
        assert self._keys is not None and self._values is not None
        if self._queries is not None:
            queries = self._queries[one, rows, columns]
        else:
            queries = self._banded[index].queries(rows, columns)
        return window_attention(
            queries,
            self._keys[one],
            self._values[one],
            window=self._model.window,
            backend=self._model._backends["window_attention"],
            max_queries=self._q_chunk_size,
            part=Part(rows.start, columns.start, *self._size),
        )

    def _prepare(self) -> None:
        """Called again after an error it goes on with the pass that failed."""
        if self._keys is not None or not len(self._features):
            return
        image, grid, bands = self._image, (self._features.shape[2], self._features.shape[3]), self._rescue.plan.bands
        queries: Tensor | None = None
        if bands is None or (isinstance(image, ImageContext) and grid in image.image_keys):
            with self._as_called(), memory.reuse():
                queries, keys = self._model._query_and_key(image, self._features, self._size)
        else:
            if isinstance(image, ImageContext):
                queries, image = image.queries, image.image
            if not self._banded:
                work = Workspace(image.new_empty(0, dtype=self._dtype), self._model.qk_dim)
                make = partial(BandedImage, needs_queries=queries is None)
                self._banded = [make(self._model, one, self._size, self._dtype, bands, work) for one in image]
            with self._threads():
                image_keys = torch.cat([one.image_keys(grid) for one in self._banded])
            keys = self._model._keys(image_keys, self._features).to(self._dtype)
            if queries is not None:
                self._banded.clear()
        self._queries, self._keys = queries, keys
        self._values = self._carried.permute(0, 2, 3, 1).contiguous()

    def _adopt(self) -> None:
        """Go on by the plan as it is now."""
        bands = self._rescue.plan.bands
        if bands is None:
            self._banded.clear()
        if not self._banded:
            self._queries = self._keys = self._values = None
        elif bands is not None:
            for one in self._banded:
                one.recut(bands)

    def _as_called(self) -> AbstractContextManager[object]:
        """Autocast as it was when this was made."""
        kind = self._features.device.type
        if self._autocasts == autocasts(kind) and self._dtype == self._model._compute_dtype(self._features.device):
            return nullcontext()
        return torch.autocast(kind, dtype=self._dtype if self._autocasts else None, enabled=self._autocasts)

    def _check_backends(self) -> None:
        """Raise NotImplementedError where the backends that were asked for cannot work on a part."""
        model, plan = self._model, self._rescue.plan
        if plan.bands is not None and plan.task.context != "all":
            check_backends(model, plan.task.image, self._dtype, self._features.device)
        heads, (h, w) = model.cross_decode.num_heads, self._features.shape[2:]
        stand_in = torch.empty((), dtype=self._dtype, device=self._features.device)
        head_dim = model.qk_dim // heads
        empty = self._carried.new_empty(1, self._carried.shape[1], h, w)
        explanation = explain_backends(
            stand_in.expand(1, 1, 1, heads, head_dim),
            stand_in.expand(1, h, w, heads, head_dim),
            (self._carried[:1] if len(self._carried) else empty).permute(0, 2, 3, 1),
            window=model.window,
            backend=model._backends["window_attention"],
            part=Part(0, 0, *self._size),
        )
        if explanation.chosen is None:
            raise NotImplementedError(f"no backend can run this:\n{explanation}")


def wants_gradients(model: AnyUp, image: Tensor | ImageContext, *maps: Tensor) -> bool:
    """Whether autograd would record a call with these."""
    images = (image.image, image.queries) if isinstance(image, ImageContext) else (image,)
    return wants_gradient(*images, *maps, *model.parameters())
