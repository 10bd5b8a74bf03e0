"""Array files that are written piece by piece: .npy by a memory map, .zarr in chunks.

Pieces go to OUT.part, beside which OUT.part.json tells what was asked for and how many pieces are there; when all
are, the file gets its name. So OUT is complete or absent, and what was interrupted can be completed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from anyup.budget import readable
from anyup.images import complete_or_absent
from anyup.outputs import reserve

SUFFIXES = (".npy", ".zarr")

_CHUNK = (64, 64, 256)  # channels, rows and columns of a zarr array's chunk, at most


class PartialArray:
    """An array (C, H, W) on its way into a file.

    Attributes:
        out: what to write into, (1, C, H, W).
        pieces: that are there.
        tile: (rows, columns) of a piece, of a file that was begun before; None for a new one.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, asked: Mapping[str, Any]) -> None:
        """Begin anew. Raises FileExistsError where one was interrupted, OSError where the disk has no room."""
        self._begin(path, shape, dtype, asked)
        if self._partial.exists() or self._state.exists():
            raise FileExistsError(
                f"{self._partial}: left by an interrupted run; --resume completes it, deleting it begins anew"
            )
        try:
            self._stored = self._create()
        except BaseException:
            self.discard()
            raise

    @classmethod
    def resume(
        cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, asked: Mapping[str, Any]
    ) -> PartialArray:
        """Go on with what was interrupted, or begin where nothing was.

        Raises ValueError where something else had been asked for, or where the files are damaged.
        """
        self = cls.__new__(cls)
        self._begin(path, shape, dtype, asked)
        if not self._state.exists():
            self.discard()  # interrupted before a piece was there
            return cls(path, shape, dtype, asked)
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
        self._stored = self._open()
        return self

    def _begin(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, asked: Mapping[str, Any]) -> None:
        self._path = Path(os.path.realpath(path))
        self._partial = self._path.with_name(self._path.name + ".part")
        self._state = self._path.with_name(self._path.name + ".part.json")
        self._shape = shape
        self._dtype = str(torch.float32 if dtype == torch.bfloat16 else dtype).removeprefix("torch.")
        self._asked = {**asked, "shape": list(shape), "stored dtype": self._dtype}
        self.pieces = 0
        self.tile: tuple[int, ...] | None = None

    @property
    def out(self) -> Any:
        return self._stored

    def keep(self, pieces: int, tile: tuple[int, int]) -> None:
        """Remember that so many pieces of this size, which the file has, are there."""
        self.pieces, self.tile = pieces, tile
        state = {"asked": self._asked, "pieces": pieces, "tile": list(tile)}
        with complete_or_absent(self._state) as temporary:
            temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")

    def complete(self) -> None:
        """Give the file its name; another one of that name is replaced."""
        if self._partial.is_dir():
            _remove(self._path)  # a folder replaces no other that holds something
        os.replace(self._partial, self._path)
        _remove(self._state)

    def close(self) -> bool:
        """After an interruption: whether anything is left that can be completed; what cannot is removed."""
        if self.pieces == 0:
            self.discard()
        return self.pieces > 0

    def discard(self) -> None:
        """Leave nothing."""
        for path in (self._state, self._partial):
            _remove(path)

    def _create(self) -> Any:
        shape = (1, *self._shape)
        if self._path.suffix.lower() == ".npy":
            import numpy

            self._need(_size(self._shape, self._dtype))
            array = numpy.lib.format.open_memmap(self._partial, "w+", dtype=self._dtype, shape=self._shape)
            reserve(self._partial)
            return array[None]
        zarr = _zarr()
        chunks = (1, *(min(most, length) for most, length in zip(_CHUNK, self._shape, strict=True)))
        return zarr.open_array(str(self._partial), mode="w", shape=shape, chunks=chunks, dtype=self._dtype)

    def _open(self) -> Any:
        if self._path.suffix.lower() == ".npy":
            import numpy

            return numpy.load(self._partial, mmap_mode="r+")[None]
        return _zarr().open_array(str(self._partial), mode="r+")

    def _need(self, size: int) -> None:
        free = shutil.disk_usage(self._path.parent).free
        if size > free:
            raise ValueError(f"{self._path}: {readable(size)} needed, {readable(free)} free")


def _size(shape: tuple[int, int, int], dtype: str) -> int:
    return shape[0] * shape[1] * shape[2] * getattr(torch, dtype).itemsize


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError(".zarr files need zarr: pip install 'anyup[zarr]'") from error
    return zarr
