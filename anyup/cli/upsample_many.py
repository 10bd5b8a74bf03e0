"""`anyup upsample` for many photographs, or a video's frames: one model, for each a result and a line of the manifest.

A photograph's result depends on nothing but the photograph and what is asked for, and is called like it. So a run goes
on where an earlier one stopped, and processes of torchrun or `accelerate launch` share the photographs of a run.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from anyup.cli.upsample_inputs import (
    Inputs,
    carried_by,
    check_head,
    encode,
    load_model,
    load_named_encoder,
    read_head,
    resolve_region,
)
from anyup.cli.upsample_result import Files, write_result
from anyup.options import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anyup.encoders import Encoder
    from anyup.manifest import Manifest
    from anyup.model import AnyUp
    from anyup.training.distributed import Engine
    from anyup.video import Video

    Sizes: TypeAlias = Mapping[str, tuple[int, int]]
    """Heights and widths of photographs, by name."""

FORMATS = ("npy", "safetensors", "zarr")

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")

_MAGIC = re.compile(r"[*?\[]")  # the characters that make a name a pattern for `glob`
_IN_PIECES = ("npy", "zarr")
_GROUP = "features.zarr"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Photograph:
    """A photograph of a folder, or a frame of a video.

    Attributes:
        name: of no other one; "/" stands between folders.
        sha256: of the file, or of the frame's pixels; "" where they cannot be read.
        pixels: (1, 3, H, W) in 0..1; None where they are not needed, or cannot be had.
        error: why they cannot be had.
    """

    name: str
    sha256: str
    pixels: Tensor | None = None
    error: str = ""


IsDone = Callable[[str, str], bool]
"""Whether the result exists for a photograph's name and the hash of its bytes."""


class Source(Protocol):
    """Where photographs come from.

    Attributes:
        video: the name of the file, where they are frames.
    """

    video: str | None

    @property
    def count(self) -> int:
        """How many there are, for this process; 0 where nobody knows."""

    def sizes(self) -> Sizes:
        """The sizes of all photographs, as far as the headers of the files give them."""

    def share(self, engine: Engine, work: Callable[[str], Any]) -> None:
        """Leave this process its share; the photographs are dealt out in the order of `work`, a sort key of names."""

    def read(self, is_done: IsDone) -> Iterator[Photograph]:
        """Each photograph, in the order of the names; without pixels where its result exists."""


def are_many(paths: Sequence[str]) -> bool:
    """Whether the arguments name anything but a single photograph."""
    return len(paths) > 1 or Path(paths[0]).is_dir() or _is_pattern(paths[0]) or _is_video(paths[0])


def run(arguments: argparse.Namespace) -> None:
    """Run `anyup upsample` for many photographs: print the written folders on stdout and the progress on stderr.

    Of several processes the first one finds the photographs, checks and locks the folders and reports for all. Raises
    ValueError at the end, there, where a photograph has no result.
    """
    from anyup.devices import choose_device
    from anyup.manifest import NAME, Manifest
    from anyup.progress import Progress
    from anyup.run_lock import folder_for, only_run
    from anyup.training import distributed

    folders = [Path(folder) for folder in (arguments.output, arguments.picture) if folder]
    manifest_path = folders[0] / NAME
    head = read_head(arguments.head) if arguments.head else None
    with ExitStack() as stack:
        engine = stack.enter_context(distributed.start(choose_device(arguments.device), gradients=False))
        progress = Progress(None if engine.first else io.StringIO())
        source = _find(arguments.photo, folders, stack, engine)
        if engine.first:
            _check_folders(folders, manifest_path, resume=arguments.resume)
            for folder in folders:
                stack.enter_context(folder_for(folder))
            stack.enter_context(only_run(folders[0], progress.note))
        _check_package(arguments.format)
        model = load_model(arguments, engine.device, progress)
        work = Work(arguments, model, load_named_encoder(arguments, engine.device, progress), head, engine.rank)
        sizes = source.sizes()
        with engine.first_ahead():
            if engine.first:
                work.check_room(sizes)
                work.remove_leftovers()
            stack.enter_context(work.unfinished())
            manifest = stack.enter_context(
                Manifest(manifest_path, {"video": source.video, **work.asked()}, engine.rank)
            )
        source.share(engine, work.order(sizes, manifest))
        failed = _work_through(work, source, manifest, engine)
        manifest.close()  # what it says can be read elsewhere from here on
        failed = engine.total(failed)
        if engine.first:
            manifest.complete()
    if not engine.first:
        return
    for folder in folders:
        print(folder)
    if failed:
        raise ValueError(f"{failed} left out; {manifest_path} says why")


