"""Feature unification, backward: from the output's gradient to those of features and basis; logits are recomputed.

With a(o) = dout(o) / C and P the weights of one softmax, its logits have the gradient P (a - sum_o P a). The logits'
gradients of a run of softmaxes and a class of outputs are a tile. Its product with the patch is the filters' gradient,
and its product with the filters is the gradient of the patch's cells.

A program owns a square of positions and a run. The positions' patches overlap, so a product with the filters, shifted
to each position, adds up the gradients of all cells of the square's patches in registers. A cell has a partial sum for
each square whose patches hold it: four times the features' size for filters of 5 x 5, for each class. A second kernel
adds up the partial sums in a fixed order, without atomics.

A program divides its gradients by the largest gradient of its outputs, because 16-bit floats would lose small numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feature_unification_config import UnificationGradientConfig
from .feature_unification_forward import softmax_rows, turned_logits
from .feature_unification_patches import (
    PIECE,
    SIZES,
    Arranged,
    load_filters,
    load_patch,
    load_piece,
    output_of,
    patch_corner,
    product_of,
    taps_inside,
)
from .launch import Launch, strides_of
from .products import LOG2_E, padded

TILE = 4
"""Positions along each side of a square: with filters of 5 x 5 its patches cover 8 x 8 cells."""

_FOLD_CHANNELS = 16
_FOLD_POSITIONS = 64


def padded_cells(kernel_size: int) -> int:
    """The number of cells of a square's patches in a tile: a power of two that the matrix units take."""
    return padded((TILE + kernel_size - 1) ** 2)


