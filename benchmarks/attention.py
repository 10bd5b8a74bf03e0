"""The window attention alone on whatever device is there: each backend that can, forward and backward.

    python -m benchmarks.attention [--device cuda] [--workload "448 from 32"] [--json FILE]

Parity is checked before anything is timed. Times are medians of warm calls, between events on a GPU, whose L2 cache is
not flushed between calls; memory is what the allocator held at its peak above the inputs, on a GPU only.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyup.bench import machine, parity, results, workloads
from anyup.bench.workloads import Workload
from anyup.ops import explain_backends, window_attention
from anyup.window import RatioWindow

WINDOW = RatioWindow(0.1)
HEADS, HEAD_DIM = 4, 32
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BACKENDS = ("triton", "flex", "torch")
# Of the result against float64, relative to its largest value: rounding, with room; a wrong window is ten times this.
TOLERANCE = {torch.float32: parity.TOLERANCE, torch.float16: 5e-3, torch.bfloat16: 3e-2}

Row = dict[str, Any]


def inputs(workload: Workload, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Query, key and value, the same noise on each device."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (workload.batch, *workload.size, HEADS, HEAD_DIM),
        (workload.batch, *workload.grid, HEADS, HEAD_DIM),
        (workload.batch, *workload.grid, workload.channels),
    )
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def measure(workload: Workload, dtype: torch.dtype, backend: str, device: torch.device, repeats: int) -> list[Row]:
    """A row for the forward pass and one for the backward pass; a row with a reason for what cannot run."""
    tensors = inputs(workload, dtype, device)
    rows: list[Row] = []
    for direction in ("forward", "backward"):
        row: Row = {"case": f"{workload.name}, {backend}, {str(dtype).removeprefix('torch.')}, {direction}"}
        rows.append(row)
        trains = direction == "backward"
        leaves = [t.detach().requires_grad_(trains) for t in tensors]
        reasons = explain_backends(*leaves, window=WINDOW, backend=backend).candidates[0].reasons
        if reasons:
            row["reason"] = "; ".join(reasons)
            continue
        try:
            row |= _timed(leaves, backend, trains, repeats)
        except torch.OutOfMemoryError as error:
            row["reason"] = f"out of memory: {str(error).splitlines()[0]}"
    return rows


def _timed(leaves: list[Tensor], backend: str, trains: bool, repeats: int) -> Row:
    device, dtype = leaves[0].device, leaves[2].dtype

    def forward() -> Tensor:
        return window_attention(*leaves, window=WINDOW, backend=backend)

    row: Row = {"difference": _difference(forward().detach(), leaves, TOLERANCE[dtype])}
    call: Callable[[], object] = forward
    if trains:
        out = forward()
        grad = torch.ones_like(out)
        call = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    times = [_seconds(call, device) for _ in range(repeats)]
    return {**row, "seconds": statistics.median(times), "times": times}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _difference(result: Tensor, leaves: Sequence[Tensor], tolerance: float) -> float:
    """Largest difference from float64 in the first rows, relative to its largest value; raises ParityError."""
    rows = min(32, result.shape[1])
    wide = [t.detach().double() for t in leaves]
    exact = window_attention(*wide, window=WINDOW, backend="torch")[:, :rows]
    difference = ((result[:, :rows].double() - exact).abs().max() / exact.abs().max()).item()
    if not difference <= tolerance:
        raise parity.ParityError(f"{difference:.1e} of the largest value apart, expected at most {tolerance:.0e}")
    return difference


def describe(device: torch.device) -> Row:
    """What every row names beside the case."""
    row: Row = machine.describe().as_row()
    if device.type == "cuda":
        row |= {"device": torch.cuda.get_device_name(device), "threads": None}
    row["matmul_precision"] = torch.get_float32_matmul_precision()
    row.pop("dtype")
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workload", nargs="+", default=[w.name for w in workloads.REACH], help='as "448 from 32"')
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--backend", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to store the rows; results/DEVICE.json by default")
    chosen = parser.parse_args(argv)
    device = torch.device(chosen.device)
    about, rows = describe(device), []
    for name in chosen.workload:
        for dtype in chosen.dtype:
            for backend in chosen.backend:
                for row in measure(workloads.find(name), DTYPES[dtype], backend, device, chosen.repeats):
                    rows.append({**row, **about})
                    told = f"{row['seconds'] * 1e3:10.3f} ms" if "seconds" in row else row["reason"]
                    print(f"{row['case']}: {told}", flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    path = chosen.json or results.DEFAULT.with_name(f"{slug}.json" if device.type == "cuda" else "cpu.json")
    results.store(path, "attention", rows)
    print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
