"""Times of calls, repeated in turn, and whether the machine was busy."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return {"seconds": self.median, "spread": self.spread, "times": list(self.times)}


def interleave(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each function once, then each again: A B A B, so that a slow minute hits all of them alike.

    Where functions alternate, an untimed call of the same function goes before each timed one: otherwise each would be
    timed with the memory that the other has just given back to the system, and the faster one would pay most for it.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if len(functions) > 1:
                function()
            start = time.perf_counter()
            result = function()
            times[name].append(time.perf_counter() - start)
            del result  # before the next call: an output may be gigabytes
    timings = {name: Timing(tuple(seconds)) for name, seconds in times.items()}
    for name, timing in timings.items():
        if timing.spread is not None and timing.spread > BUSY_SPREAD:
            print(f"warning: {name}: spread {timing.spread:.0%}: the machine was busy", file=sys.stderr)
    return timings


def once(function: Callable[[], object]) -> Timing:
    """One call, for what takes minutes."""
    return interleave({"": function}, 1)[""]
