"""The page that says what `benchmarks.first_hour` found, from what its folder holds and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyup.bench import stored
from anyup.bench.report import formatting
from anyup.progress import human_bytes
from benchmarks.report import table

_MOST = 20
"""Lines of a list: the whole is in the files."""


def page(folder: Path) -> str:
    """Markdown."""
    parts = _read(folder / "hour.json")["parts"]
    facts = _read(folder / "machine.json")
    well = all(part["well"] for part in parts)
    names = [f"{name} {facts[name]}" for name in ("torch", "triton", "python", "commit") if facts.get(name)]
    sections = [
        f"# First hour on {facts.get('device', 'a card')}",
        ", ".join(names) if names else "The machine is not known.",
        "All is well." if well else "**Not all is well.**",
        table(("part", "", "seconds", "what it said last"), [_part(part) for part in parts]),
        *_tests(folder),
        *_rows(_read(folder / "results.json")),
    ]
    return "\n\n".join(sections) + "\n"


def _read(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is absent."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def _part(part: Mapping[str, Any]) -> tuple[str, ...]:
    status = part["status"] if part["well"] else f"**{part['status']}**"
    lines = part["output"].strip().splitlines() or [""]
    return f"{part['name']}: {part['description']}", status, f"{part['seconds']:.0f}", _cell(lines[-1].strip(" ="))


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _tests(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.json")):
        tests = _read(path).get("tests")
        if tests is None:
            continue
        counts = Counter(test["outcome"] for test in tests.values())
        yield f"Tests ({path.name}): " + ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) + "."
        bad = [
            f"- {name.rsplit('/', 1)[-1]}: {_cell(test.get('message', '').split(chr(10))[0])}"
            for name, test in tests.items()
            if test["outcome"] not in ("passed", "skipped")
        ]
        yield from _listed(bad)


def _listed(lines: Sequence[str]) -> Iterator[str]:
    more = [f"- and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    if lines:
        yield "\n".join([*lines[:_MOST], *more])


def _rows(results: Mapping[str, Any]) -> Iterator[str]:
    rows = results.get("rows", ())
    calls = [row for row in rows if not row.get("stages")]
    if calls:
        yield table(
            ("", "by", "the card's time", "the host's", "times the floor", "peak memory", "speed-up", "difference"),
            [_row(row) for row in calls],
        )
    with_stages = [row for row in rows if row.get("stages")]
    names = list(dict.fromkeys(name for row in with_stages for name in row["stages"]))
    if with_stages:
        lines = [
            (
                _named(row),
                *(formatting.seconds(row["stages"].get(name, 0.0)) for name in names),
                row.get("reason") or "",
            )
            for row in with_stages
        ]
        yield table(("stages", *names, ""), lines)
    refused = results.get("machine", {}).get("refused")
    if refused:
        yield "Refused:"
        yield from _listed([f"- {_cell(text)}" for text in refused])


def _row(row: stored.Row) -> tuple[str, ...]:
    if row["status"] != "ok":
        status = f"**{row['status']}**" if row["status"] in stored.FAULTS else row["status"]
        return _named(row), row["backend"], f"{status}: {_cell(row['reason'] or '')}", "", "", "", "", ""
    host = formatting.seconds(row["host_seconds"]) if row.get("host_seconds") else ""
    host += ", waited for" * (not row.get("ahead", True))
    return (
        _named(row), row["backend"], formatting.seconds(row["seconds"]), host,
        f"{row['times_floor']:.2f}" if row.get("times_floor") else "",
        human_bytes(row["peak_bytes"]) if row.get("peak_bytes") else "",
        formatting.times(row["speed_up"]) if row.get("speed_up") else "",
        f"{row['difference']:.0e}" if row.get("difference") is not None else "",
    )  # fmt: skip


def _named(row: stored.Row) -> str:
    what = "" if row["operation"] == "model" else f"{formatting.operation(row['operation'])}, "
    back = ", forward and backward" if row["pass"] != "forward" and row["operation"] == "model" else ""
    return f"{what}{row['workload']}, {row['dtype']}{back}"
