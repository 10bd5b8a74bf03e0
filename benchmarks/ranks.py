"""One image over ranks of gloo on this machine: memory and processor time of each number of ranks, and what is sent.

    python -m benchmarks.ranks --size 1536 --grid 96 --channels 8 --ranks 1 2 --json benchmarks/results/ranks.json
    python -m benchmarks.ranks --modelled

Each rank is a process with one thread. Before it counts, a result must be that of one rank. Peak memory is that of the
process (`ru_maxrss`), and beside it what the process had before the call.

With `--modelled` nothing runs: the times of 16384 from 1024 on one H100 and on eight are those that
`benchmarks.modelled_gpu --model` has stored for 2048 from 128 in bfloat16, times the pixels (encoders, projection), the
keys (unification, keys, which every rank makes) or the pixels and the keys of a window (attention).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anyup.bench.machine import describe
from anyup.bench.workloads import find, square
from anyup.distributed import needed_rows, rows_of
from anyup.ops.pixel_encoder.arguments import GROUPS
from anyup.ops.pixel_encoder.cells import Cells
from anyup.window import RatioWindow
from benchmarks.modelled_gpu.model import RESULT as MODEL

PASSES = 12
"""Of the three encoders, four each."""

NVLINK = 450e9
"""Bytes a second that an H100 receives: half of the 900 GB/s that its datasheet says of both directions."""

LATENCY = 50e-6
"""Seconds of an exchange, however small; assumed."""

TOLERANCE = 1e-5
"""The largest difference between results of different numbers of ranks, in parts of the largest value."""


def sent(size: int, grid: int, channels: int, ranks: int, itemsize: int = 4, dim: int = 128) -> dict[str, int]:
    """Bytes that the rank which receives most gets, by what they are: square image and grid, all given to rank 0."""
    rows = [rows_of(size, ranks, rank) for rank in range(ranks)]
    needed = [needed_rows(own, own, size, size, 1) for own in rows]
    beside = [its.stop - its.start - (own.stop - own.start) for its, own in zip(needed, rows, strict=True)]
    cells = [len(Cells(0, grid, grid, size).touching(own)) for own in rows]
    row = size * 3 * itemsize
    return {
        "image rows": max([its.stop - its.start for its in needed[1:]], default=0) * row,
        "of these, halos": max(beside) * row,
        "features": grid * grid * channels * itemsize if ranks > 1 else 0,
        "statistics": PASSES * 2 * GROUPS * 8 * (ranks - 1),
        "pooled keys": max(cells) * (ranks - 1) * grid * dim * 4,
    }


def modelled(size: int, grid: int, channels: int, ranks: int) -> dict[str, float]:
    """Milliseconds of each part of a call on a rank, an H100 on NVLink, in bfloat16; *modelled*."""
    seen = find("2048 from 128")
    assert channels == seen.channels
    asked, window = square(size, grid), RatioWindow(0.1)
    pixels, keys = asked.pixels / seen.pixels / ranks, asked.keys / seen.keys
    windows = pixels * asked.mean_window(window) / seen.mean_window(window)
    others = {"feature unification": keys, "keys": keys, "window attention": windows}
    rows = [
        row
        for row in json.loads(MODEL.read_text())
        if (row["device"], row["dtype"], row["workload"], row["level"]) == ("H100 SXM", "bfloat16", seen.name, "stage")
    ]
    # Stored rows may be of a forward with other stages, such as one encoder after the other: those go by the pixels.
    parts = {row["stage"]: row["modelled_us"] / 1e3 * others.get(row["stage"], pixels) for row in rows}
    received = sent(size, grid, channels, ranks, itemsize=2)
    # Rank 0 has the image and the features. It sends each rank its rows; the others receive at the same time.
    moved = received["image rows"] * (ranks - 1) + received["features"] + received["pooled keys"]
    parts["exchange"] = 1e3 * (moved / NVLINK + (PASSES + 3) * LATENCY) if ranks > 1 else 0.0
    return parts


def measure(size: int, grid: int, channels: int, ranks: int, folder: Path) -> dict[str, Any]:
    """A row: seconds, and of each rank the peak memory and the processor's seconds."""
    meeting = folder / f"meeting-{ranks}"
    command = [sys.executable, "-m", "benchmarks.ranks", "--size", size, "--grid", grid, "--channels", channels]
    processes = [
        subprocess.Popen(
            [*map(str, command), "--rank", str(rank), str(ranks), str(meeting), str(folder / f"{ranks}-{rank}.pt")],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            text=True,
        )
        for rank in range(ranks)
    ]
    ends = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{ranks} ranks: a process failed")
    each = [json.loads(end.splitlines()[-1]) for end in ends]
    result = torch.cat([torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)], dim=2)
    return {
        "size": size,
        "grid": grid,
        "channels": channels,
        "ranks": ranks,
        "seconds": max(one["seconds"] for one in each),
        "processor_seconds": [one["processor_seconds"] for one in each],
        "peak_mb": [one["peak_mb"] for one in each],
        "before_mb": [one["before_mb"] for one in each],
        "received_bytes": sent(size, grid, channels, ranks),
        "result": result,
    }


