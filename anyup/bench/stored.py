"""A file of results: what it must hold, and how its rows are looked up.

    {"format": 1, "machine": {...}, "rows": [{"id", "group", "workload", "operation", "backend", "status", ...}]}

A row that was measured elsewhere or earlier than the others has a `machine` of its own with what differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyup.images import check_readable

Row = Mapping[str, Any]

FORMAT = 1

FAULTS = ("wrong", "failed")
"""What becomes of a row whose result is not the baseline's, or whose call ends with an error."""

STATUSES = ("ok", "out of memory", "over budget", "unsupported", *FAULTS)
"""What can become of a row; all but the first have a reason."""

_TEXTS = ("id", "group", "workload", "operation", "backend", "dtype", "pass")

# Amounts, which are positive where they are there.
_AMOUNTS = ("seconds", "output_bytes", "floor_seconds", "times_floor", "speed_up", "expected_seconds")


def read_json(path: Path, what: str) -> Any:
    """A JSON file. Raises OSError where it cannot be read, ValueError naming it and what it should be otherwise."""
    try:
        return json.loads(check_readable(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected {what}, this is no JSON ({error})") from error


def read(path: Path) -> dict[str, Any]:
    """The results stored in a file.

    Raises OSError where it cannot be read, ValueError naming it where it holds anything else than results.
    """
    results: dict[str, Any] = read_json(path, "results of `anyup bench`")
    check(results, str(path))
    return results


def check(results: Any, where: str = "results") -> None:
    """Raise ValueError, saying where, unless these are results that this version understands."""
    if not isinstance(results, dict) or "format" not in results:
        raise ValueError(f"{where}: expected results of `anyup bench`, an object with format, machine and rows")
    if results["format"] != FORMAT:
        raise ValueError(f"{where}: format: expected {FORMAT}, got {results['format']!r}")
    if not isinstance(results.get("machine"), dict) or not isinstance(results.get("rows"), list):
        raise ValueError(f"{where}: expected an object `machine` and a list `rows`")
    seen: set[str] = set()
    for number, row in enumerate(results["rows"]):
        _check_row(row, f"{where}: row {number}")
        if row["id"] in seen:
            raise ValueError(f"{where}: two rows have the id {row['id']!r}")
        seen.add(row["id"])


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {row!r}")
    for name in _TEXTS:
        if not isinstance(row.get(name), str) or not row[name]:
            raise ValueError(f"{where}: {name}: expected a text, got {row.get(name)!r}")
    where = f"{where} ({row['id']})"
    if row.get("status") not in STATUSES:
        raise ValueError(f"{where}: status: expected one of {', '.join(STATUSES)}, got {row.get('status')!r}")
    for name in _AMOUNTS:
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"{where}: {name}: expected a positive number or null, got {value!r}")
    if not isinstance(row.get("machine", {}), dict):
        raise ValueError(f"{where}: machine: expected an object, got {row['machine']!r}")


def machine_of(results: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """The machine that a row was measured on."""
    return {**results["machine"], **row.get("machine", {})}


def rows_of(results: Mapping[str, Any], **wanted: str) -> Iterator[Row]:
    """The rows whose fields have these values, in their order."""
    for row in results["rows"]:
        if all(row.get(name) == value for name, value in wanted.items()):
            yield row


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by group, in the order of first appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found
