"""The kernels of the pixel encoder's backward pass: their launches on "meta" tensors, and their work for each pixel."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from anyup.bench.workloads import Workload
from anyup.kernels.launch import Launch, Target
from anyup.kernels.pixel_encoder_backward import (
    TILE,
    Behind,
    Normalised,
    plan_half,
    plan_rotation,
    plan_spread,
    plan_thin,
    plan_total,
)
from anyup.kernels.pixel_encoder_config import encoder_configs, silu_form
from anyup.ops.kernel_device import multiprocessors
from benchmarks.modelled_gpu import roofline
from benchmarks.modelled_gpu.operation_work import Work

DIM, INPUTS = 128, 3
KERNELS = tuple(f"pixel_encoder_backward_{name}" for name in ("half", "thin", "total", "rotation", "spread"))
WITHOUT_PRODUCTS = KERNELS[2:]


def plan(
    kernel: str, workload: Workload, dtype: torch.dtype, *, target: Target, precision: str
) -> tuple[Launch, dict[str, Any]]:
    """The launch with the rule's first config, on "meta" tensors, and the config.

    Of the half blocks it is the third, where a residual passes by.
    """
    batch, count = workload.batch, math.prod(workload.size)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pixels, vector, wide = empty(batch, count, DIM), empty(DIM), torch.float32
    unit, means = empty(batch, 3, DIM, dtype=wide), empty(batch, 2, DIM, dtype=wide)
    behind = Behind(pixels, unit, vector, means, pixels)
    if kernel == "pixel_encoder_backward_total":
        return plan_total(pixels, behind, pixels), {}
    if kernel == "pixel_encoder_backward_spread":
        return plan_spread(empty(batch, *workload.grid, DIM), pixels, size=workload.size), {}
    if kernel == "pixel_encoder_backward_rotation":
        places, sums = empty(sum(workload.size), 2, dtype=wide), empty(batch, -(-count // TILE), 2, DIM, dtype=wide)
        form = silu_form(dtype, target)
        return plan_rotation(pixels, pixels, places, empty(2, DIM), pixels, sums, size=workload.size, form=form), {}
    config = encoder_configs(kernel.rsplit("_", 1)[1], dtype, target)[0]
    card = roofline.device_of(str(target.arch))
    number = multiprocessors(torch.device("meta")) if card is None else card.sms
    programs = config.programs(-(-count // config.pixels), batch, number)
    if kernel == "pixel_encoder_backward_thin":
        image, products = empty(batch, count, INPUTS), empty(batch, programs, DIM, INPUTS, dtype=wide)
        launch = plan_thin(
            pixels, behind, image, empty(DIM, INPUTS), None, products, precision=precision, config=config
        )
        return launch, asdict(config)
    before = Normalised(unit, vector, vector, empty(batch, programs, 2, DIM, dtype=wide))
    products = empty(batch, programs, DIM, DIM, dtype=wide) if config.joins else None
    launch = plan_half(
        pixels, behind, pixels, before, empty(DIM, DIM), pixels, products=products,
        active=None if config.joins else pixels, passed=pixels, programs=programs, precision=precision, config=config,
    )  # fmt: skip
    return launch, asdict(config)


def work(launch: Launch) -> Work:
    """The work of a launch: compulsory are its maps, asked for the weights of each turn too."""
    argument, constant = launch.arguments, launch.constants
    if "cells_high" in argument:
        pixels = argument["out"]
        size, units = pixels.element_size(), pixels.shape[0] * pixels.shape[1]
        moved = DIM * size + argument["grad"].nbytes / units
        loops: list[Any] = [(argument["most_high"], [(argument["most_wide"], [])])]
        return Work(units, 0, 0, 0, 0, moved, moved, loops)
    pixels = argument["grad"]
    size, units = pixels.element_size(), pixels.shape[0] * pixels.shape[1]
    if "coordinates" in argument:
        moved = 3 * DIM * size + argument["sums"].nbytes / units
        return Work(units, 0, 0, 2 * DIM, 2 * DIM, 3 * DIM * size, moved, [])
    # What goes in pixel by pixel, and comes out.
    maps = [argument.get(name) for name in ("grad", "behind", "added", "passed", "image", "active")]
    maps += [argument["out"], argument.get("pixels")]
    moved = sum(each.nbytes for each in maps if each is not None) / units
    if "sums" not in argument and "products" not in argument:
        return Work(units, 0, 0, 0, 0, moved, moved, [])
    tiles = -(-pixels.shape[1] // constant["PIXELS"])
    trips = -(-tiles // launch.grid[0])
    turns = trips * math.prod(launch.grid)
    thin = "image" in argument
    weight, normalises = argument["projection" if thin else "weight"], argument.get("norm") is not None and not thin
    # The thin projection has 16 inputs, and its products are of float32, three of tf32 at half the rate.
    exact = 2 * 2 * DIM * weight.shape[1]
    made = 2 * 2 * DIM * max(16, weight.shape[1]) * (3 if size == 4 else 6 if thin else 1)
    held = argument["products"]
    exact, made = (number / 2 if held is None else number for number in (exact, made))  # the other one's product
    shared = (turns * weight.nbytes * (not thin) + (0 if held is None else held.nbytes)) / units
    return Work(
        units=units,
        exact_operations=exact,
        operations=turns * constant["PIXELS"] / units * made,
        exact_exponentials=DIM * normalises,
        exponentials=turns * constant["PIXELS"] / units * DIM * normalises,
        bytes_compulsory=moved,
        bytes_asked=moved + shared,
        turns=[(trips, [] if held is not None else [(DIM // constant["PIECE"], [])])],
        bytes_shared=shared,
    )
