"""The queries and the image keys of one image, computed band by band; a plan says which maps stay in memory meanwhile.

A normalisation needs the statistics of the whole map. So every band goes through the image encoder four times, and
then through the query and the key encoder four times, before the first query is known. A band without a stored map
starts each of these passes from the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyup.layers import encoded_size
from anyup.limited_memory.plans import HALO, Bands
from anyup.limited_memory.share import Share
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


def reach(span: slice, count: int, length: int) -> Cells:
    """The output cells of an axis that the 3x3 convolution reads for a slice of the output."""
    return Cells(max(span.start - HALO, 0), min(span.stop + HALO, count), count, length)


class Workspace:
    """Scratch maps (rows, columns, D), allocated when first needed and reused for every band."""

    def __init__(self, like: Tensor, dim: int) -> None:
        self._like, self._dim = like, dim
        self._maps: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """The scratch map of a name; its values are undefined."""
        size = rows * columns * self._dim
        if name not in self._maps or self._maps[name].numel() < size:
            self._maps.pop(name, None)  # before the larger map is allocated, so that both never exist together
            self._maps[name] = self.new(rows, columns).flatten()
        return self._maps[name][:size].view(rows, columns, self._dim)

    def new(self, rows: int, columns: int) -> Tensor:
        """A new map, which the workspace does not reuse."""
        return memory.empty((rows, columns, self._dim), self._like)

    def clear(self) -> None:
        """Free all scratch maps."""
        self._maps.clear()


def check_backends(network: Network, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Raise NotImplementedError where no backend that the model asks for can encode an image of a size in bands."""
    for encoder in _encoders(network).values():
        check_backend(problem_of(*encoder.channels_of_op, size, dtype, device), network.backends["pixel_encoder"])


def _encoders(network: Network) -> dict[str, Encoder]:
    return {"image": network.image_encoder, "key": network.key_encoder, "query": network.query_encoder}


