"""Times of calls, repeated in turn, and whether the machine was busy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple


class Time(NamedTuple):
    """How long a call took.

    Attributes:
        seconds: of whatever computes.
        host: seconds until the call returned, where a card computes; None where the host does.
        ahead: whether the card had all that it was to do before it began: what waits for the card cannot be launched
            ahead, and the card's time then holds what it waited for the host.
    """

    seconds: float
    host: float | None = None
    ahead: bool = True

    @property
    def wall(self) -> float:
        """About the seconds that somebody waits for the result of this call alone."""
        return max(self.seconds, self.host or 0.0)


Clock = Callable[[Callable[[], object]], Time]
"""The time of one call."""

BUSY_SPREAD = 0.15
"""A wider spread than this says that something else ran on the machine."""


@dataclass(frozen=True)
class Timing:
    """The time of each repeat."""

    repeats: tuple[Time, ...]

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds of each repeat."""
        return tuple(time.seconds for time in self.repeats)

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
        """For JSON; `host_seconds` and `ahead` where a card computed."""
        row = {"seconds": self.median, "spread": self.spread, "times": list(self.times), "busy": self.busy}
        hosts = [time.host for time in self.repeats if time.host is not None]
        if hosts:
            row.update(host_seconds=statistics.median(hosts), ahead=all(time.ahead for time in self.repeats))
        return row


def host_clock(function: Callable[[], object]) -> Time:
    """The time of one call, by the host's clock."""
    start = perf_counter()
    result = function()
    seconds = perf_counter() - start
    del result  # before the next call: an output may be gigabytes
    return Time(seconds)


def interleave(
    functions: Mapping[str, Callable[[], object]], repeats: int, clock: Clock = host_clock
) -> dict[str, Timing]:
    """Time each function once, then each again: A B A B, so that a slow minute hits all of them alike.

    Where functions alternate, an untimed call of the same function goes before each timed one: otherwise each would be
    timed with the memory that the other has just given back to the system, and the faster one would pay most for it.
    """
    times: dict[str, list[Time]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if len(functions) > 1:
                function()
            times[name].append(clock(function))
    return {name: Timing(tuple(repeats)) for name, repeats in times.items()}
