"""One run at a time for an output, by a lock that ends with its process in whatever way that ends; and its folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def only_run(path: str | os.PathLike[str], tell: Callable[[str], None]) -> Iterator[bool]:
    """Keep other runs from an output within the block; gives whether there are locks to do so, else `tell` hears it.

    What is locked is a file PATH.lock, which a killed process leaves behind, unlocked. Raises FileExistsError where
    another run has the lock, and another OSError, naming the output, where the file cannot be made.
    """
    path = Path(os.path.realpath(path))
    file = path.with_name(f"{path.name}.lock")
    handle, reason = _take(file, path)
    if reason:
        tell(f"{path.parent} has no locks ({reason}): nothing keeps a second run from writing {path.name}")
    try:
        yield not reason
    finally:
        # The name goes before another run can have the lock; Windows deletes no file that is open.
        with suppress(PermissionError):
            file.unlink(missing_ok=True)
        os.close(handle)


def _take(file: Path, path: Path) -> tuple[int, str]:
    """The locked file's descriptor, and why it is not locked after all, "" where it is."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise type(error)(error.errno, f"cannot be written, {error.strerror}", str(path)) from error
        try:
            _lock(handle)
        except (BlockingIOError, PermissionError) as error:  # Windows' is the second
            os.close(handle)
            raise FileExistsError(f"{path}: another run is writing it") from error
        except OSError as error:
            return handle, str(error.strerror)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle, ""
        os.close(handle)  # of a run that has ended in between, and taken the name along


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
    """A folder that is there within the block, and afterwards where something has been put into it.

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
