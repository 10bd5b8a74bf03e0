"""The prediction of a plan's work and memory.

Work is counted in products of D x D for each pixel, as in docs/memory.md.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from anyup.limited_memory.plans import HALO, Bands, Plan, Stage, band_rows
from anyup.limited_memory.task import Size, Task, pixels_of
from anyup.ops.feature_unification import eager as feature_unification
from anyup.ops.pixel_encoder import tiles as pixel_encoder
from anyup.ops.precision import key_dtype, working_dtype
from anyup.ops.window_attention import eager as window_attention
from anyup.window import axis_bounds

BAND_PIXELS = 2**16
"""Pixels of a band where no limit is set: about 30 MB for each map of 128 float32 channels."""

# Bytes that libraries take beside tensors: workspaces, compiled code, memory that an allocator does not give back.
_OVERHEAD = 55 * 10**6
_OVERHEAD_OF_A_THREAD = 20 * 10**6
_OVERHEAD_ELSEWHERE = 150 * 10**6

# Products for each pixel of the image. A pass of an encoder makes all products before the normalisation whose
# statistics it takes.
_ENCODER = 4
_IMAGE_PASSES = 0 + 1 + 2 + 3
_PASSES = 1 + 2 + 3 + 4  # of the key encoder, and of the query encoder
_IMAGE_ANEW = 4 * _ENCODER  # the encoded image, once for each pass of an encoder that keeps nothing
_KEYS_ANEW = _ENCODER + _ENCODER  # the encoded image and the key encoder, for the pooled keys
_IMAGE_FROM_TRUNK = 2  # the encoded image, from the trunk that the image encoder's last pass left
# Where the encoder at work keeps its trunk: all its passes, the encoded image before them, and of the key encoder the
# pooled keys after them.
_KEYS_FROM_TRUNK = 8
_QUERIES_FROM_TRUNK = 9

# The pages of a memory map that writing a piece makes resident, neighbouring pages included, as a multiple of its size.
_PAGES = 3


def default_rows(width: int) -> int:
    """The number of rows, `width` pixels each, that are computed at a time where no limit is set."""
    return band_rows(width, BAND_PIXELS)


def whole(task: Task, limit: int | None, one_by_one: bool = False) -> Plan:
    """The plan with whole maps, of the whole batch at once or of one image after the other."""
    images = 1 if one_by_one else task.batch
    image, output = (pixels_of(size) for size in (task.image, task.output))
    one, queries = image * task.pixel_bytes, images * output * task.pixel_bytes
    shrinks = task.output != task.image and task.output[0] <= task.image[0] and task.output[1] <= task.image[1]
    out = task.batch * output * task.value_channels * task.value_dtype.itemsize if task.returned else 0
    before = out if one_by_one and task.batch > 1 else 0
    keys = _key_bytes(task, images)
    tile = _tile_bytes(task, image)
    # The encoded image, plus one map while it is computed, plus two maps while an encoder reads it. On a GPU kernels
    # run both encoders that read it at once, each with a map of every image.
    encoded = images * one
    pair = 0 if task.device_type == "cpu" else 2 * images * one
    if task.output == task.image:
        most = encoded + max(images * one + one, 2 * one, pair)
    elif shrinks:
        most = encoded + max(2 * one, pair) + queries
    else:
        most = encoded + max(images * one + one, pair) + 2 * queries
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
    step = task.output[0] if at_once else min(default_rows(task.output[1]), task.region[2])
    held_pieces, piece, scratch = _piece_bytes(task, step)
    piece = scratch if at_once else piece + scratch  # where all is computed at once, the piece is the output
    stages = (
        Stage("image", made, _overhead(task) + before + max(most + 3 * tile, encoded + one + 4 * tile, 2 * queries)),
        Stage("keys", _key_products(task), _overhead(task) + before + held + keys),
        Stage("output", _attention_products(task), _overhead(task) + queries + carried + held_pieces + piece + out),
    )
    return Plan(task, "image by image" if one_by_one else "whole", None, stages, limit, _plain_products(task))


def banded(task: Task, bands: Bands, limit: int | None) -> Plan:
    """The plan with exactly these bands of each image."""
    height, width = task.own
    image, images = pixels_of(task.own), task.images_at_once
    band = bands.rows * width * task.pixel_bytes
    kept, later, encoded = (rows / height for rows in (bands.kept, bands.kept_for_output, bands.encoded))
    row = images * width * task.pixel_bytes
    # Allocated from the start to the end: the overhead, and the output of a batch of several images.
    out = task.batch * pixels_of(task.output) * task.value_channels * task.value_dtype.itemsize if task.returned else 0
    always = _overhead(task) + (out if task.batch > 1 else 0)
    scratch = 4 * _tile_bytes(task, bands.rows * width) + bands.rows * width * task.input_dim * 8
    rest = 1 - kept
    maps = 2 if rest else 1  # beside the stored ones: the trunk of a band that has none, and the branch
    alone = always + row * bands.kept + maps * band + scratch
    pooling = 3 * pixels_of(task.grid) * task.dim * working_dtype(task.dtype).itemsize  # two sums and the result
    made = task.batch * image
    stages: list[Stage] = []
    if task.context != "all":
        first = 3 if task.is_thin else 4
        stages.append(Stage("statistics of the image", made * (first * kept + _IMAGE_PASSES * rest), alone))
        if bands.together and task.needs_queries:
            from_map = _IMAGE_FROM_TRUNK + 2 * _PASSES + _ENCODER
            products = made * (from_map * kept + (2 * _PASSES + _IMAGE_ANEW + _KEYS_ANEW) * rest)
            stages.append(Stage("statistics of keys, queries", products, alone + band + pooling))
        elif bands.together:
            from_map = _IMAGE_FROM_TRUNK + _PASSES + _ENCODER
            products = made * (from_map * kept + (_PASSES + _IMAGE_ANEW + _KEYS_ANEW) * rest)
            stages.append(Stage("statistics of the keys", products, alone + band + pooling))
        else:
            more = row * bands.encoded
            products = made * (_KEYS_FROM_TRUNK * kept + (_PASSES + _IMAGE_ANEW + _KEYS_ANEW) * rest)
            stages.append(Stage("statistics of the keys", products, alone + pooling + more))
            if task.needs_queries:
                from_trunk = _QUERIES_FROM_TRUNK * kept - _ENCODER * encoded
                products = made * (from_trunk + (_PASSES + _IMAGE_ANEW) * rest)
                stages.append(Stage("statistics of the queries", products, alone + more))
    remains = always + row * bands.kept_for_output
    stages.append(Stage("keys", _key_products(task), remains + _key_bytes(task, images)))
    held_pieces, piece, attention = _piece_bytes(task, bands.output_rows)
    attended, reached, tile = _attention_products(task), 0, 0
    if task.needs_queries:
        rows, columns = _reached(task, bands.output_rows)
        work = max(2 * rows * columns, bands.rows * width * maps) * task.pixel_bytes
        share = task.region[3] / task.output[1] * task.region[2] / task.output[0]
        repeated = 1 + 2 * HALO / bands.output_rows
        again = (5 if bands.together else 2) * later + 9 * (1 - later)
        attended += repeated * task.batch * share * (pixels_of(task.image) * again + 10 * pixels_of(task.output))
        projected = (min(bands.output_rows, task.region[2]) + 2 * HALO) * min(task.region[3] + 2 * HALO, task.output[1])
        reached = work + projected * task.pixel_bytes * (1 if task.image == task.output else 2)
        tile = _tile_bytes(task, rows * columns)
    if task.batch == 1:
        remains += out
    remains += reached + held_pieces + _grid_bytes(task, images)
    stages.append(Stage("output", attended, remains + max(4 * tile, piece + attention)))
    return Plan(task, "bands", bands, tuple(stages), limit, _plain_products(task))


def _reached(task: Task, step: int) -> Size:
    """The most rows and columns of the image that `step` rows of the output need."""
    tile = task.tile[1] if task.tile else task.region[3]
    lengths = zip((min(step, task.region[2]), min(tile, task.region[3])), task.output, task.image, strict=True)
    return tuple(  # type: ignore[return-value]
        min(length, -(-(count + 2 * HALO) * length // total) + (length != total)) for count, total, length in lengths
    )


def _piece_bytes(task: Task, step: int) -> tuple[int, int, int]:
    """Bytes of the pieces that exist beside `step` computed rows, of these rows, and of the attention's scratch."""
    _, _, height, width = task.region
    columns = min(task.tile[1], width) if task.tile else width
    step = min(step, height)
    made = step * columns * task.value_channels * task.value_dtype.itemsize
    held = 0
    if not task.returned:
        rows = min(task.tile[0], height) if task.tile else step
        held = 2 * task.batch * rows * columns * task.value_channels * task.out_dtype.itemsize
        if rows == step and task.batch == 1 and task.value_dtype == task.out_dtype:
            held //= 2  # the computed rows are the piece itself; the caller still holds the previous piece
        if task.mapped:
            held += _PAGES * task.batch * rows * columns * task.value_channels * task.out_dtype.itemsize
    shape = (task.heads, task.dim, task.value_channels)
    scratch = window_attention.scratch_bytes(task.window, step, task.output, task.grid, shape, task.device_type)
    return held, made, task.workers * scratch


