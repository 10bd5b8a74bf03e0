"""Sections of the report about what the compiler makes of the kernels: modelled, not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from anyup.bench.machine import ROOT
from anyup.bench.report import plots, tables
from anyup.bench.stored import read_json

STORED = ROOT / "benchmarks" / "results" / "codegen.json"
"""Where a checkout keeps the rows of `python -m benchmarks.modelled_gpu`."""

_TEXTS = ("kernel", "target", "dtype", "workload")


def stored_rows(path: Path = STORED) -> list[dict[str, Any]] | None:
    """The rows that a checkout has, None where there are none; raises ValueError where the file is something else."""
    if not path.exists():
        return None
    rows: list[dict[str, Any]] = read_json(path, "rows of benchmarks.modelled_gpu.codegen")
    check(rows, str(path))
    return rows


def check(rows: Any, where: str = "codegen") -> None:
    """Raise ValueError, saying where, unless these are rows of `python -m benchmarks.modelled_gpu`."""
    if not isinstance(rows, list):
        raise ValueError(f"{where}: expected a list of rows of benchmarks.modelled_gpu.codegen")
    for number, row in enumerate(rows):
        missing = [name for name in _TEXTS if not isinstance(row, dict) or not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(f"{where}: row {number}: expected a text as {', '.join(missing)}")


def ratios(
    rows: Sequence[Mapping[str, Any]], *, dtype: str, workloads: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Modelled time over the floor by kernel and device, smallest first; kernels without a device are left out."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["dtype"] == dtype and row["workload"] in workloads and row.get("floor_us") and row.get("modelled_us"):
            by_device = found.setdefault(kernel_name(row["kernel"]), {})
            by_device.setdefault(row["device"], []).append(row["modelled_us"] / row["floor_us"])
    return {kernel: {device: sorted(all_) for device, all_ in found[kernel].items()} for kernel in found}


def kernel_name(kernel: str) -> str:
    """For people."""
    return kernel.replace("_", " ").removesuffix(" forward") if "window" not in kernel else kernel.replace("_", " ")


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    """HTML: a plot and every row."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    parts = [
        "<p><strong>Modelled, not measured.</strong> Registers, spills and instructions are the compiler's, for each "
        "target ahead of time. Times are a roofline's: the longest of memory, L2, matrix units, instruction issue and "
        "the other units of a multiprocessor at the device's rates, or the sum of its phases where a program is alone "
        "on one, plus the launch. The floor counts what any kernel must do.</p>"
    ]
    dtypes = {row["dtype"] for row in rows}
    for dtype in ("bfloat16", "float32"):
        found = ratios(rows, dtype=dtype, workloads=workloads) if dtype in dtypes else {}
        figure = plots.drawn(plots.modelled_figure, found)
        if figure is not None:
            caption = f"Modelled time over the floor, {dtype}: a mark for each size and number of channels."
            picture = plots.svg(figure, f"modelled {dtype}")
            parts.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
    parts.append(f"<details><summary>All {len(rows)} rows</summary>{_table(rows)}</details>")
    return "".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "kernel", "target", "device of the times", "dtype", "workload", "C", "registers", "spilled bytes", "shared KB",
        "instructions a pixel", "floor µs", "modelled µs", "over the floor", "what binds",
    )  # fmt: skip
    lines = []
    for row in rows:
        modelled, floor = row.get("modelled_us"), row.get("floor_us")
        shared = row.get("shared_bytes")
        lines.append(
            (
                kernel_name(row["kernel"]), row["target"], row.get("device") or "none stands for it", row["dtype"],
                row["workload"], row.get("channels"), row.get("registers"), row.get("spill_bytes"),
                None if shared is None else f"{shared / 1024:.0f}", row.get("instructions_per_pixel"), floor, modelled,
                f"{modelled / floor:.2f}" if modelled and floor else "", row.get("modelled_term"),
            )
        )  # fmt: skip
    return tables.plain(head, lines, numbers=5)
