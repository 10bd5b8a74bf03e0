"""What a command reads and what it writes, declared where its options are: nothing that is read is ever replaced.

An option that names a file or a folder has one of these classes as its `type=`. What else a command reads or writes is
told by a function under `implied` in its parser's defaults, from the arguments to `Paths`.
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
    """The name of a checkpoint, or its file."""

    def paths(self) -> Iterable[Path]:
        from anyup.checkpoints import NAMED, PACKAGED

        known = PACKAGED.get(self) or NAMED.get(self)
        return [known.path if known else Path(self)]


class ReadEncoder(Read):
    """The name of an encoder: one of ours, of another package, or a folder of Hugging Face's transformers."""

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

    `holds` are the patterns of the names that something written into such a folder has; a file has none.
    """

    holds: tuple[str, ...] = ()


class Kept(_Named):
    """A folder where tensors are kept under names that are hashes, which replace nothing."""


@dataclass
class Paths:
    """What is read and what is written, each beside what a person calls it."""

    read: list[tuple[str, Read]] = field(default_factory=list)
    written: list[tuple[str, Written]] = field(default_factory=list)

    def add(self, called: str, path: object) -> None:
        """Declare the value of an option or a setting; one that names no path is none."""
        if isinstance(path, Read):
            self.read.append((called, path))
        elif isinstance(path, Written):
            self.written.append((called, path))

    def require_apart(self) -> None:
        """Raise UsageError where something would be written over what is read, or over something else written."""
        for number, (called, path) in enumerate(self.written):
            for other, earlier in self.written[:number]:
                if _same(Path(path), Path(earlier)):
                    raise UsageError(f"{called} {path}: that is {other} {earlier}; a name of its own expected")
        there = [(called, path) for called, path in self.written if Path(path).exists()]
        for other, named in self.read if there else ():
            for source in named.paths():
                for called, path in there:
                    if _same(Path(path), source):
                        would = "a folder of its own expected" if path.holds else "it would be replaced"
                        raise UsageError(f"{called} {path}: that is what is read ({other}); {would}")
                    if any(fnmatch(name, pattern) for name in _names(Path(path), source) for pattern in path.holds):
                        raise UsageError(
                            f"{called} {path}: that is where what is read lies ({other} {source}); it would be replaced"
                        )


def settle_paths(arguments: argparse.Namespace) -> None:
    """Raise UsageError where something that is read would be replaced; from then on paths are plain texts."""
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
    """Whether two names, by links or however they are spelled, mean one file or folder."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there
        return os.path.realpath(one) == os.path.realpath(other)


def _names(folder: Path, path: Path) -> Iterator[str]:
    """What a path, or what it is a link to, is called in a folder, where it or a folder around it lies there."""
    for spelled in (os.path.abspath(path), os.path.realpath(path)):
        inner = Path(spelled)
        for outer in inner.parents:
            if _same(folder, outer):
                yield inner.name
            inner = outer
