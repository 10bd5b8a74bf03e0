"""A step of the published recipe as it would run on a card that is not here: `--model --backward`.

As `model` for a forward: the objective runs forward and backward on the "meta" device, where each launch and each call
of torch is noted. The batch is of 4 images of 224 x 224 with features of 16 x 16, whose reconstruction is 32 x 32 and
whose self-consistency is at 224 x 224. The device "meta" has no autocast, so the weights themselves are of the dtype.
The optimizer's few kernels are not among the steps, nor is what an encoder takes.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from anyup import AnyUp
from anyup.bench.workloads import Workload
from anyup.kernels.launch import Launch, Target
from anyup.training.config import Loss
from anyup.training.objective import Objective
from anyup.training.samples import Batch
from benchmarks.modelled_gpu import compiled, model, operation_kernels, roofline
from benchmarks.modelled_gpu.model_steps import OPERATORS, Step, name_of, pretended_card, staged, watched

BATCH, GUIDANCE, CHANNELS, GRID, SIDE = 4, 224, 384, 16, 32
DIFFERENTIABLE = (
    "pixel_encoder", "query_projection", "feature_unification", "window_attention", "feature_distance"
)  # fmt: skip
OUTSIDE = "torch's own"

Row = dict[str, Any]


def published_step(dtype: torch.dtype) -> tuple[Objective, Batch]:
    """The objective and a batch of the published recipe, on "meta"."""
    with torch.device("meta"):
        objective = Objective(AnyUp(backend="triton").to(dtype).train(), Loss())
        images = torch.empty(2, BATCH, 3, GUIDANCE, GUIDANCE, dtype=dtype)
        low = torch.empty(BATCH, CHANNELS, GRID, GRID, dtype=dtype)
        batch = Batch(
            images[0], images[1], low, torch.empty(BATCH, 4, CHANNELS, GRID, GRID),
            torch.empty(BATCH, 4, 2, dtype=torch.long), torch.empty(BATCH, 0, SIDE, SIDE), SIDE,
        )  # fmt: skip
    return objective, batch


def steps_of(dtype: torch.dtype, card: Target | None, *, multiprocessors: int | None = None) -> list[Step]:
    """The launches and torch's calls of the objective, forward and backward."""
    objective, batch = published_step(dtype)
    with pretended_card(card, multiprocessors):
        for _ in range(2):  # the first makes what later ones find
            objective.zero_grad(set_to_none=True)
            with _noted() as steps:
                objective(batch, BATCH, BATCH)["loss"].backward()
    return steps


@contextmanager
def _noted() -> Iterator[list[Step]]:
    steps: list[Step] = []
    stages = [OUTSIDE]

    def note(self: Launch) -> None:
        if all(self.grid):
            steps.append(Step(stages[-1], name_of(self), self))

    def within(stage: str, body: Callable[..., Any]) -> Callable[..., Any]:
        return staged(stages, lambda: stage, body)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Launch, "__call__", note))
        for name, place in {**OPERATORS, "feature_distance": "feature_distance.operator"}.items():
            module = importlib.import_module(f"anyup.ops.{place}")
            words = name.replace("_", " ")
            forward = within(words, module._run_forward)
            if name in DIFFERENTIABLE:
                forward = _differentiable(forward, module)
                stack.enter_context(patch.object(module, "_backward", within(f"{words}, back", module._run_backward)))
            stack.enter_context(patch.object(module, "_forward", forward))
        stack.enter_context(watched(steps, lambda: stages[-1], "meta"))
        yield steps


def _differentiable(forward: Callable[..., Any], module: Any) -> Callable[..., Any]:
    """A forward pass that autograd differentiates by the operator's own rule."""

    class Opened(torch.autograd.Function):
        setup_context = staticmethod(module._setup_context)
        backward = staticmethod(module._gradient)

    Opened.forward = staticmethod(forward)  # type: ignore[assignment]
    return lambda *inputs: (Opened.apply if torch.is_grad_enabled() else forward)(*inputs)


def rows(dtype: str, devices: Sequence[roofline.Device]) -> list[Row]:
    """For each device a row for each operation and direction, and their sum."""
    executions, found = model.Executions(), []
    for device in devices:
        card = Target("cuda", device.arch)
        steps = steps_of(compiled.DTYPES[dtype], card, multiprocessors=device.sms)
        costs = [(step, _cost(step, dtype, device, executions)) for step in steps]
        stages = [*Counter(step.stage for step in steps), "sum"]
        for stage in stages:
            own = [(step, cost) for step, cost in costs if stage in (step.stage, "sum")]
            found.append(
                {
                    "device": device.name,
                    "dtype": dtype,
                    "stage": stage,
                    "launches": sum(step.launch is not None for step, _ in own),
                    "torch_kernels": sum(step.kernels for step, _ in own if step.launch is None),
                    "bytes": round(sum(cost.moved for _, cost in own)),
                    "floor_us": round(sum(cost.floor.total for _, cost in own), 1),
                    "modelled_us": round(sum(cost.modelled.total for _, cost in own), 1),
                }
            )
    return found


def _cost(step: Step, dtype: str, device: roofline.Device, executions: model.Executions) -> model.Cost:
    launch = step.launch
    if launch is None or model.kernel_of(step) in (*compiled.KERNELS, *operation_kernels.KERNELS):
        return model.cost_of(step, _workload_of(launch), dtype, device, executions)
    # Of tables of a few kilobytes: the launch is what they take.
    moved = sum(value.nbytes for value in launch.arguments.values() if isinstance(value, Tensor))
    terms = {"memory": 1e6 * moved / device.memory}
    times = roofline.Times(terms), roofline.Times(terms, roofline.LAUNCH_US)
    return model.Cost(moved, moved, 0.0, 0.0, *times, "count")


def _workload_of(launch: Launch | None) -> Workload:
    """The sizes that a launch's tensors tell, as far as its work depends on them."""
    size = grid = (GRID, GRID)
    if launch is not None:
        tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
        if {"query", "key"} <= tensors.keys():
            size, grid = tuple(tensors["query"].shape[1:3]), tuple(tensors["key"].shape[1:3])
        elif "height" in launch.arguments and "cells_high" not in launch.arguments:
            size = launch.arguments["height"], launch.arguments["width"]
        elif "pixels" in tensors:
            side = math.isqrt(tensors["pixels"].shape[1])
            size = (side, side)
    return Workload(size=size, grid=grid, channels=CHANNELS, batch=BATCH)


def table(found: Sequence[Row]) -> str:
    """Markdown, a line for each row; times are modelled."""
    lines = [
        "| device | dtype | operation | launches | torch's kernels | GB | floor ms | modelled ms |",
        "|" + "---|" * 8,
    ]
    for row in found:
        cells = (
            row["device"], row["dtype"], row["stage"], row["launches"], row["torch_kernels"],
            f"{row['bytes'] / 1e9:.2f}", f"{row['floor_us'] / 1e3:.2f}", f"{row['modelled_us'] / 1e3:.2f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
