"""Launches of the kernels on targets that are not here: planned by the package, compiled, and counted.

Imported where Triton does not interpret kernels, it compiles; elsewhere it still knows every launch's geometry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import torch

from anyup.bench.workloads import Workload, square
from anyup.kernels import launch, window_attention_config
from anyup.kernels.launch import Launch
from anyup.kernels.window_attention_backward_grid import plan_backward_key, plan_backward_value
from anyup.kernels.window_attention_backward_key_value import plan_backward_key_value
from anyup.kernels.window_attention_backward_query import plan_backward_query
from anyup.kernels.window_attention_config import BackwardGridConfig, BackwardQueryConfig, ForwardConfig
from anyup.kernels.window_attention_forward import allocate_kept, plan_forward
from anyup.ops.window_attention.fused import window_rule
from anyup.ops.window_attention.tiles import most_keys
from anyup.window import RatioWindow
from benchmarks.modelled_gpu import roofline
from benchmarks.modelled_gpu.ahead_of_time import CUDA_ARCHITECTURES, compilation_of, target_of
from benchmarks.modelled_gpu.machine_code import Code, read
from benchmarks.modelled_gpu.occupancy import LIMITS, occupancy
from benchmarks.modelled_gpu.window_attention_work import Work, backward_grid_work, backward_query_work, forward_work

WINDOW = RatioWindow(0.1)
HEADS, HEAD_DIM = 4, 32
CHANNELS = (384, 768, 1024)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ARCHITECTURES = (*map(str, CUDA_ARCHITECTURES), "gfx942")

MULTIPROCESSORS = 132
"""Of a target with no device in the roofline's table."""

KERNELS = tuple(
    f"window_attention_{name}"
    for name in ("forward", "backward_query", "backward_key", "backward_value", "backward_key_value")
)

KernelConfig = ForwardConfig | BackwardQueryConfig | BackwardGridConfig
Row = dict[str, Any]

TIMES = ("device", "floor_us", "floor_term", "modelled_us", "modelled_term", "terms_us")
"""What a row has of times; None where the target has no device in the roofline's table."""


def workloads(channels: int) -> tuple[Workload, ...]:
    """What the tables are about."""
    return tuple(square(*sizes, channels=channels) for sizes in ((448, 32), (1024, 64), (2048, 128)))


