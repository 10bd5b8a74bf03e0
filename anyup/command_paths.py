"""The paths that a command reads and writes, declared with its options, so that no input is ever overwritten.

An option that names a file or a folder has one of these classes as its `type=`. Further paths come
from a function that the parser's defaults hold under `implied`: it takes the arguments and returns `Paths`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from anyup.options import UsageError, nonempty


class _Named(str):
    def __new__(cls, text: str) -> _Named:
        return super().__new__(cls, nonempty(text))


class Read(_Named):
    """A file or folder that is read."""

    def paths(self) -> Iterable[Path]:
        """The files and folders, which need not exist."""
        return [Path(self)]


class ReadWeights(Read):
    """The name of a checkpoint, or a checkpoint file."""

    def paths(self) -> Iterable[Path]:
        from anyup.checkpoints import NAMED, PACKAGED

        known = PACKAGED.get(self) or NAMED.get(self)
        return [known.path if known else Path(self)]


class ReadEncoder(Read):
    """The name of an encoder: of this package, of another package, or a folder of Hugging Face's transformers."""

    def paths(self) -> Iterable[Path]:
        from anyup.encoders import PACKAGED_WEIGHTS

        package, _, model = self.partition("/")
        if package == "transformers":
            folder = Path(re.sub(":[0-9]+$", "", model))
            return [folder, *(folder.iterdir() if folder.is_dir() else ())]
        packaged = PACKAGED_WEIGHTS.get(self.partition(":")[0])
        installed = packaged.installed() if packaged else None
        return [installed] if installed else []


class Written(_Named):
    """A file that is written, or a folder that files are written into.

    `holds` are patterns of the names of the files that are written into the folder; empty for a file.
    """

    holds: tuple[str, ...] = ()


class Kept(_Named):
    """A cache folder: its files are named by hashes, so that no file of the user is replaced."""


@dataclass
class Paths:
    """The paths that a command reads and writes, each with its name in error messages."""

    read: list[tuple[str, Read]] = field(default_factory=list)
    written: list[tuple[str, Written]] = field(default_factory=list)

    def add(self, called: str, path: object) -> None:
        """Add the value of an option or a setting; a value that is no path is ignored."""
        if isinstance(path, Read):
            self.read.append((called, path))
        elif isinstance(path, Written):
            self.written.append((called, path))

    def require_apart(self) -> None:
        """Raise UsageError where an output would overwrite an input or another output."""
        for number, (called, path) in enumerate(self.written):
            for other, earlier in self.written[:number]:
                if _same(Path(path), Path(earlier)):
                    raise UsageError(f"{called} {path}: that is {other} {earlier}; expected a name of its own")
        there = [(called, path) for called, path in self.written if Path(path).exists()]
        for other, named in self.read if there else ():
            for source in named.paths():
                for called, path in there:
                    if _same(Path(path), source):
                        would = "expected a folder of its own" if path.holds else "it would be replaced"
                        raise UsageError(f"{called} {path}: that is what is read ({other}); {would}")
                    if any(fnmatch(name, pattern) for name in _names(Path(path), source) for pattern in path.holds):
                        raise UsageError(
                            f"{called} {path}: that is where what is read lies ({other} {source}); it would be replaced"
                        )


def settle_paths(arguments: argparse.Namespace) -> None:
    """Raise UsageError where an output would overwrite an input; then make each path of `arguments` a plain `str`."""
    paths: Paths = arguments.implied(arguments) if "implied" in arguments else Paths()
    for option, value in vars(arguments).items():
        for path in value if isinstance(value, list) else [value]:
            paths.add(option.replace("_", " "), path)
    paths.require_apart()
    for option, value in vars(arguments).items():
        if isinstance(value, list):
            setattr(arguments, option, [_plain(path) for path in value])
        else:
            setattr(arguments, option, _plain(value))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, _Named) else value


def _same(one: Path, other: Path) -> bool:
    """Whether two paths mean one file or folder, symbolic links resolved."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there
        return os.path.realpath(one) == os.path.realpath(other)


def _names(folder: Path, path: Path) -> Iterator[str]:
    """The names of the entries of `folder` that contain `path` or the target of its links, or are one of these."""
    for spelled in (os.path.abspath(path), os.path.realpath(path)):
        inner = Path(spelled)
        for outer in inner.parents:
            if _same(folder, outer):
                yield inner.name
            inner = outer
