"""`python -m benchmarks.reach`: how fast and how small the upsampler is beside the published forward.

Each part is stored when it ends, so an interrupted run goes on with `--resume`. Parity is checked before
anything is timed, memory is measured in child processes, and repeats of what is compared are interleaved.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from anyup.bench import cases, high_resolution, machine, memory, parity, published, results
from anyup.bench.results import Row
from anyup.bench.timing import interleave, once
from anyup.bench.workloads import CURVE, REACH, UNIFICATION, Workload, square

_REPEATS = 5

# The baseline is repeated up to this many seconds a call, and run once beyond.
_REPEATED = 60.0

# A matrix product that differs by more than this before and after a part says that the machine was busy.
_STEADY = 0.1


def compare(workload: Workload, rate: float) -> list[Row]:
    """Ours and the baseline at its best chunk size: time in turn, parity, memory, floor."""
    ours, theirs = _compare_times(workload, rate)
    ours["floor_seconds"] = machine.floor_seconds(workload, rate)
    ours["times_floor"] = ours["seconds"] / ours["floor_seconds"]
    ours.update(_memory("anyup", workload))
    say(f"  anyup: {ours['seconds']:.2f} s, {ours['times_floor']:.2f} times the floor, {_peak(ours)}")
    if theirs["seconds"] is None:
        ours["speed_up"], theirs["peak_bytes"] = None, None
        say("  published: out of memory")
    else:
        ours["speed_up"] = theirs["seconds"] / ours["seconds"]
        theirs.update(_memory("published", workload, theirs["chunk"]))
        say(f"  published: {theirs['seconds']:.2f} s, {_peak(theirs)}; {ours['speed_up']:.1f} times as slow")
    common = {"workload": workload.name, "output_bytes": workload.output_bytes}
    return [{"case": "anyup", **common, **ours}, {"case": "published", **common, **theirs}]


def _compare_times(workload: Workload, rate: float) -> tuple[Row, Row]:
    """Parity and times; what is held for them is gone when memory is measured."""
    model = cases.model()
    baseline = published.Published(model)
    image, features = workload.inputs()

    def run_ours() -> torch.Tensor:
        return model(image, features)

    def run_theirs() -> torch.Tensor:
        return baseline(image, features, chunk)

    with torch.inference_mode():
        ours: Row = {"difference": parity.check_sample(model, workload)}
        needed, available = published.least_bytes(workload), machine.available_bytes()
        if available is not None and needed > available:
            ours.update(interleave({"anyup": run_ours}, _REPEATS)["anyup"].as_row())
            return ours, {"seconds": None, "needed_bytes": needed, "available_bytes": available, "chunk": None}
        start = time.perf_counter()
        baseline.mask(workload.size, workload.grid)
        theirs: Row = {"mask_seconds": time.perf_counter() - start}
        times = baseline.chunk_times(workload)
        chunk = theirs["chunk"] = published.best_chunk(times)
        theirs["sampled_chunks"] = {str(candidate or "all"): seconds for candidate, seconds in times.items()}
        say(f"  published: chunks of {chunk or 'all'} are best")
        if published.expected_seconds(workload, rate) <= _REPEATED:
            ours["difference"] = parity.check(run_ours(), run_theirs(), workload.name)
            timings = interleave({"anyup": run_ours, "published": run_theirs}, _REPEATS)
        else:
            timings = interleave({"anyup": run_ours}, _REPEATS)
            kept: list[torch.Tensor] = []
            timings["published"] = once(lambda: kept.append(run_theirs()))
            ours["difference"] = parity.check(run_ours(), kept.pop(), workload.name)
    ours.update(timings["anyup"].as_row())
    theirs.update(timings["published"].as_row())
    limits = theirs["credible_seconds"] = published.credible_seconds(workload, rate)
    if limits and theirs["seconds"] > limits[0]:
        print(
            f"warning: {workload.name}: the baseline took {theirs['seconds']:.1f} s, "
            f"the published code would take {limits[0]:.1f} to {limits[1]:.1f} s here",
            file=sys.stderr,
        )
    return ours, theirs


def curve(rate: float) -> list[Row]:
    """Ours over resolution: time per pixel beside the exact size of the windows."""
    rows = []
    for workload in CURVE:
        model = cases.model()
        difference = parity.check_sample(model, workload)
        call = cases.build("anyup", workload)
        floor = machine.floor_seconds(workload, rate)
        timing = interleave({workload.name: call}, _REPEATS if floor < 5 else 3)[workload.name]
        rows.append(
            {
                "case": workload.name,
                "workload": workload.name,
                "difference": difference,
                "pixels": workload.pixels,
                "keys": workload.keys,
                "mean_window": workload.mean_window(model.window),
                "nanoseconds_per_pixel": timing.median / workload.pixels * 1e9,
                "floor_seconds": floor,
                "output_bytes": workload.output_bytes,
                **timing.as_row(),
                **_memory("anyup", workload),
            }
        )
        say(f"  {workload.name}: {timing.median:.2f} s, {rows[-1]['nanoseconds_per_pixel']:.0f} ns a pixel")
    return rows


def unification(rate: float) -> list[Row]:
    """The feature unification alone, ours and as its definition reads."""
    workload = UNIFICATION
    names = {case: f"feature_unification/{case}" for case in ("torch", "reference")}
    calls = {case: cases.build(name, workload) for case, name in names.items()}
    difference = parity.check(calls["torch"](), calls["reference"](), "feature unification")
    timings = interleave(calls, _REPEATS)
    rows = []
    for case, name in names.items():
        rows.append(
            {
                "case": case,
                "workload": f"{workload.grid[0]} x {workload.grid[1]}, C {workload.channels}",
                "difference": difference,
                **timings[case].as_row(),
                **_memory(name, workload),
            }
        )
        say(f"  {case}: {timings[case].median:.2f} s, {gigabytes(rows[-1]['peak_bytes'])}")
    return rows


def head(rate: float) -> list[Row]:
    """A linear head before the upsampling instead of after it; the window attention alone."""
    rows = []
    for workload in (square(448, 32), square(1024, 64)):
        for pair in (
            ("head_after", "head_before"),
            ("window_attention/torch", "window_attention_of_classes/torch"),
        ):
            calls = {case: cases.build(case, workload) for case in pair}
            if pair[0] == "head_after":
                parity.check(calls[pair[1]](), calls[pair[0]](), f"head, {workload.name}")
                written = {case: calls[case]().nbytes for case in pair}
                written["head_after"] += workload.output_bytes  # what the head reads is written first
            else:
                written = {case: calls[case]().nbytes for case in pair}
            timings = interleave(calls, _REPEATS if workload.size[0] < 1000 else 3)
            for case in pair:
                rows.append(
                    {
                        "case": f"{case}, {workload.name}",
                        "workload": workload.name,
                        "written_bytes": written[case],
                        **timings[case].as_row(),
                        **_memory(case, workload),
                    }
                )
                say(f"  {rows[-1]['case']}: {timings[case].median:.3f} s, {gigabytes(written[case])} written")
            del calls
    return rows


def large(rate: float) -> list[Row]:
    """Peak and work of large images within a budget."""
    rows = []
    for name in high_resolution.REACH:
        row = {"case": name, **high_resolution.measure(name, torch.get_num_threads())}
        rows.append(row)
        say(f"  {row['text']}: {gigabytes(row['peak_bytes'])}, {row['processor_seconds']:.0f} processor seconds")
    return rows


PARTS: dict[str, Callable[[float], list[Row]]] = {
    **{str(workload.size[0]): functools.partial(compare, workload) for workload in REACH},
    "curve": curve,
    "unification": unification,
    "head": head,
    "high-resolution": large,
}


def measure(part: str) -> list[Row]:
    """The rows of a part, each with the machine it belongs to."""
    rate, bandwidth = machine.matmul_rate(), machine.copy_bandwidth()
    say(f"{part}: {rate / 1e9:.0f} GFLOP/s, copies {bandwidth / 1e9:.0f} GB/s")
    rows = PARTS[part](rate)
    after = machine.matmul_rate()
    if abs(after - rate) > _STEADY * rate:
        print(
            f"warning: {part}: a matrix product ran at {rate / 1e9:.0f} GFLOP/s before and "
            f"{after / 1e9:.0f} after: the machine was busy or throttled",
            file=sys.stderr,
        )
    notes = {"matmul_rate": rate, "matmul_rate_after": after, "copy_bandwidth": bandwidth}
    return [{**row, **notes, **machine.describe().as_row()} for row in rows]


def gigabytes(size: int | None) -> str:
    """For people; None means that memory did not suffice."""
    return "out of memory" if size is None else f"{size / 1e9:.2f} GB"


def say(text: str) -> None:
    """Progress, at once."""
    print(text, flush=True)


def _peak(row: Row) -> str:
    return f"peak {gigabytes(row['peak_bytes'])}"


def _memory(case: str, workload: Workload, chunk: int | None = None) -> Row:
    found = memory.measure(case, workload, chunk=chunk)
    return {"peak_bytes": found.peak_bytes, "peak_is_exact": found.exact}


def _is_current(rows: list[Row] | None) -> bool:
    """Whether a part was measured on this machine with this commit."""
    here = machine.describe().as_row()
    return bool(rows) and all(row.get(name) == value for row in rows or [] for name, value in here.items())


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reach", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=results.DEFAULT, help="results, kept up to date")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part (may be repeated)")
    parser.add_argument("--resume", action="store_true", help="keep what this commit stored here")
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own default)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.5:
        print(f"warning: the load is {busy:.1f} already: figures want an idle machine", file=sys.stderr)
    stored = results.read(arguments.output)
    for part in arguments.only or PARTS:
        if arguments.resume and _is_current(stored.get(part)):
            say(f"{part}: stored")
            continue
        results.store(arguments.output, part, measure(part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