@dataclass(frozen=True)
class Case:
    """A kernel of the window attention on a target."""

    workload: Workload
    arch: str
    dtype: str
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    save_lse: bool = False
    config: KernelConfig | None = None
    kernel: str = KERNELS[0]
    part: tuple[int, int, int, int] | None = None
    """Where the output, of the forward pass, lies in a larger one, as `plan_forward` takes it."""

    @cached_property
    def configs(self) -> Sequence[KernelConfig]:
        """The configs that the launcher tries, in order; `config` instead where it is given."""
        if self.config is not None:
            return [self.config]
        w, target = self.workload, target_of(self.arch)
        known = {
            "target": launch.Target(target.backend, target.arch),
            "half": self.half,
            "heads": self.heads,
            "head_dim": self.head_dim,
        }

        if self.kernel == KERNELS[0]:
            return window_attention_config.forward_configs(self._most_keys, **known, channels=w.channels)
        if self.kernel == KERNELS[1]:
            return window_attention_config.backward_query_configs(self._most_keys, **known)
        of_values = self.kernel == KERNELS[3]
        pixels = math.prod(w.size)
        if self.kernel == KERNELS[4]:
            return window_attention_config.backward_key_value_configs(pixels, w.batch * w.keys, w.channels, **known)
        return window_attention_config.backward_grid_configs(
            pixels, w.batch * w.keys, w.channels, of_values=of_values, **known
        )

    def _most_keys(self, rows: int, columns: int) -> int:
        return most_keys(WINDOW, self.workload.size, self.workload.grid, (rows, columns))

    @property
    def half(self) -> bool:
        """Whether operands are of two bytes."""
        return DTYPES[self.dtype].itemsize == 2

    @property
    def precision(self) -> str:
        """Triton's input precision at torch's matmul precision "highest"."""
        return "ieee" if self.arch.startswith("gfx") else "tf32x3"

    def launch(self, number: int = 0) -> Launch:
        """The launch with the config of a number; its tensors are on "meta"."""
        w, dtype = self.workload, DTYPES[self.dtype]
        heads = (self.heads, self.head_dim)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        config: Any = self.configs[number]
        query, key = empty(w.batch, *w.size, *heads), empty(w.batch, *w.grid, *heads)
        value, out = empty(w.batch, *w.grid, w.channels), empty(w.batch, *w.size, w.channels)
        statistic = empty(w.batch, *w.size, self.heads, dtype=torch.float32)
        shared: dict[str, Any] = {
            "window": window_rule(WINDOW, w.grid),
            "scale": self.head_dim**-0.5,
            "precision": self.precision,
            "config": config,
        }
        if self.kernel == KERNELS[0]:
            lse = statistic if self.save_lse else empty(0, dtype=torch.float32)
            device = roofline.device_of(self.arch)
            on = device.sms if device else MULTIPROCESSORS
            kept = allocate_kept(value, most_keys=self._most_keys, multiprocessors=on, config=config)
            return plan_forward(query, key, value, out, lse, **shared, part=self.part, kept=kept)
        if self.kernel == KERNELS[1]:
            return plan_backward_query(out, query, key, value, statistic, query, statistic, statistic, **shared)
        sums = torch.float32 if config.partials > 1 else dtype
        of_key, of_value = (empty(config.partials, *like.shape, dtype=sums) for like in (key, value))
        statistics = (statistic, statistic, statistic)
        if self.kernel == KERNELS[2]:
            return plan_backward_key(out, query, key, value, *statistics, of_key, **shared)
        if self.kernel == KERNELS[3]:
            return plan_backward_value(out, query, key, *statistics[:2], of_value, **shared)
        return plan_backward_key_value(out, query, key, value, *statistics, of_key, of_value, **shared)

    def work(self, number: int = 0) -> Work:
        """The work of that launch, for each pixel."""
        return self.count(self.workload, WINDOW, self.launch(number))

    @property
    def count(self) -> Callable[[Workload, RatioWindow, Any], Work]:
        """What counts the work of a launch of the kernel."""
        return {KERNELS[0]: forward_work, KERNELS[1]: backward_query_work}.get(self.kernel, backward_grid_work)


def compile_case(case: Case, number: int = 0) -> Code:
    """The machine code of a case's launch; Triton keeps what it compiled on disk."""
    launch = case.launch(number)
    return read(compilation_of(launch, target_of(case.arch)).run(), launch.options["num_warps"])


def key_of(case: Case) -> str:
    """Cases with equal keys share one compiled kernel."""
    return compilation_of(case.launch(), target_of(case.arch)).key


def row_of(case: Case, code: Code) -> Row:
    """All that is known of a case."""
    work = case.work()
    execution = execution_of(code, case.arch, work.turns, programs=work.programs, units=case.workload.pixels)
    # The backward kernels' loops, and one over two heads, are modelled where the compiler leaves them as they are.
    if execution.uses is None and case.kernel == KERNELS[0] and case.heads != 2:
        code.weights(work.turns)  # says which loops the code has
    row: Row = {
        "kernel": case.kernel,
        "target": case.arch,
        "dtype": case.dtype,
        "channels": case.workload.channels,
        "workload": f"{case.workload.size[0]} from {case.workload.grid[0]}",
        "heads": case.heads,
        "head_dim": case.head_dim,
        "config": asdict(case.configs[0]),
        **code_facts(code, case.arch, code.warps),
        **execution_facts(execution),
        "bytes_per_pixel": round(work.bytes_compulsory, 1),
        "bytes_asked_per_pixel": round(work.bytes_asked, 1),
        "operations_per_pixel": round(work.logit_operations + work.value_operations),
        "exact_operations_per_pixel": round(work.exact_operations),
        "exponentials_per_pixel": round(work.exponentials),
        "logit_slots_ratio": round(work.logit_slots / work.window, 3),
        "value_slots_ratio": round(work.value_slots / work.window, 3),
        "keys_loaded_ratio": round(work.tile_keys / work.window, 3),
        **times_of(case, work, execution),
    }
    return row


