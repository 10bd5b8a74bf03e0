"""`python -m benchmarks.report`: the pages' tables, from the stored results and from nothing else.

    python -m benchmarks.report [--write]

A page has places `<!-- benchmarks: FILE/NAME --> ... <!-- end -->`; FILE is one of benchmarks/results without its
ending, NAME one of the tables below. Without `--write` what is out of date is named, with exit status 1.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyup.bench import stored
from anyup.bench.machine import PRODUCT_SIDES
from anyup.bench.report import formatting, modelled
from anyup.bench.stored import Row, rows_of
from anyup.bench.workloads import CURVE, REACH, Workload, square
from anyup.window import RatioWindow
from benchmarks.evaluated import EVALUATED

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"

PAGES = (
    *(ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/evaluation.md")),
    ROOT / "anyup" / "assets" / "anyup_mini.md",
)

_PLACE = re.compile(r"(<!-- benchmarks: (?P<file>[\w.-]+)/(?P<name>[\w-]+) -->).*?(<!-- end -->)", re.DOTALL)

Results = Mapping[str, Any]


def page(text: str, folder: Path = RESULTS) -> str:
    """A page with its tables made anew; raises ValueError for a place that names no file or table."""
    return _PLACE.sub(lambda found: found[1] + made(found["file"], found["name"], folder) + found[4], text)


def made(file: str, name: str, folder: Path = RESULTS) -> str:
    """What stands between the marks: a table between line breaks, or a phrase within its line."""
    path = folder / f"{file}.json"
    if not path.exists():
        raise ValueError(f"benchmarks: {file}/{name}: there is no {path}")
    if file in MODELLED:
        tables = MODELLED[file]
        if name not in tables:
            raise ValueError(f"benchmarks: {file}/{name}: expected one of {', '.join(tables)}")
        return f"\n{tables[name](path)}\n"
    if name in EVALUATED:
        return f"\n{table(*EVALUATED[name](path))}\n"
    results = stored.read(path)
    if name in PHRASES:
        return PHRASES[name](results)
    if name not in TABLES:
        raise ValueError(f"benchmarks: {file}/{name}: expected one of {', '.join((*TABLES, *EVALUATED, *PHRASES))}")
    return f"\n{TABLES[name](results)}\n"


def _find(results: Results, group: str, workload: str, operation: str, *backends: str) -> Row | None:
    """The float32 forward row of the first backend that has one."""
    for backend in backends:
        wanted = {"group": group, "workload": workload, "operation": operation, "backend": backend, "dtype": "float32"}
        for row in rows_of(results, **wanted, **{"pass": "forward"}):
            return row
    return None


def _beside_the_published(results: Results) -> Iterator[tuple[Workload, Row, Row]]:
    """The sizes that claims are made about: our row and the published forward's."""
    for workload in REACH:
        ours, theirs = (_find(results, "model", workload.name, "model", name) for name in ("anyup", "published"))
        if ours is not None and theirs is not None:
            yield workload, ours, theirs


def _model(results: Results) -> str:
    """Ours and the published forward, with all that is stored of them."""
    lines = []
    for workload, ours, theirs in _beside_the_published(results):
        chunk = f" ({formatting.chunk(theirs.get('chunk')) or 'unchunked'})" if theirs["status"] == "ok" else ""
        lines.append(
            (
                workload.name, _time(ours), _range(ours), _time(theirs) + chunk, _range(theirs),
                _shown(ours.get("speed_up"), formatting.times), _shown(ours.get("times_floor"), "{:.2f}".format),
                _size(ours, "peak_bytes"), _size(theirs, "peak_bytes"), _size(ours, "output_bytes"),
                _shown(ours.get("difference"), "{:.0e}".format),
            )
        )  # fmt: skip
    header = (
        "C = 384", "anyup", "fastest to slowest", "published forward", "fastest to slowest", "speed-up",
        "times the floor", "peak memory, anyup", "published", "of which output", "difference",
    )  # fmt: skip
    return table(header, lines)


def _summary(results: Results) -> str:
    """The columns of `_model` that a first look takes."""
    lines = []
    for workload, ours, theirs in _beside_the_published(results):
        lines.append(
            (
                workload.name, _time(ours), _time(theirs), _shown(ours.get("speed_up"), formatting.times),
                _size(ours, "peak_bytes"), _size(theirs, "peak_bytes"), _size(ours, "output_bytes"),
            )
        )  # fmt: skip
    header = (
        "C = 384", "time, anyup", "published", "speed-up", "peak memory, anyup", "published", "of which output",
    )  # fmt: skip
    return table(header, lines)


