"""The work of the window attention's kernels, counted from a launch: keys, products, exponentials, bytes.

All figures are for one output pixel, averaged over the output, unless they say otherwise.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyup.bench.workloads import Workload
from anyup.ops.window_attention.tiles import axis_unions_and_cores
from anyup.window import Window, axis_bounds
from benchmarks.modelled_gpu.machine_code import Branch


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        window: keys in the exact window.
        tile_keys: keys of the pixel's tile, or pairs with keys of the tiles of keys: what is loaded in a pass.
        logit_slots: keys that a pass makes logits of, padding included.
        value_slots: keys in the product with the values, padding included.
        logit_operations, value_operations: floating-point operations of all products over the channels of the heads
            and over those of the values, padding included.
        exact_operations: those on the exact windows, each product once.
        exponentials, exact_exponentials: of all passes; of one pass on the exact windows.
        bytes_compulsory: each input once, each output once.
        bytes_asked: what the programs load and store.
        programs: of the launch.
        turns: the kernel's loops as `machine_code.Code.weights` takes them.
    """

    window: float
    tile_keys: float
    logit_slots: float
    value_slots: float
    logit_operations: float
    value_operations: float
    exact_operations: float
    exponentials: float
    exact_exponentials: float
    bytes_compulsory: float
    bytes_asked: float
    programs: int
    turns: list[Any]


