"""How a call stays within a budget of memory: what is kept, what is computed again, and what that costs.

Products are those of D x D for each pixel, the unit in which docs/memory.md counts. What is kept is whole maps where
they fit; else, for as many rows of the image as fit, one map: the trunk of whichever encoder is at work (the passes of
the key and the query encoder one after the other), or, where less than about half of the rows have room, the encoded
image (their passes side by side, because what keeps nothing is then encoded half as often).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyup.banded import HALO, Bands, band_rows, output_rows
from anyup.budget import limit_on
from anyup.image_context import ImageContext
from anyup.ops.pixel_encoder.thin import MOST_CHANNELS
from anyup.ops.precision import FLOATING, working_dtype
from anyup.ops.window_attention.eager import scratch_bytes
from anyup.problem import check_region, check_size, check_tile
from anyup.progress import human_bytes
from anyup.window import Window, axis_bounds, make_window

if TYPE_CHECKING:
    from anyup.model import AnyUp

BAND_PIXELS = 2**16
"""Pixels of a band where nobody sets a limit: some 30 MB for each map of 128 float32 channels."""

Size = tuple[int, int]

# Of the published architecture, as `AnyUp.config` has them.
_DEFAULTS = {
    "input_dim": 3,
    "qk_dim": 128,
    "kernel_size": 1,
    "kernel_size_lfu": 5,
    "window_ratio": 0.1,
    "num_heads": 4,
    "lfu_dim": 128,
    "window": "ratio",
}

# Bytes that libraries take beside tensors: workspaces, compiled code, what an allocator keeps.
_OVERHEAD = 55 * 10**6
_OVERHEAD_OF_A_THREAD = 20 * 10**6
_OVERHEAD_ELSEWHERE = 150 * 10**6

# Of a memory map: pages that a piece makes resident, in its size, their neighbours included.
_PAGES = 3

# Of the limit: predictions are this exact on a CPU; a GPU's allocator rounds besides, and leaves gaps.
_USABLE = {"cpu": 0.98}
_USABLE_ELSEWHERE = 0.97

# Stages of banded work that follow the statistics.
_AFTER = 2

# Bands that are tried under a limit, in pixels.
_BANDS = tuple(2**n for n in range(18, -1, -1))


@dataclass(frozen=True)
class Task:
    """What a call or a stream asks for, as far as memory and work depend on it.

    Attributes:
        image, output, grid: sizes (height, width).
        batch: images.
        channels: of the features.
        carried: channels of the output.
        dtype: that queries and keys are computed in.
        value_dtype, out_dtype: of what is carried, and of the output.
        device_type: "cpu", "cuda", ...
        threads: of a CPU.
        returned: whether the call allocates the output; otherwise pieces are handed over.
        region: (top, left, height, width) of the output.
        tile: (rows, columns) of a piece; None: what is worked on at a time.
        context: what an `ImageContext` brings: "nothing", "queries", or "all".
        mapped: whether pieces go to a memory map, whose pages are resident until they are on the disk.
    """

    image: Size
    output: Size
    grid: Size
    batch: int
    channels: int
    carried: int
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
    dim: int = 128
    heads: int = 4
    input_dim: int = 3
    filters: int = 128
    filter_size: int = 5
    kernel_size: int = 1

    @property
    def pixel_bytes(self) -> int:
        """Of one pixel of a map of D channels."""
        return self.dim * self.dtype.itemsize

    @property
    def is_thin(self) -> bool:
        """Whether the image encoder's first projection is never stored."""
        return self.kernel_size == 1 and self.input_dim <= MOST_CHANNELS

    @property
    def images_at_once(self) -> int:
        """Bands of how many images are worked on before the next: a piece of a stream holds all."""
        return 1 if self.returned else self.batch

    @property
    def needs_queries(self) -> bool:
        """Whether the image's queries are still to be made."""
        return self.context == "nothing"


