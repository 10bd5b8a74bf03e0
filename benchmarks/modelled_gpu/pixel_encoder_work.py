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
from anyup.kernels.launch import Launch, Target
from anyup.kernels.pixel_encoder_config import encoder_configs, kind_of, silu_form
from anyup.kernels.pixel_encoder_moments import plan_moments
from anyup.kernels.pixel_encoder_passes import (
    HalfBlock,
    Join,
    KeyProjection,
    Source,
    allocate_norms,
    allocate_parts,
    map_source,
    plan_pass,
)
from anyup.kernels.pixel_encoder_pool import plan_pool
from anyup.kernels.products import in_float16
from anyup.ops.kernel_device import multiprocessors
from anyup.ops.pixel_encoder.fused_passes import MANY_PIXELS
from benchmarks.modelled_gpu import roofline
from benchmarks.modelled_gpu.machine_code import Branch
from benchmarks.modelled_gpu.operation_work import SPLIT, Work

DIM = 128
IMAGE_CHANNELS = 3

# Of a pass: channels of the input that is projected (0: none, the map of the first block), half blocks, whether it
# measures, stores, rotates.
_PASSES = {
    "pixel_encoder_image_2": (IMAGE_CHANNELS, 1, True, False, False),
    "pixel_encoder_image_3": (IMAGE_CHANNELS, 2, True, True, False),
    "pixel_encoder_map_1": (DIM, 0, True, False, False),
    "pixel_encoder_map_2": (DIM, 1, True, False, False),
    "pixel_encoder_map_3": (DIM, 2, True, True, False),
    # Of two encoders of the same map, in one launch; the fourth reads the map of each.
    "pixel_encoder_pair_1": (DIM, 0, True, False, False),
    "pixel_encoder_pair_2": (DIM, 1, True, False, False),
    "pixel_encoder_pair_3": (DIM, 2, True, True, False),
    "pixel_encoder_pair_4": (0, 1, True, False, False),
    "pixel_encoder_measure_1": (0, 0, True, False, False),
    "pixel_encoder_measure_2": (0, 1, True, False, False),
    "pixel_encoder_measure_3": (0, 2, True, True, False),
    "pixel_encoder_apply": (0, 2, False, True, False),
    "pixel_encoder_rotate": (0, 2, False, True, True),
    "pixel_encoder_keys": (0, 2, False, True, False),
    # Of bands, where the statistics are known already.
    "pixel_encoder_store_image": (IMAGE_CHANNELS, 2, False, True, False),
    "pixel_encoder_store_map": (DIM, 2, False, True, False),
    "pixel_encoder_store_half": (0, 1, False, True, False),
}
_REVERSED = tuple(f"pixel_encoder_{name}" for name in ("image_2", "map_2", "measure_2", "pair_1", "pair_3"))
KERNELS = (
    *_PASSES,
    "pixel_encoder_pool",
    "pixel_encoder_pair_5",
    "pixel_encoder_moments",
)
ON_THE_GRID = tuple(f"pixel_encoder_{name}" for name in ("measure_1", "measure_2", "measure_3", "apply", "keys"))
"""What the blocks of the keys need, in float32 whatever the model's dtype is."""


