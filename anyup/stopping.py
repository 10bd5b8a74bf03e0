"""Requests to stop: Ctrl-C, and the signals of whoever ends processes or closes a terminal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_KINDS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


class Stopped(KeyboardInterrupt):
    """A request to stop; `kind` is the signal's number."""

    def __init__(self, kind: int) -> None:
        super().__init__(kind)
        self.kind = kind


@contextmanager
def on_request(act: Callable[[int], None]) -> Iterator[None]:
    """Within the block `act` is called with the number of the first such signal; a second one is met as before.

    Signals that are ignored, as `nohup` ignores SIGHUP, stay so; outside the main thread nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {kind: signal.getsignal(kind) for name in _KINDS if (kind := getattr(signal, name, None)) is not None}
    before = {kind: handler for kind, handler in found.items() if handler not in (signal.SIG_IGN, None)}

    def put_back() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def ask(kind: int, _: FrameType | None) -> None:
        put_back()
        act(kind)

    for kind in before:
        signal.signal(kind, ask)
    try:
        yield
    finally:
        put_back()


def stop(kind: int) -> None:
    """Raise `Stopped`."""
    raise Stopped(kind)
