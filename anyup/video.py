"""The frames of a video, decoded by PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyup.images import check_readable
from anyup.installing import pip_install


class Video:
    """A video file, opened to be read once from its first frame on; a `with` statement closes it.

    Attributes:
        count: the number of frames in the file's header, else an estimate from its duration, else 0.
        size: (height, width) of the stored frames.
        name: the file's name, without its folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError where no file can be opened, ValueError where it is no video, ImportError without PyAV."""
        self._av = _pyav()
        self._path = check_readable(Path(path))
        with self._path.open("rb"):  # for Python's own errors where the file cannot be opened
            pass
        try:
            self._container = self._av.open(str(self._path))
        except self._av.FFmpegError as error:
            raise ValueError(
                f"{path}: not a video that PyAV {self._av.__version__} reads ({error.strerror})"
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise ValueError(f"{path}: expected a video, there is no picture in it")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.name = self._path.name
        self.count = int(self._stream.frames)
        if not self.count and self._container.duration and self._stream.average_rate:
            self.count = round(self._container.duration / self._av.time_base * self._stream.average_rate)
        self.size = int(self._stream.height), int(self._stream.width)

    def __iter__(self) -> Iterator[Tensor]:
        """Each frame, (1, 3, H, W) uint8, RGB, turned as the file says that a viewer sees it.

        Raises ValueError where one cannot be decoded.
        """
        import numpy

        try:
            for frame in self._container.decode(self._stream):
                # `rotation` is counterclockwise, in degrees.
                pixels = numpy.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield torch.from_numpy(numpy.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        except self._av.FFmpegError as error:
            raise ValueError(f"{self._path}: the video cannot be decoded ({error.strerror})") from error

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"videos need PyAV: {pip_install('av')}") from error
    return av