@dataclass(frozen=True)
class Stage:
    """A part of the work: what it does, its products of D x D in all, and the most memory in it."""

    name: str
    products: float
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a call will keep and compute again; `print` it.

    Attributes:
        task: what is asked for.
        order: "whole" (maps of the whole batch), "image by image" (maps of one whole image), or "bands".
        bands: how each image is cut; None where it is not.
        stages: in their order.
        limit: the budget in bytes; None: none.
        plain_products: of the whole call without a budget.
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
        """All products of D x D."""
        return sum(stage.products for stage in self.stages)

    @property
    def cost(self) -> float:
        """Work relative to the call without a budget."""
        return self.products / max(self.plain_products, 1)  # of an empty batch

    def kept(self) -> str:
        """What is kept between the passes, in words."""
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
        dtype = str(task.dtype).removeprefix("torch.")
        limit = "" if self.limit is None else f" of {human_bytes(self.limit)}"
        lines = [
            f"{size} from {task.grid[0]} x {task.grid[1]}{batch}, {task.carried} channels, {dtype}, "
            f"{task.device_type}: {human_bytes(self.peak_bytes)}{limit}, {self.cost:.2f} times the work",
            f"kept: {self.kept()}" + ("" if self.bands is None else f"; bands of {self.bands.rows} rows"),
        ]
        pixels = task.batch * task.output[0] * task.output[1]
        lines += [
            f"  {stage.name:<28} {stage.products / pixels:6.1f} products a pixel   {human_bytes(stage.peak_bytes):>8}"
            for stage in self.stages
        ]
        return "\n".join(lines)


class BudgetError(ValueError):
    """No plan keeps to the limit.

    Attributes:
        smallest: the least number of bytes that would do.
    """

    def __init__(self, task: Task, limit: int, smallest: int) -> None:
        self.smallest = smallest
        what = "its output included" if task.returned else "its pieces included"
        super().__init__(
            f"max_memory: this call cannot be done in {human_bytes(limit)}; the smallest budget that can is "
            f"{human_bytes(_round_up(smallest))} ({smallest} bytes, {what})"
        )


