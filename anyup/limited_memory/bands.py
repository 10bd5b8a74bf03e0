"""One image's half of the work a band of rows at a time, with as much of it kept between the bands as a plan allows.

The normalisations' statistics are those of the whole map, so all bands pass through the image encoder four times, and
through the query and the key encoder four times more, before anything can be used. A band that keeps nothing starts
each time from the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyup.layers import encoded_size
from anyup.limited_memory.plans import HALO, Bands
from anyup.ops import memory, query_projection
from anyup.ops.dispatch import BackendFailure
from anyup.ops.pixel_encoder.banded import PASSES, BandedEncoder, check_backend, problem_of
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.rotary import Rotation
from anyup.ops.precision import without_autocast, working_dtype
from anyup.ops.query_projection.points import project_neighbourhoods

if TYPE_CHECKING:
    from anyup.layers import Encoder
    from anyup.network import Network


def reach(part: slice, count: int, length: int) -> Cells:
    """The cells of an axis that the 3x3 convolution needs for a part of the output."""
    return Cells(max(part.start - HALO, 0), min(part.stop + HALO, count), count, length)


class Workspace:
    """Maps (rows, columns, D) that are worked in, made when first needed and used again for every band."""

    def __init__(self, like: Tensor, dim: int) -> None:
        self._like, self._dim = like, dim
        self._maps: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """The map of a name; it holds what is left of its last use."""
        size = rows * columns * self._dim
        if name not in self._maps or self._maps[name].numel() < size:
            self._maps.pop(name, None)  # first, so that it and its successor are never alive together
            self._maps[name] = self.new(rows, columns).flatten()
        return self._maps[name][:size].view(rows, columns, self._dim)

    def new(self, rows: int, columns: int) -> Tensor:
        """A map that is the caller's alone."""
        return memory.empty((rows, columns, self._dim), self._like)

    def clear(self) -> None:
        """Give the memory back."""
        self._maps.clear()