def _curve(results: Results) -> str:
    """Ours over resolution beside the exact size of the windows."""
    lines = []
    for workload in CURVE:
        row = _find(results, "curve", workload.name, "model", "anyup")
        row = row or _find(results, "model", workload.name, "model", "anyup")
        if row is None or row["status"] != "ok":
            continue
        lines.append(
            (
                workload.name, _time(row), f"{row['seconds'] / workload.pixels * 1e6:.1f}",
                f"{workload.mean_window(RatioWindow(0.1)):.0f} of {workload.keys}",
                _shown(row.get("times_floor"), "{:.2f}".format),
                _size(row, "peak_bytes"), _size({**row, "output_bytes": workload.output_bytes}, "output_bytes"),
            )
        )  # fmt: skip
    header = (
        "C = 384", "time", "microseconds a pixel", "keys in a window (mean)", "times the floor", "peak memory",
        "of which output",
    )  # fmt: skip
    return table(header, lines)


def _unification(results: Results) -> str:
    lines = [
        (f"{row['grid'][0]} x {row['grid'][1]}, C {row['channels']}", name, _time(row), _size(row, "peak_bytes"))
        for row in rows_of(results, group="unification")
        for name in [{"torch": "anyup", "reference": "as defined"}.get(row["backend"], "")]
        if name
    ]
    return table(("feature unification alone", "", "time", "peak memory"), lines)


def _head(results: Results) -> str:
    names = {
        "head_after": "whole call, head after",
        "head_before": "whole call, `with_head`",
        "window_attention": "window attention alone, 384 channels",
        "window_attention_of_classes": "window attention alone, 21 channels",
    }
    lines = []
    for workload in (square(448, 32), square(1024, 64)):
        for operation, name in names.items():
            row = _find(results, "head", workload.name, operation, "anyup", "triton", "torch")
            if row is not None:
                lines.append((workload.name, name, _time(row), _size(row, "written_bytes"), _size(row, "peak_bytes")))
    return table(("384 to 21 channels", "", "time", "written", "peak memory"), lines)


def _stages(results: Results) -> str:
    """What share of a call each stage takes."""
    rows = [row for row in rows_of(results, group="stages") if row["status"] == "ok"]
    names = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    lines = [
        (_with_dtype(row), *(f"{row['stages'][name] / sum(row['stages'].values()):.0%}" for name in names))
        for row in rows
    ]
    return table(("C = 384", *names), lines)


def _with_dtype(row: Row) -> str:
    return row["workload"] if row["dtype"] == "float32" else f"{row['workload']}, {row['dtype']}"


def _high_resolution(results: Results) -> str:
    """Large images within a budget: peaks as measured and as planned, and the work."""
    lines = [
        (
            row["workload"], row["operation"], _size(row, "peak_bytes"), _size(row, "predicted_bytes"),
            f"{row['processor_seconds']:.0f} s", f"{row['microseconds_per_pixel']:.1f}", row["kept"],
        )
        for row in rows_of(results, group="high-resolution")
        if row["status"] == "ok"
    ]  # fmt: skip
    header = ("C = 384", "", "peak memory", "as planned", "processor time", "microseconds a pixel", "kept")
    return table(header, lines)


def _modelled(path: Path) -> str:
    """Modelled time over the floor of each kernel: the least and the most among the numbers of channels."""
    rows = modelled.stored_rows(path) or []
    cases = (("bfloat16", "448 from 32"), ("bfloat16", "1024 from 64"), ("float32", "1024 from 64"))
    found = {case: modelled.ratios(rows, dtype=case[0], workloads=[case[1]]) for case in cases}
    columns = [(device, case) for device in ("A100 SXM 80GB", "H100 SXM") for case in cases]
    kernels = list(dict.fromkeys(kernel for by_kernel in found.values() for kernel in by_kernel))
    lines = [
        (kernel, *(_span(found[case].get(kernel, {}).get(device, ()), "{:.2f}") for device, case in columns))
        for kernel in kernels
    ]
    header = ("modelled", *(f"{device.split()[0]}, {dtype}, {workload}" for device, (dtype, workload) in columns))
    return table(header, lines)


def _forward(path: Path) -> str:
    """The modelled time of a whole forward at 448 from 32 on each device, and of its stages."""
    found: list[Row] = stored.read_json(path, "rows of benchmarks.modelled_gpu.codegen --model")
    rows = [row for row in found if row["workload"] == "448 from 32"]
    stages = list(dict.fromkeys(row["stage"] for row in rows if row["level"] == "stage"))
    lines = []
    for whole in (row for row in rows if row["level"] == "sum"):
        of_run = [row for row in rows if all(row[name] == whole[name] for name in ("device", "dtype"))]
        parts = {row["stage"]: row["modelled_us"] for row in of_run if row["level"] == "stage"}
        lines.append(
            (
                f"{whole['device']}, {whole['dtype']}", f"**{whole['modelled_us'] / 1e3:.2f} ms**",
                f"{whole['floor_us'] / 1e3:.2f} ms", *(f"{parts[name] / 1e3:.2f}" for name in stages),
                str(whole["passes"]), f"{whole['host_us'] / 1e3:.1f} ms",
            )
        )  # fmt: skip
    sizes = " / ".join(dict.fromkeys(f"{row['workload']}, C = {row['channels']}" for row in rows))
    return table((f"modelled, {sizes}", "whole forward", "floor", *stages, "launches", "host"), lines)