def plan(
    image_size: Sequence[int],
    feature_size: Sequence[int],
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    max_memory: int | str | None = None,
    output_size: Sequence[int] | None = None,
    *,
    values: int | None = None,
    batch: int = 1,
    stream: bool = False,
    region: Sequence[int] | None = None,
    tile: int | Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    upsampler: AnyUp | None = None,
) -> Plan:
    """What a call or a stream would keep, compute again, take and cost; nothing is computed, no such device is needed.

    Predicted for the `torch` backend, which takes the most memory; a Triton kernel needs no scratch for the attention.

    Args:
        image_size, feature_size: (height, width).
        channels: of the features.
        dtype: of the upsampler's parameters and of the features.
        device: "cpu", "cuda", ...; it need not exist.
        max_memory: as in the call; None: no limit on a CPU or a device that is not there, else 90 % of what is free.
        output_size: (H, W); None means the image's size.
        values: channels that are carried instead of the features: a head's outputs, for example.
        batch: images.
        stream: plan `stream`, not the call (as the call with `out=` runs, too).
        region, tile, out_dtype: of a stream (its `dtype`).
        upsampler: one with other than the default widths and window.

    Raises:
        ValueError, TypeError: which argument, what was expected, what came.
        BudgetError: a ValueError that names the smallest budget that can be met.
    """
    image, grid = check_size("image_size", image_size), check_size("feature_size", feature_size)
    output = image if output_size is None else check_size("output_size", output_size)
    for name, number in (("channels", channels), ("batch", batch), ("values", channels if values is None else values)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected a positive integer, got {number!r}")
    for name, kind in (("dtype", dtype), ("out_dtype", out_dtype or dtype)):
        if kind not in FLOATING:
            raise TypeError(f"{name}: expected a floating-point dtype of 16, 32 or 64 bits, got {kind!r}")
    if not stream and not (region is None and tile is None and out_dtype is None):
        raise ValueError("region, tile and out_dtype belong to a stream: pass stream=True")
    device = torch.device(device)
    where = check_region(region, output)
    config = dict(_DEFAULTS if upsampler is None else upsampler.config)
    task = _task(
        config,
        image=image,
        output=output,
        grid=grid,
        batch=batch,
        channels=channels,
        carried=channels if values is None else values,
        dtype=dtype,
        value_dtype=dtype,
        out_dtype=out_dtype or dtype,
        device_type=device.type,
        returned=not stream,
        region=where,
        tile=check_tile(tile, where[2:]),
    )
    return choose(task, limit_on(device, max_memory))


def choose(task: Task, limit: int | None, *, keep: bool = False) -> Plan:
    """The plan with the least work among those that keep to the limit.

    Without one a call keeps whole maps, and so does a stream with `keep`; another stream keeps nothing.

    Raises:
        BudgetError: there is none.
    """
    if limit is None:
        return _whole(task, None) if keep or task.returned or task.context == "all" else _unlimited_stream(task)
    share = _USABLE.get(task.device_type, _USABLE_ELSEWHERE)
    room = int(share * limit)
    candidates = [plan for plan in _whole_plans(task, limit) if plan.peak_bytes <= room]
    smallest = min(plan.peak_bytes for plan in _whole_plans(task, limit))
    if not candidates or candidates[0].cost > 1:
        for bands in _cuts(task):
            least = _banded(task, bands, limit)
            smallest = min(smallest, least.peak_bytes)
            if least.peak_bytes <= room:
                candidates.append(_fill(task, bands, limit, room))
    if not candidates:
        raise BudgetError(task, limit, math.ceil(smallest / share))
    return min(candidates, key=_effort)


def _effort(plan: Plan) -> tuple[float, int]:
    """What to choose by: the work, more of it where bands are so small that threads, or a GPU, have little to do."""
    if plan.bands is None:
        return plan.products, plan.peak_bytes
    task = plan.task
    waste = 1024 * _workers(task) if task.device_type == "cpu" else 2**14
    return plan.products * (1 + waste / (plan.bands.rows * task.image[1])), plan.peak_bytes


def rows_at_once(plan: Plan) -> int:
    """Rows of the output that are worked on at a time, where it is not made at once."""
    most = band_rows(plan.task.output[1], BAND_PIXELS) if plan.bands is None else plan.bands.output_rows
    return min(most, plan.task.region[2])


def task_of(
    model: AnyUp,
    image: Tensor | ImageContext,
    features: Tensor,
    size: Size,
    *,
    values: Tensor | None,
    region: tuple[int, int, int, int] | None = None,
    tile: Size | None = None,
    dtype: torch.dtype | None = None,
) -> Task:
    """What these (checked) arguments of a call ask for, or, with a region, of a stream."""
    carried = features if values is None else values
    grid, context = (features.shape[2], features.shape[3]), "nothing"
    if isinstance(image, ImageContext):
        context, image = "all" if grid in image.image_keys else "queries", image.image
    return _task(
        model.config,
        image=(image.shape[2], image.shape[3]),
        output=size,
        grid=grid,
        batch=image.shape[0],
        channels=features.shape[1],
        carried=carried.shape[1],
        dtype=model._compute_dtype(image.device),
        value_dtype=carried.dtype,
        out_dtype=dtype or carried.dtype,
        device_type=image.device.type,
        returned=region is None,
        region=region or (0, 0, *size),
        tile=tile,
        context=context,
    )


def _task(config: Mapping[str, Any], device_type: str, **asked: Any) -> Task:
    """With what an upsampler's configuration says."""
    return Task(
        device_type=device_type,
        threads=torch.get_num_threads() if device_type == "cpu" else 1,
        window=make_window(config["window"], config["window_ratio"]),
        dim=config["qk_dim"],
        heads=config["num_heads"],
        input_dim=config["input_dim"],
        filters=config["lfu_dim"],
        filter_size=config["kernel_size_lfu"],
        kernel_size=config["kernel_size"],
        **asked,
    )


def _unlimited_stream(task: Task) -> Plan:
    rows = band_rows(task.image[1], BAND_PIXELS)
    least = band_rows(task.output[1], BAND_PIXELS)
    return _banded(task, Bands(rows, min(output_rows(rows, task.image[0], task.output[0]), least)), None)


def _whole_plans(task: Task, limit: int | None) -> Iterator[Plan]:
    yield _whole(task, limit)
    if task.batch > 1 and task.returned:
        yield _whole(task, limit, one_by_one=True)


def _cuts(task: Task) -> Iterator[Bands]:
    """Bands that keep nothing, in every size and order worth trying."""
    height, width = task.image
    sizes = sorted({min(band_rows(width, pixels), height) for pixels in _BANDS}, reverse=True)
    for rows in sizes:
        most = min(output_rows(rows, height, task.output[0]), task.region[2])
        for step in sorted({most, max(1, most // 2), max(1, most // 4)}, reverse=True):
            yield Bands(rows, step, together=True)
            if task.dim > MOST_CHANNELS:
                yield Bands(rows, step, together=False)


def _fill(task: Task, bands: Bands, limit: int, room: int) -> Plan:
    """With as many rows kept as there is room for."""
    if task.context == "all":
        return _banded(task, bands, limit)
    height, width = task.image
    row = task.images_at_once * width * task.pixel_bytes
    everything = replace(bands, kept=height, kept_for_output=height)
    taken = [stage.peak_bytes for stage in _banded(task, bands, limit).stages]

    def fits(free: int) -> int:
        rows = max(0, free // row)
        return height if rows >= height else rows - rows % bands.rows

    kept = fits(room - max(taken[:-_AFTER]))
    if kept < height:
        # What keeps everything does not need a map to work in.
        most = max(stage.peak_bytes for stage in _banded(task, everything, limit).stages[:-_AFTER])
        kept = height if most <= room else kept
    later = min(kept, fits(room - max(taken[-_AFTER:]))) if task.needs_queries else 0
    if task.images_at_once > 1:  # the statistics of one image are taken beside what others keep for the output
        kept = later
    plan = _banded(task, replace(bands, kept=kept, kept_for_output=later), limit)
    if bands.together or kept < height or not task.needs_queries:
        return plan
    encoded = fits(room - max(stage.peak_bytes for stage in plan.stages[:-_AFTER]))
    return _banded(task, replace(bands, kept=kept, kept_for_output=later, encoded=encoded), limit)


def _whole(task: Task, limit: int | None, one_by_one: bool = False) -> Plan:
    """Maps of the whole batch, or of one image after the other."""
    images = 1 if one_by_one else task.batch
    image, output = (_pixels(size) for size in (task.image, task.output))
    one, queries = image * task.pixel_bytes, images * output * task.pixel_bytes
    shrinks = task.output != task.image and task.output[0] <= task.image[0] and task.output[1] <= task.image[1]
    out = task.batch * output * task.carried * task.value_dtype.itemsize if task.returned else 0
    before = out if one_by_one and task.batch > 1 else 0
    keys = _key_bytes(task, images)
    tile = _tile_bytes(task, image)
    # The encoded image, one map more while it is encoded, and two while an encoder goes over it.
    encoded = images * one
    if task.output == task.image:
        most = encoded + max(images * one + one, 2 * one)
    elif shrinks:
        most = encoded + 2 * one + queries
    else:
        most = encoded + images * one + one + 2 * queries
    held = most if task.device_type == "cpu" else queries
    made = 23 if task.needs_queries else 8
    if task.context == "all":
        most = held = made = queries = 0
    elif task.context == "queries":
        most = held = encoded + 2 * one
        queries = 0
    made *= task.batch * image
    if task.needs_queries:
        made += 10 * task.batch * (output - image)
    carried = _grid_bytes(task, images)
    at_once = task.returned and not one_by_one
    step = task.output[0] if at_once else min(band_rows(task.output[1], BAND_PIXELS), task.region[2])
    held_pieces, piece, scratch = _piece_bytes(task, step)
    piece = scratch if at_once else piece + scratch  # or it is the output
    stages = (
        Stage("image", made, _overhead(task) + before + max(most + 3 * tile, encoded + one + 4 * tile, 2 * queries)),
        Stage("keys", _key_products(task), _overhead(task) + before + held + keys),
        Stage("output", _attention_products(task), _overhead(task) + queries + carried + held_pieces + piece + out),
    )
    return Plan(task, "image by image" if one_by_one else "whole", None, stages, limit, _plain_products(task))


def _banded(task: Task, bands: Bands, limit: int | None) -> Plan:
    """Bands of each image, exactly these."""
    height, width = task.image
    image, images = _pixels(task.image), task.images_at_once
    band = bands.rows * width * task.pixel_bytes
    kept, later, encoded = (rows / height for rows in (bands.kept, bands.kept_for_output, bands.encoded))
    row = images * width * task.pixel_bytes
    # What is allocated the whole time: of a batch, the output from the first image on.
    out = task.batch * _pixels(task.output) * task.carried * task.value_dtype.itemsize if task.returned else 0
    always = _overhead(task) + (out if task.batch > 1 else 0)
    scratch = 4 * _tile_bytes(task, bands.rows * width) + bands.rows * width * task.input_dim * 8
    rest = kept < 1
    alone = always + row * bands.kept + (rest + 1) * band + scratch
    pooling = 3 * _pixels(task.grid) * task.dim * working_dtype(task.dtype).itemsize  # two sums, and what they make
    made = task.batch * image
    stages: list[Stage] = []
    if task.context != "all":
        first = 3 if task.is_thin else 4
        stages.append(Stage("statistics of the image", made * (first * kept + 6 * (1 - kept)), alone))
        if bands.together and task.needs_queries:
            products = made * (26 * kept + 44 * (1 - kept))
            stages.append(Stage("statistics of keys, queries", products, alone + band + pooling))
        elif bands.together:
            products = made * (16 * kept + 34 * (1 - kept))
            stages.append(Stage("statistics of the keys", products, alone + band + pooling))
        else:
            more = row * bands.encoded
            stages.append(Stage("statistics of the keys", made * (8 * kept + 34 * (1 - kept)), alone + pooling + more))
            if task.needs_queries:
                products = made * (9 * kept - 4 * encoded + 26 * (1 - kept))
                stages.append(Stage("statistics of the queries", products, alone + more))
    remains = always + row * bands.kept_for_output
    stages.append(Stage("keys", _key_products(task), remains + _key_bytes(task, images)))
    held_pieces, piece, attention = _piece_bytes(task, bands.output_rows)
    attended, reached, tile = _attention_products(task), 0, 0
    if task.needs_queries:
        rows, columns = _reached(task, bands.output_rows)
        work = max(2 * rows * columns, bands.rows * width * (rest + 1)) * task.pixel_bytes
        share = task.region[3] / task.output[1] * task.region[2] / task.output[0]
        repeated = 1 + 2 * HALO / bands.output_rows
        again = (5 if bands.together else 2) * later + 9 * (1 - later)
        attended += repeated * task.batch * share * (image * again + 10 * _pixels(task.output))
        projected = (min(bands.output_rows, task.region[2]) + 2 * HALO) * min(task.region[3] + 2 * HALO, task.output[1])
        reached = work + projected * task.pixel_bytes * (1 if task.image == task.output else 2)
        tile = _tile_bytes(task, rows * columns)
    if task.batch == 1:
        remains += out
    remains += reached + held_pieces + _grid_bytes(task, images)
    stages.append(Stage("output", attended, remains + max(4 * tile, piece + attention)))
    return Plan(task, "bands", bands, tuple(stages), limit, _plain_products(task))


def _reached(task: Task, step: int) -> Size:
    """Rows and columns of the image that some rows of the output need, at most."""
    tile = task.tile[1] if task.tile else task.region[3]
    lengths = zip((min(step, task.region[2]), min(tile, task.region[3])), task.output, task.image, strict=True)
    return tuple(  # type: ignore[return-value]
        min(length, -(-(part + 2 * HALO) * length // total) + (length != total)) for part, total, length in lengths
    )


def _piece_bytes(task: Task, step: int) -> tuple[int, int, int]:
    """Bytes of pieces beside some rows of the output that are made, of these rows, and of the attention's scratch."""
    _, _, height, width = task.region
    columns = min(task.tile[1], width) if task.tile else width
    step = min(step, height)
    made = step * columns * task.carried * task.value_dtype.itemsize
    held = 0
    if not task.returned:
        rows = min(task.tile[0], height) if task.tile else step
        held = 2 * task.batch * rows * columns * task.carried * task.out_dtype.itemsize
        if rows == step and task.batch == 1 and task.value_dtype == task.out_dtype:
            held //= 2  # what is made is the piece; the caller still holds the last one
        if task.mapped:
            held += _PAGES * task.batch * rows * columns * task.carried * task.out_dtype.itemsize
    shape = (task.heads, task.dim, task.carried)
    scratch = scratch_bytes(task.window, step, task.output, task.grid, shape, task.device_type)
    return held, made, _workers(task) * scratch


def _attention_products(task: Task) -> float:
    pixels = task.batch * _pixels(task.region[2:])
    return pixels * _mean_window(task) * (task.dim + task.carried) / task.dim**2


def _grid_bytes(task: Task, images: int) -> int:
    """Keys, values, and the copies that the attention makes of one image's."""
    cells, wide = _pixels(task.grid), working_dtype(task.dtype).itemsize
    own = images * (task.pixel_bytes + task.carried * task.value_dtype.itemsize)
    return cells * (own + wide * task.dim + task.carried * working_dtype(task.value_dtype).itemsize)


def _key_bytes(task: Task, images: int) -> int:
    """The most on the small grid, while the features' keys are made and joined with the image's."""
    wide, cells, taps = working_dtype(task.dtype).itemsize, _pixels(task.grid), task.filter_size**2
    features = images * cells * task.channels
    position = task.channels * (2 * task.filters + taps)
    most = max(1, (2**18 if task.device_type == "cpu" else 2**26) // (task.channels * task.filters))
    tile = _workers(task) * -(-cells // -(-cells // most)) * position
    joining = images * cells * 12 * task.dim
    return wide * max(2 * features + tile + cells * 2 * taps, joining)


def _tile_bytes(task: Task, pixels: int) -> int:
    """Of a map of the tiles that the pixels of a map are worked on in."""
    tiles = max(1, -(-pixels // (4096 if task.device_type == "cpu" else 2**18)))  # of about one size
    return _workers(task) * -(-pixels // tiles) * task.dim * working_dtype(task.dtype).itemsize


def _workers(task: Task) -> int:
    """Threads that each work on a tile."""
    return max(1, min(task.threads, 8)) if task.device_type == "cpu" else 1


def _overhead(task: Task) -> int:
    """What libraries take beside tensors."""
    if task.device_type != "cpu":
        return _OVERHEAD_ELSEWHERE
    return _OVERHEAD + (_OVERHEAD_OF_A_THREAD * _workers(task) if task.threads > 1 else 0)


def _key_products(task: Task) -> float:
    """On the small grid."""
    cells = task.batch * _pixels(task.grid)
    return cells * (30 + task.channels * task.filters * task.filter_size**2 / task.dim**2)


@lru_cache(maxsize=256)
def _plain_products(task: Task) -> float:
    """Of a call, or of a stream, that keeps whole maps."""
    image, output = task.batch * _pixels(task.image), task.batch * _pixels(task.output)
    made = {"nothing": 13 * image + 10 * output, "queries": 8 * image, "all": 0}[task.context]
    return made + _key_products(task) + _attention_products(task)


@lru_cache(maxsize=256)
def _mean_window(task: Task) -> float:
    """Keys that a pixel sees, on average."""
    mean = 1.0
    for queries, keys in zip(task.output, task.grid, strict=True):
        start, stop = axis_bounds(task.window, queries, keys)
        mean *= (sum(stop) - sum(start)) / queries
    return mean


def _pixels(size: Sequence[int]) -> int:
    return size[0] * size[1]


def _share(rows: int, height: int) -> str:
    return "all rows" if rows >= height else f"{100 * rows / height:.0f} % of the rows"


def _round_up(size: int) -> int:
    """To the third digit, so that an amount told to people is no smaller than the exact one."""
    unit = 10 ** max(0, len(str(size)) - 3)
    return -(-size // unit) * unit
