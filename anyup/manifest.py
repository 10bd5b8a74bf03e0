"""The manifest: a file with the outcome for each photograph of a run, which `--resume` reads.

Each line is a JSON object. The first line holds the settings of the run, every other line one photograph; of several
lines with the name of one photograph the last counts. An incomplete last line, which a killed run leaves, is ignored.
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
        entries: the outcome for each photograph, by its name.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        """Begin a manifest, or go on with the one that exists.

        Raises ValueError where the existing one has other settings (`asked`), or is no manifest.
        """
        self._path = path
        self._asked = json.loads(json.dumps(asked))  # in the form that reading the file gives
        self.entries = self._read() if path.exists() else {}
        self._write()
        self._file: TextIO = path.open("a", encoding="utf-8")

    def add(self, photograph: str, entry: Mapping[str, Any]) -> None:
        """Append the outcome for a photograph; the line is in the file when this returns."""
        self.entries[photograph] = dict(entry)
        self._file.write(_line({"photograph": photograph, **entry}))
        self._file.flush()

    def complete(self) -> None:
        """Close the file, rewritten with one line for each photograph in the order of their names."""
        self.close()
        self._write()

    def close(self) -> None:
        """Close the file without a rewrite."""
        self._file.close()

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            # The text after the last newline is an incomplete line.
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
        # The temporary file has a fixed name, so that the next run overwrites what a killed run leaves.
        new = self._path.with_name(self._path.name + ".new")
        new.write_text("".join(map(_line, lines)), encoding="utf-8")
        os.replace(new, self._path)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"
