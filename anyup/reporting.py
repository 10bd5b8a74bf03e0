"""What a person at the terminal, or the reader of a log file, sees of a long run."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_SECONDS_BETWEEN_LINES = 30.0  # of a log file; a terminal's one line is renewed each second


def duration(seconds: float) -> str:
    """As a person says it: "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Reporter:
    """Lines on a stream. `tick` is a line that the next one replaces on a terminal; in a file few of them stand."""

    def __init__(self, stream: TextIO | None = None, silent: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._silent = silent
        self._shown = 0  # characters of the line that the next one replaces
        self._last = -float("inf")
        self._told: set[str] = set()

    def note(self, text: str) -> None:
        """A line that stays."""
        if not self._silent:
            self._write(f"{text}\n")
            self._shown = 0

    def note_once(self, text: str) -> None:
        """A line that stays, unless it has been written before."""
        if text not in self._told:
            self._told.add(text)
            self.note(text)

    def tick(self, text: str, *, last: bool = False) -> None:
        """Where the work stands; `last` makes the line stay."""
        now = time.monotonic()
        if self._silent or not (last or now - self._last >= (1.0 if self._live else _SECONDS_BETWEEN_LINES)):
            return
        self._last = now
        self._write(text if self._live and not last else f"{text}\n")
        self._shown = len(text) if self._live and not last else 0

    def _write(self, text: str) -> None:
        if self._shown:
            text = f"\r{text.rstrip():{self._shown}}" + ("\n" if text.endswith("\n") else "")
        self._stream.write(text)
        self._stream.flush()


class Rate:
    """How many a second, over the last while, and how long the rest takes."""

    def __init__(self, memory: int = 50) -> None:
        self._memory = memory
        self._start = time.monotonic()
        self._times: list[tuple[float, int]] = [(self._start, 0)]

    def count(self, done: int) -> None:
        self._times.append((time.monotonic(), done))
        del self._times[: -self._memory - 1]

    def count_of(self, done: int, total: int) -> str:
        """`count`, and the `time_left` of so many in all."""
        self.count(done)
        return self.time_left(total - done)

    @property
    def elapsed(self) -> float:
        """Seconds since the first."""
        return time.monotonic() - self._start

    @property
    def per_second(self) -> float:
        (start, first), (end, last) = self._times[0], self._times[-1]
        return (last - first) / max(end - start, 1e-9)

    def time_left(self, remaining: int) -> str:
        """How long so many take: ", 12 min left"; "" where none remains, or none is counted yet."""
        speed = self.per_second
        return f", {duration(remaining / speed)} left" if remaining > 0 and speed > 0 else ""
