"""`python -m benchmarks.report`: the README's tables, from the stored results and from nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from anyup.bench import cases, results
from anyup.bench.results import Results, Row
from anyup.bench.workloads import REACH, square


def tables(stored: Results) -> str:
    """Markdown: every table whose part is stored, and what they were measured on."""
    sections = (_reach(stored), _curve(stored), _unification(stored), _head(stored), _large(stored), _machines(stored))
    return "\n\n".join(section for section in sections if section) + "\n"


def _reach(stored: Results) -> str:
    rows = []
    for workload in REACH:
        part = str(workload.size[0])
        ours, theirs = results.find(stored, part, "anyup"), results.find(stored, part, "published")
        if ours is None or theirs is None:
            continue
        rows.append(
            (
                workload.name,
                _seconds(ours),
                _seconds(theirs) + (f" (chunks of {theirs['chunk']})" if theirs["chunk"] else ""),
                f"{ours['speed_up']:.1f}x" if ours["speed_up"] else "",
                f"{ours['times_floor']:.2f}",
                _gigabytes(ours["peak_bytes"]),
                _gigabytes(theirs["peak_bytes"]),
                _gigabytes(ours["output_bytes"]),
                f"{ours['difference']:.0e}",
            )
        )
    header = (
        "C = 384", "anyup", "published forward", "speed-up", "times the floor",
        "peak memory, anyup", "published", "of which output", "difference",
    )  # fmt: skip
    return _table(header, rows)


def _curve(stored: Results) -> str:
    rows = [
        (
            row["workload"],
            _seconds(row),
            f"{row['nanoseconds_per_pixel'] / 1e3:.1f}",
            f"{row['mean_window']:.0f} of {row['keys']}",
            f"{row['seconds'] / row['floor_seconds']:.2f}",
            _gigabytes(row["peak_bytes"]),
            _gigabytes(row["output_bytes"]),
        )
        for row in stored.get("curve", [])
    ]
    header = (
        "C = 384", "time", "microseconds a pixel", "keys in a window (mean)", "times the floor",
        "peak memory", "of which output",
    )  # fmt: skip
    return _table(header, rows)


def _unification(stored: Results) -> str:
    rows = [
        (row["workload"], {"torch": "anyup", "reference": "as defined"}[row["case"]], _seconds(row),
         _gigabytes(row["peak_bytes"]))
        for row in stored.get("unification", [])
    ]  # fmt: skip
    return _table(("feature unification alone", "", "time", "peak memory"), rows)


def _head(stored: Results) -> str:
    names = {
        "head_after": "whole call, head after",
        "head_before": "whole call, `with_head`",
        "window_attention/torch": "window attention alone, 384 channels",
        "window_attention_of_classes/torch": f"window attention alone, {cases.CLASSES} channels",
    }
    rows = []
    for workload in (square(448, 32), square(1024, 64)):
        for case, name in names.items():
            row = results.find(stored, "head", f"{case}, {workload.name}")
            if row is not None:
                sizes = (_gigabytes(row[key]) for key in ("written_bytes", "peak_bytes"))
                rows.append((workload.name, name, _seconds(row), *sizes))
    return _table((f"384 to {cases.CLASSES} channels", "", "time", "written", "peak memory"), rows)


def _large(stored: Results) -> str:
    rows = [
        (
            row["text"],
            *(_gigabytes(row[key]) for key in ("peak_bytes", "predicted_bytes")),
            f"{row['processor_seconds']:.0f} s",
            f"{row['microseconds_per_pixel']:.1f}",
            row["kept"],
        )
        for row in stored.get("high-resolution", [])
    ]
    header = (
        "C = 384, float32", "peak above the model", "predicted", "processor time", "microseconds a pixel", "kept",
    )  # fmt: skip
    return _table(header, rows)


def _machines(stored: Results) -> str:
    """One line for each machine, version and commit that a stored row names."""
    lines: dict[str, list[float]] = {}
    for rows in stored.values():
        for row in rows:
            line = (
                f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, "
                f"commit {row['commit'] or 'unknown'}"
            )
            lines.setdefault(line, []).append(row["matmul_rate"])
    return "\n".join(
        f"Measured on {line}; a float32 product of 2048 ran at {_span(rate / 1e9 for rate in rates)} GFLOP/s."
        for line, rates in lines.items()
    )


def _span(numbers: Iterable[float]) -> str:
    ordered = sorted(numbers)
    low, high = ordered[0], ordered[-1]
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"


def _seconds(row: Row) -> str:
    seconds = row["seconds"]
    if seconds is None:
        return "out of memory"
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _gigabytes(size: int | None) -> str:
    return "out of memory" if size is None else f"{size / 1e9:.2f} GB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Empty without rows."""
    if not rows:
        return ""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=results.DEFAULT, help="of benchmarks.reach")
    stored = results.read(parser.parse_args(argv).results)
    if not stored:
        parser.error("nothing stored: run python -m benchmarks.reach")
    print(tables(stored), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
