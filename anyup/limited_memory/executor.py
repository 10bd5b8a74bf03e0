"""The execution of a plan: queries and keys, as whole maps or in bands, and the attention for each piece."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from anyup.image_context import ImageContext
from anyup.limited_memory import choice
from anyup.limited_memory.bands import BandedImage, Workspace, check_backends
from anyup.limited_memory.choice import BudgetError, rows_at_once
from anyup.limited_memory.plans import Plan
from anyup.limited_memory.request import Request
from anyup.ops import memory
from anyup.ops.parallel import on_one_thread
from anyup.ops.precision import autocasts
from anyup.ops.window_attention import attend_points, explain_backends, explain_points, window_attention
from anyup.window import Part

SMALL_BAND = 4096
"""A band of at most so many pixels runs on one thread of a CPU."""

Result = TypeVar("Result")


class OutOfMemoryRetry:
    """Runs the steps of a plan; once, when a GPU runs out of memory, plans the rest with half the budget.

    Attributes:
        plan: the current plan.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._happened = False

    def attempt(self, step: Callable[[], Result], apply_plan: Callable[[], None]) -> Result:
        """The step's result; where it runs out of memory, make a smaller plan, call `apply_plan` and repeat the step.

        Raises torch.OutOfMemoryError, with the plan, at the second failure.
        """
        while True:
            try:
                return step()
            except torch.OutOfMemoryError as error:
                self.take_less(error)
            apply_plan()  # outside the handler: the error keeps the frames, and so their tensors, alive

    def take_less(self, error: torch.OutOfMemoryError) -> None:
        """Make a plan with half the budget; raises torch.OutOfMemoryError when called a second time."""
        if self._happened:
            raise torch.OutOfMemoryError(
                f"out of memory again, with half the budget: {error}\nThe plan was\n{self.plan}"
            ) from error
        self._happened = True
        half = (self.plan.limit or self.plan.peak_bytes) // 2
        try:
            self.plan = choice.choose(self.plan.task, half)
        except BudgetError as unmet:
            self.plan = choice.choose(self.plan.task, unmet.smallest)


