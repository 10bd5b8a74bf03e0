"""The run of `anyup upsample` for one photograph: from the photograph and its features to the result's files."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyup.cli.upsample_inputs import Inputs, by, guidance

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anyup.limited_memory.stream import Stream
    from anyup.model import AnyUp
    from anyup.progress import Progress


@dataclass(frozen=True)
class Files:
    """The files and the format of a result.

    Attributes:
        output: the features' file, or None.
        picture: the picture's, or None.
        in_pieces: whether the output is an array on the disk that is written piece by piece.
    """

    output: Path | None
    picture: Path | None
    in_pieces: bool

    def kept_as(self, name: str | None, low: Tensor) -> torch.dtype:
        """The dtype of the result for `low`: that of --dtype, by default its own, and one that the file supports."""
        import torch

        from anyup.array_files import stored_dtype

        dtype = getattr(torch, name) if name else low.dtype
        return stored_dtype(dtype) if self.in_pieces else dtype

    def fitting(self, name: str | None, low: Tensor) -> torch.dtype:
        """The dtype of the result; raises ValueError where the result may overflow it."""
        from anyup.finite import overflow

        dtype = self.kept_as(name, low)
        if why := overflow(low, dtype):
            raise ValueError(f"--dtype {name}: {why}; take a wider one")
        return dtype

    def check_memory(self, shape: tuple[int, ...], itemsize: int, device: torch.device) -> None:
        """Raise ValueError where a result of this shape must be in memory at once and exceeds the free memory."""
        from anyup.budget import check_room

        if not self.in_pieces:
            check_room(math.prod(shape) * itemsize, _the_result(shape), device, _SMALLER)

    def check_room(self, shape: tuple[int, ...], itemsize: int, *, resume: bool) -> None:
        """Raise ValueError where a result of this shape exceeds the free space of its folder.

        To `resume` takes less by what an interrupted run has left on the disk.
        """
        from anyup.array_files import bytes_there
        from anyup.limited_memory.destinations import free_space
        from anyup.progress import human_bytes

        needed = math.prod(shape) * itemsize
        if self.output is not None:
            free = free_space(self.output)
            if needed - (bytes_there(self.output) if resume else 0) > free:
                raise ValueError(
                    f"{_the_result(shape)} takes {human_bytes(needed)}, and {human_bytes(free)} are free where "
                    f"{self.output} is to be written; {_SMALLER}"
                )

    def save(self, result: Tensor, progress: Progress) -> None:
        """Write features (C, H, W) or (N, C) to a file in one piece. Raises OSError where the disk is full."""
        from anyup.images import save_array
        from anyup.limited_memory.destinations import free_space, no_room

        assert self.output is not None
        with progress.stage(f"writing {self.output}"):
            try:
                save_array(self.output, result)
            except Exception as error:  # for a full disk each format raises another class of error
                if free_space(self.output) < result.nbytes:
                    raise no_room(self.output, result.nbytes) from error
                raise


_SMALLER = "--size makes it smaller"


def _the_result(shape: tuple[int, ...]) -> str:
    return f"the result, {' x '.join(map(str, shape))},"


def write_result(
    arguments: argparse.Namespace, given: Inputs, files: Files, progress: Progress, *, resumable: bool
) -> tuple[tuple[int, ...], str]:
    """Upsample the features, or the values, of a photograph; the files are complete or absent.

    Args:
        arguments: the options `dtype` and `max_memory`; of a resumable run `photo` and `resume` too.
        given: without points.
        resumable: whether an interrupted run leaves what a later one goes on from.

    Returns:
        Shape and dtype of the result.

    Raises:
        ValueError: numbers that are not finite or too large for the dtype, or no room in memory or a budget.
        OSError: the disk is full, or does not let a file be written.
    """
    import torch

    from anyup import __version__, array_files
    from anyup.fingerprint import tensor_fingerprint

    model, whole, region, device = given.model, given.whole, given.region, given.model.rope.freqs.device
    low = given.features if given.values is None else given.values
    dtype = files.fitting(arguments.dtype, low)
    image = guidance(given.photo, whole, progress).to(device)
    features, values = given.features.to(device), None if given.values is None else given.values.to(device)
    if files.in_pieces and "bfloat16" in (arguments.dtype or str(low.dtype)):
        progress.note(f"NumPy has no bfloat16: {files.output} is float32")
    shape = (low.shape[1], *region[2:])
    what = in_words(low, whole, device)
    with torch.inference_mode():
        report_backends(model, image, features, whole, values, progress)

        def pieces_of(result: Any, tile: tuple[int, ...] | None = None) -> Stream:
            from anyup.limited_memory.request import Request
            from anyup.limited_memory.stream import stream

            return stream(
                Request.of(model, image, features, whole, values=values),
                tile=tile, max_memory=arguments.max_memory, region=region, dtype=dtype, out=result, keep=True,
            )  # fmt: skip

        if device.type == "cuda":
            from anyup.warming import compile_ahead

            with progress.stage(f"compiling kernels for {device}, which later runs find"):
                compile_ahead(lambda: next(pieces_of(None)), device)
        partial, result = None, None
        if files.in_pieces:
            assert files.output is not None
            asked_of_all = {
                **(given.asked(arguments) if resumable else {}),
                "features": tensor_fingerprint(features),
                "values": None if values is None else tensor_fingerprint(values),
                "dtype": str(dtype),
                "version": __version__,
            }
            begin = array_files.PartialArray.resume if resumable and arguments.resume else array_files.PartialArray
            rows, _ = _tile(pieces_of(None))  # computes nothing
            partial = begin(files.output, shape, dtype, asked_of_all, rows)
            result = partial.out
            _write_pieces(
                partial,
                pieces_of,
                what,
                progress,
                behind=2 if device.type == "cuda" else 0,
                resumable=resumable,
            )
        else:
            result = torch.empty(1, *shape, dtype=dtype, device=device)
            with progress.stage(what) as share:
                pieces = pieces_of(result)
                for number in checked_numbers(pieces, 1):
                    share(number / len(pieces))
    if files.output is not None and partial is None:
        files.save(result[0], progress)
    if files.picture is not None:
        _draw(files.picture, low, result, progress)
    if partial is not None:
        partial.complete()
    return shape, str(dtype).removeprefix("torch.")


def report_backends(
    model: AnyUp,
    image: Tensor,
    features: Tensor,
    whole: tuple[int, int],
    values: Tensor | None,
    progress: Progress,
) -> None:
    """Print which backend runs each operation of the call."""
    explanations = model.explain(image, features, whole, values=values).explanations
    progress.note("backends: " + ", ".join(f"{e.operation} {e.outcome}" for e in explanations))


def in_words(low: Tensor, whole: tuple[int, int], device: torch.device) -> str:
    """A line that says what will be computed."""
    return f"upsampling {low.shape[1]} x {by(low)} to {whole[0]} x {whole[1]} on {device}"


def _write_pieces(partial: Any, make: Any, what: str, progress: Progress, *, behind: int, resumable: bool) -> None:
    """Compute all missing pieces and report each; the last `behind` of them may not have reached the file yet."""
    pieces = None
    try:
        pieces = make(partial.out)
        tile = _tile(pieces)
        if partial.tile not in (None, tile):
            tile = partial.tile
            pieces = make(partial.out, tile)
        if partial.pieces:
            progress.note(f"going on after {partial.pieces} of {len(pieces)} pieces")
        pieces.skip(partial.pieces)
        with progress.stage(what) as share, partial.telling_what_is_needed():
            for number in checked_numbers(pieces, partial.pieces + 1):
                share(number / len(pieces))
                if resumable and number > behind:
                    partial.keep(number - behind, tile)
    except BaseException:
        if pieces is not None:
            pieces.close()
        if partial.close() and pieces is not None:
            progress.note(f"{partial.pieces} of {len(pieces)} pieces are kept; --resume goes on")
        raise


def checked_numbers(pieces: Stream, first: int) -> Iterator[int]:
    """The number of each computed piece, from `first` on.

    Raises ValueError where the first piece holds a NaN or an infinity. The inputs are checked, so only absurd weights
    or a bug can cause one, and the normalisations spread it to nearly every pixel: one checked piece is enough.
    """
    from anyup.finite import check_map

    for number, (_, _, piece) in enumerate(pieces, first):
        if number == first:
            check_map(piece, "the result")
        yield number


def _tile(pieces: Stream) -> tuple[int, int]:
    rows, columns = pieces.parts[0]
    return rows.stop - rows.start, columns.stop - columns.start


def _draw(picture: Path, low: Tensor, result: Any, progress: Progress) -> None:
    import torch

    from anyup.images import save_picture
    from anyup.visualization import pca_picture

    with progress.stage(f"drawing {picture}"):
        high = result if isinstance(result, torch.Tensor) else torch.from_numpy(result[...])
        save_picture(picture, pca_picture(low.to(high.device), high)[1])