def _work_through(work: Work, source: Source, manifest: Manifest, engine: Engine) -> int:
    """Upsample each photograph without a result and note the outcome; return how many have no result in the end."""
    from anyup.reporting import Rate, Reporter

    reporter, rate = Reporter(), Rate()
    whose = f", of the first of {engine.world} processes" if engine.world > 1 else ""
    before = dict(manifest.entries)  # a copy for the thread that reads
    failed = made = 0

    def is_done(name: str, sha256: str) -> bool:
        entry = before.get(name, {"error": "not begun"})
        return "error" not in entry and entry["sha256"] == sha256 and work.has(name)

    try:
        for seen, photograph in enumerate(_ahead(source.read(is_done)), 1):
            entry: dict[str, Any] = {"error": photograph.error} if photograph.error else {}
            if photograph.sha256 and (entry or photograph.pixels is not None):
                work.discard(photograph.name)
            if photograph.pixels is not None:
                entry = work.upsample(photograph.name, photograph.pixels)
                made += 1
                rate.count(made)
            if entry:
                manifest.add(photograph.name, {"sha256": photograph.sha256, **entry})
            if "error" in entry:
                failed += 1
                reporter.note(f"left out: {photograph.name}: {entry['error']}")
            of = f" of {source.count}" if source.count else ""
            if engine.first:
                left = rate.time_left(source.count - seen)
                reporter.tick(f"{seen}{of}{whose}{left}", last=seen == source.count)
    except BaseException:
        if engine.first:
            reporter.note(f"results that are there: {manifest.there()}; --resume goes on")
        raise
    return failed


