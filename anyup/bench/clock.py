"""Times of kernels on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

_FLUSHED_BYTES = 2**28


class CudaClock:
    """Seconds of a call on a card: the median of repeats between events, each with a cold L2 cache.

    Args:
        device: the card.
        budget: seconds for all repeats of a call; there are 5 at least and 50 at most.
    """

    def __init__(self, device: torch.device, budget: float = 0.1) -> None:
        self._device = device
        self._budget = budget
        # Writing it evicts what the call before left in the cache, and keeps the card busy while the host prepares the
        # launch, which would otherwise be timed too.
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call, with a cold L2 cache and nothing else on the card; for calls that are timed in turn."""
        with torch.cuda.device(self._device):
            return self._times(call, 1)[0]

    def __call__(self, call: Callable[[], object]) -> float:
        """Time a call; whatever it raises is raised here, what the card reports late included."""
        with torch.cuda.device(self._device):
            call()
            (first,) = self._times(call, 1)
            return statistics.median(self._times(call, max(5, min(50, int(self._budget / max(first, 1e-6))))))

    def _times(self, call: Callable[[], object], repeats: int) -> list[float]:
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for start, end in events:
            self._flushed.zero_()
            start.record()
            result = call()
            end.record()
            del result  # before the next call: an output may be gigabytes
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]
