"""The calls that are timed: ours and the baselines, each built for its sizes."""

from __future__ import annotations

from dataclasses import replace

import torch

from anyup import AnyUp
from anyup.bench import baseline, cases, memory
from anyup.bench.cases import Sizes
from anyup.bench.published_code import PublishedCode
from anyup.bench.suite import CODE, GRAPH, NATTEN, WITH_CHUNKS, Implementation
from anyup.bench.timing import Clock
from anyup.bench.workloads import Workload
from anyup.capture import Graph, graph_of


class Builder:
    """Builds implementations.

    Args:
        clock: to find the baseline's best chunk size with.
        code: the published code, where there is a checkout.
    """

    def __init__(self, clock: Clock, code: PublishedCode | None = None) -> None:
        self._clock, self._code = clock, code
        self._chunk_times: dict[tuple[Workload, str], dict[int | None, float]] = {}

    def build(self, implementation: Implementation, sizes: Sizes) -> cases.Call:
        """The call; `sizes.chunk` says how many queries a baseline takes at a time.

        Raises NotImplementedError, here or when called, where it cannot run.
        """
        if implementation.backend == GRAPH:
            return _graph(sizes)
        if implementation.backend in (CODE, NATTEN):
            if self._code is None:
                raise NotImplementedError("no checkout of the published code")
            return self._code.build(implementation.case, sizes)
        return cases.build(implementation.case, sizes)

    def measure_memory(self, implementation: Implementation, sizes: Sizes) -> memory.Memory:
        """The peak of a call: on a CPU in a child process, on a card in this one."""
        device = torch.device(sizes.device)
        if device.type == "cuda":
            try:
                call = self.build(implementation, sizes)
            except torch.OutOfMemoryError:
                return memory.Memory(None)
            return memory.Memory(call.held_bytes) if isinstance(call, Graph) else memory.measure_on_card(call, device)
        checkout = self._code.folder if self._code and implementation.backend in (CODE, NATTEN) else None
        return memory.measure_in_child(implementation.case, sizes, checkout=checkout)

    def chunk_times(self, implementation: Implementation, sizes: Sizes) -> dict[int | None, float] | None:
        """Seconds of the baseline's attention by chunk size; None for who has no chunks."""
        if implementation.backend not in WITH_CHUNKS:
            return None
        key = (sizes.workload, sizes.dtype)
        if key not in self._chunk_times:
            forward = baseline.Published(cases.model(sizes.dtype, sizes.device))
            with torch.inference_mode():
                self._chunk_times[key] = forward.chunk_times(sizes.workload, self._clock)
        return self._chunk_times[key]


def with_chunk(sizes: Sizes, times: dict[int | None, float] | None) -> Sizes:
    """The sizes with the best chunk size."""
    return sizes if times is None else replace(sizes, chunk=baseline.best_chunk(times))


def _graph(sizes: Sizes) -> Graph:
    upsampler: AnyUp = cases.model(sizes.dtype, sizes.device)
    image, features = sizes.inputs()
    with torch.inference_mode():
        return graph_of(lambda: upsampler(image, features), image.device)
