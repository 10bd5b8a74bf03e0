"""The work of the window attention's forward kernel, counted from its launch: keys, products, exponentials, bytes.

All figures are for one output pixel, averaged over the output, unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anyup.ops.window_attention.tiles import axis_unions
from anyup.window import Window
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        window: keys in the exact window.
        tile_keys: keys of the pixel's tile: what is loaded in a pass.
        logit_slots: keys that a pass makes logits of, padding included.
        value_slots: keys in the product with the values, padding included.
        logit_operations, value_operations: floating-point operations of all products, padding included.
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
    resident, piece = constant["RESIDENT_BLOCKS"], constant["SLICE"]
    heads, dim = constant["HEADS"], constant["WIDTH"]
    channels = workload.channels
    sizes = zip(workload.size, workload.grid, (rows, columns), strict=True)
    unions = [axis_unions(window, *each) for each in sizes]
    counts = [a * b for a in unions[0] for b in unions[1]]
    tiles = len(counts)
    # A tile at the border works on as many pixels as any other.
    padded = tiles * rows * columns * workload.batch / workload.pixels
    blocks = sum(-(-count // block) for count in counts) / tiles
    keys = padded * sum(counts) / tiles
    slots = padded * blocks * block
    value_slots = padded * resident * block if resident else slots
    run = piece if resident else piece * constant["SLICES"]
    runs = -(-channels // run)
    passes = 2 if resident else 1 + runs
    exact = workload.mean_window(window)
    query_bytes = heads * dim * argument["query"].element_size()
    key_bytes = heads * dim * argument["key"].element_size()
    value_bytes = channels * argument["value"].element_size()
    lse_bytes = 4 * heads if constant["SAVE_LSE"] else 0
    once = query_bytes + value_bytes + lse_bytes
    query_loads = padded * (1 if constant["KEEP"] else passes * blocks)
    return Work(
        window=exact,
        tile_keys=keys,
        logit_slots=slots,
        value_slots=value_slots,
        logit_operations=2 * passes * slots * heads * dim,
        value_operations=2 * value_slots * runs * run,
        exact_operations=2 * exact * (heads * dim + channels),
        exponentials=heads * (passes * slots + padded * blocks),
        exact_exponentials=heads * exact,
        bytes_compulsory=once + (key_bytes + value_bytes) * workload.batch * workload.keys / workload.pixels,
        bytes_asked=once
        + (query_loads - 1) * query_bytes
        + (passes * key_bytes + value_bytes) * keys / (rows * columns),
        programs=launch.grid[0],
        turns=[(blocks, []), (runs, [] if resident else [(blocks, [])])],
    )
