"""Array files that are written piece by piece: .npy by a memory map, .zarr in chunks.

Pieces go to OUT.part, beside which OUT.part.json says what was asked for and how many pieces are there; when all
are, the file gets its name. So OUT is complete or absent, and what was interrupted can be completed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from anyup.installing import pip_install
from anyup.limited_memory.destinations import no_room, reserve
from anyup.run_lock import only_run

SUFFIXES = (".npy", ".zarr")

_CHUNK = (64, 64, 256)  # channels, rows and columns of a zarr array's chunk, at most


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a file stores for a dtype: NumPy has no bfloat16, so float32 stands for it."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def bytes_there(path: Path) -> int:
    """The bytes of the disk that the partial file of an interrupted run takes."""
    partial = _partial_of(path)
    files = partial.rglob("*") if partial.is_dir() else [partial]
    return sum(
        min(status.st_size, status.st_blocks * 512) for status in (file.stat() for file in files if file.is_file())
    )


@contextmanager
def begun(path: Path, *, resume: bool, report: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs from a file, within the block; `report` gets a message where the file system has no locks.

    Raises FileExistsError where another run is at work, or where an interrupted one has left something and `resume` is
    not asked for.
    """
    partial = _partial_of(path)
    with only_run(partial, report) as alone:
        if partial.exists() and not resume:
            whose = "an interrupted run" if alone else "an interrupted run, or being written by another one"
            raise FileExistsError(f"{partial}: left by {whose}; --resume completes it, deleting it begins anew")
        yield


def partial_array(path: Path) -> Any:
    """The array (1, C, H, W) that another process has begun for a file, to write into."""
    partial = _partial_of(path)
    if path.suffix.lower() == ".npy":
        import numpy

        return numpy.load(partial, mmap_mode="r+")[None]
    return zarr_package().open_array(str(partial), mode="r+")


def _partial_of(path: Path) -> Path:
    path = Path(os.path.realpath(path))
    return path.with_name(path.name + ".part")


class PartialArray:
    """An array (C, H, W) that is written to a file piece by piece, inside the block of `begun`.

    Attributes:
        out: the array to write into, (1, C, H, W).
        pieces: how many pieces the file holds.
        tile: (rows, columns) of the pieces that an interrupted run wrote; None for a new file.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, asked: Mapping[str, Any], rows: int
    ) -> None:
        """Begin a new file for pieces of `rows` rows. Raises OSError where the disk has no room."""
        self._begin(path, shape, dtype, asked)
        try:
            self._stored = self._create(rows)
        except BaseException:
            self.discard()
            raise

    @classmethod
    def resume(
        cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, asked: Mapping[str, Any], rows: int
    ) -> PartialArray:
        """Go on with the file of an interrupted run, or begin a new one where there is none.

        Raises ValueError where the interrupted run had other settings (`asked`), or where its files are damaged.
        """
        self = cls.__new__(cls)
        self._begin(path, shape, dtype, asked)
        if not self._state.exists():
            self.discard()  # the run was interrupted before its first piece was complete
            return cls(path, shape, dtype, asked, rows)
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            before, self.pieces, self.tile = state["asked"], int(state["pieces"]), tuple(state["tile"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._state}: not what an interrupted run leaves; delete it to begin anew") from error
        now = json.loads(json.dumps(self._asked))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{self._partial}: begun with {key} {before.get(key)}, now {now.get(key)}; delete it to begin anew"
                )
        self._stored = partial_array(path)
        return self

    def _begin(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, asked: Mapping[str, Any]) -> None:
        self._path = Path(os.path.realpath(path))
        self._partial = _partial_of(path)
        self._state = self._partial.with_name(self._partial.name + ".json")
        self._next_state = self._state.with_name(self._state.name + ".new")
        if not self._partial.exists():
            _remove(self._state)  # a run was killed after it renamed the array and before it removed this file
        self._shape = shape
        self._dtype = str(stored_dtype(dtype)).removeprefix("torch.")
        self._asked = {**asked, "shape": list(shape), "stored dtype": self._dtype}
        self.pieces = 0
        self.tile: tuple[int, ...] | None = None

    @property
    def _is_npy(self) -> bool:
        return self._path.suffix.lower() == ".npy"

    @property
    def out(self) -> Any:
        return self._stored

    def keep(self, pieces: int, tile: tuple[int, int]) -> None:
        """Store that the file holds the first `pieces` pieces, each of `tile` (rows, columns)."""
        self.pieces, self.tile = pieces, tile
        state = {"asked": self._asked, "pieces": pieces, "tile": list(tile)}
        # The temporary file has a fixed name, so that the next run overwrites what a killed run leaves.
        self._next_state.write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.replace(self._next_state, self._state)

    def complete(self) -> None:
        """Give the file its name; another one of that name is replaced."""
        if self._partial.is_dir():
            _remove(self._path)  # a folder replaces no other that holds something
        os.replace(self._partial, self._path)
        for path in (self._state, self._next_state):
            _remove(path)

    def close(self) -> bool:
        """After an interruption: whether anything is left that can be completed; what cannot is removed."""
        if self.pieces == 0:
            self.discard()
        return self.pieces > 0

    def discard(self) -> None:
        """Remove the partial array and its state."""
        for path in (self._state, self._next_state, self._partial):
            _remove(path)

    @contextmanager
    def telling_what_is_needed(self) -> Iterator[None]:
        """Where the disk is full within the block, add to the error how many bytes the rest of the file needs."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise no_room(self._path, max(_size(self._shape, self._dtype) - bytes_there(self._path), 0)) from error

    def _create(self, rows: int) -> Any:
        shape = (1, *self._shape)
        if self._is_npy:
            import numpy

            array = numpy.lib.format.open_memmap(self._partial, "w+", dtype=self._dtype, shape=self._shape)
            reserve(self._partial)
            return array[None]
        zarr = zarr_package()
        # A chunk never lies in two pieces: the second piece would have to read the chunk and write it once more.
        most = (_CHUNK[0], min(_CHUNK[1], rows), _CHUNK[2])
        chunks = (1, *(min(pair) for pair in zip(most, self._shape, strict=True)))
        return zarr.open_array(str(self._partial), mode="w", shape=shape, chunks=chunks, dtype=self._dtype)


def _size(shape: tuple[int, int, int], dtype: str) -> int:
    return shape[0] * shape[1] * shape[2] * getattr(torch, dtype).itemsize


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_groups(root: Path, folder: Path) -> None:
    """Make groups of zarr of a folder and of those that it lies in, up to the root."""
    for each in (folder, *folder.parents):
        zarr_package().open_group(str(each), mode="a")
        if each == root:
            return


def zarr_package() -> Any:
    """The package zarr; ImportError, which says how to install it, where it is missing."""
    try:
        import zarr
    except ImportError as error:
        raise ImportError(f".zarr files need zarr: {pip_install('zarr')}") from error
    return zarr
