"""Requests to stop: Ctrl-C, SIGTERM, and the signal of a terminal that is closed."""

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
    """Within the block the first such signal calls `act` with its number; a second signal has its previous handler.

    A signal that is ignored, as `nohup` ignores SIGHUP, stays ignored. Outside the main thread nothing changes.
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
