"""The kernels of all operations but the attention of maps, on targets that are not here.

As `compiled` for the window attention: planned by the package, compiled ahead of time, their work counted from the
launch. The work is given for one unit: a position of the grid, a pixel of the queries, or a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from anyup.bench.workloads import Workload, square
from anyup.kernels import feature_distance
from anyup.kernels import feature_unification_backward as unification_backward
from anyup.kernels import feature_unification_forward as unification_forward
from anyup.kernels import query_projection_backward as projection_backward
from anyup.kernels import query_projection_forward as projection
from anyup.kernels.feature_unification_config import backward_configs, forward_configs
from anyup.kernels.feature_unification_patches import Arranged, allocate, plan_arrange, runs_of
from anyup.kernels.key_grid_config import convolution_configs
from anyup.kernels.key_grid_convolution import plan_convolution
from anyup.kernels.launch import Launch, Target
from anyup.kernels.products import in_float16
from anyup.kernels.window_attention_points import CONFIGS, plan_points
from anyup.ops.window_attention.fused import window_rule
from anyup.window import axis_bounds
from benchmarks.modelled_gpu import gradient_work, pixel_encoder_work, roofline
from benchmarks.modelled_gpu.ahead_of_time import compilation_of, target_of
from benchmarks.modelled_gpu.compiled import (
    HEAD_DIM,
    HEADS,
    TIMES,
    WINDOW,
    code_facts,
    execution_facts,
    execution_of,
    time_facts,
)
from benchmarks.modelled_gpu.machine_code import Code, read
from benchmarks.modelled_gpu.operation_work import SPLIT, Work

DIM = FILTERS = 128
CHANNELS_OF_CLASSES = 192
"""Channels that the filters do not divide: of ViT-Ti."""
KERNEL_SIZE = 5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KERNELS = (
    "feature_unification_arrange",
    "feature_unification_normalize",
    "feature_unification_forward",
    "feature_unification_backward_cells",
    "feature_unification_backward_filters",
    "feature_unification_fold",
    "key_grid_convolution",
    "query_projection_forward",
    "query_projection_backward_pixels",
    "query_projection_backward_map",
    "query_projection_backward_weights",
    "window_attention_points",
    "feature_distance_forward",
    "feature_distance_backward",
    *pixel_encoder_work.KERNELS,
    *gradient_work.KERNELS,
)
WITHOUT_PRODUCTS = (
    "feature_unification_arrange",
    "feature_unification_normalize",
    "feature_unification_fold",
    "feature_distance_forward",
    "feature_distance_backward",
    "pixel_encoder_moments",
    *gradient_work.WITHOUT_PRODUCTS,
)
"""Kernels that move numbers: nothing for the matrix units."""
MULTIPROCESSORS = 132
"""Of the card that a launch is planned for, where that decides how a sum is shared."""
POINTS = 1000
"""Points of a launch."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A kernel on a target."""

    kernel: str
    workload: Workload
    arch: str
    dtype: str

    @property
    def half(self) -> bool:
        """Whether the tensors are of two bytes."""
        return DTYPES[self.dtype].itemsize == 2

    @property
    def planes(self) -> int:
        """16-bit planes of a number at torch's matmul precision "highest"."""
        return 1 if self.half else 3

    @property
    def target(self) -> Target:
        """The target as the rules take it."""
        target = target_of(self.arch)
        return Target(target.backend, target.arch)

    @property
    def splits(self) -> bool:
        """Whether factors are of float32, and taken apart for the matrix units: keys are made in it in any dtype."""
        return not self.half or self.kernel == "key_grid_convolution"

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")

    def _convolution(self, precision: str) -> tuple[Launch, Row]:
        config = convolution_configs(self.target)[0]
        w, wide = self.workload, torch.float32
        keys, parts = self._empty(w.batch, *w.grid, DIM), config.runs(w.keys)
        launch = plan_convolution(
            keys, keys.to(wide), self._empty(3, 3, 2 * DIM, DIM), keys.to(wide),
            self._empty(w.batch, 3, parts, 8).to(wide), precision=precision, config=config,
        )  # fmt: skip
        return launch, asdict(config)

    def _points(self) -> tuple[Launch, Row]:
        w, config = self.workload, CONFIGS[0]
        heads = (HEADS, HEAD_DIM)
        query, key, value = self._empty(POINTS, *heads), self._empty(*w.grid, *heads), self._empty(*w.grid, w.channels)
        pixels = torch.empty((POINTS, 2), dtype=torch.int32, device="meta")
        launch = plan_points(
            query, key, value, pixels, self._empty(POINTS, w.channels), size=w.size,
            window=window_rule(WINDOW, w.grid), scale=HEAD_DIM**-0.5, config=config,
        )  # fmt: skip
        return launch, config._asdict()

    def _distance(self) -> tuple[Launch, Row]:
        """Of whole maps, which a training compares under two guidance images."""
        w, config, wide = self.workload, feature_distance.CONFIGS[0], torch.float32
        made = self._empty(w.batch, *w.size, w.channels)
        maps = made.permute(0, 3, 1, 2)
        statistics = self._empty(w.batch, 1, *w.size, 3).to(wide)
        if self.kernel == "feature_distance_forward":
            parts = statistics.new_empty(w.batch, 1, config.tiles(math.prod(w.size)), 2)
            launch = feature_distance.plan_forward(
                maps, maps[:, None], None, parts, statistics, norm_eps=1e-8, span_eps=1e-6, config=config
            )
        else:
            grad = statistics.new_empty(w.batch, 2)
            launch = feature_distance.plan_backward(grad, maps, maps[:, None], None, statistics, made, config=config)
        return launch, asdict(config)

    def _query_projection(self, precision: str) -> tuple[Launch, Row]:
        encoded = self._empty(self.workload.batch, *self.workload.size, DIM)
        taps, gain, weight = self._empty(9, DIM, DIM), self._empty(DIM), self._empty(DIM, DIM)
        config: Any
        if self.kernel == "query_projection_backward_weights":
            config = projection_backward.weights_configs(half=self.half)[0]
            pixels = math.prod(encoded.shape[:3])
            run = config.run(pixels, DIM, 9, MULTIPROCESSORS)
            sums = self._empty(-(-pixels // run), 9, DIM, DIM).float()
            launch = projection_backward.plan_weights(
                encoded, encoded, sums, run=run, precision=precision, config=config
            )
            return launch, asdict(config)
        if self.kernel == "query_projection_backward_pixels":
            config = projection_backward.pixels_configs(DIM, half=self.half)[0]
            launch = projection_backward.plan_pixels(
                encoded, encoded, taps, gain, weight, encoded, encoded, eps=1e-7, precision=precision, config=config
            )
            return launch, asdict(config)
        if self.kernel == "query_projection_forward" and not self.half:
            precision = in_float16(precision, self.target)
        config = projection.forward_configs(DIM, target=self.target, half=self.half, precision=precision)[0]
        if self.kernel == "query_projection_backward_map":
            launch = projection_backward.plan_map(encoded, taps, encoded, precision=precision, config=config)
        else:
            launch = projection.plan_forward(
                encoded, taps, gain, weight, gain, encoded, eps=1e-7, precision=precision, config=config
            )
        return launch, asdict(config)

    def _arranged(self) -> tuple[torch.Tensor, torch.Tensor, Arranged]:
        w = self.workload
        features, basis = self._empty(w.batch, w.channels, *w.grid), self._empty(FILTERS, 1, KERNEL_SIZE, KERNEL_SIZE)
        dtype = DTYPES[self.dtype] if self.half else torch.bfloat16
        return features, basis, allocate(features, basis, planes=self.planes, dtype=dtype, transposed=True)

    def plan(self) -> tuple[Launch, Row]:
        """The launch with the rule's first config, on "meta" tensors, and the config."""
        w = self.workload
        precision = "ieee" if self.arch.startswith("gfx") else "tf32x3"
        if self.kernel.startswith("pixel_encoder"):
            of = gradient_work if self.kernel in gradient_work.KERNELS else pixel_encoder_work
            return of.plan(self.kernel, w, DTYPES[self.dtype], target=self.target, precision=precision)
        if self.kernel == "key_grid_convolution":
            return self._convolution(precision)
        if self.kernel == "window_attention_points":
            return self._points()
        if self.kernel.startswith("feature_distance"):
            return self._distance()
        if self.kernel.startswith("query_projection"):
            return self._query_projection(precision)
        features, basis, arranged = self._arranged()
        out = self._empty(w.batch, FILTERS, *w.grid)
        if self.kernel == "feature_unification_arrange":
            return plan_arrange(features, basis, arranged), {}
        if self.kernel == "feature_unification_normalize":
            # In float32, whatever the features are.
            arranged = allocate(features, basis, planes=3, dtype=torch.bfloat16)
            copied = self._empty(w.batch, *w.grid, w.channels)
            weights = self._empty(DIM, 2 * DIM, 3, 3), self._empty(3, 3, 2 * DIM, DIM)
            return plan_arrange(features, basis, arranged, normalizes=True, copied=copied, weights=weights), {}
        if self.kernel == "feature_unification_forward":
            config = forward_configs(arranged)[0]
            return unification_forward.plan_forward(arranged, out, precision="ieee", config=config), asdict(config)
        parts = unification_backward.allocate_parts(arranged, w.grid)
        if self.kernel == "feature_unification_fold":
            fold = unification_backward.plan_fold(parts[0], features, arranged)
            return fold, {}
        of = self.kernel.rsplit("_", 1)[1]
        slope = backward_configs(arranged, target=self.target, of=of)[0]
        launch = unification_backward.plan_backward(out, arranged, *parts, of=of, precision="ieee", config=slope)
        return launch, asdict(slope)

    def work(self, launch: Launch) -> Work:
        """The work of that launch; of the unification where nothing is turned."""
        w, constant = self.workload, launch.constants
        if self.kernel.startswith("pixel_encoder"):
            return (gradient_work if self.kernel in gradient_work.KERNELS else pixel_encoder_work).work(launch)
        size = DTYPES[self.dtype].itemsize
        if self.kernel.startswith("query_projection"):
            return _query_projection_work(self.kernel, launch, w, size)
        if self.kernel == "key_grid_convolution":
            return _convolution_work(launch)
        if self.kernel == "window_attention_points":
            return _points_work(launch, w)
        if self.kernel.startswith("feature_distance"):
            return _distance_work(launch)
        channels = w.channels
        runs = runs_of(channels, FILTERS)
        if runs.turned:
            raise ValueError(f"channels: expected a divisor in common with {FILTERS} of 16 or more, got {channels}")
        units = w.batch * w.keys
        maps = channels * FILTERS
        copy = self.planes * channels * (size if self.half else 2)
        copied = self.planes * runs.entries * runs.columns * (size if self.half else 2)
        bordered = math.prod(n + KERNEL_SIZE - 1 for n in w.grid) / w.keys
        products = self.planes * (self.planes + 1) // 2
        taps = KERNEL_SIZE**2
        cells = unification_backward.padded_cells(KERNEL_SIZE)
        tile = unification_backward.TILE**2
        partial = 4 * runs.number * runs.columns * cells / tile
        once = (channels + FILTERS) * size
        filters = runs.number * self.planes * FILTERS * constant.get("TAPS", 0) * 2
        if self.kernel == "feature_unification_arrange":
            return Work(units, 0, 0, 0, 0, channels * size, channels * size + bordered * copied, [])
        if self.kernel == "feature_unification_normalize":
            # Each program reads all of its positions' channels for their norm.
            planes = constant["PLANES"] * runs.entries * runs.columns * 2
            read = (1 + launch.grid[2]) * channels * size
            # Once for all positions, the weight of the keys' convolution is read and written.
            weight = 2 * launch.arguments["weight"].nbytes / units
            moved = read + constant["COPIES"] * channels * size + bordered * planes + weight
            loops: list[Any] = [(-(-channels // constant["ENTRIES"]), [])]
            loops += pixel_encoder_work.arrangement_turns(launch)
            compulsory = (1 + constant["COPIES"]) * channels * size + weight
            return Work(units, 0, 0, 0, 0, compulsory, moved, loops)
        if self.kernel == "feature_unification_fold":
            moved = channels * size
            turns: list[Any] = [(1, [])]
            return Work(units, 0, 0, 0, 0, moved, partial + moved, turns)
        parts = -(-runs.length // constant["ROWS"])
        if self.kernel == "feature_unification_forward":
            inner = [(parts, [])] if parts > 1 else []
            return Work(
                units=units,
                exact_operations=2 * taps * maps,
                operations=products * 2 * constant["TAPS"] * maps,
                exact_exponentials=maps,
                exponentials=maps,
                bytes_compulsory=once,
                bytes_asked=taps * copy + filters + FILTERS * size,
                turns=[(constant["POSITIONS"], [(runs.number, inner)])],
            )
        of_cells = constant["CELLS"] > 0
        wide = constant["TAPS"] + (cells if of_cells else constant["TAPS"])
        written = partial if of_cells else 4 * runs.number * FILTERS * constant["TAPS"] / tile
        shifted = runs.number * self.planes * cells * FILTERS * 2 if of_cells else 0
        return Work(
            units=units,
            exact_operations=2 * 2 * taps * maps,
            operations=products * 2 * wide * maps,
            exact_exponentials=maps,
            exponentials=maps,
            bytes_compulsory=once + (channels * size if of_cells else 0),
            bytes_asked=(
                parts * (taps * copy * (1 if of_cells else 2) + runs.number * FILTERS * size) + shifted + written
            ),
            turns=[(tile, []), (parts, [(tile, [])])] if parts > 1 else [(tile, []), (tile, [])],
        )


def _query_projection_work(kernel: str, launch: Launch, workload: Workload, size: int) -> Work:
    constant, pixels = launch.constants, workload.pixels
    if kernel == "query_projection_backward_weights":
        blocks, runs = launch.grid
        run = launch.arguments["run"]
        exact = 2 * constant["TAPS"] * DIM * DIM
        written = launch.arguments["sums"].nbytes / pixels
        return Work(
            units=pixels,
            exact_operations=exact,
            operations=runs * run / pixels * exact * (1 if size == 2 else 3),
            exact_exponentials=0,
            exponentials=0,
            bytes_compulsory=2 * DIM * size,
            bytes_asked=blocks * 2 * constant["BLOCK"] * size + written,
            turns=[(-(-run // constant["STEP"]), [])],
        )
    tile = constant["ROWS"] * constant["COLUMNS"]
    padded = math.prod(launch.grid) * tile / pixels
    # L1 answers the loads of the other taps.
    halo = (constant["ROWS"] + 2) * (constant["COLUMNS"] + 2) / tile
    # The convolution, and the projection or its transpose; maps beside the one that is convolved.
    weights, others = {"forward": (10, 1), "pixels": (10, 3), "map": (9, 1)}[kernel.rsplit("_", 1)[1]]
    exact = 2 * weights * DIM * DIM
    products = 1 if size == 2 else SPLIT if constant["PRECISION"] == "float16x3" else 3
    loops: list[Any] = [(9 * DIM // constant["PIECE"], [])]
    return Work(
        units=pixels,
        exact_operations=exact,
        operations=padded * exact * products,
        exact_exponentials=0,
        exponentials=0,
        bytes_compulsory=(1 + others) * DIM * size,
        bytes_asked=padded * (halo * DIM + weights * DIM * DIM / tile) * size + others * DIM * size,
        turns=loops + ([(DIM // constant["OUTPUTS"], [])] if weights > 9 else []),
    )


def _convolution_work(launch: Launch) -> Work:
    argument, constant = launch.arguments, launch.constants
    units = argument["out"].numel() // DIM
    programs = math.prod(launch.grid)
    tile = constant["CELLS"] * constant["OUTPUTS"]
    padded = programs * tile / (units * DIM)
    keys = DIM * (argument["image_keys"].element_size() + argument["feature_keys"].element_size())
    weight = argument["weight"].element_size()
    exact = 2 * 9 * 2 * DIM * DIM
    # Of tf32. A factor of half precision has no rest, and two of them are multiplied as they are, at twice the rate.
    products = 3 if weight == 4 else (2 + 0.5) / 2
    shared = programs * 9 * 2 * DIM * constant["OUTPUTS"] * weight / units
    return Work(
        units=units,
        exact_operations=exact,
        operations=padded * products * exact,
        exact_exponentials=0,
        exponentials=0,
        bytes_compulsory=keys + DIM * 4,
        bytes_asked=programs * 9 * constant["CELLS"] * keys / units + shared + DIM * 4,
        turns=[(9 * -(-DIM // constant["PIECE"]), [])],
        bytes_shared=shared,
    )


def _points_work(launch: Launch, workload: Workload) -> Work:
    argument, block = launch.arguments, launch.constants["BLOCK"]
    slices, size = launch.grid[1], argument["value"].element_size()
    lengths = [axis_bounds(WINDOW, *sizes) for sizes in zip(workload.size, workload.grid, strict=True)]
    window = math.prod((sum(stop) - sum(start)) / len(start) for start, stop in lengths)
    blocks = math.ceil(window / block)
    ends = (DIM + workload.channels) * size
    return Work(
        units=POINTS,
        exact_operations=0,
        operations=0,
        exact_exponentials=window * HEADS,
        exponentials=3 * blocks * block * HEADS * slices,
        bytes_compulsory=(argument["key"].nbytes + argument["value"].nbytes) / POINTS + ends,
        bytes_asked=blocks * block * (2 * DIM * slices + workload.channels) * size + ends,
        turns=[(blocks, []), (blocks, [])],
    )


def _distance_work(launch: Launch) -> Work:
    """Of a pixel of the windows forward, of a pixel of the map backward."""
    argument, block = launch.arguments, launch.constants["BLOCK"]
    prediction, target, channels = argument["prediction"], argument["target"], argument["channels"]
    near, true = (channels * tensor.element_size() for tensor in (prediction, target))
    pixels = target.numel() // channels
    statistics = 0 if argument["statistics"] is None else argument["statistics"].nbytes / pixels
    if "parts" in argument:
        moved = near + true + statistics
        return Work(pixels, 0, 0, 0, 0, moved, moved, [(-(-channels // block), [])])
    units = prediction.numel() // channels
    compulsory, asked = (2 * near + pixels / units * (true + times * statistics) for times in (1, launch.grid[1]))
    return Work(units, 0, 0, 0, 0, compulsory, asked, [(argument["windows"], [])])


_codes: dict[str, Code] = {}


def code_of(launch: Launch, arch: str) -> Code:
    """The machine code of a launch; what was compiled stays, here and, by Triton, on disk."""
    compilation = compilation_of(launch, target_of(arch))
    if compilation.key not in _codes:
        _codes[compilation.key] = read(compilation.run(), launch.options["num_warps"])
    return _codes[compilation.key]


def row_of(case: Case) -> Row:
    """All that is known of a case."""
    launch, config = case.plan()
    warps = launch.options["num_warps"]
    code = code_of(launch, case.arch)
    work = case.work(launch)
    execution = execution_of(code, case.arch, work.turns, programs=math.prod(launch.grid), units=work.units)
    return {
        "kernel": case.kernel,
        "target": case.arch,
        "dtype": case.dtype,
        "channels": case.workload.channels,
        "workload": f"{case.workload.size[0]} from {case.workload.grid[0]}",
        "heads": None,
        "head_dim": None,
        "config": {**config, "num_warps": warps},
        **code_facts(code, case.arch, warps),
        "tensor_core_instructions": code.tensor_instructions if work.operations else None,
        "widest_load_bits": max(code.widest("load"), code.widest("copy")),
        "units": work.units,
        **execution_facts(execution),
        "bytes_per_pixel": round(work.bytes_compulsory, 1),
        "bytes_asked_per_pixel": round(work.bytes_asked, 1),
        "operations_per_pixel": round(work.operations),
        "exact_operations_per_pixel": round(work.exact_operations),
        "exponentials_per_pixel": round(work.exponentials),
        **times_of(case, work, execution),
    }


def times_of(case: Case, work: Work, execution: roofline.Execution) -> Row:
    """Floor and modelled time on the device of the case's target; None without one."""
    device = roofline.device_of(case.arch)
    if device is None:
        return dict.fromkeys(TIMES)
    return time_facts(device, *roofs_of(case, work, execution, device))


def roofs_of(
    case: Case, work: Work, execution: roofline.Execution, device: roofline.Device
) -> tuple[roofline.Times, roofline.Times]:
    """Floor and modelled time on a device."""
    floor = roofline.floor(
        device, work.units, bytes_compulsory=work.bytes_compulsory, operations=work.exact_operations,
        exponentials=work.exact_exponentials, half=not case.splits,
    )  # fmt: skip
    # The unification multiplies planes of 16 bits whatever the dtype is; what moves numbers moves all it asks for.
    moves = case.kernel in WITHOUT_PRODUCTS
    modelled = roofline.modelled(
        device, work.units, execution, bytes_compulsory=work.bytes_asked if moves else work.bytes_compulsory,
        bytes_asked=work.bytes_asked, operations=work.operations, exponentials=work.exponentials,
        half=not case.splits or case.kernel.startswith("feature_unification"),
    )  # fmt: skip
    return floor, modelled


def cases(
    architectures: Sequence[str], dtypes: Sequence[str], kernels: Sequence[str], sizes: slice = slice(None)
) -> Iterator[Case]:
    """Every case of the table, C = 384, the unification's also with classes of outputs; `sizes`: of which workloads."""
    for arch in architectures:
        for dtype in dtypes:
            for workload in (square(448, 32), square(1024, 64))[sizes]:
                for kernel in kernels:
                    if kernel == "pixel_encoder_keys":  # in float32 whatever the model's dtype is
                        if dtype == "float32":
                            yield Case(kernel, on_the_grid(workload), arch, dtype)
                        continue
                    yield Case(kernel, workload, arch, dtype)
                    if kernel.startswith("feature_unification"):
                        yield Case(kernel, replace(workload, channels=CHANNELS_OF_CLASSES), arch, dtype)
                    if kernel in pixel_encoder_work.ON_THE_GRID and dtype == "float32":
                        yield Case(kernel, on_the_grid(workload), arch, dtype)


def on_the_grid(workload: Workload) -> Workload:
    """The maps that the blocks of a workload's keys see, as the pixels of another."""
    return replace(workload, size=workload.grid)
