"""The properties of a call or a stream that its memory and its work depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anyup.budget import check_room
from anyup.layers import encoded_size
from anyup.ops.parallel import tile_threads, workers_of
from anyup.ops.pixel_encoder.thin import MOST_CHANNELS
from anyup.window import Window, make_window

Size = tuple[int, int]


@dataclass(frozen=True)
class Task:
    """The properties of a call or a stream that its memory and its work depend on.

    Attributes:
        image, output, grid: sizes (height, width); the image's once it is encoded (`encoded_size`).
        batch: the number of images.
        channels: the number of channels of the features.
        value_channels: the number of channels of the output.
        dtype: the dtype of the queries and keys.
        value_dtype, out_dtype: the dtypes of the values and of the output.
        device_type: "cpu", "cuda", ...
        threads: the number of a CPU's threads.
        returned: True: the call allocates the output and returns it. False: a stream, which returns pieces.
        region: (top, left, height, width) of the output that is computed.
        tile: (rows, columns) of a piece; None: as many full rows as are computed at a time.
        context: what an `ImageContext` holds: "nothing" (there is no context), "queries", or "all" (the pooled keys
            of the grid too).
        mapped: whether pieces are written to a memory map, whose pages are resident until they are on the disk.
        own_rows: rows of the encoded image whose statistics this process takes, other processes those of the rest;
            None: all of them, by one process.
    """

    image: Size
    output: Size
    grid: Size
    batch: int
    channels: int
    value_channels: int
    dtype: torch.dtype
    value_dtype: torch.dtype
    out_dtype: torch.dtype
    device_type: str
    threads: int
    window: Window
    returned: bool
    region: tuple[int, int, int, int]
    tile: Size | None = None
    context: str = "nothing"
    mapped: bool = False
    own_rows: int | None = None
    dim: int = 128
    heads: int = 4
    input_dim: int = 3
    filters: int = 128
    filter_size: int = 5
    kernel_size: int = 1

    @property
    def own(self) -> Size:
        """(rows, columns) of the encoded image whose statistics this process takes."""
        return self.image[0] if self.own_rows is None else self.own_rows, self.image[1]

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one pixel of a map of D channels."""
        return self.dim * self.dtype.itemsize

    @property
    def is_thin(self) -> bool:
        """Whether the image encoder's first projection is never stored."""
        return self.kernel_size == 1 and self.input_dim <= MOST_CHANNELS

    @property
    def images_at_once(self) -> int:
        """How many images are computed side by side: a call takes one after the other, a stream the whole batch."""
        return 1 if self.returned else self.batch

    @property
    def workers(self) -> int:
        """The number of threads that each compute a tile."""
        return workers_of(self.threads) if self.device_type == "cpu" else 1

    @property
    def piece(self) -> Size:
        """The smallest (rows, columns) of the output that must be in memory at once."""
        if self.returned:
            return self.output
        _, _, height, width = self.region
        rows, columns = self.tile or (1, width)
        return min(rows, height), min(columns, width)

    @property
    def needs_queries(self) -> bool:
        """Whether the queries must be computed, because no context holds them."""
        return self.context == "nothing"

    def check_room(self, device: torch.device, *, whole: bool) -> None:
        """Raise ValueError where the result alone, or with the queries, exceeds the free memory of the device.

        `whole`: the queries of all output pixels are in memory at once.
        """
        height, width = self.piece
        shape = f"{self.batch} x {self.value_channels} x {height} x {width}"
        what, hint = f"output_size: the result, {shape},", "`stream` makes it in pieces, out= can be a file"
        if not self.returned:
            what, hint = f"tile: a piece, {shape},", "smaller ones take less"
        needed = self.batch * self.value_channels * height * width * self.out_dtype.itemsize
        check_room(needed, what, device, hint)
        if whole and self.needs_queries:
            needed += self.batch * pixels_of(self.output) * self.pixel_bytes
            check_room(needed, f"{what} with the queries of all pixels", device, "max_memory= keeps less")


def make_task(config: Mapping[str, Any], device_type: str, *, image: Size, **asked: Any) -> Task:
    """The task for an image of a size and an upsampler with these constructor arguments (`AnyUp.config`)."""
    return Task(
        image=encoded_size(image, config["kernel_size"]),
        device_type=device_type,
        threads=tile_threads() if device_type == "cpu" else 1,
        window=make_window(config["window"], config["window_ratio"]),
        dim=config["qk_dim"],
        heads=config["num_heads"],
        input_dim=config["input_dim"],
        filters=config["lfu_dim"],
        filter_size=config["kernel_size_lfu"],
        kernel_size=config["kernel_size"],
        **asked,
    )


def pixels_of(size: Sequence[int]) -> int:
    """The number of pixels of a size (height, width)."""
    return size[0] * size[1]
