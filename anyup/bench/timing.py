"""Times of calls, repeated in turn, and whether the machine was busy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Clock = Callable[[Callable[[], object]], float]
"""Seconds of one call."""

BUSY_SPREAD = 0.15
"""A wider spread than this says that something else ran on the machine."""


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float | None:
        """(Slowest - fastest) / median; None for a single repeat."""
        return (max(self.times) - min(self.times)) / self.median if len(self.times) > 1 else None

    @property
    def busy(self) -> bool:
        """Whether the repeats lie so far apart that something else must have run."""
        return self.spread is not None and self.spread > BUSY_SPREAD

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return {"seconds": self.median, "spread": self.spread, "times": list(self.times), "busy": self.busy}


def host_clock(function: Callable[[], object]) -> float:
    """Seconds of one call, by the host's clock."""
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    del result  # before the next call: an output may be gigabytes
    return seconds


def interleave(
    functions: Mapping[str, Callable[[], object]], repeats: int, clock: Clock = host_clock
) -> dict[str, Timing]:
    """Time each function once, then each again: A B A B, so that a slow minute hits all of them alike.

    Where functions alternate, an untimed call of the same function goes before each timed one: otherwise each would be
    timed with the memory that the other has just given back to the system, and the faster one would pay most for it.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if len(functions) > 1:
                function()
            times[name].append(clock(function))
    return {name: Timing(tuple(seconds)) for name, seconds in times.items()}
