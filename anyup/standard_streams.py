"""Standard streams that never raise, so that a command finishes its work even if stdout is closed or full."""

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
    """A text stream that writes to another stream, or to none, and never raises.

    Characters that the other stream's encoding lacks are escaped. `failure` is the first error, None if there was
    none; after it nothing more is written.
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
        # Redirect the descriptor to the null device: at exit Python flushes the stream, which would fail once more.
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
    """Replace `sys.stdout` and `sys.stderr` by `Forgiving` streams within the block; yields the two."""
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
    """Within the block a warning is one line on `sys.stderr`, without file name and line number."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"anyup: warning: {' '.join(str(message).split()).removeprefix('anyup: ')}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _occupy_closed_descriptors() -> None:
    """Open closed descriptors 0 to 2 on the null device: else the next opened file would get a library's warnings."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