def execution_of(code: Code, arch: str, turns: Sequence[Any], *, programs: int, units: int) -> roofline.Execution:
    """How a launch of so many programs runs, its work given for one of so many units; `turns`: as `Code.weights`."""
    ahead = False
    try:
        uses = {name: count * programs * code.warps / units for name, count in code.uses(turns).items()}
        ahead = code.loads_ahead(turns)
    except ValueError:  # the compiler has unrolled or peeled a loop
        uses = None
    running = occupancy(arch, registers=code.registers, shared=code.shared_bytes, warps=code.warps)
    rounded = {name: float(f"{count:.5g}") for name, count in uses.items()} if uses else None
    return roofline.Execution(rounded, ahead, code.products_by_warp, running.programs, programs)


def execution_facts(execution: roofline.Execution) -> Row:
    """How a launch runs, as rows have it."""
    uses = execution.uses
    return {
        "programs": execution.programs,
        "programs_together": execution.together,
        "products_by_warp": execution.by_warp,
        "loads_ahead": execution.ahead,
        "instructions_per_pixel": None if uses is None else round(uses["issue"], 1),
        "uses_per_pixel": uses,
    }


def code_facts(code: Code, arch: str, warps: int) -> Row:
    """What is read from a kernel's code and known of its target, as rows have it."""
    running = occupancy(arch, registers=code.registers, shared=code.shared_bytes, warps=warps)
    return {
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "spill_instructions": code.spill_instructions,
        "shared_bytes": code.shared_bytes,
        "shared_limit": LIMITS[arch].shared,
        "tensor_memory_columns": code.tensor_memory,
        "warps_by_registers": running.by_registers,
        "warps_by_shared": running.by_shared,
        "warps_by_threads": running.by_warps,
        "warps_of": LIMITS[arch].warps,
        "tensor_core_instructions": code.tensor_instructions,
        "widest_load_bits": code.widest("load"),
        "widest_store_bits": code.widest("store"),
        "copies_to_shared": code.count("LDGSTS"),
        "code_instructions": sum(len(block.instructions) for block in code.blocks),
    }


def time_facts(device: roofline.Device, floor: roofline.Times, modelled: roofline.Times) -> Row:
    """Floor and modelled time, as rows have them."""
    return {
        "device": device.name,
        "floor_us": round(floor.total, 1),
        "floor_term": floor.binding,
        "modelled_us": round(modelled.total, 1),
        "modelled_term": modelled.binding,
        "terms_us": {name: round(time, 1) for name, time in modelled.terms.items()},
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
    pixels = case.workload.pixels
    floor = roofline.floor(
        device,
        pixels,
        bytes_compulsory=work.bytes_compulsory,
        operations=work.exact_operations,
        exponentials=work.exact_exponentials,
        half=case.half,
    )
    modelled = roofline.modelled(
        device,
        pixels,
        execution,
        bytes_compulsory=work.bytes_compulsory,
        bytes_asked=work.bytes_asked,
        operations=(work.logit_operations + work.value_operations) * (1 if case.half else 3),
        exponentials=work.exponentials,
        half=case.half,
    )
    return floor, modelled


def cases(
    architectures: Sequence[str],
    dtypes: Sequence[str],
    channels: Sequence[int] = CHANNELS,
    heads: tuple[int, int] = (HEADS, HEAD_DIM),
    kernels: Sequence[str] = KERNELS,
    sizes: slice = slice(None),
) -> Iterator[Case]:
    """Every case of the table; `heads`: their number and width; `sizes`: which of `workloads`."""
    for arch in architectures:
        for dtype in dtypes:
            for number in channels:
                for workload in workloads(number)[sizes]:
                    for kernel in kernels:
                        case = Case(workload, arch, dtype, *heads, kernel=kernel)
                        if case.configs:
                            yield case


def measure(wanted: Sequence[Case], workers: int = 2) -> list[Row]:
    """The rows of cases; each kernel is compiled once."""
    first: dict[str, Case] = {}
    keys = [key_of(case) for case in wanted]
    for key, case in zip(keys, wanted, strict=True):
        first.setdefault(key, case)
    codes = dict(zip(first, _map(compile_case, list(first.values()), workers), strict=True))
    return [row_of(case, codes[key]) for key, case in zip(keys, wanted, strict=True)]


def _map(function: Callable[[Case], Code], items: Sequence[Case], workers: int) -> list[Code]:
    if workers < 2 or len(items) < 2:
        return [function(item) for item in items]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, items))