class BandedImage:
    """The queries of any rectangle of the output, and the pooled keys, of one image.

    Args:
        network: the weights; no gradient is computed.
        image: (input_dim, Hi, Wi).
        size: (H, W) of the output.
        dtype: the dtype of the queries and keys.
        bands: the size of the bands, and which of them store a map.
        workspace: the scratch maps; several images may share it.
        needs_queries: False where the caller needs the pooled keys only.
        share: what this process has of the image, and takes the statistics of; None: all of it.
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
        share: Share | None = None,
    ) -> None:
        self._network, self._image, self._size, self._dtype = network, image, size, dtype
        self._share = Share.whole(image.shape[1], network.config["kernel_size"]) if share is None else share
        whole = self._share.image_height, image.shape[2]
        self._height, self._width = encoded_size(whole, network.config["kernel_size"])
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
        """Change the bands: stored maps are dropped, and the statistics of complete passes are kept."""
        self._bands = bands
        self._work.clear()
        first = self._share.rows.start
        self._stored = _StoredMaps(self._new, first, bands.kept, bands.kept_for_output)
        self._encoded = _StoredMaps(self._new, first, bands.encoded)
        for encoder in self._encoders.values():
            encoder.abandon_pass()

    def image_keys(self, grid: tuple[int, int]) -> Tensor:
        """The keys pooled to a grid, (1, h, w, D). It computes the statistics of every normalisation first.

        A second call after an error repeats only the pass that failed and those after it.
        """
        return self._with_fallback(lambda: self._image_keys(grid))

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
        self._stored.trim()
        self._encoded.trim()
        self._work.clear()
        return self._pooled[None]

    def queries(self, rows: slice, columns: slice) -> Tensor:
        """The queries of a rectangle of the output, (1, rows, columns, heads, head_dim); call `image_keys` first."""
        axes = zip((rows, columns), self._size, (self._height, self._width), strict=True)
        row_cells, column_cells = (reach(span, count, length) for span, count, length in axes)

        def encoded_cells() -> Tensor:
            trunk, resumes = self._query_trunk(row_cells.pixels, column_cells.pixels)
            branch = self._work.take("branch", *trunk.shape[:2])
            return self._encoders["query"].encode_pooled(trunk, trunk, branch, row_cells, column_cells, resumes=resumes)

        with without_autocast(self._image.device.type):
            encoded = self._with_fallback(encoded_cells)
            parameters = self._network.cross_decode.query_parameters(self._dtype)
            projected = query_projection.project_queries(
                encoded[None], parameters, backend=self._network.backends["query_projection"]
            )
        within = [
            slice(span.start - cells.first, span.stop - cells.first)
            for span, cells in zip((rows, columns), (row_cells, column_cells), strict=True)
        ]
        return self._network.cross_decode.split_heads(projected[:, within[0], within[1]])

    def queries_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Queries (N, heads, head_dim) of output pixels at `rows`, `columns` (N,) on the CPU; after `image_keys`."""
        axes = [
            Cells(0, count, count, length).around(position, HALO)
            for position, count, length in zip((rows, columns), self._size, (self._height, self._width), strict=True)
        ]
        pixels_of_point = math.prod(pixel.shape[1] * pixel.shape[2] for pixel, _ in axes)
        step = max(1, self._bands.rows * self._width // pixels_of_point)
        batches = zip(*(each.split(step) for axis in axes for each in axis), strict=True)
        parameters = self._network.cross_decode.query_parameters(self._dtype)
        with without_autocast(self._image.device.type):
            found = [project_neighbourhoods(self._neighbourhoods(*batch), parameters) for batch in batches]
        return self._network.cross_decode.split_heads(torch.cat(found))

    def _neighbourhoods(self, rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor) -> Tensor:
        """What the 3x3 convolution reads, (n, 3, 3, D): each cell is the mean of m x m pixels of the query encoder.

        Args:
            rows, row_weights, columns, column_weights: (n, 3, m), positions of the pixels and their weights.
        """
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
        near = self._with_fallback(encoded)[place.to(self._image.device)].to(wide)  # (n, 3, 3, m, m, D)
        return (near * weights[..., None].to(near)).sum(dim=(3, 4)).to(self._dtype)

    def _with_fallback(self, work: Callable[[], Tensor]) -> Tensor:
        """The result of `work`; where kernels fail, repeat it on the next backend, and drop the stored maps."""
        while True:
            try:
                return work()
            except BackendFailure as failure:
                next(encoder for encoder in self._encoders.values() if encoder.runs_kernels).give_up(failure)
            for encoder in self._encoders.values():
                encoder.choose()
            self.use_bands(self._bands)

    def _pass(self, gather: Callable[[slice], None], *encoders: BandedEncoder) -> None:
        """Run `gather` on every band of this process, then merge the statistics of the encoders."""
        for encoder in encoders:
            encoder.abandon_pass()
        for rows in self._bands_of_rows():
            gather(rows)
        for encoder in encoders:
            encoder.finish_pass(self._share.join)

    def _gather_image(self, rows: slice) -> None:
        stored = self._stored.band(rows)
        trunk, branch = self._maps(rows, stored)
        resumes = self._stored.holds(rows, Holds.IMAGE)
        self._encoders["image"].accumulate_statistics(
            self._pixels(rows), trunk, branch, stores=stored is not None, resumes=resumes
        )
        self._stored.note(rows, Holds.IMAGE)

    def _gather_encoded(self, encoders: list[BandedEncoder], rows: slice) -> None:
        stored = self._stored.band(rows)
        guidance = self._guidance_of_band(rows, stored)
        branch = self._work.take("branch", *guidance.shape[:2])
        for encoder in encoders:
            last = stored is None and encoder is encoders[-1]
            trunk = guidance if last else self._work.take("second", *guidance.shape[:2])
            encoder.accumulate_statistics(guidance, trunk, branch)

    def _gather_alone(self, name: str, rows: slice) -> None:
        stored = self._stored.band(rows)
        trunk, branch = self._maps(rows, stored)
        resumes = self._stored.holds(rows, Holds(name))
        if not resumes:
            trunk = self._guidance_of_band(rows, stored)
        self._encoders[name].accumulate_statistics(trunk, trunk, branch, stores=stored is not None, resumes=resumes)
        self._stored.note(rows, Holds(name))

    def _pool(self, grid: tuple[int, int]) -> Tensor:
        """The key encoder's map pooled to a grid, (h, w, D)."""
        h, w = grid
        own = Cells(0, h, h, self._height).touching(self._share.rows)
        cells = Cells(own.start, own.stop, h, self._height), Cells(0, w, w, self._width)
        encoder = self._encoders["key"]
        shape = (len(own), w, self._network.qk_dim)
        wide = working_dtype(self._dtype)
        sums = self._image.new_zeros(shape, dtype=wide), self._image.new_zeros(shape, dtype=wide)
        for rows in self._bands_of_rows():
            stored = self._stored.band(rows)
            resumes = self._stored.holds(rows, Holds.KEY)
            pixels = stored if stored is not None and resumes else self._guidance_of_band(rows, stored)
            branch = self._work.take("branch", *pixels.shape[:2])
            trunk = pixels
            if stored is not None and not resumes:
                trunk = self._work.take("second", *pixels.shape[:2])
            encoder.add_to_cells(pixels, trunk, branch, rows, cells, sums, resumes=resumes)
        return self._share.join_cells(encoder.pooled(cells, sums) if own else sums[0], own, h).to(self._dtype)

    def _query_trunk(self, rows: slice, columns: slice) -> tuple[Tensor, bool]:
        """A rectangle of the encoded image, and False; or of the query encoder's trunk, and True."""
        width = columns.stop - columns.start
        trunk = self._work.take("trunk", rows.stop - rows.start, width)
        branch = self._work.take("branch", rows.stop - rows.start, width)
        together = self._bands.together
        for some, stored in self._stored.pieces(rows, Holds.ENCODED if together else Holds.QUERY):
            place = slice(some.start - rows.start, some.stop - rows.start)
            if stored is not None:
                trunk[place] = stored[:, columns]
                continue
            self._guidance(some, trunk[place], branch[place], columns)
            if not together:
                self._encoders["query"].begin(trunk[place], trunk[place], branch[place])
        return trunk, not together

    def _guidance_of_band(self, rows: slice, stored: Tensor | None) -> Tensor:
        """The encoded image of a band, (rows, columns, D), written into the band's stored map if it has one."""
        trunk, branch = self._maps(rows, stored)
        if self._stored.holds(rows, Holds.ENCODED):
            return trunk
        duplicate = self._encoded.band(rows)
        if duplicate is not None and self._encoded.holds(rows, Holds.ENCODED):
            return trunk.copy_(duplicate)
        self._guidance(rows, trunk, branch, resumes=self._stored.holds(rows, Holds.IMAGE))
        self._stored.note(rows, Holds.ENCODED)
        if duplicate is not None:
            duplicate.copy_(trunk)
            self._encoded.note(rows, Holds.ENCODED)
        return trunk

    def _guidance(
        self, rows: slice, trunk: Tensor, branch: Tensor, columns: slice | None = None, *, resumes: bool = False
    ) -> Tensor:
        """Encode rows of the image into `trunk`, (rows, columns, D); `columns` None means all columns."""
        columns = slice(0, self._width) if columns is None else columns
        rotation = self._rotation.part(rows, columns)
        return self._encoders["image"].encode(self._pixels(rows, columns), trunk, branch, rotation, resumes=resumes)

    def _new(self, rows: int) -> Tensor:
        return self._work.new(rows, self._width)

    def _maps(self, rows: slice, stored: Tensor | None) -> tuple[Tensor, Tensor]:
        """A band's maps (rows, columns, D): the trunk, which is the stored map if there is one, and the branch."""
        size = rows.stop - rows.start, self._width
        trunk = self._work.take("trunk", *size) if stored is None else stored
        return trunk, self._work.take("branch", *size)

    def _pixels(self, rows: slice, columns: slice | None = None) -> Tensor:
        """The image encoder's input, (rows, columns, C); `columns` None means all columns."""
        columns = slice(0, self._width) if columns is None else columns
        held = self._share.first_row, self._share.image_height
        return self._network.image_encoder.prepare_part(self._image, rows, columns, self._dtype, held)

    def _bands_of_rows(self) -> Iterator[slice]:
        own = self._share.rows
        for first in range(own.start, own.stop, self._bands.rows):
            yield slice(first, min(first + self._bands.rows, own.stop))


class Holds(Enum):
    """What a band's stored map holds: the trunk after the last pass of an encoder, or the encoded image."""

    IMAGE = "image"
    KEY = "key"
    QUERY = "query"
    ENCODED = "encoded"


class _StoredMaps:
    """The stored maps (rows, columns, D) of a process's first bands, and what each of them holds.

    Args:
        new: allocates a map with a number of rows.
        first: the first band's first row.
        rows: the number of rows that have a stored map.
        lasting: the number of rows, from the first on, whose map `trim` does not free.
    """

    def __init__(self, new: Callable[[int], Tensor], first: int, rows: int, lasting: int = 0) -> None:
        self._new = new
        # Two maps, so that `trim` can free one of them.
        self._ranges = [slice(first, first + lasting), slice(first + lasting, first + rows)]
        self._maps: dict[int, Tensor] = {}
        self._contents: dict[int, Holds] = {}  # by the band's first row

    def band(self, rows: slice) -> Tensor | None:
        """The stored map of a band; None where it has none."""
        for index, held in enumerate(self._ranges):
            if held.start <= rows.start < held.stop:
                if index not in self._maps:
                    self._maps[index] = self._new(held.stop - held.start)
                return self._maps[index][rows.start - held.start : rows.stop - held.start]
        return None

    def holds(self, rows: slice, what: Holds) -> bool:
        """Whether a band has a stored map, and it holds this."""
        return self._contents.get(rows.start) is what

    def note(self, rows: slice, what: Holds) -> None:
        """Record what the stored map of a band holds from now on; nothing for a band without one."""
        if rows.start < self._ranges[-1].stop:
            self._contents[rows.start] = what

    def trim(self) -> None:
        """Free the maps of the rows beyond `lasting`."""
        self._maps.pop(1, None)
        self._ranges = self._ranges[:1]
        self._contents = {first: what for first, what in self._contents.items() if first < self._ranges[0].stop}

    def pieces(self, rows: slice, what: Holds) -> Iterator[tuple[slice, Tensor | None]]:
        """Split rows in runs: those whose stored map holds this, with the map; and those around, with None."""
        start = stop = rows.start
        lasting, stored = self._maps.get(0), self._ranges[0]
        if lasting is not None and set(self._contents.values()) == {what}:
            start = min(max(rows.start, stored.start), rows.stop)
            stop = max(min(rows.stop, stored.stop), start)
        if rows.start < start:
            yield slice(rows.start, start), None
        if start < stop:
            assert lasting is not None
            yield slice(start, stop), lasting[start - stored.start : stop - stored.start]
        if stop < rows.stop:
            yield slice(stop, rows.stop), None