def forward_work(workload: Workload, window: Window, launch: Any) -> Work:
    """The work of a launch that `kernels.window_attention_forward.plan_forward` made."""
    constant, argument = launch.constants, launch.arguments
    rows, columns, block = constant["ROWS"], constant["COLUMNS"], constant["BLOCK"]
    kept_in_memory = "kept" in argument
    resident, piece = 0 if kept_in_memory else constant["RESIDENT_BLOCKS"], constant["SLICE"]
    heads, dim = constant["HEADS"], constant["WIDTH"]
    channels = workload.channels
    tiles = _Tiles.of(workload, window, rows, columns)
    blocks = tiles.mean(lambda keys, _: -(-keys // block))
    slots = tiles.padded * blocks * block
    run = piece if resident else piece * constant["SLICES"]
    runs = -(-channels // run)
    if resident:
        kept = _kept(constant)
        slots = tiles.padded * sum(size for _, size in kept)
    passes = 1 if resident else 2 if kept_in_memory else 1 + runs
    exact = workload.mean_window(window)
    query_bytes = heads * dim * argument["query"].element_size()
    key_bytes = heads * dim * argument["key"].element_size()
    value_bytes = channels * argument["value"].element_size()
    lse_bytes = 4 * heads if constant["SAVE_LSE"] else 0
    once = query_bytes + value_bytes + lse_bytes
    query_loads = tiles.padded * (1 if resident or constant["LOAD_ONCE"] else passes * blocks)
    # Each share of a block's keys, or of a group of blocks that stay, scales its sum to another pivot.
    scaled = tiles.padded * constant["ROW_PARTIALS"] * (-(-len(kept) // constant["GROUP"]) if resident else blocks + 1)
    if resident:
        masks = [Branch(tiles.mean(lambda _, core, end=f + size: end > core)) for f, size in kept]
        turns = [*masks, *([(heads, masks)] if heads > 1 else masks), (runs, [])]
    else:
        in_core = tiles.mean(lambda _, core: core // block)
        turns = [(blocks, [Branch(1 - in_core / blocks)])]
        if kept_in_memory:
            turns = [(tiles.number * workload.batch / math.prod(launch.grid), [*turns, *turns, (runs, [(blocks, [])])])]
        else:
            turns.append((runs, list(turns)))
    return Work(
        window=exact,
        tile_keys=tiles.padded * tiles.keys,
        logit_slots=slots,
        value_slots=slots,
        logit_operations=2 * passes * slots * heads * dim,
        value_operations=2 * slots * runs * run,
        exact_operations=2 * exact * (heads * dim + channels),
        exponentials=heads * (passes * slots + scaled),
        exact_exponentials=heads * exact,
        bytes_compulsory=once + (key_bytes + value_bytes) * workload.batch * workload.keys / workload.pixels,
        bytes_asked=once
        + (query_loads - 1) * query_bytes
        + (kept_in_memory and (1 + runs) * slots * argument["kept"].element_size())
        + (passes * key_bytes + value_bytes) * slots / (rows * columns),
        programs=math.prod(launch.grid),
        turns=turns,
    )


@dataclass(frozen=True)
class _Tiles:
    """A launch's tiles of pixels: for each how many keys it sees, and how many of these all its pixels see.

    `padded`: pixels worked on, for each pixel; a tile at the border works on as many as any other.
    """

    counts: Counter[tuple[int, int]]
    padded: float

    @classmethod
    def of(cls, workload: Workload, window: Window, rows: int, columns: int) -> _Tiles:
        sizes = zip(workload.size, workload.grid, (rows, columns), strict=True)
        down, across = (Counter(axis_unions_and_cores(window, *each)) for each in sizes)
        counts: Counter[tuple[int, int]] = Counter()
        for (a, b), times in down.items():
            for (c, d), more in across.items():
                counts[a * c, b * d] += times * more
        return cls(counts, counts.total() * rows * columns * workload.batch / workload.pixels)

    def mean(self, of: Callable[[int, int], float]) -> float:
        """The mean over the tiles of something of a tile's two numbers."""
        return sum(of(*tile) * times for tile, times in self.counts.items()) / self.counts.total()

    @property
    def number(self) -> int:
        """Of an image's tiles."""
        return self.counts.total()

    @property
    def keys(self) -> float:
        """Mean number of keys that a tile sees."""
        return self.mean(lambda keys, _: keys)


def backward_query_work(workload: Workload, window: Window, launch: Any) -> Work:
    """The work of a launch that `kernels.window_attention_backward_query.plan_backward_query` made."""
    constant, argument = launch.constants, launch.arguments
    rows, columns, block = constant["ROWS"], constant["COLUMNS"], constant["BLOCK"]
    resident, heads = constant["RESIDENT_BLOCKS"], constant["HEADS"]
    tiles = _Tiles.of(workload, window, rows, columns)
    blocks = tiles.mean(lambda keys, _: -(-keys // block))
    slots = tiles.padded * blocks * block
    kept = _kept(constant)
    if resident:
        slots = tiles.padded * sum(size for _, size in kept)
    width = heads * constant["WIDTH"]
    groups = launch.grid[1]
    slices = -(-workload.channels // constant["SLICE"])
    exact = workload.mean_window(window)
    query_bytes = width * argument["query"].element_size()
    value_bytes = workload.channels * argument["value"].element_size()
    once = 2 * query_bytes + value_bytes + 12 * heads
    # Logits, and products with the values: once where they stay, else for delta and for dq.
    passes = 1 if resident else 2
    grad_loads = groups * (1 if resident else 2 * blocks)
    query_loads = 1 if resident or constant["LOAD_ONCE"] else 2 * blocks
    # A head's keys are loaded for the logits and for the sum; where they stay, those that repeat the last as well.
    key_loads = 2 if resident or constant["LOAD_ONCE"] else 3
    tile_keys = tiles.padded * tiles.keys
    if resident:
        masks = [Branch(tiles.mean(lambda _, core, end=f + size: end > core)) for f, size in kept]
        own = constant["GROUP"]
        inside = masks + masks[constant["WAITING"] :]
        turns = [(slices, []), *masks, *([(own, inside)] if own > 1 else inside)]
    else:
        turns = [(blocks, [(slices, [])])] * 2
    return Work(
        window=exact,
        tile_keys=tile_keys,
        logit_slots=slots,
        value_slots=slots,
        logit_operations=(passes + 1) * 2 * slots * width,
        value_operations=groups * passes * 2 * slots * slices * constant["SLICE"],
        exact_operations=2 * exact * (workload.channels + 2 * width),
        exponentials=passes * heads * slots,
        exact_exponentials=heads * exact,
        bytes_compulsory=once + (query_bytes + value_bytes) * workload.batch * workload.keys / workload.pixels,
        bytes_asked=12 * heads
        + query_bytes
        + tiles.padded * (query_loads * query_bytes + grad_loads * value_bytes)
        + (key_loads * query_bytes + groups * passes * value_bytes)
        * (slots if resident else tile_keys)
        / (rows * columns),
        programs=math.prod(launch.grid),
        turns=turns,
    )


def _kept(constant: Any) -> list[tuple[int, int]]:
    """The first number and the size of each block of keys that stays in registers."""
    resident, block = constant["RESIDENT_BLOCKS"], constant["BLOCK"]
    parts = [(n * block, block) for n in range(resident)] + [(resident * block, constant["TAIL"])]
    return [part for part in parts if resident and part[1]]


def backward_grid_work(workload: Workload, window: Window, launch: Any) -> Work:
    """The work of a launch of the backward pass of keys, of values or of both.

    Adding up the parts, a small kernel of torch's, is left out.
    """
    constant, argument = launch.constants, launch.arguments
    of_keys, of_values = "grad_key" in argument, "grad_value" in argument
    block, partials, heads = constant["PIXELS"], constant["PARTIALS"], constant["HEADS"]
    tile = constant["ROWS"] * constant["COLUMNS"]
    sizes = zip(workload.size, workload.grid, (constant["ROWS"], constant["COLUMNS"]), strict=True)
    lengths = [_axis_pixels(window, *each) for each in sizes]
    counts = [a * b for a in lengths[0] for b in lengths[1]]
    blocks = sum(-(-count // block) for count in counts)
    per_pixel = workload.batch / workload.pixels
    slots = blocks * block * tile * per_pixel
    width = heads * constant["WIDTH"]
    slices = -(-workload.channels // constant["SLICE"])
    exact = workload.mean_window(window)
    query_bytes = width * argument["query"].element_size()
    value_bytes = workload.channels * argument["grad"].element_size()
    grid_bytes = workload.keys * per_pixel
    repeats = launch.grid[2]  # groups of heads, or runs of channel slices
    loaded = blocks * block * per_pixel  # pixels, for each pixel
    out_bytes = 4 if partials > 1 else argument["query"].element_size()
    keys_asked = query_bytes * (len(counts) * partials if constant["LOAD_ONCE"] else blocks) * tile * per_pixel
    if of_keys and of_values:
        once = query_bytes + value_bytes + 12 * heads + 2 * (query_bytes + value_bytes) * grid_bytes
        again = 1 + constant["REFETCH"]
        asked = loaded * (again * query_bytes + value_bytes + 12 * heads) + keys_asked
        asked += value_bytes * blocks * tile * per_pixel
        asked += partials * out_bytes * (width + workload.channels) * grid_bytes
        head_products, value_products = 2, 2 * slices
        exact_operations = 2 * width + workload.channels
    elif of_values:
        once = query_bytes + value_bytes + 8 * heads + (query_bytes + value_bytes) * grid_bytes
        # Every run makes the weights again; its gradients are a share of the channels.
        asked = loaded * (repeats * (query_bytes + 8 * heads) + value_bytes) + repeats * keys_asked
        asked += partials * out_bytes * workload.channels * grid_bytes
        head_products, value_products, exact_operations = repeats, repeats * constant["SLICES"], width
    else:
        once = query_bytes + value_bytes + 12 * heads + (2 * query_bytes + value_bytes) * grid_bytes
        # A block's queries are loaded for the logits and again for the sum, once where a head is one piece; the tile's
        # values with every block.
        again = 1 if constant["PIECE"] == constant["WIDTH"] else 2
        asked = loaded * (again * query_bytes + repeats * value_bytes + 12 * heads) + keys_asked
        asked += repeats * value_bytes * blocks * tile * per_pixel + partials * out_bytes * width * grid_bytes
        head_products, value_products, exact_operations = 2, repeats * slices, 2 * width
    turns = blocks / (len(counts) * partials)
    bisection = [(math.ceil(math.log2(size + 1)), []) for size in workload.size for _ in range(2)]
    return Work(
        window=exact,
        tile_keys=sum(counts) * tile * per_pixel,
        logit_slots=slots,
        value_slots=slots,
        logit_operations=2 * slots * head_products * width,
        value_operations=2 * slots * value_products * constant["SLICE"],
        exact_operations=2 * exact * (workload.channels + exact_operations),
        exponentials=(repeats if of_values else 1) * heads * slots,
        exact_exponentials=heads * exact,
        bytes_compulsory=once,
        bytes_asked=asked,
        programs=math.prod(launch.grid),
        turns=[*bisection, (turns, [] if of_values else [(slices, [])])],
    )


def _axis_pixels(window: Window, queries: int, keys: int, length: int) -> list[int]:
    """Along one axis, the pixels that see any key of each run of `length` keys; the last run may be shorter."""
    start, stop = axis_bounds(window, queries, keys)
    return [
        bisect_right(start, min(first + length, keys) - 1) - bisect_right(stop, first)
        for first in range(0, keys, length)
    ]
