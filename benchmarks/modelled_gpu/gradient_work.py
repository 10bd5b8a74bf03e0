"""The kernels of the pixel encoder's backward pass: their launches on "meta" tensors, and their work for each pixel."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from anyup.bench.workloads import Workload
from anyup.kernels.launch import Launch, Target
from anyup.kernels.pixel_encoder_backward import TILE, plan_half, plan_rotation, plan_total
from anyup.kernels.pixel_encoder_config import encoder_configs, silu_form
from anyup.ops.kernel_device import multiprocessors
from benchmarks.modelled_gpu import roofline
from benchmarks.modelled_gpu.operation_work import Work

DIM = 128
KERNELS = ("pixel_encoder_backward_half", "pixel_encoder_backward_total", "pixel_encoder_backward_rotation")
WITHOUT_PRODUCTS = KERNELS[1:]


def plan(
    kernel: str, workload: Workload, dtype: torch.dtype, *, target: Target, precision: str
) -> tuple[Launch, dict[str, Any]]:
    """The launch with the rule's first config, on "meta" tensors, and the config."""
    batch, count = workload.batch, math.prod(workload.size)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pixels, vector, wide = empty(batch, count, DIM), empty(DIM), torch.float32
    unit, means = empty(batch, 3, DIM, dtype=wide), empty(batch, 2, DIM, dtype=wide)
    if kernel == "pixel_encoder_backward_total":
        return plan_total(pixels, pixels, unit, vector, means, pixels, pixels), {}
    if kernel == "pixel_encoder_backward_rotation":
        places, sums = empty(sum(workload.size), 2, dtype=wide), empty(batch, -(-count // TILE), 2, DIM, dtype=wide)
        form = silu_form(dtype, target)
        return plan_rotation(pixels, pixels, places, empty(2, DIM), pixels, sums, size=workload.size, form=form), {}
    config = encoder_configs("half", dtype, target)[0]
    card = roofline.device_of(str(target.arch))
    number = multiprocessors(torch.device("meta")) if card is None else card.sms
    sums = empty(batch, config.programs(-(-count // config.pixels), batch, number), 2, DIM, dtype=wide)
    launch = plan_half(
        pixels, pixels, unit, vector, vector, empty(DIM, DIM), pixels, pixels, sums, precision=precision, config=config
    )
    return launch, asdict(config)


def work(launch: Launch) -> Work:
    """The work of a launch: compulsory are its maps, asked for the weights of each turn too."""
    argument, constant = launch.arguments, launch.constants
    pixels = argument["out"]
    size, units = pixels.element_size(), pixels.shape[0] * pixels.shape[1]
    if "coordinates" in argument:
        moved = 3 * DIM * size + argument["sums"].nbytes / units
        return Work(units, 0, 0, 2 * DIM, 2 * DIM, 3 * DIM * size, moved, [])
    if "weight" not in argument:
        moved = (3 + constant["ADDS"]) * DIM * size
        return Work(units, 0, 0, 0, 0, moved, moved, [])
    tiles = -(-pixels.shape[1] // constant["PIXELS"])
    trips = -(-tiles // launch.grid[0])
    turns = trips * math.prod(launch.grid)
    shared = (turns * DIM * DIM * size + argument["sums"].nbytes) / units
    exact = 2 * DIM * DIM
    return Work(
        units=units,
        exact_operations=exact,
        operations=turns * constant["PIXELS"] / units * exact * (1 if size == 2 else 3),
        exact_exponentials=DIM,
        exponentials=turns * constant["PIXELS"] / units * DIM,
        bytes_compulsory=4 * DIM * size,
        bytes_asked=4 * DIM * size + shared,
        turns=[(trips, [(DIM // constant["PIECE"], [])])],
        bytes_shared=shared,
    )
