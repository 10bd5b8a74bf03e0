"""A lock that admits one run at a time to an output and is freed however its process ends; and the output's folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def only_run(path: str | os.PathLike[str], report: Callable[[str], None]) -> Iterator[bool]:
    """Keep other runs from an output within the block; yields False, after a message to `report`, where no lock works.

    The locked file is PATH.lock; a killed process leaves it behind, unlocked. Raises FileExistsError where
    another run has the lock, and another OSError, naming the output, where the file cannot be made.
    """
    path = Path(os.path.realpath(path))
    file = path.with_name(f"{path.name}.lock")
    handle, reason = _take(file, path)
    if reason:
        report(f"{path.parent} has no locks ({reason}): nothing keeps a second run from writing {path.name}")
    try:
        yield not reason
    finally:
        # The file is deleted before its lock is freed. Windows does not delete an open file.
        with suppress(PermissionError):
            file.unlink(missing_ok=True)
        os.close(handle)


def _take(file: Path, path: Path) -> tuple[int, str]:
    """Open and lock `file`: its descriptor, and why it could not be locked ("" where it is locked)."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise type(error)(error.errno, f"cannot be written, {error.strerror}", str(path)) from error
        try:
            _lock(handle)
        except (BlockingIOError, PermissionError) as error:  # Windows raises the second
            os.close(handle)
            raise FileExistsError(f"{path}: another run is writing it") from error
        except OSError as error:
            return handle, str(error.strerror)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle, ""
        os.close(handle)  # the file belonged to a run that has deleted it meanwhile: try once more


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def folder_for(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that exists within the block; if it was new and is still empty at the end, it is removed.

    Raises OSError, naming it, where it cannot be made or written into.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder, this is a file")
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder}: no permission to write in this folder")
        yield folder
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
