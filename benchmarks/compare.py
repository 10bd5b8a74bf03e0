"""`python -m benchmarks.compare OLD NEW`: what became slower or larger beyond the spread, and what faster or smaller.

Exit status 1 where a row of both files regressed, 2 where a file is none of results. Times of two machines, or of one
whose matrix products ran at another rate, are compared as multiples of the floor; memory of two kinds of device is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyup.bench import stored
from anyup.bench.report import formatting
from anyup.bench.stored import Row, machine_of
from anyup.bench.timing import BUSY_SPREAD
from anyup.progress import human_bytes

_LEAST = 0.05
"""A smaller change of a time is none, however quiet the machine."""

_LEAST_MEMORY = 0.05
"""A process's peak differs by some pages from one run to the next."""

_SAME_RATE = 0.1
"""Rates of a matrix product that are closer than this are of the same machine in the same state."""


@dataclass
class Comparison:
    """Lines for people, by what they say."""

    regressions: list[str] = field(default_factory=list)
    gains: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchanged: int = 0


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Compare the rows of two files by id."""
    result = Comparison()
    before, after = ({row["id"]: row for row in results["rows"]} for results in (old, new))
    for name, rows, others in (("old", before, after), ("new", after, before)):
        alone = [identity for identity in rows if identity not in others]
        result.notes += [f"only in the {name} file: {identity}" for identity in alone]
    for note in dict.fromkeys(_differing(old, new, before[i], after[i]) for i in before if i in after):
        result.notes += [note] if note else []
    for identity in before:
        if identity in after:
            _compare_row(result, before[identity], after[identity], *(_machines(old, new, before, after, identity)))
    return result


def _machines(
    old: Mapping[str, Any], new: Mapping[str, Any], before: Mapping[str, Row], after: Mapping[str, Row], identity: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return machine_of(old, before[identity]), machine_of(new, after[identity])


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], before: Row, after: Row) -> str:
    """What the machines of a row differ in, and so how its times are compared; empty where they are the same."""
    was, now = machine_of(old, before), machine_of(new, after)
    names = ("device", "threads", "torch", "triton", "precision")
    differences = [f"{name} {was.get(name)} and {now.get(name)}" for name in names if was.get(name) != now.get(name)]
    if not _same_speed(was, now):
        rates = [f"{machine['matmul_rate'] / 1e9:.0f}" for machine in (was, now) if machine.get("matmul_rate")]
        differences += [f"matrix products at {' and '.join(rates)} GFLOP/s"] if len(rates) == 2 else []
        return f"machines differ ({', '.join(differences)}): times are compared as multiples of the floor"
    return f"versions differ: {', '.join(differences)}" if differences else ""


def _same_speed(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if any(was.get(name) != now.get(name) for name in ("device", "threads")):
        return False
    rates = [machine.get("matmul_rate") for machine in (was, now)]
    if None in rates:
        return True
    return abs(rates[1] / rates[0] - 1) <= _SAME_RATE


def _compare_row(result: Comparison, before: Row, after: Row, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    name = before["id"]
    if before["status"] != after["status"]:
        line = f"{name}: {before['status']} before, {after['status']} now"
        line += f" ({after['reason']})" if after.get("reason") else ""
        if after["status"] == "ok":
            result.gains.append(line)
        else:
            (result.regressions if before["status"] == "ok" else result.notes).append(line)
        return
    if before["status"] != "ok":
        result.unchanged += 1
        return
    changes = [
        _time_change(result, before, after, was, now),
        _host_change(before, after, was, now),
        _memory_change(before, after, was, now),
    ]
    found = [change for change in changes if change is not None]
    for ratio, words in found:
        (result.regressions if ratio > 1 else result.gains).append(f"{name}: {words}")
    result.unchanged += not found


def _time_change(
    result: Comparison, before: Row, after: Row, was: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[float, str] | None:
    """New over old and words, where the change is beyond the spread of both."""
    if not before.get("seconds") or not after.get("seconds"):
        return None
    margin = max(_LEAST, *(BUSY_SPREAD if row.get("spread") is None else row["spread"] for row in (before, after)))
    if _same_speed(was, now):
        pair = [row["seconds"] for row in (before, after)]
        shown = [formatting.seconds(value) for value in pair]
    else:
        sides = ((before, was), (after, now))
        if all(row.get("times_floor") for row, _ in sides):
            pair = [row["times_floor"] for row, _ in sides]
            shown = [f"{value:.2f} floors" for value in pair]
        elif all(machine.get("matmul_rate") for _, machine in sides):
            # Of a row without a floor, the operations that a matrix product makes in its time.
            pair = [row["seconds"] * machine["matmul_rate"] for row, machine in sides]
            shown = [f"{value / 1e9:.3g} GFLOP of a matrix product" for value in pair]
        else:
            result.notes.append(f"{before['id']}: not compared: no floor and no rate of both machines")
            return None
    ratio = pair[1] / pair[0]
    if 1 / (1 + margin) <= ratio <= 1 + margin:
        return None
    return ratio, f"time {shown[0]} before, {shown[1]} now ({ratio - 1:+.0%}, spread {margin:.0%})"


def _host_change(before: Row, after: Row, was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[float, str] | None:
    """Of what the launches take of the host, whose spread is not stored: that of a busy machine counts."""
    if not before.get("host_seconds") or not after.get("host_seconds") or not _same_speed(was, now):
        return None
    ratio = after["host_seconds"] / before["host_seconds"]
    if 1 / (1 + BUSY_SPREAD) <= ratio <= 1 + BUSY_SPREAD:
        return None
    shown = [formatting.seconds(row["host_seconds"]) for row in (before, after)]
    return ratio, f"host time {shown[0]} before, {shown[1]} now ({ratio - 1:+.0%})"


def _memory_change(before: Row, after: Row, was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[float, str] | None:
    if was.get("device_kind") != now.get("device_kind"):
        return None
    if any(not row.get("peak_bytes") or row.get("peak_is_exact") is False for row in (before, after)):
        return None
    ratio = after["peak_bytes"] / before["peak_bytes"]
    if 1 / (1 + _LEAST_MEMORY) <= ratio <= 1 + _LEAST_MEMORY:
        return None
    shown = [human_bytes(row["peak_bytes"]) for row in (before, after)]
    return ratio, f"peak memory {shown[0]} before, {shown[1]} now ({ratio - 1:+.0%})"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="results.json of anyup bench")
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args(argv)
    try:
        result = compare(stored.read(arguments.old), stored.read(arguments.new))
    except (OSError, ValueError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    for title, lines in (
        ("note", result.notes),
        ("faster or smaller", result.gains),
        ("REGRESSION", result.regressions),
    ):
        for line in lines:
            print(f"{title}: {line}")
    print(f"{len(result.regressions)} regressions, {len(result.gains)} gains, {result.unchanged} rows unchanged")
    return 1 if result.regressions else 0


if __name__ == "__main__":
    sys.exit(main())