class Executor:
    """Computes any piece of a request's output by a plan; queries and keys are computed when first needed.

    Args:
        request: the checked arguments of the call.
        plan: the plan; or the retry that holds the plan, which the executors of a batch's images share.
        of_points: whether `at` will be called, and no other piece of the output.
    """

    def __init__(self, request: Request, plan: Plan | OutOfMemoryRetry, *, of_points: bool = False) -> None:
        self._request, self._network = request, request.network
        self._retry = OutOfMemoryRetry(plan) if isinstance(plan, Plan) else plan
        self._dtype = self._network.compute_dtype(request.device)
        # Whole maps are computed under the autocast that was on when the caller made the call.
        self._autocasts = autocasts(request.device.type)
        self._banded: list[BandedImage] = []
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._check_backends(of_points)

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self._retry.plan

    def prepare(self) -> None:
        """Compute the keys, and the queries that the plan keeps in memory."""
        self._retry.attempt(self._prepare, self._apply_plan)

    def join(self) -> None:
        """Take part in the passes over an image that several processes share, even where no piece is asked for."""
        if self._request.share is not None:
            with self._request.threads():
                self.prepare()

    def new(self, batch: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised map (batch, height, width, C); `dtype` None means the dtype of the values."""
        like = self._request.values if dtype is None else self._request.values.new_empty(0, dtype=dtype)
        shape = (batch, height, width, self._request.values.shape[1])
        return self._retry.attempt(lambda: memory.empty(shape, like), self._apply_plan)

    def piece(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """A piece of the output, (B, rows, columns, C)."""
        with self._request.threads():
            self.prepare()
            height, width, batch = rows.stop - rows.start, columns.stop - columns.start, len(self._request)
            if batch == 1 and height <= rows_at_once(self._retry.plan):
                return self._retry.attempt(lambda: self._attend(0, rows, columns).to(dtype), self._apply_plan)
            out = self.new(batch, height, width, dtype)
            self.fill(out, rows, columns)
            return out

    def fill(self, out: Tensor, rows: slice, columns: slice) -> None:
        """Write these rows and columns of the output into (B, rows, columns, C), a band at a time."""
        done = rows.start

        def step() -> int:
            stop = min(done + rows_at_once(self._retry.plan), rows.stop)
            for index in range(len(out)):
                found = self._attend(index, slice(done, stop), columns)
                out[index, done - rows.start : stop - rows.start] = found[0]
            return stop

        while done < rows.stop:
            done = self._retry.attempt(step, self._apply_plan)

    def at(self, index: int, rows: Tensor, columns: Tensor) -> Tensor:
        """The output (N, C) of one image at pixels `rows`, `columns` (N,), which are on the CPU."""
        return self._retry.attempt(lambda: self._at(index, rows, columns), self._apply_plan)

    def _at(self, index: int, rows: Tensor, columns: Tensor) -> Tensor:
        self._prepare()
        assert self._keys is not None and self._values is not None
        if self._queries is not None:
            queries = self._queries[index, rows, columns]
        else:
            queries = self._banded[index].queries_at(rows, columns)
        return attend_points(
            queries,
            self._keys[index],
            self._values[index],
            rows,
            columns,
            window=self._network.window,
            size=self._request.size,
            backend=self._network.backends["window_attention"],
        )

    def _attend(self, index: int, rows: slice, columns: slice) -> Tensor:
        """A piece of one image's output, (1, rows, columns, C)."""
        self._prepare()
        with self._threads():
            return self._attended(index, rows, columns)

    def _threads(self) -> AbstractContextManager[object]:
        """One thread for a small band, where several threads would wait for each other at each step."""
        plan = self._retry.plan
        small = plan.bands is not None and plan.bands.rows * plan.task.image[1] <= SMALL_BAND
        return on_one_thread() if small and self._request.device.type == "cpu" else nullcontext()

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
            window=self._network.window,
            backend=self._network.backends["window_attention"],
            max_queries=self._request.q_chunk_size,
            part=Part(rows.start, columns.start, *self._request.size),
        )

    def _prepare(self) -> None:
        """Compute queries and keys; a second call after an error goes on with the pass that failed."""
        if self._keys is not None or not len(self._request):
            return
        request, bands = self._request, self._retry.plan.bands
        image, grid = request.image, request.grid
        queries: Tensor | None = None
        if bands is None or (isinstance(image, ImageContext) and grid in image.image_keys):
            with self._as_called(), memory.reuse():
                queries, keys, _ = self._network.queries_and_keys(image, request.features, request.size)
        else:
            if isinstance(image, ImageContext):
                queries, image = image.queries, image.image
            if not self._banded:
                work = Workspace(image.new_empty(0, dtype=self._dtype), self._network.qk_dim)
                make = partial(BandedImage, needs_queries=queries is None, share=request.share)
                self._banded = [make(self._network, one, self._request.size, self._dtype, bands, work) for one in image]
            with self._threads():
                image_keys = torch.cat([one.image_keys(grid) for one in self._banded])
            keys = self._network.keys(image_keys, request.features)[0].to(self._dtype)
            if queries is not None:
                self._banded.clear()
        self._queries, self._keys = queries, keys
        self._values = self._request.values.permute(0, 2, 3, 1).contiguous()

    def _apply_plan(self) -> None:
        """Drop what the previous plan stored and use the current plan."""
        bands = self._retry.plan.bands
        if bands is None:
            self._banded.clear()
        if not self._banded:
            self._queries = self._keys = self._values = None
        elif bands is not None:
            for one in self._banded:
                one.use_bands(bands)

    def _as_called(self) -> AbstractContextManager[object]:
        """The autocast that was on when this executor was made."""
        kind = self._request.device.type
        if self._autocasts == autocasts(kind) and self._dtype == self._network.compute_dtype(self._request.device):
            return nullcontext()
        return torch.autocast(kind, dtype=self._dtype if self._autocasts else None, enabled=self._autocasts)

    def _check_backends(self, of_points: bool) -> None:
        """Raise NotImplementedError where the requested backends cannot compute a part of an output."""
        network, request, plan = self._network, self._request, self._retry.plan
        if plan.bands is not None and plan.task.context != "all":
            check_backends(network, plan.task.image, self._dtype, request.device)
        heads, (h, w), values = network.cross_decode.num_heads, request.grid, request.values[:1]
        stand_in = torch.empty((), dtype=self._dtype, device=request.device)
        head_dim = network.qk_dim // heads
        query = stand_in.expand(1, 1, 1, heads, head_dim)
        key = stand_in.expand(1, h, w, heads, head_dim)
        value = (values if len(values) else values.new_empty(1, *values.shape[1:])).permute(0, 2, 3, 1)
        settings: dict[str, Any] = {"window": network.window, "backend": network.backends["window_attention"]}
        if of_points:
            explanation = explain_points(query[0, 0], key[0], value[0], size=request.size, **settings)
        else:
            explanation = explain_backends(query, key, value, part=Part(0, 0, *request.size), **settings)
        if explanation.chosen is None:
            raise NotImplementedError(f"no backend can run this:\n{explanation}")
