"""Types of command-line options (argparse's `type=`): numbers, sizes, texts; and the error for a wrong one.

Only the digits 0 to 9 are accepted: Python's own `int` also takes digits of other scripts, and underscores.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UsageError(Exception):
    """A mistake of usage; the command ends with exit status 2."""


class PrintedElsewhere(Exception):
    """A failure that another process prints; the command ends with exit status 1."""


BACKENDS = ("triton", "flex", "torch", "reference")
"""A copy of `anyup.ops.dispatch.BACKEND_NAMES`, because that module imports torch."""

MOST_THREADS = 1024
"""The most threads of a CPU that an option accepts; to start many more kills the process."""


def whole_number(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """A type of integers from `least` to `most`; None means no bound."""

    def read(text: str) -> int:
        # 18 digits hold every number of pixels or bytes; Python refuses to convert thousands of digits.
        found = int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text) else None
        if found is None or (least is not None and found < least):
            at_least = "" if least is None else f" of at least {least}"
            raise argparse.ArgumentTypeError(f"expected a whole number{at_least}, got {text!r}")
        if most is not None and found > most:
            raise argparse.ArgumentTypeError(f"expected a whole number of at most {most}, got {text!r}")
        return found

    return read


def number(above: float) -> Callable[[str], float]:
    """A type of finite numbers greater than `above`."""

    def read(text: str) -> float:
        try:
            found = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            found = math.nan
        if not above < found < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number more than {above:g}, got {text!r}")
        return found

    return read


def size(text: str) -> tuple[int, ...]:
    """(N,) or (H, W) of an option N or HxW."""
    match = re.fullmatch(r"\s*([0-9]{1,9})(?:[xX]([0-9]{1,9}))?\s*", text)
    sides = tuple(int(side) for side in match.groups() if side is not None) if match else ()
    if not sides or 0 in sides:
        raise argparse.ArgumentTypeError(f"expected N or HxW in pixels, as 512 or 480x640, got {text!r}")
    return sides


def region(text: str) -> tuple[int, int, int, int]:
    """(top, left, height, width) of an option TOP,LEFT,HEIGHT,WIDTH."""
    match = re.fullmatch(r"\s*" + r"\s*,\s*".join(["([0-9]{1,9})"] * 4) + r"\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"expected TOP,LEFT,HEIGHT,WIDTH in pixels of the result, as 0,128,256,256, got {text!r}"
        )
    top, left, height, width = (int(digits) for digits in match.groups())
    return top, left, height, width


def memory(text: str) -> int:
    """Bytes of an option such as 2GB, or a number of bytes."""
    from anyup.budget import parse_memory

    try:
        limit = parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("max_memory: ")) from error
    assert limit is not None
    return limit


def nonempty(text: str) -> str:
    """A text that is not blank: a blank one usually comes from an unset variable of the shell."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a name or a path, got nothing")
    return text


def check_output(path: str, suffixes: tuple[str, ...], what: str) -> Path:
    """Check the path of an output file; raises UsageError for a wrong suffix."""
    from anyup.images import check_writable

    try:
        return check_writable(path, suffixes, what)
    except ValueError as error:
        raise UsageError(str(error)) from error


_OPTIONS = {
    **dict.fromkeys(("name_or_path", "path"), "--weights"),
    **dict.fromkeys(("name", "index", "block", "layer", "encoder"), "--encoder"),
    **{name: f"--{name.replace('_', '-')}" for name in ("window_ratio", "size", "encoder_size", "class_token")},
}
"""Options, by the arguments of `load`, `load_encoder`, `make_upsamplers` and `probing.Source` that they give."""


@contextmanager
def naming_the_options() -> Iterator[None]:
    """Within the block an error that begins with an argument of `_OPTIONS` names its option instead; a failed download
    also names alternatives.
    """
    from anyup.checkpoints import DownloadError

    try:
        yield
    except DownloadError as error:
        options = "here: --weights FILE takes a file kept elsewhere, --weights anyup_mini what comes with the package"
        raise OSError(f"{error}\n  {options}") from error
    except (ValueError, OSError) as error:
        argument, colon, rest = str(error).partition(": ")
        option = _OPTIONS.get(argument)
        if option is None:
            raise
        raise type(error)(f"{option}{colon}{rest}") from error
