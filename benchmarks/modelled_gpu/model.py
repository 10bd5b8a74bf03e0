"""The whole forward on the roofline's devices, stage by stage: `python -m benchmarks.modelled_gpu --model`.

Every time here is *modelled*. The steps are those that the model's own forward makes (`model_steps`). The work
of a launch is counted from it and from its machine code: it is compiled here, and the rows keep what was counted.
Where the compiler has made other loops than are expected, instructions are left out, as the row says. What stays
torch's is counted: each tensor read and written once, products at the float32 rate outside of the matrix units (torch's
matmul precision "highest"), and 3 microseconds for each kernel. The host's time stands beside: an eager call takes the
longer of the two.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anyup.bench.workloads import Workload, square
from anyup.kernels.launch import Launch, Target
from benchmarks.modelled_gpu import compiled, operation_kernels, pixel_encoder_work, roofline
from benchmarks.modelled_gpu.model_steps import STAGES, Step, steps_of

RESULT = Path(__file__).parents[1] / "results" / "model.json"

TARGETS_MS = {
    ("A100 SXM 80GB", "bfloat16"): 1.1,
    ("H100 SXM", "bfloat16"): 0.55,
    ("H200", "bfloat16"): 0.5,
    ("RTX 4090", "bfloat16"): 1.5,
}
"""What the whole forward is to take at 448 from 32, C = 384."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """Of a step on a device.

    Attributes:
        moved: bytes that must cross device memory.
        asked: bytes that the programs load and store.
        shared: of these, of weights and tables that all programs of the pixel encoder read: the caches hold them.
        operations: of the matrix units, of float32 those of tf32 or what takes as long; or of torch's products.
        floor, modelled: microseconds by term.
        source: "code" where the compiler's instructions are among the terms, "count" where they are not, "torch".
        execution: of a launch.
    """

    moved: float
    asked: float
    shared: float
    operations: float
    floor: roofline.Times
    modelled: roofline.Times
    source: str
    execution: roofline.Execution | None = None


class Executions:
    """How launches run, by their machine code: of the rows of an earlier run, or compiled."""

    def __init__(self, stored: Sequence[Row] = ()) -> None:
        self._known = {row["key"]: row["execution"] for row in stored if row["level"] == "launch"}

    def __call__(self, launch: Launch, arch: str, turns: Sequence[Any], units: int) -> roofline.Execution:
        """Of a launch for a compute capability; `turns` and `units` as `compiled.execution_of` takes them."""
        programs = math.prod(launch.grid)
        known = self._known.get(key_of(launch, arch))
        if known is not None:
            return roofline.Execution(**known, programs=programs)
        code = operation_kernels.code_of(launch, arch)
        return compiled.execution_of(code, arch, turns, programs=programs, units=units)


def key_of(launch: Launch, arch: str) -> str:
    """Launches with equal keys run the same code as often on a compute capability."""
    arguments = {
        name: f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else value
        for name, value in launch.arguments.items()
    }
    text = repr((arch, launch.kernel.__name__, launch.grid, arguments, dict(launch.constants), dict(launch.options)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rows(
    workload: Workload, dtype: str, devices: Sequence[roofline.Device], executions: Executions | None = None
) -> list[Row]:
    """For each device: of each stage a row for each launch, for torch's calls together and for all; then the sum."""
    executions = executions or Executions()
    found: list[Row] = []
    for device in devices:
        card = Target("cuda", device.arch)
        steps = steps_of(workload, compiled.DTYPES[dtype], card, multiprocessors=device.sms)
        costs = [(step, cost_of(step, workload, dtype, device, executions)) for step in steps]
        common = {"device": device.name, "dtype": dtype, "channels": workload.channels, "workload": workload.name}
        for stage in STAGES:
            own = [entry for entry in costs if entry[0].stage == stage]
            for step, cost in own:
                if step.launch is not None and cost.execution is not None:
                    execution = asdict(cost.execution)
                    execution.pop("programs")
                    of_launch = {
                        "kernel": kernel_of(step), "key": key_of(step.launch, str(device.arch)), "execution": execution
                    }  # fmt: skip
                    found.append({**common, "stage": stage, "level": "launch", **_sums_of([(step, cost)]), **of_launch})
            for level, part in (("torch", [e for e in own if e[0].launch is None]), ("stage", own)):
                if part:
                    found.append({**common, "stage": stage, "level": level, **_sums_of(part)})
        found.append({**common, "stage": "sum", "level": "sum", **_sums_of(costs), "host_us": roofline.HOST_US})
    return found


def _sums_of(costs: Sequence[tuple[Step, Cost]]) -> Row:
    """What a row says of some steps together; they run one after the other."""
    binding: Counter[str] = Counter()
    for _, cost in costs:
        binding[cost.modelled.binding] += cost.modelled.total - cost.modelled.launch
        binding["launch"] += cost.modelled.launch
    return {
        "kernel": None,
        "source": "+".join(sorted({cost.source for _, cost in costs})),
        "passes": sum(step.kernels for step, _ in costs),
        "bytes": round(sum(cost.moved for _, cost in costs)),
        "bytes_asked": round(sum(cost.asked for _, cost in costs)),
        "bytes_shared": round(sum(cost.shared for _, cost in costs)),
        "operations": round(sum(cost.operations for _, cost in costs)),
        "floor_us": round(sum(cost.floor.total for _, cost in costs), 1),
        "modelled_us": round(sum(cost.modelled.total for _, cost in costs), 1),
        "binds": max(binding, key=lambda name: binding[name]),
        "us_by_binding_term": {name: round(time, 1) for name, time in binding.most_common() if time},
    }


