"""The command `anyup`: `demo`, `upsample`, `encoders`, `train`, `evaluate`, `export`, `gallery`,
`bench`, `tune` and `info`.

What a person types is checked before any work; a mistake is one line on stderr and exit status 2, a failure
exit status 1, an interruption 128 and the signal's number (130 for Ctrl-C). Results go to files and stdout, progress
to stderr: where these are closed or full, what is stored in files is stored all the same. Torch is imported by the
subcommands, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import errno
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from anyup._version import __version__
from anyup.bench import arguments as bench_arguments
from anyup.cli import export, gallery
from anyup.cli import tune as tuning
from anyup.cli import upsample as upsampling
from anyup.command_paths import Paths, Read, ReadEncoder, ReadWeights, Written, settle_paths
from anyup.evaluation import arguments as evaluation
from anyup.evaluation.command import run as _evaluate
from anyup.options import (
    BACKENDS,
    PrintedElsewhere,
    UsageError,
    check_output,
    naming_the_options,
    nonempty,
)
from anyup.standard_streams import forgiving_streams, plain_warnings
from anyup.stopping import Stopped, on_request, stop
from anyup.suggestions import did_you_mean

if TYPE_CHECKING:
    from anyup.training.config import Settings

__all__ = ["main"]

_WEIGHTS = "anyup_mini"  # `anyup.checkpoints.MINI`, which is imported with torch

_EPILOG = """\
examples:
  anyup demo -o demo.png
  anyup upsample photo.jpg --encoder dinov2_s_derived -o features.npy --picture features.png
  anyup upsample photo.jpg --features low.pt --size 512 -o high.safetensors
  anyup upsample photo.jpg --features low.pt --size 4096 --max-memory 2GB --dtype float16 -o high.npy
  anyup upsample photos --encoder dinov2_s_derived --size 448 --dtype float16 -o features --picture pictures
  anyup encoders timm/resnet50
  anyup train --config mini data.photographs=photos output=runs/first
  anyup export onnx --size 448 --grid 32 -o anyup.onnx
  anyup gallery photos -o gallery.html
  anyup bench --quick -o benchmark
  anyup tune
  anyup info
"""

_DEMO = """\
Upsample stored features of a real encoder to the resolution of the photograph they were computed from, and
write one picture with four panels side by side: the photograph, the features, bilinear interpolation, and
AnyUp. Features are shown by their first three principal components, the same basis and colours in all
panels. The terminal shows time, memory, the backend and why this backend, and the picture in brief.
"""

_ENCODERS = """\
List the encoders that --encoder takes: their layers, which are named as in mobilenet_v2:6, the channels and the stride
of each, where the weights come from and whether they are at hand. Of a model of another package (timm/resnet50) the
layers that it has; no weights are downloaded for that.
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
others, which table of kernel configs is in force, which optional packages are found, and where downloaded
weights are kept.
"""

_BENCH = """\
Measure the upsampler on this machine: the whole model, its stages and each of its operations, beside the published
forward at its best chunk size. Results are compared before anything is timed; calls that are compared are timed in
turn; memory is measured in runs of its own. What would take longer than the budget, or more memory than there is, is
a result too, and so is a wrong result or an error: the other rows are measured, and the exit status is 1. Writes
results.json, complete after each comparison, and report.html with plots; the same command again goes on where it was
interrupted. docs/benchmarks.md explains each number.
"""


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found, left = super().parse_known_args(args, namespace)
        unknown = [text for text in left if text.startswith("-")]
        if unknown:  # an error of the subcommand's parser, which knows its options
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return found, left

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


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
        made.add_argument(
            "--device", type=nonempty, help="cpu, cuda, cuda:1, mps; by default cuda where there is one, else cpu"
        )
        made.add_argument(
            "--backend",
            choices=BACKENDS,
            help="run the window attention on this backend or fail, the rest where it can; by default the fastest "
            "that can, see `anyup info`",
        )
        made.add_argument("--debug", action="store_true", help="show Python's traceback with an error")
        return made

    demo = command("demo", "one picture: photograph, features, bilinear, AnyUp", _DEMO)
    demo.add_argument(
        "-o",
        "--output",
        type=Written,
        default="anyup-demo.png",
        metavar="OUT.png",
        help="the picture to write (default: %(default)s)",
    )
    demo.set_defaults(implied=_demo_paths)
    _add_weights(demo)

    upsample = command("upsample", "a photograph and its features to high-resolution features", upsampling.DESCRIPTION)
    upsampling.add_arguments(upsample)
    _add_weights(upsample)

    encoders = commands.add_parser(
        "encoders",
        help="which encoders there are, and their layers",
        description=_ENCODERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    encoders.add_argument("name", type=ReadEncoder, nargs="?", metavar="NAME", help="one encoder (default: all)")
    encoders.add_argument("--debug", action="store_true", help="show Python's traceback with an error")

    train = commands.add_parser(
        "train",
        help="weights of your own, from photographs and encoders",
        description=_TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(implied=_settings_paths)
    train.add_argument("--config", type=Read, required=True, metavar="FILE", help="a TOML file, or: mini, published")
    train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the output folder")
    train.add_argument("--cache-only", action="store_true", help="compute the features and stop")
    train.add_argument("--debug", action="store_true", help="show Python's traceback with an error")
    train.add_argument(
        "settings", type=nonempty, nargs="*", metavar="key=value", help="settings that replace those of the file"
    )
    evaluation.add_arguments(commands.add_parser("evaluate", help=evaluation.HELP))

    formats = commands.add_parser("export", help="the upsampler as a file for other runtimes").add_subparsers(
        dest="format", metavar="FORMAT", required=True, parser_class=_Parser
    )
    onnx = formats.add_parser(
        "onnx",
        help=export.HELP,
        description=export.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_arguments(onnx)
    _add_weights(onnx)

    page = command("gallery", gallery.HELP, gallery.DESCRIPTION)
    gallery.add_arguments(page)
    _add_weights(page)

    bench = commands.add_parser(
        "bench",
        help="speed, memory and parity beside the published forward, on this machine",
        description=_BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_arguments.add_arguments(bench)

    tuning.add_arguments(
        commands.add_parser(
            "tune",
            help=tuning.HELP,
            description=tuning.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    command("info", "versions, devices, backends and why, optional packages, weights", _INFO)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was typed; settings of a training may stand behind its options too, where argparse leaves them over."""
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    if arguments.command == "train":
        arguments.settings += left
        arguments.settings = _settings(arguments)
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return arguments


