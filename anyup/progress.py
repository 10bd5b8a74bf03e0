"""Messages on stderr: what a command does and how long each stage takes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["Progress", "human_bytes"]

_TICK = 0.5  # seconds between two updates of the line on a terminal


def human_bytes(count: float) -> str:
    """A number of bytes in decimal units, as in "354 MB" and "1.50 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    for unit in ("GB", "TB", "PB", "EB"):
        if count < 999.995:
            return f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} ZB"


def _left(reports: list[tuple[float, float]]) -> str:
    """The text ", 40 %, 18 s left", from the first and the last report (seconds, share done); "" before the second."""
    if len(reports) < 2 or reports[1][1] <= reports[0][1]:
        return ""
    (first, begun), (last, done) = reports
    return f", {done:.0%}, {(1 - done) * (last - first) / (done - begun):.0f} s left"


class Progress:
    """Writes lines to a stream: one for a note, and one for a stage of work with its duration.

    On a terminal the running stage shows the seconds gone by; elsewhere (a log file) each stage is one
    plain line.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def note(self, text: str) -> None:
        self._write(f"{text}\n")

    @contextmanager
    def stage(self, text: str) -> Iterator[Callable[[float], None]]:
        """Show `text` until the block ends, then how long the block took.

        The block receives a function. Called with the share of the work that is done (0 to 1), the function lets a
        terminal show the time left.
        """
        start = time.perf_counter()
        over = threading.Event()
        reports: list[tuple[float, float]] = []  # the first and the last report: (seconds, share done)

        def report(share: float) -> None:
            reports[1 if reports else 0 :] = [(time.perf_counter() - start, share)]

        def tick() -> None:
            while not over.wait(_TICK):
                seconds = time.perf_counter() - start
                self._write(f"\r{text} ... {seconds:.0f} s{_left(reports)}   ")

        self._write(f"{text} ... ")
        ticker = threading.Thread(target=tick, daemon=True) if self._live else None
        if ticker:
            ticker.start()
        finished = False
        try:
            yield report
            finished = True
        finally:
            over.set()
            if ticker:
                ticker.join()
            end = f"{time.perf_counter() - start:.2f} s" if finished else "stopped"
            self._write(f"\r{text} ... {end}\n" if self._live else f"{end}\n")