def kernel_of(step: Step) -> str:
    """The name of a step's kernel in the table of `benchmarks.modelled_gpu.codegen`, or of torch's operator."""
    if step.launch is not None and step.name.startswith("pixel_encoder"):
        return pixel_encoder_work.name_of(step.launch)
    if step.launch is not None and step.launch.constants.get("NORMALIZES"):
        return "feature_unification_normalize"
    # Where keys are many, another kernel is the same row.
    return "window_attention_forward" if step.name == "window_attention_kept" else step.name


def cost_of(step: Step, workload: Workload, dtype: str, device: roofline.Device, executions: Executions) -> Cost:
    """The cost of a step of a forward of `workload`, or of its backward pass, in a dtype on a device."""
    if step.launch is None:
        return _torch_cost(step, device)
    launch, kernel, arch = step.launch, kernel_of(step), str(device.arch)
    if kernel in compiled.KERNELS:
        attention = compiled.Case(workload, arch, _dtype_of(launch, dtype), kernel=kernel)
        work = attention.count(workload, compiled.WINDOW, launch)
        execution = executions(launch, arch, work.turns, workload.pixels)
        operations = (work.logit_operations + work.value_operations) * (1 if attention.half else 3)
        floor, modelled = compiled.roofs_of(attention, work, execution, device)
        units, moved, asked, shared = workload.pixels, work.bytes_compulsory, work.bytes_asked, 0.0
    else:
        seen = operation_kernels.on_the_grid(workload) if step.stage == "keys" else workload
        case = operation_kernels.Case(kernel, seen, arch, _dtype_of(launch, dtype))
        counted = case.work(launch)
        execution = executions(launch, arch, counted.turns, counted.units)
        operations, units = counted.operations, counted.units
        moved, asked, shared = counted.bytes_compulsory, counted.bytes_asked, counted.bytes_shared
        floor, modelled = operation_kernels.roofs_of(case, counted, execution, device)
    return Cost(
        units * moved,
        units * asked,
        units * shared,
        units * operations,
        floor,
        modelled,
        "count" if execution.uses is None else "code",
        execution,
    )


def _torch_cost(step: Step, device: roofline.Device) -> Cost:
    terms = {"memory": 1e6 * step.bytes_moved / device.memory, "float32": 1e6 * step.operations / device.plain}
    return Cost(
        step.bytes_moved,
        step.bytes_moved,
        0.0,
        step.operations,
        roofline.Times(terms),
        roofline.Times(terms, roofline.LAUNCH_US * step.kernels),
        "torch",
    )


def _dtype_of(launch: Launch, dtype: str) -> str:
    """The dtype that a kernel reads, as the table of kernels has it; the forward's where it reads statistics alone."""
    names = ("features", "frequencies", "weight", "out", "pixels")
    if "pixels" in launch.arguments:
        names = ("pixels",)
    tensors = (launch.arguments[name] for name in names if isinstance(launch.arguments.get(name), Tensor))
    tensor = next(tensors, None)
    return dtype if tensor is None else str(tensor.dtype).removeprefix("torch.")


def workload_of(text: str, channels: int) -> Workload:
    """The workload that "448 from 32" names; raises ValueError where it names none."""
    match = re.fullmatch(r"(\d+) from (\d+)", text.strip())
    if match is None or "0" in match.groups():
        raise ValueError(f'workload: expected sizes such as "448 from 32", got {text!r}')
    return square(int(match[1]), int(match[2]), channels=channels)


def table(found: Sequence[Row]) -> str:
    """Markdown, a line for each row; times are modelled."""
    head = (
        "device", "dtype", "stage", "kernel", "counted from", "passes", "MB", "MB asked", "GFLOP", "floor us",
        "modelled us", "binds",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        kernel = row["kernel"] or {"torch": "torch's", "stage": "**all**", "sum": "**all**"}[row["level"]]
        cells = (
            row["device"], row["dtype"], row["stage"], kernel, row["source"], row["passes"],
            f"{row['bytes'] / 1e6:.1f}", f"{row['bytes_asked'] / 1e6:.1f}", f"{row['operations'] / 1e9:.1f}",
            row["floor_us"], row["modelled_us"], row["binds"],
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def verdicts(found: Sequence[Row]) -> list[str]:
    """A sentence for each sum that has a target."""
    sentences = []
    for row in found:
        target = TARGETS_MS.get((row["device"], row["dtype"]))
        if row["level"] != "sum" or target is None or (row["workload"], row["channels"]) != ("448 from 32", 384):
            continue
        time = row["modelled_us"] / 1e3
        held = "held" if time <= target else "missed"
        sentences.append(f"{row['device']}, {row['dtype']}: {time:.2f} ms modelled, at most {target} ms: {held}")
    return sentences