def _sizes(path: Path) -> str:
    """The modelled time of whole forwards by size."""
    found: list[Row] = stored.read_json(path, "rows of benchmarks.modelled_gpu.codegen --model")
    rows = {(row["device"], row["dtype"], row["workload"]): row for row in found if row["level"] == "sum"}
    workloads = sorted({workload for *_, workload in rows}, key=lambda name: int(name.split()[0]))
    lines = [
        (f"{device}, {dtype}", *(f"{rows[device, dtype, name]['modelled_us'] / 1e3:.2f}" for name in workloads))
        for device, dtype in dict.fromkeys(key[:2] for key in rows)
    ]
    return table(("modelled, ms, C = 384", *workloads), lines)


def _machine(results: Results) -> str:
    """One line for each machine, version and commit that a row names."""
    lines: dict[str, list[float]] = {}
    for row in results["rows"]:
        here = stored.machine_of(results, row)
        threads = f", {here['threads']} threads" if here.get("device_kind") != "cuda" else ""
        capability = f" ({here['cpu_capability']})" if here.get("cpu_capability") else ""
        line = f"{here['device']}{capability}{threads}, torch {here['torch']}, commit {here.get('commit') or 'unknown'}"
        line += f"; a float32 product of {PRODUCT_SIDES[here.get('device_kind', 'cpu')]}"
        lines.setdefault(line, []).extend(here[name] for name in _RATES if here.get(name))
    return "\n".join(
        f"Measured on {line} ran at {_span([r / 1e9 for r in rates], '{:.0f}')} GFLOP/s."
        for line, rates in lines.items()
    )


_RATES = ("matmul_rate", "matmul_rate_after")


def _speed_up(workload: str, results: Results) -> str:
    row = _find(results, "model", workload, "model", "anyup")
    if row is None or not row.get("speed_up"):
        raise ValueError(f"benchmarks: no speed-up is stored at {workload}")
    return f"{row['speed_up']:.0f} times"


TABLES: dict[str, Callable[[Results], str]] = {
    "summary": _summary,
    "model": _model,
    "curve": _curve,
    "unification": _unification,
    "head": _head,
    "stages": _stages,
    "high-resolution": _high_resolution,
    "machine": _machine,
}

MODELLED: dict[str, dict[str, Callable[[Path], str]]] = {
    "codegen": {"modelled": _modelled},
    "model": {"forward": _forward, "sizes": _sizes},
}
"""Of files that hold rows alone: the names of their tables, and what makes them."""

PHRASES: dict[str, Callable[[Results], str]] = {
    "speed-up-448": functools.partial(_speed_up, "448 from 32"),
    "speed-up-1024": functools.partial(_speed_up, "1024 from 64"),
}


def _time(row: Row) -> str:
    if row["status"] != "ok":
        return str(row["status"])
    return _shown(row.get("seconds"), formatting.seconds) + ("" if len(row.get("times") or [0, 0]) > 1 else ", once")


def _range(row: Row) -> str:
    times = row.get("times") or []
    return f"{formatting.seconds(min(times))} to {formatting.seconds(max(times))}" if len(times) > 1 else ""


def _size(row: Row, name: str) -> str:
    if row["status"] == "out of memory":
        return "out of memory"
    return "" if row.get(name) is None else f"{row[name] / 1e9:.2f} GB"


def _shown(value: Any, how: Callable[[Any], str]) -> str:
    return "" if value is None else how(value)


def _span(numbers: Iterable[float], how: str) -> str:
    ordered = sorted(numbers)
    if not ordered:
        return ""
    low, high = how.format(ordered[0]), how.format(ordered[-1])
    return low if low == high else f"{low} to {high}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; raises ValueError without rows, which the page would otherwise lose in silence."""
    if not rows:
        raise ValueError(f"benchmarks: no stored row for the table of {', '.join(filter(None, header))}")
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the pages")
    arguments = parser.parse_args(argv)
    stale = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        try:
            new = page(text)
        except ValueError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 2
        if new != text:
            stale.append(path)
        if new != text and arguments.write:
            path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'written' if arguments.write else 'out of date'}")
    return 1 if stale and not arguments.write else 0


if __name__ == "__main__":
    sys.exit(main())
