"""What a card does in a replay of a CUDA graph, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyup.bench.stages import Stages
from anyup.bench.timing import Time
from anyup.capture import graph_of

_BETWEEN = "spin_kernel"
"""The kernel of `torch.cuda._sleep`, which nothing else launches: it stands before and after each stage."""


class Kernel(NamedTuple):
    """A kernel of a replay, in the order in which the card ran them; `stage` is "" between two stages."""

    stage: str
    name: str
    seconds: float


def kernels_of(stages: Stages, device: torch.device) -> list[Kernel]:
    """What the card does in one replay of a forward's stages, captured together.

    Raises NotImplementedError where they cannot be captured, RuntimeError where the profiler sees no kernel.
    """
    names: list[str] = []

    def between(stage: Callable[[], object]) -> Time:
        torch.cuda._sleep(1)
        stage()
        torch.cuda._sleep(1)
        return Time(0.0)

    def run() -> Tensor:
        times, out = stages.run(between)
        names[:] = times
        return out

    replay = graph_of(run, device)
    for _ in range(2):  # the first one makes the profiler ready
        events = _profiled(replay)
    return by_stage(events, names)


def by_stage(events: Sequence[tuple[str, float]], names: Sequence[str]) -> list[Kernel]:
    """Names and seconds of kernels with the stages that they belong to; raises RuntimeError where marks are missing."""
    marks = sum(_BETWEEN in name for name, _ in events)
    if marks != 2 * len(names):
        raise RuntimeError(f"the profiler saw {marks} of {2 * len(names)} marks between the stages")
    kernels, passed = [], 0
    for name, seconds in events:
        if _BETWEEN in name:
            passed += 1
        else:
            kernels.append(Kernel(names[passed // 2] if passed % 2 else "", name, seconds))
    return kernels


def _profiled(replay: Callable[[], object]) -> list[tuple[str, float]]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    seen = [event for event in profiler.events() if event.device_type.name in ("CUDA", "HIP")]
    seen.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in seen]
