"""A program with a limit of time, ended together with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def run(
    command: Sequence[str],
    seconds: float,
    *,
    grace: float = 5.0,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[str, int | None]:
    """Its output, both streams, and its exit status; None where it was ended at the limit.

    Args:
        command: the program and its arguments.
        seconds: the limit. Then it is asked to end as by Ctrl-C, and has `grace` seconds for it.
        folder: where it runs; by default where this process does.
        environment: what its environment has beside this process's.

    Raises OSError where it cannot be started.
    """
    with tempfile.TemporaryFile() as output:  # a pipe would be held open by whatever it started
        child = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, preexec_fn=_on_its_own,
        )  # fmt: skip
        status: int | None = None
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(grace)
        finally:
            _signal(child, signal.SIGKILL)  # what hangs on a card would keep its memory
            child.wait()
        output.seek(0)
        return output.read().decode(errors="replace"), status


def _on_its_own() -> None:
    """In a group of processes of its own, and not deaf to Ctrl-C, as what a shell starts in the background is."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)