def _ahead(photographs: Iterator[Photograph]) -> Iterator[Photograph]:
    """Each photograph; a thread reads the next while the caller computes the present one."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, photographs, None)
        while (photograph := coming.result()) is not None:
            coming = reader.submit(next, photographs, None)
            yield photograph


@dataclass(frozen=True)
class Work:
    """The work for one photograph, which does not depend on the others; `rank` is the process's, of several."""

    arguments: argparse.Namespace
    model: AnyUp
    encoder: Encoder
    head: torch.nn.Conv2d | None
    rank: int

    def asked(self) -> dict[str, Any]:
        """The settings that the results depend on, beside the photographs."""
        from anyup import __version__
        from anyup.fingerprint import file_fingerprint, module_fingerprint

        given = self.arguments
        return {
            "encoder": given.encoder,
            "encoder's weights": module_fingerprint(self.encoder),
            "encoder size": given.encoder_size,
            "weights": module_fingerprint(self.model),
            "head": file_fingerprint(given.head) if given.head else None,
            "size": given.size,
            "region": given.region,
            "dtype": given.dtype,
            "format": given.format if given.output else None,
            "pictures": os.path.relpath(given.picture, given.output or given.picture) if given.picture else None,
            "version": __version__,
        }

    def result(self, name: str) -> Path | None:
        """The path of a photograph's features."""
        given = self.arguments
        if given.output is None:
            return None
        below = f"{_GROUP}/{name}" if given.format == "zarr" else f"{name}.{given.format}"
        return Path(given.output, below)

    def picture(self, name: str) -> Path | None:
        """The path of a photograph's picture."""
        return None if self.arguments.picture is None else Path(self.arguments.picture, f"{name}.png")

    def has(self, name: str) -> bool:
        """Whether all result files of a photograph exist."""
        return all(path is None or path.exists() for path in (self.result(name), self.picture(name)))

    def discard(self, name: str) -> None:
        """Remove a photograph's result files: they are incomplete, or the photograph has changed."""
        for path in (self.result(name), self.picture(name)):
            if path is not None and path.is_dir():
                shutil.rmtree(path)
            elif path is not None:
                path.unlink(missing_ok=True)

    def order(self, sizes: Sizes, manifest: Manifest) -> Callable[[str], Any]:
        """A sort key of names: first what has no result, of it what takes longest."""

        def key(name: str) -> tuple[bool, int, int, str]:
            native = sizes.get(name, (0, 0))
            there = "error" not in manifest.entries.get(name, {"error": "not begun"}) and self.has(name)
            return there, -self._pixels(native), -native[0] * native[1], name

        return key

    def _pixels(self, native: tuple[int, int]) -> int:
        """How many pixels the result for a photograph of this size has."""
        from anyup.images import resolve_size

        given = self.arguments
        height, width = given.region[2:] if given.region else resolve_size(given.size, native)
        return int(height * width)

    def check_room(self, sizes: Sizes) -> None:
        """Raise ValueError where the missing results need more than the free space of their folder."""
        import torch

        from anyup.limited_memory.destinations import free_space
        from anyup.progress import human_bytes

        given = self.arguments
        if given.output is None:
            return
        like = torch.empty(0) if self.head is not None else next(self.encoder.parameters(), torch.empty(0))
        channels = self.encoder.channels if self.head is None else self.head.weight.shape[0]
        itemsize = Files(None, None, given.format in _IN_PIECES).kept_as(given.dtype, like).itemsize
        needed = missing = 0
        for name, native in sizes.items():
            result = self.result(name)
            if result is not None and not result.exists():
                needed += channels * self._pixels(native) * itemsize
                missing += 1
        free = free_space(Path(given.output, "any"))
        if needed > free:
            raise ValueError(
                f"{missing} results take {human_bytes(needed)}, and {human_bytes(free)} are free where {given.output} "
                "is; --size makes them smaller, --dtype float16 halves them"
            )

    def remove_leftovers(self) -> None:
        """Remove the unfinished files of a killed run."""
        for folder in self._folders:
            shutil.rmtree(Path(folder, _UNFINISHED), ignore_errors=True)

    @contextmanager
    def unfinished(self) -> Iterator[None]:
        """Temporary folders for unfinished files of this process, within the block."""
        folders = [self._unfinished(folder) for folder in self._folders]
        try:
            for folder in folders:
                folder.mkdir(parents=True)
            yield
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # other processes have files in it
                    folder.parent.rmdir()

    @property
    def _folders(self) -> list[str]:
        return [folder for folder in (self.arguments.output, self.arguments.picture) if folder]

    def _unfinished(self, folder: str) -> Path:
        return Path(folder, _UNFINISHED, str(self.rank))

    def upsample(self, name: str, photo: Tensor) -> dict[str, Any]:
        """Write the files of a photograph (1, 3, H, W) in 0..1; return its entry for the manifest, an error included.

        Raises OSError where a file cannot be written: neither could the next.
        """
        import torch

        try:
            return self._upsample(name, photo)
        except (ValueError, UsageError) as error:
            return {"error": str(error)}
        except (MemoryError, RuntimeError) as error:
            lacks = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
            if not lacks:
                raise
            return {"error": "there is not enough memory"}

    def _upsample(self, name: str, photo: Tensor) -> dict[str, Any]:
        from anyup.finite import check_features
        from anyup.progress import Progress

        given, device, silent = self.arguments, self.model.rope.freqs.device, Progress(io.StringIO())
        whole, region = resolve_region(given.size, given.region, photo)
        features = encode(self.encoder, photo, given.encoder_size, device, silent)
        check_features(features, f"features of {given.encoder}")
        values = None
        if self.head is not None:
            check_head(self.head, features, given.head)
            values = carried_by(self.head, features, given.head)
        result, picture = self.result(name), self.picture(name)
        files = Files(
            self._unfinished(given.output) / f"{Path(name).name}.{given.format}" if result else None,
            self._unfinished(given.picture) / picture.name if picture else None,
            result is not None and given.format in _IN_PIECES,
        )
        low = features if values is None else values
        files.check_memory((low.shape[1], *region[2:]), files.kept_as(given.dtype, low).itemsize, device)
        inputs = Inputs(self.model, photo, features, values, whole, region, points=None)
        shape, dtype = write_result(given, inputs, files, silent, resumable=False)
        entry: dict[str, Any] = {"shape": shape, "dtype": dtype}
        if files.output is not None and result is not None:
            entry["features"] = self._put(files.output, result, given.output)
        if files.picture is not None and picture is not None:
            entry["picture"] = self._put(files.picture, picture, given.picture)
        return entry

    def _put(self, made: Path, path: Path, folder: str) -> str:
        """Rename a complete file, or an array of the group, to its final name; return the name below the folder."""
        if made.suffix == ".zarr":
            from anyup.array_files import make_groups

            make_groups(Path(folder, _GROUP), path.parent)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made, path)
        return path.relative_to(folder).as_posix()


