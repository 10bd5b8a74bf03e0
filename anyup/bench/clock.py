"""Times of work on a GPU, which the host launches ahead of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from anyup.bench.timing import Time

_FLUSHED_BYTES = 2**28

# Seconds for which the card is held while the host launches what is timed: longer than most calls' launches take. For
# what takes more it is held longer, up to a most: there the card has waited for the host for a small part of the time.
_HELD, _MOST_HELD = 0.01, 1.0
_HELD_FOR_A_KERNEL = 1e-3

_MOST_CYCLES = 3e9
"""Of a card's clock in a second, at most: it is held a little longer than was asked for."""


class CudaClock:
    """The time of a call on a card, between events: launched while the card is held, begun with a cold L2 cache.

    Args:
        device: the card.
        budget: seconds for all repeats of a call that is repeated; there are 5 at least and 50 at most.
    """

    def __init__(self, device: torch.device, budget: float = 0.1) -> None:
        self._device = device
        self._budget = budget
        # Writing it evicts what the call before left in the cache.
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], object]) -> Time:
        """The time of one call; it is called again where the card did not have all of it before it began."""
        with torch.cuda.device(self._device):
            taken = self._taken(call, _HELD)
            longer = 2 * (taken.host or 0.0)
            if taken.ahead or longer > _MOST_HELD:
                return taken
            taken = self._taken(call, longer)
            # The host of a call that waits for the card would be told to wait for what holds it too.
            return taken if taken.ahead else self._taken(call, 0.0)

    def __call__(self, call: Callable[[], object]) -> float:
        """Median seconds of a kernel; whatever it raises is raised here, what the card reports late included."""
        with torch.cuda.device(self._device):
            call()
            (first,) = self._times(call, 1)
            return statistics.median(self._times(call, max(5, min(50, int(self._budget / max(first, 1e-6))))))

    def _taken(self, call: Callable[[], object], held: float) -> Time:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        _hold(held)
        self._flushed.zero_()
        start.record()
        begun = perf_counter()
        result = call()
        host = perf_counter() - begun
        ahead = not start.query()
        end.record()
        del result  # before the next call: an output may be gigabytes
        torch.cuda.synchronize()
        return Time(start.elapsed_time(end) / 1e3, host, ahead)

    def _times(self, call: Callable[[], object], repeats: int) -> list[float]:
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        _hold(_HELD_FOR_A_KERNEL)
        for start, end in events:
            self._flushed.zero_()  # takes longer than a launch: the host stays ahead
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


class CardLost(RuntimeError):
    """The card does not answer in this process any more."""


def require_a_living_card(error: Exception) -> None:
    """Raise CardLost where an error has taken the card along: whatever ran after it would fail too."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as dead:
        raise CardLost(f"the card does not answer after a call that failed ({error}): {dead}") from error


def _hold(seconds: float) -> None:
    """Keep the card from what is launched next."""
    if seconds:
        torch.cuda._sleep(int(seconds * _MOST_CYCLES))
