"""Stored results: one JSON file per device, a list of rows for each part of the measurement."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Results = dict[str, list[Row]]

DEFAULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu.json"


def read(path: Path) -> Results:
    """The parts stored in a file, none where there is no file; raises ValueError for another kind of file."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    if not isinstance(stored, dict) or not isinstance(stored.get("parts"), dict):
        raise ValueError(f"{path}: expected results of benchmarks.reach, an object with 'parts'")
    return stored["parts"]


def store(path: Path, part: str, rows: list[Row]) -> None:
    """Add or replace one part; the file is complete at any moment."""
    results = read(path)
    results[part] = rows
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"parts": results}, indent=1) + "\n")
    os.replace(partial, path)


def find(results: Results, part: str, case: str) -> Row | None:
    """The row of a case in a part."""
    return next((row for row in results.get(part, []) if row["case"] == case), None)
