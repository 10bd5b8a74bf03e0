"""The pixel encoder's kernels: which pass a launch is, the launch of a pass on "meta" tensors, and its work.

Work is counted from the launch alone, for each pixel of the map. Compulsory are, of a pass of the plan as it is, the
pixels read once and the result written once, and the plan's products, those made again and the exact ones with the
identity among them. Asked for is all that the programs load and store: weights, tables and statistics too.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from anyup.bench.workloads import Workload
from anyup.kernels.config import Target
from anyup.kernels.launch import Launch
from anyup.kernels.pixel_encoder_config import encoder_configs
from anyup.kernels.pixel_encoder_passes import (
    HalfBlock,
    Source,
    allocate_parts,
    map_source,
    plan_angles,
    plan_pass,
    plan_pool,
)
from anyup.kernels.pixel_encoder_statistics import plan_statistics
from benchmarks.operation_work import Work

DIM = 128
IMAGE_CHANNELS = 3

# Of a pass: channels of the input that is projected (0: none, the map of the first block), half blocks, whether it
# measures, stores, rotates.
_PASSES = {
    "pixel_encoder_image_1": (IMAGE_CHANNELS, 0, True, False, False),
    "pixel_encoder_image_2": (IMAGE_CHANNELS, 1, True, False, False),
    "pixel_encoder_image_3": (IMAGE_CHANNELS, 2, True, True, False),
    "pixel_encoder_map_1": (DIM, 0, True, False, False),
    "pixel_encoder_map_2": (DIM, 1, True, False, False),
    "pixel_encoder_map_3": (DIM, 2, True, True, False),
    "pixel_encoder_measure_1": (0, 0, True, False, False),
    "pixel_encoder_measure_2": (0, 1, True, False, False),
    "pixel_encoder_measure_3": (0, 2, True, True, False),
    "pixel_encoder_apply": (0, 2, False, True, False),
    "pixel_encoder_rotate": (0, 2, False, True, True),
    # Of bands, where the statistics are known already.
    "pixel_encoder_store_image": (IMAGE_CHANNELS, 2, False, True, False),
    "pixel_encoder_store_map": (DIM, 2, False, True, False),
    "pixel_encoder_store_half": (0, 1, False, True, False),
}
KERNELS = (
    *_PASSES,
    "pixel_encoder_pool",
    "pixel_encoder_join",
    "pixel_encoder_statistics",
    "pixel_encoder_angles",
)
ON_THE_GRID = (
    *(f"pixel_encoder_{name}" for name in ("measure_1", "measure_2", "measure_3", "apply")),
    "pixel_encoder_statistics",
)
"""What the blocks of the keys need, in float32 whatever the model's dtype is."""


def plan(
    kernel: str, workload: Workload, dtype: torch.dtype, *, target: Target, precision: str
) -> tuple[Launch, dict[str, Any]]:
    """The launch of a pass with the rule's first config, on "meta" tensors, and the config."""
    batch, count = workload.batch, math.prod(workload.size)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    norm = empty(batch, 3, DIM, dtype=torch.float32)
    half = HalfBlock(norm, empty(DIM, DIM))
    stored = empty(batch, count, DIM)
    if kernel == "pixel_encoder_angles":
        tables = empty(sum(workload.size), 2, DIM, dtype=torch.float32)
        return plan_angles(empty(2, DIM), tables, size=workload.size), {}
    kinds = {"pixel_encoder_rotate": "rotate", "pixel_encoder_pool": "pool"}
    config = encoder_configs(kinds.get(kernel, "pass"), dtype, target)[0]
    parts = allocate_parts(batch, count, DIM, config, torch.device("meta"))
    if kernel in ("pixel_encoder_join", "pixel_encoder_statistics"):
        scale = empty(DIM)
        statistics = plan_statistics(parts, scale, scale, norm, count=count, pixels=config.pixels, eps=1e-5)
        return next(launch for launch in statistics if name_of(launch) == kernel), {}
    if kernel == "pixel_encoder_pool":
        means = empty(batch, workload.keys, 2, DIM, dtype=torch.float32)
        launch = plan_pool(
            map_source(stored), half, norm, means,
            size=workload.size, cells=workload.grid, precision=precision, config=config,
        )  # fmt: skip
        return launch, asdict(config)
    inputs, halves, measures, stores, rotates = _PASSES[kernel]
    if inputs == IMAGE_CHANNELS:  # an image as it comes has its pixels innermost
        source = Source(empty(batch, inputs, count).transpose(1, 2), empty(DIM, inputs))
    else:
        source = Source(stored, empty(DIM, DIM)) if inputs else map_source(stored)
    launch = plan_pass(
        source, (half,) * halves,
        parts=parts if measures else None, out=stored if stores else None,
        tables=empty(sum(workload.size), 2, DIM, dtype=torch.float32) if rotates else None,
        size=workload.size, precision=precision, config=config,
    )  # fmt: skip
    return launch, asdict(config)


