"""Feature unification, forward: out(o) = mean over c of softmax over o of z(o, c), all channels' filtered maps.

With the channel-major list of maps read again as (M, C), softmax c at one position runs over M maps, one for each
output o. For a run of softmaxes and a class of outputs (see `feature_unification_patches.py`) the logits are a matrix
product of filters and a patch of channels, with a row for each softmax. So the logits of one run exist at a time, until
their exponentials are computed. A softmax runs over one row of the products of all classes. In a turned run each column
of a product begins at another filter, and a gather within the tile puts the columns in order.

The division by the taps inside the map is a factor of the exponent. The number of exponentials, C*M for
each position, limits the speed. So logits are scaled, reduced by their maximum and added up in as few instructions as
possible, and the sum over the rows is taken only once, at the end of a position.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .feature_unification_config import UnificationConfig
from .feature_unification_patches import (
    PIECE,
    SIZES,
    Arranged,
    load_filters,
    load_patch,
    output_of,
    patch_corner,
    product_of,
    taps_inside,
)
from .launch import Launch
from .pixel_encoder_statistics import store_statistics
from .products import LOG2_E


@triton.jit
def softmax_rows(logits, exponent_scale, exists, FILTERS: tl.constexpr):
    """Softmaxes over rows of all classes' logits, a tuple of (ROWS, WIDTH).

    Returns exp(logits - the row's maximum), as such a tuple, and 1 / their sums, (ROWS,); zeros for rows that do not
    exist. Padding columns have weight 0; they occur only where there is a single class.
    """
    CLASSES: tl.constexpr = len(logits)
    masked = ()
    for class_ in tl.static_range(CLASSES):
        some = logits[class_]
        if FILTERS < CLASSES * some.shape[1]:
            some = tl.where((tl.arange(0, some.shape[1]) < FILTERS)[None, :], some, float("-inf"))
        masked = masked + (some,)
    largest = tl.max(masked[0], axis=1)
    for class_ in tl.static_range(1, CLASSES):
        largest = tl.maximum(largest, tl.max(masked[class_], axis=1))
    largest *= exponent_scale
    powers = ()
    for class_ in tl.static_range(CLASSES):
        powers = powers + (tl.math.exp2(masked[class_] * exponent_scale - largest[:, None]),)
    total = tl.sum(powers[0], axis=1)
    for class_ in tl.static_range(1, CLASSES):
        total += tl.sum(powers[class_], axis=1)
    return powers, tl.where(exists, 1.0 / total, 0.0)


@triton.jit
def _added(sums, powers, share):
    """Add the weights powers * share to a tuple of sums."""
    updated = ()
    for class_ in tl.static_range(len(sums)):
        updated = updated + (sums[class_] + powers[class_] * share[:, None],)
    return updated


@triton.jit
def turned_logits(before, after, channels, FILTERS: tl.constexpr):
    """Logits with softmaxes in rows, from products with filters in rows: with a block's channels and the next ones."""
    row = tl.arange(0, before.shape[0])
    # The filter of each column's first softmax.
    shift = (tl.arange(0, before.shape[1]) * channels) % FILTERS
    turn = row[:, None] + shift[None, :]
    turn = tl.where(turn >= FILTERS, turn - FILTERS, turn)
    turn = tl.minimum(turn, before.shape[0] - 1)  # padding rows
    return tl.gather(tl.where(row[:, None] >= shift[None, :], before, after), turn, axis=0)


@triton.jit(do_not_specialize=SIZES)
def _feature_unification_forward_kernel(
    arranged, filters, out, parts,
    # (B, h + s - 1, w + s - 1, PLANES, entries, COLUMNS), (PLANES, COLUMNS, TAPS), (B, M, h, w), (B, 3, tiles, 8)
    height, width, positions, tiles, channels, runs, entries, first_step, opaque_zero, out_filter_stride,
    out_position_stride,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr, WHOLE: tl.constexpr,
    MEASURES: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """POSITIONS positions of an image; grid: the runs of positions of all images.

    MEASURES: it leaves the statistics of the filters' eight groups, see `pixel_encoder_statistics`; where there is one
    class, and as many filters as columns.

    With `opaque_zero` what turns the first run is not kept for all runs.
    TURNED says that the filters' numbers run over within a run, WHOLE that POSITIONS divide an image's positions.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * POSITIONS
    softmax = tl.arange(0, ROWS)
    CLASSES: tl.constexpr = COLUMNS // WIDTH
    RUN: tl.constexpr = FILTERS // CLASSES
    sums = ()
    for _class in tl.static_range(CLASSES):
        sums = sums + (tl.zeros((POSITIONS, WIDTH), tl.float32),)
    if ROWS >= FILTERS:
        kept = load_filters(filters, 0, ROWS, COLUMNS, TAPS, PLANES, PIECE)
    for number in tl.range(0, POSITIONS):
        position = tl.minimum(first + number, positions - 1)
        row = position // width
        column = position % width
        corner = patch_corner(image, row, column, height, width, SIZE)
        exponent_scale = LOG2_E / taps_inside(row, column, height, width, SIZE // 2)
        if TURNED:
            sum_ = tl.zeros((COLUMNS,), tl.float32)
            for run in tl.range(0, runs):
                # Computed for each run: if it were kept from run to run, it would take a whole product's registers.
                near = load_patch(
                    arranged, corner, run, width, entries, 0, WIDTH, SIZE, TAPS, COLUMNS, PLANES, PIECE
                )  # fmt: skip
                before = product_of(kept, near, PLANES, PRECISION)
                near = load_patch(
                    arranged, corner, run + 1, width, entries, 0, WIDTH, SIZE, TAPS, COLUMNS, PLANES, PIECE
                )  # fmt: skip
                after = product_of(kept, near, PLANES, PRECISION)
                logits = turned_logits(before, after, channels ^ (run * opaque_zero), FILTERS)
                exists = softmax < tl.minimum(channels - run * FILTERS, FILTERS)
                powers, share = softmax_rows((logits,), exponent_scale, exists, FILTERS)
                sum_ += tl.sum(powers[0] * share[:, None], axis=0)
            totals = (sum_,)
        else:
            weights = ()
            for _class in tl.static_range(CLASSES):
                weights = weights + (tl.zeros((ROWS, WIDTH), tl.float32),)
            for run in tl.range(0, runs):
                near = ()
                for class_ in tl.static_range(CLASSES):
                    patch = load_patch(
                        arranged, corner, (run + class_) // CLASSES, width, entries, class_ * WIDTH, WIDTH,
                        SIZE, TAPS, COLUMNS, PLANES, PIECE,
                    )  # fmt: skip
                    near = near + (patch,)
                if ROWS >= FILTERS:
                    logits = (product_of(kept, near[0], PLANES, PRECISION),)
                    powers, share = softmax_rows(logits, exponent_scale, softmax < FILTERS, FILTERS)
                    weights = _added(weights, powers, share)
                else:
                    for part in tl.range(0, (RUN + ROWS - 1) // ROWS):
                        logits = ()
                        for class_ in tl.static_range(CLASSES):
                            begin = (run + class_) % CLASSES * RUN + part * ROWS
                            some = load_filters(filters, begin, ROWS, COLUMNS, TAPS, PLANES, PIECE)
                            logits = logits + (product_of(some, near[class_], PLANES, PRECISION),)
                        powers, share = softmax_rows(logits, exponent_scale, softmax + part * ROWS < RUN, FILTERS)
                        weights = _added(weights, powers, share)
            totals = ()
            for class_ in tl.static_range(CLASSES):
                totals = totals + (tl.sum(weights[class_], axis=0),)
        mine = (tl.arange(0, POSITIONS) == number)[:, None]
        updated = ()
        for class_ in tl.static_range(CLASSES):
            updated = updated + (sums[class_] + tl.where(mine, totals[class_][None, :], 0.0),)
        sums = updated
    position = first + tl.arange(0, POSITIONS)
    for class_ in tl.static_range(CLASSES):
        output = output_of(class_ * WIDTH + tl.arange(0, WIDTH), first_step, WIDTH, CLASSES)
        place = out + image * FILTERS * positions + (position.to(tl.int64) * out_position_stride)[:, None]
        place = place + (output.to(tl.int64) * out_filter_stride)[None, :]
        exists = (output < FILTERS)[None, :]
        if not WHOLE:
            exists = exists & (position < positions)[:, None]
        tl.store(place, sums[class_] / channels, mask=exists)
    if MEASURES:
        place = parts + (image * 3 * tiles + tl.program_id(0) % tiles) * 8
        wanted = tl.arange(0, WIDTH) < FILTERS
        store_statistics(place, tiles * 8, sums[0] / channels, position < positions, wanted, FILTERS, WIDTH)


def measures(arranged: Arranged) -> bool:
    """Whether the kernel can leave its result's statistics: columns are filters in their order."""
    return arranged.runs.classes == 1 and arranged.runs.columns == arranged.runs.filters


def plan_forward(
    arranged: Arranged, out: Tensor, *, parts: Tensor | None = None, precision: str, config: UnificationConfig
) -> Launch:
    """The launch that fills `out` (B, M, h, w), contiguous or channels last, in any floating dtype.

    Args:
        arranged: what `feature_unification_patches.plan_arrange` fills.
        out: the result.
        parts: (B, 3, tiles, 8) float32, takes its groups' statistics where `measures` says so; see
            `UnificationConfig.tiles`.
        precision: of products of float32, where there is one plane of it; Triton's `input_precision`.
        config: sizes of tiles, warps, stages.
    """
    batch, filters, height, width = out.shape
    planes, columns, taps = arranged.filters.shape
    runs = arranged.runs
    tiles = config.tiles(height * width)
    return Launch(
        kernel=_feature_unification_forward_kernel,
        grid=(batch * tiles,),
        arguments={
            "arranged": arranged.features,
            "filters": arranged.filters,
            "out": out,
            "parts": out if parts is None else parts,
            "height": height,
            "width": width,
            "positions": height * width,
            "tiles": tiles,
            "channels": arranged.channels,
            "runs": runs.number,
            "entries": runs.entries,
            "first_step": runs.first_step,
            "opaque_zero": 0,
            "out_filter_stride": out.stride(1),
            "out_position_stride": out.stride(3),
        },
        constants={
            "FILTERS": filters,
            "COLUMNS": columns,
            "WIDTH": runs.width,
            "SIZE": arranged.kernel_size,
            "TAPS": taps,
            "PLANES": planes,
            "POSITIONS": config.positions,
            "ROWS": columns if runs.turned else min(config.rows, runs.width),
            "TURNED": runs.turned,
            "MEASURES": parts is not None,
            "WHOLE": height * width % config.positions == 0,
            "PIECE": PIECE,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
