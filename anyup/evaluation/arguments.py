"""What can be typed after `anyup evaluate`; imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from anyup.command_paths import Kept, Paths, Read, ReadEncoder, ReadWeights, Written
from anyup.options import BACKENDS, MOST_THREADS, nonempty, number, whole_number

HELP = "how good the upsampling is: features, segmentation, depth, normals, pictures"

_DESCRIPTION = """\
Measure weights against bilinear and nearest interpolation. Results are written as JSON and shown as a table.
"""

_FEATURES = """\
Upsample an encoder's features of a smaller image and compare them with its features of a larger one, on photographs
that were held out from training (by default every tenth by name): mean cosine similarity, normalised error, and
1 - cosine relative to bilinear's. docs/evaluation.md defines each.
"""

_PICTURES = """\
Draw, for each photograph and encoder, the photograph, the features, and what each method makes of them, by the
principal components of the features. One PNG each, and index.json.
"""

_SEGMENTATION = """\
Train linear probes (one 1x1 convolution each) on frozen features, upsampled by each method, and measure how well they
segment images they have not seen: mean intersection over union and pixel accuracy, over several seeds. The probes of
all methods and seeds are trained side by side in one pass over the data. Ctrl-C loses at most an epoch: --resume.

layouts of --data, and the splits trained and tested on:
  folders     images/SPLIT/NAME.*, masks/SPLIT/NAME.png (with --classes)        train, val
  camvid      SPLIT/NAME.*, SPLITannot/NAME.png                                 train, test
  voc         JPEGImages, SegmentationClass, ImageSets/Segmentation             train, val
  ade20k      images/SPLIT, annotations/SPLIT                                   training, validation
  cityscapes  leftImg8bit/SPLIT, gtFine/SPLIT (labelIds)                        train, val
  coco-stuff  images/SPLIT, annotations/SPLIT or stuffthingmaps/SPLIT           train2017, val2017
"""

_GEOMETRY = """\
layouts of --data, and the splits trained and tested on:
  folders       images/SPLIT/NAME.*, depth/SPLIT/NAME.png (16 bits, millimetres), normals/SPLIT   train, val
  nyuv2         nyu_depth_v2_labeled.mat, splits.mat                                              train, test
  nyuv2-geonet  nyu_geonet/NAME.mat to train on; to test on, as nyuv2                             train, test
  navi          OBJECT/multiview_*, OBJECT/wild_set                                               multiview, wild
"""

_DEPTH = f"""\
Train linear probes on frozen features, upsampled by each method, and measure how well they tell the depth of images
they have not seen, by Probe3D's protocol: root mean square error and the share of pixels that are right within a
factor, as predicted and after a scale and a shift of each image. Ctrl-C loses at most an epoch: --resume.

{_GEOMETRY}"""

_NORMALS = f"""\
Train linear probes on frozen features, upsampled by each method, and measure how well they tell the surface normals
of images they have not seen, by Probe3D's protocol: angles between predicted and true normals. True normals are those
that a layout stores, else those of planes fitted to the depth. Ctrl-C loses at most an epoch: --resume.

