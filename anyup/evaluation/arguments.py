"""What can be typed after `anyup evaluate`; imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from anyup.command_paths import Kept, Paths, Read, ReadEncoder, ReadWeights, Written
from anyup.options import BACKENDS, MOST_THREADS, nonempty, number, whole_number

HELP = "how good the upsampling is: features, segmentation, pictures"

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

PUBLISHED_VIEW, PUBLISHED_CROP = 448, 224  # pixels

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
    _add_encoders(features, several=True)
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
    _add_encoders(pictures, several=True)
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


def _add_segmentation(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(implied=_implied)
    parser.add_argument("--data", type=Read, required=True, metavar="FOLDER", help="the data set")
    parser.add_argument(
        "--layout",
        choices=("folders", "camvid", "voc", "ade20k", "cityscapes", "coco-stuff"),
        default="folders",
        help="how it is arranged, see above (default: %(default)s)",
    )
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
    parser.add_argument(
        "--train-split", type=nonempty, metavar="SPLIT", help="split to train on (default: the layout's)"
    )
    parser.add_argument(
        "--test-split", type=nonempty, metavar="SPLIT", help="split to measure on (default: the layout's)"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N images of each split, to try it out")
    _add_encoders(parser, several=False)
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
        help="short side that images and masks are resized to, and side of the centre cut out (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help="probes of each method (default: %(default)s)"
    )
    parser.add_argument(
        "--schedule",
        choices=("epochs", "iterations", "published"),
        default="epochs",
        help="half a cosine over all epochs, stepped by epoch; over all iterations; or, as in the published code, over "
        "as many iterations as there are epochs, again and again (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=_positive, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch", type=_positive, default=2, metavar="N", help="images a step (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=number(above=0), default=5e-4, metavar="RATE", help="of AdamW (default: %(default)s)"
    )
    parser.add_argument("--flips", action="store_true", help="mirror half of the batches, as in the published code")
    parser.add_argument(
        "--order-seed", type=whole_number(), default=0, metavar="N", help="of the images' order (default: %(default)s)"
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
        "--photographs", type=Read, required=True, metavar="FOLDER", help="photographs, also in the folders in it"
    )
    parser.add_argument(
        "--every",
        type=whole_number(0),
        default=10,
        metavar="N",
        help="take the last of each N by name, those that training held out; 0: all (default: %(default)s)",
    )


def _add_encoders(parser: argparse.ArgumentParser, several: bool) -> None:
    more = "; may be given several times" if several else ""
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