def plan(
    kernel: str, workload: Workload, dtype: torch.dtype, *, target: Target, precision: str
) -> tuple[Launch, dict[str, Any]]:
    """The launch of a pass with the rule's first config, on "meta" tensors, and the config."""
    batch, count = workload.batch, math.prod(workload.size)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs, halves, measures, stores, rotates = _PASSES.get(kernel, (0, 2, False, False, False))
    pools = kernel in ("pixel_encoder_pool", "pixel_encoder_pair_5")  # the fifth of a pair encodes the other map, too
    keys = kernel == "pixel_encoder_keys"
    pair = "pair" in kernel
    moments = kernel == "pixel_encoder_moments"
    if pools or moments:
        kind = "moments" if moments else "pair's pool" if pair else "pool"
    else:
        kind = kind_of(halves, measures=measures, rotates=rotates, keys=keys, pair=pair)
    if dtype == torch.float32 and count >= MANY_PIXELS:
        precision = in_float16(precision, target)
    config = encoder_configs(kind, dtype, target, precision)[0]
    device = torch.device("meta")
    turns = workload.keys if kernel == "pixel_encoder_pool" else -(-count // config.pixels)
    card = roofline.device_of(str(target.arch))
    images = batch * (2 if pair else 1)
    programs = config.programs(turns, batch if pools else images, multiprocessors(device) if card is None else card.sms)
    parts = allocate_parts(images, programs, device)
    norms = allocate_norms(images, programs, DIM, dtype, device)
    join = Join(parts, empty(DIM), empty(DIM), 1e-5, (empty(DIM), empty(DIM)) if pair else None)
    half = HalfBlock(norms[0], empty(DIM, DIM), empty(DIM, DIM) if pair else None)
    stored = empty(images, count, DIM)
    shared: dict[str, Any] = {
        "norms": norms,
        "programs": programs,
        "form": silu_form(dtype, target),
        "precision": precision,
        "config": config,
    }
    if pools:
        launch = plan_pool(
            map_source(stored), half, half._replace(norm=join), empty(batch, workload.keys, DIM),
            size=workload.size, cells=workload.grid, **shared,
        )  # fmt: skip
        return launch, asdict(config)
    if inputs == IMAGE_CHANNELS or moments:  # an image as it comes has its pixels innermost
        source = Source(empty(batch, IMAGE_CHANNELS, count).transpose(1, 2), empty(DIM, IMAGE_CHANNELS))
    else:
        of_second = empty(DIM, DIM) if pair else None
        source = Source(empty(batch, count, DIM), empty(DIM, DIM), of_second) if inputs else map_source(stored)
    if moments:
        return plan_moments(source, parts, config=config), asdict(config)
    blocks = (half,) * halves
    if halves and "store" not in kernel:  # of bands, where the statistics are known already
        blocks = (*blocks[:-1], half._replace(norm=join))
    else:
        shared["norms"] = None
    launch = plan_pass(
        source, blocks,
        parts=parts if measures else None, out=stored if stores else None,
        rotation=(empty(sum(workload.size), 2, dtype=torch.float32), empty(2, DIM)) if rotates else None,
        keys=KeyProjection(empty(DIM), empty(DIM, DIM), empty(DIM), 1e-7) if keys else None,
        size=workload.size, is_reversed=kernel in _REVERSED, **shared,
    )  # fmt: skip
    return launch, asdict(config)


def name_of(launch: Launch) -> str:
    """The pass that a launch of these kernels is.

    In half precision a map is brought in by a product with the identity, so that "measure_2" is the kernel "map_2".
    """
    kernel = str(launch.kernel.__name__).strip("_").removesuffix("_kernel")
    constant = launch.constants
    if kernel != "pixel_encoder_pass":
        return "pixel_encoder_pair_5" if constant.get("PAIR") else kernel
    projected = constant["INPUTS"]
    source = "image" if projected < constant["CHANNELS"] else "map"
    if constant["PAIR"]:
        shares = len(launch.arguments["pixels"]) < launch.grid[1]
        return f"pixel_encoder_pair_{constant['HALVES'] + 1 if shares else 4}"
    for option, name in (("ROTATES", "rotate"), ("KEYS", "keys")):
        if constant[option]:
            return f"pixel_encoder_{name}"
    if not constant["MEASURES"]:
        if constant["HALVES"] < 2:
            return "pixel_encoder_store_half"
        return "pixel_encoder_apply" if constant["JOINS"] else f"pixel_encoder_store_{source}"
    return f"pixel_encoder_{source if projected else 'measure'}_{constant['HALVES'] + 1}"


def work(launch: Launch) -> Work:
    """The work of a launch of these kernels."""
    kernel = name_of(launch)
    if kernel == "pixel_encoder_moments":
        return _moments_work(launch)
    pools = kernel in ("pixel_encoder_pool", "pixel_encoder_pair_5")
    return _pool_work(launch) if pools else _pass_work(launch)


def _pass_work(launch: Launch) -> Work:
    constant, argument = launch.constants, launch.arguments
    size = argument["pixels"].element_size()
    split = 1 if size == 2 else SPLIT if constant["PRECISION"] == "float16x3" else 3
    channels, inputs, dim = constant["CHANNELS"], constant["INPUTS"], constant["DIM"]
    # Pixels of all maps that are made; those of two encoders come from one.
    units = launch.grid[1] * argument["count"]
    tiles = -(-argument["count"] // constant["PIXELS"])
    trips = -(-tiles // launch.grid[0])  # of the program with the most
    turns = trips * launch.grid[0] * launch.grid[1]
    padded = turns * constant["PIXELS"] / units
    halves = constant["HALVES"]
    read = (inputs or channels) * size
    written = channels * argument["out"].element_size() if constant["STORES"] else 0
    # In half precision what was projected is projected again for the residual, unless it waits for it.
    projections = 2 if size == 2 and halves > 1 and not constant["KEEPS"] else 1
    # Weights for each program or turn, scale, shift and, in float32, centre for each turn. Where pixels are rotated,
    # the frequencies for each turn, and for each pixel the coordinates of its row and its column.
    each = argument["weight1"].element_size() if halves else size
    squares = halves + constant["KEYS"]
    weights = squares * channels * channels * each + inputs * channels * size
    norms = halves * (2 if size == 2 else 3) * dim * 4
    resident = size == 2 and constant["RESIDENT"]
    programs = launch.grid[0] * launch.grid[1]
    loads = programs if resident else turns + (programs if split == SPLIT else 0)  # once for their scales
    shared = (loads * weights + turns * norms) / units
    if constant["ROTATES"]:
        shared += 2 * 2 * 4 + turns * argument["frequencies"].nbytes / units
    shared += _join_bytes(launch) / units
    # In float32 what does not wait for the residual is read again, or stored and read.
    fetched = channels * size * (2 if inputs else 1) if constant["FETCHES"] and halves > 1 else 0
    asked = read + written + fetched + constant["MEASURES"] * launch.grid[0] * launch.grid[1] * 3 * 8 * 4 / units
    exponentials = halves * channels
    # Each piece's pivot is taken in a program's first turn.
    firsts = [Branch(1 / trips)] * (dim // constant["PIECE"]) if constant["MEASURES"] else []
    return Work(
        units=units,
        exact_operations=2 * channels * (squares * channels + inputs),
        operations=split * padded * 2 * dim * (squares * dim + projections * constant["INPUT_DIM"]),
        exact_exponentials=exponentials,
        exponentials=padded * halves * dim,
        bytes_compulsory=read * len(argument["pixels"]) / launch.grid[1] + written,
        bytes_asked=asked + shared,
        turns=[*_join_turns(launch), (trips, firsts)],
        bytes_shared=shared,
    )


def arrangement_turns(launch: Launch) -> list[Any]:
    """The loop in which a program arranges its share of a convolution's weight, where it does."""
    constant = launch.constants
    if not constant["OUTPUTS"]:
        return []
    lengths = constant["OUTPUTS"], constant["INPUTS"] * constant["WEIGHT_TAPS"]
    squares = math.prod(-(-length // constant["BLOCK"]) for length in lengths)
    return [(-(-squares // math.prod(launch.grid)), [])]


def _joins(launch: Launch) -> bool:
    return bool(launch.constants.get("JOINS", True))


def _join_turns(launch: Launch) -> list[Any]:
    """The loops in which a program joins what others have measured: for the mean, and for the deviation."""
    return [(-(-launch.arguments["joined"] // launch.constants["AT_ONCE"]), [])] * 2 * _joins(launch)


def _join_bytes(launch: Launch) -> int:
    """What the programs read and write for that: counts and means twice, deviations, their copy of the norm."""
    rows = 2 if launch.arguments["pixels"].element_size() == 2 else 3
    each = 5 * launch.arguments["joined"] * 8 * 4 + rows * launch.constants["DIM"] * 4
    return math.prod(launch.grid) * each * _joins(launch)


def _pool_work(launch: Launch) -> Work:
    constant, argument = launch.constants, launch.arguments
    size = argument["pixels"].element_size()
    half = size == 2
    split = 1 if half else SPLIT if constant["PRECISION"] == "float16x3" else 3
    channels, dim = constant["CHANNELS"], constant["DIM"]
    batch = launch.grid[1]
    units = batch * argument["count"]
    cells = [
        _cells(argument[length], argument[number])
        for length, number in (("height", "cells_high"), ("width", "cells_wide"))
    ]
    turns = [-(-rows * columns // constant["PIXELS"]) for rows in cells[0] for columns in cells[1]]
    seen = batch * sum(cells[0]) * sum(cells[1]) / units
    trips = -(-len(turns) // launch.grid[0])  # of the program with the most
    padded = math.prod(launch.grid) * trips * sum(turns) / len(turns) * constant["PIXELS"] / units
    # In half precision there are products with the identity, and with 16 rows of ones for each of the sums.
    products = (2 if half else 1) * dim + (2 * 16 if half else 0)
    weights = (2 if half else 1) * channels * channels * size
    programs = math.prod(launch.grid)
    loads = programs if half and constant["RESIDENT"] else batch * sum(turns) + (programs if split == SPLIT else 0)
    norms = batch * sum(turns) * 2 * (2 if half else 3) * dim * 4
    # And for each cell the last weight, which no matrix unit multiplies with.
    last = batch * len(turns) * channels * channels * size
    shared = (loads * weights + norms + last + _join_bytes(launch)) / units
    written = channels * size * batch * len(turns) / units
    # A convolution's weight is read and written on the way.
    arranged = 2 * argument["weight"].nbytes / units if constant["OUTPUTS"] else 0
    loops = [*_join_turns(launch), (trips, [(sum(turns) / len(turns), [])])]
    pooled = Work(
        units=units,
        exact_operations=2 * channels * channels * (2 if half else 1),
        operations=split * padded * 2 * dim * products,
        exact_exponentials=2 * channels,
        exponentials=padded * 2 * dim,
        bytes_compulsory=channels * size + written + arranged,
        bytes_asked=seen * channels * size + written + arranged + shared,
        turns=[*arrangement_turns(launch), *loops],
        bytes_shared=shared,
    )
    return _with_a_map(pooled, launch) if constant["PAIR"] else pooled


def _with_a_map(pooled: Work, launch: Launch) -> Work:
    """The work with that of encoding the other encoder's map in its place, which comes first."""
    constant, argument, half = launch.constants, launch.arguments, launch.arguments["pixels"].element_size() == 2
    size, channels, dim = argument["pixels"].element_size(), constant["CHANNELS"], constant["DIM"]
    trips = -(-argument["count"] // (constant["PIXELS"] * launch.grid[0]))
    programs = math.prod(launch.grid)
    turns = programs * trips
    padded = turns * constant["PIXELS"] / pooled.units
    split = 1 if half else SPLIT if constant["PRECISION"] == "float16x3" else 3
    # In half precision products with the identity, for the residual another where x does not wait.
    identities = (1 if constant["KEEPS"] else 2) if half else 0
    resident = half and constant["RESIDENT"] and not constant["KEEPS"]
    loads = programs if resident else turns + (programs if split == SPLIT else 0)
    shared = loads * (3 if half else 2) * channels * channels * size + turns * 2 * (2 if half else 3) * dim * 4
    shared = (shared + _join_bytes(launch)) / pooled.units
    moved = 2 * channels * size
    # In float32 x is read again for the residual.
    asked = moved + shared + (0 if half else channels * size)
    copy = arrangement_turns(launch)
    return Work(
        units=pooled.units,
        exact_operations=pooled.exact_operations + 2 * channels * (3 if half else 2) * channels,
        operations=pooled.operations + split * padded * 2 * dim * (2 + identities) * dim,
        exact_exponentials=pooled.exact_exponentials + 2 * channels,
        exponentials=pooled.exponentials + padded * 2 * dim,
        bytes_compulsory=pooled.bytes_compulsory + moved,
        bytes_asked=pooled.bytes_asked + asked,
        turns=[*copy, *_join_turns(launch), (trips, []), *pooled.turns[len(copy) :]],
        bytes_shared=pooled.bytes_shared + shared,
    )


def _cells(length: int, number: int) -> list[int]:
    """The pixels along an axis of each cell of adaptive average pooling."""
    return [-((cell + 1) * length // -number) - cell * length // number for cell in range(number)]


def _moments_work(launch: Launch) -> Work:
    argument, constant = launch.arguments, launch.constants
    units = len(argument["pixels"]) * argument["count"]
    read = constant["INPUTS"] * argument["pixels"].element_size()
    programs = math.prod(launch.grid)
    # The first pixels are read again for the pivot.
    again = min(programs * constant["PIXELS"], units) * read
    shared = programs * (argument["projection"].nbytes + 3 * 8 * 4) / units
    tiles = -(-argument["count"] // constant["PIXELS"])
    trips = -(-tiles // launch.grid[0])
    return Work(units, 0, 0, 0, 0, read, read + again / units + shared, [(trips, [])], shared)
