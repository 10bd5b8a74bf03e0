"""Two runs for one output: the second is told so, whatever the first has left; a killed one keeps nothing locked."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.patience import PATIENCE, wait_until

from anyup.cli import command as cli
from anyup.run_lock import folder_for, only_run

HOLD = """
import sys, time
from anyup.run_lock import only_run
with only_run(sys.argv[1], print):
    open("held", "w").close()
    time.sleep(1e6)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def never(text: str) -> None:
    raise AssertionError(text)


def hold(path: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], env=env)
    wait_until(Path("held").exists, lambda: process.poll() is None)
    return process


def test_one_run_has_an_output_until_it_ends() -> None:
    with only_run("out", never) as alone:
        assert alone
        for name in ("out", "./out"):
            with pytest.raises(FileExistsError, match="out: another run is writing it"), only_run(name, never):
                pass
        with only_run("other", never):
            pass
    with only_run("out", never):
        pass
    assert not list(Path().iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_a_killed_run_leaves_nothing_locked() -> None:
    process = hold("out")
    with pytest.raises(FileExistsError, match="another run"), only_run("out", never):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    with only_run("out", never) as alone:
        assert alone
    assert not Path("out.lock").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows deletes no open file")
def test_a_lock_on_a_file_that_has_lost_its_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before ends between the opening and the locking: its name goes, another run takes it anew."""
    fcntl = pytest.importorskip("fcntl")
    flock, calls = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            Path("out.lock").unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_run("out", never):
        with pytest.raises(FileExistsError), only_run("out", never):
            pass
        assert len(calls) == 3


def test_a_file_system_without_locks_is_said_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    told: list[str] = []
    with only_run("out", told.append) as alone:
        assert not alone
    assert (
        len(told) == 1 and "has no locks (No locks available): nothing keeps a second run from writing out" in told[0]
    )


def test_where_there_is_no_fcntl_windows_own_locks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: set[int] = set()

    def locking(handle: int, how: int, count: int) -> None:
        assert (how, count) == (2, 1)
        if os.fstat(handle).st_ino in locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        locked.add(os.fstat(handle).st_ino)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    with only_run("out", never) as alone:
        assert alone
        with pytest.raises(FileExistsError, match="another run"), only_run("out", never):
            pass


COMMANDS = {
    "out.npy.part": ["upsample", "photo.png", "--features", "features.npy", "-o", "out.npy"],
    "run/latest.pth": ["train", "--config", "mini", "data.photographs=photographs", "output=run"],
    "out.probes.pt": ["evaluate", "segmentation", "--data", "data", "--encoder", "some", "-o", "out.json"],
    "benchmark/results.json": ["bench", "--device", "cpu", "-o", "benchmark"],
}
"""By what they lock."""


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("locked", COMMANDS)
def test_a_second_run_is_told_of_the_first_and_not_to_delete_its_file(
    locked: str, resume: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(locked).parent.mkdir(exist_ok=True)
    Path("out.npy.part").touch()
    Path("photo.png").touch()
    if locked != "benchmark/results.json":
        Path(locked).touch()
    with only_run(locked, never):
        words = COMMANDS[locked] + ["--resume"] * (resume and COMMANDS[locked][0] != "bench")
        assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert f"{locked}: another run is writing it" in error and "delet" not in error


def test_a_folder_stays_where_something_is_in_it() -> None:
    with folder_for("a/b/c") as made:
        assert made.is_dir()
    assert not Path("a").exists()
    with folder_for("a/b/c") as made:
        (made / "result").touch()
    assert (made / "result").exists()
    Path("there").mkdir()
    with pytest.raises(KeyError), folder_for("there/new"):
        raise KeyError
    assert Path("there").is_dir() and not Path("there/new").exists()


def test_a_folder_that_cannot_be_is_named() -> None:
    Path("file").touch()
    for path in ("file", "file/folder"):
        with pytest.raises(NotADirectoryError, match="file"), folder_for(path):
            pass
    with pytest.raises(OSError, match="cannot be written.*none.out"), only_run("none/out", never):
        pass
    if os.name == "posix" and os.geteuid():
        Path("closed").mkdir(0o500)
        with pytest.raises(PermissionError, match="closed"), folder_for("closed"):
            pass