def check_backends(network: Network, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Raise NotImplementedError where no backend that the model asks for can encode an image of a size in bands."""
    for encoder in _encoders(network).values():
        check_backend(problem_of(*encoder.channels_of_op, size, dtype, device), network.backends["pixel_encoder"])


def _encoders(network: Network) -> dict[str, Encoder]:
    return {"image": network.image_encoder, "key": network.key_encoder, "query": network.query_encoder}


class BandedImage:
    """The queries and pooled keys of one image, computed for the part that is asked for.

    Args:
        network: whose weights are used, without gradients.
        image: (input_dim, Hi, Wi).
        size: (H, W) of the output.
        dtype: that queries and keys are computed in.
        bands: its bands, and what is kept of them.
        workspace: may be shared with other images.
        needs_queries: False where pooled keys alone will be asked for.
    """

    def __init__(
        self,
        network: Network,
        image: Tensor,
        size: tuple[int, int],
        dtype: torch.dtype,
        bands: Bands,
        workspace: Workspace,
        *,
        needs_queries: bool = True,
    ) -> None:
        self._network, self._image, self._size, self._dtype = network, image, size, dtype
        self._height, self._width = encoded_size((image.shape[1], image.shape[2]), network.config["kernel_size"])
        self._work, self._needs_queries = workspace, needs_queries
        self._encoders = {
            name: BandedEncoder(
                encoder.parameters_for_op(dtype),
                problem_of(*encoder.channels_of_op, (self._height, self._width), dtype, image.device),
                network.backends["pixel_encoder"],
            )
            for name, encoder in _encoders(network).items()
        }
        self._rotation = Rotation((self._height, self._width), network.rope.freqs.to(dtype))
        self._pooled: Tensor | None = None
        self.use_bands(bands)

    def use_bands(self, bands: Bands) -> None:
        """Go on with other bands: what is kept is dropped, the statistics that are complete stay."""
        self._bands = bands
        self._work.clear()
        self._kept = _Kept(self._new, bands.kept, bands.kept_for_output)
        self._encoded = _Kept(self._new, bands.encoded)
        for encoder in self._encoders.values():
            encoder.abandon_pass()

    def image_keys(self, grid: tuple[int, int]) -> Tensor:
        """(1, h, w, D): the keys pooled to a grid, and before that the statistics of every normalisation.

        Called again after an error it goes on with the pass that failed.
        """
        return self._by_what_runs(lambda: self._image_keys(grid))

    def _image_keys(self, grid: tuple[int, int]) -> Tensor:
        image, key, query = (self._encoders[name] for name in ("image", "key", "query"))
        wanted = (key, query) if self._needs_queries else (key,)
        with without_autocast(self._image.device.type):
            while image.passes < PASSES:
                self._pass(self._gather_image, image)
            if self._bands.together:
                while any(encoder.passes < PASSES for encoder in wanted):
                    unfinished = [encoder for encoder in wanted if encoder.passes < PASSES]
                    self._pass(partial(self._gather_encoded, unfinished), *unfinished)
            while key.passes < PASSES:
                self._pass(partial(self._gather_alone, "key"), key)
            if self._pooled is None:
                self._pooled = self._pool(grid)
            if self._needs_queries:
                while query.passes < PASSES:
                    self._pass(partial(self._gather_alone, "query"), query)
        self._kept.trim()
        self._encoded.trim()
        self._work.clear()
        return self._pooled[None]

    def queries(self, rows: slice, columns: slice) -> Tensor:
        """(1, rows, columns, heads, head_dim) of a rectangle of the output, once there are image keys."""
        axes = zip((rows, columns), self._size, (self._height, self._width), strict=True)
        row_cells, column_cells = (reach(part, count, length) for part, count, length in axes)

        def encoded_part() -> Tensor:
            trunk, kept = self._query_trunk(row_cells.pixels, column_cells.pixels)
            branch = self._work.take("branch", *trunk.shape[:2])
            return self._encoders["query"].encode_pooled(trunk, trunk, branch, row_cells, column_cells, kept=kept)

        with without_autocast(self._image.device.type):
            encoded = self._by_what_runs(encoded_part)
            parameters = self._network.cross_decode.query_parameters(self._dtype)
            projected = query_projection.project_queries(
                encoded[None], parameters, backend=self._network.backends["query_projection"]
            )
        within = [
            slice(part.start - cells.first, part.stop - cells.first)
            for part, cells in zip((rows, columns), (row_cells, column_cells), strict=True)
        ]
        return self._network.cross_decode.split_heads(projected[:, within[0], within[1]])

    def queries_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(N, heads, head_dim) of single pixels of the output, (N,) on the CPU, once there are image keys."""
        axes = [
            Cells(0, count, count, length).around(position, HALO)
            for position, count, length in zip((rows, columns), self._size, (self._height, self._width), strict=True)
        ]
        pixels_of_point = math.prod(pixel.shape[1] * pixel.shape[2] for pixel, _ in axes)
        step = max(1, self._bands.rows * self._width // pixels_of_point)
        parts = zip(*(each.split(step) for axis in axes for each in axis), strict=True)
        parameters = self._network.cross_decode.query_parameters(self._dtype)
        with without_autocast(self._image.device.type):
            found = [project_neighbourhoods(self._neighbourhoods(*part), parameters) for part in parts]
        return self._network.cross_decode.split_heads(torch.cat(found))

    def _neighbourhoods(self, rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor) -> Tensor:
        """(n, 3, 3, D) of the query encoder's map, of the pixels (n, 3, m) that each cell averages along the axes."""
        number = rows[:, :, None, :, None] * self._width + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]  # (n, 3, 3, m, m)
        needed, place = torch.unique(number, return_inverse=True)
        row, column = needed // self._width, needed % self._width
        image, query = self._encoders["image"], self._encoders["query"]

        def encoded() -> Tensor:
            pixels = self._network.image_encoder.prepare_at(self._image, row, column, self._dtype)[:, None]
            trunk, branch = (self._work.take(name, len(needed), 1) for name in ("trunk", "branch"))
            image.encode(pixels, trunk, branch, self._rotation.at(row, column))
            return query.encode(trunk, trunk, branch)[:, 0]

        wide = working_dtype(self._dtype)
        near = self._by_what_runs(encoded)[place.to(self._image.device)].to(wide)  # (n, 3, 3, m, m, D)
        return (near * weights[..., None].to(near)).sum(dim=(3, 4)).to(self._dtype)

    def _by_what_runs(self, work: Callable[[], Tensor]) -> Tensor:
        """The work's result; where kernels fail, the rest of it by the next backend, with nothing of what they kept."""
        while True:
            try:
                return work()
            except BackendFailure as failure:
                next(encoder for encoder in self._encoders.values() if encoder.runs_kernels).give_up(failure)
            for encoder in self._encoders.values():
                encoder.choose()
            self.use_bands(self._bands)

    def _pass(self, gather: Callable[[slice], None], *encoders: BandedEncoder) -> None:
        """One pass of all bands."""
        for encoder in encoders:
            encoder.abandon_pass()
        for rows in self._bands_of_rows():
            gather(rows)
        for encoder in encoders:
            encoder.finish_pass()

    def _gather_image(self, rows: slice) -> None:
        kept = self._kept.band(rows)
        trunk, branch = self._maps(rows, kept)
        self._encoders["image"].accumulate_statistics(
            self._pixels(rows), trunk, branch, keep=kept is not None, kept=self._kept.state.get(rows.start) == "image"
        )
        self._kept.note(rows, "image")

    def _gather_encoded(self, encoders: list[BandedEncoder], rows: slice) -> None:
        kept = self._kept.band(rows)
        guidance = self._guidance_of_band(rows, kept)
        branch = self._work.take("branch", *guidance.shape[:2])
        for encoder in encoders:
            last = kept is None and encoder is encoders[-1]
            trunk = guidance if last else self._work.take("second", *guidance.shape[:2])
            encoder.accumulate_statistics(guidance, trunk, branch)

    def _gather_alone(self, name: str, rows: slice) -> None:
        kept = self._kept.band(rows)
        trunk, branch = self._maps(rows, kept)
        has_come = kept is not None and self._kept.state.get(rows.start) == name
        if not has_come:
            trunk = self._guidance_of_band(rows, kept)
        self._encoders[name].accumulate_statistics(trunk, trunk, branch, keep=kept is not None, kept=has_come)
        self._kept.note(rows, name)

    def _pool(self, grid: tuple[int, int]) -> Tensor:
        """(h, w, D)"""
        h, w = grid
        cells = Cells(0, h, h, self._height), Cells(0, w, w, self._width)
        encoder = self._encoders["key"]
        shape = (*grid, self._network.qk_dim)
        wide = working_dtype(self._dtype)
        sums = self._image.new_zeros(shape, dtype=wide), self._image.new_zeros(shape, dtype=wide)
        for rows in self._bands_of_rows():
            kept = self._kept.band(rows)
            has_come = kept is not None and self._kept.state.get(rows.start) == "key"
            pixels = kept if kept is not None and has_come else self._guidance_of_band(rows, kept)
            branch = self._work.take("branch", *pixels.shape[:2])
            trunk = pixels
            if kept is not None and not has_come:
                trunk = self._work.take("second", *pixels.shape[:2])
            encoder.add_to_cells(pixels, trunk, branch, rows, cells, sums, kept=has_come)
        return encoder.pooled(cells, sums).to(self._dtype)

    def _query_trunk(self, rows: slice, columns: slice) -> tuple[Tensor, bool]:
        """Some rows and columns, and whether they are the query encoder's trunk, or else the encoded image."""
        width = columns.stop - columns.start
        trunk = self._work.take("trunk", rows.stop - rows.start, width)
        branch = self._work.take("branch", rows.stop - rows.start, width)
        together = self._bands.together
        state = "encoded" if together else "query"
        for part, kept in self._kept.pieces(rows, state):
            place = slice(part.start - rows.start, part.stop - rows.start)
            if kept is not None:
                trunk[place] = kept[:, columns]
                continue
            self._guidance(part, trunk[place], branch[place], columns)
            if not together:
                self._encoders["query"].begin(trunk[place], trunk[place], branch[place])
        return trunk, not together

    def _guidance_of_band(self, rows: slice, kept: Tensor | None) -> Tensor:
        """(rows, columns, D): the encoded image, in the band's kept map where there is one."""
        trunk, branch = self._maps(rows, kept)
        state = None if kept is None else self._kept.state.get(rows.start)
        if state == "encoded":
            return trunk
        duplicate = self._encoded.band(rows)
        if duplicate is not None and self._encoded.state.get(rows.start) == "encoded":
            return trunk.copy_(duplicate)
        self._guidance(rows, trunk, branch, kept=state == "image")
        self._kept.note(rows, "encoded")
        if duplicate is not None:
            duplicate.copy_(trunk)
            self._encoded.note(rows, "encoded")
        return trunk

    def _guidance(
        self, rows: slice, trunk: Tensor, branch: Tensor, columns: slice | None = None, *, kept: bool = False
    ) -> Tensor:
        """(rows, columns, D): the encoded image, in the trunk; all columns if None."""
        columns = slice(0, self._width) if columns is None else columns
        rotation = self._rotation.part(rows, columns)
        return self._encoders["image"].encode(self._pixels(rows, columns), trunk, branch, rotation, kept=kept)

    def _new(self, rows: int) -> Tensor:
        return self._work.new(rows, self._width)

    def _maps(self, rows: slice, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Trunk and branch of a band: (rows, columns, D)."""
        size = rows.stop - rows.start, self._width
        trunk = self._work.take("trunk", *size) if kept is None else kept
        return trunk, self._work.take("branch", *size)

    def _pixels(self, rows: slice, columns: slice | None = None) -> Tensor:
        """(rows, columns, C): what the image encoder takes; None: all columns."""
        columns = slice(0, self._width) if columns is None else columns
        return self._network.image_encoder.prepare_part(self._image, rows, columns, self._dtype)

    def _bands_of_rows(self) -> Iterator[slice]:
        for first in range(0, self._height, self._bands.rows):
            yield slice(first, min(first + self._bands.rows, self._height))


class _Kept:
    """Maps (rows, columns, D) of an image's first bands, and what each holds.

    Args:
        new: makes a map of so many rows.
        rows: how many there are.
        lasting: how many of them, the first, are kept by `trim`.

    Attributes:
        state: of the band that begins with a row: "image", "key" or "query", the trunk that this encoder's last pass
            left, or "encoded", the encoded image.
    """

    def __init__(self, new: Callable[[int], Tensor], rows: int, lasting: int = 0) -> None:
        self._new = new
        # Two maps, so that the memory of one can go.
        self._parts = [slice(0, lasting), slice(lasting, rows)]
        self._maps: dict[int, Tensor] = {}
        self.state: dict[int, str] = {}

    def band(self, rows: slice) -> Tensor | None:
        """The map of a band, or None where it keeps nothing."""
        for index, part in enumerate(self._parts):
            if part.start <= rows.start < part.stop:
                if index not in self._maps:
                    self._maps[index] = self._new(part.stop - part.start)
                return self._maps[index][rows.start - part.start : rows.stop - part.start]
        return None

    def note(self, rows: slice, state: str) -> None:
        """What a band's map holds from now on, if it has one."""
        if rows.start < self._parts[-1].stop:
            self.state[rows.start] = state

    def trim(self) -> None:
        """Give the memory of what does not last back."""
        self._maps.pop(1, None)
        self._parts = self._parts[:1]
        self.state = {first: state for first, state in self.state.items() if first < self._parts[0].stop}

    def pieces(self, rows: slice, state: str) -> Iterator[tuple[slice, Tensor | None]]:
        """These rows in runs: with their map where it holds this, and with None where they have none."""
        stop = rows.start
        lasting = self._maps.get(0)
        if lasting is not None and set(self.state.values()) == {state}:
            stop = max(min(rows.stop, self._parts[0].stop), rows.start)
            if stop > rows.start:
                yield slice(rows.start, stop), lasting[rows.start : stop]
        if stop < rows.stop:
            yield slice(stop, rows.stop), None