def allocate_parts(arranged: Arranged, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Memory for the partial sums of the cells' and of the filters' gradients, float32.

    (squares, runs, sides, cells, columns) and (squares, runs, sides, columns, padded taps).
    """
    squares = arranged.features.shape[0] * triton.cdiv(size[0], TILE) * triton.cdiv(size[1], TILE)
    runs = arranged.runs
    parts = (squares, runs.number, 1 + runs.turned)
    taps = arranged.filters.shape[2]
    like = arranged.features
    return (
        like.new_empty((*parts, padded_cells(arranged.kernel_size), runs.columns), dtype=torch.float32),
        like.new_empty((*parts, runs.columns, taps), dtype=torch.float32),
    )


@triton.jit
def _shifted_filters(
    taps, first, down, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr,
    PLANES: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The filters, shifted to a position (down, across) of a square, over its cells: tuple of (CELLS, ROWS)."""
    SIDE: tl.constexpr = TILE + SIZE - 1
    cell = tl.arange(0, CELLS)
    tap_row = cell // SIDE - down
    tap_column = cell % SIDE - across
    sees = (tap_row >= 0) & (tap_row < SIZE) & (tap_column >= 0) & (tap_column < SIZE)
    place = taps + (tap_row * SIZE + tap_column)[:, None] * COLUMNS + (first + tl.arange(0, ROWS))[None, :]
    planes = ()
    for plane in tl.static_range(PLANES):
        planes = planes + (tl.load(place + plane * TAPS * COLUMNS, mask=sees[:, None], other=0.0),)
    return planes


@triton.jit
def _load_gradient(grad, row, column, row_stride, column_stride, filter_stride, first_step, FIRST: tl.constexpr,
                   WIDTH: tl.constexpr, CLASSES: tl.constexpr, FILTERS: tl.constexpr):  # fmt: skip
    """The output's gradient at a position, of WIDTH columns from FIRST, float32."""
    output = output_of(FIRST + tl.arange(0, WIDTH), first_step, WIDTH, CLASSES)
    place = grad + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    place = place + output.to(tl.int64) * filter_stride
    return tl.load(place, mask=output < FILTERS, other=0.0).to(tl.float32)


@triton.jit
def logits_gradient(powers, share, outer):
    """P (a - sum_o P a), of weights P = powers * share in rows and the gradient a of each column; tuples of classes."""
    weights = ()
    for class_ in tl.static_range(len(powers)):
        weights = weights + (powers[class_] * share[:, None],)
    mean = tl.sum(weights[0] * outer[0][None, :], axis=1)
    for class_ in tl.static_range(1, len(powers)):
        mean += tl.sum(weights[class_] * outer[class_][None, :], axis=1)
    inner = ()
    for class_ in tl.static_range(len(powers)):
        inner = inner + (weights[class_] * (outer[class_][None, :] - mean[:, None]),)
    return inner


@triton.jit
def turned_back(gradient, channels, FILTERS: tl.constexpr):
    """The inverse of `turned_logits`' gather: with filters in rows again, from softmaxes in rows."""
    row = tl.arange(0, gradient.shape[0])
    shift = (tl.arange(0, gradient.shape[1]) * channels) % FILTERS
    turn = row[:, None] - shift[None, :]
    turn = tl.where(turn < 0, turn + FILTERS, turn)
    turn = tl.minimum(turn, gradient.shape[0] - 1)
    return tl.where((row < FILTERS)[:, None], tl.gather(gradient, turn, axis=0), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _feature_unification_backward_kernel(
    arranged, filters, taps, grad, cell_parts, filter_parts,
    # (B, h + s - 1, w + s - 1, PLANES, entries, COLUMNS), (PLANES, COLUMNS, TAPS), (PLANES, TAPS, COLUMNS),
    # (B, M, h, w), (squares, runs, sides, CELLS, COLUMNS), (squares, runs, sides, COLUMNS, TAPS)
    height, width, square_rows, square_columns, channels, entries, first_step, opaque_zero,
    grad_image_stride, grad_filter_stride, grad_row_stride, grad_column_stride,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr,
    PLANES: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr,
    PIECE: tl.constexpr, OF_FILTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TILE x TILE positions, a run of softmaxes, and with TURNED one side of it; grid: (squares, runs * sides).

    One side is what a run has of its own channels, the other what it has of the next ones. CELLS is 0 where the
    gradient of the cells is not wanted, OF_FILTERS says that the filters' is.
    """
    square = tl.program_id(0)
    image = (square // (square_rows * square_columns)).to(tl.int64)
    top = square % (square_rows * square_columns) // square_columns * TILE
    left = square % square_columns * TILE
    run = tl.program_id(1)
    side = 0
    if TURNED:
        side = run % 2
        run = run // 2
    CLASSES: tl.constexpr = COLUMNS // WIDTH
    RUN: tl.constexpr = FILTERS // CLASSES
    PIECES: tl.constexpr = TAPS // PIECE
    part_number = square.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    grad += image * grad_image_stride
    columns = tl.minimum(TILE, width - left)
    positions = tl.minimum(TILE, height - top) * columns
    largest = 0.0
    for number in tl.range(0, positions):
        for class_ in tl.static_range(CLASSES):
            some = _load_gradient(
                grad, top + number // columns, left + number % columns, grad_row_stride, grad_column_stride,
                grad_filter_stride, first_step, class_ * WIDTH, WIDTH, CLASSES, FILTERS,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(tl.abs(some), axis=0))
    unit = tl.where(largest > 0, largest, 1.0)
    softmax = tl.arange(0, ROWS)
    to_cells = ()
    if CELLS:
        for _class in tl.static_range(CLASSES):
            to_cells = to_cells + (tl.zeros((CELLS, WIDTH), tl.float32),)
    for part in tl.range(0, (RUN + ROWS - 1) // ROWS):
        some = ()
        for class_ in tl.static_range(CLASSES):
            begin = (run + class_) % CLASSES * RUN + part * ROWS
            some = some + (load_filters(filters, begin, ROWS, COLUMNS, TAPS, PLANES, PIECE),)
        to_filters = ()
        if OF_FILTERS:
            for _piece in tl.static_range(CLASSES * PIECES):
                to_filters = to_filters + (tl.zeros((ROWS, PIECE), tl.float32),)
        for number in tl.range(0, positions):
            down = number // columns
            across = number % columns
            row = top + down
            column = left + across
            inside = taps_inside(row, column, height, width, SIZE // 2)
            corner = patch_corner(image, row, column, height, width, SIZE)
            outer = ()
            near = ()
            logits = ()
            for class_ in tl.static_range(CLASSES):
                gradient = _load_gradient(
                    grad, row, column, grad_row_stride, grad_column_stride,
                    grad_filter_stride, first_step, class_ * WIDTH, WIDTH, CLASSES, FILTERS,
                ) / unit  # fmt: skip
                outer = outer + (gradient * (SIZE * SIZE / inside),)
                patch = load_patch(
                    arranged, corner, (run + class_) // CLASSES, width, entries, class_ * WIDTH, WIDTH,
                    SIZE, TAPS, COLUMNS, PLANES, PIECE,
                )  # fmt: skip
                near = near + (patch,)
                logits = logits + (product_of(some[class_], patch, PLANES, PRECISION),)
            real = softmax + part * ROWS < RUN
            if TURNED:
                after = load_patch(
                    arranged, corner, run + 1, width, entries, 0, WIDTH, SIZE, TAPS, COLUMNS, PLANES, PIECE
                )  # fmt: skip
                after = product_of(some[0], after, PLANES, PRECISION)
                logits = (turned_logits(logits[0], after, channels ^ (number * opaque_zero), FILTERS),)
                real = softmax < tl.minimum(channels - run * FILTERS, FILTERS)
            powers, share = softmax_rows(logits, LOG2_E / inside, real, FILTERS)
            inner = logits_gradient(powers, share, outer)
            if TURNED:
                turned = turned_back(inner[0], channels ^ (number * opaque_zero), FILTERS)
                shift = (tl.arange(0, COLUMNS) * (channels ^ (number * opaque_zero))) % FILTERS
                own = softmax[:, None] >= shift[None, :]
                inner = (tl.where(own == (side == 0), turned, 0.0),)
                patch = load_patch(
                    arranged, corner, run + side, width, entries, 0, WIDTH, SIZE, TAPS, COLUMNS, PLANES, PIECE
                )  # fmt: skip
                near = (patch,)
            cells = ()
            updated = ()
            for class_ in tl.static_range(CLASSES):
                rest = inner[class_]
                if CELLS:
                    begin = (run + class_) % CLASSES * RUN + part * ROWS
                    shifted = _shifted_filters(
                        taps, begin, down, across, ROWS, COLUMNS, SIZE, TAPS, PLANES, TILE, CELLS
                    )
                    total = to_cells[class_]
                planes = ()
                for plane in tl.static_range(PLANES):
                    rounded = rest.to(arranged.dtype.element_ty)
                    planes = planes + (rounded,)
                    if PLANES > 1:
                        rest -= rounded.to(tl.float32)
                    if CELLS:
                        # Each plane is used up before the next one is computed.
                        for other in tl.static_range(PLANES - plane):
                            total = tl.dot(shifted[other], rounded, total, input_precision=PRECISION)
                if CELLS:
                    cells = cells + (total,)
                if OF_FILTERS:
                    for piece in tl.static_range(PIECES):
                        product = to_filters[class_ * PIECES + piece]
                        for other in tl.static_range(PLANES):
                            patch = near[class_][other * PIECES + piece]
                            if PLANES > 1:
                                # Loaded again, or all planes would wait in registers in the other product's layout.
                                patch = load_piece(
                                    arranged, corner + opaque_zero * (other * PIECES + piece + 1),
                                    (run + class_) // CLASSES + side, width, entries,
                                    other, piece, class_ * WIDTH, WIDTH, SIZE, COLUMNS, PLANES, PIECE,
                                )  # fmt: skip
                            patch = tl.trans(patch)
                            for plane in tl.static_range(PLANES - other):
                                product = tl.dot(planes[plane], patch, product, input_precision=PRECISION)
                        updated = updated + (product,)
            to_cells = cells
            to_filters = updated
        if OF_FILTERS:
            taken = tl.arange(0, PIECE)[None, :]
            for class_ in tl.static_range(CLASSES):
                begin = (run + class_) % CLASSES * RUN + part * ROWS
                place = filter_parts + part_number * COLUMNS * TAPS + (begin + softmax)[:, None] * TAPS + taken
                for piece in tl.static_range(PIECES):
                    gradient = to_filters[class_ * PIECES + piece]
                    tl.store(place + piece * PIECE, gradient * (unit / (SIZE * SIZE) / channels))
    if CELLS:
        place = cell_parts + part_number * CELLS * COLUMNS + tl.arange(0, CELLS)[:, None] * COLUMNS
        place = place + tl.arange(0, WIDTH)[None, :]
        for class_ in tl.static_range(CLASSES):
            tl.store(place + class_ * WIDTH, to_cells[class_] * (unit / (SIZE * SIZE) / channels))


def plan_backward(
    grad: Tensor,
    arranged: Arranged,
    cell_parts: Tensor,
    filter_parts: Tensor,
    *,
    of: str,
    precision: str,
    config: UnificationGradientConfig,
) -> Launch:
    """The launch that fills one of the tensors of `allocate_parts`.

    Args:
        grad: of the output, (B, M, h, w), any strides.
        arranged: features and filters, these transposed as well.
        cell_parts, filter_parts: the memory.
        of: which gradient, "cells" or "filters".
        precision: of products of float32, where there is one plane of it; Triton's `input_precision`.
        config: sizes of tiles, warps, stages.
    """
    batch, filters, height, width = grad.shape
    planes, columns, taps = arranged.filters.shape
    runs = arranged.runs
    squares = (triton.cdiv(height, TILE), triton.cdiv(width, TILE))
    return Launch(
        kernel=_feature_unification_backward_kernel,
        grid=(batch * squares[0] * squares[1], cell_parts.shape[1] * cell_parts.shape[2]),
        arguments={
            "arranged": arranged.features,
            "filters": arranged.filters,
            "taps": arranged.taps,
            "grad": grad,
            "cell_parts": cell_parts,
            "filter_parts": filter_parts,
            "height": height,
            "width": width,
            "square_rows": squares[0],
            "square_columns": squares[1],
            "channels": arranged.channels,
            "entries": runs.entries,
            "first_step": runs.first_step,
            "opaque_zero": 0,
            **strides_of("grad", grad, "image filter row column"),
        },
        constants={
            "FILTERS": filters,
            "COLUMNS": columns,
            "WIDTH": runs.width,
            "SIZE": arranged.kernel_size,
            "TAPS": taps,
            "PLANES": planes,
            "TILE": TILE,
            "CELLS": cell_parts.shape[3] if of == "cells" else 0,
            "OF_FILTERS": of == "filters",
            "ROWS": columns if runs.turned else min(config.rows, runs.width),
            "TURNED": runs.turned,
            "PIECE": PIECE,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


@triton.jit(do_not_specialize=SIZES)
def _feature_unification_fold_kernel(
    cell_parts, grad_features,
    # (squares, runs, sides, CELLS, COLUMNS), (B, C, h, w)
    height, width, positions, square_rows, square_columns, channels, runs, repeats, channel_stride,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    CELLS: tl.constexpr, SIDES: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels of POSITIONS positions; grid: (images, runs of channels, runs of positions).

    A channel is in up to `repeats` columns of entries, and an entry in a run for each class, or in two that are turned,
    as one side and as the other. WHOLE says that POSITIONS divide an image's positions.
    """
    EDGE: tl.constexpr = TILE + SIZE - 1
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    position = tl.program_id(2) * POSITIONS + tl.arange(0, POSITIONS)
    row = tl.minimum(position, positions - 1) // width + SIZE // 2
    column = tl.minimum(position, positions - 1) % width + SIZE // 2
    total = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    CLASSES: tl.constexpr = COLUMNS // WIDTH
    RUN: tl.constexpr = FILTERS // CLASSES
    for repeat in tl.range(0, repeats):
        output = (channel * FILTERS) // channels + repeat
        meets = (channel < channels) & (output < FILTERS) & (output * channels < (channel + 1) * FILTERS)
        begin = channel - (output * channels) // FILTERS
        class_ = (output * channels) % FILTERS // RUN if CLASSES > 1 else 0 * output
        at = class_ * WIDTH + output // CLASSES
        for share in tl.static_range(CLASSES * SIDES):
            run = begin - share if SIDES > 1 else begin * CLASSES - class_ + share
            exists = meets & (run >= 0) & (run < runs)
            side = share if SIDES > 1 else 0
            entry = (run.to(tl.int64) * SIDES + side) * CELLS * COLUMNS + at
            for up in tl.static_range((EDGE + TILE - 1) // TILE):
                for back in tl.static_range((EDGE + TILE - 1) // TILE):
                    square_row = row // TILE - up
                    square_column = column // TILE - back
                    cell_row = row - square_row * TILE
                    cell_column = column - square_column * TILE
                    sees = (square_row >= 0) & (square_row < square_rows) & (cell_row < EDGE)
                    sees = sees & (square_column >= 0) & (square_column < square_columns) & (cell_column < EDGE)
                    square = (image * square_rows + square_row) * square_columns + square_column
                    place = square * runs * SIDES * CELLS * COLUMNS + (cell_row * EDGE + cell_column) * COLUMNS
                    place = cell_parts + entry[:, None] + place[None, :]
                    total += tl.load(place, mask=exists[:, None] & sees[None, :], other=0.0)
    place = grad_features + image * channels * channel_stride
    place = place + channel.to(tl.int64)[:, None] * channel_stride + position[None, :]
    mask = (channel < channels)[:, None]
    if not WHOLE:
        mask = mask & (position < positions)[None, :]
    tl.store(place, total, mask=mask)


def plan_fold(cell_parts: Tensor, grad_features: Tensor, arranged: Arranged) -> Launch:
    """The launch that adds up the partial sums of `plan_backward` to `grad_features` (B, C, h, w), contiguous."""
    batch, channels, height, width = grad_features.shape
    _, _, sides, cells, columns = cell_parts.shape
    runs = arranged.runs
    positions = height * width
    return Launch(
        kernel=_feature_unification_fold_kernel,
        grid=(batch, triton.cdiv(channels, _FOLD_CHANNELS), triton.cdiv(positions, _FOLD_POSITIONS)),
        arguments={
            "cell_parts": cell_parts,
            "grad_features": grad_features,
            "height": height,
            "width": width,
            "positions": positions,
            "square_rows": triton.cdiv(height, TILE),
            "square_columns": triton.cdiv(width, TILE),
            "channels": channels,
            "runs": runs.number,
            "repeats": 1 if channels % runs.filters == 0 else (runs.filters - 1) // channels + 2,
            "channel_stride": positions,
        },
        constants={
            "FILTERS": runs.filters,
            "COLUMNS": columns,
            "WIDTH": runs.width,
            "SIZE": arranged.kernel_size,
            "TILE": TILE,
            "CELLS": cells,
            "SIDES": sides,
            "WHOLE": positions % _FOLD_POSITIONS == 0,
            "CHANNELS": _FOLD_CHANNELS,
            "POSITIONS": _FOLD_POSITIONS,
        },
        options={"num_warps": 4, "num_stages": 1},
    )
