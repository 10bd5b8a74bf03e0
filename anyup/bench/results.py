"""The file of results, complete at any moment: an interrupted run goes on with what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyup.bench.stored import FORMAT, read
from anyup.images import complete_or_absent

Row = dict[str, Any]

_HARDWARE = ("device", "device_kind", "cpu_capability", "threads")
SAME = (*_HARDWARE, "torch", "triton", "python", "anyup", "commit", "precision")
"""Notes of the machine that rows of one file have in common."""


class MachineError(ValueError):
    """A file's rows were measured elsewhere, or with something else: they do not go together with new ones."""


class ResultsFile:
    """The rows measured so far, in the order of their measurement.

    Args:
        path: of the JSON file, which need not exist.
        machine: notes of the machine and its versions (`anyup.bench.machine.describe`).
        restart: forget what is there.

    Raises MachineError, naming what differs, where the file is of another machine, commit or version, and ValueError
    where it is no file of results.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.machine = dict(machine)
        self._rows: dict[str, Row] = {}
        if path.exists() and not restart:
            stored = read(path)
            differs = [name for name in SAME if stored["machine"].get(name) != machine.get(name)]
            if differs:
                differences = "; ".join(
                    f"{n}: {stored['machine'].get(n)} there, {machine.get(n)} here" for n in differs
                )
                raise MachineError(f"{path}: was measured otherwise ({differences}): name another folder, or --restart")
            self._rows = {row["id"]: row for row in stored["rows"]}
            self.machine["refused"] = stored["machine"].get("refused", [])

    def __contains__(self, identity: str) -> bool:
        return identity in self._rows

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return list(self._rows.values())

    def as_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {"format": FORMAT, "machine": self.machine, "rows": self.rows}

    def put(self, rows: Sequence[Row], **notes: Any) -> None:
        """Add or replace rows, and notes of the machine, and write the file."""
        self._rows.update({row["id"]: row for row in rows})
        self.machine.update(notes)
        with complete_or_absent(self.path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