class Photographs:
    """Photographs in files; of several processes the first alone need know them before they are shared."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = {name: files[name] for name in sorted(files)}
        self.video: str | None = None

    @property
    def count(self) -> int:
        """See `Source`."""
        return len(self._files)

    def sizes(self) -> Sizes:
        """See `Source`."""
        from anyup.images import picture_size

        found = ((name, picture_size(path)) for name, path in self._files.items())
        return {name: size for name, size in found if size is not None}

    def share(self, engine: Engine, work: Callable[[str], Any]) -> None:
        """See `Source`."""
        if engine.world > 1:
            mine = dict(engine.share([(name, self._files[name]) for name in sorted(self._files, key=work)]))
            self._files = {name: mine[name] for name in sorted(mine)}

    def read(self, is_done: IsDone) -> Iterator[Photograph]:
        """See `Source`."""
        from anyup.fingerprint import file_fingerprint
        from anyup.images import check_readable, read_photo

        for name, path in self._files.items():
            sha256 = ""
            try:
                sha256 = file_fingerprint(check_readable(path))
                photograph = Photograph(name, sha256, None if is_done(name, sha256) else read_photo(path))
            except (ValueError, OSError, MemoryError) as error:
                reason = getattr(error, "strerror", None) or str(error) or "there is not enough memory"
                photograph = Photograph(name, sha256, error=reason.removeprefix(f"{path}: "))
            yield photograph


class Frames:
    """The frames of a video, named by their numbers from 0 on; of several processes each decodes all of them."""

    def __init__(self, video: Video) -> None:
        self._frames = video
        self._rank, self._world = 0, 1
        self.video: str | None = video.name

    @property
    def count(self) -> int:
        """See `Source`."""
        return len(range(self._rank, self._frames.count, self._world))

    def sizes(self) -> Sizes:
        """See `Source`."""
        return {self._name(number): self._frames.size for number in range(self._frames.count)}

    def share(self, engine: Engine, work: Callable[[str], Any]) -> None:
        """See `Source`; frames are dealt out in their own order, which no process need know the number of."""
        self._rank, self._world = engine.rank, engine.world

    def read(self, is_done: IsDone) -> Iterator[Photograph]:
        """See `Source`."""
        from anyup.fingerprint import tensor_fingerprint

        number = 0
        try:
            for pixels in self._frames:
                if self._is_mine(number):
                    name, sha256 = self._name(number), tensor_fingerprint(pixels)
                    yield Photograph(name, sha256, None if is_done(name, sha256) else pixels.float().div_(255))
                number += 1
        except ValueError as error:
            if self._is_mine(number):
                yield Photograph(self._name(number), "", error=str(error))

    def _is_mine(self, number: int) -> bool:
        return number % self._world == self._rank

    def _name(self, number: int) -> str:
        return f"{number:06d}"


def _find(named: Sequence[str], outside: Sequence[Path], stack: ExitStack, engine: Engine) -> Source:
    """The source that the arguments name: a video, or photographs, folders and patterns, without files in `outside`."""
    if len(named) == 1 and _is_video(named[0]):
        from anyup.video import Video

        return Frames(stack.enter_context(Video(named[0])))
    if videos := [text for text in named if _is_video(text)]:
        raise UsageError(f"{videos[0]}: expected a video alone, it came with {len(named) - 1} more")
    if not engine.first:
        return Photographs({})
    away = [os.path.realpath(folder) for folder in outside]

    @cache
    def is_outside(folder: Path) -> bool:
        return not any(Path(os.path.realpath(folder)).is_relative_to(each) for each in away)

    found: dict[str, Path] = {}
    for text in named:
        root, paths = _matches(text)
        for path in paths:
            name = path.relative_to(root).as_posix()
            if not is_outside(path.parent):
                continue
            if os.path.realpath(found.setdefault(name, path)) != os.path.realpath(path):
                raise UsageError(f"{found[name]} and {path} would have one result, {name}: name a folder above both")
    if not found:
        raise ValueError(f"{' '.join(named)}: expected photographs, there are none")
    return Photographs(found)


def _matches(text: str) -> tuple[Path, list[Path]]:
    """The files that an argument names, and the folder that their names are relative to."""
    from anyup.photographs import find_photographs

    path = Path(text)
    if path.is_dir():
        return path, find_photographs(path)
    if not _is_pattern(text):
        return path.parent, [path]
    fixed = 0
    while not _MAGIC.search(path.parts[fixed]):
        fixed += 1
    found = sorted(Path(each) for each in glob.glob(text, recursive=True))
    return Path(*path.parts[:fixed]), [each for each in found if not each.is_dir()]


def _is_pattern(text: str) -> bool:
    return _MAGIC.search(text) is not None and not os.path.lexists(text)


def _is_video(text: str) -> bool:
    return Path(text).suffix.lower() in VIDEO_SUFFIXES


def _check_folders(folders: Sequence[Path], manifest: Path, *, resume: bool) -> None:
    """Raise FileExistsError where a folder holds files that neither this run nor the one it resumes has written."""
    if manifest.exists():
        if not resume:
            raise FileExistsError(
                f"{manifest.parent}: holds results of an earlier run; --resume goes on, a new folder begins anew"
            )
        return
    for folder in folders:
        there = os.listdir(folder) if folder.is_dir() else []
        if other := sorted({*there} - {_UNFINISHED, f"{manifest.name}.new"}):
            raise FileExistsError(f"{folder}: expected a new or an empty folder, this one holds {other[0]}")


def _check_package(kind: str) -> None:
    """Raise ImportError where the package that writes a format is missing."""
    from anyup.array_files import zarr_package
    from anyup.tensor_files import safetensors_package

    if kind == "zarr":
        zarr_package()
    elif kind == "safetensors":
        safetensors_package()
