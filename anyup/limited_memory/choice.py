"""The plan with the least work that keeps to a limit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from anyup.argument_checks import OutputSize, check_output_size, check_region, check_size, check_tile
from anyup.budget import check_room, limit_on
from anyup.limited_memory.plans import Bands, Plan, band_rows, output_rows
from anyup.limited_memory.prediction import banded, default_rows, whole
from anyup.limited_memory.task import Task, make_task
from anyup.ops.pixel_encoder.thin import MOST_CHANNELS
from anyup.ops.precision import check_dtype
from anyup.progress import human_bytes

if TYPE_CHECKING:
    from anyup.network import Network

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

# The share of the limit that a prediction may use. It allows for the error of predictions, and on a GPU for the
# rounding and the gaps of the allocator.
_USABLE = {"cpu": 0.98}
_USABLE_ELSEWHERE = 0.97

# Bytes of the window's bounds for each row and each column of the output, in two tensors and two tuples.
_WINDOW_BYTES = 32

# How many stages of banded work follow the statistics.
_AFTER = 2

# The sizes of bands, in pixels, that are tried under a limit.
_BANDS = tuple(2**n for n in range(18, -1, -1))


class BudgetError(ValueError):
    """No plan keeps to the limit.

    Attributes:
        smallest: the smallest limit, in bytes, that a plan can meet.
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
    max_memory: float | str | None = None,
    output_size: OutputSize = None,
    *,
    values: int | None = None,
    batch: int = 1,
    stream: bool = False,
    region: Sequence[int] | None = None,
    tile: int | Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    upsampler: Network | None = None,
) -> Plan:
    """What a call or a stream would keep, compute again, take and cost; nothing is computed, no such device is needed.

    Predicted for the `torch` backend, which takes the most memory; a kernel needs little scratch for the attention.

    Args:
        image_size: (height, width).
        feature_size: (height, width).
        channels: of the features.
        dtype: of the upsampler's parameters and of the features.
        device: "cpu", "cuda", ...; it need not exist.
        max_memory: as in the call; None: no limit on a CPU or a device that is not there, else 90 % of what is free.
        output_size: (H, W); None means the image's size.
        values: channels that are carried instead of the features: a head's outputs, for example.
        batch: images.
        stream: plan `stream`, not the call (as the call with `out=` runs, too).
        region: of a stream.
        tile: of a stream.
        out_dtype: the `dtype` of a stream.
        upsampler: one with other than the default widths and window.

    Raises:
        ValueError, TypeError: which argument, what was expected, what came.
        BudgetError: a ValueError that names the smallest budget that can be met.
    """
    image, grid = check_size("image_size", image_size), check_size("feature_size", feature_size)
    output = check_output_size(output_size, image)
    for name, number in (("channels", channels), ("batch", batch), ("values", channels if values is None else values)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected a positive integer, got {number!r}")
    for name, kind in (("dtype", dtype), ("out_dtype", out_dtype or dtype)):
        check_dtype(name, kind)
    if not stream and not (region is None and tile is None and out_dtype is None):
        raise ValueError("region, tile and out_dtype belong to a stream: pass stream=True")
    device = torch.device(device)
    where = check_region(region, output)
    config = dict(_DEFAULTS if upsampler is None else upsampler.config)
    task = make_task(
        config,
        image=image,
        output=output,
        grid=grid,
        batch=batch,
        channels=channels,
        value_channels=channels if values is None else values,
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

    Without a limit a call keeps whole maps, and so does a stream with `keep`; any other stream keeps no map. Where
    several processes share an image, each works in bands, and keeps the maps of all its rows where there is no limit.

    Raises:
        BudgetError: no plan keeps to the limit.
        ValueError: the output is so long that the bounds of its windows do not fit the free memory.
    """
    windows = "output_size: a table of the windows of {} rows and {} columns".format(*task.output)
    check_room(_WINDOW_BYTES * sum(task.output), windows, torch.device("cpu"), "a smaller output is expected")
    if limit is None and task.own_rows is not None:
        bands, kept, together = _default_bands(task), task.own_rows, task.dim <= MOST_CHANNELS
        everything = replace(bands, together=together, kept=kept, kept_for_output=kept)
        return banded(task, replace(everything, encoded=0 if together else kept), None)
    if limit is None:
        return (
            whole(task, None)
            if keep or task.returned or task.context == "all"
            else banded(task, _default_bands(task), None)
        )
    share = _USABLE.get(task.device_type, _USABLE_ELSEWHERE)
    room = int(share * limit)
    plans_of_whole_maps = list(_whole_plans(task, limit))
    candidates = [plan for plan in plans_of_whole_maps if plan.peak_bytes <= room]
    smallest: float = min((plan.peak_bytes for plan in plans_of_whole_maps), default=math.inf)
    if not candidates or candidates[0].cost > 1:
        for bands in _candidates(task):
            least = banded(task, bands, limit)
            smallest = min(smallest, least.peak_bytes)
            if least.peak_bytes <= room:
                candidates.append(_fill(task, bands, limit, room))
    if not candidates:
        raise BudgetError(task, limit, math.ceil(smallest / share))
    return min(candidates, key=_effort)


def _effort(plan: Plan) -> tuple[float, int]:
    """The cost that `choose` minimises: the work, with a penalty for bands too small for the threads or the GPU."""
    if plan.bands is None:
        return plan.products, plan.peak_bytes
    task = plan.task
    waste = 1024 * task.workers if task.device_type == "cpu" else 2**14
    return plan.products * (1 + waste / (plan.bands.rows * task.image[1])), plan.peak_bytes


def rows_at_once(plan: Plan) -> int:
    """The number of output rows that are computed at a time where the output is not computed at once."""
    most = default_rows(plan.task.output[1]) if plan.bands is None else plan.bands.output_rows
    return min(most, plan.task.region[2])


def _default_bands(task: Task) -> Bands:
    rows = default_rows(task.image[1])
    least = default_rows(task.output[1])
    return Bands(rows, min(output_rows(rows, task.image[0], task.output[0]), least))


def _whole_plans(task: Task, limit: int | None) -> Iterator[Plan]:
    if task.own_rows is not None:
        return
    yield whole(task, limit)
    if task.batch > 1 and task.returned:
        yield whole(task, limit, one_by_one=True)


def _candidates(task: Task) -> Iterator[Bands]:
    """Bands without stored maps, in every size and order worth trying."""
    height, width = task.own
    sizes = sorted({min(band_rows(width, pixels), height) for pixels in _BANDS}, reverse=True)
    for rows in sizes:
        most = min(output_rows(rows, task.image[0], task.output[0]), task.region[2])
        for step in sorted({most, max(1, most // 2), max(1, most // 4)}, reverse=True):
            # Processes that share an image pass in one order, whatever room each has: they meet after each pass.
            if task.own_rows is None or task.dim <= MOST_CHANNELS:
                yield Bands(rows, step, together=True)
            if task.dim > MOST_CHANNELS:
                yield Bands(rows, step, together=False)


def _fill(task: Task, bands: Bands, limit: int, room: int) -> Plan:
    """The plan with these bands in which as many rows keep a map as have room."""
    if task.context == "all":
        return banded(task, bands, limit)
    height, width = task.own
    row = task.images_at_once * width * task.pixel_bytes
    everything = replace(bands, kept=height, kept_for_output=height)
    taken = [stage.peak_bytes for stage in banded(task, bands, limit).stages]

    def fits(free: int) -> int:
        rows = max(0, free // row)
        return height if rows >= height else rows - rows % bands.rows

    kept = fits(room - max(taken[:-_AFTER]))
    if kept < height:
        # Where every row keeps a map, the bands need no scratch map.
        most = max(stage.peak_bytes for stage in banded(task, everything, limit).stages[:-_AFTER])
        kept = height if most <= room else kept
    later = min(kept, fits(room - max(taken[-_AFTER:]))) if task.needs_queries else 0
    if task.images_at_once > 1:  # while the statistics of one image are computed, others hold their maps
        kept = later
    plan = banded(task, replace(bands, kept=kept, kept_for_output=later), limit)
    if bands.together or kept < height or not task.needs_queries:
        return plan
    encoded = fits(room - max(stage.peak_bytes for stage in plan.stages[:-_AFTER]))
    return banded(task, replace(bands, kept=kept, kept_for_output=later, encoded=encoded), limit)


def _round_up(size: int) -> int:
    """Round up to three digits, so that the printed budget suffices."""
    unit = 10 ** max(0, len(str(size)) - 3)
    return -(-size // unit) * unit
