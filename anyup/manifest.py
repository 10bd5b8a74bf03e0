"""The manifest: a file with the outcome for each photograph of a run, which `--resume` reads.

Each line is a JSON object. The first line holds the settings of the run, every other line one photograph; of several
lines with the name of one photograph the last counts. An incomplete last line, which a killed run leaves, is ignored.

Of several processes of a run the first writes this file, and each of the others one beside it, of lines of photographs
alone, which the first takes over in the end. What a killed run leaves of these the next one takes over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

NAME = "manifest.jsonl"


class Manifest:
    """The file, which is open until `close`; within a `with` statement, until its end.

    Attributes:
        entries: the outcome for each photograph, by its name.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], rank: int = 0) -> None:
        """Begin a manifest, or go on with the one that exists; of several processes the first (`rank` 0) before others.

        Raises ValueError where the existing one has other settings (`asked`), or is no manifest.
        """
        self._path = path
        self._asked = json.loads(json.dumps(asked))  # in the form that reading the file gives
        self.entries = self._read() if rank or path.exists() else {}
        if rank == 0:
            self._take_over()
        self._file: TextIO = (self._part(rank) if rank else path).open("a", encoding="utf-8")

    def add(self, photograph: str, entry: Mapping[str, Any]) -> None:
        """Append the outcome for a photograph; the line is in the file when this returns."""
        self.entries[photograph] = dict(entry)
        self._file.write(_line({"photograph": photograph, **entry}))
        self._file.flush()

    def complete(self) -> None:
        """Close the file of all processes, rewritten with one line for each photograph in the order of their names."""
        self.close()
        self._take_over()

    def close(self) -> None:
        """Close the file without a rewrite."""
        self._file.close()

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def there(self) -> int:
        """How many photographs have a result, of all processes."""
        parts = (_entries(_lines(part)) for part in self._parts())
        found = {name: entry for entries in (self.entries, *parts) for name, entry in entries.items()}
        return sum("error" not in entry for entry in found.values())

    def _part(self, rank: int | str) -> Path:
        return self._path.with_name(f"{self._path.name}.{rank}")

    def _parts(self) -> list[Path]:
        """The files of other processes, this run's or a killed one's."""
        return sorted(self._path.parent.glob(self._part("[0-9]*").name))

    def _take_over(self) -> None:
        """Write the file with what other processes' files hold, and remove these."""
        parts = self._parts()
        for part in parts:
            self.entries |= _entries(_lines(part))
        self._write()
        for part in parts:
            part.unlink()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            asked, *entries = _lines(self._path)
            before, found = asked["asked"], _entries(entries)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._path}: not what a run over many photographs leaves") from error
        for key in sorted({*before, *self._asked}):
            if before.get(key) != self._asked.get(key):
                raise ValueError(
                    f"{self._path}: begun with {key} {before.get(key)}, now {self._asked.get(key)}; "
                    "name another folder, or delete this one to begin anew"
                )
        return found

    def _write(self) -> None:
        lines = [{"asked": self._asked}]
        lines += [{"photograph": name, **self.entries[name]} for name in sorted(self.entries)]
        # The temporary file has a fixed name, so that the next run overwrites what a killed run leaves.
        new = self._path.with_name(self._path.name + ".new")
        new.write_text("".join(map(_line, lines)), encoding="utf-8")
        os.replace(new, self._path)


def _lines(path: Path) -> list[Any]:
    # The text after the last newline is an incomplete line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _entries(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {line.pop("photograph"): line for line in lines}


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"