def rank(size: int, grid: int, channels: int, number: int, ranks: int, meeting: str, path: str) -> None:
    """What a process does: it prints its figures as JSON and stores its part."""
    import torch.distributed as dist

    import anyup
    import anyup.distributed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=ranks)
    torch.manual_seed(0)
    upsampler = anyup.AnyUp().eval()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, channels, grid, grid, generator=generator)
    rows = rows_of(size, ranks, number)
    image = torch.cat(
        [
            torch.randn(1, 3, 1, size, generator=torch.Generator().manual_seed(row))
            for row in range(rows.start, rows.stop)
        ],
        2,
    )
    with torch.inference_mode():
        # What is allocated at a process's first call, however small.
        anyup.distributed.upsample(upsampler, image[:, :, :16, :16], features[..., :4, :4] if number == 0 else None)
        before, began, used = _peak_mb(), time.perf_counter(), time.process_time()
        part = anyup.distributed.upsample(upsampler, image, features if number == 0 else None)
    figures = {
        "seconds": round(time.perf_counter() - began, 2),
        "processor_seconds": round(time.process_time() - used, 2),
        "peak_mb": _peak_mb(),
        "before_mb": before,
    }
    torch.save(part.values.clone(), path)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(figures))


def _peak_mb() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=1536, help="of the square image and output")
    parser.add_argument("--grid", type=int, default=96, help="of the square features")
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="where to store the rows; those of other sizes stay")
    parser.add_argument("--modelled", action="store_true", help="print the modelled times of 16384 from 1024")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        number, ranks, meeting, path = options.rank
        rank(options.size, options.grid, options.channels, int(number), int(ranks), meeting, path)
        return
    if options.modelled:
        for ranks in (1, 8):
            parts = modelled(16384, 1024, 384, ranks)
            print(
                f"{ranks} ranks: {sum(parts.values()) / 1e3:.2f} s;", {name: round(ms, 1) for name, ms in parts.items()}
            )
        print("received by a rank of 8, bytes:", sent(16384, 1024, 384, 8, itemsize=2))
        return
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            row = measure(options.size, options.grid, options.channels, ranks, Path(folder))
            result = row.pop("result")
            first = result if first is None else first
            row["difference"] = ((result - first).abs().max() / first.abs().max()).item()
            if not row["difference"] <= TOLERANCE:
                raise AssertionError(f"{ranks} ranks: differs by {row['difference']:.1e}")
            row["machine"] = describe()
            print(json.dumps(row), flush=True)
            if options.json:
                _store(options.json, row)


def _store(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file, in the place of one of the same size and number of ranks."""
    kept = json.loads(path.read_text()) if path.exists() else []
    names = ("size", "grid", "channels", "ranks")
    rows = [each for each in kept if any(each[name] != row[name] for name in names)] + [row]
    path.write_text("[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n")


if __name__ == "__main__":
    main()
