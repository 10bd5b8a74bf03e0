"""What becomes of each photograph of a run over many: a file that grows with the work, and that a later run reads.

JSON, a line for each: the first tells what was asked for, every other one of one photograph; of several lines with its
name the last one counts. A line that a killed run has begun only is none. So processes that share a run may keep a file
each, and the files' lines together are the run's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

NAME = "manifest.jsonl"


class Manifest:
    """The file, which is open until `close`; within a `with` statement, until its end.

    Attributes:
        entries: of each photograph, by its name.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        """Begin, or go on where there is such a file.

        Raises ValueError where that one was begun for something else, or is no manifest.
        """
        self._path = path
        self._asked = json.loads(json.dumps(asked))  # as it will be read
        self.entries = self._read() if path.exists() else {}
        self._write()
        self._file: TextIO = path.open("a", encoding="utf-8")

    def add(self, photograph: str, entry: Mapping[str, Any]) -> None:
        """What became of a photograph; it is in the file when this returns."""
        self.entries[photograph] = dict(entry)
        self._file.write(_line({"photograph": photograph, **entry}))
        self._file.flush()

    def complete(self) -> None:
        """Leave one line for each photograph, in the order of their names, however often the run was interrupted."""
        self.close()
        self._write()

    def close(self) -> None:
        """Leave the file as it is."""
        self._file.close()

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            # What follows the last line's end was not finished.
            asked, *entries = map(json.loads, self._path.read_text(encoding="utf-8").split("\n")[:-1])
            before, found = asked["asked"], {entry.pop("photograph"): entry for entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._path}: not what a run over many photographs leaves") from error
        for key in sorted({*before, *self._asked}):
            if before.get(key) != self._asked.get(key):
                raise ValueError(
                    f"{self._path}: begun with {key} {before.get(key)}, now {self._asked.get(key)}; another folder "
                    "expected, or delete this one to begin anew"
                )
        return found

    def _write(self) -> None:
        lines = [{"asked": self._asked}]
        lines += [{"photograph": name, **self.entries[name]} for name in sorted(self.entries)]
        # Under a fixed name, so that a killed run leaves nothing that the next one does not find.
        new = self._path.with_name(self._path.name + ".new")
        new.write_text("".join(map(_line, lines)), encoding="utf-8")
        os.replace(new, self._path)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"