def name_of(launch: Launch) -> str:
    """The pass that a launch of these kernels is.

    In half precision a map is brought in by a product with the identity, so that "measure_2" is the kernel "map_2", and
    "store_map" is "apply".
    """
    kernel = str(launch.kernel.__name__).strip("_").removesuffix("_kernel")
    if kernel != "pixel_encoder_pass":
        return kernel
    constant = launch.constants
    projected = constant["INPUTS"]
    source = "image" if projected < constant["CHANNELS"] else "map"
    if constant["ROTATES"]:
        return "pixel_encoder_rotate"
    if not constant["MEASURES"]:
        if constant["HALVES"] < 2:
            return "pixel_encoder_store_half"
        as_it_is = not projected or (source == "map" and launch.arguments["pixels"].element_size() == 2)
        return "pixel_encoder_apply" if as_it_is else f"pixel_encoder_store_{source}"
    return f"pixel_encoder_{source if projected else 'measure'}_{constant['HALVES'] + 1}"


def work(launch: Launch) -> Work:
    """The work of a launch of these kernels."""
    kernel = name_of(launch)
    if kernel == "pixel_encoder_angles":
        return _angles_work(launch)
    if kernel == "pixel_encoder_statistics":
        return _statistics_work(launch)
    if kernel == "pixel_encoder_join":
        return _join_work(launch)
    return _pool_work(launch) if kernel == "pixel_encoder_pool" else _pass_work(launch)


def _pass_work(launch: Launch) -> Work:
    constant, argument = launch.constants, launch.arguments
    size = argument["pixels"].element_size()
    split = 1 if size == 2 else 3
    channels, inputs, dim = constant["CHANNELS"], constant["INPUTS"], constant["DIM"]
    units = len(argument["pixels"]) * argument["count"]
    programs = math.prod(launch.grid)
    padded = programs * constant["PIXELS"] / units
    again = constant["ROTATES"] and not constant["SWAPS"]  # made twice, the second time as its partners
    products = constant["HALVES"] + again
    read = (inputs or channels) * size
    written = channels * size if constant["STORES"] else 0
    # For each program: weights, centre, scale and shift of each normalisation. For each pixel that is rotated: cosines
    # and sines of its row and of its column.
    weights = (products * channels * channels + inputs * channels) * size + constant["HALVES"] * 3 * dim * 4
    shared = programs * weights / units + constant["ROTATES"] * 2 * 2 * dim * 4
    # What is not kept for the residual is read again, or stored and read; a pixel is read again as its partners; each
    # tile has statistics.
    fetched = channels * size * (2 if inputs else 1) if constant["FETCHES"] and constant["HALVES"] > 1 else 0
    asked = read + written + fetched + again * channels * size + constant["MEASURES"] * programs * 2 * dim * 4 / units
    exponentials = constant["HALVES"] * channels
    return Work(
        units=units,
        exact_operations=2 * channels * (products * channels + inputs),
        operations=split * padded * 2 * dim * (products * dim + constant["INPUT_DIM"]),
        exact_exponentials=exponentials,
        exponentials=padded * constant["HALVES"] * dim,
        bytes_compulsory=read + written,
        bytes_asked=asked + shared,
        turns=[],
        bytes_shared=shared,
    )


def _pool_work(launch: Launch) -> Work:
    constant, argument = launch.constants, launch.arguments
    size = argument["pixels"].element_size()
    split = 1 if size == 2 else 3
    channels, dim, inputs = constant["CHANNELS"], constant["DIM"], constant["INPUT_DIM"]
    batch = len(argument["pixels"])
    units = batch * argument["count"]
    cells = [
        _cells(argument[length], argument[number])
        for length, number in (("height", "cells_high"), ("width", "cells_wide"))
    ]
    turns = [-(-rows * columns // constant["PIXELS"]) for rows in cells[0] for columns in cells[1]]
    seen = batch * sum(cells[0]) * sum(cells[1]) / units
    padded = batch * sum(turns) * constant["PIXELS"] / units
    shared = batch * sum(turns) * (channels * channels + (channels * channels if inputs else 0)) * size / units
    written = 2 * dim * 4 * math.prod(launch.grid) / units
    return Work(
        units=units,
        exact_operations=2 * channels * (channels + (channels if inputs else 0)),
        operations=split * padded * 2 * dim * (dim + inputs),
        exact_exponentials=2 * channels,
        exponentials=padded * 2 * dim,
        bytes_compulsory=channels * size + written,
        bytes_asked=seen * channels * size + written + shared,
        turns=[(sum(turns) / len(turns), [])],
        bytes_shared=shared,
    )


def _cells(length: int, number: int) -> list[int]:
    """The pixels along an axis of each cell of adaptive average pooling."""
    return [-((cell + 1) * length // -number) - cell * length // number for cell in range(number)]


def _statistics_work(launch: Launch) -> Work:
    argument = launch.arguments
    batch, tiles = argument["parts"].shape[:2]
    units = batch * argument["count"]
    parts = argument["parts"].numel() * argument["parts"].element_size() / units
    rounds = -(-tiles // launch.constants["TILES"])
    # The tiles' means are read for the mean, and again with the deviations.
    return Work(units, 0, 0, 0, 0, parts, 1.5 * parts, [(rounds, []), (rounds, [])])


def _join_work(launch: Launch) -> Work:
    argument = launch.arguments
    units = len(argument["parts"]) * argument["count"]
    moved = sum(argument[name].numel() * argument[name].element_size() for name in ("parts", "joined")) / units
    return Work(units, 0, 0, 0, 0, moved, moved, [])


def _angles_work(launch: Launch) -> Work:
    argument = launch.arguments
    units = argument["height"] * argument["width"]
    written = argument["tables"].numel() * 4 / units
    exponentials = argument["tables"].numel() / units
    return Work(units, 0, 0, exponentials, exponentials, written, written, [])
