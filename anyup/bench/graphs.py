"""A call as a CUDA graph, and what a card does in a replay of one, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anyup.bench.stages import Stages
from anyup.bench.timing import Time

_BETWEEN = "spin_kernel"
"""The kernel of `torch.cuda._sleep`, which nothing else launches: it stands before and after each stage."""


@dataclass(frozen=True)
class Graph:
    """A call as a CUDA graph that is replayed.

    Attributes:
        out: what a replay writes; it lies in the graph's memory.
        held_bytes: the graph's memory, which it keeps from its capture on.
    """

    graph: torch.cuda.CUDAGraph
    out: Tensor
    held_bytes: int

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.out


def capture(call: Callable[[], Tensor], device: torch.device) -> Graph:
    """Capture a call; raises NotImplementedError where it cannot be."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and memory is found before the capture
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        # A capture fills a pool of its own, whose blocks stay reserved: what is reserved more is the graph's.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotImplementedError(f"the call cannot be captured: {str(error).splitlines()[0]}") from error
        return Graph(graph, out, torch.cuda.memory_reserved() - before)


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

    replay = capture(run, device)
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
