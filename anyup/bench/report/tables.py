"""Tables of results as HTML: each cell says what people read, and has the stored value as `data-value`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from anyup.bench.report import formatting
from anyup.bench.stored import Row, machine_of
from anyup.progress import human_bytes


@dataclass(frozen=True)
class Column:
    """A field of rows: its heading, and how a value is shown. A column without a value in any row is left out."""

    field: str
    heading: str
    formatted: Callable[[Any], str] = str
    is_number: bool = True


COLUMNS = (
    Column("workload", "workload", is_number=False),
    Column("operation", "what", formatting.operation, is_number=False),
    Column("backend", "by", formatting.backend, is_number=False),
    Column("dtype", "dtype", is_number=False),
    Column("pass", "pass", is_number=False),
    Column("seconds", "time (median)", formatting.seconds),
    Column("spread", "spread", formatting.percent),
    Column("host_seconds", "host time (median)", formatting.seconds),
    Column("floor_seconds", "floor", formatting.seconds),
    Column("times_floor", "times the floor", lambda value: f"{value:.2f}"),
    Column("peak_bytes", "peak memory", human_bytes),
    Column("output_bytes", "of which output", human_bytes),
    Column("speed_up", "speed-up", formatting.times),
    Column("difference", "difference", lambda value: f"{value:.0e}" if value else "0"),
)


def shared(rows: Sequence[Row]) -> dict[str, str]:
    """What all of several rows have in common, by field, in words: `rows_table` leaves these columns out."""
    if len(rows) < 2:
        return {}
    fields = {column.field: column for column in COLUMNS if column.field in ("operation", "backend", "dtype", "pass")}
    return {
        field: column.formatted(rows[0][field])
        for field, column in fields.items()
        if all(row[field] == rows[0][field] for row in rows)
    }


def rows_table(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """A table of rows, whatever became of them; the last column says what else is to know."""
    common = shared(rows)
    columns = [
        column
        for column in COLUMNS
        if column.field not in common and any(row.get(column.field) is not None for row in rows)
    ]
    stages = [Column(name, name, formatting.seconds) for name in dict.fromkeys(s for row in rows for s in _stages(row))]
    head = "".join(_heading(column.heading, column.is_number) for column in (*columns, *stages))
    lines = []
    for row in rows:
        cells = "".join(_cell(column, row.get(column.field)) for column in columns)
        cells += "".join(_cell(column, _stages(row).get(column.field)) for column in stages)
        kind = f' class="{row["status"].replace(" ", "-")}"' if row["status"] != "ok" else ""
        identity = escape(f"row-{row['id']}")
        notes = _badges(row) + escape("; ".join(_notes(results, row)))
        lines.append(f'<tr data-id="{identity}"{kind}>{cells}<td class="notes">{notes}</td></tr>')
    return _framed(f"<thead><tr>{head}<th scope='col'>notes</th></tr></thead><tbody>{''.join(lines)}</tbody>")


def _stages(row: Row) -> Mapping[str, Any]:
    return row.get("stages") or {}


def _heading(text: str, is_number: bool) -> str:
    return f'<th scope="col"{" class=number" if is_number else ""}>{escape(text)}</th>'


def _cell(column: Column, value: Any) -> str:
    if value is None:
        return '<td class="absent">-</td>' if column.is_number else "<td></td>"
    kind = ' class="number"' if column.is_number else ""
    stored = escape(json.dumps(value) if column.is_number else str(value))
    return f'<td{kind} data-value="{stored}">{escape(column.formatted(value))}</td>'


def _badges(row: Row) -> str:
    badges = [] if row["status"] == "ok" else [("bad", row["status"])]
    if row.get("busy"):
        badges.append(("busy", "busy machine"))
    return "".join(f'<span class="badge {kind}">{escape(text)}</span> ' for kind, text in badges)


def _notes(results: Mapping[str, Any], row: Row) -> list[str]:
    """What is to know about a row beside its numbers."""
    notes = []
    if row.get("reason"):
        notes.append(str(row["reason"]))
    if row.get("expected_seconds") and row["status"] != "ok":
        notes.append(f"expected {formatting.seconds(row['expected_seconds'])}, by an estimate")
    if row["status"] == "ok" and row.get("chunk_times"):
        best = formatting.chunk(row.get("chunk")) or "unchunked"
        notes.append(f"{best}, the best of {len(row['chunk_times'])} tried")
    elif formatting.chunk(row.get("chunk")):
        notes.append(formatting.chunk(row["chunk"]))
    if row.get("ahead") is False:
        notes.append("the card waited for the host, which its time includes")
    if row.get("peak_bytes") and row.get("peak_is_exact") is False:
        notes.append("peak is an upper bound")
    if row["status"] == "ok" and isinstance(row.get("times"), list) and len(row["times"]) == 1:
        notes.append("run once")
    if row.get("machine"):
        here = machine_of(results, row)
        notes.append("another run: " + ", ".join(f"{name} {formatted(name, here[name])}" for name in row["machine"]))
    return notes


# Facts


_TOLD: dict[str, Callable[[Any], str]] = {
    "matmul_rate": lambda value: formatting.rate(value, "FLOP/s"),
    "matmul_rate_after": lambda value: formatting.rate(value, "FLOP/s"),
    "matmul_rates": lambda rates: ", ".join(
        f"{dtype} {formatting.rate(one, 'FLOP/s')}" for dtype, one in rates.items()
    ),
    "copy_bandwidth": lambda value: formatting.rate(value, "B/s"),
    "copy_bandwidth_after": lambda value: formatting.rate(value, "B/s"),
    "commit": lambda value: str(value or "unknown"),
    "refused": lambda texts: "; ".join(texts) or "nothing",
}


def formatted(name: str, value: Any) -> str:
    """A fact about the machine, in words."""
    if value is None and name != "commit":
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in _TOLD:
        return _TOLD[name](value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {formatted(str(key), one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(one) for one in value)
    return str(value)


def facts(machine: Mapping[str, Any]) -> str:
    """A list of names and values; what is not known is left out, but for the commit."""
    items = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(formatted(name, value))}</dd></div>"
        for name, value in machine.items()
        if value is not None or name == "commit"
    )
    return f'<dl class="facts">{items}</dl>'


def plain(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: int = 1) -> str:
    """A table of texts and numbers; columns from `numbers` on are set flush right."""
    header = "".join(_heading(name, place >= numbers) for place, name in enumerate(head))
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=number' if place >= numbers else ''}>{escape('' if cell is None else str(cell))}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return _framed(f"<thead><tr>{header}</tr></thead><tbody>{lines}</tbody>")


def _framed(table: str) -> str:
    """Wide tables scroll in a frame of their own, by keyboard too."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="table"><table>{table}</table></div>'
