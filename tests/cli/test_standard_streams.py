"""Commands whose standard streams are closed, full, read by nobody, or of few characters."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from support.patience import PATIENCE

from anyup.cli import command as cli

COMMANDS = {
    "demo": [],
    "upsample": ["photo.png", "--features", "features.npy", "-o", "out.npy"],
    "train": ["--config", "mini"],
    "evaluate": ["pictures", "--photographs", "photographs", "--encoder", "some", "-o", "pictures"],
    "gallery": ["photographs", "-o", "gallery.html"],
    "bench": ["-o", "benchmark"],
    "export": ["onnx", "--size", "8", "--grid", "2", "-o", "anyup.onnx"],
    "tune": [],
    "encoders": [],
    "info": [],
}
"""Each command, with what it needs to be understood."""

PRINTED = ("encoders", "info")
"""Those whose results are printed, and kept nowhere."""

RESULT = "mIoU 94.60 ± 0.20, ü.npy, \udcff.npy"


class _Failing(io.StringIO):
    """A stream whose writes, or whose flushes alone, fail: what is written may be kept until then."""

    def __init__(self, error: int, *, on_flush: bool) -> None:
        super().__init__()
        self._error, self._on_flush = error, on_flush

    def write(self, text: str) -> int:
        if not self._on_flush:
            raise OSError(self._error, os.strerror(self._error))
        return len(text)

    def flush(self) -> None:
        raise OSError(self._error, os.strerror(self._error))


STREAMS: dict[str, Callable[[], io.StringIO | None]] = {
    "closed": lambda: None,
    "full": lambda: _Failing(errno.ENOSPC, on_flush=False),
    "full when it is flushed": lambda: _Failing(errno.ENOSPC, on_flush=True),
    "read by nobody": lambda: _Failing(errno.EPIPE, on_flush=True),
}


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is typed for a command that tells something and then stores `stored`."""
    monkeypatch.chdir(tmp_path)

    def run(_: object) -> None:
        for _ in range(3):
            print("progress ...", file=sys.stderr, flush=True)
            print(RESULT, flush=True)
        Path("stored").touch()

    monkeypatch.setitem(cli._RUNNERS, request.param, run)
    return [request.param, *COMMANDS[request.param]]


def test_every_command_is_tried() -> None:
    assert COMMANDS.keys() == cli._RUNNERS.keys()


@pytest.mark.parametrize("stream", STREAMS)
def test_work_is_done_whatever_becomes_of_the_progress(
    stream: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", STREAMS[stream]())
    assert cli.main(command) == 0
    assert Path("stored").exists()


@pytest.mark.parametrize("stream", STREAMS)
def test_a_result_that_is_lost_is_a_failure_and_one_that_is_stored_is_none(
    stream: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", STREAMS[stream]())
    assert cli.main(command) == (1 if command[0] in PRINTED else 0)
    assert Path("stored").exists()
    told = capsys.readouterr().err
    assert ("standard output: No space left on device" in told) == ("full" in stream)
    assert ("error" in told) == (command[0] in PRINTED and stream != "read by nobody")


def test_characters_that_a_stream_lacks_are_escaped(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(command) == 0
    shown.seek(0)
    assert shown.readline() == "mIoU 94.60 \\xb1 0.20, \\xfc.npy, \\udcff.npy\n"


def test_a_mistake_keeps_its_status_where_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in STREAMS.values():
        monkeypatch.setattr(sys, "stderr", stream())
        assert cli.main(["upsample"]) == 2


def test_a_warning_is_a_line_without_its_place_in_the_code(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> None:
        warnings.warn("anyup: left out:\n  a.png", stacklevel=1)
        warnings.warn("of a library", RuntimeWarning, stacklevel=1)

    monkeypatch.setitem(cli._RUNNERS, command[0], run)
    assert cli.main(command) == 0
    assert capsys.readouterr().err == "anyup: warning: left out: a.png\nanyup: warning: of a library\n"
    with pytest.warns(UserWarning, match="afterwards"):
        warnings.warn("afterwards", stacklevel=1)


def _shell(command: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = command.replace("anyup", f"'{sys.executable}' -m anyup")
    return subprocess.run(command, shell=True, env=env, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        ("anyup --version > /dev/full", 1, "No space left on device"),
        ("anyup --help > /dev/full", 1, "No space left on device"),
        ("anyup --version >&-", 1, "Bad file descriptor"),
        ("anyup --version 2>&-", 0, ""),
        ("anyup upsample 2>&-", 2, ""),
        ("anyup upsample 2> /dev/full", 2, ""),
        ("anyup upsample <&- >&- 2>&-", 2, ""),
    ],
)
def test_the_exit_status_of_a_process_says_what_became_of_it(command: str, status: int, told: str) -> None:
    done = _shell(command)
    assert done.returncode == status  # 120 where Python itself fails to flush at its exit
    assert told in done.stderr and done.stderr.count("\n") == bool(told)


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX systems")
def test_a_file_never_takes_the_place_of_a_closed_stream() -> None:
    program = """
import os
from anyup.standard_streams import forgiving_streams
with forgiving_streams():
    print(os.open(os.devnull, os.O_RDONLY), file=open("/dev/fd/9", "w"))
"""
    env = {**os.environ, "PROGRAM": program}
    done = subprocess.run(
        f"exec 9>&1; '{sys.executable}' -c \"$PROGRAM\" <&- >&- 2>&-",
        shell=True, env=env, capture_output=True, text=True, timeout=PATIENCE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert int(done.stdout) > 2
