"""Standard output and error that may be closed, full or of few characters: a command does its work all the same."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Forgiving(io.TextIOBase):
    """A text stream over another one, or over none, that never fails.

    Characters that the other one's encoding lacks are escaped. `failure` is why something was not shown, None where
    all was; after a failure nothing is tried again.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if self._stream is None:
            self.failure = OSError(errno.EBADF, os.strerror(errno.EBADF))
        elif self.failure is None:
            try:
                self._stream.write(self._shown(text))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _shown(self, text: str) -> str:
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def _fail(self, error: OSError) -> None:
        self.failure = error
        # What the stream still holds goes nowhere, or Python, which flushes it at exit, would fail once more.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving_streams() -> Iterator[tuple[Forgiving, Forgiving]]:
    """Put such streams in the places of `sys.stdout` and `sys.stderr`, and what was there back; gives the two."""
    _occupy_closed_descriptors()
    before = sys.stdout, sys.stderr
    out, err = Forgiving(before[0]), Forgiving(before[1])
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within the block a warning is a line on `sys.stderr`, without the place in the code that Python shows."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"anyup: warning: {' '.join(str(message).split()).removeprefix('anyup: ')}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _occupy_closed_descriptors() -> None:
    """Open what was closed to nowhere: else the next file opened would get a library's warnings into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