def _attention_products(task: Task) -> float:
    pixels = task.batch * pixels_of(task.region[2:])
    return pixels * _mean_window(task) * (task.dim + task.value_channels) / task.dim**2


def _grid_bytes(task: Task, images: int) -> int:
    """Bytes of the keys, the values, and the copies of one image's keys and values that the attention makes."""
    cells, wide = pixels_of(task.grid), working_dtype(task.dtype).itemsize
    own = images * (task.pixel_bytes + task.value_channels * task.value_dtype.itemsize)
    return cells * (own + wide * task.dim + task.value_channels * working_dtype(task.value_dtype).itemsize)


def _key_bytes(task: Task, images: int) -> int:
    """The peak in bytes on the feature grid, while the features' keys are computed and joined with the image's."""
    cells, taps = pixels_of(task.grid), task.filter_size**2
    shape = (images, task.channels, cells)
    unifying = feature_unification.scratch_bytes(shape, task.filters, taps, task.dtype, task.device_type, task.workers)
    joining = images * cells * 12 * task.dim * key_dtype(task.dtype, torch.device(task.device_type)).itemsize
    return max(unifying, joining)


def _tile_bytes(task: Task, pixels: int) -> int:
    """Bytes of one map of all tiles that are computed at a time, for a map of `pixels` pixels."""
    pixel_bytes = task.dim * working_dtype(task.dtype).itemsize
    return pixel_encoder.scratch_bytes(pixels, pixel_bytes, task.device_type, task.workers)


def _overhead(task: Task) -> int:
    """Bytes that libraries take beside tensors."""
    if task.device_type != "cpu":
        return _OVERHEAD_ELSEWHERE
    return _OVERHEAD + (_OVERHEAD_OF_A_THREAD * task.workers if task.threads > 1 else 0)


def _key_products(task: Task) -> float:
    """Products on the feature grid: the unification, the blocks and the aggregation."""
    cells = task.batch * pixels_of(task.grid)
    return cells * (30 + task.channels * task.filters * task.filter_size**2 / task.dim**2)


@lru_cache(maxsize=256)
def _plain_products(task: Task) -> float:
    """Products of a call or a stream with whole maps."""
    image, output = task.batch * pixels_of(task.image), task.batch * pixels_of(task.output)
    made = {"nothing": 13 * image + 10 * output, "queries": 8 * image, "all": 0}[task.context]
    return made + _key_products(task) + _attention_products(task)


@lru_cache(maxsize=256)
def _mean_window(task: Task) -> float:
    """The mean number of keys in a pixel's window."""
    mean = 1.0
    for queries, keys in zip(task.output, task.grid, strict=True):
        start, stop = axis_bounds(task.window, queries, keys)
        mean *= (sum(stop) - sum(start)) / queries
    return mean