{_GEOMETRY}"""

PUBLISHED_VIEW, PUBLISHED_CROP = 448, 224  # pixels
PUBLISHED_WIDTH = 512  # channels of the DPT head

_positive = whole_number(1)
_value = whole_number(0, 65535)  # of a mask's pixel, which has up to 16 bits


def add_arguments(evaluate: argparse.ArgumentParser) -> None:
    """Define what can be typed after `anyup evaluate`."""
    evaluate.description = _DESCRIPTION
    # The parser's own class, for its way of meeting mistakes.
    commands = evaluate.add_subparsers(dest="evaluation", metavar="WHAT", required=True, parser_class=type(evaluate))

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument(
            "--weights",
            type=ReadWeights,
            action="append",
            default=[],
            metavar="NAME|FILE",
            help="weights to measure, as for `anyup upsample`; may be given several times",
        )
        made.add_argument("--untrained", action="store_true", help="measure random weights too")
        made.add_argument(
            "--window-ratio",
            dest="window_ratios",
            type=number(above=0),
            action="append",
            default=[],
            metavar="RATIO",
            help="measure the weights with this window, too: half its side as a fraction of the grid; may be given "
            "several times (default: their own window alone)",
        )
        made.add_argument(
            "--device", type=nonempty, help="cpu, cuda, cuda:1, mps; by default cuda where there is one, else cpu"
        )
        made.add_argument(
            "--backend", choices=BACKENDS, help="run on this backend or fail; by default the fastest that can"
        )
        made.add_argument(
            "--threads",
            type=whole_number(1, MOST_THREADS),
            metavar="N",
            help="threads of a CPU; by default torch's choice",
        )
        made.add_argument("--debug", action="store_true", help="show Python's traceback with an error")
        return made

    features = command("features", "reconstruction of an encoder's features of a larger image", _FEATURES)
    _add_photographs(features)
    _add_encoders(features)
    _add_cache(features)
    features.add_argument(
        "--from",
        dest="sides",
        type=_positive,
        action="append",
        metavar="PIXELS",
        help="side of the smaller image whose features are upsampled to those of the whole 448-pixel view; may be "
        "given several times (default: 112, a ratio of 4). The nearest multiple of the encoder's stride is taken",
    )
    features.add_argument(
        "--guidance",
        type=_positive,
        default=PUBLISHED_CROP,
        metavar="PIXELS",
        help="side of the image that guides the upsampling, 448 for all of it (default: %(default)s, as in training)",
    )
    features.add_argument(
        "-o", "--output", type=Written, required=True, metavar="OUT.json", help="the results to write"
    )

    pictures = command("pictures", "principal components of features, side by side", _PICTURES)
    pictures.set_defaults(cache=None)
    _add_photographs(pictures)
    _add_encoders(pictures)
    pictures.add_argument(
        "--count", type=_positive, default=10, metavar="N", help="photographs to draw (default: %(default)s)"
    )
    pictures.add_argument(
        "--side",
        type=_positive,
        default=PUBLISHED_VIEW,
        metavar="PIXELS",
        help="side of the photograph's central square (default: %(default)s)",
    )
    pictures.add_argument("-o", "--output", type=_Drawn, required=True, metavar="FOLDER", help="where the pictures go")

    _add_segmentation(command("segmentation", "a linear probe on upsampled features", _SEGMENTATION))
    _add_depth(command("depth", "a linear probe for depth", _DEPTH))
    _add_normals(command("normals", "a linear probe for surface normals", _NORMALS))


def _add_segmentation(parser: argparse.ArgumentParser) -> None:
    _add_data(parser, ("folders", "camvid", "voc", "ade20k", "cityscapes", "coco-stuff"))
    parser.add_argument(
        "--classes",
        type=_classes,
        metavar="N",
        help="number of classes, with values 0 to N - 1, or the value of each, as in 0,255 (folders)",
    )
    parser.add_argument(
        "--first-class",
        type=_value,
        metavar="VALUE",
        help="value of the first of N classes; with 1, the value 0 is void, as with mmsegmentation's reduce_zero_label "
        "and transformers' do_reduce_labels (folders; default: 0)",
    )
    parser.add_argument(
        "--void",
        type=_value,
        action="append",
        metavar="VALUE",
        help="value of pixels that do not count (folders); may be given several times (default: 255, unless it is a "
        "class, and the values below --first-class)",
    )
    _add_probes(parser, epochs=20, batch=2)
    parser.add_argument(
        "--schedule",
        choices=("epochs", "iterations", "published"),
        default="epochs",
        help="half a cosine over all epochs, stepped by epoch; over all iterations; or, as in the published code, over "
        "as many iterations as there are epochs, again and again (default: %(default)s)",
    )
    parser.add_argument("--flips", action="store_true", help="mirror half of the batches, as in the published code")


def _add_depth(parser: argparse.ArgumentParser) -> None:
    _add_data(parser, _LAYOUTS_OF_GEOMETRY)
    parser.add_argument(
        "--bins",
        type=whole_number(1, 4096),
        default=256,
        metavar="N",
        help="depths whose weighted mean is predicted; 1: one output, a sigmoid of it (default: %(default)s)",
    )
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument(
        "--max-depth",
        type=number(above=0.001),
        default=10.0,
        metavar="METRES",
        help="the last bin; what lies farther is taken as unknown (default: %(default)s)",
    )
    bound.add_argument(
        "--relative-depth",
        action="store_true",
        help="learn no metres: each image's depth goes from 0.01, its nearest point, to 1, its farthest",
    )
    parser.add_argument(
        "--published-gradient",
        action="store_true",
        help="the gradient loss between images of the batch, the fault that Probe3D's code had before November 2025",
    )
    _add_probes(parser, epochs=10, batch=8)
    _add_augment(parser)


def _add_normals(parser: argparse.ArgumentParser) -> None:
    _add_data(parser, _LAYOUTS_OF_GEOMETRY)
    parser.add_argument(
        "--intrinsics",
        type=_intrinsics,
        metavar="FX,FY,CX,CY",
        help="the camera of the depth maps in their pixels, by which normals that are not stored are found "
        "(default: the layout's)",
    )
    parser.add_argument(
        "--window",
        type=_odd,
        default=9,
        metavar="PIXELS",
        help="side of the square that a plane is fitted to, an odd number (default: %(default)s)",
    )
    _add_probes(parser, epochs=10, batch=8)
    _add_augment(parser)


_LAYOUTS_OF_GEOMETRY = ("folders", "nyuv2", "nyuv2-geonet", "navi")


def _add_augment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--augment",
        action="store_true",
        help="change colours and cut out parts by Probe3D's protocol; the encoder and the upsamplers then run for "
        "each image in each epoch",
    )


def _add_data(parser: argparse.ArgumentParser, layouts: Sequence[str]) -> None:
    parser.set_defaults(implied=_implied)
    parser.add_argument("--data", type=Read, required=True, metavar="FOLDER", help="the data set")
    parser.add_argument(
        "--layout",
        choices=layouts,
        default="folders",
        help="how it is arranged, see above (default: %(default)s)",
    )


def _add_probes(parser: argparse.ArgumentParser, *, epochs: int, batch: int) -> None:
    """What all probes have in common."""
    parser.add_argument(
        "--train-split", type=nonempty, metavar="SPLIT", help="split to train on (default: the layout's)"
    )
    parser.add_argument(
        "--test-split", type=nonempty, metavar="SPLIT", help="split to measure on (default: the layout's)"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N images of each split, to try it out")
    _add_encoders(parser, "; four of them with --head dpt")
    _add_cache(parser)
    parser.add_argument(
        "--attention",
        choices=("auto", "keep", "recompute"),
        default="auto",
        help="what becomes of an image's attention weights (25.7 MB at 448 pixels from 32 cells) between epochs: kept "
        "in --cache, computed anew, or kept where the disk has room (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=_positive,
        default=PUBLISHED_VIEW,
        metavar="PIXELS",
        help="short side of resized images and their maps, and side of the centre cut out (default: %(default)s)",
    )
    parser.add_argument(
        "--encoder-size",
        type=_positive,
        default=0,
        metavar="PIXELS",
        help="side of the image that the encoder sees, to compare a small image's features upsampled with a larger "
        "image's (default: --size)",
    )
    parser.add_argument(
        "--class-token",
        action="store_true",
        help="the probe sees the encoder's class token beside the features of each pixel; of vision transformers",
    )
    parser.add_argument(
        "--head",
        choices=("linear", "dpt"),
        default="linear",
        help="what is trained: a linear map, or Probe3D's DPT over four blocks without its interpolations, which takes "
        "four --encoder, from the first block to the last (default: %(default)s)",
    )
    parser.add_argument(
        "--width",
        type=_positive,
        metavar="CHANNELS",
        help=f"of the DPT head's convolutions, which run for each pixel (default: {PUBLISHED_WIDTH})",
    )
    parser.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help="probes of each method (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=_positive, default=epochs, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--batch", type=_positive, default=batch, metavar="N", help="images a step (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate",
        type=number(above=0),
        default=5e-4,
        metavar="RATE",
        help="learning rate of AdamW (default: %(default)s)",
    )
    parser.add_argument(
        "--order-seed",
        type=whole_number(),
        default=0,
        metavar="N",
        help="seed of the images' order (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on after the last complete epoch")
    parser.add_argument(
        "--checkpoint",
        type=Written,
        metavar="FILE",
        help="where the state after each epoch is kept (default: OUT.probes.pt)",
    )
    parser.add_argument("-o", "--output", type=Written, required=True, metavar="OUT.json", help="the results to write")


class _Drawn(Written):
    """The folder of pictures."""

    holds = ("*--*.png", "index.json")


def checkpoint_of(arguments: argparse.Namespace) -> Path:
    """Where the state after each epoch is kept."""
    return Path(arguments.checkpoint or Path(arguments.output).with_suffix(".probes.pt"))


def _implied(arguments: argparse.Namespace) -> Paths:
    return Paths() if arguments.checkpoint else Paths(written=[("checkpoint", Written(str(checkpoint_of(arguments))))])


def _add_photographs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--photographs",
        type=Read,
        required=True,
        metavar="FOLDER",
        help="folder of photographs, searched with the folders in it",
    )
    parser.add_argument(
        "--every",
        type=whole_number(0),
        default=10,
        metavar="N",
        help="take the last of each N by name, those that training held out; 0: all (default: %(default)s)",
    )


def _add_encoders(parser: argparse.ArgumentParser, more: str = "; may be given several times") -> None:
    parser.add_argument(
        "--encoder",
        type=ReadEncoder,
        required=True,
        action="append",
        metavar="NAME",
        help=f"an encoder, as for `anyup upsample`{more}",
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=Kept,
        metavar="FOLDER",
        help="keep the encoders' features here, so that another evaluation costs the upsampler alone (default: nothing "
        "is kept)",
    )


def _classes(text: str) -> tuple[int, ...]:
    """One number of classes, or several values."""
    return tuple(map(_value, text.split(","))) if "," in text else (_positive(text),)


def _intrinsics(text: str) -> tuple[float, ...]:
    """Two focal lengths and the principal point."""
    values = tuple(map(number(above=0), text.split(",")))
    if len(values) != 4:
        raise argparse.ArgumentTypeError(f"expected four numbers FX,FY,CX,CY, got {text!r}")
    return values


def _odd(text: str) -> int:
    value = whole_number(3, 255)(text)
    if value % 2 == 0:
        raise argparse.ArgumentTypeError(f"expected an odd number, got {text}")
    return value
