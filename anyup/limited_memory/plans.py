"""A plan: the bands of an image, which maps are stored and which are recomputed, and each stage's work and memory."""

from __future__ import annotations

from dataclasses import dataclass

from anyup.limited_memory.task import Task
from anyup.ops.precision import dtype_name
from anyup.progress import human_bytes

HALO = 1
"""Pixels that the queries' 3x3 convolution reads beyond each side of a rectangle."""


@dataclass(frozen=True)
class Bands:
    """The bands of an image, and for how many rows, from the first on, a map is stored between the passes.

    Attributes:
        rows: the number of image rows in a band.
        output_rows: the number of output rows that are computed at a time.
        together: True: each pass serves the key and the query encoder, and the stored map is the encoded image.
            False: the query encoder's passes follow the key encoder's, and the stored map is the trunk of the encoder
            that runs.
        kept: the number of rows whose map is stored while the statistics are computed.
        kept_for_output: the number of rows whose map is still stored while the output is computed.
        encoded: the number of rows for which the encoded image is stored as well (0 if `together`).
    """

    rows: int
    output_rows: int
    together: bool = True
    kept: int = 0
    kept_for_output: int = 0
    encoded: int = 0


def band_rows(width: int, pixels: int) -> int:
    """The number of rows of a band with about `pixels` pixels, at least one."""
    return max(1, pixels // width)


def output_rows(rows: int, image_height: int, output_height: int) -> int:
    """The number of output rows that need `rows` image rows, the halo of the convolution included."""
    return max(1, rows * output_height // image_height - 2 * HALO)


@dataclass(frozen=True)
class Stage:
    """A stage of a plan: its name, its number of D x D products, and its peak of memory."""

    name: str
    products: float
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a call will keep and compute again; `print` it.

    Attributes:
        task: what the call or stream computes.
        order: "whole" (maps of the whole batch), "image by image" (maps of one whole image), or "bands".
        bands: the bands of each image; None where `order` is not "bands".
        stages: in the order in which they run.
        limit: the budget in bytes; None: no limit.
        plain_products: the D x D products of the call without a budget.
    """

    task: Task
    order: str
    bands: Bands | None
    stages: tuple[Stage, ...]
    limit: int | None
    plain_products: float

    @property
    def peak_bytes(self) -> int:
        """The most memory that the call allocates at a time, predicted."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def products(self) -> float:
        """The D x D products of all stages."""
        return sum(stage.products for stage in self.stages)

    @property
    def cost(self) -> float:
        """Work relative to the call without a budget."""
        return self.products / max(self.plain_products, 1)  # of an empty batch

    def kept(self) -> str:
        """Which maps are stored between the passes, in words."""
        bands, (height, _) = self.bands, self.task.image
        if bands is None:
            return "whole maps" + (" of one image at a time" if self.order == "image by image" else "")
        if not bands.kept:
            return "nothing"
        what = "the encoded image" if bands.together else "one map"
        share = _share(bands.kept, height)
        if bands.kept_for_output < bands.kept:
            share += f", then {_share(bands.kept_for_output, height)}"
        more = f"; the encoded image beside it for {_share(bands.encoded, height)}" if bands.encoded else ""
        return f"{what} for {share}{more}"

    def __str__(self) -> str:
        task = self.task
        size = "{} x {}".format(*task.output)
        if task.region[2:] != task.output:
            size = "{} x {} at ({}, {}) of ".format(*task.region[2:], *task.region[:2]) + size
        batch = "" if task.batch == 1 else f", batch {task.batch}"
        dtype = dtype_name(task.dtype)
        limit = "" if self.limit is None else f" of {human_bytes(self.limit)}"
        lines = [
            f"{size} from {task.grid[0]} x {task.grid[1]}{batch}, {task.value_channels} channels, {dtype}, "
            f"{task.device_type}: {human_bytes(self.peak_bytes)}{limit}, {self.cost:.2f} times the work",
            f"kept: {self.kept()}" + ("" if self.bands is None else f"; bands of {self.bands.rows} rows"),
        ]
        pixels = task.batch * task.output[0] * task.output[1]
        lines += [
            f"  {stage.name:<28} {stage.products / pixels:6.1f} products a pixel   {human_bytes(stage.peak_bytes):>8}"
            for stage in self.stages
        ]
        return "\n".join(lines)


def _share(rows: int, height: int) -> str:
    return "all rows" if rows >= height else f"{100 * rows / height:.0f} % of the rows"