def _demo_paths(_: argparse.Namespace) -> Paths:
    assets = Path(__file__).parent.with_name("assets").iterdir()
    return Paths(read=[("the demonstration's", Read(str(path))) for path in assets])


def _settings(arguments: argparse.Namespace) -> Settings:
    from anyup.training import config

    try:
        return config.read(arguments.config, arguments.settings)
    except config.ConfigError as error:
        raise UsageError(str(error)) from error


def _settings_paths(arguments: argparse.Namespace) -> Paths:
    paths = Paths()
    for key, path in arguments.settings.paths():
        paths.add(key, path)
    return paths


def _add_weights(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--weights",
        type=ReadWeights,
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

    0 when all is done, 1 for a failure, 2 for a mistake of usage, 128 and the number of the signal for an
    interruption. What stdout or stderr cannot show is no failure, unless it is a result that is kept nowhere else.
    """
    with forgiving_streams() as (out, err), plain_warnings():
        status, stored = _run(argv)
        out.flush()
        if out.failure is None:
            return status
        # Said, but where its reader has gone, as in `anyup info | head -1`, or where it was closed for good reason.
        if out.failure.errno not in ((errno.EPIPE, errno.EBADF) if stored else (errno.EPIPE,)):
            print(f"anyup: {'' if stored else 'error: '}standard output: {out.failure.strerror}", file=err)
        return status if stored else status or 1


def _run(argv: Sequence[str] | None) -> tuple[int, bool]:
    """The exit status, and whether the command keeps its results in files."""
    debug = stored = False
    try:
        with on_request(stop):
            try:
                arguments = _parse(argv)
            except SystemExit as wanted:  # --help and --version
                return (wanted.code if isinstance(wanted.code, int) else 0), stored
            debug, stored = arguments.debug, arguments.command not in ("info", "encoders")
            settle_paths(arguments)
            _RUNNERS[arguments.command](arguments)
    except KeyboardInterrupt as asked:
        print("\nanyup: interrupted", file=sys.stderr)
        return 128 + (asked.kind if isinstance(asked, Stopped) else signal.SIGINT), stored
    except PrintedElsewhere:
        return 1, stored
    except Exception as error:
        if debug and not isinstance(error, UsageError):
            raise
        print(f"anyup: error: {_in_words(error)}", file=sys.stderr)
        return (2 if isinstance(error, UsageError) else 1), stored
    return 0, stored


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if isinstance(error, MemoryError) or "can't allocate memory" in text or type(error).__name__ == "OutOfMemoryError":
        asked = re.search(r"allocate ([0-9.]+) ?(bytes|[KMGT]iB)", text)
        return "there is not enough memory" + (f" for {asked[1]} {asked[2]} more" if asked else "")
    foreseen = (UsageError, ValueError, TypeError, OSError, ImportError, NotImplementedError, AssertionError)
    # Torch needs a hundred lines to say that it has no kernel.
    if isinstance(error, foreseen) and text and not text.startswith("Could not run 'aten::"):
        return text
    # Not a mistake we foresaw: its kind tells more than its text.
    first = next(iter(text.splitlines()), "")
    name = type(error).__name__
    return f"{name}: {first} (--debug shows more)" if first else f"{name} (--debug shows more)"


def _demo(arguments: argparse.Namespace) -> None:
    from anyup.cli import demo

    picture = check_output(arguments.output, (".png",), "picture")
    with naming_the_options():
        demo.run(
            picture,
            weights=arguments.weights,
            untrained=arguments.untrained,
            backend=arguments.backend,
            device=arguments.device,
        )


def _info(arguments: argparse.Namespace) -> None:
    from anyup.cli.info import report

    print(report(arguments.device, arguments.backend))


def _encoders(arguments: argparse.Namespace) -> None:
    from anyup.encoders.listing import describe

    print(describe(arguments.name))


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from anyup.training.loop import train

    if arguments.settings.run.threads:
        torch.set_num_threads(arguments.settings.run.threads)
    stopped_by = train(arguments.settings, resume=arguments.resume, cache_only=arguments.cache_only)
    if stopped_by is not None:
        stop(stopped_by)


def _bench(arguments: argparse.Namespace) -> None:
    from anyup.bench import command

    command.run(arguments)


_RUNNERS = {
    "demo": _demo,
    "upsample": upsampling.run,
    "encoders": _encoders,
    "train": _train,
    "evaluate": _evaluate,
    "export": export.run,
    "gallery": gallery.run,
    "bench": _bench,
    "tune": tuning.run,
    "info": _info,
}
